"""Labels and probabilities for photos, by a model that a recipe saved or anyone pushed.

    python recipes/predict.py --model out photos/ cat.jpg --output predictions.csv predictions.json
    python recipes/predict.py --model user/name photos/ --tta 4 --top_k 3 --output predictions.jsonl

Rows are written as they come, so a run that is stopped leaves those it has done. What cannot be read is named on stderr
and left out; the exit status is then 1.
"""

import argparse
import csv
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from tqdm.auto import tqdm
from transformers.pipelines.pt_utils import KeyDataset

from hf_sgdr._utils.text import csv_cell, printable
from hf_sgdr.cli.errors import OneLineParser, run_cli
from hf_sgdr.data.folders import image_files
from hf_sgdr.data.images import UnreadableImageError
from hf_sgdr.inference.pipeline import TTAImageClassificationPipeline, pipeline
from hf_sgdr.optim.schedule import require_whole

Row = dict[str, Any]
# A file name that is no UTF-8 is written with escapes, which are JSON's own.
ENCODING, ERRORS = "utf-8", "backslashreplace"


def main(argv: Sequence[str]) -> int:
    options = _parser().parse_args(argv)
    if options.top_k is not None:
        require_whole("--top_k", options.top_k, at_least=1)
    for path in options.output:
        _check_output(path)
    files = list(_files(options.photos))
    device = int(options.device) if options.device.lstrip("-").isdigit() else options.device or None
    pipe = pipeline(options.model, tta=options.tta, device=device, batch_size=options.batch_size)
    names = distinct_names(pipe)
    unreadable = 0
    with ExitStack() as outputs:
        writers = [
            WRITERS[path.suffix](outputs.enter_context(_opened(path)), names, options.top_k) for path in options.output
        ]
        try:
            for file, answer in predict(pipe, files):
                if isinstance(answer, UnreadableImageError):
                    unreadable += 1
                    tqdm.write(printable(answer), file=sys.stderr)
                    continue
                row = row_of(file, answer, names, options.top_k)
                for write in writers:
                    write(row)
                if not writers:
                    tqdm.write(_line(row, options.top_k))
        except KeyboardInterrupt:
            print("predict.py: interrupted; the rows so far are written.", file=sys.stderr)
            return 130
    return 1 if unreadable else 0


def predict(pipe: TTAImageClassificationPipeline, files: Sequence[Path]) -> Iterator[tuple[Path, Any]]:
    """Each file with its answer, all classes in it, or with the error of one that cannot be read."""
    # as a data set, which is answered while it is read; a list is answered at its end
    photos = KeyDataset([{"file": file} for file in files], "file")
    answers = pipe(photos, top_k=pipe.model.config.num_labels, return_exceptions=True)
    with tqdm(total=len(files), desc="Predicting", unit="photo") as bar:
        for file, answer in zip(files, answers, strict=True):
            yield file, answer
            bar.update()


def distinct_names(pipe: TTAImageClassificationPipeline) -> list[str]:
    """The classes in the order of the model's configuration; those that share a name get their number with it."""
    config = pipe.model.config
    names = [str(config.id2label[i]) for i in range(config.num_labels)]
    while len(set(names)) < len(names):  # again if a class is already called as another one is now
        count = Counter(names)
        names = [name if count[name] == 1 else f"{name} ({i})" for i, name in enumerate(names)]
    config.id2label = dict(enumerate(names))
    return names


def row_of(file: Path, answer: list[Row], names: Sequence[str], top_k: int | None) -> Row:
    """What is known of a photo: the probabilities of all classes in the model's order, or of the best, best first."""
    by_name = {one["label"]: one["score"] for one in answer}
    kept = names if top_k is None else list(by_name)[:top_k]
    best = answer[0]
    return {
        "file": str(file),
        "label": best["label"],
        "probability": best["score"],
        "probabilities": {name: by_name[name] for name in kept},
    }


# ---- Where rows go: each is there as soon as it is written ----


def csv_writer(file: TextIO, names: Sequence[str], top_k: int | None) -> Callable[[Row], None]:
    """A column for each class, or with `top_k` two for each of the best."""
    table = csv.writer(file)
    if top_k is None:
        columns = [f"p({name})" for name in names]
    else:
        columns = [f"{what}_{i}" for i in range(1, min(top_k, len(names)) + 1) for what in ("label", "probability")]
    table.writerow(map(csv_cell, ["file", "label", "probability", *columns]))
    file.flush()

    def write(row: Row) -> None:
        found = row["probabilities"]
        cells = found.values() if top_k is None else [cell for pair in found.items() for cell in pair]
        cells = [cell if isinstance(cell, float) else csv_cell(cell) for cell in cells]
        table.writerow([csv_cell(row["file"]), csv_cell(row["label"]), row["probability"], *cells])
        file.flush()

    return write


def jsonl_writer(file: TextIO, names: Sequence[str], top_k: int | None) -> Callable[[Row], None]:
    """A JSON object a line."""

    def write(row: Row) -> None:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()

    return write


def json_writer(file: TextIO, names: Sequence[str], top_k: int | None) -> Callable[[Row], None]:
    """One JSON list, which is closed again with every row: it can be read at any time."""
    file.write("[]\n")
    file.flush()
    end, separator = 1, "\n"

    def write(row: Row) -> None:
        nonlocal end, separator
        text = separator + json.dumps(row, ensure_ascii=False)
        file.seek(end)
        file.write(text + "\n]\n")
        file.flush()
        end, separator = end + len(text.encode(ENCODING, ERRORS)), ",\n"

    return write


WRITERS = {".csv": csv_writer, ".json": json_writer, ".jsonl": jsonl_writer}


def _line(row: Row, top_k: int | None) -> str:
    shown = row["probabilities"] if top_k is not None else {row["label"]: row["probability"]}
    return "\t".join([printable(row["file"]), *(f"{printable(name)}\t{p:.4f}" for name, p in shown.items())])


def _opened(path: Path) -> TextIO:
    return path.open("w", newline="", encoding=ENCODING, errors=ERRORS)


def _check_output(path: Path) -> None:
    if path.suffix not in WRITERS:
        raise ValueError(f"--output {path}: give a name that ends in {', '.join(WRITERS)}.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--output {path}: no folder {path.parent}. Make it first.")


def _files(words: Sequence[str]) -> Iterator[Path]:
    for word in words:
        path = Path(word)
        if path.is_dir():
            found = list(image_files(path))
            if not found:
                raise ValueError(f"{path}: no picture in this folder.")
            yield from found
        elif path.exists():
            yield path
        else:
            raise FileNotFoundError(f"{path}: no such file or folder.")


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="+", help="picture files, and folders that are searched for them")
    parser.add_argument("--model", "--model_name_or_path", required=True, help="folder or model id of the Hub")
    parser.add_argument(
        "--output", nargs="+", default=[], type=Path, metavar="FILE", help="names that end in .csv, .json or .jsonl"
    )
    parser.add_argument("--tta", type=int, default=0, help="augmented views averaged with the plain photo; 0 for none")
    parser.add_argument("--top_k", type=int, help="only the best so many classes; by default all, in the model's order")
    parser.add_argument("--batch_size", type=int, help="photos a forward pass; 32 on the CPU, 64 elsewhere")
    parser.add_argument("--device", default="", help='such as "cpu", "cuda:0" or 0; the first accelerator, or the CPU')
    return parser


if __name__ == "__main__":
    sys.exit(run_cli(main))
