"""Gradual unfreezing inside one `train()`, on any `transformers.Trainer`."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length
from typing_extensions import override

from hf_sgdr.optim.layer_groups import LayerGroups


class StagedUnfreezing(TrainerCallback):
    """Freezes layer groups as epochs begin.

    `StagedUnfreezing({0: -1, 2: 1, 4: 0})` trains the head alone for two epochs, then all but the first group for two,
    then everything; `StagedUnfreezing({0: "head", 2: "middle", 4: "early"})` is the same. Leave the model trainable
    when the Trainer gets it: the optimizer and, under several processes, DDP must know every parameter that is ever to
    train. What is frozen is decided by the epoch alone, so a resumed run needs nothing more. After training the
    parameters are trainable or frozen as before.

    Args:
        freeze_to (`dict[int, int | str]`): for an epoch, the first layer group that trains from then on, by its number
            or its name; 0 must be among the epochs.
        layer_groups ([`LayerGroups`], *optional*): by default three groups of the model that each training is of.

    Raises:
        ValueError: if epoch 0 is missing, an epoch is not an integer >= 0, or a group is neither integer nor name.
    """

    def __init__(self, freeze_to: Mapping[int, int | str], layer_groups: LayerGroups | None = None) -> None:
        is_epoch = [type(epoch) is int and epoch >= 0 for epoch in freeze_to]
        is_group = [type(group) in (int, str) for group in freeze_to.values()]
        if not all(is_epoch + is_group):
            raise ValueError(
                f"StagedUnfreezing({freeze_to}): each key must be an epoch, an integer >= 0, and each value the number "
                "or the name of the first layer group that trains from then on."
            )
        if 0 not in freeze_to:
            raise ValueError(
                f"StagedUnfreezing({freeze_to}): say what trains from epoch 0 on, such as {{0: -1, 2: 0}}."
            )
        self.freeze_to = dict(sorted(freeze_to.items()))
        self.layer_groups = layer_groups
        self._is_given = layer_groups is not None
        self._epoch = 0
        self._before: tuple[int, list[bool]] | None = None  # frozen groups and `requires_grad` as training found them

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Freeze for the first epoch, or the one that a run is resumed in.

        Raises:
            ValueError: if there is no such group, a parameter that is to train could not, or the groups that were given
                are of another model.
        """
        model: nn.Module = kwargs["model"]
        if self.layer_groups is None or self.layer_groups.model is not model:
            if self._is_given:
                raise ValueError(
                    f"StagedUnfreezing: the layer groups are of another model than this {type(model).__name__}: give "
                    "LayerGroups.from_model(model) of the Trainer's, or leave layer_groups out."
                )
            self.layer_groups, self._before = LayerGroups.from_model(model), None
        groups = self.layer_groups
        first = min(self._number(group) for group in self.freeze_to.values())
        later = [name for i in range(first, len(groups)) for name in groups.parameter_names(i)]
        known = {id(parameter) for group in kwargs["optimizer"].param_groups for parameter in group["params"]}
        lost = [name for name in later if id(model.get_parameter(name)) not in known]
        still = [name for name in later if not model.get_parameter(name).requires_grad]
        if lost or (still and args.world_size > 1):
            what = "the optimizer was made" if lost else "the model was wrapped for several processes"
            raise ValueError(
                f"StagedUnfreezing: {len(lost or still)} parameters, such as {(lost or still)[0]}, are to train later, "
                f"but were frozen when {what}. Leave all parameters trainable before train(); this callback freezes. "
                "LayerGroups.from_model(model).unfreeze() makes them so, after a training that was interrupted, too."
            )
        if args.world_size > 1 and args.ddp_find_unused_parameters is False:
            raise ValueError(
                "StagedUnfreezing needs ddp_find_unused_parameters=True or None: frozen parameters have no gradient."
            )
        if self._before is None:  # else a training was interrupted, and nothing was put back
            self._before = groups.frozen, [parameter.requires_grad for parameter in model.parameters()]
        # Without a length `state.epoch` is a share of max_steps, and the Trainer counts epochs anew after a resume.
        self._epoch = int(state.epoch or 0) if has_length(kwargs.get("train_dataloader")) else 0
        self._freeze()

    @override
    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Freeze as this epoch wants it."""
        self._freeze()
        self._epoch += 1

    @override
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model as it came, so that it may be trained again."""
        if self.layer_groups is not None and self._before is not None:
            (frozen, trainable), self._before = self._before, None
            self.layer_groups.freeze_to(frozen)  # batch norms too
            for parameter, is_trainable in zip(kwargs["model"].parameters(), trainable, strict=True):
                parameter.requires_grad_(is_trainable)

    def _freeze(self) -> None:
        assert self.layer_groups is not None
        group = [group for begin, group in self.freeze_to.items() if begin <= self._epoch][-1]
        self.layer_groups.freeze_to(self._number(group))

    def _number(self, group: int | str) -> int:
        assert self.layer_groups is not None
        names = self.layer_groups.names
        if isinstance(group, int):
            return self.layer_groups.index(group)
        if group not in names:
            raise ValueError(f"StagedUnfreezing: there is no layer group {group!r}; there are {', '.join(names)}.")
        return names.index(group)
