"""What a model card says, as rows and sentences of Markdown made from a run's figures.

Names from outside are escaped here, where they enter a sentence.
"""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers.training_args import OptimizerNames

from hf_sgdr._utils.text import markdown_text
from hf_sgdr.hub.record import TrainedRun
from hf_sgdr.inference.interpretation import ClassifierInterpretation, ClassReport
from hf_sgdr.recipe import RunResults

# Of a class with fewer validation images, one image more or less moves the figures by over five hundredths.
FEW_IMAGES = 20
MANY_NAMES = 12
MOST_MISTAKES = 3
# The 97.5 % point of the normal distribution, for an interval of 95 %.
Z_95 = 1.959964
AUGMENTATIONS = {
    None: "none",
    "basic": "rotation by up to 10 degrees, brightness and contrast",
    "side_on": "rotation by up to 10 degrees, brightness and contrast, left and right exchanged",
    "top_down": "rotation by up to 10 degrees, brightness and contrast, quarter turns and mirror images",
}


def summary(trainer: TrainedRun, base_model: str | None) -> str:
    """What the model is, in two sentences."""
    names = class_names(trainer)
    shown = [markdown_text(name) for name in names[:MANY_NAMES]]
    if len(names) > MANY_NAMES:
        listed = f"{', '.join(shown)} and {len(names) - MANY_NAMES} more"
    else:
        listed = f"{', '.join(shown[:-1])} and {shown[-1]}"
    started = f", fine-tuned from {_linked(base_model)}" if base_model else ""
    return (
        f"An image classifier that tells {len(names)} classes apart: {listed}. Its network is {_architecture(trainer)}"
        f"{started}, trained by hf\\_sgdr; this card was written by the run, from what it measured."
    )


def origin_of_weights(trainer: TrainedRun, base_model: str | None, origin: str | None) -> str:
    """Where the weights come from, as far as it is known."""
    if base_model:
        return f"It started from the weights of {_linked(base_model)}, with a fresh or kept head for these classes."
    if origin:
        return markdown_text(origin)
    return f"Its network is {_architecture(trainer)}; no model of the Hub is known as the one that it started from."


def local_origin(name: str, weights_file: str | None, pretrained: bool) -> str | None:
    """A sentence about weights that no id of the Hub names; None where one does.

    Args:
        name (`str`): of the model, as it was given.
        weights_file (`str` or None): told by its own name and its SHA-256, not by where it lies.
        pretrained (`bool`): False is random weights.
    """
    if not pretrained:
        return "It started from random weights."
    if weights_file is not None:
        file = Path(weights_file)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        return f"It started from the weights in {file.name}, a local file with the SHA-256 {digest}."
    return "It started from a model in a local folder." if Path(name).is_dir() else None


def class_names(trainer: TrainedRun) -> list[str]:
    """The names of the classes, in the order of their ids."""
    labels = trainer.model.config.id2label
    return [labels[i] for i in range(trainer.model.config.num_labels)]


def architecture(trainer: TrainedRun) -> str:
    """The name of the network: timm's, or the kind of transformers' model."""
    config = trainer.model.config
    return config.architecture if config.model_type == "timm_wrapper" else config.model_type


def stage_row(stage: dict[str, Any], groups: Sequence[str]) -> dict[str, str | int]:
    """A line of the table of stages, from an entry of `results.json`."""
    trained = list(groups)[stage["freeze_to"] :]
    rates = list(zip(groups, stage["learning_rates"], strict=True))[stage["freeze_to"] :]
    trains = "everything" if len(trained) == len(groups) else ", ".join(map(markdown_text, trained))
    return {
        "name": markdown_text(stage["name"]),
        "trains": trains + (", on precomputed features" if stage["precompute"] else ""),
        "epochs": stage["epochs"],
        "cycles": stage["cycles"],
        "rates": ", ".join(f"{markdown_text(name)} {rate:.2g}" for name, rate in rates),
        "train_loss": figure(stage["train_loss"]),
        "eval_loss": figure(stage["eval_loss"]),
        "eval_accuracy": figure(stage["eval_accuracy"]),
        "seconds": f"{stage['seconds']:.1f}",
    }


def class_rows(trainer: TrainedRun, reports: Sequence[ClassReport]) -> list[dict[str, str | int]]:
    """A line of the table of classes for each class."""
    labels = np.asarray(trainer.train_dataset[trainer.args.label_column_name])
    counts = np.bincount(labels[labels >= 0], minlength=len(reports)).tolist()
    return [
        {
            "name": markdown_text(report.name),
            "train_images": count,
            "images": report.images,
            "precision": figure(report.precision),
            "recall": figure(report.recall),
            "f1": figure(report.f1),
        }
        for report, count in zip(reports, counts, strict=True)
    ]


def settings(trainer: TrainedRun, results: RunResults) -> dict[str, str]:
    """What else decides the run."""
    args, spec = trainer.args, trainer.eval_transform.spec
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * results.world_size
    name = OptimizerNames(args.optim).value
    optimizer = f"{name}, " + (f"momentum {args.momentum:g}, " if name == "sgd" else "")
    resized = f"resized to {spec.resize} x {spec.resize}" if spec.squash else f"shorter side resized to {spec.resize}"
    view = f"{spec.size} px ({resized}, centre of {spec.size} x {spec.size}, {spec.interpolation})"
    zoom = f"; zoom up to {trainer.train_transform.max_zoom:g}" if trainer.train_transform.max_zoom > 1 else ""
    precision = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    rows = {
        "images": f"{len(trainer.train_dataset)} for training, {len(trainer.eval_dataset)} for validation",
        "input": view,
        "augmentation": AUGMENTATIONS[trainer.train_transform.augment] + zoom,
        "layer groups": ", ".join(map(markdown_text, trainer.layer_groups.names)),
        "optimizer": f"{optimizer}weight decay {args.weight_decay:g}",
        "images a step": f"{batch}",
        "precision of training": precision,
        "processes": f"{results.world_size}",
        "seed": f"{args.seed}",
    }
    if any(stage["precompute"] for stage in results.stages):
        rows["precision of training features"] = trainer.features.dtype
    return rows


def limits(trainer: TrainedRun, seen: ClassifierInterpretation, results: RunResults) -> list[str]:
    """What the figures do not say, each sentence from a fact of the run."""
    rows, spec = class_rows(trainer, seen.per_class()), trainer.eval_transform.spec
    right, count = int((seen.predicted == seen.labels).sum()), len(seen.labels)
    low, high = wilson_interval(right, count)
    rarest = min(rows, key=lambda row: row["train_images"])
    kept = spec.size / spec.resize
    found = [
        "It answers with one of its classes whatever the image shows, also if that is none of them.",
        f"It learnt from {len(trainer.train_dataset)} images, {rarest['train_images']} of them of the rarest class "
        f"({rarest['name']}). Images of another kind (other light, other cameras, drawings) were not measured.",
        f"{count} validation images leave the accuracy uncertain: it is between {low:.3f} and {high:.3f} with 95 % "
        "confidence, for images that are drawn as these were (Wilson's interval).",
    ]
    cut_off = {stage["max_steps"] for stage in results.stages if stage.get("max_steps")}
    if cut_off:
        steps = ", ".join(map(str, sorted(cut_off)))
        found.append(f"Each fit was ended after {steps} optimizer steps, to try the run: it is not trained to its end.")
    if results.best:
        found.append(
            "The weights were chosen, out of all epochs, by the loss on these same validation images, so the figures "
            "are a little better than those of images that nobody has looked at."
        )
    few = [str(row["name"]) for row in rows if int(row["images"]) < FEW_IMAGES]
    if few:
        more = f" and {len(few) - MANY_NAMES} more" if len(few) > MANY_NAMES else ""
        found.append(
            f"Fewer than {FEW_IMAGES} validation images: {', '.join(few[:MANY_NAMES])}{more}. "
            "The figures of such a class say little."
        )
    reports = {report.name: report for report in seen.per_class()}
    mistakes = [
        f"{markdown_text(truth)} taken for {markdown_text(guess)} ({times} of {reports[truth].images} images)"
        for truth, guess, times in seen.most_confused()[:MOST_MISTAKES]
    ]
    if mistakes:
        weakest = min((one for one in reports.values() if one.recall is not None), key=lambda one: one.recall or 0.0)
        found.append(
            f"It recognises {markdown_text(weakest.name)} least (recall {figure(weakest.recall)}). Its most frequent "
            f"mistakes in validation: {', '.join(mistakes)}."
        )
    if spec.squash:
        found.append(f"Images are squeezed into a square of {spec.size} px: long ones are seen distorted.")
    else:
        found.append(
            f"It sees the middle of an image, a square of {kept:.0%} of the shorter side, at {spec.size} px: what is "
            "at the edges or small is lost."
        )
    if trainer.train_transform.augment in (None, "basic"):
        found.append("Mirror images were no part of its training.")
    found.append("Not measured: how well its probabilities are calibrated, its speed, and fairness of any kind.")
    return found


def licence(identifier: str | None, base_model: str | None) -> str:
    """What is known about the licence."""
    base = f" That of {_linked(base_model)}, from which it started, holds too." if base_model else ""
    if identifier is None:
        return f"Who published this model has not stated a licence: ask before you use it.{base}"
    return f"{markdown_text(identifier)}, stated by who published this model.{base}"


def wilson_interval(right: int, count: int, z: float = Z_95) -> tuple[float, float]:
    """The interval of a share, `right` of `count`; by default with 95 % confidence.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    share, spread = right / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def views(count: int) -> str:
    """How many views, in words."""
    return f"{count} augmented view{'' if count == 1 else 's'}"


def figure(value: float | None) -> str:
    """A figure with four decimals, or a dash where there is none."""
    return "–" if value is None else f"{value:.4f}"


def _architecture(trainer: TrainedRun) -> str:
    return markdown_text(architecture(trainer))


def _linked(model_id: str) -> str:
    return f"[{markdown_text(model_id)}](https://huggingface.co/{model_id})"
