"""Seconds to solve a head on made-up features.

    python benchmarks/solve.py [--write]

Features are non-negative, as pooled activations are, and normal about a centre of each class otherwise.
"""

import argparse
import time
from typing import Any

import numpy as np
import torch
from timing import write_section

from hf_sgdr import solve_head
from hf_sgdr._utils.system import use_all_processors

WIDTH = 1280


def main() -> None:
    """Solve, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into benchmarks/RESULTS.md")
    options = parser.parse_args()
    use_all_processors()
    lines = ["| images x width, classes | what | seconds | accuracy in cross-validation |", "|---|---|---|---|"]
    lines.append(row(600, 6, "17 strengths, five folds"))
    for strength in (1e-3, 1e-1):
        lines.append(row(50_000, 100, f"C={strength:g}, two folds and the head", strengths=[strength], folds=2))
        print(lines[-1], flush=True)
    print("\n".join(lines))
    if options.write:
        write_section("Solving a head", lines, "one run each")


def row(images: int, classes: int, what: str, **settings: Any) -> str:
    """One solution's line."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, images)
    centres = 0.12 * rng.normal(size=(classes, WIDTH)).astype(np.float32)
    features = np.maximum(centres[labels] + rng.normal(size=(images, WIDTH)).astype(np.float32), 0)
    begin = time.perf_counter()
    solution = solve_head(torch.from_numpy(features), torch.from_numpy(labels), **settings)
    seconds = time.perf_counter() - begin
    return f"| {images:,} x {WIDTH:,}, {classes} | {what} | {seconds:.1f} | {solution.cv_accuracy:.3f} |"


if __name__ == "__main__":
    main()
