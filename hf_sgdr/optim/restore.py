"""Leaving a Trainer as it was: a context manager for each kind of state, and one that combines them."""

import copy
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from transformers import Trainer

from hf_sgdr._utils.scoped import modes_restored


@contextmanager
def trainer_restored(trainer: Trainer) -> Iterator[None]:
    """Inside, train at will; afterwards, also after an exception, the Trainer, its model and generators are as before.

    The optimizer starts without momentum.
    """
    accelerator, model = trainer.accelerator, trainer.model
    optimizer = torch_optimizer(trainer.optimizer)
    assert model is not None
    with ExitStack() as stack:
        stack.enter_context(generators_restored())
        # accelerate notes what it prepared, and wraps a model's forward, in attributes of all four
        for owner in (trainer, accelerator, accelerator.gradient_state, model):
            stack.enter_context(attributes_restored(owner))
        stack.enter_context(modes_restored(model))
        stack.enter_context(gradients_restored(model))
        stack.enter_context(weights_restored(model))
        if accelerator.scaler is not None:
            stack.enter_context(state_restored(accelerator.scaler))
        if optimizer is not None:
            stack.enter_context(state_restored(optimizer))
            optimizer.state.clear()
        yield


@contextmanager
def attributes_restored(owner: Any) -> Iterator[None]:
    """An object's attributes, and the items of those that are lists."""
    before = dict(vars(owner))
    lists = [(value, value[:]) for value in before.values() if type(value) is list]
    try:
        yield
    finally:
        vars(owner).clear()
        vars(owner).update(before)
        for value, items in lists:
            value[:] = items


@contextmanager
def weights_restored(model: nn.Module) -> Iterator[None]:
    """The values of parameters and buffers."""
    before = [(tensor, tensor.detach().clone()) for tensor in (*model.parameters(), *model.buffers())]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)


@contextmanager
def gradients_restored(model: nn.Module) -> Iterator[None]:
    """Gradients, and which parameters require one."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, requires_grad, grad in before:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad


@contextmanager
def state_restored(stateful: Any) -> Iterator[None]:
    """The state of what has a `state_dict`: an optimizer, or the scaler of float16 training."""
    before = copy.deepcopy(stateful.state_dict())
    try:
        yield
    finally:
        stateful.load_state_dict(before)


@contextmanager
def generators_restored() -> Iterator[None]:
    """The global random generators of Python, NumPy and torch, on all devices."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


def torch_optimizer(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper, if it has one."""
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
