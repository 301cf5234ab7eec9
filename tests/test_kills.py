"""A recipe killed from outside at random moments, gone on with by --resume: the same end, bit for bit.

The children are forked from a server that has everything imported, so that a kill hits the run and not its imports.
"""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_sgdr import create_image_classifier
from hf_sgdr.cli.main import run_cli

pytestmark = pytest.mark.kills
RECIPES = Path(__file__).parent.parent / "recipes"
KILLS = 24
STAGES = [
    '{"name": "head", "lr": "auto", "range_test_steps": 20, "cycles": 2, "precompute": true}',
    '{"name": "whole", "lr": 0.01, "cycles": 2, "cycle_len": 1, "cycle_mult": 2, "freeze_to": 0}',
]


def recipe(folder: str, output_dir: str, args: list[str]) -> None:
    """The body of a child process."""
    sys.path.insert(0, str(RECIPES))
    import train

    os.setpgid(0, 0)
    os.chdir(folder)
    os.environ["HF_SGDR_CACHE"] = f"{output_dir}-cache"
    torch.set_num_threads(1)
    with open(f"{output_dir}.log", "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.argv = ["train.py", *map(str, [
        "--data_dir", "images", "--model", "body", "--image_size", "32", "--output_dir", output_dir, "--n_aug", "1",
        "--per_device_train_batch_size", "4", "--report_to", "none", "--use_cpu", "true", "--disable_tqdm", "true",
        "--save_strategy", "steps", "--save_steps", "3", "--stages", *STAGES, *args,
    ])]  # fmt: skip
    os._exit(run_cli(train.main))


@pytest.fixture(scope="module")
def context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["hf_sgdr.training.stages", "hf_sgdr.cli.arguments", "hf_sgdr._utils.metrics", "hf_sgdr.demo", __name__]
    )
    return context


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_image_folder):
    folder = tmp_path_factory.mktemp("kills")
    make_image_folder(folder / "images", {"train": {"cats": 12, "dogs": 12}, "valid": {"cats": 4, "dogs": 4}})
    create_image_classifier("test_resnet", labels=["a", "b"], pretrained=False).save_pretrained(folder / "body")
    return folder


def start(context, folder, output_dir, *args):
    child = context.Process(target=recipe, args=(str(folder), output_dir, list(args)))
    child.start()
    return child


def end_of(folder):
    results = json.loads((folder / "results.json").read_text())
    for record in (*results["stages"], results["solved"]):
        del record["seconds"]
    return results, load_file(folder / "model.safetensors"), (folder / "config.json").read_text()


@pytest.fixture(scope="module")
def uninterrupted(context, folder):
    seconds = []
    for name in ("warm", "whole"):
        began = time.monotonic()
        child = start(context, folder, name)
        child.join()
        assert child.exitcode == 0, (folder / f"{name}.log").read_text()[-3000:]
        seconds.append(time.monotonic() - began)
    assert (folder / "whole" / "run.png").exists()
    return end_of(folder / "whole"), seconds[-1]


def test_killed_at_random_moments_a_recipe_ends_as_if_it_were_not(context, folder, uninterrupted):
    expected, seconds = uninterrupted
    rng = random.Random(0)
    kills = runs = 0
    while kills < KILLS:
        output_dir = f"killed-{runs}"
        finished = False
        for _ in range(30):
            child = start(context, folder, output_dir, "--resume", "true")
            child.join(rng.uniform(0.05, 0.8) * seconds)
            if child.is_alive():
                os.kill(child.pid, rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
                child.join()
                kills += 1
            else:
                finished = child.exitcode == 0
                assert finished, (folder / f"{output_dir}.log").read_text()[-3000:]
                break
        if not finished:
            child = start(context, folder, output_dir, "--resume", "true")
            child.join()
            assert child.exitcode == 0, (folder / f"{output_dir}.log").read_text()[-3000:]
        results, weights, config = end_of(folder / output_dir)
        assert results == expected[0]
        assert config == expected[2]
        assert all(torch.equal(tensor, weights[name]) for name, tensor in expected[1].items())
        assert sorted(path.name for path in (folder / output_dir / "_runs").iterdir()) == [
            "best.safetensors",
            "training-images.txt",
        ]
        runs += 1
    assert kills >= 20


@pytest.mark.parametrize("workers", [0, 2])
def test_sigterm_saves_at_the_next_step_and_names_what_goes_on(context, folder, uninterrupted, workers):
    name, word = f"terminated-{workers}", ["--dataloader_num_workers", str(workers), "--save_strategy", "no"]
    child = start(context, folder, name, *word)
    stage = folder / name / "_runs" / "whole"
    wait_for(lambda: (folder / name / "_runs" / "progress.json").exists() and "whole" in rates_of(folder / name))
    time.sleep(0.2)
    os.killpg(child.pid, signal.SIGTERM)  # as a scheduler does: the data loader's workers get it, too
    child.join(60)
    assert child.exitcode == 143, (folder / f"{name}.log").read_text()[-3000:]
    assert len(list(stage.glob("checkpoint-*/sgdr_state.json"))) == 1
    last = (folder / f"{name}.log").read_text().splitlines()[-1]
    assert last.startswith("train.py: terminated; to go on: python train.py --data_dir images")
    assert last.endswith("--resume")
    child = start(context, folder, name, *word, "--resume", "true")
    child.join()
    assert child.exitcode == 0, (folder / f"{name}.log").read_text()[-3000:]
    results, weights, config = end_of(folder / name)
    assert (results | {"run": None}, config) == (uninterrupted[0][0] | {"run": None}, uninterrupted[0][2])
    assert all(torch.equal(tensor, weights[name]) for name, tensor in uninterrupted[0][1].items())


def rates_of(output_dir):
    return json.loads((output_dir / "_runs" / "progress.json").read_text())["rates"]


def wait_for(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_finished_run_is_left_as_it_is(context, folder, uninterrupted):
    before = {path: path.stat().st_mtime_ns for path in (folder / "whole").rglob("*")}
    child = start(context, folder, "whole", "--resume", "true")
    child.join()
    assert child.exitcode == 0
    assert {path: path.stat().st_mtime_ns for path in (folder / "whole").rglob("*")} == before
