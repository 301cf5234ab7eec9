import dataclasses

import pytest
import torch
from transformers import TrainerCallback

from hf_sgdr import SGDRTrainer, SGDRTrainingArguments, create_image_classifier, image_transforms, load_image_folder


@pytest.fixture(scope="module")
def images(tmp_path_factory, make_image_folder):
    folder = make_image_folder(tmp_path_factory.mktemp("images"), {"train": {"cats": 13, "dogs": 13}})
    return load_image_folder(folder / "train")


class Gradients(TrainerCallback):
    """The gradients before each optimizer step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append(torch.cat([parameter.grad.flatten().clone() for parameter in model.parameters()]))


def trained(images, tmp_path, **kwargs):
    """Gradients of each step, losses, and the sizes of the forward passes, of one unfrozen epoch of 20 images."""
    trainer_kwargs = {name: kwargs.pop(name) for name in ("compute_loss_func",) if name in kwargs}
    torch.manual_seed(0)
    model = create_image_classifier("test_resnet", labels=["cats", "dogs"], pretrained=False)
    train, evaluation = image_transforms(model, image_size=32, augment="side_on")
    args = SGDRTrainingArguments(
        str(tmp_path), eval_strategy="no", save_strategy="no", logging_strategy="steps", logging_steps=1,
        disable_tqdm=True, use_cpu=True, **kwargs,
    )  # fmt: skip
    gradients = Gradients()
    trainer = SGDRTrainer(
        model, args, train_dataset=images["train"], train_transform=train, eval_transform=evaluation,
        callbacks=[gradients], **trainer_kwargs,
    )  # fmt: skip
    trainer.unfreeze()
    trainer.layer_groups.freeze_batch_norm = True
    sizes = []
    model.register_forward_hook(lambda module, args, kwargs, output: sizes.append(len(output.logits)), with_kwargs=True)
    trainer.fit(1e-3, 1, cycle_len=1)
    return gradients.steps, [log["loss"] for log in trainer.state.log_history if "loss" in log], sizes


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
def test_micro_batches_give_the_gradients_and_losses_of_the_batch(images, tmp_path, kwargs):
    whole = trained(images, tmp_path, per_device_train_batch_size=8, **kwargs)
    parts = trained(images, tmp_path, per_device_train_batch_size=8, micro_batch_size=3, **kwargs)
    assert whole[2] == [8, 8, 4]  # of 20 images
    assert parts[2] == [3, 3, 2, 3, 3, 2, 3, 1]
    assert len(whole[0]) == len(parts[0]) == (2 if "gradient_accumulation_steps" in kwargs else 3)
    for expected, given in zip(whole[0], parts[0], strict=True):
        torch.testing.assert_close(given, expected, rtol=1e-3, atol=1e-5)
    assert parts[1] == pytest.approx(whole[1], abs=1e-4)


def test_a_batch_size_that_is_given_is_kept_and_the_default_is_divided_on_a_cpu(images, tmp_path):
    arguments = SGDRTrainingArguments(str(tmp_path), use_cpu=True)
    assert (arguments.per_device_train_batch_size, arguments.micro_batch_size) == (64, 32)
    again = dataclasses.replace(arguments, num_cycles=2)
    assert (again.per_device_train_batch_size, again.micro_batch_size) == (64, 32)
    given = SGDRTrainingArguments(str(tmp_path), use_cpu=True, per_device_train_batch_size=64)
    assert (given.per_device_train_batch_size, given.micro_batch_size) == (64, None)
    assert trained(images, tmp_path, per_device_train_batch_size=20)[2] == [20]


def test_batches_of_features_are_not_divided(images, tmp_path):
    model = create_image_classifier("test_resnet", labels=["cats", "dogs"], pretrained=False)
    args = SGDRTrainingArguments(
        str(tmp_path), eval_strategy="no", save_strategy="no", disable_tqdm=True, use_cpu=True, micro_batch_size=3,
        precompute=True,
    )  # fmt: skip
    trainer = SGDRTrainer(model, args, train_dataset=images["train"])
    sizes = []
    model.timm_model.fc.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    trainer.lr_find(num_steps=3)
    sizes.clear()
    trainer.fit(1e-3, 1)
    assert sizes == [20]


@pytest.mark.parametrize("value", [0, -1, 2.5, "8", True])
def test_a_micro_batch_that_is_no_number_of_images_is_refused(tmp_path, value):
    with pytest.raises(ValueError, match="micro_batch_size="):
        SGDRTrainingArguments(str(tmp_path), micro_batch_size=value)
