"""What class weights do where one class is rare: each class in turn is cut to ten training images.

    pip install -e ".[bench,demo]"
    python benchmarks/unbalanced.py --data_dir FOLDER [--keep 10] [--seeds 42 1 2]

FOLDER is one of images in classes, such as trash. The solved head, and the head trained for two cycles from it, with
and without class_weights="balanced", on precomputed features; validation is left as it is. docs/experiments.md has the
figures.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers.utils import logging

from hf_sgdr import SGDRTrainer, SGDRTrainingArguments, create_image_classifier, load_image_folder
from hf_sgdr.demo import demo_weights_file

METRICS = ("eval_f1", "eval_balanced_accuracy", "eval_accuracy", "eval_loss")


def main() -> None:
    """Run all, a line for each class and a mean."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--keep", type=int, default=10, help="training images of the rare class")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 1, 2])
    options = parser.parse_args()
    logging.set_verbosity_error()
    images = load_image_folder(options.data_dir)
    names = images["train"].features["label"].names
    found: dict[tuple[str, str], list[list[float]]] = {}
    for rare, name in enumerate(names):
        for seed in options.seeds:
            labels = np.array(images["train"]["label"][:])
            few = np.random.default_rng(seed).permutation(np.flatnonzero(labels == rare))[: options.keep]
            rows = images["train"].select(np.sort(np.concatenate([np.flatnonzero(labels != rare), few])))
            for weights in (None, "balanced"):
                for what, figures in heads(rows, images["validation"], names, weights, seed).items():
                    found.setdefault((what, str(weights)), []).append(figures)
        print(f"{name} done", flush=True)
    print(f"| head | class_weights | {' | '.join(METRICS)} |\n|---|---|---|---|---|---|")
    for (what, weights), figures in sorted(found.items()):
        means = [statistics.mean(column) for column in zip(*figures, strict=True)]
        print(f"| {what} | {weights} | {' | '.join(f'{value:.4f}' for value in means)} |")
    for what in sorted({what for what, _ in found}):
        pairs = zip(found[what, "None"], found[what, "balanced"], strict=True)
        gains = [after[0] - before[0] for before, after in pairs]
        error = statistics.stdev(gains) / len(gains) ** 0.5
        print(f"{what}: macro-F1 {statistics.mean(gains):+.4f}, paired standard error {error:.4f}")


def heads(
    train: object, validation: object, names: list[str], weights: str | None, seed: int
) -> dict[str, list[float]]:
    """Metrics of the solved head, and of the head after two cycles from it."""
    torch.manual_seed(seed)
    weights_file = str(demo_weights_file())
    model = create_image_classifier("tf_efficientnet_lite0", labels=names, weights_file=weights_file)
    with tempfile.TemporaryDirectory() as output:
        args = SGDRTrainingArguments(
            output, class_weights=weights, precompute=True, seed=seed, use_cpu=True, report_to="none",
            disable_tqdm=True, save_strategy="no", per_device_train_batch_size=64,
        )  # fmt: skip
        trainer = SGDRTrainer(model, args, train_dataset=train, eval_dataset=validation)
        trainer.solve_head(seed=seed)
        solved = trainer.evaluate()
        trainer.fit(0.01, 2)
        trained = trainer.evaluate()
    return {what: [metrics[key] for key in METRICS] for what, metrics in {"solved": solved, "trained": trained}.items()}


if __name__ == "__main__":
    main()
