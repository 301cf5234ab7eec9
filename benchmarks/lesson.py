"""The lesson's steps 3, 4 and 8 by hf_sgdr and by fastai: the same images, network, weights, rates, batches and epochs.

    pip install -e ".[bench]"
    python benchmarks/lesson.py --data_dir dogscats [--repetitions 1] [--write]

Each system runs in a process of its own, started as its users do it, hf_sgdr through `accelerate launch`, with its own
defaults for workers, precision and memory layout. Range tests
and TTA are left out on both sides. Step 3 is two epochs of the head on plain images (hf_sgdr: on precomputed features,
from an empty cache), step 4 three augmented epochs of the head with a restart each, step 8 all layers, cycles of 1, 2
and 4 epochs. The batch norms of the last step are still in hf_sgdr and train in fastai, as in each one's recipe.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from timing import write_section

HEAD_LR, RATES, BATCH, SIZE = 1e-1, [1e-4, 1e-3, 1e-2], 64, 224
STEPS = {"step 3, head, 2 epochs": 2, "step 4, head, augmented, 3 epochs": 3, "step 8, all layers, 7 epochs": 7}
Figures = dict[str, dict[str, float]]


def main() -> None:
    """Run both, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="with train/ and valid/")
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="put the table into benchmarks/RESULTS.md")
    parser.add_argument("--system", choices=list(SYSTEMS), help="run one, print its figures as JSON")
    options = parser.parse_args()
    if options.system is not None:
        print(json.dumps(SYSTEMS[options.system](options.data_dir)))
        return
    runs: dict[str, list[Figures]] = {system: [] for system in SYSTEMS}
    for _ in range(options.repetitions):
        for system in SYSTEMS:
            command = [*STARTED_BY[system], __file__, "--data_dir", str(options.data_dir), "--system", system]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            runs[system].append(json.loads(output.splitlines()[-1]))
    lines = table(runs)
    print("\n".join(lines))
    if options.write:
        write_section("The lesson against fastai", lines, f"medians of {options.repetitions}, the two in turn")


def table(runs: dict[str, list[Figures]]) -> list[str]:
    """Medians of each step, and of all together."""

    def median(system: str, step: str, figure: str) -> float:
        return statistics.median(run[step][figure] for run in runs[system])

    lines = [
        "| step | hf_sgdr, s | fastai, s | fastai / hf_sgdr | hf_sgdr, loss | fastai, loss |",
        "|---|---|---|---|---|---|",
    ]
    totals = dict.fromkeys(runs, 0.0)
    for step in STEPS:
        ours, theirs = median("hf_sgdr", step, "seconds"), median("fastai", step, "seconds")
        totals["hf_sgdr"] += ours
        totals["fastai"] += theirs
        losses = " | ".join(f"{median(system, step, 'loss'):.4f}" for system in ("hf_sgdr", "fastai"))
        lines.append(f"| {step} | {ours:.1f} | {theirs:.1f} | {theirs / ours:.2f} | {losses} |")
    ours, theirs = totals["hf_sgdr"], totals["fastai"]
    return [*lines, f"| all | {ours:.1f} | {theirs:.1f} | {theirs / ours:.2f} | | |"]


def with_hf_sgdr(data_dir: Path) -> Figures:
    """Ours, from an empty feature cache."""
    from transformers import set_seed

    from hf_sgdr import SGDRTrainer, SGDRTrainingArguments, create_image_classifier, image_transforms, load_image_folder
    from hf_sgdr.demo import DEMO_MODEL, demo_weights_file

    with tempfile.TemporaryDirectory() as place:
        os.environ["HF_SGDR_CACHE"] = str(Path(place, "cache"))
        set_seed(42)
        images = load_image_folder(data_dir)
        labels = images["train"].features["label"].names
        model = create_image_classifier(DEMO_MODEL, labels=labels, weights_file=demo_weights_file())
        train, evaluation = image_transforms(model, image_size=SIZE, augment="side_on", max_zoom=1.1)
        trainer = SGDRTrainer(
            model,
            SGDRTrainingArguments(place, save_strategy="no", disable_tqdm=True),  # batches of BATCH are its default
            train_dataset=images["train"],
            eval_dataset=images["validation"],
            train_transform=train,
            eval_transform=evaluation,
        )

        def step_3() -> None:
            trainer.precompute = True
            trainer.fit(HEAD_LR, 2)
            trainer.precompute = False

        def step_8() -> None:
            trainer.unfreeze()
            trainer.layer_groups.freeze_batch_norm = True
            trainer.fit(RATES, 3, cycle_len=1, cycle_mult=2)

        def loss() -> float:
            return next(log["eval_loss"] for log in reversed(trainer.state.log_history) if "eval_loss" in log)

        return _measured([step_3, lambda: trainer.fit(HEAD_LR, 3, cycle_len=1), step_8], loss)


def with_fastai(data_dir: Path) -> Figures:
    """Fastai's equivalents, with its own transforms and data loaders."""
    import torch
    from fastai.callback.progress import ProgressCallback  # noqa: F401  (it patches Learner)
    from fastai.callback.schedule import fit_sgdr  # noqa: F401  (it patches Learner)
    from fastai.data.transforms import Normalize
    from fastai.learner import Learner
    from fastai.losses import CrossEntropyLossFlat
    from fastai.metrics import accuracy
    from fastai.optimizer import SGD
    from fastai.torch_core import set_seed
    from fastai.vision.augment import Resize, aug_transforms
    from fastai.vision.data import ImageDataLoaders

    from hf_sgdr import LayerGroups, create_image_classifier
    from hf_sgdr.demo import DEMO_MODEL, demo_weights_file

    set_seed(42)
    labels = sorted(folder.name for folder in (data_dir / "train").iterdir())
    network = create_image_classifier(DEMO_MODEL, labels=labels, weights_file=demo_weights_file()).timm_model
    groups = LayerGroups.from_model(network)
    normalize = Normalize.from_stats([0.5] * 3, [0.5] * 3, cuda=torch.cuda.is_available())

    def loaders(augment: bool) -> Any:
        transforms = (
            aug_transforms(size=SIZE, max_zoom=1.1, max_lighting=0.05, max_warp=0.0, max_rotate=10.0) if augment else []
        )
        return ImageDataLoaders.from_folder(
            data_dir, train="train", valid="valid", bs=BATCH, batch_tfms=[*transforms, normalize],
            item_tfms=Resize(256 if augment else SIZE),
        )  # fmt: skip

    learner = Learner(
        loaders(augment=False), network, loss_func=CrossEntropyLossFlat(), opt_func=SGD, metrics=accuracy,
        splitter=lambda _: [groups.parameters(i) for i in range(len(groups))],
    )  # fmt: skip
    learner.freeze()

    def step_4() -> None:
        learner.dls = loaders(augment=True)
        for _ in range(3):  # fit_sgdr(3, 1, cycle_mult=1) divides by zero in fastai 2.8
            learner.fit_sgdr(1, 1, lr_max=HEAD_LR)

    def step_8() -> None:
        learner.unfreeze()
        learner.fit_sgdr(3, 1, lr_max=RATES, cycle_mult=2)

    with learner.no_bar():
        steps: list[Callable[[], Any]] = [lambda: learner.fit(2, HEAD_LR), step_4, step_8]
        return _measured(steps, lambda: float(learner.recorder.values[-1][1]))


def _measured(steps: list[Callable[[], Any]], loss: Callable[[], float]) -> Figures:
    figures: Figures = {}
    for name, step in zip(STEPS, steps, strict=True):
        start = time.perf_counter()
        step()
        figures[name] = {"seconds": time.perf_counter() - start, "loss": loss()}
        print(name, figures[name], file=sys.stderr, flush=True)
    return figures


SYSTEMS: dict[str, Callable[[Path], Figures]] = {"hf_sgdr": with_hf_sgdr, "fastai": with_fastai}
# Each as its users start it.
STARTED_BY = {"hf_sgdr": [sys.executable, "-m", "accelerate.commands.launch"], "fastai": [sys.executable]}

if __name__ == "__main__":
    main()
