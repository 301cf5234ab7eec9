"""A learning rate from a range test: pure functions of the curve, each giving a rate, or None and the reason.

The running average that is plotted lags behind the loss by half its memory: over a hundred steps that is decades of
learning rate. So the rules read a curve smoothed by a Gaussian window, which looks as far ahead as back.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Suggestion = tuple[float | None, str | None]
Curve = NDArray[np.float64]

MIN_STEPS = 8
# Width of the window, as a share of the curve and at least in steps.
WINDOW, MIN_WINDOW = 0.03, 1.0
# A fall counts when it is this many times what chance makes of the smoothed curve, and this share of the first loss.
NOISE_FACTOR, MIN_FALL = 5.0, 0.01
DIVERGING = 1.5
# Nats: of a network that is trained already, whose loss is near zero, any batch is many times that.
SLACK = 0.1
# "Still clearly improving": until so much of the fall is behind it.
FALLEN = 0.85
# "Clearly falling": from so much of the fall on.
BEGUN = 0.1


def smoothed_losses(losses: Sequence[float], beta: float) -> list[float]:
    """The exponential running average with its bias corrected: step i is divided by `1 - beta**(i + 1)`."""
    average, smoothed = 0.0, []
    for i, loss in enumerate(losses):
        average = beta * average + (1 - beta) * loss
        smoothed.append(average / (1 - beta ** (i + 1)))
    return smoothed


def lesson(lrs: Sequence[float], losses: Sequence[float]) -> Suggestion:
    """The highest rate at which the loss is still clearly improving (lesson step 2).

    That is where 85 % of the fall to the curve's minimum is done: what is left is the slow end, in which a rate may be
    too high for a fit long before the loss says so. Where it falls to the very end, nobody saw how far it is to the
    edge: a decade is kept from it. docs/experiments.md compares it with the others.
    """
    curve, _, reason = _curve(lrs, losses)
    if reason:
        return None, reason
    lowest = int(curve.argmin())
    top = curve[: lowest + 1].max()
    fallen = np.flatnonzero(curve[: lowest + 1] <= top - FALLEN * (top - curve[lowest]))
    unseen = lowest == len(curve) - 1
    return min(float(lrs[fallen[0]]), float(lrs[-1]) / 10 if unseen else np.inf), None


def steep(lrs: Sequence[float], losses: Sequence[float]) -> Suggestion:
    """The rate at which the loss falls steepest, per decade of rate."""
    _, slope, reason = _curve(lrs, losses)
    return (None, reason) if reason else (float(lrs[int(slope.argmin())]), None)


def minimum(lrs: Sequence[float], losses: Sequence[float]) -> Suggestion:
    """A tenth of the rate with the lowest loss."""
    curve, _, reason = _curve(lrs, losses)
    return (None, reason) if reason else (float(lrs[int(curve.argmin())]) / 10, None)


def valley(lrs: Sequence[float], losses: Sequence[float]) -> Suggestion:
    """About half way down the longest fall (fastai v2's default)."""
    curve, _, reason = _curve(lrs, losses)
    if reason:
        return None, reason
    start, best = 0, (0, 0)
    for i in range(1, len(curve)):
        if curve[i] >= curve[i - 1]:
            start = i
        if i - start > best[1] - best[0]:
            best = (start, i)
    run = curve[best[0] : best[1] + 1]
    half_way = int(np.abs(run - (run[0] + run[-1]) / 2).argmin())
    return float(lrs[best[0] + half_way]), None


SUGGESTIONS: dict[str, Callable[[Sequence[float], Sequence[float]], Suggestion]] = {
    "lesson": lesson,
    "valley": valley,
    "steep": steep,
    "minimum": minimum,
}


def smooth(losses: Sequence[float]) -> list[float]:
    """The curve that the rules read; what is beyond repair counts as four times the first losses."""
    return _smooth(np.asarray(losses, dtype=np.float64)).tolist()


def falling(lrs: Sequence[float], losses: Sequence[float]) -> tuple[float, float] | None:
    """The rates between which the loss clearly falls, from a tenth of the fall to its end; None if it never does."""
    curve, _, reason = _curve(lrs, losses)
    if reason:
        return None
    lowest = int(curve.argmin())
    top = curve[: lowest + 1].max()
    before = np.flatnonzero(curve[: lowest + 1] >= top - BEGUN * (top - curve[lowest]))
    return float(lrs[before[-1]]), float(lrs[lowest])


def edge(lrs: Sequence[float], losses: Sequence[float]) -> float | None:
    """The lowest rate from which on the loss is half as high again as at first, and by a tenth; None if it never is.

    A network that is trained already has no fall to read a rate from, but it has this edge. What is no more than the
    noise of single batches is none.
    """
    raw = np.asarray(losses, dtype=np.float64)
    if len(raw) < MIN_STEPS:
        return None
    first = np.median(raw[: len(raw) // 4 + 1])
    width = max(MIN_WINDOW, WINDOW * len(raw))
    low = _gaussian(raw, width) <= max(DIVERGING * first, first + max(SLACK, NOISE_FACTOR * _chance(raw, width)))
    last_low = int(np.flatnonzero(low)[-1]) if low.any() else -1
    return float(lrs[last_low + 1]) if last_low + 1 < len(raw) else None


def _curve(lrs: Sequence[float], losses: Sequence[float]) -> tuple[Curve, Curve, str | None]:
    """The smoothed curve, its slope per decade up to its minimum (0 after it), and why it has no answer, if so."""
    raw = np.asarray(losses, dtype=np.float64)
    empty = np.zeros(0)
    if len(raw) < MIN_STEPS:
        return empty, empty, f"the test has {len(raw)} steps; a curve needs at least {MIN_STEPS}"
    width = max(MIN_WINDOW, WINDOW * len(raw))
    curve = _smooth(raw)
    lowest = int(curve.argmin())
    fall = float(curve[: lowest + 1].max() - curve[lowest])
    noise = NOISE_FACTOR * _chance(raw, width)
    if fall <= max(noise, MIN_FALL * abs(float(curve[0]))):
        why = f"no more than its noise, {noise:.3g}" if fall <= noise else f"less than {MIN_FALL:.0%}"
        said = f"its smoothed curve falls by {fall:.3g} from {curve[0]:.3g}, {why}"
        return empty, empty, f"the loss does not clearly fall: {said}"
    slope = np.gradient(curve, np.log10(np.asarray(lrs, dtype=np.float64)))
    slope[lowest + 1 :] = 0.0
    return curve, slope, None


def _smooth(raw: Curve) -> Curve:
    if not len(raw):
        return raw
    beyond_repair = 4 * np.median(raw[: max(3, len(raw) // 4)])  # must not reach back through the window
    return _gaussian(np.minimum(raw, beyond_repair), max(MIN_WINDOW, WINDOW * len(raw)))


def _gaussian(values: Curve, width: float) -> Curve:
    """Weighted means with a Gaussian window of `width` steps; at the ends, of the steps that are there."""
    steps = np.arange(len(values))
    weights = np.exp(-0.5 * ((steps[:, None] - steps[None, :]) / width) ** 2)
    return (weights @ values) / weights.sum(axis=1)


def _chance(raw: Curve, width: float) -> float:
    """How far chance alone moves the smoothed curve; at least two steps.

    Steps that diverge are no noise, so the scatter is measured by differences of neighbours, and by their median.
    """
    scatter = float(np.median(np.abs(np.diff(raw)))) / 0.954
    return float(scatter / np.sqrt(2 * np.sqrt(np.pi) * width))
