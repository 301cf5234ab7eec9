"""Labels and probabilities for photos, by a model that a recipe saved or pushed.

    python recipes/predict.py --model out photos/ cat.jpg --output predictions.csv predictions.json

What cannot be read is named on stderr and left out; the exit status is then 1.
"""

import argparse
import csv
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForImageClassification

from hf_sgdr.cli import one_clear_line
from hf_sgdr.data import photo_files
from hf_sgdr.transforms import image_transforms

BATCH = 32


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="+", help="picture files, and folders that are searched for them")
    parser.add_argument("--model", "--model_name_or_path", required=True, help="folder or model id of the Hub")
    parser.add_argument("--output", nargs="+", default=[], metavar="FILE", help="FILE.csv, FILE.json or both")
    options = parser.parse_args(argv)
    writers = {Path(name): _writer(Path(name)) for name in options.output}
    files = list(_files(options.photos))
    model = AutoModelForImageClassification.from_pretrained(options.model).eval()
    rows, unreadable = predict(model, files)
    for path, write in writers.items():
        write(path, rows)
    if not writers:
        for row in rows:
            print(f"{row['file']}\t{row['label']}\t{row['probability']:.4f}")
    for message in unreadable:
        print(message, file=sys.stderr)
    return 1 if unreadable else 0


def predict(model: Any, files: Sequence[Path]) -> tuple[list[dict[str, Any]], list[str]]:
    """A row for each file, in order, and a message for each that cannot be read."""
    _, transform = image_transforms(model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device)
    names = [model.config.id2label[i] for i in range(model.config.num_labels)]
    rows: list[dict[str, Any]] = []
    unreadable: list[str] = []
    for start in tqdm(range(0, len(files), BATCH), desc="Predicting", unit="batch"):
        pixels, read = [], []
        for file in files[start : start + BATCH]:
            try:
                pixels.append(transform.pixels(file, (0,)))
                read.append(file)
            except ValueError as error:
                unreadable.append(str(error))
        if not read:
            continue
        with torch.inference_mode():
            logits = model(transform.normalize(torch.stack(pixels).to(device))).logits
        for file, probabilities in zip(read, logits.float().softmax(dim=-1).tolist(), strict=True):
            best = max(range(len(names)), key=probabilities.__getitem__)
            by_name = dict(zip(names, probabilities, strict=True))
            rows.append(
                {"file": str(file), "label": names[best], "probability": probabilities[best], "probabilities": by_name}
            )
    return rows, unreadable


def _files(words: Sequence[str]) -> Iterator[Path]:
    for word in words:
        path = Path(word)
        if path.is_dir():
            found = list(photo_files(path))
            if not found:
                raise ValueError(f"{path}: no picture in this folder.")
            yield from found
        elif path.exists():
            yield path
        else:
            raise FileNotFoundError(f"{path}: no such file or folder.")


def _writer(path: Path) -> Any:
    writers = {".csv": _write_csv, ".json": _write_json}
    if path.suffix not in writers:
        raise ValueError(f"--output {path}: give a name that ends in .csv or .json.")
    return writers[path.suffix]


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    names = list(rows[0]["probabilities"]) if rows else []
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "label", "probability", *(f"p({name})" for name in names)])
        for row in rows:
            writer.writerow([row["file"], row["label"], row["probability"], *row["probabilities"].values()])


def _write_json(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text(json.dumps(list(rows), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(one_clear_line(main))
