"""What could make the unfrozen stage gain over the solved head: one seed, a variant of the stage a line, four sets.

    pip install -e ".[bench,demo]"
    python benchmarks/screen.py --data_dir FOLDER [--sets trash] [--variants plain mixup] [--seed 42] [--model NAME]
                                [--views 4] [--batch_size 64] [--cycles 1 --cycle_len 4 --cycle_mult 1]

FOLDER is that of quality.py. Every variant begins at the head that is solved on stored views, and prints the validation
loss of each epoch, of the averages of start and end at a quarter, a half and three quarters, and the best accuracy.
docs/experiments.md has the figures and what follows from them.
"""

import argparse
import copy
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from quality import SETS, solved_trainer
from timm.data.mixup import Mixup
from torchvision.transforms.v2 import TrivialAugmentWide

from hf_sgdr import LayerGroups
from hf_sgdr.data.transforms import ImageTransform
from hf_sgdr.optim.architecture import body_stages, head_modules
from hf_sgdr.optim.schedule import total_epochs

RATE = {"digits": 1e-3}  # of the head, a third of it for each group below; other sets: 5e-3


@dataclass(frozen=True)
class Variant:
    """What differs from the plain stage."""

    rate: float = 1.0  # as a share of the set's
    spread: float = 3.0
    decay: float | None = None  # a group for each stage of the body, each with this share of the rate above it
    freeze_to: int = 0
    smoothing: float = 0.0
    mixup: float = 0.0
    trivial: bool = False
    adamw: float | None = None  # its rate
    batch_norm_still: bool = True
    sizes: tuple[tuple[int, int], ...] = ()  # side in pixels and epochs, in turn; plain trains at the model's own


VARIANTS = {
    "plain": Variant(),
    "twice the rate": Variant(rate=2.0),
    **{f"{share} of the rate": Variant(rate=share) for share in (0.1, 0.2, 0.4, 0.8)},
    "batch norms move": Variant(batch_norm_still=False),
    "label smoothing .1": Variant(smoothing=0.1),
    "mixup .2": Variant(mixup=0.2),
    "TrivialAugment": Variant(trivial=True),
    "layer decay .8": Variant(decay=0.8),
    "layer decay .6": Variant(decay=0.6),
    "early group frozen": Variant(freeze_to=1),
    "AdamW 1e-4, decay .05": Variant(adamw=1e-4),
    "128 x 4, 224 x 3": Variant(sizes=((128, 4), (224, 3))),  # about the time of four epochs of 224
    "128 x 8, 224 x 2": Variant(sizes=((128, 8), (224, 2))),
}


class TrivialTransform(ImageTransform):
    """Zoom, crop and flip of the plain transform, with TrivialAugment's one random operation in between."""

    def pixels(self, image: Any, seed: tuple[int, ...]) -> torch.Tensor:
        """The view; its operation is drawn by torch's global generator, so runs with threads differ."""
        view: torch.Tensor = TrivialAugmentWide()(super().pixels(image, seed))
        return view


def main() -> None:
    """Run all, a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--model", default="tf_efficientnet_lite0")
    parser.add_argument("--views", type=int, default=4, help="stored views on which the head is solved")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--cycles", type=int, default=1)
    parser.add_argument("--cycle_len", type=int, default=4)
    parser.add_argument("--cycle_mult", type=int, default=1)
    options = parser.parse_args()
    shape = options.cycles, options.cycle_len, options.cycle_mult
    print(
        "| set | variant | epochs | averages | best accuracy | seconds of all cores |\n|---|---|---|---|---|---|",
        flush=True,
    )
    for name in options.sets:
        with tempfile.TemporaryDirectory() as output:
            batch = ("--per_device_train_batch_size", str(options.batch_size))
            trainer = solved_trainer(name, options.seed, options.model, options.data_dir, output, options.views, *batch)
            start = copy.deepcopy(trainer.model.state_dict())
            trainer.args.precompute_views = 0
            metrics = trainer.evaluate()
            print(
                f"| {name} | solved head | {metrics['eval_loss']:.4f} | | {metrics['eval_accuracy']:.3f} | |",
                flush=True,
            )
            for variant in options.variants:
                trainer.model.load_state_dict(start)
                print(f"| {name} | {variant} | {run(trainer, VARIANTS[variant], start, name, shape)} |", flush=True)


def run(trainer: Any, variant: Variant, start: dict[str, torch.Tensor], name: str, shape: tuple[int, int, int]) -> str:
    """One variant of the stage: losses of its epochs and its averages. `shape` is cycles, cycle_len and cycle_mult."""
    groups, rate = LayerGroups.from_model(trainer.model), RATE.get(name, 5e-3) * variant.rate
    if variant.decay is not None:
        heads = {id(parameter) for head in head_modules(trainer.model) for parameter in head.parameters()}
        body = [name for name, parameter in trainer.model.named_parameters() if id(parameter) not in heads]
        groups = LayerGroups.from_model(trainer.model, 1 + len(body_stages(trainer.model, body)))
    factor = variant.decay or 1 / variant.spread
    count = len(groups)
    trainer.layer_groups = groups
    trainer.layer_groups.freeze_batch_norm = variant.batch_norm_still
    trainer.freeze_to(variant.freeze_to)
    plain_transform, plain_loss, plain_args = trainer.train_transform, trainer.compute_loss, trainer.args
    trainer.args = copy.copy(plain_args)
    if variant.adamw is not None:
        trainer.args.optim, trainer.args.weight_decay, rate = "adamw_torch", 0.05, variant.adamw
    if variant.trivial:
        trainer.train_transform = TrivialTransform(**vars(plain_transform))
    if variant.smoothing or variant.mixup:
        trainer.compute_loss = SoftLoss(plain_loss, variant, trainer.model.config.num_labels)
    torch.manual_seed(0)
    rates, evaluations, seconds = [rate * factor ** (count - 1 - i) for i in range(count)], [], 0.0
    try:
        fits = [(size, (1, epochs, 1)) for size, epochs in variant.sizes] or [(0, shape)]
        for size, (cycles, cycle_len, cycle_mult) in fits:
            if size:
                spec = replace(plain_transform.spec, size=size, resize=size)
                trainer.train_transform = replace(plain_transform, spec=spec)
            begin = time.process_time()
            trainer.fit(rates, cycles, cycle_len=cycle_len, cycle_mult=cycle_mult)
            seconds += time.process_time() - begin
            epochs = total_epochs(cycle_len, cycle_mult, cycles)
            evaluations += [entry for entry in trainer.state.log_history if "eval_loss" in entry][-epochs:]
    finally:
        trainer.train_transform, trainer.compute_loss, trainer.args = plain_transform, plain_loss, plain_args
    losses_of_epochs = [entry["eval_loss"] for entry in evaluations]
    accuracy = max(entry["eval_accuracy"] for entry in evaluations)
    end = copy.deepcopy(trainer.model.state_dict())
    averages = []
    for share in (0.25, 0.5, 0.75):
        between = {
            key: torch.lerp(start[key], value, share) if value.is_floating_point() else value
            for key, value in end.items()
        }
        trainer.model.load_state_dict(between)
        metrics = trainer.evaluate()
        averages.append(metrics["eval_loss"])
        accuracy = max(accuracy, metrics["eval_accuracy"])
    shown = [", ".join(f"{loss:.4f}" for loss in losses) for losses in (losses_of_epochs, averages)]
    return f"{shown[0]} | {shown[1]} | {accuracy:.3f} | {seconds:.0f}"


class SoftLoss:
    """Cross-entropy with smoothed or mixed labels in training, the trainer's own in evaluation."""

    def __init__(self, plain: Any, variant: Variant, classes: int) -> None:
        self.plain, self.smoothing = plain, variant.smoothing
        self.mixup = (
            Mixup(mixup_alpha=variant.mixup, label_smoothing=0.0, num_classes=classes) if variant.mixup else None
        )

    def __call__(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The loss of a batch."""
        if not model.training:
            return self.plain(model, inputs, *args, **kwargs)
        pixels, labels = inputs["pixel_values"], inputs["labels"]
        if self.mixup is not None and len(pixels) % 2 == 0:  # timm's takes even batches
            pixels, labels = self.mixup(pixels, labels)
        return F.cross_entropy(model(pixel_values=pixels).logits, labels, label_smoothing=self.smoothing)


if __name__ == "__main__":
    main()
