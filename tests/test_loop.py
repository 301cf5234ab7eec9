import dataclasses

import pytest
import torch
from helpers import losses
from transformers import TrainerCallback

from hf_sgdr import SGDRTrainingArguments
from hf_sgdr.training.loop import loop_arguments, micro_batches

SPLITS = {"train": {"cats": 10, "dogs": 10}, "valid": {"cats": 1, "dogs": 1}}
VALUES = {"eval_strategy": "no", "logging_strategy": "steps", "logging_steps": 1}


class Gradients(TrainerCallback):
    """The gradients before each optimizer step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append(torch.cat([parameter.grad.flatten().clone() for parameter in model.parameters()]))


@pytest.fixture
def trained(make_trainer):
    """`trained(...)`: the gradients of each step, losses, and sizes of the forward passes of one unfrozen epoch."""

    def train(**kwargs):
        gradients, sizes = Gradients(), []
        trainer = make_trainer(callbacks=[gradients], freeze_to=0, freeze_batch_norm=True, **VALUES, **kwargs)
        trainer.model.register_forward_hook(
            lambda module, args, kwargs, output: sizes.append(len(output.logits)), with_kwargs=True
        )
        trainer.fit(1e-3, 1, cycle_len=1)
        return gradients.steps, losses(trainer, "loss"), sizes

    return train


def sum_by_items(outputs, labels, num_items_in_batch=None):
    loss = torch.nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum")
    return loss / (num_items_in_batch if num_items_in_batch is not None else len(labels))


def mean_whatever_the_items(outputs, labels, num_items_in_batch=None):
    return torch.nn.functional.cross_entropy(outputs["logits"], labels)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"label_smoothing_factor": 0.1},
        {"compute_loss_func": sum_by_items},
        {"compute_loss_func": sum_by_items, "gradient_accumulation_steps": 2},
        {"compute_loss_func": mean_whatever_the_items},
    ],
)
def test_micro_batches_give_the_gradients_and_losses_of_the_batch(trained, kwargs):
    whole = trained(per_device_train_batch_size=8, **kwargs)
    parts = trained(per_device_train_batch_size=8, micro_batch_size=3, **kwargs)
    assert whole[2] == [8, 8, 4]  # of 20 images
    assert parts[2] == [3, 3, 2, 3, 3, 2, 2, 2]
    assert len(whole[0]) == len(parts[0]) == (2 if "gradient_accumulation_steps" in kwargs else 3)
    for expected, given in zip(whole[0], parts[0], strict=True):
        torch.testing.assert_close(given, expected, rtol=1e-3, atol=1e-5)
    assert parts[1] == pytest.approx(whole[1], abs=1e-4)


def test_a_batch_size_that_is_given_is_kept_and_the_default_is_divided_on_a_cpu(trained, tmp_path):
    arguments = SGDRTrainingArguments(str(tmp_path), use_cpu=True)
    assert (arguments.per_device_train_batch_size, arguments.micro_batch_size) == (64, 16)
    again = dataclasses.replace(arguments, num_cycles=2)
    assert (again.per_device_train_batch_size, again.micro_batch_size) == (64, 16)
    given = SGDRTrainingArguments(str(tmp_path), use_cpu=True, per_device_train_batch_size=64)
    assert (given.per_device_train_batch_size, given.micro_batch_size) == (64, None)
    assert trained(per_device_train_batch_size=20)[2] == [20]


def test_batches_of_features_are_not_divided(make_trainer):
    trainer = make_trainer(eval_strategy="no", per_device_train_batch_size=20, micro_batch_size=3, precompute=True)
    sizes = []
    trainer.model.timm_model.fc.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    trainer.lr_find(num_steps=3)
    sizes.clear()
    trainer.fit(1e-3, 1)
    assert sizes == [20]


@pytest.mark.parametrize("value", [0, -1, 2.5, "8", True])
def test_a_micro_batch_that_is_no_number_of_images_is_refused(tmp_path, value):
    with pytest.raises(ValueError, match="micro_batch_size="):
        SGDRTrainingArguments(str(tmp_path), micro_batch_size=value)


def test_micro_batches_are_parts_in_order_with_their_share():
    batch = {"pixel_values": torch.arange(8), "labels": torch.arange(8) + 10}
    assert [len(part["labels"]) for part, _, _ in micro_batches(batch, 7)] == [4, 4]  # no single row is left
    given = {"interpolate_pos_encoding": True, "scale": torch.tensor(2.0), "names": ["x"] * 8, **batch}
    assert [part["interpolate_pos_encoding"] for part, _, _ in micro_batches(given, 3)] == [True] * 3
    parts = list(micro_batches(batch, 3))
    assert [part["pixel_values"].tolist() for part, _, _ in parts] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert [part["labels"].tolist() for part, _, _ in parts] == [[10, 11, 12], [13, 14, 15], [16, 17]]
    assert [(share, is_last) for _, share, is_last in parts] == [(3 / 8, False), (3 / 8, False), (2 / 8, True)]


@pytest.mark.parametrize(
    ("max_steps", "resumed_at", "expected"),
    [
        (-1, 0, (3, -1)),
        (12, 0, (3, -1)),  # as long as all cycles
        (6, 0, (3, 6)),
        (6, 5, (3, 6)),
        (6, 6, (1, -1)),  # the loop would go on in the second epoch
    ],
)
def test_the_loop_is_as_long_as_all_cycles_or_max_steps(tmp_path, max_steps, resumed_at, expected):
    args = SGDRTrainingArguments(str(tmp_path), num_cycles=3, max_steps=max_steps, save_total_limit=2)
    of_loop = loop_arguments(args, steps_per_epoch=4, resumed_at=resumed_at)
    assert (of_loop.num_train_epochs, of_loop.max_steps, of_loop.save_total_limit) == (*expected, None)
    assert (args.max_steps, args.save_total_limit) == (max_steps, 2)
