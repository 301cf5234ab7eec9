"""Check what a recipe left behind: its figures, its files, and that stock transformers loads the model without us."""

import argparse
import json
import sys
from pathlib import Path

sys.modules["hf_sgdr"] = None  # type: ignore[assignment]  # whoever imports it now fails

from transformers import pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--min_accuracy", type=float, required=True)
    parser.add_argument("--max_loss", type=float, default=float("inf"))
    options = parser.parse_args()
    results = json.loads((options.output_dir / "results.json").read_text())
    first, best = results["stages"][0], results["best"]
    files = {path.name for path in options.output_dir.iterdir()}
    classifier = pipeline("image-classification", model=str(options.output_dir), device="cpu")
    checks = {
        f"three stages: {[stage['name'] for stage in results['stages']]}": len(results["stages"]) == 3,
        f"accuracy {best['eval_accuracy']:.4f} >= {options.min_accuracy}": best["eval_accuracy"]
        >= options.min_accuracy,
        f"loss {best['eval_loss']:.4f} <= {options.max_loss}": best["eval_loss"] <= options.max_loss,
        f"loss below the first stage's {first['eval_loss']:.4f}": best["eval_loss"] < first["eval_loss"],
        f"files: {sorted(files)}": {"config.json", "model.safetensors", "precomputed-range-test.png"} <= files,
        f"stock labels: {classifier.model.config.id2label}": len(classifier.model.config.id2label) >= 2,
    }
    for what, holds in checks.items():
        print(f"{'ok  ' if holds else 'FAIL'} {what}")
    sys.exit(0 if all(checks.values()) else 1)


if __name__ == "__main__":
    main()
