"""Layer groups: which parameters are early, middle and head; which of them are frozen; a rate for each.

Works on any PyTorch training loop and on a stock `transformers.Trainer`. Frozen means still: no gradient, and
batch-norm statistics that do not move, although the Trainer calls `model.train()` in every step.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments

from hf_sgdr.optim.architecture import body_stages, head_modules

# Normalisation layers of timm and transformers derive from these or carry "norm" in their class name.
_NORM_CLASSES = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class LayerGroups:
    """Consecutive groups of a model's layers, from the input to the head.

    Make one with [`LayerGroups.from_model`], or give the groups yourself.

    Args:
        model (`nn.Module`): the model; it is not copied.
        groups (`dict[str, list[str]]`): for each group's name, in order from the input to the head, the names of its
            parameters as in `model.named_parameters()`. Each parameter belongs to exactly one group.
        head (`nn.Module`, *optional*): the last group's module, where it is one module: its input is what
            precomputing stores.

    Raises:
        ValueError: if a parameter is in no group, in two, or not in the model.
    """

    def __init__(self, model: nn.Module, groups: dict[str, list[str]], head: nn.Module | None = None) -> None:
        self.model = model
        self.head = head
        self.names = list(groups)
        self._parameter_names = list(groups.values())
        self._freeze_batch_norm = False
        given = [name for names in self._parameter_names for name in names]
        expected = [name for name, _ in model.named_parameters()]
        if sorted(given) != sorted(expected):
            wrong = sorted(set(given) ^ set(expected)) or sorted({name for name in given if given.count(name) > 1})
            raise ValueError(f"Each parameter of the model must be in exactly one layer group; look at {wrong[:5]}.")

    @classmethod
    def from_model(cls, model: nn.Module, n_groups: int = 3) -> "LayerGroups":
        """Split a model into its head and `n_groups - 1` consecutive groups of body stages, the earlier the larger.

        Elsewhere their number is called `num_groups`, or `num_layers` of a layer-wise decay.

        The stages are timm's own (`group_matcher(coarse=True)`) for timm models and for
        `TimmWrapperForImageClassification`, and the blocks of the largest list of layers for models of transformers.
        resnet34's three groups are fast.ai's: [conv1, bn1, layer1, layer2], [layer3, layer4], [fc].

        Args:
            model (`nn.Module`): a classifier of timm or transformers.
            n_groups (`int`, *optional*, defaults to 3): at least 2; 3 are named early, middle and head.

        Raises:
            ValueError: if the model has no head that can be told from its body, or fewer stages than asked for.
        """
        if isinstance(n_groups, bool) or not isinstance(n_groups, int) or n_groups < 2:
            raise ValueError(f"n_groups={n_groups!r}: must be an integer >= 2, the head and its body.")
        heads = head_modules(model)
        head_parameters = {id(parameter) for head in heads for parameter in head.parameters()}
        body = [name for name, parameter in model.named_parameters() if id(parameter) not in head_parameters]
        if not head_parameters or not body:
            raise ValueError(
                f"{type(model).__name__} cannot be split into layer groups: its head cannot be told from its body. "
                "Give LayerGroups(model, groups) the parameter names of each group yourself."
            )
        stages = body_stages(model, body)
        if len(stages) < n_groups - 1:
            raise ValueError(
                f"n_groups={n_groups}: the body of {type(model).__name__} has {len(stages)} stages, "
                f"so at most {len(stages) + 1} groups, the head among them, are possible."
            )
        chunks = np.array_split(np.arange(len(stages)), n_groups - 1)
        groups = {
            name: [parameter for stage in chunk for parameter in stages[stage]]
            for name, chunk in zip(_body_names(n_groups - 1), chunks, strict=True)
        }
        groups["head"] = [name for name, parameter in model.named_parameters() if id(parameter) in head_parameters]
        return cls(model, groups, heads[0] if len(heads) == 1 else None)

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        groups = [
            f"{name}: {sum(map(torch.numel, self.parameters(i))):,}{' (frozen)' if i < self.frozen else ''}"
            for i, name in enumerate(self.names)
        ]
        return f"LayerGroups({', '.join(groups)})"

    def summary(self) -> str:
        """A table in plain text: each group's tensors, parameters, whether it trains, its first and last parameter.

        A group whose parameters train in part is "partly" trained.
        """
        rows = [("group", "trains", "tensors", "parameters", "from", "to")]
        trained = total = 0
        for i, name in enumerate(self.names):
            sizes = list(map(torch.numel, self.parameters(i)))
            of_trained = [parameter.numel() for parameter in self.parameters(i) if parameter.requires_grad]
            names = self._parameter_names[i] or ["–"]
            trains = "no" if not of_trained else "yes" if len(of_trained) == len(sizes) else "partly"
            rows.append((name, trains, f"{len(sizes):,}", f"{sum(sizes):,}", names[0], names[-1]))
            total, trained = total + sum(sizes), trained + sum(of_trained)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        shape = "  ".join(f"{{:{'>' if i in (2, 3) else '<'}{width}}}" for i, width in enumerate(widths))
        lines = [shape.format(*row).rstrip() for row in rows]
        return "\n".join([*lines, f"{trained:,} of {total:,} parameters train"])

    @property
    def frozen(self) -> int:
        """How many groups, from the input on, are frozen, by whichever object; the head counts as trained."""
        for i in range(len(self) - 1):
            if any(parameter.requires_grad for parameter in self.parameters(i)):
                return i
        return len(self) - 1

    @property
    def first_trained(self) -> int:
        """The first group that trains, in the form that results and recipes record: -1 the head alone, 0 all."""
        return -1 if self.frozen == len(self) - 1 else self.frozen

    def parameter_names(self, i: int) -> list[str]:
        """The names of a group's parameters, as in `model.named_parameters()`."""
        return list(self._parameter_names[i])

    def parameters(self, i: int) -> list[nn.Parameter]:
        """A group's parameters, in the model's order; `i` counts as in Python, so -1 is the head."""
        return [self.model.get_parameter(name) for name in self._parameter_names[i]]

    def freeze_to(self, n: int) -> None:
        """Freeze all groups before group `n` and train the rest; `n` counts as in Python, so -1 trains the head only.

        Frozen parameters have `requires_grad` False and no gradient; the batch norms among them keep their statistics
        under `model.train()`, by a forward pre-hook. What is frozen is a state of the model: where it has several
        `LayerGroups`, the last call decides.

        Raises:
            ValueError: if there is no group `n`.
        """
        frozen = self.index(n)
        for i in range(len(self)):
            for parameter in self.parameters(i):
                parameter.requires_grad_(i >= frozen)
                if i < frozen:
                    parameter.grad = None
        self._hold_batch_norms_still()

    def index(self, n: int) -> int:
        """The number of group `n` counted from the input: -1 gives that of the head.

        Raises:
            ValueError: if there is no group `n`.
        """
        if isinstance(n, bool) or not isinstance(n, int) or not -len(self) <= n < len(self):
            raise ValueError(
                f"freeze_to({n!r}): there are {len(self)} layer groups ({', '.join(self.names)}), "
                f"so it must be an integer from {-len(self)} to {len(self) - 1}."
            )
        return n % len(self)

    def unfreeze(self) -> None:
        """Train every group."""
        self.freeze_to(0)

    @property
    def freeze_batch_norm(self) -> bool:
        """Whether the batch norms of groups that train keep their statistics too (fast.ai 0.7's `bn_freeze`).

        Their weights still train. With few or unlike images a batch's own statistics serve a pretrained body badly.
        """
        return self._freeze_batch_norm

    @freeze_batch_norm.setter
    def freeze_batch_norm(self, value: bool) -> None:
        self._freeze_batch_norm = value
        self._hold_batch_norms_still()

    def learning_rates(self, lrs: float | Sequence[float] | slice) -> list[float]:
        """One rate a group: a number serves all, `slice(a, b)` spreads geometrically from a to b, a list is checked.

        Raises:
            ValueError: if there are not as many rates as groups, one is negative or no number, or all are 0.
        """
        if isinstance(lrs, slice):
            ends = _number(lrs.start), _number(lrs.stop)
            if lrs.step is not None or not all(0 < end < float("inf") for end in ends):
                raise ValueError(f"{lrs}: give slice(lowest, highest), both rates finite numbers above 0.")
            rates = [float(rate) for rate in np.geomspace(*ends, len(self))]
        elif isinstance(lrs, Sequence | np.ndarray | torch.Tensor) and not isinstance(lrs, str):
            rates = [_number(rate) for rate in lrs]
        else:
            rates = [_number(lrs)] * len(self)
        if len(rates) != len(self):
            raise ValueError(
                f"{len(rates)} learning rates for {len(self)} layer groups ({', '.join(self.names)}): "
                "give one number for all of them, or one rate a group."
            )
        if not all(0 <= rate < float("inf") for rate in rates) or not any(rates):
            raise ValueError(
                f"Learning rates {lrs!r}: each must be a finite number, zero or more, and one above zero; "
                "give one number, one a layer group, or slice(lowest, highest)."
            )
        return rates

    def param_groups(self, lrs: float | Sequence[float] | slice, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Parameter groups for a torch optimizer, in the order of the layer groups, each with its own rate.

        All parameters are in, frozen ones too: they have no gradient, so no optimizer touches them, and a checkpoint
        keeps its shape when more of the model is unfrozen. With weight decay each layer group gives two parameter
        groups, of which the second, biases and normalisation weights, has none.

        Args:
            lrs (`float`, sequence of `float` or `slice`): see [`LayerGroups.learning_rates`].
            weight_decay (`float`, *optional*, defaults to 0.0): for weights that are neither bias nor normalisation.
        """
        undecayed = self._undecayed_names() if weight_decay else set()
        groups: list[dict[str, Any]] = []
        for name, names, lr in zip(self.names, self._parameter_names, self.learning_rates(lrs), strict=True):
            for decay, is_undecayed in ((weight_decay, False), (0.0, True)):
                members = [member for member in names if (member in undecayed) is is_undecayed]
                if members:
                    parameters = [self.model.get_parameter(member) for member in members]
                    groups.append({"params": parameters, "lr": lr, "weight_decay": decay, "name": name})
        return groups

    def optimizer(self, args: TrainingArguments, *, lr_decay: float = 1.0) -> Optimizer:
        """The Trainer's own optimizer, with layer-wise decay of the rate: AdamW, or what `args.optim` says.

        For a stock Trainer: `Trainer(model, args, optimizers=(groups.optimizer(args, lr_decay=0.75), None))`.
        (Layer-wise decay: Clark et al. 2020, "ELECTRA", section 3.1.)

        Args:
            args ([`~transformers.TrainingArguments`]): its optimizer, weight decay and learning rate, the head's.
            lr_decay (`float`, *optional*, defaults to 1.0): each group's rate as a share of that of the group above.

        Raises:
            ValueError: if `lr_decay` is not above 0 and at most 1.
        """
        if not 0.0 < _number(lr_decay) <= 1.0:
            raise ValueError(f"lr_decay={lr_decay!r}: must be a share of the rate of the group above, in (0, 1].")
        rates = [args.learning_rate * lr_decay**i for i in reversed(range(len(self)))]
        model: Any = self.model
        optimizer_class, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
        kwargs = {name: value for name, value in kwargs.items() if name != "lr"}  # each group has its own
        return optimizer_class(self.param_groups(rates, args.weight_decay), **kwargs)

    def _undecayed_names(self) -> set[str]:
        norms = {
            f"{name}.{parameter}"
            for name, module in self.model.named_modules()
            if isinstance(module, _NORM_CLASSES) or "norm" in type(module).__name__.lower()
            for parameter, _ in module.named_parameters(recurse=False)
        }
        # as in transformers' Trainer, tables of relative positions among them
        return norms | {name for name, _ in self.model.named_parameters() if "bias" in name.lower()}

    def _hold_batch_norms_still(self) -> None:
        # Found on the modules, not kept here: others may have put them there, as may a deep copy's original.
        for module in self.model.modules():
            hooks = module._forward_pre_hooks
            for key in [key for key, hook in hooks.items() if hook is _hold_still]:
                del hooks[key]
        for norm in self._still_batch_norms():
            norm.register_forward_pre_hook(_hold_still)

    def _still_batch_norms(self) -> Iterator[nn.Module]:
        """Batch norms of frozen groups, or all; those without weights follow the layer before them."""
        frozen_names = {name for names in self._parameter_names[: self.frozen] for name in names}
        last_was_frozen = bool(frozen_names)
        for module_name, module in self.model.named_modules():
            own = [f"{module_name}.{name}" for name, _ in module.named_parameters(recurse=False)]
            if own:
                last_was_frozen = own[0].removeprefix(".") in frozen_names
            if isinstance(module, _BatchNorm) and (last_was_frozen or self._freeze_batch_norm):
                yield module


def _number(value: Any) -> float:
    """A number as a float; NaN for what is none."""
    try:
        return float("nan") if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        return float("nan")


def _hold_still(module: nn.Module, args: tuple[Any, ...]) -> None:
    module.training = False


def _body_names(n: int) -> list[str]:
    return {1: ["body"], 2: ["early", "middle"]}.get(n, [f"body_{i}" for i in range(1, n + 1)])
