import dataclasses
import json
import math

import pytest
import torch
from transformers import TrainerControl, TrainerState

from hf_sgdr import LESSON, SGDRTrainer, SGDRTrainingArguments, Stage, image_transforms, load_image_folder, run_stages
from hf_sgdr.range_test import LRRangeResult
from hf_sgdr.schedule import SGDRSchedule
from hf_sgdr.stage_callbacks import StopWhenOverfitting
from hf_sgdr.stages import FALLBACK_LR, save_results

SIZE = 32


@pytest.fixture
def trainer(tmp_path, tiny_model, make_photo_folder):
    root = make_photo_folder(tmp_path / "photos", {"train": {"cats": 8, "dogs": 8}, "valid": {"cats": 4, "dogs": 4}})
    photos = load_image_folder(root)
    train_transform, eval_transform = image_transforms(tiny_model, image_size=SIZE, augment="side_on", max_zoom=1.1)
    arguments = SGDRTrainingArguments(
        str(tmp_path / "out"),
        per_device_train_batch_size=8,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
    )
    return SGDRTrainer(
        tiny_model,
        arguments,
        train_dataset=photos["train"],
        eval_dataset=photos["validation"],
        train_transform=train_transform,
        eval_transform=eval_transform,
    )


def test_the_lesson_is_its_eight_steps():
    head, augmented, unfrozen = LESSON
    assert head.precompute  # 1
    assert head.lr == "auto"  # 2
    assert head.cycles in (1, 2)  # 3
    assert head.cycle_len is None
    assert (augmented.precompute, augmented.freeze_to, augmented.cycle_len) == (False, -1, 1)  # 4
    assert augmented.cycles in (2, 3)
    assert augmented.lr is None
    assert unfrozen.freeze_to == 0  # 5
    assert 3 <= unfrozen.lr_spread <= 10  # 6
    assert unfrozen.lr == "auto"  # 7
    assert (unfrozen.cycle_len, unfrozen.cycle_mult, unfrozen.until_overfitting) == (1, 2, True)  # 8
    assert unfrozen.max_cycles == 3


def test_a_recipe_runs_and_leaves_its_figures(trainer, tmp_path):
    stages = (
        Stage("head", lr=1e-1, cycles=2, precompute=True),
        Stage("whole", lr=1e-2, lr_spread=3.0, cycles=2, cycle_len=1, cycle_mult=2, freeze_to=0),
    )
    results = run_stages(trainer, stages)
    head, whole = results.stages
    assert (head["name"], head["epochs"], head["cycles"], head["precompute"], head["freeze_to"]) == (
        "head",
        2,
        2,
        True,
        -1,
    )
    assert (whole["name"], whole["epochs"], whole["cycles"], whole["freeze_to"]) == ("whole", 3, 2, 0)
    assert whole["learning_rates"] == pytest.approx([1e-2 / 9, 1e-2 / 3, 1e-2])
    assert all(math.isfinite(stage[key]) for stage in results.stages for key in ("train_loss", "eval_loss", "seconds"))
    save_results(results, tmp_path / "out" / "results.json")
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(written) == ["schema", "world_size", "stages", "best", "tta"]
    assert written["schema"] == 1
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {
        "head-learning-rate.png",
        "whole-learning-rate.png",
    }


def test_the_best_weights_of_all_stages_are_kept(trainer):
    stages = (
        Stage("good", lr=1e-1, cycles=3, precompute=True),
        Stage("ruin", lr=1e3, cycles=1, cycle_len=1),
    )
    results = run_stages(trainer, stages)
    good, ruin = results.stages
    assert ruin["eval_loss"] > good["eval_loss"]
    assert results.best["stage"] == "good"
    assert trainer.evaluate()["eval_loss"] == pytest.approx(results.best["eval_loss"], abs=1e-5)


def test_auto_takes_the_suggestion_and_leaves_the_curve(trainer, monkeypatch, tmp_path):
    asked = []

    def lr_find(*args, **kwargs):
        asked.append(args)
        return result

    lrs = [10 ** (-6 + i / 10) for i in range(70)]
    losses = [1 / (1 + (lr / 1e-2) ** 0.8) for lr in lrs]
    history = {"lr": lrs, "loss": losses, "smoothed_loss": losses, "learning_rates": [[lr] for lr in lrs]}
    result = LRRangeResult(history, "finished", ["head"])
    monkeypatch.setattr(trainer, "lr_find", lr_find)
    stages = (Stage("head", lr="auto", precompute=True, range_test_steps=70), Stage("same"))
    results = run_stages(trainer, stages)
    assert results.stages[0]["learning_rates"] == [result.suggestion()] * 3
    assert results.stages[1]["learning_rates"] == [result.suggestion()] * 3
    assert asked == [(1e-7, 10.0, 70)]
    assert (tmp_path / "out" / "head-range-test.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([0.3] * 60, FALLBACK_LR),
        ([0.3] * 30 + [5.0] * 30, None),
    ],
    ids=["flat", "takes off"],
)
def test_without_an_answer_a_stated_fallback_is_used_and_logged(trainer, monkeypatch, caplog, losses, expected):
    from transformers.utils import logging

    lrs = [10 ** (-6 + i / 10) for i in range(60)]
    history = {"lr": lrs, "loss": losses, "smoothed_loss": losses, "learning_rates": [[lr] for lr in lrs]}
    result = LRRangeResult(history, "finished", ["head"])
    monkeypatch.setattr(trainer, "lr_find", lambda *args, **kwargs: result)
    logging.enable_propagation()
    try:
        rate = run_stages(trainer, (Stage("head", lr="auto", precompute=True),)).stages[0]["learning_rates"][-1]
    finally:
        logging.disable_propagation()
    assert "the range test suggests no rate" in caplog.text
    assert rate == (expected if expected is not None else pytest.approx(result.edge() / 10))


def overfitting_stop(trainer, validation, training):
    """How many cycles of one step are run before the stop, given each cycle's losses."""
    stopper = StopWhenOverfitting(trainer)
    trainer.lr_scheduler = None
    state, control = TrainerState(), TrainerControl()

    class Scheduled:
        schedule = SGDRSchedule(1, 1, len(validation))

    stopper.trainer = Scheduled()
    for step, (valid, train) in enumerate(zip(validation, training, strict=True), 1):
        state.global_step = step
        state.log_history += [{"loss": train, "step": step}, {"eval_loss": valid, "step": step}]
        stopper.on_evaluate(trainer.args, state, control)
        if control.should_training_stop:
            return step
    return None


@pytest.mark.parametrize(
    ("validation", "training", "stops_after"),
    [
        ([0.5, 0.4, 0.3], [0.5, 0.4, 0.3], None),
        ([0.5, 0.6, 0.7], [0.5, 0.4, 0.3], 2),
        ([0.5, 0.504, 0.6], [0.5, 0.4, 0.3], 3),  # within one per cent is chance
        ([0.5, 0.6, 0.7], [0.5, 0.6, 0.7], None),  # the training loss rises too: no over-fitting
        ([0.5, 0.3, 0.4], [0.5, 0.4, 0.3], 3),
    ],
)
def test_over_fitting_ends_training_at_the_end_of_a_cycle(trainer, validation, training, stops_after):
    assert overfitting_stop(trainer, validation, training) == stops_after


def test_in_the_middle_of_a_cycle_nothing_stops(trainer):
    stopper = StopWhenOverfitting(trainer)
    trainer.lr_scheduler = None
    control = TrainerControl()

    class Scheduled:
        schedule = SGDRSchedule(4, 2, 2)

    stopper.trainer = Scheduled()
    state = TrainerState()
    for step in range(1, 13):
        state.global_step = step
        state.log_history += [{"loss": 1.0 / step, "step": step}, {"eval_loss": 0.1 * step, "step": step}]
        stopper.on_evaluate(trainer.args, state, control)
        assert control.should_training_stop is (step == 12)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "Über uns"}, "Stage name 'Über uns': use lower-case letters, digits, - and _; it names a folder."),
        ({"name": "a", "cycles": 0}, "a: cycles=0: give a whole number of at least 1."),
        ({"name": "a", "cycle_mult": 2}, "a: cycle_mult, until_overfitting and snapshots need cycle_len."),
        ({"name": "a", "lr": "fast"}, "a: lr='fast': give a number, one a layer group, 'auto', or leave it out."),
        ({"name": "a", "lr_spread": 0.5}, "a: lr_spread=0.5: give a factor of at least 1."),
        (
            {"name": "a", "precompute": True, "freeze_to": 0},
            "a: precompute with freeze_to=0 has nothing frozen; give freeze_to=-1.",
        ),
        ({"name": "a", "epochs": 3}, "Stage 'a': unknown 'epochs'; a stage has name, lr"),
        ({"lr": 1e-2}, "Stage '': no name; a stage has name, lr"),
    ],
)
def test_wrong_stages_are_refused(values, message):
    with pytest.raises(ValueError, match=r"Stage|a:") as error:
        Stage.from_dict(values)
    assert str(error.value).startswith(message)


def test_rates_that_yaml_reads_as_text_are_numbers():
    assert Stage.from_dict({"name": "a", "lr": "1e-3"}).lr == 1e-3
    assert Stage.from_dict({"name": "a", "lr": ["1e-4", 1e-3]}).lr == [1e-4, 1e-3]


def test_two_stages_of_one_name_are_refused(trainer):
    with pytest.raises(ValueError, match="each with a name of its own"):
        run_stages(trainer, (Stage("a"), Stage("a")))


def test_a_stage_survives_a_dictionary():
    for stage in LESSON:
        assert Stage.from_dict(json.loads(json.dumps(dataclasses.asdict(stage)))) == stage


def test_the_trainer_is_left_whole(trainer):
    model = trainer.model
    run_stages(trainer, (Stage("head", lr=1e-2, precompute=True),))
    assert trainer.model is model
    assert not trainer.precompute
    assert torch.isfinite(torch.from_numpy(trainer.log_predictions())).all()
