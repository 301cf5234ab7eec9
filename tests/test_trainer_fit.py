"""`fit`, `train` and `lr_find`: cycles, rates, freezing, resuming and what each training draws."""

import dataclasses
import gc
import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Interrupt, RateRecorder, cosine, losses, same, weights
from transformers import TrainingArguments

from hf_sgdr import SGDRTrainer, SGDRTrainingArguments, Stage, StagedUnfreezing, image_transforms, run_stages


def bare(optimizer):
    """Without accelerate's wrapper, if it has one."""
    return getattr(optimizer, "optimizer", optimizer)


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


# ---- Arguments ----


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


def test_plain_training_arguments_are_refused(tiny_model, tmp_path):
    with pytest.raises(TypeError, match="args is TrainingArguments: give SGDRTrainingArguments"):
        SGDRTrainer(tiny_model, TrainingArguments(str(tmp_path), use_cpu=True))


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


def test_unfreezing_on_a_stock_trainer_after_ours_moves_all_batch_norms(
    make_trainer, make_stock_trainer, tiny_model
):  # fmt: skip
    make_trainer(tiny_model, freeze_batch_norm=True)
    for parameter in tiny_model.parameters():
        parameter.requires_grad_(True)
    before = weights(tiny_model)
    rows = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 2} for i in range(8)]
    unfreezing = StagedUnfreezing({0: "head", 1: "early"})
    make_stock_trainer(tiny_model, rows, num_train_epochs=2, callbacks=[unfreezing]).train()
    still = [key for key, value in weights(tiny_model).items() if "running_" in key and torch.equal(value, before[key])]
    assert still == []


@pytest.mark.parametrize(("given", "recorded"), [(2, -1), (-1, -1), (1, 1), (-2, 1), (0, 0), (-3, 0)])
def test_what_trained_is_recorded_in_one_form(make_trainer, given, recorded):
    trainer = make_trainer(freeze_to=given)
    trainer.fit(1e-2, 1)
    assert trainer.history.fits[0]["freeze_to"] == trainer.history.recipe()[0].freeze_to == recorded
    results = run_stages(trainer, [Stage("once", lr=1e-2, cycles=1, freeze_to=given)])
    assert results.stages[0]["freeze_to"] == recorded


# ---- The range test ----


@pytest.mark.parametrize("precompute", [True, False])
def test_training_is_identical_with_and_without_lr_find_before(make_trainer, precompute):
    trained = []
    for find in (False, True):
        trainer = make_trainer(precompute=precompute)
        if find:
            trainer.lr_find(1e-5, 10, 12)
        trainer.fit(1e-2, 1, cycle_len=1)
        trained.append(weights(trainer.model))
    assert same(*trained)


def test_lr_find_keeps_the_ratios_it_is_given(make_trainer):
    trainer = make_trainer(freeze_to=0)
    result = trainer.lr_find(1e-5, 1e-2, 4, group_learning_rates=[1e-4, 1e-3, 1e-2])
    for lr, rates in zip(result.history["lr"], result.history["learning_rates"], strict=True):
        assert rates == pytest.approx([lr / 100, lr / 10, lr])
    assert result.group_names == ["early", "middle", "head"]
    assert trainer.optimizer is None


# ---- Resuming, and what each training draws and gives ----


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
    values = {**values, "num_cycles": 2, "cycle_mult": 2, "save_strategy": "steps", "save_steps": save_steps}
    whole = make_trainer(folder="whole", **values)
    start = weights(whole.model)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(callbacks=[Interrupt("on_step_end", killed_at)], **values).train()
    resumed = make_trainer(**values)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step
    assert not same(start, whole.model.state_dict())
    assert same(whole.model.state_dict(), resumed.model.state_dict())


def test_augmentation_differs_from_epoch_to_epoch(make_trainer, monkeypatch):
    trainer = make_trainer()
    seen = pixel_sums(trainer, monkeypatch)
    trainer.fit(1e-3, 2)
    assert sum(seen[:4]) != sum(seen[4:])


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
    first = make_trainer(num_cycles=1, save_strategy="epoch", per_device_train_batch_size=26)
    first.train()
    first.args.num_cycles = 2
    expected = pixel_sums(first, monkeypatch)
    first.train()
    shutil.rmtree(Path(first.args.output_dir, "checkpoint-2"))
    resumed = make_trainer(num_cycles=2, per_device_train_batch_size=26)
    again = pixel_sums(resumed, monkeypatch)
    resumed.train(resume_from_checkpoint=True)
    assert again == expected[1:]
    assert resumed.num_fits == 2


def test_a_fit_that_does_not_begin_is_not_counted(make_trainer):
    trainer = make_trainer()
    with pytest.raises(ValueError, match="checkpoint"):
        trainer.fit(1e-2, 1, resume_from_checkpoint=True)
    assert trainer.num_fits == 0


def test_objects_that_the_caller_froze_for_the_garbage_collector_stay_frozen(make_trainer):
    trainer = make_trainer(precompute=True)
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        trainer.fit(1e-2, 1)
        assert gc.get_freeze_count() > frozen / 2
    finally:
        gc.unfreeze()


def test_the_metrics_of_training_have_its_epoch(make_trainer):
    trainer = make_trainer(precompute=True, num_cycles=2)
    output = trainer.train()
    assert output.metrics["epoch"] == 2
    assert output.metrics["train_loss"] == output.training_loss


@pytest.mark.parametrize("keep", [True, False])
def test_a_trainer_keeps_freed_memory_unless_it_is_told_not_to(make_trainer, monkeypatch, keep):
    told = []
    monkeypatch.setattr("hf_sgdr.training.trainer.keep_freed_memory", lambda: told.append(True))
    make_trainer(use_cpu=True, keep_freed_memory=keep)
    assert told == [True] * keep


def test_a_batch_is_shown_as_the_next_fit_has_it_and_training_goes_as_without(make_trainer):
    trainer = make_trainer(eval_strategy="no")
    before = torch.get_rng_state()
    ax = trainer.show_batch(4, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    chosen = np.random.default_rng(3).permutation(26)[:4].tolist()
    rows = trainer.images.training(trainer.train_dataset, 1)
    shown = [np.asarray(image.get_array()) for image in ax.images]
    for row, picture in zip((rows[index] for index in chosen), shown, strict=True):
        assert np.array_equal(row["pixel_values"].permute(1, 2, 0).numpy(), picture)
    names = [trainer.model.config.id2label[trainer.train_dataset[index]["label"]] for index in chosen]
    assert [text.get_text() for text in ax.texts] == names
    assert not np.array_equal(np.asarray(trainer.show_batch(4, seed=4).images[0].get_array()), shown[0])


def test_without_images_no_batch_is_shown(make_trainer):
    with pytest.raises(ValueError, match=r"train_dataset is none: give rows of images"):
        make_trainer(train_dataset=None).show_batch()


def test_both_transforms_are_set_or_neither(make_trainer, tmp_path):
    trainer = make_trainer(image_size=32)
    larger = image_transforms(trainer.model, image_size=48, augment="side_on")
    before = trainer.train_transform, trainer.eval_transform
    for wrong, error in ((larger[::-1], ValueError), ((larger[0], "48"), TypeError)):
        with pytest.raises(error, match=r"in their order|eval is str"):
            trainer.set_transforms(*wrong)
        assert (trainer.train_transform, trainer.eval_transform) == before
    trainer.set_transforms(*larger)
    trainer.fit(0.01, 1)
    trainer.save_model(str(tmp_path / "larger"))
    config = json.loads((tmp_path / "larger" / "config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [3, 48, 48]


def test_weights_are_saved_in_the_middle_and_come_back(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.fit(0.01, 1)
    halfway = weights(trainer.model)
    trainer.save_model(str(tmp_path / "halfway"))
    trainer.fit(0.01, 1)
    assert not same(halfway, weights(trainer.model))
    trainer.model.load_state_dict(type(trainer.model).from_pretrained(tmp_path / "halfway").state_dict())
    assert same(halfway, weights(trainer.model))


def test_the_summary_is_that_of_the_layer_groups(make_trainer):
    trainer = make_trainer()
    assert trainer.summary().splitlines()[0] == f"{type(trainer.model).__name__}, 3 layer groups"
    assert trainer.summary().endswith("parameters train")


def test_losses_of_all_fits_are_plotted_and_rates_of_what_trained(make_trainer):
    trainer = make_trainer()
    with pytest.raises(
        ValueError, match=r"plot_loss\(\) shows the losses of the fits: call fit\(\) or train\(\) first"
    ):
        trainer.plot_loss()
    with pytest.raises(ValueError, match=r"no picture of a run before the first fit"):
        trainer.history.plot()
    trainer.fit([1e-4, 1e-3, 1e-2], 1, cycle_len=1)
    trainer.unfreeze()  # afterwards, which is not what trained
    assert [line.get_label() for line in trainer.plot_lr().lines][:1] == ["head"]
    first = losses(trainer)
    trainer.fit([1e-4, 1e-3, 1e-2], 2, cycle_len=1)
    training, validation = trainer.plot_loss().lines
    assert validation.get_xdata().tolist() == training.get_xdata().tolist() == [1, 2, 3]
    assert validation.get_ydata().tolist() == first + losses(trainer)
    assert [ax.get_title() for ax in trainer.history.plot().axes] == [
        "learning rate of each layer group", "loss", "validation",
    ]  # fmt: skip
