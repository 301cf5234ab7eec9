"""The arguments of `SGDRTrainer`: transformers' `TrainingArguments`, and what the recipe adds or sets differently."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from transformers import TrainingArguments

from hf_sgdr._utils.file_index import file_index
from hf_sgdr._utils.system import shows_bars, usable_processors
from hf_sgdr.optim.balance import checked_class_weights
from hf_sgdr.optim.schedule import require_whole, total_epochs

DEFAULT_BATCH = 64
# tf_efficientnet_lite0 at 288 px, all layers, two cores: 6.7 GB at 32 images, 3.9 GB at 16 and not slower, 2.5 GB at
# 8 and a fifth slower.
CPU_MICRO_BATCH = 16


def default_num_workers() -> int:
    """Worker processes that read images: with a GPU one a processor, at most eight; without one none, but threads."""
    return min(8, usable_processors()) if torch.cuda.is_available() else 0


class _EpochsOfCycles(float):
    """A number of epochs that nobody gave: `dataclasses.replace` and later changes of the cycles may change it."""


@dataclass
class SGDRTrainingArguments(TrainingArguments):
    r"""Arguments of the recipe, beside those of [`~transformers.TrainingArguments`].

    Defaults that differ from transformers': SGD with momentum 0.9, `learning_rate` 1e-2, batches of 64, evaluation and
    logging each epoch, no gradient clipping, no unused columns removed, `hub_strategy` "end", worker processes only
    beside a GPU, progress bars only on a terminal or in a notebook. The cycles decide the epochs; a `num_train_epochs`
    that disagrees is an error.

    Args:
        max_steps (`int`, *optional*, defaults to -1): end each fit after this many optimizer steps, to try whether all
            of it runs: the cycles keep their shape and are cut off, and range tests take no more steps either.
        cycle_len (`int`, *optional*, defaults to 1): epochs of the first cycle; None trains `num_cycles` epochs at a
            constant rate.
        cycle_mult (`int`, *optional*, defaults to 1): each cycle is this many times as long as the one before.
        num_cycles (`int`, *optional*, defaults to 3): how many cycles.
        min_lr_ratio (`float`, *optional*, defaults to 0.0): lowest rate of a cycle as a share of the highest.
        group_learning_rates (`list[float]`, *optional*): the highest rate of each layer group, from the input to the
            head; `learning_rate` for all by default.
        n_groups (`int`, *optional*, defaults to 3): how many layer groups (elsewhere `num_groups`).
        freeze_to (`int`, *optional*, defaults to -1): the first group that trains; -1 trains the head only, 0 all.
        precompute (`bool`, *optional*, defaults to False): train what is not frozen on its input, computed once for
            every image.
        precompute_views (`int`, *optional*, defaults to 0): augmented views of each training image that are computed
            beside the plain one and taken in turn, epoch by epoch, so that augmentation works with precompute.
        feature_dtype (`str`, *optional*, defaults to "auto"): precision in which training features are computed:
            "float32", "bfloat16", or bfloat16 where the processor or GPU has it, else float32. Evaluation is in float32
            unless it is "bfloat16".
        feature_memory_gb (`float`, *optional*): features of more GB (1e9 bytes) stay on disk and are read row by row;
            by default half of the memory that is free.
        cache_images (`bool`, *optional*, defaults to False): decode and resize each image once and keep its 8-bit
            pixels on disk, so that later epochs decode nothing.
        verify (`bool`, *optional*, defaults to False): hash and check every image file anew; by default one whose path,
            size and time of modification are those of an earlier run counts as unchanged.
        augment_on_device (`bool`, *optional*): rotate, flip and light training images in batches on the device, so that
            worker processes only read, zoom and cut; the same views up to one level of 255. Defaults to True where
            there is a GPU.
        bf16 (`bool`, *optional*): by default, on a GPU that has bfloat16, the training steps on images are computed in
            it by autocast, and nothing else: features have `feature_dtype`, heads on features and evaluation stay in
            float32. True, as in transformers, is for training and evaluation; False computes all in float32. `tf32`
            is left as torch has it: convolutions may use it, matrix products do not.
        cache_disk_gb (`float`, *optional*, defaults to 50.0): features or images of more GB than this are refused
            before they are computed.
        keep_freed_memory (`bool`, *optional*, defaults to True): on a CPU, tell the C library to keep the memory that
            training frees, which nearly halves its time; the process then holds what it has used once.
        momentum (`float`, *optional*, defaults to 0.9): of SGD.
        freeze_batch_norm (`bool`, *optional*, defaults to False): keep the statistics of batch norms still in the
            groups that train too (fast.ai 0.7's `bn_freeze`).
        micro_batch_size (`int`, *optional*): images that go through the model at once in training; the gradients of a
            larger batch are accumulated from so many, each image counting alike, and batch norms that train see the
            micro-batch. Defaults to 16 on a CPU where `per_device_train_batch_size` is not given, for a third of the
            memory, else to the whole batch. Batches of features are never divided.
        class_weights (`str` or `dict[str, float]`, *optional*): weights of the classes in the training loss and in
            `solve_head`: "balanced", inversely to their images, or some classes' weights by name, 1 for the others; on
            a command line as JSON. Evaluation stays unweighted.
        best_by (`str`, *optional*, defaults to "loss"): what decides which weights are the best: the lowest validation
            "loss", or the highest "accuracy" or "f1" (macro), ties by the loss.
        image_column_name, label_column_name (`str`, *optional*, default to "image" and "label"): the data's columns.
    """

    if TYPE_CHECKING:
        output_dir: str = ""  # never None after __post_init__
    learning_rate: float = field(default=1e-2, metadata={"help": "Highest rate; for every layer group by default."})
    optim: str = field(default="sgd", metadata={"help": "Any optimizer name of transformers."})
    per_device_train_batch_size: int | None = field(  # type: ignore[assignment]  # never None after __post_init__
        default=None, metadata={"help": f"Images a training step and device; {DEFAULT_BATCH} by default."}
    )
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Images an evaluation step and device."})
    num_train_epochs: float | None = field(  # type: ignore[assignment]  # never None after __post_init__
        default=None, metadata={"help": "Follows from the cycles; must agree."}
    )
    max_steps: int = field(
        default=-1, metadata={"help": "End each fit after so many optimizer steps, to try a run; -1: not."}
    )
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps or epoch."})
    logging_strategy: str = field(default="epoch", metadata={"help": "When to log: no, steps or epoch."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Clip gradients to this norm; 0 clips nothing."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Must be False: such a loss ends training."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must be False: images become inputs late."})
    hub_private_repo: bool | None = field(
        default=None, metadata={"help": "Make a new repository a private one.", "nargs": "?", "const": True}
    )
    hub_strategy: str = field(default="end", metadata={"help": "When to push: only end."})
    dataloader_num_workers: int = field(
        default_factory=default_num_workers, metadata={"help": "Processes that read images; 0: threads of this one."}
    )

    cycle_len: int | None = field(default=1, metadata={"help": "Epochs of the first cycle; none: constant rate."})
    cycle_mult: int = field(default=1, metadata={"help": "Each cycle is this many times as long as the last."})
    num_cycles: int = field(default=3, metadata={"help": "How many cycles."})
    min_lr_ratio: float = field(default=0.0, metadata={"help": "Lowest rate as a share of the highest."})
    group_learning_rates: list[float] | None = field(
        default=None, metadata={"help": "Highest rate of each layer group, from the input to the head.", "nargs": "+"}
    )
    n_groups: int = field(default=3, metadata={"help": "How many layer groups."})
    freeze_to: int = field(default=-1, metadata={"help": "First layer group that trains; -1: head only, 0: all."})
    precompute: bool = field(default=False, metadata={"help": "Train what is not frozen on features computed once."})
    precompute_views: int = field(default=0, metadata={"help": "Augmented views beside the plain image."})
    feature_dtype: str = field(default="auto", metadata={"help": "auto, float32 or bfloat16."})
    feature_memory_gb: float | None = field(default=None, metadata={"help": "Features above this stay on disk."})
    cache_images: bool = field(default=False, metadata={"help": "Keep decoded images on disk for later epochs."})
    augment_on_device: bool = field(
        default_factory=lambda: torch.cuda.is_available(),
        metadata={"help": "Rotate, flip and light in batches, as on a GPU."},
    )
    bf16: bool | None = field(  # type: ignore[assignment]  # None: of training steps on a GPU
        default=None,
        metadata={"help": "Train and evaluate in bfloat16; a GPU's training steps are.", "nargs": "?", "const": True},
    )
    cache_disk_gb: float = field(default=50.0, metadata={"help": "Features or images above this are refused."})
    verify: bool = field(default=False, metadata={"help": "Hash and check all image files, also unchanged ones."})
    keep_freed_memory: bool = field(default=True, metadata={"help": "On a CPU, keep freed memory: twice as fast."})
    momentum: float = field(default=0.9, metadata={"help": "Momentum of SGD."})
    freeze_batch_norm: bool = field(default=False, metadata={"help": "Keep all batch-norm statistics still."})
    micro_batch_size: int | None = field(
        default=None, metadata={"help": "Images through the model at once in training; a batch is accumulated."}
    )
    class_weights: dict | str | None = field(  # HfArgumentParser takes no dict[str, float]
        default=None, metadata={"help": "Of the training loss: balanced, or JSON: '{\"cats\": 2.0}'."}
    )
    best_by: str = field(default="loss", metadata={"help": "What decides the best weights: loss, accuracy or f1."})
    image_column_name: str = field(default="image", metadata={"help": "The data's column of images."})
    label_column_name: str = field(default="label", metadata={"help": "The data's column of class labels."})

    def __post_init__(self) -> None:
        if self.verify:
            file_index().clear()
        if self.auto_find_batch_size:
            raise ValueError(
                "auto_find_batch_size=True would cut cycles off: give micro_batch_size, which divides a batch."
            )
        is_default = self.per_device_train_batch_size is None
        if is_default:
            self.per_device_train_batch_size = DEFAULT_BATCH
        if self.micro_batch_size is not None:
            self.micro_batch_size = require_whole("micro_batch_size", self.micro_batch_size, at_least=1)
        for name, at_least in (
            ("per_device_train_batch_size", 1),
            ("per_device_eval_batch_size", 1),
            ("precompute_views", 0),
            ("gradient_accumulation_steps", 1),
        ):
            setattr(self, name, require_whole(name, getattr(self, name), at_least=at_least))
        for name in ("seed", "data_seed"):
            value = getattr(self, name)
            if value is not None:
                require_whole(name, value, at_least=0)
            if value is not None and value >= 2**32:  # NumPy takes no more
                raise ValueError(f"{name}={value!r}: must be an integer from 0 to 2**32 - 1.")
        self.settle_epochs()
        if self.feature_dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"feature_dtype={self.feature_dtype!r}: give auto, float32 or bfloat16.")
        self.class_weights = checked_class_weights(self.class_weights)
        if self.class_weights is not None and self.label_smoothing_factor:
            raise ValueError("class_weights and label_smoothing_factor: give one of the two.")
        if self.best_by not in ("loss", "accuracy", "f1"):
            raise ValueError(f"best_by={self.best_by!r}: give loss, accuracy or f1.")
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"momentum={self.momentum!r}: give a number from 0 to below 1.")
        if not 0.0 <= self.min_lr_ratio <= 1.0:
            raise ValueError(f"min_lr_ratio={self.min_lr_ratio!r}: give a share of the highest rate, from 0 to 1.")
        if not 0.0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate={self.learning_rate!r}: give a finite number above 0.")
        if not 0.0 <= self.weight_decay < float("inf"):
            raise ValueError(f"weight_decay={self.weight_decay!r}: give a finite number, zero or more.")
        if not 0.0 <= self.label_smoothing_factor < 1.0:
            factor = self.label_smoothing_factor
            raise ValueError(f"label_smoothing_factor={factor!r}: give a number from 0 to below 1.")
        if self.lr_scheduler_type != "linear":  # transformers' default
            raise ValueError(
                f"lr_scheduler_type={str(self.lr_scheduler_type)!r}: cycle_len, cycle_mult and num_cycles say how the "
                "rate changes (cycle_len=None: not at all); leave lr_scheduler_type out."
            )
        if self.remove_unused_columns or self.logging_nan_inf_filter:
            raise ValueError(
                f"remove_unused_columns={self.remove_unused_columns}, logging_nan_inf_filter="
                f"{self.logging_nan_inf_filter}: both must be False, since images become inputs late and a loss that "
                "is no number ends training; leave them out."
            )
        for name in ("feature_memory_gb", "cache_disk_gb"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name}={value!r}: give a number of GB, zero or more.")
        if self.precompute and self.freeze_to in (0, -self.n_groups):
            raise ValueError(
                f"precompute=True with freeze_to={self.freeze_to}: nothing is frozen, so there is nothing to "
                "precompute; give freeze_to=-1 or precompute=False."
            )
        if self.hub_token is not None:
            raise ValueError(
                "hub_token is not taken as an argument: it would be written beside the model. Log in with "
                "`hf auth login`, or set HF_TOKEN."
            )
        if self.push_to_hub and self.hub_strategy != "end":
            raise ValueError(
                f"hub_strategy={str(self.hub_strategy)!r} would push checkpoints, optimizer states and a pickle of the "
                'arguments: only "end" is taken. `hf-sgdr push` pushes snapshots as branches.'
            )
        if self.disable_tqdm is None and not shows_bars():
            self.disable_tqdm = True
        super().__post_init__()
        if is_default and self.micro_batch_size is None and self.device.type == "cpu":
            self.micro_batch_size = CPU_MICRO_BATCH
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # there is no device to copy to, and torch warns
        elif self.dataloader_pin_memory:
            self.accelerator_config.non_blocking = True  # type: ignore[union-attr]  # no more a dict or a path

    def settle_epochs(self) -> None:
        """Let `num_train_epochs` follow from the cycles, unless somebody gave it; called again when training begins.

        Raises:
            ValueError: if `num_train_epochs` was given and disagrees with the cycles, or a number is out of range.
        """
        if self.cycle_len is not None:
            self.cycle_len = require_whole("cycle_len", self.cycle_len, at_least=1)
        self.cycle_mult = require_whole("cycle_mult", self.cycle_mult, at_least=1)
        self.num_cycles = require_whole("num_cycles", self.num_cycles, at_least=1)
        if self.max_steps != -1:
            self.max_steps = require_whole("max_steps", self.max_steps, at_least=1)
        if self.num_train_epochs is None or isinstance(self.num_train_epochs, _EpochsOfCycles):
            self.num_train_epochs = _EpochsOfCycles(self.total_epochs)
        elif self.num_train_epochs != self.total_epochs:
            raise ValueError(
                f"num_train_epochs={self.num_train_epochs:g}, but {self._cycles_in_words()} are {self.total_epochs} "
                "epochs: leave num_train_epochs out, or change the cycles."
            )

    @property
    def total_epochs(self) -> int:
        """Epochs of all cycles together: `cycle_len * (1 + cycle_mult + cycle_mult**2 + ...)`."""
        return total_epochs(self.cycle_len, self.cycle_mult, self.num_cycles)

    def _cycles_in_words(self) -> str:
        if self.cycle_len is None:
            return f"num_cycles={self.num_cycles} at a constant rate"
        return f"cycle_len={self.cycle_len}, cycle_mult={self.cycle_mult}, num_cycles={self.num_cycles}"
