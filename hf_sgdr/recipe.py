"""A recipe and its outcome as plain data: `Stage`s, the lesson among them, and `RunResults`. It knows no trainer."""

import math
import re
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, NotRequired, TypedDict

import numpy as np

from hf_sgdr._utils.text import nearest
from hf_sgdr.optim.schedule import checked_steps, require_whole, total_epochs

RESULTS_SCHEMA = 2
# What the solved head is called beside a recipe's stages. No stage can have that name.
SOLVED_HEAD = "solved head"
# Arguments of training that do not change its result: where it writes, what it shows and to whom, how it is fed and by
# which machine, what its columns are called.
NO_EFFECT_ON_RESULT = re.compile(
    r"output_dir|run_name|project|log|report_to|disable_tqdm|dataloader_(?!drop_last)|push_to_hub|hub_|trackio|save_|"
    r"local_rank|resume|restore|cache_disk|feature_memory|keep_freed|ddp_|do_|use_cpu|deepspeed|fsdp|image_column|"
    r"label_column|verify"
)
# Arguments of training that the stages of a recipe decide.
SAID_BY_STAGES = (
    *("learning_rate", "group_learning_rates", "cycle_len", "cycle_mult", "num_cycles", "num_train_epochs"),
    *("freeze_to", "freeze_batch_norm", "precompute"),
)


@dataclass(frozen=True)
class Stage:
    """One stretch of training between two decisions about what trains and how.

    Args:
        name (`str`): names the stage's folder, log lines and plots.
        lr (`float`, `list[float]`, `"auto"` or None, *optional*, defaults to None): the highest rate, for the head or
            one a layer group; "auto" finds it by the range test, for layers below a head that a stage before has
            trained as far as a rate can go, up to `range_test_end`; None goes on with the rate of the stage before.
        lr_spread (`float`, *optional*, defaults to 1.0): where one rate is given or found: each layer group's is this
            many times lower than that of the group above it. (Lesson step 6: 3 to 10.)
        cycles (`int`, *optional*, defaults to 1): how many cycles, or epochs without `cycle_len`.
        cycle_len (`int`, *optional*): epochs of the first cycle; None is a constant rate.
        cycle_mult (`int`, *optional*, defaults to 1): each cycle is this many times as long as the one before.
        freeze_to (`int`, *optional*, defaults to -1): the first layer group that trains: -1 the head only, 0 all.
        precompute (`bool`, *optional*, defaults to False): train what is not frozen on precomputed features.
        freeze_batch_norm (`bool`, *optional*, defaults to False): keep all batch-norm statistics still.
        until_overfitting (`bool`, *optional*, defaults to False): train on, cycle after cycle, and stop at the end of
            the first one whose validation loss is above the best cycle end's by more than 1 % while the training loss
            fell; `max_cycles` at most, and `cycles` is ignored.
        max_cycles (`int`, *optional*, defaults to 3): for `until_overfitting`.
        snapshots (`bool`, *optional*, defaults to False): keep the weights at the end of each cycle, in
            `_runs/snapshots`; those of the last stage that asks for it stay. See [`SnapshotCallback`].
        from_best (`bool`, *optional*, defaults to False): begin from the best weights so far, also those of the solved
            head, instead of those that the stage before ended with.
        average (`bool`, *optional*, defaults to False): at the end, try averages of the weights that the stage began
            with and those that it ended with; the best of them goes on. See [`average_with_start`].
        solve (`bool`, *optional*, defaults to False): solve the head instead of training it, on a frozen body, at no
            rate. See [`solve_head`].
        views (`int`, *optional*, defaults to 0): with `precompute` or `solve`: augmented views of each training image
            that are stored beside the plain one, where the training transform augments; 0 is as the trainer's
            `precompute_views` say.
        max_batch_size (`int`, *optional*): images of a training step on each process, where
            `per_device_train_batch_size` is larger: from small data sets more steps, each farther from divergence.
        range_test_start, range_test_end (`float`, *optional*, default to 1e-7 and 10): the head's rates between which
            `lr="auto"` looks.
        range_test_steps (`int`, *optional*, defaults to 100): in so many steps.

    Raises:
        ValueError: if a value is of another type or a number is out of range.
    """

    name: str
    lr: float | list[float] | Literal["auto"] | None = None
    lr_spread: float = 1.0
    cycles: int = 1
    cycle_len: int | None = None
    cycle_mult: int = 1
    freeze_to: int = -1
    precompute: bool = False
    freeze_batch_norm: bool = False
    until_overfitting: bool = False
    max_cycles: int = 3
    snapshots: bool = False
    from_best: bool = False
    average: bool = False
    solve: bool = False
    views: int = 0
    max_batch_size: int | None = None
    range_test_start: float = 1e-7
    range_test_end: float = 10.0
    range_test_steps: int = 100

    def __post_init__(self) -> None:
        for item in fields(self):  # NumPy's numbers and arrays as plain ones, which progress.json and recipe.yaml hold
            object.__setattr__(self, item.name, _plain(getattr(self, item.name)))
        if not isinstance(self.name, str):
            raise ValueError(f"Stage name {self.name!r}: must be a string; in YAML, quote it.")
        if not self.name or not set(self.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-"):
            raise ValueError(f"Stage name {self.name!r}: use lower-case letters, digits, - and _; it names a folder.")
        if self.name == "snapshots":
            raise ValueError("Stage name 'snapshots': the folder of snapshots is called so; give another.")
        self._check_types()
        self._check_solve()
        if self.cycle_len is None and (self.cycle_mult != 1 or self.until_overfitting or self.snapshots):
            raise ValueError(f"{self.name}: cycle_mult, until_overfitting and snapshots need cycle_len.")
        try:
            total_epochs(self.cycle_len, self.cycle_mult, self.num_cycles)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error
        steps = checked_steps(self.range_test_start, self.range_test_end, self.range_test_steps)
        object.__setattr__(self, "range_test_steps", steps)
        if not 1.0 <= self.lr_spread < math.inf:
            raise ValueError(f"{self.name}: lr_spread={self.lr_spread!r}: give a factor of at least 1.")
        if self.precompute and self.freeze_to == 0:
            raise ValueError(f"{self.name}: precompute with freeze_to=0 has nothing frozen; give freeze_to=-1.")

    def _check_types(self) -> None:
        """A YAML file holds whatever somebody wrote into it."""
        for name in [item.name for item in fields(self) if isinstance(item.default, bool)]:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{self.name}: {name}={getattr(self, name)!r}: must be true or false, without quotes.")
        for name in ("lr_spread", "range_test_start", "range_test_end"):
            if not _is_number(getattr(self, name)):
                raise ValueError(f"{self.name}: {name}={getattr(self, name)!r}: must be a number.")
        rates = self.lr if isinstance(self.lr, list | tuple) else [self.lr]
        if not all(rate in (None, "auto") or _is_number(rate) for rate in rates):
            raise ValueError(f"{self.name}: lr={self.lr!r}: give a number, one a layer group, 'auto', or leave it out.")
        if isinstance(self.freeze_to, bool) or not isinstance(self.freeze_to, int):
            raise ValueError(f"{self.name}: freeze_to={self.freeze_to!r}: must be an integer: -1 the head only, 0 all.")
        for name in ("cycles", "cycle_mult", "max_cycles", "cycle_len", "max_batch_size"):
            value = getattr(self, name)
            if name in ("cycle_len", "max_batch_size") and value is None:
                continue
            value = require_whole(f"{self.name}: {name}", value, at_least=1)
            object.__setattr__(self, name, value)  # a plain int, for JSON

    def _check_solve(self) -> None:
        object.__setattr__(self, "views", require_whole(f"{self.name}: views", self.views, at_least=0))
        if self.views and not self.solve and not self.precompute:
            raise ValueError(f"{self.name}: views={self.views} are stored: they need precompute=True or solve=True.")
        if not self.solve:
            return
        allowed = {"name", "solve", "views", "precompute", "freeze_batch_norm"}
        given = [item.name for item in fields(self) if getattr(self, item.name) != item.default]
        refused = [name for name in given if name not in allowed]
        if refused:
            raise ValueError(f"{self.name}: solve trains nothing, so it takes no {', '.join(refused)}: leave that out.")
        object.__setattr__(self, "precompute", True)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Stage":
        """A stage of a YAML file; a key that is none of a stage's is an error."""
        if not isinstance(values, dict):
            raise ValueError(f"Stage {values!r}: give a mapping with a name, as {{name: head, lr: auto}}.")
        allowed = [item.name for item in fields(cls)]
        unknown = sorted(set(map(str, values)) - set(allowed))
        if unknown or "name" not in values:
            problem = f"unknown {', '.join(map(repr, unknown))}{nearest(unknown[0], allowed)}" if unknown else "no name"
            raise ValueError(f"Stage {values.get('name', '')!r}: {problem}; a stage has {', '.join(allowed)}.")
        as_numbers = ("lr", "lr_spread", "range_test_start", "range_test_end")
        return cls(**{name: _as_number(value) if name in as_numbers else value for name, value in values.items()})

    @property
    def num_cycles(self) -> int:
        """How many cycles the stage has at most."""
        return self.max_cycles if self.until_overfitting else self.cycles

    def batch_size(self, given: int) -> int:
        """Images of a training step on each process, where the arguments say `given`."""
        return given if self.max_batch_size is None else min(given, self.max_batch_size)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return [_plain(one) for one in value] if isinstance(value, list) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _as_number(value: Any) -> Any:
    """YAML reads 1e-3 as text; what is no number stays, and is refused when the stage is made."""
    if isinstance(value, list):
        return [_as_number(one) for one in value]
    with suppress(ValueError):
        return float(value) if isinstance(value, str) else value
    return value


# The lesson's eight steps. Steps 1 and 5 (precompute and augmentation, what is frozen) are said by each stage; steps 2
# and 7 (the range test) are lr="auto"; step 6 (lower rates for earlier groups) is lr_spread.
LESSON: tuple[Stage, ...] = (
    # 1. Enable precompute. 2. lr_find(). 3. Train the last layer from precomputed activations for 1-2 epochs. Beside it
    # the head is solved on the same features, with those of four augmented views of each image.
    Stage("precomputed", lr="auto", cycles=2, precompute=True, views=4),
    # 4. Train the last layer with data augmentation for 2-3 epochs with cycle_len=1: on the stored views.
    Stage("augmented", cycles=3, cycle_len=1, precompute=True, views=4),
    # 5. Unfreeze. 6. Earlier layers at 3x-10x lower rates. 7. lr_find(). 8. cycle_mult=2 until over-fitting. It begins
    # from the best head so far (linear probing, then fine-tuning: Kumar et al. 2022, arXiv 2202.10054).
    # The statistics of batch norm stay: on 600 images of two classes, validation loss .047 -> .041 with them still,
    # -> .13 with those of the batches.
    Stage(
        "unfrozen",
        lr="auto",
        lr_spread=3.0,
        cycle_len=1,
        cycle_mult=2,
        freeze_to=0,
        freeze_batch_norm=True,
        until_overfitting=True,
        max_cycles=2,
        from_best=True,
        average=True,
        max_batch_size=16,
        # From a solved head the loss has nowhere to fall. The test sees whether it takes off below the rate at which
        # four data sets gained; a step through the whole network costs a thousand times one through the head.
        range_test_start=1e-4,
        range_test_end=1.5e-3,
        range_test_steps=12,
    ),
)


class FitRecord(TypedDict):
    """What one fit did, in plain values: an entry of `results.json` and a line of the model card.

    Keys:
        name (`str`): of the fit, or the stage.
        epochs (`int`, or `float` where `max_steps` ended it), cycles (`int`): how many were finished.
        learning_rates (`list[float]`): the highest of each layer group.
        train_loss, eval_loss, eval_accuracy (`float` or None): the last ones; None where there was none. Unbalanced
            classes also have eval_balanced_accuracy and eval_f1; several labels an image have eval_map and eval_f1
            instead of eval_accuracy.
        seconds (`float`): how long it took.
        precompute (`bool`), freeze_to (`int`): on what it trained, and the first layer group that did.
        best_epoch (`float` or None): of the lowest validation loss.
        kept (`dict`): epoch, eval_loss and eval_accuracy of the weights that the model has afterwards.
        max_steps (`int` or None): where that cut the fit off.
        cv_loss, cv_accuracy (`float`): of a solved head alone: in cross-validation on the training images.
    """

    name: str
    epochs: float
    cycles: int
    learning_rates: list[float]
    train_loss: float | None
    eval_loss: float | None
    eval_accuracy: NotRequired[float | None]
    eval_balanced_accuracy: NotRequired[float | None]
    eval_f1: NotRequired[float | None]
    eval_map: NotRequired[float | None]
    seconds: float
    precompute: bool
    freeze_to: int
    best_epoch: float | None
    kept: dict[str, float | None]
    max_steps: int | None
    cv_loss: NotRequired[float]
    cv_accuracy: NotRequired[float]


@dataclass
class RunResults:
    """What a recipe did: the content of `results.json`.

    Args:
        world_size (`int`): how many processes.
        stages (`list[FitRecord]`): a record for each stage.
        best (`dict`): stage, epoch, eval_loss and eval_accuracy of the weights that the model has now, and metric, by
            which they were chosen: "eval_loss", or with several evaluation sets the mean of their losses.
        tta (`dict`): loss and metrics with test-time augmentation, where that was done, and `plain_weight`, how much
            the plain image counts in it.
        solved (`FitRecord` or None): of the head solved on the features of a recipe that precomputes: a yardstick for
            its stages. Its name is `SOLVED_HEAD`, or that of the stage that solved it.
        run (`str`): the SHA-256 of all that the run depends on: arguments, stages, images, transforms, starting
            weights, processes. Empty for fits that no recipe did.
    """

    world_size: int
    stages: list[FitRecord] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)
    tta: dict[str, float] = field(default_factory=dict)
    run: str = ""
    solved: FitRecord | None = None

    @property
    def rows(self) -> list[FitRecord]:
        """What a table of the run shows: the solved head, where no stage is that, and the stages."""
        return self.stages if self.solved is None or self.solved in self.stages else [self.solved, *self.stages]

    @property
    def metrics(self) -> list[str]:
        """The metrics of the run beside the loss, by their names in its records: "accuracy" for most."""
        names = ("accuracy", "balanced_accuracy", "f1", "map")
        return [name for name in names if any(row.get(f"eval_{name}") is not None for row in self.rows)] or ["accuracy"]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the schema's number first."""
        return {"schema": RESULTS_SCHEMA, **asdict(self)}
