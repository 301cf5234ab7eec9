import dataclasses
import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import Interrupt
from transformers import TrainerCallback

from hf_sgdr import (
    LESSON,
    SGDRTrainer,
    Stage,
    run_stages,
)
from hf_sgdr.optim.range_test import LRRangeResult
from hf_sgdr.training.progress import run_lock
from hf_sgdr.training.stages import BELOW_EDGE, BELOW_HEAD, FALLBACK_LR, save_results

SPLITS = {"train": {"cats": 8, "dogs": 8}, "valid": {"cats": 4, "dogs": 4}}


@pytest.fixture
def trainer(make_trainer):
    return make_trainer()


def test_the_lesson_is_its_eight_steps():
    head, augmented, unfrozen = LESSON
    assert head.precompute  # 1
    assert head.lr == "auto"  # 2
    assert head.cycles in (1, 2)  # 3
    assert head.cycle_len is None
    assert (augmented.freeze_to, augmented.cycle_len) == (-1, 1)  # 4
    assert (augmented.precompute, augmented.views) == (True, 4)
    assert augmented.cycles in (2, 3)
    assert augmented.lr is None
    assert unfrozen.freeze_to == 0  # 5
    assert 3 <= unfrozen.lr_spread <= 10  # 6
    assert unfrozen.lr == "auto"  # 7
    assert (unfrozen.cycle_len, unfrozen.cycle_mult, unfrozen.until_overfitting) == (1, 2, True)  # 8
    assert unfrozen.max_cycles == 2


def test_a_recipe_runs_and_leaves_its_results(trainer, tmp_path):
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
    assert list(written) == ["schema", "world_size", "stages", "best", "tta", "run", "solved"]
    assert written["schema"] == 2
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {
        "whole-learning-rate.png",  # the head's rate is constant
        "run.png",
    }
    names = [curve["name"] for curve in trainer.history.curves]
    assert names == ["head", "whole"]
    assert [list(curve["rates"]) for curve in trainer.history.curves] == [["head"], ["early", "middle", "head"]]
    validation = [point["eval_loss"] for point in trainer.history.curves[1]["points"] if "eval_loss" in point]
    assert len(validation) == 3
    assert validation[-1] == whole["eval_loss"]


def test_a_resumed_run_has_the_curves_of_the_stages_before(make_trainer, tmp_path):
    stages = (Stage("head", lr=1e-1, precompute=True), Stage("more", cycle_len=1))
    with pytest.raises(KeyboardInterrupt):
        run_stages(make_trainer(callbacks=[Interrupt("on_train_begin", 2)]), stages)
    assert not (tmp_path / "out" / "run.png").exists()
    trainer = make_trainer()
    run_stages(trainer, stages, resume=True)
    assert [(curve["name"], curve["epochs"]) for curve in trainer.history.curves] == [("head", 1), ("more", 1)]
    assert (tmp_path / "out" / "run.png").exists()


def test_the_best_weights_of_all_stages_are_kept(trainer):
    results = run_stages(trainer, (Stage("good", lr=1e-1, cycles=3), Stage("ruin", lr=1e3, cycle_len=1)))
    good, ruin = results.stages
    assert results.solved is None
    assert ruin["eval_loss"] > good["eval_loss"]
    assert results.best["stage"] == "good"
    assert trainer.evaluate()["eval_loss"] == pytest.approx(results.best["eval_loss"], abs=1e-5)


def test_a_stage_takes_at_most_so_many_images_a_step_also_in_its_range_test(make_trainer):
    trainer, sizes = make_trainer(per_device_train_batch_size=8), []
    stages = (
        Stage("head", lr=1e-3),
        Stage("small", lr="auto", range_test_steps=8, max_batch_size=3),
        Stage("large", max_batch_size=100),
    )
    compute_loss = trainer.compute_loss

    def noted(model, inputs, *args, **kwargs):
        if model.training:
            sizes.append(len(inputs["labels"]))
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = noted
    run_stages(trainer, stages)
    assert len(trainer.train_dataset) == 16
    assert sizes[:2] == [8, 8]
    assert max(sizes[2:10]) == 3  # of the range test
    assert sizes[10:] == [3, 3, 3, 3, 3, 1, 8, 8]
    assert trainer.args.per_device_train_batch_size == 8


LRS = [10 ** (-6 + i / 10) for i in range(70)]


def range_test(losses):
    history = {"lr": LRS, "loss": losses, "smoothed_loss": losses, "learning_rates": [[lr] for lr in LRS]}
    return LRRangeResult(history, "finished", ["head"])


def test_auto_takes_the_suggestion_and_leaves_the_curve(trainer, monkeypatch, tmp_path):
    asked = []

    def lr_find(*args, **kwargs):
        asked.append(args)
        return result

    result = range_test([1 / (1 + (lr / 1e-2) ** 0.8) for lr in LRS])
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
        ([0.3] * 70, FALLBACK_LR),
        ([0.3] * 30 + [5.0] * 40, None),
    ],
    ids=["flat", "takes off"],
)
def test_without_an_answer_a_stated_fallback_is_used_and_logged(trainer, monkeypatch, logs, losses, expected):
    result = range_test(losses)
    monkeypatch.setattr(trainer, "lr_find", lambda *args, **kwargs: result)
    rate = run_stages(trainer, (Stage("head", lr="auto", precompute=True),)).stages[0]["learning_rates"][-1]
    assert "the range test suggests no rate" in logs.text
    assert rate == (expected if expected is not None else pytest.approx(result.edge() / BELOW_EDGE))


def test_a_range_test_that_ended_at_once_leaves_its_lowest_rate(trainer, monkeypatch, logs):
    result = LRRangeResult({key: [] for key in ("lr", "loss", "smoothed_loss", "learning_rates")}, "the loss was nan")
    monkeypatch.setattr(trainer, "lr_find", lambda *args, **kwargs: result)
    stages = (Stage("head", lr="auto", range_test_start=1e-6), Stage("whole", lr="auto", freeze_to=0))
    rates = [stage["learning_rates"][-1] for stage in run_stages(trainer, stages).stages]
    assert rates == [1e-6, pytest.approx(1e-7)]
    assert "the test has 0 steps" in logs.text


def test_where_the_loss_falls_to_the_end_of_a_short_test_the_end_is_taken(trainer, monkeypatch):
    lrs = [float(lr) for lr in np.geomspace(1e-4, 1.5e-3, 12)]
    losses = [0.7 - 100 * lr for lr in lrs]
    history = {"lr": lrs, "loss": losses, "smoothed_loss": losses, "learning_rates": [[lr] for lr in lrs]}
    result = LRRangeResult(history, "finished", ["head"])
    assert result.suggestion() == lrs[-1] / 10
    monkeypatch.setattr(trainer, "lr_find", lambda *args, **kwargs: result)
    assert run_stages(trainer, (Stage("whole", lr="auto", freeze_to=0),)).stages[0]["learning_rates"][-1] == lrs[-1]


def test_a_found_rate_is_at_most_that_of_the_stage_before(trainer, monkeypatch, logs):
    result = range_test([1 / (1 + (lr / 1e-2) ** 0.8) for lr in LRS])
    monkeypatch.setattr(trainer, "lr_find", lambda *args, **kwargs: result)
    below, above = result.suggestion() / 2, result.suggestion() * 2
    stages = (Stage("low", lr=below, precompute=True), Stage("capped", lr="auto"))
    stages += (Stage("high", lr=above), Stage("found", lr="auto"))
    rates = [stage["learning_rates"][-1] for stage in run_stages(trainer, stages).stages]
    assert rates == [below, below, above, result.suggestion()]
    assert logs.text.count("more than what the stage before had") == 1


@pytest.mark.parametrize(
    ("losses", "head", "expected"),
    [
        ([0.01] * 70, 1e-2, 1e-2 / BELOW_HEAD),
        ([0.01] * 70, 1e2, LRS[-1]),
        ([0.01] * 20 + [5.0] * 50, 1e2, None),  # half of the edge
        ([0.01] * 20 + [5.0] * 50, 3e-5, 3e-5 / BELOW_HEAD),
        ([1 / (1 + (lr / 1e-2) ** 0.8) for lr in LRS], 1e2, LRS[-1]),  # a head that was trained badly
    ],
    ids=["never takes off", "nor up to the end", "takes off", "takes off above the head's", "falls"],
)
def test_what_lies_below_a_trained_head_gets_how_far_a_rate_can_go(trainer, monkeypatch, losses, head, expected):
    result = range_test(losses)
    monkeypatch.setattr(trainer, "lr_find", lambda *args, **kwargs: result)
    stages = (Stage("head", lr=head, precompute=True), Stage("whole", lr="auto", freeze_to=0))
    expected = expected or result.edge() / BELOW_EDGE
    assert run_stages(trainer, stages).stages[1]["learning_rates"][-1] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "Über uns"}, "Stage name 'Über uns': use lower-case letters, digits, - and _; it names a folder."),
        ({"name": "a", "cycles": 0}, "a: cycles=0: must be an integer >= 1."),
        ({"name": "a", "cycle_mult": 2}, "a: cycle_mult, until_overfitting and snapshots need cycle_len."),
        ({"name": "a", "lr": "fast"}, "a: lr='fast': give a number, one a layer group, 'auto', or leave it out."),
        ({"name": "a", "lr_spread": 0.5}, "a: lr_spread=0.5: give a factor of at least 1."),
        (
            {"name": "a", "precompute": True, "freeze_to": 0},
            "a: precompute with freeze_to=0 has nothing frozen; give freeze_to=-1.",
        ),
        ({"name": "a", "epochs": 3}, "Stage 'a': unknown 'epochs'; a stage has name, lr"),
        ({"name": "a", "cycle": 3}, "Stage 'a': unknown 'cycle' (did you mean cycles?); a stage has name, lr"),
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


# ---- Several evaluation sets ----


@pytest.fixture
def two_sets(make_trainer, images):
    """A trainer with the validation images as two sets of unlike size."""
    whole = images["validation"]
    return make_trainer(eval_dataset={"large": whole.select(range(1, 8)), "small": whole.select(range(1))})


def losses_of(trainer, *sets):
    metrics = trainer.evaluate()
    return [metrics[f"eval_{name}_loss"] for name in sets]


def test_with_several_evaluation_sets_the_mean_of_their_losses_decides(two_sets):
    stages = (Stage("good", lr=1e-1, cycles=3), Stage("ruin", lr=1e3, cycles=1, cycle_len=1))
    results = run_stages(two_sets, stages)
    assert results.best["stage"] == "good"
    assert results.best["metric"] == "mean of eval_large_loss, eval_small_loss"
    large, small = losses_of(two_sets, "large", "small")
    assert results.best["eval_loss"] == pytest.approx((large + small) / 2, abs=1e-5)
    assert 0 <= results.best["eval_accuracy"] <= 1
    assert all(math.isfinite(stage["eval_loss"]) for stage in results.stages)


def test_metric_for_best_model_names_the_evaluation_set_that_decides(two_sets):
    two_sets.args.metric_for_best_model = "small_loss"
    results = run_stages(two_sets, (Stage("head", lr=1e-1, cycles=3, precompute=True),))
    assert results.best["metric"] == "eval_small_loss"
    assert results.best["eval_loss"] == pytest.approx(losses_of(two_sets, "small")[0], abs=1e-5)


# ---- What stops a recipe ----


def test_label_names_that_leave_no_loss_are_refused_before_training(trainer):
    trainer.label_names = ["foo"]
    with pytest.raises(ValueError, match=r"label_names=\['foo'\]: .* leave label_names out") as error:
        run_stages(trainer, (Stage("head", lr=1e-2),))
    assert "\n" not in str(error.value)
    assert trainer.state.global_step == 0


def test_evaluations_without_a_loss_end_the_stage(trainer, monkeypatch):
    evaluation_loop = SGDRTrainer.evaluation_loop

    def without_loss(self, *args, **kwargs):
        output = evaluation_loop(self, *args, **kwargs)
        output.metrics.pop("eval_loss")
        return output

    monkeypatch.setattr(SGDRTrainer, "evaluation_loop", without_loss)
    with pytest.raises(ValueError, match="Stage 'head': no evaluation gave a finite eval_loss"):
        run_stages(trainer, (Stage("head", lr=1e-2), Stage("more", lr=1e-2)))
    assert len(trainer.history.fits) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": 5}, "Stage name 5: must be a string; in YAML, quote it."),
        ({"name": "snapshots"}, "Stage name 'snapshots': the folder of snapshots is called so; give another."),
        ({"precompute": "no"}, "a: precompute='no': must be true or false, without quotes."),
        ({"freeze_batch_norm": "no"}, "a: freeze_batch_norm='no': must be true or false, without quotes."),
        ({"until_overfitting": 1}, "a: until_overfitting=1: must be true or false"),
        ({"snapshots": None}, "a: snapshots=None: must be true or false"),
        ({"lr": True}, "a: lr=True: give a number, one a layer group, 'auto', or leave it out."),
        ({"lr": [0.1, True, 0.1]}, "a: lr=[0.1, True, 0.1]: give a number, one a layer group"),
        ({"lr": {"head": 1}}, "a: lr={'head': 1}: give a number, one a layer group"),
        ({"lr_spread": "x"}, "a: lr_spread='x': must be a number."),
        ({"lr_spread": None}, "a: lr_spread=None: must be a number."),
        ({"range_test_end": "high"}, "a: range_test_end='high': must be a number."),
        ({"freeze_to": "head"}, "a: freeze_to='head': must be an integer: -1 the head only, 0 all."),
        ({"freeze_to": False}, "a: freeze_to=False: must be an integer"),
        ({"max_batch_size": 0}, "a: max_batch_size=0: must be an integer >= 1"),
        ({"max_batch_size": "16"}, "a: max_batch_size='16': must be an integer >= 1"),
        ({"cycles": 99999999999}, "a: 99999999999 cycles with cycle_len=None, cycle_mult=1 are more than 100000"),
        ({"cycles": 90000, "cycle_len": 1, "cycle_mult": 2}, "a: 90000 cycles with cycle_len=1, cycle_mult=2 are more"),
        ({"cycles": 17, "cycle_len": 1, "cycle_mult": 2}, "a: 17 cycles with cycle_len=1, cycle_mult=2 are more than"),
        ({"cycle_len": 1, "until_overfitting": True, "max_cycles": 10**12}, "a: 1000000000000 cycles with"),
        ({"learning_rate": None}, "Stage 'a': unknown 'learning_rate'; a stage has name, lr"),
        ({5: 1}, "Stage 'a': unknown '5'; a stage has name, lr"),
    ],
)
def test_types_that_a_yaml_file_may_hold_are_checked_at_once(values, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        Stage.from_dict({"name": "a", **values})
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_numbers_of_numpy_are_plain_numbers():
    stage = Stage(
        "a", lr=np.array([1e-4, 1e-3, 1e-2]), lr_spread=np.float32(2), cycles=np.int64(2), freeze_to=np.int32(-1)
    )
    assert stage == Stage("a", lr=[1e-4, 1e-3, 1e-2], lr_spread=2.0, cycles=2, freeze_to=-1)
    assert json.loads(json.dumps(dataclasses.asdict(stage)))["cycles"] == 2
    assert Stage("a", lr=[np.float64(0.1)] * 3).lr == [0.1] * 3


def test_long_trainings_are_taken():
    assert Stage("a", cycles=16, cycle_len=1, cycle_mult=2).num_cycles == 16
    assert Stage("a", cycles=100_000).cycles == 100_000
    assert Stage.from_dict({"name": "a", "range_test_start": "1e-6", "lr_spread": "3"}).range_test_start == 1e-6


def test_a_second_run_in_the_same_folder_is_refused_and_names_the_process(make_trainer, tmp_path):
    refusals = []
    trainer, second = make_trainer(), make_trainer()

    class Second(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            with pytest.raises(ValueError, match=rf"out is being written by another run, process {os.getpid()}:") as e:
                run_stages(second, (Stage("other", lr=1e-2),))
            refusals.append(str(e.value))

    trainer.add_callback(Second())
    results = run_stages(trainer, (Stage("head", lr=1e-2, cycles=2),))
    assert len(refusals) == 2
    assert [stage["name"] for stage in results.stages] == ["head"]
    assert sorted(path.name for path in (tmp_path / "out" / "_runs").iterdir()) == [
        "best.safetensors", "head", "progress.json", "training-images.txt",
    ]  # fmt: skip


@pytest.mark.parametrize("process", ["dead", "another by now", "on another machine", "half written"])
def test_the_lock_of_a_process_that_is_gone_is_taken_over(tmp_path, process):
    with run_lock(tmp_path):
        content = json.loads((tmp_path / "lock.json").read_text())
    assert not list(tmp_path.iterdir())
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    changes = {
        "dead": {"pid": gone.pid},
        "another by now": {"started": content["started"] - 100},
        "on another machine": {"machine": "elsewhere"},
        "half written": {},
    }
    text = json.dumps({**content, **changes[process]})
    (tmp_path / "lock.json").write_text(text[: len(text) // 2] if process == "half written" else text)
    with run_lock(tmp_path):
        assert json.loads((tmp_path / "lock.json").read_text()) == content
    assert not list(tmp_path.iterdir())


def test_the_plain_features_of_a_precomputed_stage_are_no_reason_to_warn(trainer, logs):
    run_stages(trainer, (Stage("head", lr=1e-2, precompute=True), Stage("more", cycles=1)))
    assert "Augmentation has no effect" not in logs.text
    trainer.precompute = True  # by hand, it is
    assert "Augmentation has no effect" in logs.text
