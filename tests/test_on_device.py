"""What a device does in batches, shown on a processor: rendering, bfloat16 steps, a late look at losses."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hf_sgdr import SGDRTrainingArguments, image_transforms
from hf_sgdr.callbacks.loop import StopOnNonFiniteLoss
from hf_sgdr.training import loop
from hf_sgdr.training.record import run_record

SIZES = [(64, 64), (33, 60), (32, 400), (150, 40), (20, 24), (500, 375)]  # height, width


def picture(height, width):
    """A smooth one, as photographs are: a rotation of noise is never the same twice."""
    rng = np.random.default_rng(height * 1000 + width)
    coarse = torch.from_numpy(rng.uniform(0, 255, (1, 3, 5, 5)))
    pixels = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 255)
    return pixels[0].permute(1, 2, 0).to(torch.uint8).numpy()


@pytest.mark.parametrize("augment", ["basic", "side_on", "top_down"])
def test_a_batch_rendered_at_once_is_the_views_one_by_one(tiny_model, augment):
    transform, _ = image_transforms(tiny_model, image_size=32, augment=augment, max_zoom=1.3)
    images = [(picture(*size), (seed,)) for size in SIZES for seed in range(20)]
    pixels, views = map(torch.stack, zip(*(transform.unrendered(*image) for image in images), strict=True))
    one_by_one = torch.stack([transform.pixels(*image) for image in images])
    assert pixels.shape[2] < 1.4 * 32
    levels = (transform.normalize(pixels, views) - transform.normalize(one_by_one)) * transform.spec.std[0] * 255
    assert levels.abs().max() < 1.01
    assert (levels.abs() > 0.01).float().mean() < 1e-3


def test_without_rotation_nothing_is_left_for_the_device(tiny_model):
    for transform in image_transforms(tiny_model, image_size=32, max_zoom=1.5):
        pixels, view = transform.unrendered(picture(50, 70), (3,))
        assert view is None
        assert torch.equal(pixels, transform.pixels(picture(50, 70), (3,)))


@pytest.mark.parametrize("cache_images", [False, True])
def test_training_is_the_same(make_trainer, cache_images):
    losses = []
    for on_device in (False, True):
        trainer = make_trainer(augment="side_on", augment_on_device=on_device, cache_images=cache_images)
        batch = next(iter(trainer.get_train_dataloader()))
        assert ("views" in batch) == on_device
        trainer.fit(1e-2, 2)
        losses.append([entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_pixels_that_are_given_are_resized_without_augmentation_too(make_trainer):
    rows = [{"image": torch.full((3, 48, 57), i, dtype=torch.uint8), "label": i % 2} for i in range(8)]
    trainer = make_trainer(train_dataset=rows, augment=None, max_zoom=1.0, augment_on_device=True)
    assert next(iter(trainer.get_train_dataloader()))["pixel_values"].shape == (8, 3, 32, 32)


def test_stored_views_are_the_same(make_trainer, tmp_path, monkeypatch):
    features = []
    for on_device in (False, True):
        monkeypatch.setenv("HF_SGDR_CACHE", str(tmp_path / f"cache-{on_device}"))
        trainer = make_trainer(augment="top_down", precompute=True, precompute_views=2, augment_on_device=on_device)
        features.append(trainer.features.training(trainer.train_dataset)[:]["features"])
    torch.testing.assert_close(*features, atol=1e-3, rtol=1e-3)


def test_show_batch_shows_whole_views(make_trainer):
    shown = [
        [image.get_array() for axes in trainer.show_batch(4).figure.axes for image in axes.images]
        for trainer in (make_trainer(augment="side_on", augment_on_device=which) for which in (False, True))
    ]
    assert all(np.array_equal(*pair) for pair in zip(*shown, strict=True))


@pytest.mark.parametrize("has_gpu", [False, True])
def test_it_is_the_default_beside_a_gpu(monkeypatch, has_gpu):
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_gpu)
    field = next(field for field in dataclasses.fields(SGDRTrainingArguments) if field.name == "augment_on_device")
    assert field.default_factory() == has_gpu


# ---- bfloat16 ----


def test_steps_on_images_are_bfloat16_and_nothing_else(make_trainer, monkeypatch):
    monkeypatch.setattr("hf_sgdr.training.trainer.steps_autocast", lambda args: torch.autocast("cpu", torch.bfloat16))
    seen = set()
    trainer = make_trainer(freeze_to=0)
    trainer.model.register_forward_hook(lambda module, _, output: seen.add((module.training, output.logits.dtype)))
    trainer.fit(1e-2, 1)
    assert seen == {(True, torch.bfloat16), (False, torch.float32)}
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


def test_a_head_on_features_is_float32(make_trainer, monkeypatch):
    monkeypatch.setattr("hf_sgdr.training.trainer.steps_autocast", lambda args: pytest.fail("asked for"))
    make_trainer(precompute=True).fit(1e-2, 1)


@pytest.mark.parametrize(
    ("device", "given", "steps", "by_us"),
    [
        ("cuda", {}, True, True),
        ("cuda", {"bf16": False}, False, False),
        ("cuda", {"bf16": True}, True, False),  # accelerate's autocast
        ("cuda", {"fp16": True}, False, False),
        ("cpu", {}, False, False),
    ],
)
@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_a_gpu_with_bfloat16_trains_in_it_unless_told_otherwise(device, given, steps, by_us, monkeypatch):
    arguments = SimpleNamespace(**{"bf16": None, "fp16": False, "device": torch.device(device), **given})
    monkeypatch.setattr(loop, "resolve_feature_dtype", lambda device: torch.bfloat16)
    assert loop.trains_in_bfloat16(arguments) == steps
    assert isinstance(loop.steps_autocast(arguments), torch.autocast) == by_us


@pytest.mark.parametrize(("given", "recorded"), [({}, False), ({"bf16": False}, True), ({"bf16": True}, True)])
def test_a_precision_that_was_given_is_recorded(make_trainer, given, recorded):
    trainer = make_trainer(**given)
    trainer.fit(1e-2, 1)
    record = run_record(trainer)
    assert ("bf16" in record.changed) == recorded
    assert record.settings["bf16"] == given.get("bf16", False)


# ---- No step waits ----


def test_on_a_gpu_a_loss_is_looked_at_a_step_later_and_before_a_checkpoint(make_stock_trainer, tiny_model, monkeypatch):
    class Loss:
        """A loss on a GPU, as far as the callback knows."""

        device = torch.device("cuda")

        def __init__(self, value):
            self.value = value

        def to(self, device, non_blocking):
            assert non_blocking
            return torch.tensor(self.value)

    class Event:
        def record(self):
            self.is_recorded = True

        def synchronize(self):
            assert self.is_recorded

    monkeypatch.setattr("torch.cuda.Event", Event)
    trainer = make_stock_trainer(tiny_model, None)
    optimizer = torch.optim.SGD(tiny_model.parameters(), lr=0.5)
    callback, state, control = StopOnNonFiniteLoss(trainer), trainer.state, trainer.control
    state.max_steps = 9

    def step(loss, should_save=False):
        monkeypatch.setattr("hf_sgdr.callbacks.loop.loss_since_last_log", lambda trainer: Loss(loss))
        callback.on_pre_optimizer_step(trainer.args, state, control, optimizer=optimizer)
        state.global_step += 1
        control.should_save = should_save
        callback.on_step_end(trainer.args, state, control, optimizer=optimizer)

    callback.on_train_begin(trainer.args, state, control)
    step(0.3)
    step(float("nan"))
    with pytest.raises(FloatingPointError, match=r"NaN at step 2 of 9, .* 5\.00e-01\. The weights are those of after"):
        step(0.3)
    callback.on_train_begin(trainer.args, state, control)
    with pytest.raises(FloatingPointError, match="infinite at step 3 of 9"):
        step(float("inf"), should_save=True)
    step(float("nan"))
    with pytest.raises(FloatingPointError, match="NaN at step 4 of 9"):
        callback.on_epoch_end(trainer.args, state, control, optimizer=optimizer)
