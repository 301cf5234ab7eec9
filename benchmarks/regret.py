"""What it costs to take a range test's suggestion: its regret, on recorded range tests of fresh heads.

    python benchmarks/regret.py

`tests/data/rate_regret.json` holds, for each of four sets (tf_efficientnet_lite0, batch 64, seed 42), the curve of
`trainer.lr_find()` on precomputed features, and the validation loss after two epochs from the same weights at eight
rates, constant and annealed by one cycle. Regret of a rule: the loss at its suggestion (between the eight rates
interpolated over the logarithm of the rate) minus the lowest of the eight.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hf_sgdr.optim.suggestions import SUGGESTIONS, Suggestion

DATA = Path(__file__).parents[1] / "tests" / "data" / "rate_regret.json"


def regrets(rule: Callable[..., Suggestion], truth: str = "constant") -> dict[str, tuple[float, float]]:
    """Suggestion and regret of a rule for each recorded range test; a suggestion outside the eight rates is clipped."""
    results = {}
    for name, recorded in json.loads(DATA.read_text(encoding="utf-8")).items():
        rate, reason = rule(recorded["lr"], recorded["loss"])
        if rate is None:
            raise ValueError(f"{name}: {reason}")
        losses = recorded[truth]
        loss = float(np.interp(np.log(rate), np.log(recorded["rates"]), losses))
        results[name] = rate, loss - min(losses)
    return results


def table() -> list[str]:
    """A line for each rule."""
    rows: dict[str, Any] = {name: regrets(rule) for name, rule in SUGGESTIONS.items()}
    sets = list(next(iter(rows.values())))
    lines = [f"| rule | {' | '.join(sets)} | mean | worst |", "|---" * (len(sets) + 3) + "|"]
    for name, results in rows.items():
        cells = [f"{rate:.2g}: {regret:.3f}" for rate, regret in results.values()]
        values = [regret for _, regret in results.values()]
        lines.append(f"| {name} | {' | '.join(cells)} | {np.mean(values):.3f} | {max(values):.3f} |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
