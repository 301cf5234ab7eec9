"""The machine: the threads that this process computes and reads with, its memory, and how far its long work has come.

The last is a bar where somebody watches, a line every half minute in a log.
"""

import ctypes
import functools
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self, TypeVar

import psutil
import torch
from tqdm.auto import tqdm
from transformers.utils import logging
from transformers.utils.import_utils import is_in_notebook

logger = logging.get_logger(__name__)

T = TypeVar("T")

# Seconds between two lines of progress in a log.
PROGRESS_SECONDS = 30.0
_VARIABLE = "HF_SGDR_NUM_THREADS"
# glibc's mallopt parameters, from its malloc.h: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD
_MALLOPT = {-3: 1 << 30, -1: 2**31 - 1, -2: 1 << 26}


def usable_processors() -> int:
    """How many processors this process may use: its affinity, or a container's quota where that is lower."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_quota()
    return count if quota is None else max(1, min(count, round(quota)))


def usable_threads() -> int:
    """The share of one process of the processors: `usable_processors() // LOCAL_WORLD_SIZE`, at least 1.

    `HF_SGDR_NUM_THREADS` decides otherwise.

    Raises:
        ValueError: if `HF_SGDR_NUM_THREADS` is not an integer >= 1.
    """
    value = os.environ.get(_VARIABLE)
    if value:
        if not value.isdecimal() or int(value) < 1:
            raise ValueError(f"{_VARIABLE}={value!r} must be an integer >= 1; unset it to use all processors.")
        return int(value)
    return max(1, usable_processors() // _local_world_size())


@functools.cache  # once per process: whoever calls torch.set_num_threads() afterwards means it
def use_all_processors() -> None:
    """Have torch compute on the CPU with [`usable_threads`].

    accelerate's launcher sets `OMP_NUM_THREADS=1` on a machine without a GPU (accelerate 1.15, `commands/launch.py`),
    so that torch would compute on one core. In a process that has the machine to itself, a count of torch's own that is
    larger than 1 is kept.
    """
    threads, before = usable_threads(), torch.get_num_threads()
    if threads == before or (not os.environ.get(_VARIABLE) and _local_world_size() == 1 and before > 1):
        return
    torch.set_num_threads(threads)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        logger.warning(
            f"Computing with {threads} threads a process instead of {before}; {_VARIABLE}=n sets another number."
        )


def shows_bars() -> bool:
    """Whether progress bars can be seen: standard error is a terminal, or this is a notebook."""
    return sys.stderr.isatty() or is_in_notebook()


class ProgressLines:
    """Plain lines on standard error, for logs, in which a bar's carriage returns are noise.

    Args:
        desc (`str`): what is being done.
        total (`int`, *optional*): how many images there are.
    """

    def __init__(self, desc: str, total: int | None = None) -> None:
        self.desc, self.total, self.n = desc, total, 0
        self._start = self._last = time.monotonic()

    def update(self, n: int = 1) -> None:
        """So many more are done."""
        self.n += n
        now = time.monotonic()
        if now - self._last >= PROGRESS_SECONDS:
            self._last = now
            tqdm.write(self._line(now - self._start), file=sys.stderr)

    def _line(self, seconds: float) -> str:
        spent = tqdm.format_interval(seconds)
        if self.total is None:
            return f"{self.desc}: {self.n:,} images in {spent}"
        left = tqdm.format_interval(seconds * (self.total - self.n) / self.n)
        return f"{self.desc}: {self.n:,} of {self.total:,} images in {spent}, {left} to go"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        pass


def progress_bar(desc: str | None, total: int | None = None, *, bars: bool = True, **kwargs: Any) -> Any:
    """A context manager with `update(n)`, as tqdm's.

    Args:
        desc (`str` or None): what is being done; None shows nothing, as in all processes but the first.
        total (`int`, *optional*): how many images there are.
        bars (`bool`, *optional*, defaults to True): whether a bar is wanted where one can be seen.
        kwargs: tqdm's.
    """
    if desc is not None and not (bars and shows_bars()):
        return ProgressLines(desc, total)
    return tqdm(desc=desc, total=total, unit="image", disable=desc is None, **kwargs)


def followed(items: Iterable[T], desc: str, total: int, **kwargs: Any) -> Iterator[T]:
    """The same items, and how many of them have been taken."""
    with progress_bar(desc, total, **kwargs) as bar:
        for item in items:
            yield item
            bar.update()


def available_memory() -> int:
    """Bytes that this process may still take without swapping, if all processes of this run take as many."""
    return int(psutil.virtual_memory().available) // _local_world_size()


def keep_freed_memory() -> bool:
    """Tell glibc to keep large freed blocks instead of returning them to the kernel.

    A training step on the CPU frees and allocates the same hundreds of megabytes again and again; by default each block
    is unmapped and mapped anew, and the kernel clears every page. Measured on two cores with tf_efficientnet_lite0 at
    batch 64: evaluation 48 -> 112 images/s (float32), 90 -> 215 (bfloat16), training 14 -> 25. The price: memory that
    was used once stays with the process. The setting is the process's; `HF_SGDR_KEEP_MEMORY=0` leaves it alone.

    Returns:
        `bool`: whether it was set; not on systems without glibc.
    """
    if os.environ.get("HF_SGDR_KEEP_MEMORY") == "0" or not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return False
    return all(mallopt(parameter, value) == 1 for parameter, value in _MALLOPT.items())


def _local_world_size() -> int:
    value = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(value)) if value.isdecimal() else 1


def _cgroup_quota() -> float | None:
    """Processors that a Linux container may use by its quota (`docker run --cpus`); None without one."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)
