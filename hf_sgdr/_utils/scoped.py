"""What has other values for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def attributes(target: Any, **values: Any) -> Iterator[None]:
    """Inside, `target` has these attributes; afterwards those of before, whatever happened.

    Raises:
        AttributeError: if it has no such attribute.
    """
    before = {name: getattr(target, name) for name in values}
    try:
        for name, value in values.items():
            setattr(target, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(target, name, value)


@contextmanager
def modes_restored(model: nn.Module) -> Iterator[None]:
    """Which modules are in training mode."""
    before = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
