"""The public names: what `hf_sgdr/__init__.py` imports when it is first asked for."""

from .callbacks.snapshots import SnapshotCallback as SnapshotCallback
from .callbacks.snapshots import average_weights as average_weights
from .callbacks.snapshots import ensemble_predictions as ensemble_predictions
from .callbacks.unfreezing import StagedUnfreezing as StagedUnfreezing
from .data.folders import load_image_folder as load_image_folder
from .data.hub import load_image_dataset as load_image_dataset
from .data.transforms import ImageTransform as ImageTransform
from .data.transforms import image_transforms as image_transforms
from .features.store import FeatureStore as FeatureStore
from .inference.interpretation import ClassifierInterpretation as ClassifierInterpretation
from .inference.pipeline import TTAImageClassificationPipeline as TTAImageClassificationPipeline
from .inference.pipeline import pipeline as pipeline
from .models.classifiers import create_image_classifier as create_image_classifier
from .optim.layer_groups import LayerGroups as LayerGroups
from .optim.range_test import LRRangeResult as LRRangeResult
from .optim.range_test import LRRangeTest as LRRangeTest
from .optim.schedule import SGDRSchedule as SGDRSchedule
from .optim.schedule import get_sgdr_schedule as get_sgdr_schedule
from .recipe import LESSON as LESSON
from .recipe import RunResults as RunResults
from .recipe import Stage as Stage
from .training.arguments import SGDRTrainingArguments as SGDRTrainingArguments
from .training.stages import run_stages as run_stages
from .training.trainer import SGDRTrainer as SGDRTrainer
from .version import __version__ as __version__
