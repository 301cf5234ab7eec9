"""What the plots draw; how they look is for eyes, what must hold of every one of them is here."""

import io
import warnings

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from hf_sgdr._utils.fonts import families, picture_labels, picture_text
from hf_sgdr._utils.plots import (
    new_axes,
    plot_confusion_matrix,
    plot_images,
    plot_per_class,
    plot_range_test,
    plot_rates,
)
from hf_sgdr._utils.run_picture import plot_run

NASTY = ["$\\frac{1}{0}$", "犬", "🐕‍🦺", "two\nlines", "\x1b[31mred", "long " * 30, "=1+1", "\udcff", "_^{", "猫"]


def counts(classes):
    rng = np.random.default_rng(classes)
    return rng.integers(0, 3, (classes, classes)) + 40 * np.eye(classes, dtype=int)


def axes(size):
    return None if size is None else Figure(figsize=size).add_subplot()


def draw(ax):
    """The saved picture, and every warning is an error."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ax.figure.savefig(file, format="png")
    return np.asarray(Image.open(file))


def draw_all(names, size):
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (30 + 5 * i, 60, 3), dtype=np.uint8)) for i in range(5)]
    shares = rng.random((2, len(names))).tolist()
    yield plot_confusion_matrix(counts(len(names)), names, axes(size))
    yield plot_confusion_matrix(counts(len(names)), names, axes(size), normalize=True)
    yield plot_per_class(names, *shares, axes(size))
    yield plot_images(images, [[names[i % len(names)], f"truth: {names[0]}"] for i in range(5)], axes(size))


@pytest.mark.parametrize("size", [None, (4, 3), (12, 12)])
@pytest.mark.parametrize("names", [["cats", "dogs"], NASTY, [f"a name of some length {i}" for i in range(15)]])
def test_any_names_at_any_size_without_a_warning_on_an_opaque_ground_and_no_text_cut_off(names, size):
    for ax in draw_all(names, size):
        picture = draw(ax)
        assert picture[..., 3].min() == 255
        assert picture[..., :3].std() > 1
        box, page = ax.get_tightbbox(), ax.figure.bbox
        assert min(box.x0, box.y0, page.width - box.x1, page.height - box.y1) > -1


def test_a_figure_too_small_for_anything_is_no_error():
    for ax in draw_all(NASTY, (1, 1)):
        draw(ax)


def test_each_takes_and_returns_an_axes():
    ax = Figure().add_subplot()
    for drawn in (
        plot_confusion_matrix(counts(2), ["a", "b"], ax),
        plot_per_class(["a", "b"], [1.0, None], [None, 0.5], ax),
        plot_images([np.zeros((4, 4, 3), dtype=np.uint8)], [["a"]], ax),
        plot_images([], [], ax),
        plot_range_test([1e-3, 1e-2], [1.0, 0.5], [1.0, 0.5], ax),
        plot_rates({"head": [0.1, 0.2]}, ax),
    ):
        assert drawn is ax


def test_axes_in_a_subfigure_serve_too():
    left, right = Figure(figsize=(8, 4), layout="constrained").subfigures(1, 2)
    plot_confusion_matrix(counts(3), ["a", "b", "c"], left.add_subplot())
    plot_images([np.zeros((4, 4, 3), dtype=np.uint8)], [["a"]], right.add_subplot())
    left.figure.savefig(io.BytesIO())


def numbers(ax):
    return [text.get_text() for text in ax.texts]


def test_the_matrix_shows_counts_with_the_truth_in_rows():
    ax = plot_confusion_matrix([[97, 3], [0, 50]], ["cats", "dogs"])
    assert numbers(ax) == ["97\n97%", "3\n3%", "0", "50\n100%"]
    assert [text.get_position() for text in ax.texts[:2]] == [(0, 0), (1, 0)]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("predicted", "truth")
    assert [label.get_text() for label in ax.get_yticklabels()] == ["cats", "dogs"]


def test_shares_never_round_to_none_or_all():
    ax = plot_confusion_matrix([[997, 3], [0, 50]], ["cats", "dogs"], normalize=True)
    assert numbers(ax) == [">99%", "<1%", "0", "100%"]
    assert numbers(plot_confusion_matrix([[0, 0], [1, 3]], ["a", "b"], normalize=True)) == ["0", "0", "25%", "75%"]


def test_many_classes_leave_zeros_out_and_small_cells_all_numbers():
    matrix = np.eye(11, dtype=int)
    assert numbers(plot_confusion_matrix(matrix, [str(i) for i in range(11)])) == ["1"] * 11
    ax = plot_confusion_matrix(counts(120), [f"class {i}" for i in range(120)], axes((4, 3)))
    assert numbers(ax) == []
    assert ax.figure.axes[1].get_ylabel() == "share of the true class"
    # and names are thinned out
    shown = [label.get_text() for label in ax.get_yticklabels()]
    assert shown[:2] == ["class 0", f"class {int(ax.get_yticks()[1])}"]
    assert len(shown) < 40


def test_numbers_stand_out_from_their_cells():
    """At least 4.5 to 1, as WCAG 2.1 (1.4.3) asks of text."""
    for share in range(0, 1001, 50):
        ax = plot_confusion_matrix([[share, 1000 - share], [0, 1]], ["a", "b"])
        for text, cell in zip(ax.texts, ax.images[0].to_rgba(ax.images[0].get_array()).reshape(-1, 4), strict=True):
            pair = sorted(luminance(colour) for colour in (matplotlib.colors.to_rgb(text.get_color()), cell[:3]))
            assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5, (share, text.get_text())


def luminance(colour):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def test_images_are_shown_whole_keep_their_shape_and_are_equally_high():
    wide, tall, panorama = (Image.new("RGB", size) for size in ((90, 60), (30, 90), (400, 100)))
    ax = plot_images([wide, tall, panorama], [["a"], ["b"], ["c"]])
    heights = []
    for shown, image in zip(ax.images, (wide, tall, panorama), strict=True):
        left, right, bottom, top = shown.get_extent()
        assert (right - left) / (bottom - top) == pytest.approx(image.width / image.height)
        heights.append(bottom - top)
    assert heights == pytest.approx([0.94, 0.94, 0.47])  # one that is very wide is lower
    rights = [shown.get_extent()[1] for shown in ax.images]
    assert all(shown.get_extent()[0] > right for shown, right in zip(ax.images[1:], rights, strict=False))
    assert ax.get_aspect() == 1.0


def test_a_large_image_is_made_smaller_and_left_alone_itself():
    image = Image.new("RGB", (4000, 3000))
    ax = plot_images([image], [["a"]])
    assert ax.images[0].get_size() == (300, 400)
    assert image.size == (4000, 3000)


def test_rates_have_whole_steps_marked_cycles_and_a_log_axis_where_they_are_tens_apart():
    ax = plot_rates({"early": [0.001, 0.0005] * 2, "head": [0.02, 0.01] * 2}, steps_per_epoch=2, restarts=[2])
    assert ax.get_yscale() == "log"
    assert all(tick == int(tick) for tick in ax.get_xticks())
    assert [text.get_text() for text in ax.texts] == ["cycle 1", "cycle 2"]
    epochs = ax.child_axes[0]
    draw(ax)
    assert {"0", "1", "2"} <= {label.get_text() for label in epochs.get_xticklabels()}
    ax = plot_rates({"early": [0.01, 0.0], "head": [0.02, 0.0]})
    assert (ax.get_yscale(), ax.get_ylim()[0]) == ("linear", 0)


FITS = [
    {
        "name": "head", "epochs": 2.0, "rates": {"head": [0.01] * 4},
        "points": [{"epoch": i, "loss": 0.5} for i in (1, 2)] + [{"epoch": 2, "eval_loss": 0.4, "eval_accuracy": 0.8}],
    },
    {
        "name": "$nasty", "epochs": 1.0, "rates": {"early": [1e-4, 5e-5], "head": [0.01, 0.005]},
        "points": [{"epoch": 1, "loss": 0.3}, {"epoch": 1, "eval_loss": 0.2, "eval_accuracy": 0.9}],
    },
]  # fmt: skip


def test_a_run_is_drawn_by_epoch_with_what_was_kept():
    best = {"stage": "$nasty", "epoch": 1.0, "eval_loss": 0.2, "eval_accuracy": 0.9}
    figure = plot_run(FITS, best=best, solved={"eval_loss": 0.3, "eval_accuracy": 0.85})
    rates, losses, accuracy = figure.axes
    draw(rates)
    assert rates.get_yscale() == "log"
    assert np.nanmax(rates.lines[-1].get_xdata()) == 2.5  # the second of two steps of the third epoch
    assert [line.get_label() for line in losses.lines] == ["training", "validation", "solved head: 0.3", "kept: 0.2"]
    assert losses.lines[1].get_xdata().tolist() == accuracy.lines[0].get_xdata().tolist() == [2, 3]
    assert losses.lines[-1].get_xdata().tolist() == [3]
    assert [text.get_text() for text in losses.texts] == ["head", r"\$nasty"]
    of_average = plot_run(FITS, best={**best, "stage": "head (average)"}).axes[1].lines[-1]
    assert of_average.get_xdata().tolist() == [2]


def test_a_run_with_a_range_test_has_it_first():
    figure = plot_run(FITS, range_test=lambda ax: plot_range_test([1e-3, 1e-2], [1.0, 0.5], [1.0, 0.5], ax))
    assert [ax.get_title() for ax in figure.axes][:2] == ["range test", "learning rate of each layer group"]


# ---- Names in pictures ----


def test_a_character_that_no_font_has_becomes_a_box():
    assert picture_text("cat \U000f0000") == "cat □"
    assert picture_text("naïve Ωmega") == "naïve Ωmega"
    assert len(picture_text("x" * 100, 12)) == 12


def test_names_that_would_look_alike_are_numbered():
    assert picture_labels(["\U000f0000", "cats", "\U000f0001"]) == ["□ #0", "cats", "□ #2"]
    assert picture_labels(["a long name, first", "a long name, worst"], 10) == ["a lon…irst", "a lon…orst"]
    assert picture_labels(["aaaaaaaaaa 1 bbbbbbbbbb", "aaaaaaaaaa 2 bbbbbbbbbb"], 10) == [
        "aaaaa…bbbb #0",
        "aaaaa…bbbb #1",
    ]


def test_the_fonts_of_the_user_come_first_and_matplotlibs_own_last():
    with matplotlib.rc_context({"font.family": ["monospace"]}):
        assert families()[0] == "monospace"
        assert families()[-1] == "DejaVu Sans"
        assert picture_text("Ω") == "Ω"


def test_new_axes_have_the_size_asked_for():
    assert new_axes(3, 2).figure.get_size_inches().tolist() == [3, 2]
