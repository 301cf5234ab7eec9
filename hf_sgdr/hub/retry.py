"""Calls to the Hub, tried again while that can help, and refused in one line that says what to do when it cannot."""

import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from time import sleep
from typing import TypeVar

from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]  # public, not in __all__
from transformers.utils import logging

from hf_sgdr._utils.text import printable

logger = logging.get_logger(__name__)

T = TypeVar("T")

TRIES = 5
# Seconds before the second try, doubled before each one after it.
FIRST_PAUSE = 2.0
# The Hub counts requests in windows of five minutes; whoever asks for more than twice that is not waited for.
LONGEST_PAUSE = 600.0
# Timeout and too many requests; all others from 400 to 499 will be the same in a minute.
_TEMPORARY_STATUS = (408, 429)
# Missing files, wrong values, bugs: no second try mends them. httpx2 and hf_xet raise kinds of their own.
_FINAL = (OSError, ValueError, TypeError, LookupError, AttributeError, AssertionError, MemoryError)

LOG_IN = "run `hf auth login`, or set HF_TOKEN to a token that may write (huggingface.co/settings/tokens)"


class HubError(OSError):
    """The Hub, or the way to it, refused; the message says why and what to do, in one line."""


def retry(call: Callable[[], T], doing: str) -> T:
    """What a call gives; where it fails for a reason that may pass, it is made up to five times.

    Tried again are broken and refused connections, timeouts, the status codes 408, 429 and 500 to 599, and errors of
    the libraries below that say nothing better. Each failure is logged with its reason. The pauses are 2, 4, 8 and 16
    seconds, or what the Hub asks for (`Retry-After`, `RateLimit`).

    Args:
        call: takes nothing; it must be one that may be made twice.
        doing (`str`): what it does, for the messages: "Pushing to user/name".

    Raises:
        HubError: if it still fails, or the reason is one that does not pass.
    """
    for attempt in range(1, TRIES + 1):
        try:
            return call()
        except Exception as error:
            cause = _root_cause(error)
            pause = pause_after(cause, attempt)
            if pause is None:
                if not isinstance(cause, OSError | ValueError):
                    raise
                raise HubError(f"{doing}: {_advice(cause)}") from error
            if attempt == TRIES or pause > LONGEST_PAUSE:
                asked = f"; it asks to wait {pause:.0f} s" if pause > LONGEST_PAUSE else ""
                times = f"{attempt} times" if attempt > 1 else "once"
                raise HubError(f"{doing} failed {times}, at last with: {_reason(cause)}{asked}.") from error
            logger.warning(
                f"{doing}, try {attempt} of {TRIES} failed: {printable(_reason(cause))}. Trying again in {pause:.0f} s."
            )
            sleep(pause)
    raise AssertionError("unreachable")


def pause_after(error: BaseException, attempt: int) -> float | None:
    """Seconds to wait after a failed attempt, counted from 1; None where trying again cannot help."""
    usual = FIRST_PAUSE * 2 ** (attempt - 1)
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        asked = asked_pause(error.response.headers)
        return (usual if asked is None else asked) if status >= 500 or status in _TEMPORARY_STATUS else None
    may_pass = isinstance(error, ConnectionError | TimeoutError | json.JSONDecodeError) or not isinstance(error, _FINAL)
    return usual if may_pass and not isinstance(error, OfflineModeIsEnabled) else None


def asked_pause(headers: Mapping[str, str]) -> float | None:
    """Seconds that a response asks to wait: `Retry-After` in seconds or as a date, or the `RateLimit` of the Hub."""
    value = headers.get("retry-after", "").strip()
    if value.isdigit():
        return float(value)
    if value:
        try:
            return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
        except (ValueError, TypeError):  # neither of the two forms, or a date without a time zone
            return None
    limit = parse_ratelimit_headers(headers)
    return float(limit.reset_in_seconds) if limit is not None and limit.remaining == 0 else None


def _root_cause(error: BaseException) -> BaseException:
    """The Hub's client wraps what goes wrong with one of several files in a RuntimeError."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _reason(error: BaseException) -> str:
    if isinstance(error, HfHubHTTPError):
        message = f": {' '.join(error.server_message.split())}" if error.server_message else ""
        return f"{error.response.status_code} {error.response.reason_phrase}{message}"
    if isinstance(error, json.JSONDecodeError):
        return "an answer that is not JSON"
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _advice(error: BaseException) -> str:
    if isinstance(error, LocalTokenNotFoundError):
        return f"nobody is logged in: {LOG_IN}."
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set: unset it."
    if isinstance(error, HfHubHTTPError):
        advice = {
            401: f"the login does not count, or counts no more: {LOG_IN}",
            403: "the login may not write there: use a token that may write, or another user/name",
            404: "there is no such repository or revision, or the login may not see it: look at the name",
        }.get(error.response.status_code)
        return f"{_reason(error)}{f'; {advice}' if advice else ''}."
    return f"{_reason(error)}."
