"""`trainer.push_to_hub()`: what a run by hand pushes, and snapshots as branches."""

import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import losses, same, tiny_vit
from huggingface_hub import ModelCard
from loopback_hub import TOKEN
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from hf_sgdr import (
    SGDRTrainingArguments,
    SnapshotCallback,
    run_stages,
)
from hf_sgdr.callbacks.snapshots import snapshot_files
from hf_sgdr.cli.arguments import DataArguments, ModelArguments
from hf_sgdr.cli.parser import parse
from hf_sgdr.hub.push import push_snapshots
from hf_sgdr.hub.recipe_file import write_recipe
from hf_sgdr.hub.retry import HubError
from hf_sgdr.recipe import Stage
from hf_sgdr.training.record import run_record
from hf_sgdr.training.stages import save_results


@dataclass
class Stages:
    stages: list[str] | None = None


@pytest.fixture
def logged_in(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


def mentions(files: dict[str, bytes], *secrets: object) -> list[str]:
    texts = {name: body.decode() for name, body in files.items() if not name.endswith((".png", ".safetensors"))}
    return [f"{name}: {secret}" for name, text in texts.items() for secret in map(str, secrets) if secret in text]


def test_a_run_by_hand_is_pushed_with_all_that_it_measured(logged_in, make_trainer, tmp_path):
    trainer = make_trainer(hub_model_id="ann/cats")
    trainer.precompute = True
    trainer.lr_find(num_steps=20)
    trainer.fit(1e-2, 1, name="Head first")
    trainer.precompute = False
    trainer.unfreeze()
    trainer.fit([1e-4, 1e-3, 1e-2], 2, cycle_len=1, cycle_mult=2)
    trainer.push_to_hub()
    files = logged_in.repos["ann/cats"].files()
    assert {"config.json", "model.safetensors", "README.md", "results.json", "recipe.yaml"} <= files.keys()
    assert {"run.png", "Head first-range-test.png", "fit-002-learning-rate.png"} <= files.keys()
    results = json.loads(files["results.json"])
    assert [stage["name"] for stage in results["stages"]] == ["Head first", "fit-002"]
    assert results["best"]["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], abs=1e-6)
    recipe = yaml.safe_load(files["recipe.yaml"])
    assert [Stage.from_dict(stage) for stage in recipe["stages"]] == [
        Stage("head-first", lr=[1e-2] * 3, cycles=1, freeze_to=-1, precompute=True),
        Stage("fit-002", lr=[1e-4, 1e-3, 1e-2], cycles=2, cycle_len=1, cycle_mult=2, freeze_to=0),
    ]
    assert mentions(files, Path.home(), tmp_path, Path.cwd(), TOKEN) == []
    assert not any("training_args" in name or "/" in name for name in files)


def test_a_head_that_was_solved_after_a_run_is_pushed_as_the_weights_that_it_is(logged_in, make_trainer):
    trainer = make_trainer()
    run_stages(trainer, (Stage("head", lr=1e-2, cycles=1, precompute=True),))
    trainer.push_to_hub()
    trainer.solve_head()
    trainer.push_to_hub()
    files = logged_in.repos["ann/out"].files()
    results = json.loads(files["results.json"])
    assert (results["best"], results["run"], results["solved"]) == ({"stage": "solved head"}, "", None)
    assert "The saved weights are those with" not in files["README.md"].decode()
    trainer.history.plot()  # marks nothing as kept
    trainer.fit(1e-2, 1, name="more")
    assert trainer.history.results(1).best["stage"] == "more"


def test_a_recipe_in_python_is_pushed_with_its_results(logged_in, make_trainer):
    trainer = make_trainer()
    stages = (Stage("head", lr=1e-2, cycles=1, precompute=True), Stage("more", cycles=1, cycle_len=1))
    results = run_stages(trainer, stages)
    trainer.push_to_hub()
    files = logged_in.repos["ann/out"].files()
    assert json.loads(files["results.json"]) == results.to_dict()
    assert [Stage.from_dict(stage) for stage in yaml.safe_load(files["recipe.yaml"])["stages"]] == list(stages)
    assert {"run.png", "more-learning-rate.png"} <= files.keys()


def test_the_whole_model_is_pushed_while_precompute_is_on(logged_in, make_trainer, tmp_path):
    trainer = make_trainer(hub_model_id="ann/cats")
    trainer.precompute = True
    trainer.fit(1e-2, 1)
    trainer.push_to_hub()
    (tmp_path / "weights").write_bytes(logged_in.repos["ann/cats"].files()["model.safetensors"])
    pushed = load_file(tmp_path / "weights")
    assert len(pushed) > 20
    assert same(pushed, trainer.model.state_dict())


def test_files_of_the_run_before_are_written_anew_and_newer_ones_stay(logged_in, make_trainer, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("README.md", "results.json", "recipe.yaml"):
        (out / name).write_text("old: yes\n")
    trainer = make_trainer(hub_model_id="ann/cats")
    trainer.fit(1e-2, 1)
    trainer.push_to_hub()
    repo = logged_in.repos["ann/cats"]
    assert not any(b"old: yes" in body for body in repo.files().values())
    (out / "README.md").write_text("---\nlicense: mit\n---\nMy own words.\n")
    trainer.push_to_hub()
    assert repo.files()["README.md"] == b"---\nlicense: mit\n---\nMy own words.\n"
    trainer.push_to_hub(license="apache-2.0")
    assert b"license: apache-2.0" in repo.files()["README.md"]


def test_without_validation_images_there_is_no_card_but_a_push(logged_in, make_trainer, tmp_path):
    trainer = make_trainer(eval_dataset=None, eval_strategy="no", hub_model_id="ann/cats")
    trainer.fit(1e-2, 1)
    trainer.push_to_hub()
    files = logged_in.repos["ann/cats"].files()
    assert "README.md" not in files
    assert json.loads(files["results.json"])["best"]["eval_loss"] is None


def test_a_model_of_transformers_goes_with_its_processor(logged_in, make_trainer):
    trainer = make_trainer(tiny_vit(), hub_model_id="ann/vit")
    trainer.fit(1e-2, 1)
    trainer.push_to_hub()
    assert json.loads(logged_in.repos["ann/vit"].files()["preprocessor_config.json"])["crop_size"]["height"] == 32


def test_saving_pushes_where_the_arguments_say_so(logged_in, make_trainer):
    trainer = make_trainer(push_to_hub=True, hub_model_id="ann/cats", hub_private_repo=True)
    assert logged_in.repos["ann/cats"].private  # made before anything was trained
    trainer.fit(1e-2, 1)
    assert logged_in.repos["ann/cats"].messages == ["initial commit"]
    trainer.save_model()
    assert logged_in.repos["ann/cats"].messages == ["initial commit", "Model save"]
    future = trainer.push_to_hub(commit_message="Once more", blocking=False, revision="trial")
    assert future.result().oid == logged_in.repos["ann/cats"].branches["trial"]


def test_without_a_login_no_trainer_is_made_that_is_to_push(hub, make_trainer, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(HubError, match="nobody is logged in"):
        make_trainer(push_to_hub=True, hub_model_id="ann/cats")


def test_a_token_in_the_call_serves_and_is_not_kept(hub, make_trainer, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    trainer = make_trainer(hub_model_id="ann/cats")
    trainer.fit(1e-2, 1)
    trainer.push_to_hub(token=TOKEN)
    assert not any(TOKEN.encode() in body for body in hub.repos["ann/cats"].files().values())
    saved = [path for path in Path(trainer.args.output_dir).rglob("*") if path.is_file()]
    assert saved
    assert not any(TOKEN.encode() in path.read_bytes() for path in saved)


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_a_strategy_that_pushes_checkpoints_is_refused(strategy, tmp_path):
    with pytest.raises(ValueError, match=r'would push checkpoints.*only "end" is taken'):
        SGDRTrainingArguments(str(tmp_path), push_to_hub=True, hub_strategy=strategy)


# ---- Snapshots ----


@pytest.fixture
def with_snapshots(make_trainer):
    trainer = make_trainer()
    trainer.add_callback(SnapshotCallback())
    trainer.unfreeze()
    trainer.fit(3e-2, 3, cycle_len=1)
    trainer.save_model()
    return trainer


def test_snapshots_are_branches_that_hold_a_whole_model(hub, api, with_snapshots, tmp_path, monkeypatch):
    out = tmp_path / "out"
    (out / "README.md").write_text("# Of the last weights\n")
    done = push_snapshots(out, "ann/cats", api=api)
    repo = hub.repos["ann/cats"]
    assert list(done) == ["cycle-001", "cycle-002", "cycle-003"]
    assert repo.branches.keys() == {"main", *done}
    for branch, commit in done.items():
        assert commit.oid == repo.branches[branch]
        files = repo.files(branch)
        assert files.keys() == {".gitattributes", "config.json", "model.safetensors"}
        folder = tmp_path / branch
        folder.mkdir()
        for name, body in files.items():
            (folder / name).write_bytes(body)
        model = AutoModelForImageClassification.from_pretrained(folder)
        expected = load_file(out / "_runs" / "snapshots" / f"{branch}.safetensors")
        assert model.config.id2label == {0: "cats", 1: "dogs"}
        assert same(expected, model.state_dict())
    assert len({repo.files(branch)["model.safetensors"] for branch in done}) == 3


def test_the_best_snapshots_are_those_with_the_lowest_validation_loss(hub, api, with_snapshots, tmp_path):
    expected = [f"cycle-{number + 1:03d}" for number in sorted(np.argsort(losses(with_snapshots))[:2])]
    assert list(push_snapshots(tmp_path / "out", "ann/cats", best=2, api=api)) == expected
    with pytest.raises(ValueError, match=r"The 4 best of 3 snapshots: give a number from 1 to 3\."):
        push_snapshots(tmp_path / "out", "ann/cats", best=4, api=api)
    (tmp_path / "out" / "_runs" / "snapshots" / "figures.json").unlink()
    with pytest.raises(ValueError, match=r"cycle-001\.safetensors: no validation loss is recorded"):
        push_snapshots(tmp_path / "out", "ann/cats", best=1, api=api)


def test_a_broken_push_of_snapshots_says_how_to_go_on(hub, api, with_snapshots, tmp_path):
    hub.fail("POST", "/commit/cycle-002", 403)
    with pytest.raises(HubError) as caught:
        push_snapshots(tmp_path / "out", "ann/cats", best=3, api=api)
    assert str(caught.value).endswith(f"hf-sgdr push {tmp_path}/out ann/cats --snapshots --best 3")
    assert "cycle-002: 403" in str(caught.value)
    (tmp_path / "out" / "_runs" / "snapshots" / "cycle-001.safetensors").unlink()
    assert list(push_snapshots(tmp_path / "out", "ann/cats", api=api)) == ["cycle-002", "cycle-003"]


def test_a_training_that_begins_removes_the_snapshots_of_the_one_before(with_snapshots, tmp_path):
    with_snapshots.fit(1e-2, 1, cycle_len=1)
    assert sorted(path.name for path in (tmp_path / "out" / "_runs" / "snapshots").iterdir()) == [
        "best.safetensors", "cycle-001.safetensors", "figures.json",
    ]  # fmt: skip


def test_a_recipe_keeps_snapshots_of_a_stage_that_asks_for_them(make_trainer, tmp_path):
    trainer = make_trainer()
    asks = Stage("whole", lr=1e-2, cycles=2, cycle_len=1, cycle_mult=2, freeze_to=0, snapshots=True)
    results = run_stages(trainer, (Stage("head", lr=1e-2, cycles=1, precompute=True), asks))
    save_results(results, tmp_path / "out" / "results.json")
    folder = tmp_path / "out" / "_runs" / "snapshots"
    assert [path.stem for path in snapshot_files(folder)] == ["cycle-001", "cycle-002"]
    metrics = json.loads((folder / "figures.json").read_text())
    assert metrics["cycle-002"]["eval_loss"] == results.stages[1]["eval_loss"]
    run_stages(trainer, (Stage("head", lr=1e-2, cycles=1),))  # another run has none, so it has none of this one's
    assert not folder.exists()
    with pytest.raises(ValueError, match=r"head: cycle_mult, until_overfitting and snapshots need cycle_len\."):
        Stage("head", snapshots=True)


# ---- recipe.yaml ----


def test_a_recipe_holds_what_differs_from_the_defaults_and_nothing_of_this_machine(make_trainer, tmp_path, monkeypatch):
    (tmp_path / "my body").mkdir()
    (tmp_path / "w.pth").write_bytes(b"weights")
    trainer = make_trainer(
        seed=7, data_seed=0, weight_decay=1e-4, label_smoothing_factor=0.1, momentum=0.8, dataloader_num_workers=0,
        dataloader_drop_last=True, run_name="secret", logging_steps=3, group_learning_rates=[1e-3, 1e-2, 1e-1],
    )  # fmt: skip
    path = write_recipe(
        replace(run_record(trainer), stages=(Stage("head", lr="auto", cycles=2, precompute=True),)),
        model=asdict(ModelArguments(str(tmp_path / "my body"), weights_file=str(tmp_path / "w.pth"))),
        data=asdict(DataArguments(data_dir=str(tmp_path / "images"))),
        more={"n_aug": 2},
    )
    text = path.read_text()
    assert yaml.safe_load(text) == {
        "validation_fraction": 0.2, "on_error": "raise", "model_name_or_path": "./my body", "weights_file": "w.pth",
        "pretrained": True, "image_size": 32, "augment": "side_on", "max_zoom": 1.1, "seed": 7, "data_seed": 0,
        "per_device_train_batch_size": 8, "weight_decay": 1e-4, "label_smoothing_factor": 0.1, "momentum": 0.8,
        "dataloader_drop_last": True, "n_aug": 2,
        "stages": [{"name": "head", "lr": "auto", "cycles": 2, "precompute": True}],
    }  # fmt: skip
    assert re.search(r"# weights_file was local, SHA-256 [0-9a-f]{64}: give --weights_file\.", text)
    assert "# model_name_or_path was local: give --model." in text
    assert str(tmp_path) not in text


def test_a_recipe_on_a_data_set_of_the_hub_names_it_and_its_columns(make_trainer, tmp_path):
    columns = {"image_column_name": "img", "label_column_name": "kind"}
    data = DataArguments(dataset_name="ann/images", train_split_name="all")
    record = replace(run_record(make_trainer()), stages=(Stage("head", lr=1e-2),))
    text = write_recipe(record, data=asdict(data), more=columns).read_text()
    values = yaml.safe_load(text)
    assert values.items() >= {"dataset_name": "ann/images", "train_split_name": "all", **columns}.items()
    assert values["model_name_or_path"] == "test_resnet"
    assert "--data_dir" not in text
    (tmp_path / "again.yaml").write_text(text)
    kinds = (DataArguments, ModelArguments, Stages, SGDRTrainingArguments)
    parsed, _, _, training = parse(kinds, [str(tmp_path / "again.yaml"), "--use_cpu", "true"], "")
    assert (parsed.dataset_name, parsed.train_split_name) == ("ann/images", "all")
    assert (training.image_column_name, training.label_column_name) == ("img", "kind")


def test_what_transformers_example_scripts_say_goes_into_the_card(logged_in, make_trainer, tmp_path):
    trainer = make_trainer(hub_model_id="ann/cats")
    trainer.fit(1e-2, 1)
    trainer.push_to_hub(
        language="en", license="mit", tags=["image-classification", "vision", "pets"], model_name="Cats and dogs",
        finetuned_from="timm/test_resnet.r160_in1k", tasks="image-classification", dataset="Pets of Ann",
        dataset_tags=["ann/pets"], dataset_args="small",
    )  # fmt: skip
    card = ModelCard(logged_in.repos["ann/cats"].files()["README.md"].decode())
    data = card.data
    assert (data.language, data.license, data.model_name) == ("en", "mit", "Cats and dogs")
    assert (data.base_model, data.datasets, data.pipeline_tag) == (
        "timm/test_resnet.r160_in1k", ["ann/pets"], "image-classification",
    )  # fmt: skip
    assert "pets" in data.tags
    assert data.tags.count("vision") == 1
    results = {(result.dataset_type, result.dataset_name, result.dataset_config) for result in data.eval_results}
    assert results == {("ann/pets", "Pets of Ann", "small")}
    assert "# Cats and dogs" in card.text


def test_what_the_example_script_for_images_says_about_a_model_and_images_on_disk_is_no_id(
    logged_in, make_trainer, tmp_path, logs
):
    trainer = make_trainer(hub_model_id="ann/cats")
    (tmp_path / "images").mkdir()
    trainer.create_model_card(
        finetuned_from=str(tmp_path / "resnet"), tasks=["image-classification"], dataset=str(tmp_path / "images"),
        tags="pets",
    )  # fmt: skip
    assert f"finetuned_from='{tmp_path}/resnet' is no id of the Hub, so the card does not name it." in logs.text
    text = (tmp_path / "out" / "README.md").read_text()
    assert str(tmp_path) not in text
    assert "on images" in text
    trainer.create_model_card(finetuned_from=None, tasks="image-classification", dataset=None, tags=["vision"])


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"tasks": "text-generation"}, "tasks=text-generation: the card is that of an image classifier"),
        ({"dataset": ["a", "b"]}, "dataset=a, b: the card's figures are of one set of images; give one."),
        ({"license": "My own"}, "license='My own': give an identifier of the Hub"),
    ],
)
def test_what_a_card_cannot_hold_is_refused_before_anything_is_written(make_trainer, tmp_path, facts, message):
    trainer = make_trainer()
    with pytest.raises(ValueError, match=message):
        trainer.push_to_hub(**facts)
    assert list((tmp_path / "out").iterdir()) == []
