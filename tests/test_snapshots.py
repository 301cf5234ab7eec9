import json

import numpy as np
import pytest
import torch
from helpers import losses, same, tiny_resnet, tiny_vit, weights
from safetensors.torch import load_file, save_file, save_model
from transformers import TrainerCallback

from hf_sgdr import (
    SnapshotCallback,
    average_weights,
    ensemble_predictions,
    get_sgdr_schedule,
)

SPLITS = {"train": {"cats": 8, "dogs": 8}, "valid": {"cats": 4, "dogs": 4}}


class Noted(TrainerCallback):
    """The weights after every step, and every validation loss with its weights."""

    def __init__(self, model):
        self.model, self.steps, self.losses = model, [], []

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(weights(self.model))

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.losses.append((metrics["eval_loss"], weights(self.model)))


@pytest.mark.parametrize("kwargs", [{"precompute": True}, {"freeze_to": 0}], ids=["head", "whole"])
def test_a_snapshot_is_what_the_cycles_last_step_made(make_trainer, tmp_path, kwargs):
    trainer = make_trainer(**kwargs)
    noted = Noted(trainer.model)
    trainer.add_callback(noted)
    trainer.add_callback(SnapshotCallback(tmp_path / "shots"))
    trainer.fit(1e-2, 2, cycle_len=1, cycle_mult=2)  # cycles of 2 and 4 steps
    names = sorted(path.name for path in (tmp_path / "shots").iterdir())
    assert names == ["best.safetensors", "cycle-001.safetensors", "cycle-002.safetensors", "figures.json"]
    for name, step in (("cycle-001", 2), ("cycle-002", 6)):
        snapshot = load_file(tmp_path / "shots" / f"{name}.safetensors")
        assert snapshot.keys() <= trainer.model.state_dict().keys()
        assert same(snapshot, noted.steps[step - 1])
    assert same(load_file(tmp_path / "shots" / "best.safetensors"), min(noted.losses, key=lambda pair: pair[0])[1])


def test_with_several_evaluation_sets_the_mean_of_their_losses_decides(make_trainer, images, tmp_path):
    whole = images["validation"]
    trainer = make_trainer(eval_dataset={"large": whole.select(range(1, 8)), "small": whole.select(range(1))})
    trainer.add_callback(SnapshotCallback(tmp_path / "shots"))
    trainer.fit(1e-2, 2, cycle_len=1)
    means = np.mean([losses(trainer, "eval_large_loss"), losses(trainer, "eval_small_loss")], axis=0)
    recorded = json.loads((tmp_path / "shots" / "figures.json").read_text())
    assert [recorded[name]["eval_loss"] for name in ("cycle-001", "cycle-002")] == pytest.approx(means)
    best = load_file(tmp_path / "shots" / f"cycle-00{1 + means.argmin()}.safetensors")
    assert same(best, load_file(tmp_path / "shots" / "best.safetensors"))
    fit = trainer.history.fits[-1]
    assert (fit["eval_loss"], fit["best_epoch"]) == (pytest.approx(means[-1]), 1 + means.argmin())


def test_average_and_ensemble(make_trainer, tmp_path):
    trainer = make_trainer(freeze_to=0, freeze_batch_norm=True)
    trainer.add_callback(SnapshotCallback())
    trainer.fit(1e-2, 3, cycle_len=1)
    folder = tmp_path / "out" / "_runs" / "snapshots"
    files = sorted(folder.glob("cycle-*"))
    assert len(files) == 3
    last = weights(trainer.model)
    probabilities = []
    for file in files:
        trainer.model.load_state_dict(load_file(file), strict=False)
        probabilities.append(np.exp(trainer.log_predictions()))
    trainer.model.load_state_dict(last)
    np.testing.assert_allclose(ensemble_predictions(trainer, folder), np.mean(probabilities, axis=0), atol=1e-6)
    assert same(last, trainer.model.state_dict())
    mean = average_weights(files, trainer.model)
    for name, tensor in mean.items():
        values = [load_file(file)[name] for file in files]
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, torch.stack(values).mean(0), atol=1e-6, rtol=1e-5)
        else:
            assert torch.equal(tensor, values[-1])
    assert same(mean, trainer.model.state_dict())


def test_an_evaluation_after_training_changes_no_snapshot_and_other_models_are_refused(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.add_callback(SnapshotCallback(tmp_path / "shots"))
    trainer.fit(1e-2, 2, cycle_len=1)
    best = (tmp_path / "shots" / "best.safetensors").read_bytes()
    with torch.no_grad():
        trainer.model.timm_model.fc.weight.zero_()
    trainer.evaluate(trainer.train_dataset)
    trainer.evaluate()
    assert (tmp_path / "shots" / "best.safetensors").read_bytes() == best
    for other in (tiny_vit(), tiny_resnet(["a", "b", "c"])):
        with pytest.raises(ValueError, match="is of another model than this"):
            average_weights(tmp_path / "shots", other)


def test_an_ensemble_of_several_labels_is_the_mean_of_sigmoids(make_stock_trainer, tiny_model, tmp_path):
    tiny_model.config.problem_type = "multi_label_classification"
    rows = [{"pixel_values": torch.full((3, 32, 32), float(i))} for i in range(4)]
    trainer = make_stock_trainer(tiny_model, None, eval_dataset=rows)
    files, probabilities = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"], []
    for file in files:
        torch.nn.init.normal_(list(tiny_model.parameters())[-1])
        save_file(weights(tiny_model), file)
        probabilities.append(torch.from_numpy(trainer.predict(rows).predictions).sigmoid().numpy())
    np.testing.assert_allclose(ensemble_predictions(trainer, files), np.mean(probabilities, axis=0), atol=1e-6)


def test_without_cycles_or_snapshots_it_says_so(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.add_callback(SnapshotCallback())
    with pytest.raises(ValueError, match=r"needs the cycles of get_sgdr_schedule, .* give the Trainer optimizers="):
        trainer.fit(1e-2, 1)
    with pytest.raises(ValueError, match="no snapshot there"):
        average_weights(tmp_path)


def test_on_a_stock_trainer_with_several_evaluation_sets(make_stock_trainer, tiny_model, tmp_path):
    rows = [{"pixel_values": torch.full((3, 32, 32), float(i % 2)), "labels": i % 2} for i in range(8)]
    optimizer = torch.optim.SGD(tiny_model.parameters(), lr=1e-3)
    trainer = make_stock_trainer(
        tiny_model, rows, eval_dataset={"a": rows[:2], "b": rows[2:]}, eval_strategy="epoch", num_train_epochs=1,
        callbacks=[SnapshotCallback(tmp_path / "shots", ["eval_a_loss", "eval_b_loss"])],
        optimizers=(optimizer, get_sgdr_schedule(optimizer, 1)),
    )  # fmt: skip
    trainer.train()
    assert same(weights(tiny_model), load_file(tmp_path / "shots" / "best.safetensors"))
    recorded = json.loads((tmp_path / "shots" / "figures.json").read_text())
    means = (losses(trainer, "eval_a_loss")[0] + losses(trainer, "eval_b_loss")[0]) / 2
    assert recorded["cycle-001"]["eval_loss"] == pytest.approx(means)


def test_on_a_stock_trainer(make_stock_trainer, tiny_model, tmp_path):
    rows = [{"pixel_values": torch.full((3, 32, 32), float(i % 2)), "labels": i % 2} for i in range(8)]
    optimizer = torch.optim.SGD(tiny_model.parameters(), lr=1e-3)
    make_stock_trainer(
        tiny_model, rows, num_train_epochs=3, per_device_train_batch_size=4, callbacks=[SnapshotCallback()],
        optimizers=(optimizer, get_sgdr_schedule(optimizer, 2, 2)),
    ).train()  # fmt: skip
    assert [path.name for path in sorted((tmp_path / "out" / "_runs" / "snapshots").iterdir())] == [
        "cycle-001.safetensors", "cycle-002.safetensors",
    ]  # fmt: skip


def test_after_a_resume_a_cycle_has_the_metrics_of_its_new_weights(make_trainer, tmp_path):
    trainer = make_trainer(save_strategy="epoch", callbacks=[SnapshotCallback(tmp_path / "shots")])
    trainer.fit(1e-2, 2, cycle_len=1)
    figures = tmp_path / "shots" / "figures.json"
    recorded = json.loads(figures.read_text())
    expected = recorded["cycle-002"]["eval_loss"]
    figures.write_text(json.dumps(recorded | {"cycle-002": {"epoch": 2.0, "eval_loss": 0.0}}))
    again = make_trainer(save_strategy="epoch", callbacks=[SnapshotCallback(tmp_path / "shots")])
    again.fit(1e-2, 2, cycle_len=1, resume_from_checkpoint=str(next((tmp_path / "out").rglob("checkpoint-2"))))
    assert json.loads(figures.read_text())["cycle-002"]["eval_loss"] == pytest.approx(expected)


def test_losses_that_no_evaluation_has_are_named_when_training_ends(make_stock_trainer, tiny_model, tmp_path, logs):
    rows = [{"pixel_values": torch.full((3, 32, 32), float(i % 2)), "labels": i % 2} for i in range(8)]
    optimizer = torch.optim.SGD(tiny_model.parameters(), lr=1e-3)
    make_stock_trainer(
        tiny_model, rows, eval_dataset={"a": rows[:2], "b": rows[2:]}, eval_strategy="epoch", num_train_epochs=1,
        callbacks=[SnapshotCallback(tmp_path / "shots")], optimizers=(optimizer, get_sgdr_schedule(optimizer, 1)),
    ).train()  # fmt: skip
    assert logs.text.count("the evaluations gave eval_a_loss, eval_b_loss, but not eval_loss") == 1
    assert "Give losses=['eval_a_loss', 'eval_b_loss']" in logs.text


def test_an_ensemble_needs_one_data_set_and_logits(make_stock_trainer, tiny_model, tmp_path):
    rows = [{"pixel_values": torch.full((3, 32, 32), float(i))} for i in range(4)]
    save_file(weights(tiny_model), tmp_path / "a.safetensors")
    for sets in (None, {"a": rows, "b": rows}):
        trainer = make_stock_trainer(tiny_model, None, eval_dataset=sets)
        with pytest.raises(ValueError, match="the trainer has no single eval_dataset: give dataset="):
            ensemble_predictions(trainer, [tmp_path / "a.safetensors"])
    classes = make_stock_trainer(tiny_model, None, preprocess_logits_for_metrics=lambda logits, _: logits.argmax(-1))
    with pytest.raises(ValueError, match=r"The predictions are of shape \(4,\), and an ensemble is of logits"):
        ensemble_predictions(classes, [tmp_path / "a.safetensors"], rows)
    one, two = make_stock_trainer(tiny_vit(["a"]), None), make_stock_trainer(tiny_vit(), None)
    save_file(weights(one.model), tmp_path / "one.safetensors")
    save_file(weights(two.model), tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match=r"of shape \(4, 1\)"):
        ensemble_predictions(one, [tmp_path / "one.safetensors"], rows)
    with pytest.raises(ValueError, match=r"classifier.bias is \(1,\) in the file and \(2,\) in the model"):
        ensemble_predictions(two, [tmp_path / "one.safetensors"], rows)
    with pytest.raises(ValueError, match=r"one\.safetensors is of another model than .*two\.safetensors"):
        average_weights([tmp_path / "one.safetensors", tmp_path / "two.safetensors"])


def test_a_checkpoint_with_other_names_on_disk_is_refused_with_what_serves(tmp_path):
    model = tiny_vit()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has other names for its weights.* of safetensors.torch.save_model") as error:
        average_weights([tmp_path / "model.safetensors"], model)
    assert "\n" not in str(error.value)
    save_model(model, tmp_path / "own.safetensors")
    average_weights([tmp_path / "own.safetensors"], model)
