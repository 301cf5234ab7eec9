"""Every wrong argument is refused before any work, in one line: what was given, what is allowed, how to mend it."""

import math

import numpy as np
import pytest
import torch
from helpers import same, weights

from hf_sgdr import (
    LayerGroups,
    LRRangeTest,
    SGDRTrainingArguments,
    Stage,
    StagedUnfreezing,
    create_image_classifier,
    image_transforms,
    run_stages,
)
from hf_sgdr.optim.schedule import SGDRSchedule

NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True)
def no_work(monkeypatch):
    """Whatever reads an image's pixels, or steps an optimizer, fails the test."""

    def work(*args, **kwargs):
        raise AssertionError("work was begun before the arguments were refused")

    monkeypatch.setattr("hf_sgdr.data.dataset.ImageDataset.__getitems__", work)
    monkeypatch.setattr("hf_sgdr.data.hashes.image_hash", work)
    monkeypatch.setattr("torch.optim.SGD.step", work)


def refused(call, message: str) -> str:
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert type(error.value) in (ValueError, TypeError)
    return str(error.value)


ARGUMENTS = [
    ({"cycle_len": 0}, "cycle_len=0: must be an integer >= 1"),
    ({"cycle_len": 1.5}, "cycle_len=1.5: must be an integer >= 1"),
    ({"cycle_mult": 0}, "cycle_mult=0: must be an integer >= 1"),
    ({"cycle_mult": -2}, "cycle_mult=-2: must be an integer >= 1"),
    ({"num_cycles": 0}, "num_cycles=0: must be an integer >= 1"),
    ({"num_cycles": True}, "num_cycles=True: must be an integer >= 1"),
    ({"num_train_epochs": 5}, "num_train_epochs=5, but cycle_len=1, cycle_mult=1, num_cycles=3 are 3 epochs"),
    ({"data_seed": -5}, "data_seed=-5: must be an integer >= 0"),
    ({"seed": -1}, "seed=-1: must be an integer >= 0"),
    ({"seed": 2**32}, "seed=4294967296: must be an integer from 0 to 2**32 - 1"),
    ({"learning_rate": 0.0}, "learning_rate=0.0: give a finite number above 0"),
    ({"learning_rate": -0.1}, "learning_rate=-0.1: give a finite number above 0"),
    ({"learning_rate": NAN}, "learning_rate=nan: give a finite number above 0"),
    ({"learning_rate": INF}, "learning_rate=inf: give a finite number above 0"),
    ({"momentum": 1.0}, "momentum=1.0: give a number from 0 to below 1"),
    ({"weight_decay": -1e-4}, "weight_decay=-0.0001: give a finite number, zero or more"),
    ({"weight_decay": NAN}, "weight_decay=nan: give a finite number, zero or more"),
    ({"min_lr_ratio": 1.5}, "min_lr_ratio=1.5: give a share of the highest rate, from 0 to 1"),
    ({"label_smoothing_factor": 1.0}, "label_smoothing_factor=1.0: give a number from 0 to below 1"),
    (
        {"lr_scheduler_type": "cosine"},
        "lr_scheduler_type='cosine': cycle_len, cycle_mult and num_cycles say how the rate changes",
    ),
    ({"remove_unused_columns": True}, "remove_unused_columns=True"),
    ({"logging_nan_inf_filter": True}, "remove_unused_columns=False, logging_nan_inf_filter=True: both must be False"),
    ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0: must be an integer >= 1"),
    ({"per_device_eval_batch_size": -1}, "per_device_eval_batch_size=-1: must be an integer >= 1"),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0: must be an integer >= 1"),
    ({"precompute_views": -1}, "precompute_views=-1: must be an integer >= 0"),
    ({"num_cycles": 99999999999}, "99999999999 cycles with cycle_len=1, cycle_mult=1 are more than 100000 epochs"),
    ({"num_cycles": 10**9, "cycle_mult": 2}, "1000000000 cycles with cycle_len=1, cycle_mult=2 are more than"),
    ({"feature_dtype": "int8"}, "feature_dtype='int8': give auto, float32 or bfloat16"),
    ({"feature_memory_gb": -1.0}, "feature_memory_gb=-1.0: give a number of GB, zero or more"),
    ({"cache_disk_gb": NAN}, "cache_disk_gb=nan: give a number of GB, zero or more"),
    (
        {"precompute": True, "freeze_to": 0},
        "precompute=True with freeze_to=0: nothing is frozen, so there is nothing to precompute",
    ),
    (
        {"precompute": True, "freeze_to": -3},
        "precompute=True with freeze_to=-3: nothing is frozen, so there is nothing to precompute",
    ),
    ({"hub_token": "hf_secret"}, "hub_token is not taken as an argument"),
    ({"max_steps": 0}, "max_steps=0: must be an integer >= 1"),
    (
        {"auto_find_batch_size": True},
        "auto_find_batch_size=True would cut cycles off: give micro_batch_size, which divides a batch",
    ),
    ({"max_steps": 2.5}, "max_steps=2.5: must be an integer >= 1"),
]


@pytest.mark.parametrize(("arguments", "message"), ARGUMENTS)
def test_training_arguments(arguments, message, tmp_path):
    assert refused(lambda: SGDRTrainingArguments(str(tmp_path), **arguments), message).startswith(message)


def test_a_refused_token_is_not_repeated(tmp_path):
    with pytest.raises(ValueError, match="hub_token") as error:
        SGDRTrainingArguments(str(tmp_path), hub_token="hf_secret")
    assert "hf_secret" not in str(error.value)


TRAINER = [
    ({"group_learning_rates": [0.1, 0.2]}, "2 learning rates for 3 layer groups (early, middle, head)"),
    ({"group_learning_rates": [0.1, 0.2, NAN]}, "each must be a finite number"),
    ({"group_learning_rates": [0.1, -0.2, 0.3]}, "each must be a finite number"),
    ({"freeze_to": 3}, "there are 3 layer groups (early, middle, head), so it must be an integer from -3 to 2"),
    ({"freeze_to": -4}, "so it must be an integer from -3 to 2"),
    ({"n_groups": 1}, "n_groups=1: must be an integer >= 2"),
    ({"n_groups": 50}, "n_groups=50: the body of"),
    ({"precompute": True, "precompute_views": 2}, "precompute_views=2 needs a training transform that augments"),
]


@pytest.mark.parametrize(("arguments", "message"), TRAINER)
def test_what_does_not_fit_the_model(arguments, message, make_trainer):
    refused(lambda: make_trainer(augment=None, max_zoom=1.0, **arguments), message)


CALLS = [
    (lambda t: t.fit([0.1, 0.2], 1), "2 learning rates for 3 layer groups (early, middle, head)"),
    (lambda t: t.fit([0.1] * 4, 1), "4 learning rates for 3 layer groups"),
    (lambda t: t.fit([], 1), "0 learning rates for 3 layer groups"),
    (lambda t: t.fit(-0.1, 1), "Learning rates -0.1: each must be a finite number, zero or more, and one above zero"),
    (lambda t: t.fit(NAN, 1), "Learning rates nan: each must be a finite number"),
    (lambda t: t.fit(INF, 1), "Learning rates inf: each must be a finite number"),
    (lambda t: t.fit(0.0, 1), "Learning rates 0.0: each must be a finite number, zero or more, and one above zero"),
    (lambda t: t.fit(np.float32("nan"), 1), "Learning rates np.float32(nan): each must be a finite number"),
    (lambda t: t.fit("auto", 1), "Learning rates 'auto': each must be a finite number"),
    (lambda t: t.fit(None, 1), "Learning rates None: each must be a finite number"),
    (lambda t: t.fit([0.1, None, 0.1], 1), "Learning rates [0.1, None, 0.1]: each must be"),
    (
        lambda t: t.fit(slice(0, 0.1), 1),
        "slice(0, 0.1, None): give slice(lowest, highest), both rates finite numbers above 0",
    ),
    (lambda t: t.fit(slice(0.1), 1), "slice(None, 0.1, None): give slice(lowest, highest)"),
    (lambda t: t.fit(0.1, 0), "cycles=0: must be an integer >= 1"),
    (lambda t: t.fit(0.1, 2.0), "cycles=2.0: must be an integer >= 1"),
    (lambda t: t.fit(0.1, 1, cycle_len=0), "cycle_len=0: must be an integer >= 1"),
    (lambda t: t.fit(0.1, 1, cycle_len=1, cycle_mult=0), "cycle_mult=0: must be an integer >= 1"),
    (lambda t: t.fit(0.1, 3, cycle_mult=2), "cycle_mult=2 needs cycle_len"),
    (lambda t: t.freeze_to(3), "freeze_to(3): there are 3 layer groups (early, middle, head)"),
    (lambda t: t.freeze_to(1.0), "freeze_to(1.0): there are 3 layer groups"),
    (lambda t: t.lr_find(1.0, 0.1), "start_lr"),
    (lambda t: t.lr_find(-1.0, 0.1), "start_lr"),
    (lambda t: t.lr_find(num_steps=1), "num_steps=1"),
    (lambda t: t.lr_find(group_learning_rates=[1.0]), "1 learning rates for 3 layer groups"),
    (lambda t: t.tta(4), "n_aug=4: views need a training transform that augments"),
    (lambda t: t.tta(-1), "n_aug=-1: must be an integer >= 0"),
    (lambda t: t.tta(4, beta=1.5), "beta=1.5: give the plain image's weight, from 0 to 1"),
    (lambda t: t.tta(4, beta=NAN), "beta=nan: give the plain image's weight"),
    (lambda t: t.plot_lr(), "plot_lr() shows the rates of the last fit: call fit() or train() first"),
]


@pytest.mark.parametrize(("call", "message"), CALLS)
def test_the_lessons_calls(call, message, make_trainer):
    trainer = make_trainer(augment=None, max_zoom=1.0)
    before = weights(trainer.model)
    assert refused(lambda: call(trainer), message).startswith(message)
    assert same(before, trainer.model.state_dict())


def test_precompute_with_nothing_frozen(make_trainer):
    trainer = make_trainer()
    trainer.unfreeze()
    with pytest.raises(ValueError, match="Nothing is frozen, so there is nothing to precompute: call freeze"):
        trainer.precompute = True


STAGES = [
    ({"lr": [0.1, 0.2]}, "Stage 's': 2 learning rates for 3 layer groups"),
    ({"lr": -1.0}, "Stage 's': Learning rates -1.0: each must be a finite number"),
    ({"lr": NAN}, "each must be a finite number"),
    ({"freeze_to": 7}, "Stage 's': freeze_to(7): there are 3 layer groups"),
    ({"precompute": True, "freeze_to": -3}, "Stage 's': Nothing is frozen, so there is nothing to precompute"),
    ({"precompute": True, "freeze_to": 0}, "s: precompute with freeze_to=0 has nothing frozen; give freeze_to=-1"),
    ({"lr": "fast"}, "lr='fast': give a number, one a layer group, 'auto', or leave it out"),
    ({"lr_spread": 0.5}, "lr_spread=0.5: give a factor of at least 1"),
    ({"cycle_mult": 2}, "cycle_mult, until_overfitting and snapshots need cycle_len"),
    ({"cycles": 0}, "cycles=0: must be an integer >= 1"),
    ({"range_test_steps": 1}, "num_steps=1"),
]


@pytest.mark.parametrize(("values", "message"), STAGES)
def test_a_wrong_stage_stops_the_recipe_before_its_first(values, message, make_trainer):
    trainer = make_trainer()
    refused(lambda: run_stages(trainer, [Stage("first", lr=0.1), Stage("s", **values)]), message)
    assert trainer.layer_groups.frozen == 2


PIECES = [
    (lambda m: SGDRSchedule(0), "cycle_steps=0: must be an integer >= 1"),
    (lambda m: SGDRSchedule(5, 0), "cycle_mult=0: must be an integer >= 1"),
    (lambda m: SGDRSchedule(5, min_lr_ratio=NAN), "min_lr_ratio=nan: give a share"),
    (lambda m: SGDRSchedule(5).multiplier(-1), "step=-1: must be an integer >= 0"),
    (lambda m: LRRangeTest(0.0, 1.0), "start_lr"),
    (lambda m: LRRangeTest(1e-3, NAN), "end_lr"),
    (lambda m: StagedUnfreezing({1: 0}), "say what trains from epoch 0 on, such as {0: -1, 2: 0}"),
    (lambda m: StagedUnfreezing({0: 1.5}), "each key must be an epoch, an integer >= 0, and each value the number"),
    (lambda m: StagedUnfreezing({}), "say what trains from epoch 0 on"),
    (lambda m: LayerGroups(m, {"all": ["nothing"]}), "must be in exactly one layer group"),
    (lambda m: image_transforms(m, augment="upside_down"), "augment='upside_down': give None or one of basic"),
    (lambda m: image_transforms(m, max_zoom=0.9), "max_zoom=0.9: give a number of at least 1.0"),
    (lambda m: image_transforms(m, max_zoom=NAN), "max_zoom=nan: give a number of at least 1.0"),
    (lambda m: image_transforms(m, image_size=0), "image_size=0"),
    (lambda m: create_image_classifier("test_resnet", labels=["a"]), "give at least two class names"),
    (lambda m: create_image_classifier("test_resnet", labels="cats"), "give a list of class names, not one string"),
    (lambda m: create_image_classifier("resnet3", labels=["a", "b"]), "resnet34"),
]


@pytest.mark.parametrize(("call", "message"), PIECES)
def test_each_plug_in(call, message, tiny_model):
    refused(lambda: call(tiny_model), message)


def test_copies_to_a_gpu_are_not_waited_for(tmp_path, monkeypatch):
    assert not SGDRTrainingArguments(tmp_path, use_cpu=True).accelerator_config.non_blocking
    monkeypatch.setattr(SGDRTrainingArguments, "device", torch.device("cuda"))
    assert SGDRTrainingArguments(tmp_path).accelerator_config.non_blocking
    assert not SGDRTrainingArguments(tmp_path, dataloader_pin_memory=False).accelerator_config.non_blocking
