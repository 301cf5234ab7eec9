import copy
import dataclasses
import gc
import inspect
import itertools
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Value
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    pipeline,
)

from hf_sgdr import (
    LayerGroups,
    SGDRTrainer,
    SGDRTrainingArguments,
    Stage,
    StagedUnfreezing,
    create_image_classifier,
    image_transforms,
    load_image_folder,
    run_stages,
)
from hf_sgdr.features.reader import PrecomputedFeatures

SIZE = 32


@pytest.fixture(scope="module")
def images(tmp_path_factory, make_image_folder):
    root = make_image_folder(
        tmp_path_factory.mktemp("images"), {"train": {"cats": 13, "dogs": 13}, "valid": {"cats": 5, "dogs": 6}}
    )
    return load_image_folder(root)


@pytest.fixture
def make_trainer(make_trainer, tiny_model):
    """On one model, whatever is made of it."""
    return lambda model=None, **kwargs: make_trainer(model or tiny_model, **kwargs)


class RateRecorder(TrainerCallback):
    def __init__(self):
        self.rates = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append([group["lr"] for group in optimizer.param_groups])


def cosine(step: int, steps: int) -> float:
    return (1 + math.cos(math.pi * step / steps)) / 2


def losses(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def bare(optimizer):
    """Without accelerate's wrapper, if it has one."""
    return getattr(optimizer, "optimizer", optimizer)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# ---- Cycles and rates ----


@pytest.mark.parametrize(
    ("cycle_len", "cycle_mult", "cycles", "accumulation"),
    [(1, 1, 2, 1), (1, 2, 2, 1), (2, 1, 1, 2), (1, 2, 2, 3), (2, 2, 1, 4)],
)
def test_every_group_follows_the_formula_at_every_step(make_trainer, cycle_len, cycle_mult, cycles, accumulation):
    recorder = RateRecorder()
    trainer = make_trainer(
        callbacks=[recorder], gradient_accumulation_steps=accumulation, eval_strategy="no", freeze_to=0
    )
    rates = [1e-5, 1e-4, 1e-3]
    trainer.fit(rates, cycles, cycle_len=cycle_len, cycle_mult=cycle_mult)
    steps_per_epoch = math.ceil(math.ceil(26 / 8) / accumulation)
    expected = []
    for cycle in range(cycles):
        steps = cycle_len * cycle_mult**cycle * steps_per_epoch
        expected += [[rate * cosine(step, steps) for rate in rates] for step in range(steps)]
    assert len(recorder.rates) == len(expected)
    np.testing.assert_allclose(recorder.rates, expected, rtol=1e-12)


def test_three_cycles_that_double_are_seven_epochs_with_restarts_after_one_and_three(make_trainer):
    recorder = RateRecorder()
    trainer = make_trainer(callbacks=[recorder], precompute=True)
    trainer.fit(1e-2, 3, cycle_len=1, cycle_mult=2)
    assert trainer.state.epoch == 7
    steps_per_epoch = trainer.state.max_steps // 7
    heads = [rates[-1] for rates in recorder.rates]
    restarts = [step for step, (before, after) in enumerate(itertools.pairwise(heads), 1) if after > before]
    assert restarts == [steps_per_epoch, 3 * steps_per_epoch] == trainer.schedule.restarts


def test_without_cycle_len_the_rate_is_constant(make_trainer):
    recorder = RateRecorder()
    trainer = make_trainer(callbacks=[recorder], precompute=True)
    trainer.fit(3e-3, 2)
    assert trainer.state.epoch == 2
    assert {rates[-1] for rates in recorder.rates} == {3e-3}


def test_train_obeys_the_arguments(make_trainer):
    recorder = RateRecorder()
    trainer = make_trainer(
        callbacks=[recorder],
        eval_strategy="no",
        cycle_len=1,
        cycle_mult=2,
        num_cycles=2,
        group_learning_rates=[1e-4, 1e-3, 1e-2],
        freeze_to=1,
    )
    before = weights(trainer.model)
    trainer.train()
    assert trainer.state.epoch == 3
    assert recorder.rates[0] == [1e-4, 1e-3, 1e-2]
    after = trainer.model.state_dict()
    changed = [
        any(not torch.equal(before[name], after[name]) for name in trainer.layer_groups.parameter_names(i))
        for i in range(3)
    ]
    assert changed == [False, True, True]


def test_every_groups_rate_is_logged_and_plotted(make_trainer):
    trainer = make_trainer(freeze_to=0)
    trainer.fit([1e-5, 1e-4, 1e-3], 1, cycle_len=1)
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    last = cosine(3, 4)
    assert entry["learning_rate/head"] == entry["learning_rate"] == pytest.approx(1e-3 * last)
    assert entry["learning_rate/middle"] == pytest.approx(1e-4 * last)
    assert entry["learning_rate/early"] == pytest.approx(1e-5 * last)
    ax = trainer.plot_lr()
    assert [line.get_label() for line in ax.lines] == ["early", "middle", "head"]
    assert len(ax.lines[0].get_xdata()) == 4


def test_the_optimizer_is_sgd_with_momentum_and_new_for_each_fit(make_trainer):
    trainer = make_trainer(precompute=True)
    trainer.fit(1e-2, 1)
    first = bare(trainer.optimizer)
    assert isinstance(first, torch.optim.SGD)
    assert first.param_groups[0]["momentum"] == 0.9
    trainer.fit(1e-2, 1)
    assert bare(trainer.optimizer) is not first


def test_adamw_is_one_argument_away(make_trainer):
    trainer = make_trainer(precompute=True, optim="adamw_torch")
    trainer.fit(1e-3, 1)
    assert isinstance(bare(trainer.optimizer), torch.optim.AdamW)


def test_a_given_optimizer_class_trains_at_the_rates_of_the_fit(make_trainer):
    trainer = make_trainer(precompute=True, optimizer_cls_and_kwargs=(torch.optim.Adam, {"lr": 1e-5, "eps": 1e-4}))
    trainer.fit(1e-2, 1)
    group = bare(trainer.optimizer).param_groups[0]
    assert (type(bare(trainer.optimizer)), group["lr"], group["eps"]) == (torch.optim.Adam, 1e-2, 1e-4)


class Batches:
    """As many batches as an epoch has on one of several processes."""

    def __init__(self, images, batch, processes):
        self.count = math.ceil(images / (batch * processes))

    def __len__(self):
        return self.count


SCHEDULES = list(
    itertools.product((1, 2, 3), (1, 2, 3), (1, 3), ((640, 64), (601, 16), (23000, 64)), (1, 2, 5), (1, 4))
)


def test_cycles_are_whole_optimizer_steps_for_all_lengths_accumulations_and_process_counts(make_trainer):
    trainer = make_trainer(freeze_to=0)
    rates = [1e-4, 1e-3, 1e-2]
    assert len(SCHEDULES) >= 100
    for cycle_len, cycle_mult, cycles, (images, batch), accumulation, processes in SCHEDULES:
        args = trainer.args
        args.cycle_len, args.cycle_mult, args.num_cycles = cycle_len, cycle_mult, cycles
        args.gradient_accumulation_steps, args.group_learning_rates = accumulation, rates
        args.num_train_epochs = args.total_epochs
        values = trainer.set_initial_training_values(args, Batches(images, batch, processes))
        trainer.optimizer = trainer.lr_scheduler = None
        trainer.create_optimizer()
        scheduler = trainer.create_scheduler(values[-1])
        steps_per_epoch = math.ceil(math.ceil(images / (batch * processes)) / accumulation)
        epochs = cycle_len * sum(cycle_mult**k for k in range(cycles))
        assert values[-1] == scheduler.schedule.total_steps == epochs * steps_per_epoch
        step, expected = 0, []
        for cycle in range(cycles):
            steps = cycle_len * cycle_mult**cycle * steps_per_epoch
            probes = sorted({0, 1 % steps, steps // 3, steps - 1})
            expected += [(step + i, cosine(i, steps)) for i in probes]
            step += steps
        for at, multiplier in expected:
            scheduler.last_epoch = at
            assert scheduler.get_lr() == [rate * multiplier for rate in rates]


# ---- Freezing ----


def test_only_the_head_trains_at_first_and_the_body_stands_still(make_trainer):
    trainer = make_trainer()
    before = weights(trainer.model)
    trainer.fit(1e-2, 1)
    after = trainer.model.state_dict()
    head = set(trainer.layer_groups.parameter_names(-1))
    for name in before:  # batch-norm statistics among them
        assert torch.equal(before[name], after[name]) == (name not in head), name


def test_unfrozen_batch_norms_move_unless_they_are_kept_still(make_trainer):
    trainer = make_trainer(freeze_to=0)
    statistics = [name for name in weights(trainer.model) if name.endswith("running_mean")]
    before = weights(trainer.model)
    trainer.layer_groups.freeze_batch_norm = True
    trainer.fit(1e-4, 1)
    assert all(torch.equal(before[name], trainer.model.state_dict()[name]) for name in statistics)
    trainer.layer_groups.freeze_batch_norm = False
    trainer.fit(1e-4, 1)
    assert not any(torch.equal(before[name], trainer.model.state_dict()[name]) for name in statistics)


def test_unfreezing_switches_precompute_off(make_trainer):
    trainer = make_trainer(precompute=True)
    trainer.unfreeze()
    assert not trainer.precompute
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())
    with pytest.raises(ValueError, match=r"Nothing is frozen, so there is nothing to precompute: call freeze\(\)"):
        trainer.precompute = True
    trainer.freeze()
    trainer.precompute = True


# ---- Precompute ----


def test_the_whole_model_has_the_trained_head_and_the_same_validation_loss(make_trainer):
    trainer = make_trainer(precompute=True)
    model = trainer.model
    before = weights(model)
    trainer.fit(1e-1, 2)
    assert trainer.model is model
    assert not torch.equal(before["timm_model.fc.weight"], model.timm_model.fc.weight)
    while_training = losses(trainer, "eval_loss")[-1]
    trainer.precompute = False
    assert trainer.evaluate()["eval_loss"] == pytest.approx(while_training, abs=1e-6)


def test_training_on_features_is_training_the_head_on_unaugmented_images(make_trainer):
    trained = []
    for precompute in (True, False):
        trainer = make_trainer(augment=None, precompute=precompute, seed=3)
        trainer.train_transform = trainer.eval_transform
        torch.manual_seed(11)
        nn.init.normal_(trainer.model.timm_model.fc.weight, std=0.02)
        nn.init.zeros_(trainer.model.timm_model.fc.bias)
        trainer.fit(1e-2, 2, cycle_len=1)
        trained.append((weights(trainer.model), losses(trainer, "loss"), losses(trainer, "eval_loss")))
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


def test_augmentation_with_precompute_is_warned_about(make_trainer, caplog):
    from transformers.utils import logging

    trainer = make_trainer()
    logging.enable_propagation()
    try:
        trainer.precompute = True
    finally:
        logging.disable_propagation()
    assert "Augmentation has no effect with precompute" in caplog.text


def tiny_vit():
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, image_size=SIZE, patch_size=8,
        id2label={0: "cats", 1: "dogs"}, label2id={"cats": 0, "dogs": 1},
    )  # fmt: skip
    return ViTForImageClassification(config)


def tiny_resnet():
    torch.manual_seed(0)
    return create_image_classifier("test_resnet", labels=["cats", "dogs"], pretrained=False)


@pytest.mark.parametrize("make_model", [tiny_resnet, tiny_vit])
@pytest.mark.parametrize("frozen", [1, 2, 3])
def test_precompute_at_any_depth_trains_what_images_would(make_trainer, make_model, frozen):
    results = []
    for precompute in (True, False):
        trainer = make_trainer(model=make_model(), augment=None, n_groups=4, seed=3)
        before = weights(trainer.model)
        trainer.freeze_to(frozen)
        trainer.precompute = precompute
        trainer.fit([1e-3, 1e-3, 1e-2, 1e-2], 2, cycle_len=1)
        after = weights(trainer.model)
        still = {name for i in range(frozen) for name in trainer.layer_groups.parameter_names(i)}
        assert all(torch.equal(before[name], after[name]) for name in still)
        moved = {name for i in range(frozen, 4) for name in trainer.layer_groups.parameter_names(i)}
        assert not all(torch.equal(before[name], after[name]) for name in moved)
        parameters = dict(trainer.model.named_parameters())
        results.append((losses(trainer, "loss"), losses(trainer, "eval_loss"), parameters))
    (on_features, *_), (on_images, *_) = results
    assert on_features == pytest.approx(on_images, rel=2e-2)
    assert results[0][1] == pytest.approx(results[1][1], rel=2e-2)
    for name, value in results[0][2].items():
        torch.testing.assert_close(value, results[1][2][name], rtol=2e-2, atol=2e-2)


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


def tiny_swin():
    torch.manual_seed(0)
    return SwinForImageClassification(SwinConfig(
        image_size=SIZE, patch_size=2, embed_dim=16, depths=[1, 1, 1], num_heads=[2, 2, 2], window_size=4,
        id2label={0: "cats", 1: "dogs"}, label2id={"cats": 0, "dogs": 1},
    ))  # fmt: skip


def test_after_a_change_of_image_size_the_boundary_is_of_the_new_size(make_trainer):
    trainer = make_trainer(tiny_swin(), augment=None, freeze_to=1, precompute=True)
    trainer.fit(1e-3, 1)
    trainer.train_transform, trainer.eval_transform = image_transforms(trainer.model, image_size=2 * SIZE, augment=None)
    trainer.fit(1e-9, 1)
    on_features = losses(trainer, "eval_loss")
    trainer.precompute = False
    assert on_features == pytest.approx([trainer.evaluate()["eval_loss"]], rel=1e-3)


@pytest.mark.parametrize(("given", "recorded"), [(2, -1), (-1, -1), (1, 1), (-2, 1), (0, 0), (-3, 0)])
def test_what_trained_is_recorded_in_one_form(make_trainer, given, recorded):
    trainer = make_trainer(freeze_to=given)
    trainer.fit(1e-2, 1)
    assert trainer.history.fits[0]["freeze_to"] == trainer.history.recipe()[0].freeze_to == recorded
    results = run_stages(trainer, [Stage("once", lr=1e-2, cycles=1, freeze_to=given)])
    assert results.stages[0]["freeze_to"] == recorded


@pytest.mark.parametrize("freeze_to", [1, -1])
def test_precompute_goes_with_activation_checkpointing(make_trainer, freeze_to):
    def trained(**kwargs):
        trainer = make_trainer(tiny_vit(), freeze_to=freeze_to, precompute=True, **kwargs)
        trainer.fit(1e-2, 1)
        return weights(trainer.model)

    new = "activation_checkpointing"  # since transformers 5.23
    name = new if new in inspect.signature(TrainingArguments).parameters else "gradient_checkpointing"
    plain = trained()
    for key, value in trained(**{name: True}).items():
        torch.testing.assert_close(value, plain[key])


def test_unfreezing_on_a_stock_trainer_after_ours_moves_all_batch_norms(make_trainer, tiny_model, tmp_path):
    make_trainer(freeze_batch_norm=True)
    for parameter in tiny_model.parameters():
        parameter.requires_grad_(True)
    before = weights(tiny_model)
    rows = [{"pixel_values": torch.randn(3, SIZE, SIZE), "labels": i % 2} for i in range(8)]
    arguments = TrainingArguments(
        str(tmp_path / "stock"), num_train_epochs=2, use_cpu=True, report_to="none", save_strategy="no"
    )
    Trainer(tiny_model, arguments, train_dataset=rows, callbacks=[StagedUnfreezing({0: "head", 1: "early"})]).train()
    still = [key for key, value in weights(tiny_model).items() if "running_" in key and torch.equal(value, before[key])]
    assert still == []


def test_too_many_features_are_refused_with_the_figure(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_SGDR_CACHE", str(tmp_path / "cache"))
    trainer = make_trainer(precompute=True, cache_disk_gb=1e-5, freeze_to=1)
    with pytest.raises(
        ValueError, match=r"would take 0\.\d+ GB on disk, more than cache_disk_gb=1e-05 allows: raise it"
    ):
        trainer.fit(1e-3, 1)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    trainer.args.cache_disk_gb = 50.0
    monkeypatch.setattr("hf_sgdr._utils.store.shutil.disk_usage", lambda place: type("Usage", (), {"free": 10}))
    with pytest.raises(OSError, match=r"0\.00 GB free: make room, or set HF_SGDR_CACHE"):
        trainer.fit(1e-3, 1)


def test_features_that_do_not_fit_into_memory_train_the_same_from_disk(make_trainer, caplog):
    from transformers.utils import logging

    results = []
    for budget in (None, 0.0):
        trainer = make_trainer(model=tiny_resnet(), precompute=True, precompute_views=1, feature_memory_gb=budget)
        logging.enable_propagation()
        try:
            trainer.fit(1e-2, 3)
        finally:
            logging.disable_propagation()
        results.append((losses(trainer, "loss"), weights(trainer.model)))
        assert ("they are read from disk, row by row" in caplog.text) is (budget is not None)
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[0][1][name], results[1][1][name]) for name in results[0][1])


def test_memory_holds_no_more_features_than_its_budget(make_trainer):
    size = 26 * 4 * tiny_resnet().timm_model.fc.in_features / 1e9
    trainer = make_trainer(precompute=True, precompute_views=3, feature_memory_gb=2.5 * size)
    trainer.fit(1e-2, 1)
    held = sum(rows.nbytes for rows in trainer.features._read.values() if isinstance(rows, torch.Tensor))
    assert 0 < held <= 2.5 * size * 1e9


def test_stored_views_bring_augmentation_to_precompute(make_trainer, monkeypatch):
    trainer = make_trainer(precompute=True, precompute_views=2)
    extracted, taken = [], []
    original = PrecomputedFeatures._rows
    monkeypatch.setattr(
        PrecomputedFeatures,
        "_rows",
        lambda self, images, name, dtype: (extracted.append(name), original(self, images, name, dtype))[1],
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


def test_views_without_augmentation_are_refused(make_trainer):
    trainer = make_trainer(precompute_views=2)
    trainer.train_transform = trainer.eval_transform
    with pytest.raises(ValueError, match="precompute_views=2 needs a training transform that augments"):
        trainer.precompute = True


def test_of_several_rates_the_head_takes_the_last(make_trainer):
    trainer = make_trainer(precompute=True)
    trainer.fit([1e-4, 1e-3, 1e-2], 1)
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [1e-2]


# ---- Resuming ----


class KilledError(Exception):
    pass


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KilledError


@pytest.mark.parametrize(
    ("values", "save_steps", "killed_at"),
    [
        ({"freeze_to": 0}, 3, 5),  # in the middle of the first epoch
        ({"freeze_to": 0}, 4, 6),  # at its end
        ({"freeze_to": 0}, 5, 7),  # in the middle of the second
        ({"freeze_to": 0, "gradient_accumulation_steps": 2}, 3, 4),
        ({"precompute": True}, 5, 6),
        ({"precompute": True, "precompute_views": 2}, 6, 8),
    ],
)
def test_a_resumed_run_ends_with_the_same_weights(make_trainer, values, save_steps, killed_at):
    start = None
    ends = []
    for kill in (None, killed_at, "resume"):
        trainer = make_trainer(
            callbacks=[KillAt(kill)] if isinstance(kill, int) else None,
            **{**values, "num_cycles": 2, "cycle_mult": 2, "save_strategy": "steps", "save_steps": save_steps},
        )
        start = start or weights(trainer.model)
        trainer.model.load_state_dict(start)
        if isinstance(kill, int):
            shutil.rmtree(trainer.args.output_dir)
            with pytest.raises(KilledError):
                trainer.train()
        else:
            trainer.train(resume_from_checkpoint=kill == "resume")
            ends.append((weights(trainer.model), trainer.state.global_step))
    (whole, steps), (resumed, resumed_steps) = ends
    assert resumed_steps == steps
    assert any(not torch.equal(start[name], whole[name]) for name in start)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_augmentation_differs_from_epoch_to_epoch(make_trainer, monkeypatch):
    trainer = make_trainer()
    seen = []
    original = trainer.training_step

    def noting(model, inputs, num_items=None):
        seen.append((int(trainer.state.epoch or 0), float(inputs["pixel_values"].double().sum())))
        return original(model, inputs, num_items)

    trainer.training_step = noting
    trainer.fit(1e-3, 2)
    sums = [sum(value for epoch, value in seen if epoch == e) for e in (0, 1)]
    assert sums[0] != sums[1]


# ---- The range test ----


@pytest.mark.parametrize("precompute", [True, False])
def test_training_is_identical_with_and_without_lr_find_before(make_trainer, precompute):
    trained = []
    for find in (False, True):
        torch.manual_seed(5)
        trainer = make_trainer(precompute=precompute)
        torch.manual_seed(6)
        nn.init.normal_(trainer.model.timm_model.fc.weight, std=0.02)
        nn.init.zeros_(trainer.model.timm_model.fc.bias)
        if find:
            result = trainer.lr_find(1e-5, 10, 12)
            assert len(result.history["lr"]) > 3
        trainer.fit(1e-2, 1, cycle_len=1)
        trained.append(weights(trainer.model))
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


def test_lr_find_keeps_the_ratios_it_is_given(make_trainer):
    trainer = make_trainer(freeze_to=0)
    result = trainer.lr_find(1e-5, 1e-2, 4, group_learning_rates=[1e-4, 1e-3, 1e-2])
    for lr, rates in zip(result.history["lr"], result.history["learning_rates"], strict=True):
        assert rates == pytest.approx([lr / 100, lr / 10, lr])
    assert result.group_names == ["early", "middle", "head"]
    assert trainer.optimizer is None


# ---- Predictions ----


def test_log_predictions_are_in_the_data_sets_order(make_trainer, images):
    trainer = make_trainer(per_device_eval_batch_size=4)
    log_predictions = trainer.log_predictions()
    assert log_predictions.shape == (11, 2)
    np.testing.assert_allclose(np.exp(log_predictions).sum(axis=1), 1, rtol=1e-5)
    with torch.inference_mode():
        alone = [
            trainer.model.eval()(trainer.eval_transform(image)[None]).logits.log_softmax(-1)[0].numpy()
            for image in images["validation"]["image"]
        ]
    np.testing.assert_allclose(log_predictions, alone, atol=1e-5)


def test_the_logged_loss_is_the_mean_over_images_also_with_a_short_last_batch(make_trainer, images):
    trainer = make_trainer(per_device_eval_batch_size=4)
    labels = np.asarray(images["validation"]["label"])
    log_predictions = trainer.log_predictions()
    expected = -log_predictions[np.arange(len(labels)), labels].mean()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-5)


def test_tta_averages_probabilities_and_beta_weighs_the_plain_image(make_trainer):
    trainer = make_trainer()
    plain = np.exp(trainer.log_predictions())
    np.testing.assert_array_equal(trainer.tta(n_aug=0), plain)
    all_alike = trainer.tta(n_aug=2)
    augmented = (3 * all_alike - plain) / 2
    assert np.abs(augmented - plain).max() > 1e-6
    np.testing.assert_allclose(trainer.tta(n_aug=2, beta=0.25), 0.25 * plain + 0.75 * augmented, atol=1e-6)
    np.testing.assert_allclose(trainer.tta(n_aug=2, beta=1.0), plain, atol=1e-7)
    np.testing.assert_array_equal(trainer.tta(n_aug=2), all_alike)  # the views are seeded


def test_tta_without_a_training_transform_is_refused(make_trainer, tiny_model):
    trainer = make_trainer()
    trainer.train_transform = trainer.eval_transform
    with pytest.raises(ValueError, match=r"tta\(n_aug=4\) needs a training transform that augments"):
        trainer.tta()


def test_unlabelled_images_can_be_predicted(make_trainer, tmp_path, make_image_folder):
    root = make_image_folder(
        tmp_path / "with_test", {"train": {"cats": 3, "dogs": 3}, "valid": {"cats": 1, "dogs": 1}, "test": {"": 4}}
    )
    trainer = make_trainer()
    assert trainer.log_predictions(load_image_folder(root)["test"]).shape == (4, 2)


# ---- What is saved ----


def test_a_saved_model_is_stock_and_gives_the_same_probabilities(make_trainer, images, tmp_path):
    trainer = make_trainer(precompute=True)
    trainer.fit(1e-1, 1)
    folder = tmp_path / "saved"
    trainer.save_model(str(folder))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [3, SIZE, SIZE]
    assert config["hf_sgdr"] == {"augment": "side_on", "max_zoom": 1.1}
    ours = np.exp(trainer.log_predictions())
    stock = pipeline("image-classification", model=str(folder), device="cpu")
    for answer, probabilities in zip(stock(list(images["validation"]["image"])), ours, strict=True):
        scores = {entry["label"]: entry["score"] for entry in answer}
        np.testing.assert_allclose([scores["cats"], scores["dogs"]], probabilities, atol=1e-4)


def test_a_vision_transformer_of_transformers_goes_the_whole_way(make_trainer, images, tmp_path):
    trainer = make_trainer(model=tiny_vit(), precompute=True)
    trainer.fit(1e-2, 1)
    trainer.unfreeze()
    trainer.fit([1e-4, 1e-3, 1e-2], 1, cycle_len=1)
    trainer.save_model(str(tmp_path / "vit"))
    ours = np.exp(trainer.log_predictions())
    stock = pipeline("image-classification", model=str(tmp_path / "vit"), device="cpu")
    for answer, probabilities in zip(stock(list(images["validation"]["image"])), ours, strict=True):
        scores = {entry["label"]: entry["score"] for entry in answer}
        np.testing.assert_allclose([scores["cats"], scores["dogs"]], probabilities, atol=1e-4)


# ---- What is shown ----


def test_the_epoch_table_has_a_line_an_epoch(make_trainer, capsys):
    trainer = make_trainer(precompute=True)
    capsys.readouterr()
    trainer.fit(1e-2, 2)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    header, *table = [line for line in lines if line[0] in ("epoch", "1", "2")]
    assert " ".join(header) == "epoch train loss valid loss accuracy lr (head) time"
    assert [line[0] for line in table] == ["1", "2"]
    assert [float(line[2]) for line in table] == pytest.approx(losses(trainer, "eval_loss"), abs=1e-4)
    assert {line[4] for line in table} == {"1.00e-02"}


def test_the_epoch_table_shows_metrics_called_loss_and_the_losses_of_several_sets(make_trainer, images, capsys):
    sets = {"a": images["validation"], "b": images["validation"].select(range(4))}
    trainer = make_trainer(
        precompute=True,
        eval_dataset=sets,
        compute_metrics=lambda predicted: {"accuracy": 0.5, "log_loss": 0.25, "loss_per_second": 0.125},
    )
    capsys.readouterr()
    trainer.fit(1e-2, 2)
    header, *lines = capsys.readouterr().out.splitlines()
    names = ["a_loss", "a_accuracy", "a_log_loss", "a_loss_per_second", "b_loss", "b_accuracy", "b_log_loss"]
    assert header.split() == ["epoch", "train", "loss", *names, "b_loss_per_second", "lr", "(head)", "time"]
    assert [line.split()[0] for line in lines] == ["1", "2"]
    assert [float(line.split()[2]) for line in lines] == pytest.approx(losses(trainer, "eval_a_loss"), abs=1e-4)
    assert [float(line.split()[6]) for line in lines] == pytest.approx(losses(trainer, "eval_b_loss"), abs=1e-4)
    trainer = make_trainer(precompute=True, compute_metrics=lambda predicted: {"log_loss": 0.25})
    trainer.fit(1e-2, 1)
    assert capsys.readouterr().out.splitlines()[1].split()[2:4] == [f"{losses(trainer, 'eval_loss')[0]:.4f}", "0.2500"]


# ---- Arguments ----


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_train_epochs": 5}, "num_train_epochs=5, but cycle_len=1, cycle_mult=1, num_cycles=3 are 3 epochs"),
        ({"cycle_mult": 0}, "cycle_mult=0: must be an integer >= 1."),
        ({"cycle_len": 1.5}, "cycle_len=1.5: must be an integer >= 1."),
        ({"hub_token": "secret"}, "hub_token is not taken as an argument"),
        ({"precompute": True, "freeze_to": 0}, "precompute=True with freeze_to=0"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0: give a finite number above 0."),
        ({"learning_rate": math.nan}, "learning_rate=nan: give a finite number above 0."),
        ({"momentum": 1.0}, "momentum=1.0: give a number from 0 to below 1."),
        ({"feature_dtype": "int8"}, "feature_dtype='int8': give auto, float32 or bfloat16."),
    ],
)
def test_wrong_arguments_are_refused(tmp_path, values, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as error:
        SGDRTrainingArguments(str(tmp_path), use_cpu=True, **values)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda trainer: trainer.fit([1e-3, 1e-2], 1), "2 learning rates for 3 layer groups (early, middle, head)"),
        (lambda trainer: trainer.fit(1e-2, 0), "cycles=0: must be an integer >= 1."),
        (lambda trainer: trainer.fit(1e-2, 1, cycle_mult=2), "cycle_mult=2 needs cycle_len"),
        (lambda trainer: trainer.fit(math.nan, 1), "Learning rates nan: each must be a finite number"),
        (lambda trainer: trainer.freeze_to(3), "freeze_to(3): there are 3 layer groups (early, middle, head)"),
        (lambda trainer: trainer.tta(beta=2.0), "beta=2.0: give the plain image's weight, from 0 to 1."),
        (lambda trainer: trainer.plot_lr(), "plot_lr() shows the rates of the last fit"),
    ],
)
def test_wrong_calls_are_refused_before_any_work(make_trainer, call, message):
    trainer = make_trainer()
    before = weights(trainer.model)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as error:
        call(trainer)
    assert str(error.value).startswith(message)
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())


def test_cycles_changed_after_construction_say_how_long_training_is(make_trainer):
    trainer = make_trainer(precompute=True, num_cycles=1)
    trainer.args.num_cycles = 3
    trainer.train()
    assert trainer.state.epoch == 3
    assert trainer.schedule.num_cycles == 3
    trainer.args.num_cycles = np.int64(2)
    trainer.train()
    assert trainer.state.epoch == 2


def test_arguments_can_be_replaced_without_epochs_that_nobody_gave(tmp_path):
    args = SGDRTrainingArguments(str(tmp_path), use_cpu=True)
    assert args.num_train_epochs == 3
    assert dataclasses.replace(args, num_cycles=5).num_train_epochs == 5
    given = SGDRTrainingArguments(str(tmp_path), use_cpu=True, num_train_epochs=3)
    with pytest.raises(ValueError, match=r"num_train_epochs=3, but .*num_cycles=5 are 5 epochs"):
        dataclasses.replace(given, num_cycles=5)


def test_epochs_given_after_construction_must_agree_too(make_trainer):
    trainer = make_trainer(precompute=True)
    trainer.args.num_train_epochs = 5
    with pytest.raises(
        ValueError, match="num_train_epochs=5, but cycle_len=1, cycle_mult=1, num_cycles=3 are 3 epochs"
    ):
        trainer.train()


def test_numpys_integers_are_taken_for_cycles(make_trainer, tmp_path):
    trainer = make_trainer(precompute=True)
    trainer.fit(1e-2, np.int64(1), cycle_len=np.int64(1), cycle_mult=np.int32(2))
    assert json.loads(json.dumps(trainer.history.fits[-1]))["cycles"] == 1
    assert json.loads(SGDRTrainingArguments(str(tmp_path), num_cycles=np.int64(2)).to_json_string())["num_cycles"] == 2


# ---- An optimizer of one's own ----


def test_a_given_optimizer_trains_at_the_rates_of_the_fit(make_trainer, images, tiny_model):
    recorder = RateRecorder()
    optimizer = torch.optim.SGD(tiny_model.parameters(), lr=1e-3)
    trainer = make_trainer(optimizers=(optimizer, None), callbacks=[recorder], freeze_to=0)
    assert trainer.lr_find(1e-4, 1e-2, 4, group_learning_rates=0.5).history["lr"]
    assert (optimizer.param_groups[0]["lr"], "initial_lr" in optimizer.param_groups[0]) == (1e-3, False)
    trainer.fit(0.05, 1, cycle_len=1)
    assert [rates[-1] for rates in recorder.rates] == [0.05 * cosine(step, 4) for step in range(4)]
    assert trainer.history.fits[-1]["learning_rates"] == [0.05] * 3
    trainer.fit(0.02, 1)  # the last fit's rates are forgotten
    assert recorder.rates[-1] == [0.02]
    assert trainer.lr_find(1e-4, 1e-2, 4, group_learning_rates=0.5).history["lr"]
    assert optimizer.param_groups[0]["lr"] == 0.02


def test_a_given_optimizers_groups_get_the_rates_of_their_layer_groups(make_trainer, tiny_model):
    recorder = RateRecorder()
    groups = LayerGroups.from_model(tiny_model)
    optimizer = torch.optim.SGD(list(reversed(groups.param_groups(1.0, weight_decay=1e-4))), lr=1.0)
    trainer = make_trainer(optimizers=(optimizer, None), callbacks=[recorder], layer_groups=groups, freeze_to=0)
    trainer.fit([1e-4, 1e-3, 1e-2], 1)
    assert recorder.rates[0] == [1e-2, 1e-2, 1e-3, 1e-3, 1e-4, 1e-4]
    assert trainer.history.fits[-1]["learning_rates"] == [1e-4, 1e-3, 1e-2]


def test_what_a_given_optimizer_cannot_be_told_is_refused_before_any_work(make_trainer, tiny_model):
    optimizer = torch.optim.SGD(tiny_model.parameters(), lr=1e-3)
    trainer = make_trainer(optimizers=(optimizer, None))
    with pytest.raises(ValueError, match=r"Parameter group 0 of the given optimizer holds parameters of early, middle"):
        trainer.fit([1e-4, 1e-3, 1e-2], 1)
    stranger = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-3)
    with pytest.raises(ValueError, match=r"holds parameters of no layer group, so it cannot have the rates"):
        make_trainer(optimizers=(stranger, None)).fit(1e-2, 1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    with pytest.raises(ValueError, match=r"was given a LambdaLR, which decides the rates: give optimizers="):
        make_trainer(optimizers=(optimizer, scheduler)).fit(1e-2, 1)


def test_train_leaves_a_given_optimizer_its_rates_and_records_them(make_trainer, tiny_model):
    groups = LayerGroups.from_model(tiny_model)
    optimizer = torch.optim.SGD(groups.parameters(-1), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    trainer = make_trainer(optimizers=(optimizer, scheduler), num_cycles=1, precompute=True)
    trainer.train()
    assert trainer.history.fits[-1]["learning_rates"] == [0.0, 0.0, 1.5e-3]


# ---- The best epoch ----


class Worsen(TrainerCallback):
    """After two epochs the head goes uphill."""

    def on_epoch_begin(self, args, state, control, optimizer=None, **kwargs):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 if (state.epoch or 0) < 2 else -1e-1


@pytest.mark.parametrize("precompute", [True, False])
def test_keep_best_ends_with_the_weights_of_the_lowest_validation_loss(make_trainer, precompute, capsys):
    trainer = make_trainer(precompute=precompute, callbacks=[Worsen()])
    trainer.fit(1e-2, 4, keep_best=True)
    figures, history = trainer.history.fits[-1], losses(trainer, "eval_loss")
    best = history.index(min(history))
    assert best < 3
    assert figures["best_epoch"] == figures["kept"]["epoch"] == best + 1
    assert figures["eval_loss"] == history[-1] > min(history) == figures["kept"]["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(history), rel=1e-4)
    assert f"best: epoch {best + 1}, valid loss {min(history):.4f}" in capsys.readouterr().out


def test_without_keep_best_the_last_weights_stay_and_the_table_says_which_epoch_was_best(make_trainer, capsys):
    trainer = make_trainer(precompute=True, callbacks=[Worsen()])
    trainer.fit(1e-2, 4)
    history = losses(trainer, "eval_loss")
    assert history[-1] > min(history)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(history[-1], rel=1e-4)
    assert trainer.history.fits[-1]["kept"]["eval_loss"] == history[-1]
    assert capsys.readouterr().out.count(f"best: epoch {1 + history.index(min(history))}, valid loss") == 1


def test_a_resumed_fit_keeps_the_best_of_what_was_before(make_trainer):
    ends = []
    for kill in (None, 10, "resume"):
        callbacks = [Worsen(), KillAt(kill)] if isinstance(kill, int) else [Worsen()]
        trainer = make_trainer(model=tiny_resnet(), callbacks=callbacks, precompute=True, save_strategy="epoch")
        if isinstance(kill, int):
            shutil.rmtree(trainer.args.output_dir)
            with pytest.raises(KilledError):
                trainer.fit(1e-2, 4, keep_best=True)
        else:
            trainer.fit(1e-2, 4, keep_best=True, resume_from_checkpoint=kill == "resume")
            ends.append((trainer.history.fits[-1]["kept"], weights(trainer.model)))
    assert ends[0][0] == ends[1][0]
    assert ends[0][0]["epoch"] <= 2
    assert all(torch.equal(value, ends[1][1][name]) for name, value in ends[0][1].items())


def test_keep_best_without_a_validation_loss_is_refused(make_trainer):
    with pytest.raises(ValueError, match="keep_best=True compares validation losses: it needs an eval_strategy"):
        make_trainer(eval_strategy="no").fit(1e-2, 1, keep_best=True)


# ---- Transforms ----


def test_what_is_saved_is_the_transform_that_evaluation_uses(make_trainer, images, tmp_path):
    trainer = make_trainer(precompute=True)
    trainer.fit(1e-2, 1)
    before = trainer.log_predictions()
    _, trainer.eval_transform = image_transforms(trainer.model, image_size=48)
    trainer.train_transform = image_transforms(trainer.model, image_size=48, augment="basic", max_zoom=1.2)[0]
    assert np.abs(trainer.log_predictions() - before).max() > 0
    trainer.fit(1e-2, 1)
    trainer.save_model(str(tmp_path / "saved"))
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [3, 48, 48]
    assert config["hf_sgdr"] == {"augment": "basic", "max_zoom": 1.2}
    stock = pipeline("image-classification", model=str(tmp_path / "saved"), device="cpu")
    ours = np.exp(trainer.log_predictions())
    for answer, probabilities in zip(stock(list(images["validation"]["image"])), ours, strict=True):
        scores = {entry["label"]: entry["score"] for entry in answer}
        np.testing.assert_allclose([scores["cats"], scores["dogs"]], probabilities, atol=1e-4)


def test_another_transform_is_saved_with_a_model_of_transformers_too(make_trainer, tmp_path):
    trainer = make_trainer(model=tiny_vit())
    mean = (0.1, 0.2, 0.3)
    transform = trainer.eval_transform
    trainer.eval_transform = dataclasses.replace(transform, spec=dataclasses.replace(transform.spec, mean=mean))
    trainer.save_model(str(tmp_path / "vit"))
    assert json.loads((tmp_path / "vit" / "preprocessor_config.json").read_text())["image_mean"] == list(mean)


def test_what_is_no_transform_is_refused_also_after_construction(make_trainer):
    trainer = make_trainer()
    for name in ("train_transform", "eval_transform"):
        with pytest.raises(TypeError, match=f"{name} is function: give one of those of image_transforms"):
            setattr(trainer, name, lambda image: image)


def test_a_trainer_that_only_evaluates_leaves_the_models_configuration_as_it_is(images, tiny_model, tmp_path):
    tiny_model.config.hf_sgdr = {"augment": "side_on", "max_zoom": 1.1}
    before = copy.deepcopy(tiny_model.config.to_dict())
    args = SGDRTrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=True)
    _, small = image_transforms(tiny_model, image_size=SIZE)
    trainer = SGDRTrainer(tiny_model, args, eval_dataset=images["validation"], eval_transform=small)
    trainer.evaluate()
    after = tiny_model.config.to_dict()
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed <= {"use_cache", "problem_type"}  # which transformers' Trainer and its loss set
    trainer.save_model(str(tmp_path / "saved"))
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["hf_sgdr"] == {"augment": "side_on", "max_zoom": 1.1}
    assert config["pretrained_cfg"]["input_size"] == [3, SIZE, SIZE]


# ---- What each training draws and gives ----


def test_objects_that_the_caller_froze_for_the_garbage_collector_stay_frozen(make_trainer):
    trainer = make_trainer(precompute=True)
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        trainer.fit(1e-2, 1)
        assert gc.get_freeze_count() > frozen / 2
    finally:
        gc.unfreeze()


def pixel_sums(trainer, monkeypatch):
    seen, original = [], trainer.training_step

    def noting(model, inputs, num_items=None):
        seen.append(round(float(inputs["pixel_values"].double().sum()), 3))
        return original(model, inputs, num_items)

    monkeypatch.setattr(trainer, "training_step", noting)
    return seen


def test_each_training_draws_augmentations_of_its_own_and_a_resumed_one_goes_on_with_its(make_trainer, monkeypatch):
    trainer = make_trainer(num_cycles=1, per_device_train_batch_size=26)
    seen = pixel_sums(trainer, monkeypatch)
    trainer.train()
    trainer.train()
    trainer.fit(1e-2, 1, cycle_len=1)
    assert len({*seen}) == 3
    first = make_trainer(model=tiny_resnet(), num_cycles=1, save_strategy="epoch", per_device_train_batch_size=26)
    first.train()
    first.args.num_cycles = 2
    expected = pixel_sums(first, monkeypatch)
    first.train()
    shutil.rmtree(Path(first.args.output_dir, "checkpoint-2"))
    resumed = make_trainer(model=tiny_resnet(), num_cycles=2, per_device_train_batch_size=26)
    again = pixel_sums(resumed, monkeypatch)
    resumed.train(resume_from_checkpoint=True)
    assert again == expected[1:]
    assert resumed.num_fits == 2


def test_the_metrics_of_training_have_its_epoch(make_trainer):
    trainer = make_trainer(precompute=True, num_cycles=2)
    output = trainer.train()
    assert output.metrics["epoch"] == 2
    assert output.metrics["train_loss"] == output.training_loss


# ---- The labels of data and model ----


def with_names(dataset, names):
    return dataset.cast_column("label", ClassLabel(names=names))


def test_classes_in_another_order_are_refused(make_trainer, images):
    message = (
        r"eval_dataset has the classes 'dogs', 'cats' and the model has 'cats', 'dogs': label 0 is 'dogs' there and "
        r"'cats' here. Give datasets.ClassLabel\(names=...\) the names in that order"
    )
    swapped = with_names(images["validation"], ["dogs", "cats"])
    with pytest.raises(ValueError, match=message):
        make_trainer(eval_dataset=swapped)
    with pytest.raises(ValueError, match=r"eval_dataset\['b'\] has the classes"):
        make_trainer(eval_dataset={"a": images["validation"], "b": swapped})
    with pytest.raises(ValueError, match="train_dataset has the classes"):
        make_trainer(train_dataset=with_names(images["train"], ["dogs", "cats"]))
    trainer = make_trainer()
    for call in (trainer.evaluate, trainer.predict, trainer.log_predictions, lambda data: trainer.tta(1, dataset=data)):
        with pytest.raises(ValueError, match=r"has the classes 'dogs', 'cats' and the model has 'cats', 'dogs'"):
            call(swapped)


def test_another_number_of_classes_is_refused_and_names_count_only_where_there_are_any(make_trainer, images):
    torch.manual_seed(0)
    four = create_image_classifier("test_resnet", labels=["cats", "dogs", "emus", "foxes"], pretrained=False)
    with pytest.raises(ValueError, match=r"and the model has 'cats', 'dogs', 'emus', 'foxes': label 2 is none"):
        make_trainer(model=four)
    four.config.id2label = {i: f"LABEL_{i}" for i in range(4)}
    with pytest.raises(
        ValueError, match=r"'cats', 'dogs' and the model has 'LABEL_0', 'LABEL_1', 'LABEL_2', 'LABEL_3'"
    ):
        make_trainer(model=four)
    two = tiny_resnet()
    two.config.id2label = {0: "LABEL_0", 1: "LABEL_1"}
    trainer = make_trainer(model=two)
    with pytest.raises(ValueError, match=r"classes 'dogs', 'cats' and train_dataset has 'cats', 'dogs'"):
        trainer.evaluate(with_names(images["validation"], ["dogs", "cats"]))
    plain = images["validation"].cast_column("label", Value("int64"))
    assert make_trainer().evaluate(plain)["eval_loss"] > 0
    wrong = plain.map(lambda row: {"label": row["label"] + 2}, new_fingerprint="wrong")
    with pytest.raises(ValueError, match=r"has the label 3, but the model has 2 classes \('cats', 'dogs'\)"):
        make_trainer(eval_dataset=wrong)


def test_plain_training_arguments_are_refused(tiny_model, tmp_path):
    with pytest.raises(TypeError, match="args is TrainingArguments: give SGDRTrainingArguments"):
        SGDRTrainer(tiny_model, TrainingArguments(str(tmp_path), use_cpu=True))
