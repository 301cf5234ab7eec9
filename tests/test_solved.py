"""The solved head in a trainer and in a recipe, and stages that go on from it."""

import numpy as np
import pytest
import torch
from datasets import ClassLabel
from helpers import Interrupt, same, tiny_resnet, tiny_vit, weights
from safetensors.torch import save_model
from transformers import TrainerCallback

from hf_sgdr import LayerGroups, Stage, average_with_start, load_image_folder, run_stages
from hf_sgdr.recipe import SOLVED_HEAD


@pytest.fixture(scope="module")
def images(tmp_path_factory, make_image_folder):
    return make_image_folder(
        tmp_path_factory.mktemp("images"), {"train": {"cats": 13, "dogs": 13}, "valid": {"cats": 5, "dogs": 6}}
    )


def test_the_solution_is_in_the_head_whatever_is_frozen_and_nothing_else_moves(make_trainer):
    trainer = make_trainer(freeze_to=0, precompute_views=0)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    solution = trainer.solve_head(strengths=[0.1])
    after = trainer.model.state_dict()
    assert torch.equal(after["timm_model.fc.weight"], solution.weight)
    assert torch.equal(after["timm_model.fc.bias"], solution.bias)
    assert all(torch.equal(after[name], before[name]) for name in before if ".fc." not in name)
    assert trainer.layer_groups.first_trained == 0


def test_the_models_last_class_may_have_no_training_image(make_trainer, images):
    names = ["cats", "dogs", "emus"]
    rows = {
        name: part.cast_column("label", ClassLabel(names=names)) for name, part in load_image_folder(images).items()
    }
    trainer = make_trainer(tiny_resnet(names), images=rows)
    assert trainer.solve_head(strengths=[0.1]).weight.shape[0] == 3
    assert trainer.log_predictions().argmax(1).max() < 2
    assert run_stages(trainer, [Stage("head", lr=0.01, precompute=True)]).solved is not None


def test_stored_views_are_solved_on_too_and_only_plain_images_are_scored(make_trainer):
    plain = make_trainer().solve_head(strengths=[0.1])
    views = make_trainer(precompute_views=2).solve_head(strengths=[0.1])
    assert plain.out_of_fold.shape == views.out_of_fold.shape == (26, 2)
    assert not torch.equal(plain.weight, views.weight)


def test_folds_by_images_hold_out_all_their_views(make_trainer):
    mask = np.arange(26) % 2 == 0
    every, rows = np.tile(mask, 3), [np.flatnonzero(mask), np.flatnonzero(~mask)]
    trainer = make_trainer(precompute_views=2)
    losses = {
        trainer.solve_head(strengths=[0.1], folds=[(train, held_out), (held_out, train)]).cv_loss
        for train, held_out in ((every, ~every), (mask, ~mask), rows)
    }
    assert len(losses) == 1


def test_a_stage_that_solves_trains_nothing_and_the_next_goes_on_from_it(make_trainer):
    trainer = make_trainer()
    stages = [
        Stage("head", solve=True, views=2),
        Stage("all", lr=1e-5, cycle_len=1, freeze_to=0, freeze_batch_norm=True),
    ]
    results = run_stages(trainer, stages)
    head, rest = results.stages
    assert (head["epochs"], head["precompute"], head["learning_rates"]) == (0, True, [0.0] * 3)
    assert head.keys() == rest.keys() | {"cv_loss", "cv_accuracy"}
    assert rest["eval_loss"] == pytest.approx(head["eval_loss"], rel=0.05)
    assert trainer.args.precompute_views == 0


def test_a_resumed_run_keeps_its_solved_head(make_trainer):
    stages = [Stage("head", solve=True), Stage("all", lr=1e-3, cycle_len=1, freeze_to=0)]

    def broken(*args, **kwargs):
        raise KeyboardInterrupt

    whole = run_stages(make_trainer(folder="whole"), stages).to_dict()
    trainer = make_trainer(folder="broken")
    trainer.fit = broken
    with pytest.raises(KeyboardInterrupt):
        run_stages(trainer, stages)
    resumed = run_stages(make_trainer(folder="broken"), stages, resume=True).to_dict()
    for results in (whole, resumed):
        for record in (*results["stages"], results["solved"]):
            record.pop("seconds", None)
    assert resumed == whole


# ---- The yardstick beside a recipe that precomputes ----


def test_no_run_ends_worse_than_its_own_solved_head(make_trainer, capsys):
    trainer = make_trainer()
    stages = (Stage("hostile", lr=1e3, precompute=True), Stage("more", lr=1e2, freeze_to=0))
    results = run_stages(trainer, stages)
    assert results.best["stage"] == SOLVED_HEAD
    assert results.solved["eval_loss"] < min(stage["eval_loss"] for stage in results.stages)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(results.solved["eval_loss"], abs=1e-5)
    table = capsys.readouterr().out
    assert table.index("solved head: strength") < table.index("    solved") < table.index("hostile: precomputed")


def test_the_solved_head_is_told_as_a_stage_is(make_trainer):
    results = run_stages(make_trainer(), [Stage("head", lr=1e-1, precompute=True)])
    assert results.solved.keys() == results.stages[0].keys() | {"cv_loss", "cv_accuracy"}
    assert results.to_dict()["solved"]["name"] == SOLVED_HEAD
    assert [row["name"] for row in results.rows] == [SOLVED_HEAD, "head"]
    solving = run_stages(make_trainer(), [Stage("head", solve=True)])
    assert solving.solved == solving.stages[0]
    assert [row["name"] for row in solving.rows] == ["head"]


def test_training_is_the_same_beside_a_solved_head(make_trainer, monkeypatch):
    stages = [Stage("head", lr=1e-1, cycles=2, precompute=True), Stage("all", lr=1e-3, cycle_len=1, freeze_to=0)]
    beside = run_stages(make_trainer(folder="beside"), stages)
    monkeypatch.setattr("hf_sgdr.training.stages._solve_beside", lambda *args: None)
    alone = run_stages(make_trainer(folder="alone"), stages)
    assert alone.solved is None
    for one, other in zip(beside.stages, alone.stages, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}


def test_without_a_linear_head_it_is_left_out_with_one_line(make_trainer, caplog):
    trainer = make_trainer()
    trainer.model.timm_model.fc = torch.nn.Linear(96, 2, bias=False)
    trainer.layer_groups = LayerGroups.from_model(trainer.model)
    trainer.freeze()
    results = run_stages(trainer, [Stage("head", lr=1e-1, precompute=True), Stage("more", lr=1e-2, precompute=True)])
    assert results.solved is None
    assert [line for line in caplog.messages if "solved head" in line] == [
        "No solved head beside the stages: TimmWrapperForImageClassification has no single linear head with a bias, "
        "which can be solved."
    ]


def test_a_run_that_was_interrupted_after_its_solved_head_keeps_it(make_trainer, monkeypatch):
    stages = [Stage("head", lr=1e-1, precompute=True)]
    trainer = make_trainer()
    monkeypatch.setattr(trainer, "fit", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_stages(trainer, stages)
    monkeypatch.setattr("hf_sgdr.training.stages.solved_record", lambda *args, **kwargs: 1 / 0)
    results = run_stages(make_trainer(), stages, resume=True)
    assert results.solved["name"] == SOLVED_HEAD


def test_a_stage_stores_views_of_its_own_and_its_solved_head_sees_them(make_trainer, monkeypatch):
    trainer = make_trainer()
    stored = []
    solve = trainer.features.solve_head
    monkeypatch.setattr(
        trainer.features,
        "solve_head",
        lambda *args, **kwargs: stored.append(trainer.args.precompute_views) or solve(*args, **kwargs),
    )
    run_stages(trainer, [Stage("head", lr=1e-2, cycles=2, precompute=True, views=2)])
    assert stored == [2]
    assert trainer.args.precompute_views == 0
    assert len(trainer.features.training(trainer.train_dataset).views) == 1


def test_where_training_does_not_augment_a_stage_has_no_views(make_trainer, caplog):
    trainer = make_trainer(augment=None, max_zoom=1.0)
    results = run_stages(trainer, [Stage("head", lr=1e-2, precompute=True, views=2)])
    assert "head: views=2 have no effect: the training transform augments nothing." in caplog.messages
    assert results.solved is not None


# ---- Stages that begin from the best weights, and averages ----

FROM_BEST = [
    Stage("head", lr=1e-3, precompute=True),
    Stage("all", lr=1e-3, cycle_len=1, cycles=2, freeze_to=0, freeze_batch_norm=True, from_best=True, average=True),
]


def test_a_stage_begins_from_the_best_weights_so_far(make_trainer, monkeypatch):
    trainer = make_trainer()
    begun = []
    fit = trainer.fit

    def noted(*args, **kwargs):
        begun.append(weights(trainer.model))
        return fit(*args, **kwargs)

    monkeypatch.setattr(trainer, "fit", noted)
    results = run_stages(trainer, [FROM_BEST[0], Stage("again", from_best=True), Stage("last")])
    assert results.best["stage"] == SOLVED_HEAD
    assert same(begun[1], weights(trainer.model))  # which a run ends with, too
    assert not same(begun[2], begun[1])


def test_the_average_of_start_and_end_competes(make_trainer, monkeypatch):
    trainer = make_trainer()
    losses = []

    class Note(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            losses.append(metrics["eval_loss"])

    trainer.add_callback(Note())
    stage = Stage("all", lr=1.0, cycle_len=1, freeze_to=0, average=True)
    results = run_stages(trainer, [stage])
    assert len(losses) == 1 + 4
    assert results.best["eval_loss"] == min(losses)

    def solved(trainer, start):
        trainer.solve_head()
        trainer.evaluate()

    monkeypatch.setattr("hf_sgdr.training.stages.average_with_start", solved)
    assert run_stages(make_trainer(), [stage]).best["stage"] == "all (average)"


def test_the_average_of_start_and_end_on_a_stock_trainer(make_stock_trainer, tmp_path):
    rows = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 2} for i in range(8)]
    trainer = make_stock_trainer(tiny_resnet(), rows, eval_dataset=rows, learning_rate=1e-2, num_train_epochs=1)
    save_model(trainer.model, tmp_path / "start.safetensors")
    start = weights(trainer.model)
    trainer.train()
    end = weights(trainer.model)
    losses = average_with_start(trainer, tmp_path / "start.safetensors", shares=[0.5])
    assert list(losses) == [0.5, 1.0]
    share = min(losses, key=losses.__getitem__)
    expected = {name: torch.lerp(start[name], end[name], share) for name in end if end[name].is_floating_point()}
    now = weights(trainer.model)
    assert all(torch.equal(now[name], value) for name, value in expected.items())
    with pytest.raises(ValueError, match=r"shares=\[2\]: each must be above 0 and below 1"):
        average_with_start(trainer, tmp_path / "start.safetensors", shares=[2])


def without_a_set(trainer):
    trainer.eval_dataset = None


def interrupted(trainer):
    trainer.add_callback(Interrupt("on_evaluate", 2))


def without_a_loss(trainer):
    trainer.label_names = ["none"]


@pytest.mark.parametrize(
    ("breaks", "error"), [(without_a_set, ValueError), (interrupted, KeyboardInterrupt), (without_a_loss, ValueError)]
)
def test_averages_that_cannot_be_evaluated_leave_the_present_weights(make_stock_trainer, tmp_path, breaks, error):
    rows = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 2} for i in range(4)]
    trainer = make_stock_trainer(tiny_resnet(), rows, eval_dataset=rows, learning_rate=1e-2, max_steps=1)
    save_model(trainer.model, tmp_path / "start.safetensors")
    trainer.train()
    end = weights(trainer.model)
    breaks(trainer)
    with pytest.raises(error):
        average_with_start(trainer, tmp_path / "start.safetensors")
    assert same(end, trainer.model.state_dict())


def test_of_equal_averages_the_nearest_to_the_end_is_kept(make_stock_trainer, tmp_path):
    rows = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 2} for i in range(4)]
    trainer = make_stock_trainer(tiny_resnet(), rows, eval_dataset=rows, learning_rate=1e-2, max_steps=1)
    save_model(trainer.model, tmp_path / "start.safetensors")
    trainer.train()
    end = weights(trainer.model)
    trainer.evaluate = lambda: {"eval_loss": 1.0}
    average_with_start(trainer, tmp_path / "start.safetensors")
    assert same(end, trainer.model.state_dict())


@pytest.mark.parametrize("labels", [["a"], ["a", "b", "c"]])
def test_a_start_of_other_shapes_is_refused(make_stock_trainer, tmp_path, labels):
    save_model(tiny_vit(labels), tmp_path / "start.safetensors")
    rows = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 2} for i in range(4)]
    trainer = make_stock_trainer(tiny_vit(), rows, eval_dataset=rows)
    with pytest.raises(ValueError, match=rf"classifier.bias is \({len(labels)},\) in the file and \(2,\) in the model"):
        average_with_start(trainer, tmp_path / "start.safetensors")


@pytest.mark.parametrize(("event", "count"), [("on_step_end", 4), ("on_evaluate", 4), ("on_train_end", 2)])
def test_a_run_broken_off_in_a_stage_from_the_best_ends_as_if_it_were_not(make_trainer, event, count):
    whole = make_trainer(folder="whole", save_strategy="epoch")
    expected = run_stages(whole, FROM_BEST)
    trainer = make_trainer(folder="broken", save_strategy="epoch")
    trainer.add_callback(Interrupt(event, count))
    with pytest.raises(KeyboardInterrupt):
        run_stages(trainer, FROM_BEST)
    broken = make_trainer(folder="broken", save_strategy="epoch")
    results = run_stages(broken, FROM_BEST, resume=True)
    assert results.best == expected.best
    assert same(weights(broken.model), weights(whole.model))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": 0.1}, "head: solve trains nothing, so it takes no lr: leave that out."),
        ({"lr": "auto", "cycles": 2}, "takes no lr, cycles"),
        ({"cycle_len": 1}, "takes no cycle_len"),
        ({"freeze_to": 0}, "takes no freeze_to"),
        ({"range_test_steps": 10}, "takes no range_test_steps"),
        ({"solve": False, "views": 4}, "views=4 are stored: they need precompute=True or solve"),
        ({"views": -1}, "head: views=-1: must be an integer >= 0"),
        ({"solve": "yes"}, "solve='yes': must be true or false"),
    ],
)
def test_what_a_solving_stage_does_not_take_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Stage(**{"name": "head", "solve": True, **values})


def test_a_stage_after_it_needs_a_rate_of_its_own(make_trainer):
    with pytest.raises(ValueError, match="Stage 'all': no stage before it has a rate: give it lr"):
        run_stages(make_trainer(), [Stage("head", solve=True), Stage("all", cycle_len=1)])


def test_a_head_that_is_no_linear_layer_with_a_bias_is_refused(make_trainer):
    trainer = make_trainer()
    trainer.model.timm_model.fc = torch.nn.Linear(96, 2, bias=False)
    trainer.layer_groups = LayerGroups.from_model(trainer.model)
    with pytest.raises(ValueError, match="TimmWrapperForImageClassification has no single linear head with a bias"):
        trainer.solve_head()
