"""How good a saved or pushed model is on a folder of photos: figures on the terminal, and a report if you want one.

    python recipes/evaluate.py --model out --data_dir dogscats --output report.html
    python recipes/evaluate.py --model user/name --data_dir photos --split all --tta 4 --output report.md figures.json

A folder is a class, by its name. Of a folder without train/ that the model was trained on, the photos that its training
held out are taken, by the split of the saved run; of any other, all. Photos that the model was trained on are counted
and said. A report shows photos with --photos only, as they may be private. What cannot be read is named on stderr and
left out; the exit status is then 1.
"""

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from datasets import Dataset
from torch.utils.data import Subset
from tqdm.auto import tqdm
from transformers.utils import cached_file

from hf_sgdr._utils.files import RUNS_FOLDER
from hf_sgdr._utils.metrics import class_metrics
from hf_sgdr._utils.text import few, printable
from hf_sgdr.cli.main import run_cli
from hf_sgdr.cli.parser import parse
from hf_sgdr.data.audit import UnreadableImagesError, readable
from hf_sgdr.data.folders import TEST_FOLDERS, class_folders, image_files
from hf_sgdr.data.hashes import image_hashes, read_image_hashes
from hf_sgdr.data.splits import LAYOUT, VALIDATION_NAMES, check_fraction, stratified_split
from hf_sgdr.hub.recipe_file import RECIPE_FILE
from hf_sgdr.inference.evaluation import Evaluation
from hf_sgdr.inference.interpretation import ClassifierInterpretation
from hf_sgdr.inference.pipeline import TTAImageClassificationPipeline, pipeline
from hf_sgdr.inference.report import FORMATS, write_report

FOLDERS = {"train": ("train",), "validation": VALIDATION_NAMES, "test": TEST_FOLDERS}
CLASSES_ON_TERMINAL = 40


@dataclass
class EvaluationArguments:
    """Which model, which photos, what to write."""

    model: str = field(metadata={"help": "Folder or model id of the Hub.", "aliases": ["--model_name_or_path"]})
    data_dir: str = field(metadata={"help": "Folder of photos, one folder a class."})
    split: Literal["train", "validation", "test", "all"] | None = field(
        default=None,
        metadata={
            "help": "Which photos; validation by default. A folder without train/ is split as in training, unless the "
            "model was trained on other photos: then all is the default."
        },
    )
    validation_fraction: float | None = field(
        default=None, metadata={"help": "Share of each class split off; that of the saved run by default, else 0.2."}
    )
    seed: int | None = field(default=None, metadata={"help": "Of that split; the saved run's by default, else 42."})
    tta: int = field(default=0, metadata={"help": "Augmented views of test-time augmentation."})
    batch_size: int | None = field(default=None, metadata={"help": "Photos a forward pass."})
    output: list[str] = field(default_factory=list, metadata={"help": "FILE.html, FILE.md, FILE.json, any of them."})
    photos: bool = field(default=False, metadata={"help": "Show photos in the report. They may be private."})


def main(argv: Sequence[str]) -> int:
    (options,) = parse([EvaluationArguments], argv, __doc__)
    check(options)
    root = Path(options.data_dir)
    folders, is_share = folders_of_split(root, options.split)
    folder = folders[0] if len(folders) == 1 else root  # what photos are called from
    # evaluation is in float32, whatever precision the weights are saved in
    classify = pipeline(options.model, tta=options.tta, batch_size=options.batch_size, dtype=torch.float32)
    config = classify.model.config
    names = [config.id2label[i] for i in range(config.num_labels)]
    rows, unreadable = images_of_classes(folders, names)
    seen = read_image_hashes(Path(options.model, RUNS_FOLDER))
    in_training = np.isin(image_hashes(rows["file"]), list(seen)) if seen is not None else None
    if is_share and options.split is None and in_training is not None and not in_training.any():
        is_share, options.split = False, "all"
    if is_share:
        fraction, seed = split_of_run(options)
        kept = as_in_training(rows, options.split or "validation", fraction, seed)
        rows, in_training = rows.select(kept), None if in_training is None else in_training[kept]
        if not len(rows):
            raise ValueError(f"{printable(folder)}: too few photos to split off any; --split all takes every one.")
        which = f"the {options.split or 'validation'} share of {root.resolve().name}"
        which += f" (validation is {fraction:g} of each class, seed {seed})"
    else:
        which = f"all of {root.resolve().name}" if options.split == "all" else f"{root.resolve().name}/{folder.name}"
    found = predictions(classify, rows, names)
    metrics = class_metrics(found.predicted, found.labels)
    evaluation = Evaluation(
        model=Path(options.model).resolve().name if Path(options.model).is_dir() else options.model,
        photos=which,
        folder=folder,
        tta=options.tta,
        found=found,
        metrics={"accuracy": metrics.pop("accuracy"), "loss": found.loss, **metrics},
        unreadable={_below(folder, file): reason for file, reason in unreadable.items()},
        in_training=None if in_training is None else int(in_training.sum()),
    )
    print_summary(evaluation)
    for path in map(Path, options.output):
        if path.suffix == ".json":
            path.write_text(evaluation.to_json(), encoding="utf-8")
        else:
            write_report(path, f"Evaluation of {evaluation.model}", evaluation.blocks(options.photos))
        print(f"Written: {printable(path)}")
    return 1 if unreadable else 0


def split_of_run(options: EvaluationArguments) -> tuple[float, int]:
    """Share and seed of the validation photos: as given, else as the saved run has them, else train.py's defaults."""
    run: dict[str, Any] = {}
    path = cached_file(
        options.model,
        RECIPE_FILE,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is not None:
        with suppress(yaml.YAMLError, UnicodeDecodeError):  # a person may have edited it
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
            run = content if isinstance(content, dict) else {}
    fraction, seed = options.validation_fraction, options.seed
    fraction = float(run.get("validation_fraction", 0.2)) if fraction is None else fraction
    seed = int(run.get("seed", 42)) if seed is None else seed
    check_fraction(fraction)
    return fraction, seed


def as_in_training(rows: Dataset, split: str, fraction: float, seed: int) -> list[int]:
    """The positions of the photos that training takes for a split of a folder without one."""
    numbered = rows.add_column("position", range(len(rows)))
    train, validation = stratified_split(numbered, fraction, seed)
    return list((train if split == "train" else validation)["position"])


def folders_of_split(root: Path, split: str | None) -> tuple[list[Path], bool]:
    """The folders that hold the split's class folders, and whether the split is a share of them, as in training.

    Raises:
        FileNotFoundError, ValueError: if there is none.
    """
    if not root.is_dir():
        raise FileNotFoundError(
            f"{printable(root)}: {'a file, not a' if root.exists() else 'no such'} folder. {LAYOUT}"
        )
    present = {
        kind: root / name for kind, names in FOLDERS.items() for name in reversed(names) if (root / name).is_dir()
    }
    if present and split is None:
        split = "validation"
    if split in present:
        return [present[split]], False
    if present and split == "all":
        return list(present.values()), False
    if present:
        divided = " and ".join(present)
        raise ValueError(f"{printable(root)} is divided into --split {divided}; it has no {split}.")
    if split == "test":
        raise ValueError(f"{printable(root)} has no folder test; --split all takes every photo.")
    return [root], split != "all"


def images_of_classes(folders: Sequence[Path], names: Sequence[str]) -> tuple[Dataset, dict[str, str]]:
    """The photos below class folders, and the reason for each that cannot be read.

    Raises:
        ValueError: if the model does not know a class, or no photo can be read.
    """
    classes = sorted(entry for folder in folders for entry in class_folders(folder))
    place = " and ".join(map(printable, folders))
    rows = [(str(file), one.name) for one in classes for file in image_files(one)]
    unknown = sorted({name for _, name in rows} - set(names))
    if unknown:
        raise ValueError(
            f"{place}: {few(unknown)} not among the model's classes, which are {few(names)}. "
            "Rename the folder as the model calls it, or take it out."
        )
    files = [file for file, _ in rows]
    unreadable: dict[str, str] = {}
    try:
        readable(files, files, "raise")
    except UnreadableImagesError as error:
        unreadable = error.reasons
    for file, reason in unreadable.items():
        print(f"{printable(file)}: left out, it cannot be read as a picture ({reason}).", file=sys.stderr)
    rows = [(file, name) for file, name in rows if file not in unreadable]
    if not rows:
        raise ValueError(f"{place}: no photo in class folders that can be read. {LAYOUT}")
    kinds = sorted({name for _, name in rows})
    columns = {
        "file": [file for file, _ in rows],
        "class": [name for _, name in rows],
        "label": [kinds.index(name) for _, name in rows],  # as training counts, which the share split off depends on
    }
    return Dataset.from_dict(columns), unreadable


def predictions(
    classify: TTAImageClassificationPipeline, rows: Dataset, names: Sequence[str]
) -> ClassifierInterpretation:
    """What the model makes of the photos."""
    files = list(rows["file"])
    answers = classify(Subset(files, range(len(files))), top_k=len(names), function_to_apply="softmax")
    probabilities = np.zeros((len(files), len(names)))
    for row, answer in enumerate(tqdm(answers, desc="Evaluating", unit="photo", total=len(files))):
        scores = {one["label"]: one["score"] for one in answer}
        probabilities[row] = [scores[name] for name in names]
    ids = {name: i for i, name in enumerate(names)}
    return ClassifierInterpretation(probabilities, [ids[name] for name in rows["class"]], names, files)


def print_summary(evaluation: Evaluation) -> None:
    found = evaluation.found
    print(f"\n{printable(evaluation.model)} on {len(found.labels)} photos: {printable(evaluation.photos)}")
    print(evaluation.seen_before())
    for name, value in evaluation.metrics.items():
        print(f"{name:<10}{value:8.4f}")
    reports = [report for report in found.per_class() if report.photos or report.precision is not None]
    if len(reports) <= CLASSES_ON_TERMINAL:
        width = max(5, *(len(printable(report.name)) for report in reports))
        print(f"\n{'class':<{width}}{'photos':>8}{'precision':>11}{'recall':>9}{'f1':>9}")
        for report in reports:
            figures = [f"{'–' if x is None else f'{x:.4f}':>9}" for x in (report.precision, report.recall, report.f1)]
            print(f"{printable(report.name):<{width}}{report.photos:>8}  {''.join(figures)}")
    mistakes = found.most_confused()
    if mistakes:
        print("\nmost confused: " + "; ".join(f"{printable(t)} as {printable(p)}: {n}" for t, p, n in mistakes[:5]))


def check(options: EvaluationArguments) -> None:
    """Raise a ValueError or FileNotFoundError for what would stop the recipe after the work is done."""
    if not Path(options.model).is_dir() and "/" not in options.model:
        raise FileNotFoundError(f"--model {options.model}: no such folder, and no model id of the Hub (user/name).")
    if options.validation_fraction is not None:
        check_fraction(options.validation_fraction)
    for path in map(Path, options.output):
        if path.suffix not in (*FORMATS, ".json"):
            raise ValueError(f"--output {path}: give names that end in {', '.join(FORMATS)} or .json.")
        if not path.absolute().parent.is_dir():
            raise FileNotFoundError(f"--output {path}: there is no folder {path.parent}.")
    if options.photos and not any(path.endswith(FORMATS) for path in options.output):
        raise ValueError("--photos shows photos in a report: give --output report.html or report.md, too.")


def _below(folder: Path, file: str) -> str:
    return Path(file).relative_to(folder).as_posix()


if __name__ == "__main__":
    sys.exit(run_cli(main))
