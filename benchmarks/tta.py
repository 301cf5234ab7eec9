"""Test-time augmentation: the loss of the arithmetic and of the geometric mean over views, by the plain view's weight.

    pip install -e ".[bench,demo]"
    python benchmarks/tta.py --data_dir FOLDER [--sets trash] [--seeds 42] [--stored 4] [--scale plain]

FOLDER is that of quality.py. Heads are solved on stored views; the views are those of `trainer.tta(4)`, or, by `--scale
plain`, ones that show things as large as the plain view does. Last come the geometric mean by the weight that
validation chooses, as `trainer.fit_tta(4)` does, and the same chosen on one half of validation and measured on the
other, both ways. docs/experiments.md has the tables and what follows.
"""

import argparse
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from quality import SETS, in_halves, solved_trainer
from torchvision.transforms.v2 import functional as vision

from hf_sgdr.data.dataset import ImageViews
from hf_sgdr.data.transforms import ImageTransform
from hf_sgdr.inference.tta import WEIGHTS as CHOICES

VIEWS = 4
WEIGHTS = (0.2, 0.25, 0.4, 0.5, 0.6)


class AtPlainScale(ImageTransform):
    """Views as large as the plain image is before it is cropped, and of them the centre."""

    def views(self, image: Image.Image | torch.Tensor, plain: torch.Tensor, numbers: Iterable[int]) -> torch.Tensor:
        """See [`ImageTransform.views`]."""
        whole = ImageTransform(replace(self.spec, size=self.spec.resize), self.augment, self.max_zoom)
        return vision.center_crop(whole.views(image, plain, numbers), [self.spec.size])


def main() -> None:
    """A line for each set and seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[42])
    parser.add_argument("--stored", type=int, default=4, help="stored views on which the heads are solved")
    parser.add_argument("--scale", choices=("trained", "plain"), default="trained", help="of the views")
    options = parser.parse_args()
    views = ImageTransform if options.scale == "trained" else AtPlainScale
    shown = ", ".join(map(str, WEIGHTS))
    print(f"| set | seed | plain | arithmetic: {shown} | geometric: {shown} | chosen | on the other half |", flush=True)
    print("|---" * 7 + "|", flush=True)
    for name in options.sets:
        for seed in options.seeds:
            with tempfile.TemporaryDirectory() as output:
                trainer = solved_trainer(name, seed, "tf_efficientnet_lite0", options.data_dir, output, options.stored)
                print(f"| {name} | {seed} | {' | '.join(losses(trainer, views))} |", flush=True)


def losses(trainer: Any, kind: type[ImageTransform]) -> list[str]:
    """Of the plain view, of both means at each weight, and with the weight chosen."""
    images, labels = trainer.images.evaluation(trainer.eval_dataset), torch.tensor(trainer.eval_dataset["label"])
    transform = kind(trainer.eval_transform.spec, trainer.train_transform.augment, trainer.train_transform.max_zoom)
    views = torch.from_numpy(trainer.log_predictions(ImageViews(images, transform, VIEWS))).double()
    plain, *others = views.unflatten(0, (len(images), 1 + VIEWS)).unbind(1)
    other, other_log = torch.stack(others).exp().mean(0), torch.stack(others).mean(0)
    arithmetic = [F.nll_loss((weight * plain.exp() + (1 - weight) * other).log(), labels) for weight in WEIGHTS]
    geometric = [F.cross_entropy(weight * plain + (1 - weight) * other_log, labels) for weight in WEIGHTS]
    by_weight = torch.stack([weight * plain + (1 - weight) * other_log for weight in CHOICES])
    each = torch.stack([F.cross_entropy(logits, labels, reduction="none") for logits in by_weight]).numpy()
    best = each.mean(1).argmin()
    halves = in_halves(each, (by_weight.argmax(2) == labels).numpy(), labels.numpy())
    rows = [F.nll_loss(plain, labels)], arithmetic, geometric, [each[best].mean()], halves[:1]
    shown = [", ".join(f"{loss:.4f}" for loss in row) for row in rows]
    return [*shown[:3], f"{shown[3]} ({CHOICES[best]:.2f})", shown[4]]


if __name__ == "__main__":
    main()
