"""`max_steps`: each fit ends after so many steps, is evaluated there, and everything after it works."""

import json

import numpy as np
import pytest
from helpers import Interrupt, RateRecorder, cosine, same, without_times
from transformers import AutoModelForImageClassification

from hf_sgdr.recipe import Stage
from hf_sgdr.training.stages import run_stages


class Recorder(RateRecorder):
    """And the steps at which it was evaluated."""

    def __init__(self):
        super().__init__()
        self.evaluations = []

    def on_evaluate(self, args, state, control, **kwargs):
        self.evaluations.append(state.global_step)


@pytest.mark.parametrize("precompute", [True, False])
@pytest.mark.parametrize(
    ("max_steps", "evaluations", "epochs", "cycles"),
    [(3, [3], 0.75, 0), (4, [4], 1, 1), (6, [4, 6], 1.5, 1), (12, [4, 8, 12], 3, 2), (50, [4, 8, 12], 3, 2)],
)
def test_a_fit_is_cut_off_and_evaluated_there_once(make_trainer, precompute, max_steps, evaluations, epochs, cycles):
    recorder = Recorder()
    trainer = make_trainer(precompute=precompute, max_steps=max_steps, callbacks=[recorder])
    trainer.fit(1e-2, 2, cycle_len=1, cycle_mult=2)
    shape = [1e-2 * cosine(step, 4) for step in range(4)] + [1e-2 * cosine(step, 8) for step in range(8)]
    assert [rates[-1] for rates in recorder.rates] == shape[:max_steps]
    assert recorder.evaluations == evaluations
    assert trainer.schedule.total_steps == 12
    record = trainer.history.fits[-1]
    assert (record["epochs"], record["cycles"], record["max_steps"]) == (epochs, cycles, max_steps)
    assert record["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-4)
    assert record["train_loss"] is not None


def test_train_and_a_constant_rate_are_cut_off_too(make_trainer):
    recorder = Recorder()
    trainer = make_trainer(precompute=True, max_steps=3, cycle_len=None, callbacks=[recorder])
    output = trainer.train()
    assert (output.global_step, output.metrics["epoch"], recorder.evaluations) == (3, 0.75, [3])
    assert (trainer.history.fits[-1]["epochs"], trainer.history.fits[-1]["cycles"]) == (0.75, 0)


@pytest.mark.parametrize("eval_strategy", ["epoch", "steps"])
def test_steps_are_optimizer_steps_and_evaluated_once_under_either_strategy(make_trainer, eval_strategy):
    recorder = Recorder()
    trainer = make_trainer(
        precompute=True, max_steps=3, gradient_accumulation_steps=2, callbacks=[recorder], eval_strategy=eval_strategy,
        eval_steps=3,
    )  # fmt: skip
    trainer.fit(1e-2, 2, cycle_len=2)
    assert recorder.rates == [[1e-2 * cosine(step, 4)] for step in range(3)]
    assert trainer.state.epoch == 1.5
    assert recorder.evaluations == ([2, 3] if eval_strategy == "epoch" else [3])


@pytest.mark.parametrize("most", [1, 5, 200])
def test_a_range_test_takes_no_more_steps(make_trainer, most):
    trainer = make_trainer(precompute=True, max_steps=most)
    result = trainer.lr_find(1e-5, 1e-2, 20)
    assert len(result.history["lr"]) == min(most, 20)
    assert result.history["lr"][0] == pytest.approx(1e-5)
    if most > 1:
        assert result.history["lr"][-1] == pytest.approx(1e-2)
    result.plot()


@pytest.mark.parametrize("max_steps", [1, 2])
def test_a_whole_recipe_runs_with_a_few_steps(make_trainer, max_steps, tmp_path):
    trainer = make_trainer(max_steps=max_steps)
    stages = (
        Stage("head", lr="auto", range_test_steps=12, cycles=2, precompute=True),
        Stage("whole", lr="auto", cycle_len=1, cycle_mult=2, freeze_to=0, until_overfitting=True, snapshots=True),
    )
    results = run_stages(trainer, stages)
    assert [(stage["epochs"], stage["max_steps"]) for stage in results.stages] == [(max_steps / 4, max_steps)] * 2
    assert results.best["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-4)
    json.dumps(results.to_dict())
    trainer.create_model_card()
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"Each fit was ended after {max_steps} optimizer steps, to try the run" in card
    trainer.save_model(str(tmp_path / "saved"))
    AutoModelForImageClassification.from_pretrained(tmp_path / "saved")
    assert np.isfinite(trainer.tta(1)).all()


def test_keep_best_takes_the_evaluation_at_the_end_into_account(make_trainer):
    trainer = make_trainer(precompute=True, max_steps=6)
    trainer.fit(1e-2, 3, cycle_len=1, keep_best=True)
    by_epoch = {entry["epoch"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert list(by_epoch) == [1.0, 1.5]
    assert trainer.history.fits[-1]["kept"]["epoch"] == min(by_epoch, key=by_epoch.get)


@pytest.mark.parametrize("save", [{"save_strategy": "epoch"}, {"save_strategy": "steps", "save_steps": 2}])
@pytest.mark.parametrize(
    ("event", "step"), [("on_step_end", 5), ("on_evaluate", 6), ("on_save", 6), ("on_train_end", 6)]
)
def test_a_resumed_fit_ends_at_the_same_step_with_the_same_weights(make_trainer, save, event, step):
    values = {"freeze_to": 0, "max_steps": 6, **save}
    whole = make_trainer(folder="whole", **values)
    whole.fit(1e-2, 3, cycle_len=1)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(callbacks=[Interrupt(event, step=step)], **values).fit(1e-2, 3, cycle_len=1)
    resumed = make_trainer(**values)
    resumed.fit(1e-2, 3, cycle_len=1, resume_from_checkpoint=True)
    expected, history = (
        [entry for entry in without_times(trainer.state.log_history) if "train_loss" not in entry]
        for trainer in (whole, resumed)
    )
    assert history == expected
    assert resumed.state.global_step == whole.state.global_step == 6
    assert same(whole.model.state_dict(), resumed.model.state_dict())
