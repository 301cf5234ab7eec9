"""What the unfrozen stage gains over the solved head at eight rates: the truth for the rule that chooses its rate.

    pip install -e ".[bench,demo]"
    python benchmarks/unfrozen_rates.py --data_dir FOLDER [--sets trash dogscats] [--seed 42] [--output FILE]

FOLDER is that of quality.py. Each stage begins at the head that is solved on stored views and trains as the last one of
the lesson, each layer group at a third of the rate above it. FILE is JSON: for each set the loss of the solved head,
the curve of the stage's range test, and for each rate the losses of the end and of the averages of start and end at a
quarter, a half and three quarters. It is written after each rate.
"""

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality import SETS, solved_trainer
from safetensors.torch import save_file

from hf_sgdr import LESSON, average_with_start

RATES = [float(f"{rate:.3g}") for rate in np.geomspace(1.25e-4, 4e-3, 8)]


def main() -> None:
    """Record all sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output", type=Path, default=Path("unfrozen_rates.json"))
    options = parser.parse_args()
    recorded: dict[str, Any] = {}
    for name in options.sets:
        with tempfile.TemporaryDirectory() as folder:
            batch = ("--per_device_train_batch_size", str(LESSON[-1].max_batch_size))
            views = 1 if name == "digits" else 4  # as demo.yaml and lesson.yaml have them
            trainer = solved_trainer(
                name, options.seed, "tf_efficientnet_lite0", options.data_dir, folder, views, *batch
            )
            for curves in record(trainer, Path(folder, "start.safetensors")):
                recorded[name] = curves
                options.output.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")
                print(name, {key: value for key, value in curves.items() if key != "range test"}, file=sys.stderr)


def record(trainer: Any, start: Path) -> Iterator[dict[str, Any]]:
    """The record of one set, again after each rate."""
    stage = LESSON[-1]
    trainer.args.precompute_views = 0
    weights = copy.deepcopy(trainer.model.state_dict())
    save_file({key: value.contiguous() for key, value in weights.items()}, start)
    trainer.layer_groups.freeze_batch_norm = True
    trainer.unfreeze()
    count = len(trainer.layer_groups)
    spread = [stage.lr_spread ** (i + 1 - count) for i in range(count)]
    found = trainer.lr_find(
        stage.range_test_start, stage.range_test_end, stage.range_test_steps, group_learning_rates=spread
    )
    curves: dict[str, Any] = {
        "solved": trainer.evaluate()["eval_loss"],
        "range test": {key: [float(f"{value:.4g}") for value in found.history[key]] for key in ("lr", "loss")},
        "suggestion": found.suggestion(),
        "edge": found.edge(),
        "rates": [],
        "losses": {"0.25": [], "0.5": [], "0.75": [], "1.0": []},
        "seconds": [],
    }
    for rate in RATES:
        begin = time.perf_counter()
        trainer.model.load_state_dict(weights)
        torch.manual_seed(0)
        trainer.fit(
            [rate * share for share in spread],
            stage.num_cycles,
            cycle_len=stage.cycle_len,
            cycle_mult=stage.cycle_mult,
        )
        for share, loss in average_with_start(trainer, start).items():
            curves["losses"][str(share)].append(round(loss, 5))
        curves["rates"].append(rate)
        curves["seconds"].append(round(time.perf_counter() - begin))
        yield curves


if __name__ == "__main__":
    main()
