"""How many threads this process computes and reads with: all usable processors, shared by the processes of the machine.

accelerate's launcher sets `OMP_NUM_THREADS=1` on a machine without a GPU (accelerate 1.15, `commands/launch.py`), and
torch obeys, so that a recipe would compute on one core.
"""

import functools
import os
from pathlib import Path

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

_VARIABLE = "HF_SGDR_NUM_THREADS"


def usable_processors() -> int:
    """How many processors this process may use: its affinity, or a container's quota where that is lower."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_quota()
    return count if quota is None else max(1, min(count, round(quota)))


def usable_threads() -> int:
    """The share of the processors that is this process's: `usable_processors() // LOCAL_WORLD_SIZE`, at least 1.

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

    In a process that has the machine to itself, a count of torch's own that is larger than 1 is kept.
    """
    threads, before = usable_threads(), torch.get_num_threads()
    if threads == before or (not os.environ.get(_VARIABLE) and _local_world_size() == 1 and before > 1):
        return
    torch.set_num_threads(threads)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        logger.warning(
            f"Computing with {threads} threads a process instead of {before}; {_VARIABLE}=n sets another number."
        )


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
