"""Rows of predictions on the terminal and in CSV, JSON and JSONL files, each complete as soon as it is written."""

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

from tqdm.auto import tqdm
from transformers import PretrainedConfig

from hf_sgdr._utils.text import csv_cell, printable
from hf_sgdr.data.labels import class_names

Row = dict[str, Any]
Writer = Callable[[Row], object]
# A file name that is no UTF-8 is written with escapes, which are JSON's own.
ENCODING, ERRORS = "utf-8", "backslashreplace"


def distinct_names(config: PretrainedConfig) -> list[str]:
    """The classes in the model's order; the configuration then numbers those that shared a name, as "crane (2)"."""
    names = class_names(config)
    while len(set(names)) < len(names):  # again if a class is already called as another one is now
        count = Counter(names)
        names = [name if count[name] == 1 else f"{name} ({i})" for i, name in enumerate(names)]
    config.id2label = dict(enumerate(names))
    return names


def row_of(
    file: Path, answer: Sequence[Row], names: Sequence[str], top_k: int | None, threshold: float | None = None
) -> Row:
    """The row of an image: the answer's probabilities in the order of `names`, or of the best `top_k`, best first.

    With a threshold, of a model of several labels an image, the label is a list of those that reach it.
    """
    scores = {entry["label"]: entry["score"] for entry in answer}
    best = answer[0]["label"]
    kept = names if top_k is None else list(scores)[:top_k]
    return {
        "file": str(file),
        "label": best if threshold is None else [name for name, score in scores.items() if score >= threshold],
        "probability": scores[best],
        "probabilities": {name: scores[name] for name in kept},
    }


def check_outputs(paths: Sequence[Path]) -> None:
    """Raise a ValueError or FileNotFoundError for a file of another format or in no folder, before any work."""
    for path in paths:
        if path.suffix not in _WRITERS:
            raise ValueError(f"--output {path}: give a name that ends in {', '.join(_WRITERS)}.")
        if not path.parent.is_dir():
            raise FileNotFoundError(f"--output {path}: no folder {path.parent}. Make it first.")


@contextmanager
def row_writers(paths: Sequence[Path], names: Sequence[str], top_k: int | None) -> Iterator[list[Writer]]:
    """Functions that write a row, one a file, or one for the terminal where there are no files.

    Args:
        paths (sequence of `Path`): see [`check_outputs`].
        names, top_k: see [`row_of`].
    """
    with ExitStack() as files:
        writers = [
            _WRITERS[path.suffix](
                # line by line: a run that is stopped leaves what it has done
                files.enter_context(path.open("w", buffering=1, newline="", encoding=ENCODING, errors=ERRORS)),
                names,
                top_k,
            )
            for path in paths
        ]
        yield writers or [lambda row: tqdm.write(_line(row, top_k))]


def _csv_writer(file: TextIO, names: Sequence[str], top_k: int | None) -> Writer:
    """A column for each class, or with `top_k` two for each of the best."""
    table = csv.writer(file)
    if top_k is None:
        columns = [f"p({name})" for name in names]
    else:
        columns = [f"{kind}_{i}" for i in range(1, min(top_k, len(names)) + 1) for kind in ("label", "probability")]
    table.writerow(map(csv_cell, ["file", "label", "probability", *columns]))

    def write(row: Row) -> None:
        scores = row["probabilities"]
        cells = scores.values() if top_k is None else [cell for pair in scores.items() for cell in pair]
        cells = [row["file"], _shown(row["label"]), row["probability"], *cells]
        table.writerow([cell if isinstance(cell, float) else csv_cell(cell) for cell in cells])

    return write


def _jsonl_writer(file: TextIO, names: Sequence[str], top_k: int | None) -> Writer:
    """A JSON object a line."""
    return lambda row: file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _json_writer(file: TextIO, names: Sequence[str], top_k: int | None) -> Writer:
    """One JSON list, which is closed again with every row: it can be read at any time."""
    file.write("[]\n")
    end, separator = 1, "\n"

    def write(row: Row) -> None:
        nonlocal end, separator
        text = separator + json.dumps(row, ensure_ascii=False)
        file.seek(end)
        file.write(text + "\n]\n")
        end, separator = end + len(text.encode(ENCODING, ERRORS)), ",\n"

    return write


_WRITERS = {".csv": _csv_writer, ".json": _json_writer, ".jsonl": _jsonl_writer}


def _shown(label: str | list[str]) -> str:
    """A label, or several in one cell."""
    return label if isinstance(label, str) else "; ".join(label)


def _line(row: Row, top_k: int | None) -> str:
    if isinstance(row["label"], list):
        return "\t".join([printable(row["file"]), printable(_shown(row["label"]) or "none")])
    scores = row["probabilities"] if top_k is not None else {row["label"]: row["probability"]}
    return "\t".join([printable(row["file"]), *(f"{printable(name)}\t{score:.4f}" for name, score in scores.items())])
