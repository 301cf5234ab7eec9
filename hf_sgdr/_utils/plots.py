"""Drawing: each function takes numbers and an optional Axes, and returns the Axes. Nothing here knows trainers."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike
from PIL import Image

from hf_sgdr._utils.fonts import families, picture_labels, picture_text

CURVE, MARK = "#3B6FB6", "#D1495B"
# From the input to the head: light to dark, so that the order reads without the legend.
GROUPS = ("#9DC3E6", "#5B9BD5", "#1F4E79")
# Points: below the first nobody reads a number, so it is left out; names go a little lower before every other one goes.
SMALLEST_NUMBER, SMALLEST_NAME, SMALLEST_SHARE = 4.5, 4.0, 6.5
FEW_CLASSES = 10  # with more, zeros and shares in a matrix would hide the rest
LONGEST_NAME = 24  # characters
MOST_CYCLES = 12  # more are not marked
BACKED: dict[str, Any] = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 2}  # words over a curve
CHARACTER = 0.6  # mean width of one, as a share of the font size
NARROWEST, WIDEST = 0.9, 2.0  # places of images, as shares of their height: text below has to have room
IMAGE_PIXELS = 400  # the longer side of an image in a picture; more would only make the file larger


def plot_range_test(
    lrs: Sequence[float],
    losses: Sequence[float],
    curve: Sequence[float],
    ax: Axes | None = None,
    *,
    suggestion: float | None = None,
    why: str | None = None,
    chosen: float | None = None,
    usable: tuple[float, float, str] | None = None,
) -> Axes:
    """Loss against learning rate, log axis, with what the rate follows from.

    Args:
        lrs (sequence of `float`): the rate of each step.
        losses, curve (sequences of `float`): the loss of each step, drawn faintly, and the smoothed one.
        ax (`Axes`, *optional*): where to draw; by default a new figure.
        suggestion (`float`, *optional*): a rate to mark.
        why (`str`, *optional*): the reason for it, or why there is none, which is written into the picture.
        chosen (`float`, *optional*): the rate that is used, if it is another one.
        usable (`tuple[float, float, str]`, *optional*): the rates between which the ground is shaded, and what it is.
    """
    ax = ax or new_axes()
    if usable is not None:
        low, high, name = usable
        ax.axvspan(low, high, color=CURVE, alpha=0.1, linewidth=0, label=name)
    ax.plot(lrs, losses, color=CURVE, linewidth=0.8, alpha=0.35)
    ax.plot(lrs, curve, color=CURVE, linewidth=1.8)
    ax.set_xscale("log")
    ax.set_xlabel("learning rate of the head (log scale)")
    ax.set_ylabel("training loss: each step, and smoothed")
    if curve:
        lowest, highest = min(curve), max(curve[: max(1, len(curve) // 2)])
        highest = max(curve) if max(curve) < 2 * highest else highest  # else it takes off
        room = max(highest - lowest, 1e-3 * abs(highest), 0.1)  # of losses near zero only the rise counts
        ax.set_ylim(lowest - 0.08 * room, highest + 0.5 * room)
    if suggestion is not None:
        label = f"suggested: {suggestion:.1e}" + (f", {why}" if why else "")
        ax.axvline(suggestion, color=MARK, linewidth=1.2, linestyle="--", label=label)
    if chosen is not None and chosen != suggestion:
        ax.axvline(chosen, color=MARK, linewidth=1.2, label=f"chosen: {chosen:.1e}")
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False, loc="upper left", fontsize=8)
    if suggestion is None and why:
        text = "\n".join(textwrap.wrap(f"No suggestion: {why}.", 58))
        # below the legend, where the curve leaves room until it takes off
        ax.text(0.02, 0.84, text, transform=ax.transAxes, va="top", fontsize=8, color=MARK, bbox=BACKED)
    tidy(ax)
    return ax


def plot_rates(
    rates: Mapping[str, Sequence[float]],
    ax: Axes | None = None,
    *,
    steps_per_epoch: int | None = None,
    restarts: Sequence[int] = (),
    log_scale: bool | None = None,
) -> Axes:
    """Learning rate against optimizer step, a line for each layer group; log axis where they are ten times apart.

    Args:
        rates (mapping): each group's rate at every step, by its name.
        ax (`Axes`, *optional*): where to draw; by default a new figure.
        steps_per_epoch (`int`, *optional*): for an axis of epochs above.
        restarts (sequence of `int`, *optional*): the steps at which cycles begin anew; they are marked.
        log_scale (`bool`, *optional*): whatever the rates are.
    """
    ax = ax or new_axes()
    draw_rates(ax, {name: (range(len(values)), values) for name, values in rates.items()}, log_scale)
    ax.set_xlabel("optimizer step")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if 0 < len(restarts) < MOST_CYCLES:
        for number, step in enumerate((0, *restarts), start=1):
            ax.axvline(step, color="0.5", linewidth=0.8, linestyle=":", zorder=0)
            words: dict[str, Any] = {
                "xycoords": ("data", "axes fraction"),
                "textcoords": "offset points",
                "fontsize": 7.5,
            }
            ax.annotate(f"cycle {number}", (step, 1), xytext=(2, -2), va="top", **words)
    tidy(ax)
    if steps_per_epoch is not None:
        epochs = ax.secondary_xaxis(
            "top", functions=(lambda x: np.asarray(x) / steps_per_epoch, lambda x: np.asarray(x) * steps_per_epoch)
        )
        epochs.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        epochs.set_xlabel("epoch")
        epochs.spines["top"].set_visible(False)
    return ax


def draw_rates(
    ax: Axes, lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], log_scale: bool | None = None
) -> None:
    """A line for each layer group, by its name: places on the x axis and rates; a legend where there are several.

    The axis is logarithmic where the highest rates are ten times apart, of groups, or of fits, which NaN parts.
    """
    shades = GROUPS[len(GROUPS) - len(lines) :] if len(lines) <= len(GROUPS) else [None] * len(lines)
    for (name, (places, values)), shade in zip(lines.items(), shades, strict=True):
        ax.plot(places, values, color=shade, linewidth=1.6, label=name)
    fits = [np.split(values, np.flatnonzero(np.isnan(values))) for _, values in lines.values()]
    highest = [top for group in fits for part in group if (top := np.nanmax([0.0, *part])) > 0]
    ax.set_ylabel("learning rate")
    if highest and (max(highest) >= 9.99 * min(highest) if log_scale is None else log_scale):
        ax.set_yscale("log")
        if log_scale is None:  # the end of a cycle is nearly zero, and far down
            ax.set_ylim(min(highest) / 100, 2.5 * max(highest))
        ax.set_ylabel("learning rate (log scale)")
    elif highest:
        ax.set_ylim(0, 1.12 * max(highest))
    if len(lines) > 1:
        ax.legend(
            frameon=False, fontsize=9, loc="lower left" if ax.get_yscale() == "log" and log_scale is None else "best"
        )


def plot_strengths(strengths: Sequence[float], losses: Sequence[float], chosen: float, ax: Axes | None = None) -> Axes:
    """Loss in cross-validation against the regularisation's strength, log axis, with the chosen one marked."""
    ax = ax or new_axes()
    ax.plot(strengths, losses, color=CURVE, linewidth=1.8, marker="o", markersize=3)
    ax.set_xscale("log")
    ax.set_xlabel("strength C (log scale): regularised on the left, free on the right")
    ax.set_ylabel("loss in cross-validation")
    ax.axvline(chosen, color=MARK, linewidth=1.2, linestyle="--", label=f"chosen: {chosen:.2g}")
    ax.legend(frameon=False)
    tidy(ax)
    return ax


def plot_confusion_matrix(
    matrix: ArrayLike, names: Sequence[str], ax: Axes | None = None, *, normalize: bool = False
) -> Axes:
    """A confusion matrix: truth in rows, prediction in columns, in each cell the count and its share of the row.

    The darker a cell, the larger that share, on a square-root scale, so that rare mistakes show. With more than ten
    classes, or in small cells, there is the count alone; in cells too small for numbers a colour bar stands for them.

    Args:
        matrix (array of int (classes, classes)): counts.
        names (sequence of `str`): class names.
        ax (`Axes`, *optional*): where to draw; by default a new figure, the larger the more classes.
        normalize (`bool`, *optional*, defaults to False): the share of the row alone.
    """
    counts = np.asarray(matrix)
    classes = len(names)
    most = LONGEST_NAME
    if ax is None:
        side = min(max(2.8, 0.36 * classes), 12.0)
        room = min(max(map(len, names)), most) * CHARACTER * _name_size(72 * side / classes)[0] / 72
        ax = new_axes(side + room + 0.5, side + room + 0.5)
    else:
        most = _characters(0.35 * min(_size(ax)), _name_size(min(_size(ax)) / classes)[0])
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = ax.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1))
    ax.set_xlabel("predicted")
    ax.set_ylabel("truth")
    cell = min(_size(ax)) / classes
    size, step = _name_size(cell)
    labels = picture_labels(names, most)[::step]
    places = range(0, classes, step)
    longest = max(map(len, labels)) * CHARACTER * size
    turned: dict[str, Any] = {"rotation": 90}
    if longest < 0.95 * cell * step:
        turned = {}
    elif 1.3 * size < 0.7 * cell * step:
        turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    ax.set_xticks(places, labels, fontsize=size, fontfamily=families(), **turned)
    ax.set_yticks(places, labels, fontsize=size, fontfamily=families())
    ax.tick_params(length=0 if step == 1 else 2)
    ax.spines[:].set_visible(False)
    ax.set_xticks(np.arange(classes - 1) + 0.5, minor=True)
    ax.set_yticks(np.arange(classes - 1) + 0.5, minor=True)
    ax.grid(which="minor", color="white", linewidth=min(1.5, cell / 15))
    ax.tick_params(which="minor", length=0)
    _lay_out(ax)
    of_row = [[_share(value) for value in row] for row in shares]
    numbers = of_row if normalize else counts.astype(str).tolist()
    cell = min(_size(ax)) / classes
    size = _number_size(numbers, cell, 0.45)
    if not normalize and classes <= FEW_CLASSES and (smaller := _number_size(of_row, cell, 0.3)) >= SMALLEST_SHARE:
        shown = [zip(*rows, strict=True) for rows in zip(numbers, of_row, strict=True)]
        numbers = [[n if n == "0" else f"{n}\n{share}" for n, share in row] for row in shown]
        size = min(size, smaller)
    if size < SMALLEST_NUMBER:
        bar = ax.figure.colorbar(
            image, ax=ax, fraction=0.03, aspect=30, shrink=0.7, pad=0.02, ticks=[0, 0.01, 0.1, 0.5, 1]
        )
        bar.ax.set_yticklabels(["0", "1%", "10%", "50%", "100%"], fontsize=8)
        bar.set_label("share of the true class", fontsize=8)
        bar.outline.set_visible(False)
        _lay_out(ax)
        return ax
    colours = image.to_rgba(shares)[..., :3]
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    is_dark = linear @ (0.2126, 0.7152, 0.0722) < 0.179  # where white stands out more than black (WCAG 2.1)
    for row, column in np.ndindex(classes, classes):
        if counts[row, column] or classes <= FEW_CLASSES:
            colour = "white" if is_dark[row, column] else "black" if counts[row, column] else "0.45"
            ax.text(column, row, numbers[row][column], ha="center", va="center", fontsize=size, color=colour)
    return ax


def plot_per_class(
    names: Sequence[str],
    precision: Sequence[float | None],
    recall: Sequence[float | None],
    ax: Axes | None = None,
) -> Axes:
    """Precision and recall of each class, a line a class, the first at the top; None leaves a mark out."""
    classes = len(names)
    ax = ax or new_axes(6.4, min(max(2.2, 1.2 + 0.24 * classes), 14.0))
    places = np.arange(classes)
    both = np.array([precision, recall], dtype=float)
    width, height = _size(ax)
    size, step = _name_size(height / classes)
    mark = min(49.0, max(4.0, (0.6 * height / classes) ** 2))
    ax.hlines(places, both.min(axis=0), both.max(axis=0), color="0.75", linewidth=1.5, zorder=1)
    ax.scatter(both[0], places, s=mark, color=CURVE, marker="o", label="precision", zorder=3)
    ax.scatter(both[1], places, s=mark, color=MARK, marker="D", label="recall", zorder=2)
    labels = picture_labels(names, _characters(0.45 * width, size))
    ax.set_yticks(places[::step], labels[::step], fontsize=size, fontfamily=families())
    ax.set_ylim(classes - 0.4, -0.6)
    lowest = min(both[np.isfinite(both)].tolist(), default=0.0)
    left = max(0.0, math.floor(10 * lowest - 0.5) / 10)
    ax.set_xlim(left - 0.02 * (1 - left), 1 + 0.02 * (1 - left))
    ax.xaxis.set_major_formatter(PercentFormatter(1))
    ax.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, fontsize=9)
    tidy(ax)
    _lay_out(ax)
    return ax


def plot_images(images: Sequence[Any], captions: Sequence[Sequence[str]], ax: Axes | None = None) -> Axes:
    """Images in rows inside one Axes, each whole and equally high, with lines of text below; without any it says so.

    Args:
        images (sequence of Pillow images or arrays (height, width[, 3])): what to show; one more than twice as wide as
            high is lower than the others.
        captions (sequence of sequences of `str`): the lines below each; what is too long is cut in the middle.
        ax (`Axes`, *optional*): where to draw; by default a new figure with up to four images in a row.
    """
    count, lines = len(images), max(map(len, captions), default=0)
    pictures = [Image.fromarray(np.asarray(image)) for image in images]
    widths = [min(WIDEST, max(NARROWEST, picture.width / picture.height)) for picture in pictures]  # of their places
    if ax is None:
        rows = max(1, math.ceil(count / 4))
        per_row = math.ceil(count / rows)
        ax = new_axes(1.75 * _row_width(widths, per_row), (1.75 + 0.2 * lines) * rows)
    ax.set_axis_off()
    if not count:
        ax.text(0.5, 0.5, "no such image", transform=ax.transAxes, ha="center", va="center", color="0.4")
        return ax
    _lay_out(ax)
    width, height = _size(ax)
    below = 0.15 * lines  # the room for text, as a share of an image's height
    for _ in range(2):  # it settles: text has a largest size, and what it does not need goes to the images
        sides = {
            n: min(width / _row_width(widths, n), height / math.ceil(count / n) / (1 + below))
            for n in range(1, count + 1)
        }
        columns = max(sides, key=sides.__getitem__)
        size = min(10.0, max(SMALLEST_NAME, 0.11 * sides[columns]))
        below = 1.35 * size * lines / sides[columns]
    rows, side = math.ceil(count / columns), sides[columns]
    x = 0.0
    for place, (picture, room, caption) in enumerate(zip(pictures, widths, captions, strict=True)):
        row, column = divmod(place, columns)
        x = x if column else 0.0
        high = 0.94 * min(1.0, room * picture.height / picture.width)
        wide, bottom, middle = high * picture.width / picture.height, row * (1 + below) + 0.97, x + room / 2
        picture.thumbnail((IMAGE_PIXELS, IMAGE_PIXELS))
        ax.imshow(picture, extent=(middle - wide / 2, middle + wide / 2, bottom, bottom - high))
        text = "\n".join(picture_text(line, _characters(0.98 * side * room, size)) for line in caption)
        ax.text(middle, bottom + 0.03, text, ha="center", va="top", fontsize=size, fontfamily=families())
        x += room
    ax.set_xlim(0, _row_width(widths, columns))
    ax.set_ylim(rows * (1 + below), 0)
    return ax


def new_axes(width: float = 6.4, height: float = 4.0) -> Axes:
    """Axes of a new figure, in inches, that belongs to no window, so that nothing has to be closed."""
    return Figure(figsize=(width, height), dpi=120, layout="constrained").add_subplot()


def tidy(ax: Axes) -> None:
    """A faint grid, and no frame above and to the right."""
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)


def _size(ax: Axes) -> tuple[float, float]:
    """Width and height in points."""
    box = ax.get_window_extent()
    return box.width * 72 / ax.figure.dpi, box.height * 72 / ax.figure.dpi


def _name_size(room: float) -> tuple[float, int]:
    """Font size of names that have so many points each, and every how many of them is shown."""
    step = max(1, math.ceil(1.15 * SMALLEST_NAME / room))
    return min(10.0, max(SMALLEST_NAME, 0.8 * room * step)), step


def _characters(points: float, size: float) -> int:
    """How many characters have room."""
    return min(40, max(6, int(points / (CHARACTER * size))))


def _number_size(numbers: Sequence[Sequence[str]], cell: float, height: float) -> float:
    """Font size of numbers, each in a cell of so many points, of whose height a line may take a share."""
    widest = max(len(text) + text.count("%") for row in numbers for text in row)  # that sign is as wide as two digits
    return min(12.0, height * cell, 0.8 * cell / (CHARACTER * widest))


def _row_width(widths: Sequence[float], per_row: int) -> float:
    """The width of the widest of rows of so many."""
    return max((sum(widths[i : i + per_row]) for i in range(0, len(widths), max(1, per_row))), default=1.0)


def _share(value: float) -> str:
    """A share in whole per cent; only none at all is 0, only all is 100%."""
    if value == 0:
        return "0"
    if value < 0.005:
        return "<1%"
    return ">99%" if 0.995 <= value < 1 else f"{value:.0%}"


def _lay_out(ax: Axes) -> None:
    """Settle where the Axes lies; where no layout engine does that, shrink it so that no text leaves the figure."""
    root = ax.figure.canvas.figure
    root.draw_without_rendering()
    if root.get_layout_engine() is not None:
        return
    text, page, box = ax.get_tightbbox(), root.bbox, ax.get_position(original=True)
    if text is None:
        return
    left, right = max(0.0, 4 - text.x0) / page.width, max(0.0, text.x1 - page.width + 4) / page.width
    bottom, top = max(0.0, 4 - text.y0) / page.height, max(0.0, text.y1 - page.height + 4) / page.height
    width, height = box.width - left - right, box.height - bottom - top
    if (left or right or bottom or top) and min(width, height) > 0.1:
        ax.set_position((box.x0 + left, box.y0 + bottom, width, height))
