"""Draws docs/lesson.png, README's picture, from a run of the whole lesson.

python docs/make_picture.py --data_dir dogscats
"""

import argparse
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from transformers import TrainerCallback, set_seed

from hf_sgdr import (
    SGDRTrainer,
    SGDRTrainingArguments,
    create_image_classifier,
    image_transforms,
    load_image_folder,
    run_stages,
)
from hf_sgdr._utils.plots import CURVE, GROUPS, MARK, plot_range_test
from hf_sgdr.demo import DEMO_MODEL, demo_weights_file


class Watch(TrainerCallback):
    """Notes, over all stages, every step's rates and every epoch's validation loss."""

    def __init__(self) -> None:
        self.trainer: SGDRTrainer | None = None
        self.rates: list[dict[str, float]] = []
        self.losses: list[tuple[int, float, float]] = []
        self.starts: list[int] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.starts.append(len(self.rates))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rates.append({group["name"]: group["lr"] for group in kwargs["optimizer"].param_groups})

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
        self.losses.append((len(self.rates), metrics["eval_loss"], metrics["eval_accuracy"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--output_dir", default="picture_out")
    args = parser.parse_args()
    set_seed(42)
    images = load_image_folder(args.data_dir)
    model = create_image_classifier(
        DEMO_MODEL, labels=images["train"].features["label"].names, weights_file=demo_weights_file()
    )
    train_transform, eval_transform = image_transforms(model, augment="side_on", max_zoom=1.1)
    trainer = SGDRTrainer(
        model,
        SGDRTrainingArguments(args.output_dir, n_groups=3),
        train_dataset=images["train"],
        eval_dataset=images["validation"],
        train_transform=train_transform,
        eval_transform=eval_transform,
    )
    watch = Watch()
    trainer.add_callback(watch)
    results = run_stages(trainer)
    figure = Figure(figsize=(13, 3.7), dpi=110, layout="constrained", facecolor="white")
    first, second, third = figure.subplots(1, 3)
    result = trainer.history.range_tests[results.stages[0]["name"]]
    plot_range_test(result.history["lr"], result.history["smoothed_loss"], result.suggestion(), first)
    first.set_title("find the learning rate")
    draw_rates(second, watch)
    draw_losses(third, watch, results.best)
    names = [stage["name"] for stage in results.stages]
    for ax in (second, third):
        mark_stages(ax, watch, names)
    figure.savefig(Path(__file__).parent / "lesson.png")


def draw_rates(ax: Axes, watch: Watch) -> None:
    for name, shade in zip(("early", "middle", "head"), GROUPS, strict=True):
        values = [rates.get(name, float("nan")) or float("nan") for rates in watch.rates]
        ax.plot(values, color=shade, linewidth=1.4, label=name)
    ax.set_yscale("log")
    ax.set_ylim(top=5e-2)
    ax.set_ylabel("learning rate (log scale)")
    ax.set_title("anneal and restart, a rate for each layer group")
    ax.legend(frameon=False, loc="lower left")


def draw_losses(ax: Axes, watch: Watch, best: dict[str, Any]) -> None:
    steps, losses, _ = zip(*watch.losses, strict=True)
    ax.plot(steps, losses, color=CURVE, marker="o", markersize=4, linewidth=1.4)
    lowest = min(range(len(losses)), key=losses.__getitem__)
    ax.plot(steps[lowest], losses[lowest], "o", color=MARK, markersize=8)
    ax.annotate(
        f"kept: {best['eval_loss']:.3f}, accuracy {best['eval_accuracy']:.3f}",
        (steps[lowest], losses[lowest]),
        xytext=(0, -16),
        textcoords="offset points",
        ha="right",
    )
    ax.set_ylim(0, 1.15 * max(losses))
    ax.set_ylabel("validation loss")
    ax.set_title("validation after each epoch")


def mark_stages(ax: Axes, watch: Watch, names: list[str]) -> None:
    for number, (start, end) in enumerate(pairwise([*watch.starts, len(watch.rates)])):
        if number % 2:
            ax.axvspan(start, end, color="black", alpha=0.05, linewidth=0)
        ax.annotate(
            names[number], ((start + end) / 2, 1), xycoords=("data", "axes fraction"), ha="center", va="top",
            xytext=(0, -3), textcoords="offset points", fontsize=7.5,
        )  # fmt: skip
    ax.set_xlim(-8, len(watch.rates) + 1)
    ax.set_xlabel("optimizer step")
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
