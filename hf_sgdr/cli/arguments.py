"""Arguments that the recipes share, in groups."""

from dataclasses import dataclass
from typing import Any, Literal

from transformers import hf_argparser

from hf_sgdr.hub.card_facts import require_license
from hf_sgdr.optim.schedule import require_whole
from hf_sgdr.recipe import SAID_BY_STAGES
from hf_sgdr.training.arguments import SGDRTrainingArguments

HfArg: Any = hf_argparser.HfArg  # it says that it returns a Field, which no annotated field may be
# What recipes/train.py does not take, with the reason; a --learning_rate takes the place of range tests.
DECIDED_BY_STAGES = {
    name: "the stages say that; write stages in a YAML file." for name in SAID_BY_STAGES if name != "learning_rate"
} | {
    "num_train_epochs": "the stages say how long: give cycles and cycle_len to the stages of a YAML file "
    "(recipes/configs/lesson.yaml is one), or --max_steps for a short trial.",
    "resume_from_checkpoint": "give --resume, which goes on from the last checkpoint below --output_dir.",
}

# What --help shows: our own arguments, and those of transformers that people use, in words of our own.
GROUPS: dict[str, dict[str, str | None]] = {
    "images": dict.fromkeys(
        (
            *("data_dir", "labels_file", "label_delimiter", "split_column_name", "label_pattern", "dataset_name"),
            *("streaming", "image_column_name", "label_column_name", "train_split_name", "validation_split_name"),
            *("validation_fraction", "on_error", "max_train_samples", "max_eval_samples"),
        )
    ),
    "model": dict.fromkeys(
        ("model_name_or_path", "weights_file", "pretrained", "image_size", "augment", "max_zoom", "n_groups")
    ),
    "recipe": {
        **dict.fromkeys(("stages", "start_lr", "end_lr", "num_steps", "precompute", "freeze_to", "freeze_batch_norm")),
        **dict.fromkeys(("learning_rate", "min_lr_ratio", "optim", "momentum")),
        "weight_decay": "Weight decay, of all but biases and normalization.",
        **dict.fromkeys(("per_device_train_batch_size", "class_weights", "best_by", "precompute_views", "max_steps")),
        "seed": "Of the split, a new head, batches and augmentation.",
    },
    "result": {
        "output_dir": "Folder for the model, its card, plots and results.json.",
        **dict.fromkeys(("resume", "n_aug")),
        "report_to": "Trackers: tensorboard, wandb, trackio and others, all or none.",
        **dict.fromkeys(("license", "card_photos")),
        "push_to_hub": "At the end push the model, its card and plots to the Hub.",
        "hub_model_id": "There: user/name; by default as the output folder is called.",
        **dict.fromkeys(("hub_private_repo", "push_space")),
    },
    "machine": {
        **dict.fromkeys(("per_device_eval_batch_size", "micro_batch_size")),
        "bf16": None,
        "use_cpu": "Leave the accelerator alone.",
        **dict.fromkeys(("dataloader_num_workers", "feature_dtype", "feature_memory_gb")),
        **dict.fromkeys(("cache_images", "cache_disk_gb", "augment_on_device", "verify", "keep_freed_memory")),
        "disable_tqdm": "true: no progress bars, as where standard error is no terminal.",
    },
}


@dataclass
class DataArguments:
    """Where the images are."""

    data_dir: str | None = HfArg(default=None, help="Folder of images; without any, train runs the demo.")
    labels_file: str | None = HfArg(
        default=None,
        help="Table (.csv, .tsv, .jsonl, .parquet) of files, below --data_dir, and labels.",
    )
    label_delimiter: str | None = HfArg(
        default=None, help="What parts several labels of an image in a table's cell, such as ' ' or ';'."
    )
    split_column_name: str | None = HfArg(default=None, help="Of --labels_file: says train, validation or test.")
    label_pattern: str | None = HfArg(
        default=None, help=r"Of --data_dir: the first group of this in a file's name is its class: '^(.+)_\d+'."
    )
    dataset_name: str | None = HfArg(default=None, help="A labelled image data set of the Hub, instead.")
    streaming: bool = HfArg(
        default=False, help="Of --dataset_name: read the training images as a stream, for precomputed stages."
    )
    train_split_name: str = HfArg(default="train", help="Of --dataset_name.")
    validation_split_name: str | None = HfArg(default=None, help="Of --dataset_name.")
    validation_fraction: float = HfArg(default=0.2, help="Share of each class split off without validation images.")
    on_error: Literal["raise", "skip"] = HfArg(
        default="raise", help="Unreadable images: name them all and stop, or leave them out."
    )
    max_train_samples: int | None = HfArg(
        default=None, help="At most so many training images; each class keeps its share."
    )
    max_eval_samples: int | None = HfArg(default=None, help="At most so many validation images, likewise.")

    def __post_init__(self) -> None:
        if self.dataset_name is not None and (self.data_dir is not None or self.labels_file is not None):
            raise ValueError("--dataset_name: give no --data_dir and no --labels_file beside it.")
        sources = {"split_column_name": self.labels_file, "label_pattern": self.data_dir}
        for name, source in sources.items():
            if getattr(self, name) is not None and source is None:
                needed = "labels_file" if name == "split_column_name" else "data_dir"
                raise ValueError(f"--{name} needs --{needed}.")
        of_the_hub = {
            "streaming": self.streaming,
            "train_split_name": self.train_split_name != "train",
            "validation_split_name": self.validation_split_name is not None,
        }
        for name, is_given in of_the_hub.items():
            if is_given and self.dataset_name is None:
                raise ValueError(f"--{name} needs --dataset_name.")
        if self.label_pattern is not None and self.labels_file is not None:
            raise ValueError("--label_pattern and --labels_file: labels come from one of the two.")
        if self.label_delimiter is not None and self.labels_file is None and self.data_dir is None:
            raise ValueError("--label_delimiter parts cells of a table: give --labels_file, or --data_dir with one.")
        for name in ("max_train_samples", "max_eval_samples"):
            if getattr(self, name) is not None:
                require_whole(name, getattr(self, name), at_least=1)


@dataclass
class ModelArguments:
    """Which model, and which views of the images it sees."""

    model_name_or_path: str = HfArg(
        default="timm/resnet34.a1_in1k", aliases=["--model"], help="Model id of the Hub, folder, or bare timm name."
    )
    weights_file: str | None = HfArg(default=None, help="Local weights for a bare timm name.")
    pretrained: bool = HfArg(default=True, help="Start from pretrained weights.")
    image_size: int | None = HfArg(
        default=None, help="Input side, pixels; by default timm's test size, else 9/7 of its own."
    )
    augment: str | None = HfArg(default="side_on", help="none, basic, side_on or top_down.")
    max_zoom: float = HfArg(default=1.1, help="Highest zoom of augmentation, at least 1.")


@dataclass
class RecipeArguments:
    """What recipes/train.py does."""

    stages: list[str] | None = HfArg(  # noqa: RUF009  # it makes a field
        default=None, help="lesson (the default), or some of its stages: precomputed, augmented, unfrozen."
    )
    n_aug: int = HfArg(default=4, help="Augmented views of test-time augmentation at the end; 0: none.")
    license: str | None = HfArg(default=None, help="For the card: the Hub's identifier, such as apache-2.0.")
    card_photos: bool = HfArg(default=False, help="Show some validation images in the card; it may become public.")
    push_space: bool = HfArg(
        default=False, help="With --push_to_hub: also publish a page for the model, a Gradio Space."
    )
    resume: bool = HfArg(default=False, help="Go on with an unfinished run; a finished one stays as it is.")

    def __post_init__(self) -> None:
        require_whole("n_aug", self.n_aug, at_least=0)
        require_license(self.license)


# What recipes/train.py takes.
TRAINING = (DataArguments, ModelArguments, RecipeArguments, SGDRTrainingArguments)
