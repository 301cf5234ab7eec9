"""Runs that are broken off and go on: the same weights, history and results as without the interruption."""

import functools
import json
from pathlib import Path

import pytest
import torch
from helpers import Interrupt, same, tiny_vit, weights, without_times

from hf_sgdr import SGDRTrainer
from hf_sgdr.recipe import Stage
from hf_sgdr.training.checkpoints import MANIFEST, newest_checkpoint, sealed_state
from hf_sgdr.training.stages import is_finished, run_stages, save_results

SPLITS = {"train": {"cats": 12, "dogs": 12}, "valid": {"cats": 4, "dogs": 4}}
STAGES = (
    Stage("head", lr="auto", range_test_steps=12, cycles=2, precompute=True),
    Stage("partly", lr=1e-2, cycles=1, cycle_len=1, freeze_to=1, precompute=True),
    Stage(
        "whole", lr=1e-2, lr_spread=3.0, cycle_len=1, cycle_mult=2, freeze_to=0, until_overfitting=True, max_cycles=2
    ),
)
VALUES = {"per_device_train_batch_size": 4, "save_strategy": "epoch", "save_total_limit": 2}


@pytest.fixture
def make_trainer(make_trainer):
    """Six steps an epoch, and a checkpoint after each."""
    return functools.partial(make_trainer, **VALUES)


def end_of(trainer, results=None):
    """All in which two runs must agree."""
    content = results.to_dict() if results is not None else {}
    for record in (*content.get("stages", []), content.get("solved") or {}):
        record.pop("seconds", None)
    return content, without_times(trainer.state.log_history), trainer.learning_rates(), weights(trainer.model)


def assert_same(expected, given):
    assert expected[:-1] == given[:-1]
    assert same(expected[-1], given[-1])


# ---- One fit ----


@pytest.mark.parametrize(
    ("save", "accumulation"),
    [
        ({"save_strategy": "epoch"}, 2),
        ({"save_strategy": "steps", "save_steps": 2}, 1),
        pytest.param({"save_strategy": "epoch"}, 1, marks=pytest.mark.kills),
        pytest.param({"save_strategy": "steps", "save_steps": 2}, 2, marks=pytest.mark.kills),
    ],
)
@pytest.mark.parametrize(
    ("event", "count"), [("on_step_end", 2), ("on_step_end", 7), ("on_save", 2), ("on_evaluate", 2)]
)
def test_a_fit_goes_on_in_the_middle_of_cycle_and_epoch(make_trainer, save, accumulation, event, count):
    def trainer(folder):
        return make_trainer(folder=folder, gradient_accumulation_steps=accumulation, freeze_to=0, **save)

    whole = trainer("whole")
    whole_output = whole.fit([1e-3, 3e-3, 1e-2], 2, cycle_len=1, cycle_mult=2)
    broken = trainer("broken")
    broken.add_callback(Interrupt(event, count))
    with pytest.raises(KeyboardInterrupt):
        broken.fit([1e-3, 3e-3, 1e-2], 2, cycle_len=1, cycle_mult=2)
    resumed = trainer("broken")
    checkpoint = newest_checkpoint(resumed_folder(resumed))
    output = resumed.fit(
        [1e-3, 3e-3, 1e-2], 2, cycle_len=1, cycle_mult=2, resume_from_checkpoint=str(checkpoint) if checkpoint else None
    )
    assert_same(end_of(whole), end_of(resumed))
    assert output.training_loss == whole_output.training_loss


def test_a_model_whose_weights_are_saved_under_other_names_goes_on_too(make_trainer):
    whole = make_trainer(tiny_vit(), folder="whole", freeze_to=0)
    whole.fit(1e-2, 2, cycle_len=1)
    broken = make_trainer(tiny_vit(), folder="broken", freeze_to=0)
    broken.add_callback(Interrupt("on_step_end", 9))
    with pytest.raises(KeyboardInterrupt):
        broken.fit(1e-2, 2, cycle_len=1)
    resumed = make_trainer(tiny_vit(), folder="broken", freeze_to=0)
    resumed.fit(1e-2, 2, cycle_len=1, resume_from_checkpoint=True)
    assert_same(end_of(whole), end_of(resumed))
    best = make_trainer(tiny_vit(), folder="best", freeze_to=0, load_best_model_at_end=True)
    best.fit(1e-2, 2, cycle_len=1)
    lowest = min(entry["eval_loss"] for entry in best.state.log_history if "eval_loss" in entry)
    assert best.evaluate()["eval_loss"] == pytest.approx(lowest, abs=1e-6)


def test_a_fit_that_was_interrupted_goes_on_in_the_same_trainer(make_trainer):
    trainer = make_trainer(freeze_to=0)
    trainer.add_callback(interrupt := Interrupt("on_step_end", 9))
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(1e-2, 2, cycle_len=1)
    trainer.remove_callback(interrupt)
    trainer.fit(1e-2, 2, cycle_len=1, resume_from_checkpoint=True)
    assert (trainer.state.global_step, trainer.history.fits[-1]["name"]) == (12, "fit-001")


def resumed_folder(trainer):
    return Path(trainer.args.output_dir, "_runs", "fit-001")


def test_more_cycles_than_at_first_go_on_where_the_schedule_was(make_trainer):
    whole = make_trainer(folder="whole", num_cycles=3, cycle_mult=2, learning_rate=1e-2)
    whole.train()
    first = make_trainer(folder="broken", num_cycles=2, cycle_mult=2, learning_rate=1e-2)
    first.train()
    assert first.state.global_step == 18
    more = make_trainer(folder="broken", num_cycles=3, cycle_mult=2, learning_rate=1e-2)
    more.train(resume_from_checkpoint=True)
    assert more.state.global_step == whole.state.global_step == 42
    assert more.learning_rates() == whole.learning_rates()
    assert min(more.learning_rates()["head"]) > 0
    entries = [entry for entry in without_times(whole.state.log_history) if "train_loss" not in entry]
    assert [e for e in without_times(more.state.log_history) if "train_loss" not in e and e in entries] == entries
    assert same(whole.model.state_dict(), more.model.state_dict())


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "unsealed"])
def test_a_checkpoint_that_is_not_whole_is_passed_over(make_trainer, damage, logs):
    whole = make_trainer(folder="whole")
    whole.fit(1e-2, 3)
    trainer = make_trainer(folder="broken")
    trainer.fit(1e-2, 3)
    last = newest_checkpoint(resumed_folder(trainer))
    assert last.name == "checkpoint-18"
    path = last / "optimizer.pt"
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[:100])
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "missing":
        path.unlink()
    else:
        (last / MANIFEST).unlink()
    assert sealed_state(last) is None
    assert newest_checkpoint(last.parent).name == "checkpoint-12"
    assert "checkpoint-18 was not written to its end, or was changed: passed over" in logs.text
    resumed = make_trainer(folder="broken")
    if damage != "unsealed":
        with pytest.raises(ValueError, match="checkpoint-18 is damaged"):
            resumed.train(resume_from_checkpoint=str(last))
    resumed = make_trainer(folder="broken")
    resumed.fit(1e-2, 3, resume_from_checkpoint=True)
    assert_same(end_of(whole), end_of(resumed))
    assert newest_checkpoint(last.parent).name == "checkpoint-18"


def test_checkpoints_of_an_earlier_fit_with_more_steps_are_older(make_trainer):
    make_trainer().fit(1e-2, 4)
    whole = make_trainer(folder="whole")
    whole.fit(1e-3, 3)
    broken = make_trainer()
    broken.add_callback(Interrupt("on_save", 2))
    with pytest.raises(KeyboardInterrupt):
        broken.fit(1e-3, 3)
    assert newest_checkpoint(resumed_folder(broken)).name == "checkpoint-12"
    resumed = make_trainer()
    resumed.fit(1e-3, 3, resume_from_checkpoint=True)
    assert_same(end_of(whole), end_of(resumed))


def test_with_nothing_to_resume_from_it_says_so(make_trainer):
    with pytest.raises(ValueError, match="holds no whole checkpoint to resume from"):
        make_trainer().fit(1e-2, 1, resume_from_checkpoint=True)


# ---- A recipe ----


def interrupted(trainer, event="on_train_end", count=1, **kwargs):
    trainer.add_callback(Interrupt(event, count))
    with pytest.raises(KeyboardInterrupt):
        run_stages(trainer, STAGES, **kwargs)


@pytest.fixture(scope="module")
def uninterrupted(build_trainer, images, tmp_path_factory):
    """The end of the whole run, made once."""
    trainer = build_trainer(tmp_path_factory.mktemp("whole") / "out", images, **VALUES)
    return end_of(trainer, run_stages(trainer, STAGES))


@pytest.mark.parametrize(
    ("event", "count"),
    [
        ("on_train_begin", 1), ("on_evaluate", 1), ("on_save", 2), ("on_train_end", 1),
        ("on_step_end", 15), ("on_train_end", 2), ("on_step_end", 21), ("on_save", 4),
        *(
            pytest.param(*moment, marks=pytest.mark.kills)
            for moment in (
                ("on_step_end", 4), ("on_train_begin", 2), ("on_step_end", 30), ("on_evaluate", 6), ("on_train_end", 3),
            )
        ),
    ],
)  # fmt: skip
def test_a_recipe_that_is_broken_off_ends_as_if_it_were_not(make_trainer, uninterrupted, event, count, tmp_path):
    interrupted(make_trainer(), event, count)
    resumed = make_trainer()
    results = run_stages(resumed, STAGES, resume=True)
    assert_same(uninterrupted, end_of(resumed, results))
    save_results(results, tmp_path / "out" / "results.json")
    assert sorted(path.name for path in (tmp_path / "out" / "_runs").iterdir()) == [
        "best.safetensors",
        "training-images.txt",
    ]


def test_a_recipe_broken_off_in_the_range_test_and_again_later(make_trainer, monkeypatch, uninterrupted):
    broken, calls = make_trainer(), []
    training_step = SGDRTrainer.training_step

    def failing(self, *args):
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("somebody's own code")
        return training_step(self, *args)

    monkeypatch.setattr(SGDRTrainer, "training_step", failing)
    with pytest.raises(RuntimeError, match="somebody's own code"):
        run_stages(broken, STAGES)
    for event, count in (("on_save", 1), ("on_step_end", 2), ("on_save", 2)):
        interrupted(make_trainer(), event, count, resume=True)
    resumed = make_trainer()
    assert_same(uninterrupted, end_of(resumed, run_stages(resumed, STAGES, resume=True)))


def test_a_full_disk_in_the_middle_loses_nothing(make_trainer, monkeypatch, uninterrupted):
    import hf_sgdr.training.progress

    broken = make_trainer()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf_sgdr.training.progress, "replace_weights", full)
    with pytest.raises(OSError, match="No space left"):
        run_stages(broken, STAGES)
    monkeypatch.undo()
    resumed = make_trainer()
    assert_same(uninterrupted, end_of(resumed, run_stages(resumed, STAGES, resume=True)))


def test_with_nothing_to_go_on_with_a_recipe_starts(make_trainer):
    trainer = make_trainer()
    assert [stage["name"] for stage in run_stages(trainer, STAGES[:1], resume=True).stages] == ["head"]


def test_another_run_is_not_gone_on_with(make_trainer, images, tmp_path):
    interrupted(make_trainer())
    before = json.loads((tmp_path / "out" / "_runs" / "progress.json").read_text())
    for change, message in (
        ({"seed": 7}, "seed was 42 and is now 7"),
        ({"per_device_train_batch_size": 8}, "per_device_train_batch_size was 4 and is now 8"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last was false and is now true"),
    ):
        with pytest.raises(ValueError, match=message):
            run_stages(make_trainer(**change), STAGES, resume=True)
    other = make_trainer(train_dataset=images["train"].select(range(20)))
    with pytest.raises(ValueError, match="training images was"):
        run_stages(other, STAGES, resume=True)
    with pytest.raises(ValueError, match="stages was"):
        run_stages(make_trainer(), STAGES[:2], resume=True)
    assert json.loads((tmp_path / "out" / "_runs" / "progress.json").read_text()) == before


def test_a_run_that_another_version_began_is_refused_and_left_alone(make_trainer, tmp_path):
    interrupted(make_trainer())
    file = tmp_path / "out" / "_runs" / "progress.json"
    before = json.loads(file.read_text())
    del before["format"]  # as earlier versions wrote it
    file.write_text(json.dumps(before))
    with pytest.raises(ValueError, match=r"was begun by another version of hf_sgdr .* begin it anew") as error:
        run_stages(make_trainer(), STAGES, resume=True)
    assert "\n" not in str(error.value)
    assert json.loads(file.read_text()) == before


def test_a_run_that_begins_anew_keeps_what_the_unfinished_one_left(make_trainer, tmp_path, logs):
    interrupted(make_trainer())
    run_stages(make_trainer(), STAGES[:1])
    assert "holds an unfinished run. Resuming goes on with it" in logs.text
    assert (tmp_path / "out" / "_runs-unfinished" / "progress.json").exists()


# ---- Numbers that are none ----


@pytest.mark.parametrize("precompute", [True, False])
def test_a_loss_that_is_no_number_stops_with_the_weights_of_before(make_trainer, precompute):
    trainer = make_trainer(precompute=precompute)
    seen, model, compute_loss = [], trainer.model, trainer.compute_loss

    def poisoned(trained, inputs, *args, **kwargs):
        loss = compute_loss(trained, inputs, *args, **kwargs)
        seen.append(weights(model))
        return loss * float("nan") if len(seen) == 4 else loss

    trainer.compute_loss = poisoned
    with pytest.raises(FloatingPointError, match=r"The loss is NaN at step 4 of 6, learning rate .*head 1\.00e-02"):
        trainer.fit(1e-2, 1)
    assert same(trainer.model.state_dict(), seen[-1])
    assert all(tensor.isfinite().all() for tensor in trainer.model.state_dict().values())


# ---- What is gone on with, and what is not ----


def test_a_run_from_other_starting_weights_is_not_gone_on_with(make_trainer):
    interrupted(make_trainer())
    other = make_trainer()
    with torch.no_grad():
        next(other.model.parameters()).add_(1e-3)
    with pytest.raises(ValueError, match=r"starting weights was .* and is now .*call transformers\.set_seed"):
        run_stages(other, STAGES, resume=True)


def test_the_trainer_that_was_interrupted_goes_on_itself(make_trainer, uninterrupted):
    trainer = make_trainer()
    stop = Interrupt("on_train_end", 2)
    trainer.add_callback(stop)
    with pytest.raises(KeyboardInterrupt):
        run_stages(trainer, STAGES)
    trainer.remove_callback(stop)
    results = run_stages(trainer, STAGES, resume=True)
    assert results.to_dict()["run"] == uninterrupted[0]["run"]
    assert same(uninterrupted[-1], trainer.model.state_dict())


def test_only_results_of_this_very_run_are_a_finished_run(make_trainer, images, tmp_path, logs):
    stages = STAGES[:1]
    results_file = tmp_path / "out" / "results.json"
    trainer = make_trainer()
    assert not is_finished(trainer, stages)
    save_results(run_stages(trainer, stages), results_file)
    assert not is_finished(make_trainer(), stages)  # its model was not saved
    trainer.save_model()
    assert is_finished(make_trainer(), stages)
    assert is_finished(make_trainer(save_total_limit=1, logging_steps=3), stages)  # of no effect
    fewer = make_trainer(train_dataset=images["train"].select(range(20)))
    renamed = make_trainer()
    renamed.model.config.id2label = {0: "cats", 1: "hounds"}
    for other in ((make_trainer(seed=7), stages), (make_trainer(), STAGES[:2]), (fewer, stages), (renamed, stages)):
        logs.clear()
        assert not is_finished(*other)
        assert "results.json is of another run" in logs.text
        assert "This run begins anew." in logs.text
    content = json.loads(results_file.read_text())
    for old in (json.dumps({name: content[name] for name in content if name != "run"}), "[]", "{"):
        results_file.write_text(old)
        assert not is_finished(make_trainer(), stages)


@pytest.mark.parametrize("name", ["best.safetensors", "progress.json", "head/weights.safetensors"])
def test_a_damaged_file_to_go_on_from_is_named_with_the_mend(make_trainer, tmp_path, name):
    interrupted(make_trainer(), "on_train_begin", 2)
    path = tmp_path / "out" / "_runs" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"{name} is damaged \(.*\).*: begin the run anew") as error:
        run_stages(make_trainer(), STAGES, resume=True)
    assert "\n" not in str(error.value)
    assert "--" not in str(error.value)  # a library's error names no flags
    assert not (tmp_path / "out" / "_runs" / "lock.json").exists()


def test_errors_of_the_library_name_no_flags(make_trainer):
    interrupted(make_trainer())
    with pytest.raises(ValueError, match="seed was 42 and is now 7") as error:
        run_stages(make_trainer(seed=7), STAGES, resume=True)
    assert "--" not in str(error.value)
