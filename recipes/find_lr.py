"""The learning rate range test alone: suggestions on the terminal, the curve as a picture and as JSON.

hf-sgdr find-lr dogscats --model timm/resnet34.a1_in1k --precompute
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_args

from transformers.hf_argparser import HfArg

from hf_sgdr.cli.arguments import GROUPS, DataArguments, ModelArguments, RecipeArguments
from hf_sgdr.cli.build import build_trainer, load_images
from hf_sgdr.cli.main import run_cli
from hf_sgdr.cli.parser import parse
from hf_sgdr.cli.quiet import hide_bars
from hf_sgdr.optim.range_test import SuggestionMethod
from hf_sgdr.optim.schedule import checked_steps
from hf_sgdr.training.arguments import SGDRTrainingArguments


@dataclass
class RangeTestArguments:
    """The range of rates."""

    start_lr: float = HfArg(default=1e-7, help="First rate.")
    end_lr: float = HfArg(default=10.0, help="Last rate.")
    num_steps: int = HfArg(default=100, help="Optimizer steps.")

    def __post_init__(self) -> None:
        checked_steps(self.start_lr, self.end_lr, self.num_steps)  # before any work


def main(argv: Sequence[str]) -> int:
    hide_bars()
    kinds = (DataArguments, ModelArguments, RangeTestArguments, SGDRTrainingArguments)
    data, model_args, test, training = parse(
        kinds, argv, __doc__, groups=GROUPS, left_out={item.name for item in fields(RecipeArguments)}
    )
    trainer = build_trainer(load_images(data, training), model_args, training)
    result = trainer.lr_find(test.start_lr, test.end_lr, test.num_steps)
    if not trainer.is_world_process_zero():
        return 0
    suggestions: dict[str, float | None] = {}
    for method in get_args(SuggestionMethod):
        rate = suggestions[method] = result.suggestion(method)
        print(f"{method:<9}{f'{rate:.2e}' if rate is not None else f'none: {result.reason}'}")
    picture = Path(training.output_dir, "range-test.png")
    result.plot().figure.savefig(picture)
    content = {"stop_reason": result.stop_reason, "suggestions": suggestions, "history": result.history}
    picture.with_suffix(".json").write_text(json.dumps(content) + "\n", encoding="utf-8")
    print(f"The curve is in {picture}. The test ended: {result.stop_reason}.")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
