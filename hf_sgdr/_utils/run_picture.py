"""The picture of a run: range test, rates, losses and metrics over the epochs of its fits, one after the other.

A fit is plain data, as [`~hf_sgdr.training.history.FitCurve`] has it; nothing here knows trainers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from hf_sgdr._utils.fonts import families, picture_text
from hf_sgdr._utils.plots import CURVE, MARK, draw_rates, new_axes, tidy

NAMES = {"balanced_accuracy": "balanced accuracy", "f1": "macro-F1", "map": "mean average precision"}
NAME_SIZE, CHARACTER = 6.5, 0.55  # points, and the mean width of a character as a share of them
TRAINING = "0.55"

Fits = Sequence[Mapping[str, Any]]


def plot_run(
    fits: Fits,
    *,
    metrics: Sequence[str] = ("accuracy",),
    best: Mapping[str, Any] | None = None,
    solved: Mapping[str, Any] | None = None,
    range_test: Callable[[Axes], Axes] | None = None,
) -> Figure:
    """The whole run in one figure, of three plots in a row, or four where there was a range test.

    Args:
        fits (sequence of [`~hf_sgdr.training.history.FitCurve`]): in their order.
        metrics (sequence of `str`, *optional*): which of the evaluations to draw beside the loss.
        best (mapping, *optional*): stage, epoch, eval_loss and other metrics of the weights that were kept.
        solved (mapping, *optional*): eval_loss and other metrics of a solved head, drawn as a level.
        range_test (callable, *optional*): draws the first range test into an Axes.
    """
    rows, columns = (2, 2) if range_test is not None else (1, 3)
    figure = Figure(figsize=(4.8 * columns, 3.6 * rows), dpi=120, layout="constrained", facecolor="white")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    if range_test is not None:
        range_test(axes.pop(0)).set_title("range test")
    _plot_rates(fits, axes[0])
    plot_losses(fits, axes[1], best=best, solved=solved)
    _plot_metrics(fits, axes[2], metrics, best, solved)
    return figure


def plot_losses(
    fits: Fits,
    ax: Axes | None = None,
    *,
    best: Mapping[str, Any] | None = None,
    solved: Mapping[str, Any] | None = None,
) -> Axes:
    """Training and validation loss over the epochs of all fits; arguments are those of [`plot_run`]."""
    ax = ax or new_axes()
    losses = [_line(ax, fits, "loss", TRAINING, "training"), _line(ax, fits, "eval_loss", CURVE, "validation")]
    _mark_levels(ax, fits, "eval_loss", best, solved)
    ax.set_ylim(0, 1.2 * max((value for values in losses for value in values), default=1.0))
    ax.set_ylabel("loss")
    ax.set_title("loss")
    _finish(ax, fits)
    return ax


def _plot_metrics(fits: Fits, ax: Axes, metrics: Sequence[str], best: Any, solved: Any) -> None:
    colours = (CURVE, "#5B9BD5", "#1F4E79", "#9DC3E6")
    for metric, colour in zip(metrics, colours, strict=False):
        _line(ax, fits, f"eval_{metric}", colour, NAMES.get(metric, metric))
    _mark_levels(ax, fits, f"eval_{metrics[0]}", best, solved)
    low, high = ax.get_ylim()
    ax.set_ylim(low - 0.05 * (high - low), high + 0.2 * (high - low))  # the names of the fits have room above
    ax.set_yticks([tick for tick in ax.get_yticks() if low <= tick <= 1])
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.set_title("validation")
    _finish(ax, fits)


def _plot_rates(fits: Fits, ax: Axes) -> None:
    lines: dict[str, tuple[list[float], list[float]]] = {}
    names = list(dict.fromkeys(name for fit in fits for name in fit["rates"]))
    for name in sorted(names, key=lambda name: max(max(fit["rates"].get(name, [0.0])) for fit in fits)):
        places, values = lines.setdefault(name, ([], []))
        for start, fit in _placed(fits):
            rates = fit["rates"].get(name, [])
            places += [start + fit["epochs"] * i / max(len(rates), 1) for i in range(len(rates))] + [start]
            values += [*rates, float("nan")]  # a gap between fits
    draw_rates(ax, lines)
    ax.set_title("learning rate of each layer group")
    _finish(ax, fits, with_legend=False)


def _line(ax: Axes, fits: Fits, key: str, colour: str, name: str) -> list[float]:
    points = [
        (start + point["epoch"], point[key])
        for start, fit in _placed(fits)
        for point in fit["points"]
        if point.get(key) is not None
    ]
    places, values = [place for place, _ in points], [value for _, value in points]
    if points:
        ax.plot(places, values, color=colour, marker="o", markersize=3, linewidth=1.4, label=name)
    return values


def _mark_levels(ax: Axes, fits: Fits, key: str, best: Any, solved: Any) -> None:
    words = "{:.3g}".format if key == "eval_loss" else "{:.1%}".format
    if solved is not None and solved.get(key) is not None:
        ax.axhline(solved[key], color="0.3", linewidth=1, linestyle=":", label=f"solved head: {words(solved[key])}")
    if best is not None and best.get(key) is not None:
        ax.plot(_place_of(fits, best), best[key], "o", color=MARK, markersize=7, label=f"kept: {words(best[key])}")


def _place_of(fits: Fits, best: Mapping[str, Any]) -> float:
    """The epoch of the weights that were kept; those of an average lie at the end of their fit, a solved head at 0."""
    for start, fit in _placed(fits):
        if best["stage"] == fit["name"]:
            return start + (best.get("epoch") or 0.0)
        if best["stage"].startswith(f"{fit['name']} ("):
            return start + float(fit["epochs"])
    return 0.0


def _placed(fits: Fits) -> Iterator[tuple[float, Mapping[str, Any]]]:
    """Each fit with the epochs that were over when it began."""
    return zip(accumulate((fit["epochs"] for fit in fits), initial=0.0), fits, strict=False)


def _finish(ax: Axes, fits: Fits, *, with_legend: bool = True) -> None:
    """Mark the fits, every second one shaded, with their names where these have room."""
    total = sum(fit["epochs"] for fit in fits)
    ax.set_xlim(-0.02 * total, 1.02 * total or 1.0)
    width = ax.get_window_extent().width * 72 / ax.figure.dpi
    for number, (start, fit) in enumerate(_placed(fits)):
        if number % 2:
            ax.axvspan(start, start + fit["epochs"], color="black", alpha=0.05, linewidth=0)
        characters = int(width * fit["epochs"] / (total or 1.0) / (CHARACTER * NAME_SIZE))
        if len(fits) > 1 and characters >= 3:
            ax.annotate(
                picture_text(fit["name"], characters), (start + fit["epochs"] / 2, 1), ha="center", va="top",
                xycoords=("data", "axes fraction"), xytext=(0, -3), textcoords="offset points", fontsize=NAME_SIZE,
                fontfamily=families(),
            )  # fmt: skip
    ax.set_xlabel("epoch")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if with_legend and ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False, fontsize=8)
    tidy(ax)
