"""The public names: what `hf_sgdr/__init__.py` imports when it is first asked for."""

from .data import load_image_dataset as load_image_dataset
from .data import load_image_folder as load_image_folder
from .features import FeatureStore as FeatureStore
from .interpretation import ClassifierInterpretation as ClassifierInterpretation
from .layer_groups import LayerGroups as LayerGroups
from .modeling import create_image_classifier as create_image_classifier
from .pipelines import TTAImageClassificationPipeline as TTAImageClassificationPipeline
from .pipelines import pipeline as pipeline
from .range_test import LRRangeResult as LRRangeResult
from .range_test import LRRangeTest as LRRangeTest
from .schedule import SGDRSchedule as SGDRSchedule
from .schedule import get_sgdr_schedule as get_sgdr_schedule
from .snapshots import SnapshotCallback as SnapshotCallback
from .snapshots import average_weights as average_weights
from .snapshots import ensemble_predictions as ensemble_predictions
from .stages import LESSON as LESSON
from .stages import RunResults as RunResults
from .stages import Stage as Stage
from .stages import run_stages as run_stages
from .trainer import SGDRTrainer as SGDRTrainer
from .training_args import SGDRTrainingArguments as SGDRTrainingArguments
from .transforms import PhotoTransform as PhotoTransform
from .transforms import image_transforms as image_transforms
from .unfreezing import StagedUnfreezing as StagedUnfreezing
from .version import __version__ as __version__
