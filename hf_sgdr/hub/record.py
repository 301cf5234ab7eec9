"""What a card, a recipe file and a push want to know of a run; nothing here imports a trainer."""

from collections.abc import Sequence
from typing import Any, Protocol

from matplotlib.axes import Axes

from hf_sgdr.data.transforms import ImageTransform
from hf_sgdr.optim.layer_groups import LayerGroups
from hf_sgdr.optim.range_test import LRRangeResult
from hf_sgdr.recipe import RunResults, Stage


class TrainedRun(Protocol):
    """A trainer that has trained, as far as sharing goes; [`SGDRTrainer`] is one.

    Args:
        model (`PreTrainedModel`): with the weights that are shared.
        args ([`SGDRTrainingArguments`]): of the run.
        train_dataset, eval_dataset (`datasets.Dataset`): its images.
        layer_groups ([`LayerGroups`]): their names, in the tables.
        fits, fit_stages (`list[dict]`): what each fit did, and what a stage would be told to do the same.
        range_tests (`dict`): by the name of the fit that came after it.
        run (`tuple` or None): stages and results of the last [`run_stages`].
        trained_at (`float`): when it last trained, in seconds since the epoch.
        hub_model_id (`str` or None): the repository on the Hub, once it is known.
    """

    model: Any
    history: Any
    features: Any
    args: Any
    train_dataset: Any
    eval_dataset: Any
    layer_groups: LayerGroups
    fits: list[dict[str, Any]]
    fit_stages: list[dict[str, Any]]
    range_tests: dict[str, LRRangeResult]
    run: tuple[Sequence[Stage], RunResults] | None
    trained_at: float
    hub_model_id: str | None

    @property
    def train_transform(self) -> ImageTransform:
        """What training sees."""

    @property
    def eval_transform(self) -> ImageTransform:
        """What evaluation sees."""

    @property
    def feature_dtype(self) -> str:
        """The precision of training features."""

    def plot_lr(self, ax: Axes | None = None) -> Axes:
        """The rates of the last fit."""

    def is_world_process_zero(self) -> bool:
        """Whether this process writes."""

    def create_model_card(self, **facts: Any) -> None:
        """Write the card of what was measured."""
