"""The fast.ai lesson-1 recipe for Hugging Face's Trainer, as plug-ins that also work alone."""

from hf_sgdr.data import load_image_folder
from hf_sgdr.layer_groups import LayerGroups
from hf_sgdr.modeling import create_image_classifier
from hf_sgdr.schedule import SGDRSchedule, get_sgdr_schedule
from hf_sgdr.transforms import image_transforms
from hf_sgdr.version import __version__

__all__ = [
    "LayerGroups",
    "SGDRSchedule",
    "__version__",
    "create_image_classifier",
    "get_sgdr_schedule",
    "image_transforms",
    "load_image_folder",
]
