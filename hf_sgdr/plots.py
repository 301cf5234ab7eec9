"""Drawing: each function takes numbers and an optional Axes, and returns the Axes. Nothing here knows the package."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

CURVE, MARK = "#3B6FB6", "#D1495B"
# From the input to the head: light to dark, so that the order reads without the legend.
GROUPS = ("#9DC3E6", "#5B9BD5", "#1F4E79")


def plot_range_test(
    lrs: Sequence[float], losses: Sequence[float], suggestion: float | None, ax: Axes | None = None
) -> Axes:
    """Smoothed loss against learning rate, log axis, with the suggested rate marked."""
    ax = ax or new_axes()
    ax.plot(lrs, losses, color=CURVE, linewidth=1.8)
    ax.set_xscale("log")
    ax.set_xlabel("learning rate of the head (log scale)")
    ax.set_ylabel("smoothed training loss")
    if losses:
        low, high = min(losses), max(losses[: max(1, len(losses) // 2)])
        room = max(high - low, 1e-3 * abs(high), 1e-12)
        ax.set_ylim(low - 0.08 * room, high + 0.35 * room)
    if suggestion is not None:
        ax.axvline(suggestion, color=MARK, linewidth=1.2, linestyle="--", label=f"suggested: {suggestion:.1e}")
        ax.legend(frameon=False)
    _tidy(ax)
    return ax


def plot_rates(rates: Mapping[str, Sequence[float]], ax: Axes | None = None, *, log_scale: bool = False) -> Axes:
    """Learning rate against optimizer step, a line for each layer group."""
    ax = ax or new_axes()
    shades = GROUPS[len(GROUPS) - len(rates) :] if len(rates) <= len(GROUPS) else [None] * len(rates)
    for (name, values), shade in zip(rates.items(), shades, strict=True):
        ax.plot(range(len(values)), values, color=shade, linewidth=1.6, label=name)
    ax.set_xlabel("optimizer step")
    ax.set_ylabel("learning rate")
    positive = any(value > 0 for values in rates.values() for value in values)
    if log_scale and positive:
        ax.set_yscale("log")
    elif positive:
        ax.set_ylim(bottom=0)
    if len(rates) > 1:
        ax.legend(frameon=False)
    _tidy(ax)
    return ax


def new_axes() -> Axes:
    """Axes of a new figure that belongs to no window, so that nothing has to be closed."""
    return Figure(figsize=(6.4, 4.0), dpi=120, layout="constrained").add_subplot()


def _tidy(ax: Axes) -> None:
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
