"""SIGTERM, which schedulers and spot machines send before they take a machine away: answered where nothing is lost.

What trains notes the signal, saves a checkpoint and ends; everything else ends at once, as with Ctrl-C, because what is
written there is whole or not at all. A second signal ends the process wherever it is.
"""

import atexit
import functools
import multiprocessing.util
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

TERMINATED = 143  # 128 + SIGTERM
# torchrun passes the SIGTERM that it gets on to its processes, which may have got the same one already.
_SECONDS_OF_ONE_SIGNAL = 3.0

_received: list[float] = []  # when
_deferred: list[bool] = []  # not empty while the signal is only noted


class Terminated(SystemExit):
    """SIGTERM ended the process, with exit code 143."""

    def __init__(self) -> None:
        super().__init__(TERMINATED)


def catch_sigterm() -> None:
    """From now on the first SIGTERM raises [`Terminated`], in what is [`deferred`] later; a second one ends at once."""
    if threading.current_thread() is threading.main_thread():  # no other may
        signal.signal(signal.SIGTERM, _on_sigterm)
        atexit.unregister(_kill_workers)
        atexit.register(_kill_workers)


def is_caught() -> bool:
    """Whether this process called [`catch_sigterm`]."""
    return signal.getsignal(signal.SIGTERM) is _on_sigterm


def _kill_workers() -> None:
    """End what ignores the SIGTERM by which multiprocessing, whose function at exit comes next, would end it."""
    if workers := [process for process in multiprocessing.active_children() if process.daemon]:
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's data loader would call it an error
        for worker in workers:
            worker.kill()


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    _received.append(time.monotonic())
    if len(_received) > 1:
        is_passed_on = "TORCHELASTIC_RUN_ID" in os.environ and _received[-1] - _received[0] < _SECONDS_OF_ONE_SIGNAL
        if not is_passed_on:
            os._exit(TERMINATED)
    elif not _deferred:
        raise Terminated


def is_deferred() -> bool:
    """Whether this is inside [`deferred`]."""
    return bool(_deferred)


def is_requested() -> bool:
    """Whether this process was told to end while that is [`deferred`]."""
    return bool(_deferred and _received)


@contextmanager
def deferred() -> Iterator[None]:
    """Inside, SIGTERM is noted for [`is_requested`]; where nothing acted on it, the process ends after the body."""
    _deferred.append(True)
    try:
        yield
    finally:
        _deferred.pop()
    if _received and not _deferred:
        end()


def end() -> NoReturn:
    """End the process; nothing is left to be saved, so further signals change nothing."""
    ignore_sigterm()
    raise Terminated


def ignore_sigterm() -> None:
    """From now on SIGTERM changes nothing in this process."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


@functools.cache  # of a worker's process; the main one, which forks it, never asks
def leave_sigterm_to_main_process() -> None:
    """In a data loader's worker, go on reading until the main process, which gets the signal too, has saved."""
    ignore_sigterm()
