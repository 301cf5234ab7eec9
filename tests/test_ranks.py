"""Two processes on one machine, over gloo: all ranks agree, and with one process where the statistics are still."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.torch import load_file

from hf_sgdr import create_image_classifier

pytestmark = pytest.mark.ranks
SCRIPT = Path(__file__).parent / "run_of_ranks.py"
RECIPE = Path(__file__).parent.parent / "recipes" / "train.py"


KINDS = {1: ("still", "vit", "stock vit"), 2: ("still", "vit", "moving", "stock vit", "stock timm", "stock refused")}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launched(world: int, *args: object, **kwargs) -> subprocess.Popen[str]:
    launcher = [sys.executable]
    if world > 1:
        launcher += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(world)]
        launcher += ["--main_process_port", str(free_port()), "--mixed_precision", "no", "--dynamo_backend", "no"]
        launcher += ["--num_machines", "1"]
    return subprocess.Popen(
        [*launcher, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_image_folder):
    return make_image_folder(
        tmp_path_factory.mktemp("images"), {"train": {"cats": 12, "dogs": 12}, "valid": {"cats": 4, "dogs": 5}}
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory, folder):
    """`runs(kind, world)`: what each rank saw. All kinds are run when the first one is asked for."""
    known = {}

    def run(kind, world):
        if world not in known:
            outputs = tmp_path_factory.mktemp(f"ranks-{world}")
            kinds = [f"{kind}:{free_port()}" for kind in KINDS[world]]
            environment = {**os.environ, "HF_SGDR_CACHE": str(outputs / "cache")}
            process = launched(world, SCRIPT, folder, outputs, 8, *kinds, env=environment)
            output, _ = process.communicate(timeout=280)
            assert process.returncode == 0, output[-3000:]
            known[world] = outputs
        return [json.loads((known[world] / f"{kind}-{rank}.json").read_text()) for rank in range(world)]

    return run


@pytest.mark.parametrize("kind", ["still", "vit", "moving"])
def test_all_ranks_see_the_same(runs, kind):
    first, second = runs(kind, 2)
    assert (first.pop("rank"), second.pop("rank")) == (0, 1)
    assert first == second
    assert len(set(first["weights"])) == 4


@pytest.mark.parametrize("kind", ["still", "vit"])
def test_two_processes_equal_one_on_the_same_global_batch(runs, kind):
    (single,), (first, _) = runs(kind, 1), runs(kind, 2)
    for name in ("losses", "evaluation", "predictions", "tta", "second range test"):
        np.testing.assert_allclose(first[name], single[name], rtol=0, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(first["range test"][0], single["range test"][0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["stock vit", "stock timm"])
def test_staged_unfreezing_on_a_stock_trainer_keeps_ranks_equal(runs, kind):
    first, second = runs(kind, 2)
    assert first["refusal"] is None
    assert first == second
    early, middle, head = zip(*first["seen"], strict=True)
    assert len(set(head)) == 3
    assert middle[0] != middle[1]
    assert early[0] == early[1] != early[2]
    if kind == "stock vit":  # which has no statistics of batches
        (single,) = runs(kind, 1)
        for name, values in single["values"].items():
            np.testing.assert_allclose(first["values"][name], values, rtol=0, atol=1e-5, err_msg=name)


def test_staged_unfreezing_refuses_what_would_hang(runs):
    for rank in runs("stock refused", 2):
        assert "needs ddp_find_unused_parameters=True or None" in rank["refusal"]


WORDS = [
    "--image_size", "32", "--n_aug", "1", "--per_device_train_batch_size", "4", "--report_to", "none",
    "--use_cpu", "true", "--disable_tqdm", "true", "--stages",
    '{"name": "head", "lr": "auto", "range_test_steps": 10, "cycles": 2, "precompute": true}',
    '{"name": "whole", "lr": 0.01, "cycles": 3, "cycle_len": 1, "cycle_mult": 2, "freeze_to": 0}',
]  # fmt: skip


def test_a_rank_that_dies_ends_the_run_and_it_can_be_gone_on_with(folder, tmp_path):
    create_image_classifier("test_resnet", labels=["a", "b"], pretrained=False).save_pretrained(tmp_path / "body")

    def recipe(output_dir, *args):
        args = [RECIPE, "--data_dir", folder, "--model", tmp_path / "body", "--output_dir", output_dir, *WORDS, *args]
        return launched(2, *args, env={**os.environ, "HF_SGDR_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"})

    whole = recipe(tmp_path / "whole")
    output, _ = whole.communicate(timeout=280)
    assert whole.returncode == 0, output[-3000:]
    assert output.count("Model, card, plots and results.json are in") == 1
    broken = recipe(tmp_path / "out")
    deadline = time.monotonic() + 200
    while not list((tmp_path / "out" / "_runs" / "whole").glob("checkpoint-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    ranks = psutil.Process(broken.pid).children(recursive=True)
    victim = max((rank for rank in ranks if "train.py" in " ".join(rank.cmdline())), key=lambda rank: rank.pid)
    victim.send_signal(signal.SIGKILL)
    died = time.monotonic()
    broken.communicate(timeout=120)
    assert broken.returncode != 0
    assert time.monotonic() - died < 60
    assert not (tmp_path / "out" / "results.json").exists()
    resumed = recipe(tmp_path / "out", "--resume", "true")
    output, _ = resumed.communicate(timeout=280)
    assert resumed.returncode == 0, output[-3000:]
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "whole"))
    for name in theirs:
        np.testing.assert_allclose(ours[name].numpy(), theirs[name].numpy(), atol=1e-6, err_msg=name)
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("out", "whole")]
    for result in results:
        assert result["world_size"] == 2
        for stage in result["stages"]:
            del stage["seconds"]
    assert results[0]["best"] == pytest.approx(results[1]["best"])


APART = """
import os, sys
os.environ["HF_SGDR_CACHE"] += os.environ["RANK"]
from hf_sgdr import SGDRTrainer, SGDRTrainingArguments, create_image_classifier, load_image_folder
images = load_image_folder(sys.argv[1])
model = create_image_classifier("test_resnet", labels=["cats", "dogs"], pretrained=False)
args = SGDRTrainingArguments(sys.argv[2], use_cpu=True, report_to="none", precompute=True)
trainer = SGDRTrainer(model, args, train_dataset=images["train"], eval_dataset=images["validation"])
try:
    trainer.fit(1e-2, 1)
except OSError as error:
    print(error)
"""


def test_machines_that_share_no_cache_all_say_so(folder, tmp_path):
    (tmp_path / "apart.py").write_text(APART)
    run = launched(2, tmp_path / "apart.py", folder, tmp_path / "out",
                   env={**os.environ, "HF_SGDR_CACHE": str(tmp_path / "cache")})  # fmt: skip
    output, _ = run.communicate(timeout=100)
    assert run.returncode == 0, output[-3000:]
    assert output.count("set HF_SGDR_CACHE to a folder that all machines share") == 2


LONGER = [word.replace('"cycles": 3', '"cycles": 5') for word in WORDS]


def terminate_in_training(run, folder):
    progress, deadline = folder / "progress.json", time.monotonic() + 200
    while not (progress.exists() and "whole" in json.loads(progress.read_text())["rates"]):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.5)
    os.killpg(run.pid, signal.SIGTERM)


def test_sigterm_to_the_launcher_saves_a_checkpoint_in_all_ranks(folder, tmp_path):
    create_image_classifier("test_resnet", labels=["a", "b"], pretrained=False).save_pretrained(tmp_path / "body")
    output_dir = tmp_path / "out"
    args = [RECIPE, "--data_dir", folder, "--model", tmp_path / "body", "--output_dir", output_dir, *LONGER]
    args += ["--save_strategy", "no", "--resume", "true"]
    environment = {**os.environ, "HF_SGDR_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    run = launched(2, *args, env=environment, start_new_session=True)
    terminate_in_training(run, output_dir / "_runs")
    output, _ = run.communicate(timeout=60)
    assert run.returncode != 0
    assert output.count("train.py: terminated; to go on: accelerate launch ") == 1
    assert len(list((output_dir / "_runs" / "whole").glob("checkpoint-*/sgdr_state.json"))) == 1
    assert len(list((output_dir / "_runs" / "whole").glob("checkpoint-*/rng_state_*.pth"))) == 2
    resumed = launched(2, *args, env=environment)
    output, _ = resumed.communicate(timeout=280)
    assert resumed.returncode == 0, output[-3000:]
    assert (output_dir / "results.json").exists()


def test_sigterm_to_the_group_of_a_launcher_of_one_process_saves_a_checkpoint(folder, tmp_path):
    create_image_classifier("test_resnet", labels=["a", "b"], pretrained=False).save_pretrained(tmp_path / "body")
    output_dir = tmp_path / "out"
    words = ["-m", "accelerate.commands.launch", RECIPE, "--data_dir", folder, "--model", tmp_path / "body"]
    words += ["--output_dir", output_dir, *LONGER, "--save_strategy", "no"]
    run = launched(1, *words, env={**os.environ, "HF_SGDR_CACHE": str(tmp_path / "cache")}, start_new_session=True)
    terminate_in_training(run, output_dir / "_runs")
    output, _ = run.communicate(timeout=60)  # until the script, too, has closed it
    assert output.count("train.py: terminated; to go on: accelerate launch ") == 1
    assert len(list((output_dir / "_runs" / "whole").glob("checkpoint-*/sgdr_state.json"))) == 1


def test_two_launchers_as_two_machines_share_a_store_and_one_killed_ends_the_other(folder, tmp_path):
    create_image_classifier("test_resnet", labels=["a", "b"], pretrained=False).save_pretrained(tmp_path / "body")
    cache = tmp_path / "cache"
    environment = {**os.environ, "HF_SGDR_CACHE": str(cache), "OMP_NUM_THREADS": "1"}

    def machine(rank, port, output_dir, *args):
        words = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "2"]
        words += ["--num_processes", "2", "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1"]
        words += ["--main_process_port", str(port), "--mixed_precision", "no", "--dynamo_backend", "no"]
        words += [
            RECIPE,
            "--data_dir",
            folder,
            "--model",
            tmp_path / "body",
            "--output_dir",
            output_dir,
            *LONGER,
            *args,
        ]
        return subprocess.Popen(
            list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )

    port = free_port()
    broken = [machine(rank, port, tmp_path / "out") for rank in range(2)]
    progress, deadline = tmp_path / "out" / "_runs" / "progress.json", time.monotonic() + 300
    while not (progress.exists() and "whole" in json.loads(progress.read_text())["rates"]):
        ended = [process.communicate()[0][-3000:] for process in broken if process.poll() is not None]
        assert not ended, ended
        assert time.monotonic() < deadline
        time.sleep(0.01)
    written = {path: path.stat().st_mtime_ns for path in (cache / "features").rglob("*.safetensors")}
    assert written
    for process in (*psutil.Process(broken[1].pid).children(recursive=True), broken[1]):
        process.kill()
    output, _ = broken[0].communicate(timeout=200)
    broken[1].communicate(timeout=10)
    assert broken[0].returncode != 0
    assert output.count("train.py: error: ") == 1, output[-3000:]
    assert "another process of this run has ended" in output
    alone = launched(1, RECIPE, "--data_dir", folder, "--model", tmp_path / "body", "--output_dir", tmp_path / "alone",
                     *WORDS, env=environment)  # fmt: skip
    output, _ = alone.communicate(timeout=400)
    assert alone.returncode == 0, output[-3000:]
    port = free_port()
    resumed = [machine(rank, port, tmp_path / "out", "--resume", "true") for rank in range(2)]
    outputs = [process.communicate(timeout=400)[0] for process in resumed]
    assert [process.returncode for process in resumed] == [0, 0], outputs[0][-3000:]
    assert {path: path.stat().st_mtime_ns for path in (cache / "features").rglob("*.safetensors")} == written
    assert json.loads((tmp_path / "out" / "results.json").read_text())["world_size"] == 2
