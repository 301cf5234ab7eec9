"""Gradual unfreezing inside one `train()`, on any `transformers.Trainer`."""

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_sgdr.layer_groups import LayerGroups


class StagedUnfreezing(TrainerCallback):
    """Freezes layer groups as epochs begin.

    `StagedUnfreezing({0: -1, 2: 1, 4: 0})` trains the head alone for two epochs, then all but the first group for two,
    then everything. Leave the model trainable when the Trainer gets it: the optimizer and, under several processes, DDP
    must know every parameter that is ever to train. What is frozen is decided by the epoch alone, so a resumed run
    needs nothing more.

    Args:
        freeze_to (`dict[int, int]`): for an epoch, the first layer group that trains from then on; 0 must be among the
            epochs.
        layer_groups ([`LayerGroups`], *optional*): by default three groups of the Trainer's model.

    Raises:
        ValueError: if epoch 0 is missing, or an epoch or a group is no whole number.
    """

    def __init__(self, freeze_to: dict[int, int], layer_groups: LayerGroups | None = None) -> None:
        numbers = [*freeze_to, *freeze_to.values()]
        if any(type(number) is not int for number in numbers) or min([0, *freeze_to]) < 0:
            raise ValueError(f"StagedUnfreezing({freeze_to}): give whole numbers, {{epoch: first group that trains}}.")
        if 0 not in freeze_to:
            raise ValueError(
                f"StagedUnfreezing({freeze_to}): say what trains from epoch 0 on, such as {{0: -1, 2: 0}}."
            )
        self.freeze_to = dict(sorted(freeze_to.items()))
        self.layer_groups = layer_groups

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Freeze for the first epoch, or the one that a run is resumed in.

        Raises:
            ValueError: if there is no such group, or a parameter that is to train could not.
        """
        model: nn.Module = kwargs["model"]
        if self.layer_groups is None:
            self.layer_groups = LayerGroups.from_model(model)
        groups = self.layer_groups
        for number in self.freeze_to.values():
            if not -len(groups) <= number < len(groups):
                groups.freeze_to(number)  # says what is allowed
        first = min(number % len(groups) for number in self.freeze_to.values())
        later = [name for i in range(first, len(groups)) for name in groups.parameter_names(i)]
        known = {id(parameter) for group in kwargs["optimizer"].param_groups for parameter in group["params"]}
        lost = [name for name in later if id(model.get_parameter(name)) not in known]
        still = [name for name in later if not model.get_parameter(name).requires_grad]
        if lost or (still and args.world_size > 1):
            what = "the optimizer was made" if lost else "the model was wrapped for several processes"
            raise ValueError(
                f"StagedUnfreezing: {len(lost or still)} parameters, such as {(lost or still)[0]}, are to train later, "
                f"but were frozen when {what}. Leave all parameters trainable before train(); this callback freezes."
            )
        if args.world_size > 1 and args.ddp_find_unused_parameters is False:
            raise ValueError(
                "StagedUnfreezing needs ddp_find_unused_parameters=True or None: frozen parameters have no gradient."
            )
        self._freeze(state)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Freeze as this epoch wants it."""
        self._freeze(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model trainable, as it came, so that it may be trained again."""
        if self.layer_groups is not None:
            self.layer_groups.unfreeze()

    def _freeze(self, state: TrainerState) -> None:
        assert self.layer_groups is not None
        epoch = int(state.epoch or 0)
        self.layer_groups.freeze_to([number for begin, number in self.freeze_to.items() if begin <= epoch][-1])
