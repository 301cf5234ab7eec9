"""A model cut in two: the frozen part that makes features, and the rest that trains on them.

No model is taken apart. The features are the first input of one module, caught in the model's own forward pass; the
rest is that same forward pass with the modules before it answering at once and that input replaced. Whatever comes
between them, tokens, masks or pooling, is the model's own code.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import takewhile
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from hf_sgdr._utils.scoped import modes_restored
from hf_sgdr.models.patches import blank_images
from hf_sgdr.optim.layer_groups import LayerGroups

# Two images, so that the batch's dimension is told from others.
_PROBE = 2


class Boundary:
    """Where a model is cut. Make one with [`Boundary.at_head`] or [`Boundary.at_boundary`].

    Args:
        model (`nn.Module`): the whole classifier; it is not changed.
        module (`nn.Module`): the submodule whose input is stored.
        skipped (`dict[str, Any]`, *optional*): the modules that run before it, with what they return for two images of
            `size`. None where the module is the head, which alone gives the logits.
        size (`int`, *optional*): side of the images in pixels.
        sharing (sequence of `nn.Module`, *optional*): further modules that take the same tensor, such as a second head.
    """

    def __init__(
        self,
        model: nn.Module,
        module: nn.Module,
        skipped: dict[str, Any] | None = None,
        size: int = 0,
        sharing: Sequence[nn.Module] = (),
    ) -> None:
        self.model, self.module, self.skipped, self.size, self.sharing = model, module, skipped, size, sharing
        path = next((name for name, candidate in model.named_modules() if candidate is module), None)
        if path is None:
            raise ValueError(f"{type(module).__name__} is not a part of {type(model).__name__}.")
        self.name = "head" if skipped is None else path
        self._path = path
        self._features: torch.Tensor | None = None

    @classmethod
    def at_head(cls, model: nn.Module, head: nn.Module) -> "Boundary":
        """Cut before the head."""
        return cls(model, head)

    @classmethod
    def at_boundary(cls, groups: LayerGroups, size: int, frozen: int | None = None) -> "Boundary":
        """Cut where the frozen layer groups end.

        Args:
            groups ([`LayerGroups`]): some, not all, are frozen.
            size (`int`): side of the images in pixels.
            frozen (`int`, *optional*): how many groups count as frozen; defaults to those that are.

        Raises:
            ValueError: if nothing is frozen, or no single module takes over from the frozen ones.
        """
        frozen = groups.frozen if frozen is None else frozen
        if frozen == 0:
            raise ValueError("Nothing is frozen, so there is nothing to precompute: call freeze() or freeze_to(n).")
        trained = {name for i in range(frozen, len(groups)) for name in groups.parameter_names(i)}
        run = _Run(groups.model, size, trained, groups.head)
        if frozen == len(groups) - 1 and groups.head is not None and run.head_makes_logits:
            return cls.at_head(groups.model, groups.head)
        boundary = next((name for name in run.entered if name in run.inputs), "")
        if not boundary:
            raise ValueError(_refusal(groups.model, "the frozen groups do not end where a module begins"))
        outside = {name for name in trained if not run.belongs_after(name, boundary)}
        if outside:
            raise ValueError(_refusal(groups.model, f"{min(outside)} is to train but is used before {boundary}"))
        before = run.left_before(boundary)
        sharing = [
            groups.model.get_submodule(name)
            for name, tensor in run.inputs.items()
            if tensor is run.inputs[boundary] and not f"{name}.".startswith(f"{boundary}.")
        ]
        return cls(groups.model, groups.model.get_submodule(boundary), before, size, sharing)

    def names_after(self) -> set[str]:
        """The entries of the model's `state_dict` on which the features do not depend."""
        if self.skipped is None:
            return {f"{self._path}.{name}" for name in self.module.state_dict()}
        before = tuple(f"{name}." for name in self.skipped)
        own = {
            f"{path}.{name}".removeprefix(".")
            for path, module in self.model.named_modules()
            if f"{self._path}.".startswith(f"{path}." if path else "") and module is not self.module
            for name in (*module._parameters, *module._buffers)
        }
        return {name for name in self.model.state_dict() if not name.startswith(before) and name not in own}

    def caught(self, pixels: torch.Tensor, *, with_logits: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Features of a batch of normalised pixels, and the whole model's logits if asked for.

        Raises:
            ValueError: if the module is not called exactly once with a tensor for each image.
        """
        inputs: list[torch.Tensor] = []

        def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs.extend(_tensors(args, kwargs)[:1])
            if not with_logits and self.skipped is not None:  # what comes after the head's input is next to nothing
                raise _Reached

        logits = None
        with self.module.register_forward_pre_hook(catch, with_kwargs=True), suppress(_Reached):
            logits = logits_of(self.model(pixels))
        if len(inputs) != 1 or len(inputs[0]) != len(pixels):
            raise ValueError(_refusal(self.model, f"{self._path} does not run once on one tensor with a row an image"))
        return inputs[0], logits

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """What the rest makes of features."""
        if self.skipped is None:
            return logits_of(self.module(features))
        with self.fed_with_features():
            return logits_of(self.model(features=features))

    @contextmanager
    def fed_with_features(self) -> Iterator[None]:
        """Inside, the model takes `features` instead of `pixel_values`, and only the rest of it runs."""
        assert self.skipped is not None, "a head takes features as it is"
        with ExitStack() as undo:
            for name, output in self.skipped.items():
                replace_forward(self.model.get_submodule(name), self._answering(output), undo)
            undo.enter_context(self.model.register_forward_pre_hook(self._take_features, with_kwargs=True))
            for module in (self.module, *self.sharing):
                undo.enter_context(module.register_forward_pre_hook(self._give_features, with_kwargs=True))
            undo.callback(setattr, self, "_features", None)
            yield

    def _take_features(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        features: torch.Tensor = kwargs.pop("features")
        if features.ndim == 4:
            features = features.contiguous(memory_format=torch.channels_last)
        self._features = features
        pixels = features.new_zeros(()).expand(len(features), 3, self.size, self.size)
        return (pixels, *args), kwargs

    def _give_features(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (self._features, *args[1:]), kwargs
        name = next(name for name, value in kwargs.items() if isinstance(value, torch.Tensor))
        return args, {**kwargs, name: self._features}

    def _answering(self, output: Any) -> Any:
        def like(tensor: Any) -> Any:
            if not isinstance(tensor, torch.Tensor):
                return tensor
            assert self._features is not None
            shape = [len(self._features) if size == _PROBE and i == 0 else size for i, size in enumerate(tensor.shape)]
            return torch.zeros((), dtype=tensor.dtype, device=self._features.device).expand(shape)

        return lambda *args, **kwargs: tree_map(like, output)


class _Reached(Exception):  # noqa: N818  (it is no error)
    """The features are caught; the rest need not run."""


class _Run:
    """One forward pass on black images: which modules are entered and left, in which order.

    `inputs` holds what those modules took of which all parameters are to train.
    """

    def __init__(self, model: nn.Module, size: int, trained: set[str], head: nn.Module | None = None) -> None:
        self.model, self.trained = model, trained
        self.entered: list[str] = []
        self.inputs: dict[str, torch.Tensor | None] = {}
        self._events: list[tuple[str, str]] = []
        self._outputs: dict[str, Any] = {}
        outputs: list[Any] = []
        with ExitStack() as undo:
            if head is not None:
                undo.enter_context(head.register_forward_hook(lambda module, args, output: outputs.append(output)))
            for name, module in model.named_modules():
                if name:
                    undo.enter_context(module.register_forward_pre_hook(self._entering(name), with_kwargs=True))
                    undo.enter_context(module.register_forward_hook(self._leaving(name)))
            with modes_restored(model), torch.inference_mode():
                logits = logits_of(model.eval()(blank_images(model, _PROBE, size)))
        self.head_makes_logits = (
            len(outputs) == 1 and isinstance(outputs[0], torch.Tensor) and torch.equal(outputs[0], logits)
        )

    def belongs_after(self, parameter: str, boundary: str) -> bool:
        """Whether a parameter's module is the boundary or entered after it."""
        owner = parameter.rpartition(".")[0]
        while owner and owner not in self.entered:  # such as the projection that attention uses as a mere weight
            owner = owner.rpartition(".")[0]
        return bool(owner) and self.entered.index(owner) >= self.entered.index(boundary)

    def left_before(self, boundary: str) -> dict[str, Any]:
        """The outermost modules that are through when the boundary is entered, and what they return."""
        before = takewhile(lambda event: event != ("enter", boundary), self._events)
        done = [name for kind, name in before if kind == "leave"]
        return {
            name: self._outputs[name]
            for name in dict.fromkeys(done)
            if not any(name.startswith(f"{other}.") for other in done)
        }

    def _entering(self, name: str) -> Any:
        names = [f"{name}.{parameter}" for parameter, _ in self.model.get_submodule(name).named_parameters()]
        trains = bool(names) and self.trained.issuperset(names)

        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._events.append(("enter", name))
            if name not in self.entered:
                self.entered.append(name)
                if trains:
                    self.inputs[name] = next(iter(_tensors(args, kwargs)), None)

        return note

    def _leaving(self, name: str) -> Any:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            self._events.append(("leave", name))
            # shapes are kept, not values
            self._outputs[name] = tree_map(lambda t: t.to("meta") if isinstance(t, torch.Tensor) else t, output)

        return note


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    return [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]


def replace_forward(module: nn.Module, forward: Callable[..., Any], undo: ExitStack) -> None:
    """Have a module do something else, until the stack is closed."""
    if "forward" in vars(module):
        undo.callback(setattr, module, "forward", module.forward)
    else:
        undo.callback(delattr, module, "forward")
    module.forward = forward


def logits_of(output: Any) -> torch.Tensor:
    """The logits that a model returned, bare or in an output with names.

    Raises:
        ValueError: if there are none.
    """
    logits = output if isinstance(output, torch.Tensor) else output.get("logits") if isinstance(output, dict) else None
    if not isinstance(logits, torch.Tensor):
        raise ValueError(f"The model returned {type(output).__name__} without logits: give an image classifier.")
    return logits


def _refusal(model: nn.Module, reason: str) -> str:
    return f"{type(model).__name__} cannot be cut there: {reason}. Train with precompute=False, or freeze_to(-1)."
