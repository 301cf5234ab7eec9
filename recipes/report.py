"""How good a saved or pushed model is on a folder of images: metrics on the terminal, and a report if you want one.

    hf-sgdr report --model out --data_dir dogscats --output report.html
    hf-sgdr report --model out --labels_file labels.csv --label_delimiter ";" --output report.html
    hf-sgdr report --model user/name --data_dir photos --split all --tta 4 --output report.md metrics.json

A folder is a class, by its name. Of a folder without train/ that the model was trained on, the images that its training
held out are taken, by the split of the saved run; of any other, all. Images that the model was trained on are counted
and said. A report shows images with --photos only, as they may be private. What cannot be read is named on stderr and
left out; the exit code is then 1.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers.hf_argparser import HfArg

from hf_sgdr._utils.files import RUNS_FOLDER
from hf_sgdr._utils.text import printable
from hf_sgdr.cli.labelled import files_of_folder, files_of_splits, is_read_as_table
from hf_sgdr.cli.main import run_cli
from hf_sgdr.cli.parser import parse
from hf_sgdr.cli.quiet import hide_bars
from hf_sgdr.cli.rows import distinct_names
from hf_sgdr.cli.summary import print_evaluation
from hf_sgdr.data.folders import load_image_folder
from hf_sgdr.data.hashes import content_hashes, read_image_hashes
from hf_sgdr.data.labels import MULTI_LABEL
from hf_sgdr.data.splits import check_fraction
from hf_sgdr.data.tables import load_image_table
from hf_sgdr.hub.recipe_file import read_recipe
from hf_sgdr.inference.evaluation import Evaluation, evaluate_files
from hf_sgdr.inference.pipeline import pipeline
from hf_sgdr.inference.report import FORMATS, write_report

TABLE_ARGUMENTS = ("image_column_name", "label_column_name", "label_delimiter", "split_column_name")


@dataclass
class ReportArguments:
    """Which model, which images, what to write."""

    model: str = HfArg(help="Folder or model id of the Hub.", aliases=["--model_name_or_path"])
    data_dir: str | None = HfArg(default=None, help="Folder of images, one folder a class.")
    labels_file: str | None = HfArg(
        default=None, help="Table of files and labels instead, below --data_dir if that is given."
    )
    image_column_name: str | None = HfArg(default=None, help="Of the table; file_name or image.")
    label_column_name: str = HfArg(default="label", help="Of the table.")
    label_delimiter: str | None = HfArg(default=None, help="What parts several labels in its cells.")
    split_column_name: str | None = HfArg(default=None, help="Of the table: train, validation or test.")
    label_pattern: str | None = HfArg(
        default=None, help="Regular expression whose first group in a file's name is its class, instead of folders."
    )
    split: Literal["train", "validation", "test", "all"] | None = HfArg(
        default=None,
        help="Which images; validation by default. A folder without train/ is split as in training, unless the model "
        "was trained on other images: then all is the default.",
    )
    validation_fraction: float | None = HfArg(
        default=None, help="Share of each class split off; that of the saved run by default, else 0.2."
    )
    seed: int | None = HfArg(default=None, help="Of that split; the saved run's by default, else 42.")
    tta: int = HfArg(default=0, help="Augmented views of test-time augmentation.")
    batch_size: int | None = HfArg(default=None, help="Images a forward pass.")
    output: list[str] = HfArg(default_factory=list, help="FILE.html, FILE.md, FILE.json, any of them.")  # noqa: RUF009
    photos: bool = HfArg(default=False, help="Show images in the report. They may be private.")

    def __post_init__(self) -> None:  # what would stop the recipe after the work is done
        if not Path(self.model).is_dir() and "/" not in self.model:
            raise FileNotFoundError(f"--model {self.model}: no such folder, and no model id of the Hub (user/name).")
        if self.data_dir is None and self.labels_file is None:
            raise ValueError("Which images? Give --data_dir FOLDER or --labels_file TABLE.")
        if self.validation_fraction is not None:
            check_fraction(self.validation_fraction)
        for path in map(Path, self.output):
            if path.suffix not in (*FORMATS, ".json"):
                raise ValueError(f"--output {path}: give names that end in {', '.join(FORMATS)} or .json.")
            if not path.absolute().parent.is_dir():
                raise FileNotFoundError(f"--output {path}: there is no folder {path.parent}.")
        if self.label_pattern is not None and self.labels_file is not None:
            raise ValueError("--label_pattern and --labels_file: labels come from one of the two.")
        if self.photos and not any(path.endswith(FORMATS) for path in self.output):
            raise ValueError("--photos shows images in a report: give --output report.html or report.md, too.")

    @property
    def reads_table(self) -> bool:
        """Whether labels come from a table, given or in the folder."""
        return self.labels_file is not None or is_read_as_table(Path(str(self.data_dir)))

    def check_labels(self, is_multi_label: bool) -> None:
        """What is known before a table is read: whether images have as many labels as the model is made for."""
        model = f"the model {self.model} is made for {'several' if is_multi_label else 'one'}"
        if not is_multi_label and self.label_delimiter is not None:
            raise ValueError(
                f"--label_delimiter {self.label_delimiter!r} gives an image several labels, and {model}: leave it out."
            )
        if is_multi_label and not self.reads_table:
            raise ValueError(
                f"--data_dir {self.data_dir}: class folders give an image one label, and {model}: give --labels_file "
                "TABLE and --label_delimiter."
            )
        if is_multi_label and self.label_delimiter is None and str(self.labels_file).lower().endswith((".csv", ".tsv")):
            raise ValueError(
                f"--labels_file {self.labels_file}: a cell is one label, and {model}: give --label_delimiter, too."
            )


def main(argv: Sequence[str]) -> int:
    hide_bars()
    (args,) = parse([ReportArguments], argv, __doc__)
    # evaluation is in float32, whatever precision the weights are saved in
    pipe = pipeline(args.model, tta=args.tta, batch_size=args.batch_size, dtype=torch.float32)
    args.check_labels(pipe.model.config.problem_type == MULTI_LABEL)
    recipe = {"validation_fraction": 0.2, "seed": 42} | read_recipe(args.model)
    fraction = float(recipe["validation_fraction"] if args.validation_fraction is None else args.validation_fraction)
    seed = int(recipe["seed"] if args.seed is None else args.seed)
    seen = read_image_hashes(Path(args.model, RUNS_FOLDER))
    names = distinct_names(pipe.model.config)
    # left out before the split, if training did so: else the other images would be divided otherwise
    on_error = "skip" if recipe.get("on_error") == "skip" else None
    share: dict[str, Any] = {"validation_fraction": fraction, "seed": seed, "on_error": on_error}
    if args.labels_file is not None:
        columns = {name: getattr(args, name) for name in TABLE_ARGUMENTS}
        splits = load_image_table(args.labels_file, image_dir=args.data_dir, **columns, **share)
        folder = Path(args.data_dir or Path(args.labels_file).parent).absolute()
        unseen = None if args.split_column_name is not None else seen
        chosen = files_of_splits(splits, Path(args.labels_file), folder, names, args.split, unseen)
    elif args.label_pattern is not None or args.reads_table:
        columns = {name: getattr(args, name) for name in ("label_pattern", "label_column_name", "label_delimiter")}
        splits, folder = load_image_folder(args.data_dir, **columns, **share), Path(args.data_dir).absolute()
        unseen = None if (folder / "train").is_dir() else seen
        chosen = files_of_splits(splits, folder, folder, names, args.split, unseen)
    else:
        chosen = files_of_folder(args.data_dir, names, args.split, fraction, seed, seen)
    for file, reason in chosen.unreadable.items():
        print(f"{printable(file)}: left out, it cannot be read as a picture ({reason}).", file=sys.stderr)
    in_training = None if seen is None else np.isin(content_hashes(chosen.files), list(seen))
    evaluation = Evaluation(
        model=Path(args.model).resolve().name if Path(args.model).is_dir() else args.model,
        images=chosen.title,
        folder=chosen.folder,
        tta=args.tta,
        result=evaluate_files(pipe, chosen.files, chosen.classes),
        unreadable={os.path.relpath(file, chosen.folder): reason for file, reason in chosen.unreadable.items()},
        in_training=None if in_training is None else int(in_training.sum()),
    )
    print_evaluation(evaluation)
    for path in map(Path, args.output):
        if path.suffix == ".json":
            path.write_text(evaluation.to_json(), encoding="utf-8")
        else:
            write_report(path, evaluation, with_images=args.photos)
        print(f"Written: {printable(path)}")
    return 1 if chosen.unreadable else 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
