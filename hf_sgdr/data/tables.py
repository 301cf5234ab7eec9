"""Tables of images and labels: CSV, TSV, JSON Lines and Parquet, read by `datasets`, as one `DatasetDict`."""

import csv
import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features, Image, Value
from transformers.utils import logging

from hf_sgdr._utils.text import few, printable
from hf_sgdr.data.audit import OnError, check_on_error, readable
from hf_sgdr.data.labels import as_labels, column_values, encode_labels
from hf_sgdr.data.splits import SPLIT_NAMES, check_fraction, split_off

logger = logging.get_logger(__name__)

# What may follow the name of a table's file, and what parts its columns, if it is text.
ENDINGS: dict[str, str | None] = {".csv": ",", ".tsv": "\t", ".jsonl": None, ".parquet": None}
IMAGE_COLUMNS = ("file_name", "image")
# Of the ecosystem's imagefolder, in the folder of its images.
METADATA = tuple(f"metadata{ending}" for ending in (".csv", ".jsonl", ".parquet"))


def load_image_table(
    path: str | os.PathLike[str],
    *,
    image_column_name: str | None = None,
    label_column_name: str = "label",
    label_delimiter: str | None = None,
    image_dir: str | os.PathLike[str] | None = None,
    split_column_name: str | None = None,
    validation_fraction: float = 0.2,
    seed: int = 42,
    on_error: OnError = "raise",
) -> DatasetDict:
    """Read a table with an image's file and its label, or its labels, in each row.

    All cells of CSV and TSV are text, so `01` stays a name. Class ids come from the training rows alone, in the order
    of the sorted names. With `label_delimiter`, or lists in the label column, an image has several labels, or none.

    Args:
        path (`str` or `PathLike`): a `.csv`, `.tsv`, `.jsonl` or `.parquet` file.
        image_column_name (`str`, *optional*): the column of files; by default `file_name`, else `image`.
        label_column_name (`str`, *optional*, defaults to "label"): the column of labels.
        label_delimiter (`str`, *optional*): what parts the labels of an image, such as `" "` or `";"`.
        image_dir (`str` or `PathLike`, *optional*): what paths are relative to; by default the table's own folder.
        split_column_name (`str`, *optional*): a column that says train, validation (or valid, val) or test; in test
            the label may be empty.
        validation_fraction (`float`, *optional*, defaults to 0.2): share of each class for validation, where the table
            names none; between 0 and 1.
        seed (`int`, *optional*, defaults to 42): for that split.
        on_error (`"raise"`, `"skip"` or None, *optional*, defaults to `"raise"`): as in [`load_image_folder`]; "skip"
            also leaves out rows whose file is missing.

    Returns:
        `DatasetDict`: each split with the columns `image` (`datasets.Image`) and `label` (`datasets.ClassLabel`, or a
        `datasets.List` of it).

    Raises:
        FileNotFoundError: if there is no such table or folder.
        UnreadableImagesError: a `ValueError`, if images cannot be read; see `on_error`.
        ValueError: if the table is empty or of another kind, a column is not there, an image is listed twice, has no
            file or no label, the delimiter never occurs, there is one class only, or validation has a label that train
            lacks.
    """
    check_on_error(on_error)
    check_fraction(validation_fraction)
    table = read_table(Path(path))
    folder = Path(image_dir) if image_dir is not None else Path(path).parent
    if not folder.is_dir():
        raise FileNotFoundError(f"image_dir={printable(folder)}: no such folder.")
    rows = table_rows(table, printable(path), folder, image_column_name, label_column_name, label_delimiter)
    parts = {"train": rows}
    if split_column_name is not None:
        parts = _by_split(rows, _column(table, split_column_name, printable(path)), printable(path))
    return labelled_splits(parts, printable(path), validation_fraction, seed, on_error)


def read_table(path: Path) -> Dataset:
    """The rows of a table, all columns.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is of another kind, damaged or empty.
    """
    where = printable(path)
    if not path.is_file():
        raise FileNotFoundError(f"{where}: {'is a folder, not a table' if path.is_dir() else 'no such file'}.")
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(f"{where}: give a table whose name ends in {', '.join(ENDINGS)}.")
    with tempfile.TemporaryDirectory() as cache:
        try:
            table = _read(path, {"cache_dir": cache, "keep_in_memory": True})
        except Exception as error:  # whatever pandas and pyarrow raise, and datasets around it
            reason = " ".join(str(error.__cause__ or error).split())
            raise ValueError(f"{where} cannot be read as a table ({reason or type(error).__name__}).") from error
    if table is None or len(table) == 0:
        raise ValueError(f"{where} has no rows: a table needs a line for each image.")
    return table


def _read(path: Path, options: dict[str, Any]) -> Any:
    """The table, None where the file is empty, which readers take for damaged."""
    if path.stat().st_size == 0:
        return None
    separator = ENDINGS[path.suffix.lower()]
    if separator is None:
        read = Dataset.from_json if path.suffix.lower() == ".jsonl" else Dataset.from_parquet
        return read(str(path), **options)
    with path.open(newline="", encoding="utf-8-sig") as file:
        lines = csv.reader(file, delimiter=separator)
        columns, first = next(lines, []), next(lines, None)
    columns = [name or f"Unnamed: {number}" for number, name in enumerate(columns)]  # pandas' words for its own index
    text = Features({name: Value("string") for name in columns})
    options |= {"features": text, "sep": separator, "encoding": "utf-8-sig", "keep_default_na": False}
    options |= {"index_col": False}
    return None if first is None else Dataset.from_csv(str(path), **options)


def table_rows(
    table: Dataset,
    where: str,
    folder: Path,
    image_column: str | None = None,
    label_column: str = "label",
    delimiter: str | None = None,
) -> list[tuple[str, Any]]:
    """Each row's file, with its folder, and its label: a string, a list of them, or None.

    Raises:
        ValueError: if a column is not there or of no use, the delimiter never occurs, or a file is listed twice.
    """
    image_column = image_column or next((name for name in IMAGE_COLUMNS if name in table.column_names), "file_name")
    names, labels = _column(table, image_column, where), _column(table, label_column, where)
    if not all(isinstance(name, str) for name in names):
        kind = table.features[image_column]
        hint = "load_image_dataset reads images inside of tables" if isinstance(kind, Image | dict) else "or is empty"
        raise ValueError(f"{where}: column {image_column!r} must hold names of files; it holds {kind} ({hint}).")
    without = [str(number) for number, name in enumerate(names, 1) if not name.strip()]
    if without:
        raise ValueError(f"{where}: no file name in row {few(without)} (counted from 1 below the header).")
    if delimiter is not None and not any(isinstance(label, str) and delimiter in label for label in labels):
        raise ValueError(
            f"{where}: label_delimiter={delimiter!r} never occurs in column {label_column!r}: leave it out."
        )
    files = [os.path.normpath(folder.absolute() / name) for name in names]
    try:
        rows = [(file, as_labels(label, delimiter)) for file, label in zip(files, labels, strict=True)]
    except ValueError as error:
        raise ValueError(f"{where}, column {label_column!r}: {error}") from error
    counts = Counter(files)
    if len(counts) < len(files):
        twice = [file for file, count in counts.items() if count > 1]
        differ = len({(file, str(label)) for file, label in rows}) > len(counts)
        mend = "an image has one row; give several labels in one cell, with label_delimiter" if differ else "remove one"
        listed = "under two labels" if differ else "twice"
        raise ValueError(f"{where}: {len(twice)} images are listed {listed}: {few(_below(twice, folder))}: {mend}.")
    return rows


def labelled_splits(
    parts: dict[str, list[tuple[str, Any]]], where: str, fraction: float, seed: int, on_error: OnError
) -> DatasetDict:
    """Splits of files and labels, as a `DatasetDict`; validation is split off where there is none.

    Raises:
        UnreadableImagesError, ValueError: see [`load_image_table`].
    """
    if not parts.get("train"):
        raise ValueError(f"{where}: no training images; the splits in it are {few(sorted(parts))}.")
    rows = _with_file([(split, *row) for split, part in parts.items() for row in part], where, on_error)
    files = [file for _, file, _ in rows]
    kept = [rows[position] for position in readable(files, files, on_error)]
    splits = DatasetDict()
    for split in parts:
        members = [(file, label) for of, file, label in kept if of == split]
        if not members:
            raise ValueError(f"{where}, {split}: no image that can be read; it must have at least one.")
        ids, feature = encode_labels(
            [label for _, label in members],
            [file for file, _ in members],
            splits["train"].features["label"] if split != "train" else None,
            f"{where}, {split}",
            may_lack=split == "test",
        )
        columns = {"image": [file for file, _ in members], "label": ids}
        splits[split] = Dataset.from_dict(columns, Features({"image": Image(), "label": feature}))
    if "validation" not in splits:
        splits["train"], splits["validation"] = split_off(splits["train"], fraction, seed, where)
    return splits


def rows_of_metadata(
    folders: Mapping[str, Path | None], label_column: str, delimiter: str | None
) -> dict[str, list[tuple[str, Any]]]:
    """The rows of each split by the tables that the ecosystem's imagefolder puts beside images; empty without any.

    A table without the label column says nothing of classes; it is left out, and the log says so.

    Args:
        folders (mapping of `str` to `Path` or None): where each split is; "" is the folder of all, in whose table paths
            name the splits' folders.
        label_column, delimiter (`str`): as in [`load_image_table`].

    Raises:
        ValueError: see there; or training or validation lacks a table that the other has.
    """
    parts: dict[str, list[tuple[str, Any]]] = {}
    for split, folder in folders.items():
        path = next((folder / name for name in METADATA if (folder / name).is_file()), None) if folder else None
        if folder is None or path is None or (folder == folders[""] and split):
            continue
        table = read_table(path)
        if label_column not in table.column_names:
            logger.warning(
                f"{printable(path)} has no column {label_column!r} (it has {few(table.column_names)}), so it names no "
                "classes; label_column_name names another."
            )
            continue
        for file, label in table_rows(table, printable(path), folder, label_column=label_column, delimiter=delimiter):
            first = Path(os.path.relpath(file, folder.absolute())).parts[0]
            parts.setdefault(split or SPLIT_NAMES.get(first, "train"), []).append((file, label))
        if not split:
            break
    lacking = [split for split in ("train", "validation") if folders[split] is not None and split not in parts]
    if parts and lacking:
        raise ValueError(f"{printable(str(folders['']))}: no table names the images of {few(lacking)}.")
    return {split: parts[split] for split in ("train", "validation", "test") if split in parts}


def _by_split(rows: list[tuple[str, Any]], splits: list[Any], where: str) -> dict[str, list[tuple[str, Any]]]:
    unknown = sorted({str(name) for name in splits} - set(SPLIT_NAMES))
    if unknown:
        raise ValueError(f"{where}: the splits {few(unknown)}; they must be {', '.join(SPLIT_NAMES)}.")
    parts: dict[str, list[tuple[str, Any]]] = {"train": []}
    for row, split in zip(rows, splits, strict=True):
        parts.setdefault(SPLIT_NAMES[split], []).append(row)
    return parts


def _column(table: Dataset, name: str, where: str) -> list[Any]:
    if name not in table.column_names:
        raise ValueError(f"{where} has no column {name!r}: it has {few(table.column_names)}.")
    return column_values(table, name)


def _with_file(rows: list[tuple[str, str, Any]], where: str, on_error: OnError) -> list[tuple[str, str, Any]]:
    """The rows whose file is there."""
    missing = [file for _, file, _ in rows if not os.path.isfile(file)]
    if not missing:
        return rows
    message = f"{where}: {len(missing)} of {len(rows)} images have no file: {few(missing)}"
    if on_error != "skip":
        raise ValueError(f'{message}. Mend the names, give image_dir, or leave them out with on_error="skip".')
    logger.warning(f"{message}. They are left out.")
    lost = set(missing)
    return [row for row in rows if row[1] not in lost]


def _below(files: list[str], folder: Path) -> list[str]:
    return [os.path.relpath(file, folder) for file in files]
