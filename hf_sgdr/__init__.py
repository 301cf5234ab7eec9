"""The fast.ai lesson-1 recipe for Hugging Face's Trainer, as plug-ins that also work alone."""

from hf_sgdr.data import load_image_dataset, load_image_folder
from hf_sgdr.features import FeatureStore
from hf_sgdr.interpretation import ClassifierInterpretation
from hf_sgdr.layer_groups import LayerGroups
from hf_sgdr.modeling import create_image_classifier
from hf_sgdr.pipelines import TTAImageClassificationPipeline, pipeline
from hf_sgdr.range_test import LRRangeResult, LRRangeTest
from hf_sgdr.schedule import SGDRSchedule, get_sgdr_schedule
from hf_sgdr.snapshots import SnapshotCallback, average_weights, ensemble_predictions
from hf_sgdr.stages import LESSON, RunResults, Stage, run_stages
from hf_sgdr.trainer import SGDRTrainer
from hf_sgdr.training_args import SGDRTrainingArguments
from hf_sgdr.transforms import PhotoTransform, image_transforms
from hf_sgdr.unfreezing import StagedUnfreezing
from hf_sgdr.version import __version__

__all__ = [
    "LESSON",
    "ClassifierInterpretation",
    "FeatureStore",
    "LRRangeResult",
    "LRRangeTest",
    "LayerGroups",
    "PhotoTransform",
    "RunResults",
    "SGDRSchedule",
    "SGDRTrainer",
    "SGDRTrainingArguments",
    "SnapshotCallback",
    "Stage",
    "StagedUnfreezing",
    "TTAImageClassificationPipeline",
    "__version__",
    "average_weights",
    "create_image_classifier",
    "ensemble_predictions",
    "get_sgdr_schedule",
    "image_transforms",
    "load_image_dataset",
    "load_image_folder",
    "pipeline",
    "run_stages",
]
