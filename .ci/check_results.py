"""Check what a recipe left behind: its figures, its files, and that stock transformers labels an image without us."""

import argparse
import json
import sys
from pathlib import Path

sys.modules["hf_sgdr"] = None  # type: ignore[assignment]  # whoever imports it now fails

from PIL import Image
from transformers import pipeline

SCHEMA = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--min_accuracy", type=float, required=True)
    parser.add_argument("--max_loss", type=float, default=float("inf"))
    parser.add_argument("--stages", type=int, default=3, help="how many there must be")
    options = parser.parse_args()
    checks = check_files(options.output_dir, options.stages)
    if all(checks.values()):
        checks |= check_figures(options.output_dir, options.stages, options.min_accuracy, options.max_loss)
        checks |= check_stock_pipeline(options.output_dir)
    for what, holds in checks.items():
        print(f"{'ok  ' if holds else 'FAIL'} {what}")
    sys.exit(0 if all(checks.values()) else 1)


def check_files(folder: Path, num_stages: int) -> dict[str, bool]:
    """The model, the results and the pictures are there."""
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    plots = {name for name in there if name.endswith(("-range-test.png", "-learning-rate.png"))}
    checks = {f"{name} is there": name in there for name in ("results.json", "config.json", "model.safetensors")}
    # A rate is plotted for every stage but the first, where it is constant, a range test at least for that one.
    checks["run.png is there"] = "run.png" in there
    return checks | {f"plots: {', '.join(sorted(plots)) or 'none'}": len(plots) >= num_stages}


def check_figures(folder: Path, num_stages: int, min_accuracy: float, max_loss: float) -> dict[str, bool]:
    """`results.json` has its schema, and the best weights are as good as asked for."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    stages, best = results["stages"], results["best"]
    accuracy, loss, first_loss = best["eval_accuracy"], best["eval_loss"], stages[0]["eval_loss"]
    return {
        f"schema {results['schema']} is {SCHEMA}": results["schema"] == SCHEMA,
        f"{num_stages} stages: {', '.join(stage['name'] for stage in stages)}": len(stages) == num_stages,
        f"best accuracy {accuracy:.4f} >= {min_accuracy}": accuracy >= min_accuracy,
        f"best loss {loss:.4f} <= {max_loss}": loss <= max_loss,
        f"best loss {loss:.4f} < the first stage's {first_loss:.4f}": loss < first_loss,
    }


def check_stock_pipeline(folder: Path) -> dict[str, bool]:
    """Plain transformers, without hf_sgdr, gives a picture labels of the model's own."""
    classifier = pipeline("image-classification", model=str(folder), device="cpu")
    labels = [answer["label"] for answer in classifier(Image.new("RGB", (120, 80), "grey"))]
    known = set(classifier.model.config.id2label.values())
    return {f"a stock pipeline gives labels: {labels}": len(labels) >= 2 and set(labels) <= known}


if __name__ == "__main__":
    main()
