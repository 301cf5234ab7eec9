"""Training on precomputed features: what it gives, at any depth, within which room, and with which views."""

import inspect

import numpy as np
import pytest
import torch
from helpers import losses, same, tiny_vit, weights
from transformers import (
    AutoModelForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    TrainingArguments,
)

from hf_sgdr import LayerGroups, image_transforms
from hf_sgdr.features.reader import PrecomputedFeatures


def test_unfreezing_switches_precompute_off(make_trainer):
    trainer = make_trainer(precompute=True)
    trainer.unfreeze()
    assert not trainer.precompute
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())
    with pytest.raises(ValueError, match=r"Nothing is frozen, so there is nothing to precompute: call freeze\(\)"):
        trainer.precompute = True
    trainer.freeze()
    trainer.precompute = True


def test_the_whole_model_has_the_trained_head_and_the_same_validation_loss(make_trainer):
    trainer = make_trainer(precompute=True)
    model = trainer.model
    before = weights(model)
    trainer.fit(1e-1, 2)
    assert trainer.model is model
    assert not torch.equal(before["timm_model.fc.weight"], model.timm_model.fc.weight)
    while_training = losses(trainer)[-1]
    trainer.precompute = False
    assert trainer.evaluate()["eval_loss"] == pytest.approx(while_training, abs=1e-6)


def test_training_on_features_is_training_the_head_on_unaugmented_images(make_trainer):
    trained = []
    for precompute in (True, False):
        trainer = make_trainer(augment=None, precompute=precompute, seed=3)
        trainer.train_transform = trainer.eval_transform
        trainer.fit(1e-2, 2, cycle_len=1)
        trained.append((weights(trainer.model), losses(trainer, "loss"), losses(trainer)))
    torch.testing.assert_close(
        trained[0][0]["timm_model.fc.weight"], trained[1][0]["timm_model.fc.weight"], atol=2e-4, rtol=0
    )
    assert trained[0][1] == pytest.approx(trained[1][1], abs=1e-3)
    assert trained[0][2] == pytest.approx(trained[1][2], abs=1e-3)


def test_while_precompute_is_on_the_trainer_still_has_the_whole_model(make_trainer, images, tmp_path):
    trainer = make_trainer(precompute=True)
    trainer.fit(1e-2, 1)
    assert trainer.log_predictions().shape == (11, 2)
    assert trainer.tta(n_aug=1).shape == (11, 2)
    trainer.save_model(str(tmp_path / "saved"))
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "saved").config.label_names == ["cats", "dogs"]


def test_augmentation_with_precompute_is_warned_about(make_trainer, logs):
    make_trainer(precompute=True)
    assert "Augmentation has no effect with precompute" in logs.text


def test_views_without_augmentation_are_refused(make_trainer):
    trainer = make_trainer(precompute_views=2)
    trainer.train_transform = trainer.eval_transform
    with pytest.raises(ValueError, match="precompute_views=2 needs a training transform that augments"):
        trainer.precompute = True


def test_features_need_no_processes_whatever_starts_them(make_trainer):
    trainer = make_trainer(precompute=True, dataloader_num_workers=1, dataloader_multiprocessing_context="spawn")
    trainer.fit(1e-2, 1)
    assert trainer.args.dataloader_multiprocessing_context == "spawn"


def test_of_several_rates_the_head_takes_the_last(make_trainer):
    trainer = make_trainer(precompute=True)
    trainer.fit([1e-4, 1e-3, 1e-2], 1)
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [1e-2]


@pytest.mark.parametrize("freeze_to", [1, -1])
def test_precompute_goes_with_activation_checkpointing(make_trainer, freeze_to):
    def trained(**kwargs):
        trainer = make_trainer(tiny_vit(), freeze_to=freeze_to, precompute=True, **kwargs)
        trainer.fit(1e-2, 1)
        return weights(trainer.model)

    new = "activation_checkpointing"  # since transformers 5.23
    name = new if new in inspect.signature(TrainingArguments).parameters else "gradient_checkpointing"
    plain = trained()
    torch.testing.assert_close(trained(**{name: True}), plain)


# ---- At any depth ----


@pytest.mark.parametrize("make_model", [lambda: None, tiny_vit], ids=["resnet", "vit"])
@pytest.mark.parametrize("frozen", [1, 2, 3])
def test_precompute_at_any_depth_trains_what_images_would(make_trainer, make_model, frozen):
    results = []
    for precompute in (True, False):
        trainer = make_trainer(make_model(), augment=None, n_groups=4, seed=3)
        before = weights(trainer.model)
        trainer.freeze_to(frozen)
        trainer.precompute = precompute
        trainer.fit([1e-3, 1e-3, 1e-2, 1e-2], 2, cycle_len=1)
        after = weights(trainer.model)
        still = {name for i in range(frozen) for name in trainer.layer_groups.parameter_names(i)}
        assert all(torch.equal(before[name], after[name]) for name in still)
        moved = {name for i in range(frozen, 4) for name in trainer.layer_groups.parameter_names(i)}
        assert not all(torch.equal(before[name], after[name]) for name in moved)
        results.append((losses(trainer, "loss"), losses(trainer), dict(trainer.model.named_parameters())))
    on_features, on_images = results
    assert on_features[0] == pytest.approx(on_images[0], rel=2e-2)
    assert on_features[1] == pytest.approx(on_images[1], rel=2e-2)
    torch.testing.assert_close(on_features[2], on_images[2], rtol=2e-2, atol=2e-2)


def test_a_partial_freeze_under_precompute_stores_what_the_frozen_part_gives(make_trainer, monkeypatch):
    trainer = make_trainer(precompute=True)
    trainer.freeze_to(1)
    assert trainer.precompute
    convolve, ran = torch.nn.functional.conv2d, []
    trainer.fit(1e-3, 1)  # features are stored
    monkeypatch.setattr(torch.nn.functional, "conv2d", lambda *args: (ran.append(args[1].shape), convolve(*args))[1])
    trainer.fit(1e-3, 1)
    assert tuple(trainer.model.timm_model.conv1[0].weight.shape) not in {tuple(shape) for shape in ran}
    assert np.isfinite(trainer.log_predictions()).all()
    assert trainer.lr_find(num_steps=8).history["loss"]


def test_a_depth_that_cannot_be_cut_is_refused_before_anything_is_frozen(make_trainer):
    trainer = make_trainer()
    names = [name for name, _ in trainer.model.named_parameters()]
    head = [name for name in names if ".fc." in name]
    early = [name for name in names if ".conv1." in name and "layer" not in name] + ["timm_model.bn1.bias"]
    rest = [name for name in names if name not in early + head]  # the weight of bn1 among them, whose bias is frozen
    trainer.layer_groups = LayerGroups(trainer.model, {"early": early, "rest": rest, "head": head})
    trainer.freeze()
    trainer.precompute = True
    with pytest.raises(ValueError, match="cannot be cut there"):
        trainer.freeze_to(1)
    assert trainer.precompute
    assert {name for name, value in trainer.model.named_parameters() if value.requires_grad} == set(head)
    trainer.fit(1e-2, 1)


def test_activations_are_not_shared_by_the_gpus_of_one_process(make_trainer, monkeypatch):
    trainer = make_trainer(precompute=True)
    monkeypatch.setattr(type(trainer.args), "n_gpu", 2)
    trainer.freeze_to(-1)
    with pytest.raises(ValueError, match=r"The 2 GPUs of one process .* \(accelerate launch --multi_gpu\)"):
        trainer.freeze_to(1)
    assert trainer.layer_groups.frozen == 2


def test_after_a_change_of_image_size_the_boundary_is_of_the_new_size(make_trainer):
    torch.manual_seed(0)
    swin = SwinForImageClassification(SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=[1, 1, 1], num_heads=[2, 2, 2], window_size=4,
        id2label={0: "cats", 1: "dogs"}, label2id={"cats": 0, "dogs": 1},
    ))  # fmt: skip
    trainer = make_trainer(swin, augment=None, freeze_to=1, precompute=True)
    trainer.fit(1e-3, 1)
    trainer.train_transform, trainer.eval_transform = image_transforms(trainer.model, image_size=64, augment=None)
    trainer.fit(1e-9, 1)
    on_features = losses(trainer)
    trainer.precompute = False
    assert on_features == pytest.approx([trainer.evaluate()["eval_loss"]], rel=1e-3)


# ---- Room on disk and in memory ----


def test_after_an_evaluation_in_bfloat16_features_are_extracted_as_before_it(make_trainer):
    solutions = []
    for evaluated in (False, True):
        trainer = make_trainer(bf16=True, precompute=True, feature_dtype="float32", folder=str(evaluated))
        if evaluated:
            trainer.evaluate()
            trainer.predict(trainer.eval_dataset)
        solutions.append(trainer.solve_head(strengths=[0.1]).weight)
        trainer.fit(1e-2, 1)
    torch.testing.assert_close(*solutions)


def test_a_loss_of_ones_own_reads_logits_as_of_any_model(make_trainer):
    def loss_of(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs.logits, labels)

    trainer = make_trainer(precompute=True, compute_loss_func=loss_of)
    trainer.fit(1e-2, 1)
    assert "eval_loss" in trainer.history.fits[-1]


def test_too_many_features_are_refused_with_their_size(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_SGDR_CACHE", str(tmp_path / "cache"))
    trainer = make_trainer(precompute=True, cache_disk_gb=1e-5, freeze_to=1)
    with pytest.raises(
        ValueError, match=r"would take 0\.\d+ GB on disk, more than cache_disk_gb=1e-05 allows: raise it"
    ):
        trainer.fit(1e-3, 1)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    trainer.args.cache_disk_gb = 50.0
    monkeypatch.setattr("hf_sgdr._utils.store.shutil.disk_usage", lambda folder: type("Usage", (), {"free": 10}))
    with pytest.raises(OSError, match=r"0\.00 GB free: make room, or set HF_SGDR_CACHE"):
        trainer.fit(1e-3, 1)


def test_a_store_that_is_nearly_whole_needs_room_for_the_rest_alone(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_SGDR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("hf_sgdr._utils.store.ROWS_PER_SHARD", 8)
    trainer = make_trainer(precompute=True)
    rows = trainer.features.training(trainer.train_dataset).views[0]
    next((tmp_path / "cache").rglob("shard-000001.safetensors")).unlink()
    monkeypatch.setattr(
        "hf_sgdr._utils.store.shutil.disk_usage", lambda _: type("Usage", (), {"free": rows.nbytes // 2})
    )
    again = make_trainer(precompute=True, folder="again")
    assert torch.equal(again.features.training(again.train_dataset).views[0], rows)


def test_features_that_do_not_fit_into_memory_train_the_same_from_disk(make_trainer, logs):
    results = []
    for budget in (None, 0.0):
        trainer = make_trainer(precompute=True, precompute_views=1, feature_memory_gb=budget)
        trainer.fit(1e-2, 3)
        results.append((losses(trainer, "loss"), weights(trainer.model)))
        assert ("they are read from disk, row by row" in logs.text) is (budget is not None)
    assert results[0][0] == results[1][0]
    assert same(results[0][1], results[1][1])


def test_memory_holds_no_more_features_than_its_budget(make_trainer):
    trainer = make_trainer(precompute=True, precompute_views=3, feature_dtype="float32")
    size = 26 * 4 * trainer.model.timm_model.fc.in_features / 1e9
    trainer.args.feature_memory_gb = 2.5 * size
    trainer.fit(1e-2, 1)
    assert not any(isinstance(rows, torch.Tensor) for rows in trainer.features.training(trainer.train_dataset).views)
    held = sum(rows.nbytes for rows in trainer.features._read.values() if isinstance(rows, torch.Tensor))
    assert 0 < held <= 2.5 * size * 1e9


# ---- Stored views ----


def test_stored_views_bring_augmentation_to_precompute(make_trainer, monkeypatch):
    trainer = make_trainer(precompute=True, precompute_views=2)
    extracted, taken = [], []
    original = PrecomputedFeatures._filled
    monkeypatch.setattr(
        PrecomputedFeatures,
        "_filled",
        lambda self, images, name, *args: (extracted.append(name), original(self, images, name, *args))[1],
    )
    training_step = trainer.training_step

    def noting(model, inputs, num_items=None):
        taken.append((int(trainer.state.epoch or 0), inputs["features"].sum().item()))
        return training_step(model, inputs, num_items)

    trainer.training_step = noting
    trainer.fit(1e-2, 6)
    assert extracted == ["train", "train, view 1 of 2", "train, view 2 of 2", "validation"]
    sums = [sum(total for epoch, total in taken if epoch == e) for e in range(6)]
    assert sums[:3] == pytest.approx(sums[3:], rel=1e-5)
    assert len({round(total, 2) for total in sums[:3]}) == 3
