"""Attributes that have other values for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


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
