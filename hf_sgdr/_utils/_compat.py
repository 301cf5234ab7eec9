"""Private attributes of transformers and accelerate: no other file names one. Each has the version it was seen in.

`tests/test_stack_contract.py` fails with the name of what a release has moved.
"""

from typing import Any

import torch
from transformers import Trainer


def num_items_in_batch(trainer: Trainer, batches: list[Any]) -> torch.Tensor | int | None:
    """By how many items a loss summed over batches is divided; None if it is a mean already.

    transformers 5.24: `Trainer._get_num_items_in_batch`.
    """
    return trainer._get_num_items_in_batch(batches, trainer.args.device)


def loss_since_last_log(trainer: Trainer) -> torch.Tensor:
    """The sum of this process's step losses since the last log line.

    transformers 5.24: `Trainer._tr_loss`.
    """
    return trainer._tr_loss
