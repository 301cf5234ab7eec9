"""The learning rate range test alone: suggestions on the terminal, the curve as a picture and as JSON.

accelerate launch recipes/find_lr.py --data_dir dogscats --model timm/resnet34.a1_in1k --precompute
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from hf_sgdr.cli.arguments import DataArguments, ModelArguments, build_trainer, load_images, parse
from hf_sgdr.cli.errors import run_cli
from hf_sgdr.optim.range_test import LRRangeTest, SuggestionMethod
from hf_sgdr.training.arguments import SGDRTrainingArguments


@dataclass
class RangeTestArguments:
    """The range of rates."""

    start_lr: float = field(default=1e-7, metadata={"help": "First rate."})
    end_lr: float = field(default=10.0, metadata={"help": "Last rate."})
    num_steps: int = field(default=100, metadata={"help": "Optimizer steps."})


def main(argv: Sequence[str]) -> int:
    kinds = (DataArguments, ModelArguments, RangeTestArguments, SGDRTrainingArguments)
    data, model_args, test, training = parse(kinds, argv, __doc__)
    LRRangeTest(test.start_lr, test.end_lr, test.num_steps)  # wrong numbers show before any work
    trainer = build_trainer(load_images(data, training), model_args, training)
    found = trainer.lr_find(test.start_lr, test.end_lr, test.num_steps)
    if not trainer.is_world_process_zero():
        return 0
    suggestions = {method: found.suggestion(method) for method in get_args(SuggestionMethod)}
    for method, rate in suggestions.items():
        print(f"{method:<9}{f'{rate:.2e}' if rate is not None else f'none: {found.reason}'}")
    folder = Path(training.output_dir)
    found.plot().figure.savefig(folder / "range-test.png")
    content = {"stop_reason": found.stop_reason, "suggestions": suggestions, "history": found.history}
    (folder / "range-test.json").write_text(json.dumps(content) + "\n", encoding="utf-8")
    print(f"The curve is in {folder / 'range-test.png'}. The test ended: {found.stop_reason}.")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
