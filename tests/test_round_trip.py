"""There and back in processes of their own: train, push, load from a clean cache, train on; and pushes that break."""

import json
import os
import runpy
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from loopback_hub import TOKEN

from hf_sgdr import create_image_classifier
from hf_sgdr.cli.main import run_cli

RECIPES = Path(__file__).parent.parent / "recipes"
pytestmark = pytest.mark.recipe
STAGE = '{"name": "head", "lr": 0.05, "cycles": 2, "precompute": true}'
TRAIN = [
    RECIPES / "train.py", "--data_dir", "images", "--model", "body", "--image_size", 32, "--output_dir", "out",
    "--per_device_train_batch_size", 8, "--n_aug", 1, "--report_to", "none", "--stages", STAGE,
]  # fmt: skip
# A package that is None in sys.modules cannot be imported.
READ = """
import glob, json, sys
sys.modules["hf_sgdr"] = None
from transformers import pipeline
answers = pipeline("image-classification", model="ann/cats", device="cpu")(sorted(glob.glob("images/valid/*/*")))
print(json.dumps(answers))
"""
GO_ON = """
import glob, json, sys, torch
import hf_sgdr
from safetensors.torch import load_file
answers = hf_sgdr.pipeline("ann/cats", tta=0, device="cpu")(sorted(glob.glob("images/valid/*/*")))
model = hf_sgdr.create_image_classifier("ann/cats", labels=["cats", "dogs"])
saved = load_file("out/model.safetensors")
kept = {name: torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items() if name in saved}
assert all(kept.values()) and len(kept) > 20, kept
assert hf_sgdr.image_transforms(model)[1].spec.size == 32
other = hf_sgdr.create_image_classifier("ann/cats", labels=["dogs", "cats"])
assert not torch.equal(other.timm_model.fc.weight, model.timm_model.fc.weight)

import train
assert train.main(sys.argv[1:]) == 0  # goes on from the pushed model
assert train.main(["out/recipe.yaml", "--data_dir", "images", "--output_dir", "again", "--report_to", "none"]) == 0
print(json.dumps(answers))
"""
BY_HAND = """
from hf_sgdr import SGDRTrainer, SGDRTrainingArguments, create_image_classifier, load_image_folder
images = load_image_folder("images")
model = create_image_classifier("body", labels=["cats", "dogs"])
args = SGDRTrainingArguments("by-hand", use_cpu=True, per_device_train_batch_size=4, report_to="none")
trainer = SGDRTrainer(model, args, train_dataset=images["train"], eval_dataset=images["validation"])
trainer.precompute = True
trainer.fit(1e-2, 1)
trainer.push_to_hub()
trainer.end()
"""


@pytest.fixture
def folder(tmp_path, make_image_folder):
    make_image_folder(tmp_path / "images", {"train": {"cats": 8, "dogs": 8}, "valid": {"cats": 4, "dogs": 4}})
    create_image_classifier("test_resnet", labels=["a", "b"], pretrained=False).save_pretrained(tmp_path / "body")
    return tmp_path


@pytest.fixture
def process(hub, folder):
    """`process(*args)` starts Python with them, as Ann; `home` names a cache of its own, `token=None` logs her out."""

    def start(*args, home="home", token=TOKEN):
        environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder / home)}
        environment |= {"HF_SGDR_CACHE": str(folder / "cache"), "PYTHONPATH": str(RECIPES)}
        environment.pop("HF_HUB_OFFLINE", None)
        environment.pop("HF_TOKEN", None)
        if token is not None:
            environment["HF_TOKEN"] = token
        return subprocess.Popen(
            [sys.executable, *map(str, args)], cwd=folder, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    return start


@pytest.fixture
def recipe(folder, monkeypatch, capsys):
    """`recipe(path, *args)` runs a recipe in this process, as Ann; gives its status and what it printed."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    def run(path, *args):
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, args)])
        status = run_cli(runpy.run_path(str(path))["main"])
        return status, *capsys.readouterr()

    return run


def output(process: subprocess.Popen, expect: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=240)
    assert process.returncode == expect, err[-3000:]
    assert "Traceback" not in err
    return out, err


def probability_of_truth(out: str) -> np.ndarray:
    answers = json.loads(out.splitlines()[-1])
    assert len(answers) == 8
    truth = ["cats"] * 4 + ["dogs"] * 4
    rows = [{entry["label"]: entry["score"] for entry in answer} for answer in answers]
    return np.array([row[name] for row, name in zip(rows, truth, strict=True)])


def test_train_push_load_anywhere_and_train_on(hub, process, folder):
    out, _ = output(process(*TRAIN, "--push_to_hub", "--hub_model_id", "ann/cats", "--hub_private_repo"))
    assert "Pushed to http" in out
    repo = hub.repos["ann/cats"]
    assert repo.private
    assert repo.messages == ["initial commit", "End of training"]  # one push, when all is there
    files = repo.files()
    assert files.keys() == {
        ".gitattributes", "config.json", "model.safetensors", "README.md", "results.json", "recipe.yaml",
        "run.png", "confusion-matrix.png",
    }  # fmt: skip
    texts = {name: body.decode() for name, body in files.items() if not name.endswith((".png", ".safetensors"))}
    for secret in (Path.home(), folder, Path.cwd(), TOKEN):
        assert not [name for name, text in texts.items() if str(secret) in text]

    stock, _ = output(process("-c", READ, home="clean"))
    expected = json.loads(files["results.json"])["best"]["eval_loss"]
    assert -np.log(probability_of_truth(stock)).mean() == pytest.approx(expected, abs=1e-4)
    steps = STAGE.replace("0.05", "1e-9")
    args = [*TRAIN[1:], "--model", "ann/cats", "--output_dir", "more", "--stages", steps]
    ours, _ = output(process("-c", GO_ON, *args, home="clean"))
    np.testing.assert_allclose(probability_of_truth(ours), probability_of_truth(stock), atol=1e-4)
    more = json.loads((folder / "more" / "results.json").read_text())
    assert more["stages"][0]["eval_loss"] == pytest.approx(expected, abs=1e-4)  # it went on from the trained head
    first, second = (json.loads((folder / name / "results.json").read_text()) for name in ("out", "again"))
    for results in (first, second):
        for record in (results["stages"][0], results["solved"]):
            record.pop("seconds")
    assert first == second
    assert (folder / "again" / "model.safetensors").read_bytes() == (folder / "out" / "model.safetensors").read_bytes()
    assert (folder / "again" / "recipe.yaml").read_text() == (folder / "out" / "recipe.yaml").read_text()


def test_a_push_that_breaks_ends_in_one_line_with_the_command_that_pushes(hub, recipe, caplog):
    hub.fail("POST", "/commit/", 503, times=5, Retry_After="0")
    status, out, err = recipe(*TRAIN, "--push_to_hub", "--hub_model_id", "ann/cats")
    assert status == 2
    tries = [record.message for record in caplog.records if record.name == "hf_sgdr.hub.retry"]
    assert len(tries) == 4
    assert all("503 Service Unavailable: made to fail with 503" in message for message in tries)
    line = err.splitlines()[-1]
    assert line.startswith("train.py: error: Pushing to ann/cats failed 5 times, at last with: 503 Service Unavailable")
    assert len(hub.repos["ann/cats"].commits) == 1
    args = shlex.split(line.split("to push it again: ")[1])
    assert args == ["hf-sgdr", "push", "out", "ann/cats"]
    status, out, _ = recipe(str(RECIPES / "push.py"), *args[2:], "--tag", "v1")
    assert status == 0
    assert "pushed to http" in out
    assert "README.md" in hub.repos["ann/cats"].files("v1")

    status, out, _ = recipe(*TRAIN, "--push_to_hub", "--hub_model_id", "ann/cats", "--resume")
    assert status == 0
    assert "is finished" in out
    assert "Pushed to http" in out
    assert len(hub.repos["ann/cats"].commits) == 2  # it was all there


@pytest.mark.kills
def test_killed_while_it_pushes_a_run_is_pushed_by_resume_without_training(hub, process, folder):
    hub.fail("POST", "/commit/", "hang")
    child = process(*TRAIN, "--push_to_hub", "--hub_model_id", "ann/cats")
    assert hub.is_hanging.wait(240), child.communicate(timeout=1)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    before = (folder / "out" / "model.safetensors").stat().st_mtime_ns
    assert "model.safetensors" not in hub.repos["ann/cats"].files()
    out, _ = output(process(*TRAIN, "--push_to_hub", "--hub_model_id", "ann/cats", "--resume"))
    assert "is finished" in out
    assert "Pushed to http" in out
    assert {"model.safetensors", "README.md", "results.json", "recipe.yaml"} <= hub.repos["ann/cats"].files().keys()
    assert (folder / "out" / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.ranks
def test_two_processes_push_once(hub, process, folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", port]
    out, _ = output(process(*launcher, *TRAIN, "--use_cpu", "true", "--push_to_hub", "--hub_model_id", "ann/cats"))
    assert out.count("Pushed to http") == 1
    assert hub.repos["ann/cats"].messages == ["initial commit", "End of training"]
    files = hub.repos["ann/cats"].files()
    assert {"model.safetensors", "README.md", "recipe.yaml"} <= files.keys()
    assert json.loads(files["results.json"])["world_size"] == 2
    command = b"#     accelerate launch --num_processes 2 -m hf_sgdr.recipes.train recipe.yaml FOLDER "
    assert command in files["recipe.yaml"]
    (folder / "by_hand.py").write_text(BY_HAND)
    output(process(*launcher, "by_hand.py"))
    assert {"README.md", "results.json"} <= hub.repos["ann/by-hand"].files().keys()
    assert hub.repos["ann/by-hand"].messages == ["initial commit", "End of training"]


def test_the_best_snapshots_of_a_recipe_are_pushed_as_branches(hub, recipe):
    stage = '{"name": "whole", "lr": 0.01, "cycles": 3, "cycle_len": 1, "freeze_to": 0, "snapshots": true}'
    assert recipe(*TRAIN, "--stages", stage)[0] == 0
    status, _, err = recipe(RECIPES / "push.py", "out", "ann/cats", "--best", 4)
    assert (status, hub.requests) == (2, [])
    assert err.splitlines()[-1] == "push.py: error: The 4 best of 3 snapshots: give a number from 1 to 3."
    status, out, _ = recipe(RECIPES / "push.py", "out", "ann/cats", "--best", 2, "--tag", "v1")
    assert status == 0
    repo = hub.repos["ann/cats"]
    branches = sorted(repo.branches.keys() - {"main"})
    assert len(branches) == 2
    assert [line for line in out.splitlines() if line.startswith("Snapshot")] == [
        f"Snapshot: from_pretrained('ann/cats', revision='{branch}')" for branch in branches
    ]
    assert repo.tags == {"v1": repo.branches["main"]}


def test_without_a_login_nothing_is_begun(hub, recipe, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    status, _, err = recipe(*TRAIN, "--push_to_hub", "--hub_model_id", "ann/cats", "--data_dir", "nowhere")
    assert status == 2
    assert err.splitlines()[-1] == (
        "train.py: error: Looking up the login on the Hub: nobody is logged in: "
        "run `hf auth login`, or set HF_TOKEN to a token that may write (huggingface.co/settings/tokens)."
    )
    assert not (folder / "out").exists()
    assert hub.requests == []


def test_a_wrong_folder_leaves_no_repository_behind(hub, recipe):
    status, _, err = recipe(*TRAIN, "--push_to_hub", "--data_dir", "nowhere")
    assert status == 2
    assert err.splitlines()[-1].startswith("train.py: error: nowhere: no such folder.")
    assert hub.repos == {}


def test_where_one_may_not_write_nothing_is_trained(hub, recipe, folder):
    status, _, err = recipe(*TRAIN, "--push_to_hub", "--hub_model_id", "bob/cats")
    assert status == 2
    assert "Preparing the repository bob/cats: 403 Forbidden" in err.splitlines()[-1]
    assert not (folder / "out").exists()
