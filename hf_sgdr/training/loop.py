"""What `SGDRTrainer` gives to transformers' loop: arguments of the right length, micro-batches, a light optimizer."""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from transformers import PreTrainedModel
from transformers.trainer_utils import EvalLoopOutput

from hf_sgdr.features.extract import resolve_feature_dtype
from hf_sgdr.training.arguments import SGDRTrainingArguments


def loop_arguments(args: SGDRTrainingArguments, steps_per_epoch: int, resumed_at: int) -> SGDRTrainingArguments:
    """The arguments as transformers' loop reads them: as long as all cycles, or to `max_steps` where that is less.

    Args:
        args ([`SGDRTrainingArguments`]): of the fit; they are not changed.
        steps_per_epoch (`int`): optimizer steps.
        resumed_at (`int`): the optimizer step of the checkpoint that it goes on from.
    """
    of_loop = copy.copy(args)
    of_loop.num_train_epochs, of_loop.max_steps = args.total_epochs, -1
    if 0 < args.max_steps < steps_per_epoch * args.total_epochs:
        of_loop.max_steps = args.max_steps
        if resumed_at >= args.max_steps:  # the loop would go on in an epoch that max_steps has cut off
            of_loop.num_train_epochs, of_loop.max_steps = resumed_at // steps_per_epoch, -1
    of_loop.save_total_limit = None  # `SealCheckpoints` removes older checkpoints once the newest is whole
    return of_loop


def micro_batches(batch: dict[str, Any], size: int) -> Iterator[tuple[dict[str, Any], float, bool]]:
    """A batch in parts of at most `size` rows, each with its share of the rows, and whether it is the last."""
    count = max(len(value) for value in batch.values() if isinstance(value, torch.Tensor) and value.ndim)
    size = -(-count // -(-count // size))  # alike, so that no single row is left, of which a batch norm knows no spread
    for start in range(0, count, size):
        part = {
            name: value[start : start + size]
            if isinstance(value, torch.Tensor) and value.shape[:1] == (count,)
            else value
            for name, value in batch.items()
        }
        yield part, min(size, count - start) / count, start + size >= count


def trains_in_bfloat16(args: SGDRTrainingArguments) -> bool:
    """Whether training steps on images are computed in bfloat16: where `bf16` says so, or nothing and a GPU has it."""
    if args.bf16 is not None or args.fp16 or args.device.type != "cuda":
        return bool(args.bf16)
    return resolve_feature_dtype(args.device) == torch.bfloat16


def steps_autocast(args: SGDRTrainingArguments) -> AbstractContextManager[Any]:
    """bfloat16 for a training step, where nothing but the GPU asks for it; accelerate sees to `bf16=True`."""
    is_default = args.bf16 is None and trains_in_bfloat16(args)
    return torch.autocast(args.device.type, torch.bfloat16) if is_default else nullcontext()


def light_optimizer(optimizer: Any, accelerator: Accelerator) -> Any:
    """Without accelerate's wrapper, where all it does is to pass calls on.

    It looks for an optional package on disk twice a step (accelerate 1.15), which is a quarter of a head's step.
    """
    passes_on = accelerator.distributed_type == DistributedType.NO and accelerator.scaler is None
    return optimizer.optimizer if passes_on and isinstance(optimizer, AcceleratedOptimizer) else optimizer


def loss_of_all(model: PreTrainedModel, output: EvalLoopOutput) -> float:
    """The mean loss over all images of an evaluation, each counted once.

    The Trainer averages the losses of batches, which under several processes the last ones shift: they are filled up
    with images seen before.
    """
    logits = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
    labels = torch.from_numpy(output.label_ids)
    return float(model.loss_function(labels, torch.from_numpy(logits).float(), model.config))
