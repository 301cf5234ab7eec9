"""Test-time augmentation: the loss of the arithmetic and of the geometric mean over views, by the plain view's weight.

    pip install -e ".[bench,demo]"
    python benchmarks/tta.py --data_dir FOLDER [--sets trash] [--seeds 42]

FOLDER is that of quality.py. Heads are solved on stored views; the views are those of `trainer.tta(4)`.
docs/experiments.md has the table and what follows from it.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from quality import SETS, solved_trainer

from hf_sgdr.data.dataset import ImageViews

VIEWS = 4
WEIGHTS = (0.2, 0.25, 0.4, 0.5, 0.6)


def main() -> None:
    """A line for each set and seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[42])
    options = parser.parse_args()
    shown = ", ".join(map(str, WEIGHTS))
    print(f"| set | seed | plain | arithmetic: {shown} | geometric: {shown} |\n|---|---|---|---|---|", flush=True)
    for name in options.sets:
        for seed in options.seeds:
            with tempfile.TemporaryDirectory() as output:
                trainer = solved_trainer(name, seed, "tf_efficientnet_lite0", options.data_dir, output)
                print(f"| {name} | {seed} | {' | '.join(losses(trainer))} |", flush=True)


def losses(trainer: Any) -> list[str]:
    """Of the plain view, and of both means at each weight."""
    images, labels = trainer.images.evaluation(trainer.eval_dataset), torch.tensor(trainer.eval_dataset["label"])
    transform = replace(trainer.train_transform, spec=trainer.eval_transform.spec)
    views = torch.from_numpy(trainer.log_predictions(ImageViews(images, transform, VIEWS))).double()
    plain, *others = views.unflatten(0, (len(images), 1 + VIEWS)).unbind(1)
    other, other_log = torch.stack(others).exp().mean(0), torch.stack(others).mean(0)
    arithmetic = [F.nll_loss((weight * plain.exp() + (1 - weight) * other).log(), labels) for weight in WEIGHTS]
    geometric = [F.cross_entropy(weight * plain + (1 - weight) * other_log, labels) for weight in WEIGHTS]
    return [", ".join(f"{loss:.4f}" for loss in row) for row in ([F.nll_loss(plain, labels)], arithmetic, geometric)]


if __name__ == "__main__":
    main()
