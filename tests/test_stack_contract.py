"""What hf_sgdr takes from transformers and accelerate beside their public names; a release that moves it fails here."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import Trainer

from hf_sgdr._utils._compat import (
    forget_prepared_models,
    loss_counters,
    loss_since_last_log,
    mean_training_loss,
    num_items_in_batch,
    restore_loss_counters,
    skip_gradient_norm,
    training_batch_size,
)

ROOT = Path(__file__).parent.parent
COMPAT = ROOT / "hf_sgdr" / "_utils" / "_compat.py"
# What the stack documents for subclasses: those of a pipeline, and of a metric of `evaluate`.
DOCUMENTED = {"_sanitize_parameters", "_forward", "_info", "_compute"}
STACK = (
    "accelerate.accelerator", "accelerate.data_loader", "accelerate.optimizer", "accelerate.scheduler",
    "accelerate.state", "transformers.configuration_utils", "transformers.image_processing_base",
    "transformers.modeling_utils", "transformers.pipelines.base", "transformers.pipelines.image_classification",
    "transformers.trainer", "transformers.trainer_callback", "transformers.training_args",
)  # fmt: skip


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(2, 2)

    def forward(self, x, labels):
        return {"loss": nn.functional.cross_entropy(self.line(x), labels)}


@pytest.fixture
def trainer(make_stock_trainer):
    return make_stock_trainer(Line(), [{"x": torch.ones(2), "labels": i % 2} for i in range(8)], num_train_epochs=1)


def private_names(source: str) -> dict[str, int]:
    """Private attributes that a file gets, sets or defines in a class, with a line of each."""
    names = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            names[node.attr] = node.lineno
        elif isinstance(node, ast.ClassDef):
            names |= {method.name: method.lineno for method in node.body if isinstance(method, ast.FunctionDef)}
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr", "hasattr"):
            names |= {arg.value: arg.lineno for arg in node.args[1:2] if isinstance(arg, ast.Constant)}
    return {name: line for name, line in names.items() if name.startswith("_") and not name.startswith("__")}


@pytest.mark.parametrize(
    ("name", "signature"),
    [
        ("_get_num_items_in_batch", ["self", "batch_samples", "device"]),
        ("_get_grad_norm", ["self", "model", "grad_norm"]),
    ],
    ids=str,
)
def test_a_private_method_is_where_it_was(name, signature):
    assert list(inspect.signature(getattr(Trainer, name)).parameters) == signature


def test_the_number_of_items_in_a_batch_is_counted_where_the_model_divides_by_it(trainer):
    batches = [{"labels": torch.tensor([0, 1, 1])}, {"labels": torch.tensor([0])}]
    assert num_items_in_batch(trainer, batches) is None
    trainer.model_accepts_loss_kwargs = True
    assert num_items_in_batch(trainer, batches) == 4


def test_the_loss_since_the_last_log_is_a_tensor_that_grows_and_starts_anew(trainer):
    trainer.train()
    assert isinstance(loss_since_last_log(trainer), torch.Tensor)


def test_the_counters_of_the_loss_are_taken_and_given_back(trainer):
    trainer.train()
    counters = loss_counters(trainer)
    assert counters["total_loss"] > 0
    assert mean_training_loss(trainer) == pytest.approx(counters["total_loss"] / trainer.state.global_step)
    given = {"loss": 0.5, "total_loss": 3.0, "last_logged": 2}
    restore_loss_counters(trainer, given)
    assert loss_counters(trainer) == given


def test_a_gradient_norm_that_nobody_asked_for_is_not_computed(trainer, monkeypatch):
    trainer.args.max_grad_norm = 0.0
    skip_gradient_norm(trainer)
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", lambda *args, **kwargs: pytest.fail("computed"))
    trainer.train()


def test_steps_have_the_batch_size_inside_and_that_of_before_afterwards(trainer):
    assert [len(batch["labels"]) for batch in trainer.get_train_dataloader()] == [8]
    with training_batch_size(trainer, 3):
        assert [len(batch["labels"]) for batch in trainer.get_train_dataloader()] == [3, 3, 2]
        trainer.train()
        assert trainer.state.max_steps == 3
    assert [len(batch["labels"]) for batch in trainer.get_train_dataloader()] == [8]
    trainer.train()
    assert trainer.state.max_steps == 1


def test_prepared_models_are_forgotten():
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(nn.Linear(2, 2))
    assert len(accelerator._models) == 1
    forget_prepared_models(accelerator)
    assert accelerator._models == []


def test_public_attributes_that_the_range_test_stands_on():
    accelerator = Accelerator(cpu=True)
    accelerator.sync_gradients = False
    assert accelerator.gradient_state.sync_gradients is False
    accelerator.sync_gradients = True
    assert list(inspect.signature(Accelerator.clip_grad_norm_).parameters)[:3] == ["self", "parameters", "max_norm"]


def test_no_other_file_names_a_private_attribute_of_the_stack():
    stack = set()
    for module in STACK:
        stack |= private_names(inspect.getsource(importlib.import_module(module))).keys()
    stack -= DOCUMENTED | set(dir(nn.Module()))
    assert private_names(COMPAT.read_text()).keys() <= stack
    files = [path for room in ("hf_sgdr", "recipes") for path in (ROOT / room).rglob("*.py") if path != COMPAT]
    named = {
        str(path.relative_to(ROOT)): names
        for path in files
        if (names := {name: line for name, line in private_names(path.read_text()).items() if name in stack})
    }
    assert named == {}
