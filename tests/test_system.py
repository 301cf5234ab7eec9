import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_sgdr._utils import system
from hf_sgdr._utils.system import usable_processors, usable_threads, use_all_processors
from hf_sgdr.data.images import _readers_of, readers

PROJECT = Path(__file__).parent.parent
REPORT = """
import os
import torch
from hf_sgdr import {imports}
from hf_sgdr.data.images import readers

before = torch.get_num_threads()
{call}
rank = os.environ.get("LOCAL_RANK", "0")
with open(f"rank-{{rank}}.txt", "w") as file:
    print("rank", rank, "threads", before, torch.get_num_threads(), readers()._max_workers, file=file)
"""
TRAINER = (
    "SGDRTrainer, SGDRTrainingArguments, create_image_classifier",
    'model = create_image_classifier("test_resnet", labels=["a", "b"], pretrained=False)\n'
    'SGDRTrainer(model, SGDRTrainingArguments("out", use_cpu=True, eval_strategy="no"))',
)
EXTRACTION = (
    "LayerGroups, create_image_classifier, image_transforms",
    "import numpy\nfrom hf_sgdr.data.dataset import ImageDataset\n"
    "from hf_sgdr.features.extract import extract_features\n"
    'model = create_image_classifier("test_resnet", labels=["a", "b"], pretrained=False)\n'
    "images = [{'image': numpy.zeros((32, 32, 3), numpy.uint8)}]\n"
    "images = ImageDataset(images, image_transforms(model, image_size=32)[1])\n"
    "extract_features(model, LayerGroups.from_model(model).head, images, dtype=torch.float32)",
)
PIPELINE = (
    "create_image_classifier, pipeline",
    'pipeline(create_image_classifier("test_resnet", labels=["a", "b"], pretrained=False))',
)


def launched(folder: Path, args: list[str], what: tuple[str, str], **variables: str) -> tuple[list[str], str]:
    """The lines that a script's processes wrote under accelerate's launcher, each into its own file, and the log."""
    script = folder / "report.py"
    script.write_text(REPORT.format(imports=what[0], call=what[1]))
    dropped = ("OMP_NUM_THREADS", "HF_SGDR_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *args, str(script)],
        env={**environment, "PYTHONPATH": str(PROJECT), **variables},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [path.read_text().strip() for path in sorted(folder.glob("rank-*.txt"))], done.stderr


def test_the_launcher_leaves_one_thread_and_the_trainer_takes_all(tmp_path):
    lines, log = launched(tmp_path, [], TRAINER)
    cores = usable_processors()
    assert lines == [f"rank 0 threads 1 {cores} {cores}"]
    assert log.count("HF_SGDR_NUM_THREADS") == (1 if cores > 1 else 0)


@pytest.mark.ranks
@pytest.mark.parametrize("what", [TRAINER, PIPELINE, EXTRACTION], ids=["trainer", "pipeline", "extraction"])
def test_two_processes_share_the_processors(tmp_path, what):
    lines, _ = launched(tmp_path, ["--multi_gpu", "--num_processes", "2"], what)
    share = max(1, usable_processors() // 2)
    assert [line.split()[4:] for line in lines] == [[str(share), str(share)]] * 2


@pytest.mark.ranks
def test_extraction_alone_takes_all_under_the_launcher(tmp_path):
    lines, _ = launched(tmp_path, [], EXTRACTION, HF_SGDR_CACHE=str(tmp_path / "cache"))
    assert lines == [f"rank 0 threads 1 {usable_processors()} {usable_processors()}"]


@pytest.mark.ranks
def test_the_variable_decides_otherwise_under_the_launcher(tmp_path):
    lines, log = launched(tmp_path, [], PIPELINE, HF_SGDR_NUM_THREADS="3")
    assert lines == ["rank 0 threads 1 3 3"]
    assert "Computing with 3 threads a process instead of 1; HF_SGDR_NUM_THREADS=n sets another number." in log


@pytest.fixture
def threads(monkeypatch):
    """torch as the launcher leaves it, on a machine of eight processors; put back afterwards."""
    before = torch.get_num_threads()
    for name in ("HF_SGDR_NUM_THREADS", "LOCAL_WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(system, "usable_processors", lambda: 8)
    use_all_processors.cache_clear()
    torch.set_num_threads(1)
    yield monkeypatch
    torch.set_num_threads(before)
    use_all_processors.cache_clear()


@pytest.mark.parametrize(
    ("local_world_size", "before", "after"),
    [("1", 1, 8), ("1", 4, 4), ("2", 1, 4), ("2", 8, 4), ("3", 8, 2), ("16", 8, 1)],
)
def test_threads_are_the_share_of_a_process_and_torchs_own_count_is_kept(threads, local_world_size, before, after):
    threads.setenv("LOCAL_WORLD_SIZE", local_world_size)
    torch.set_num_threads(before)
    use_all_processors()
    assert torch.get_num_threads() == after


def test_whoever_sets_threads_later_is_left_alone(threads):
    use_all_processors()
    torch.set_num_threads(1)
    use_all_processors()
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5"])
def test_a_number_of_threads_that_is_none_is_refused(threads, value):
    threads.setenv("HF_SGDR_NUM_THREADS", value)
    with pytest.raises(ValueError, match=f"HF_SGDR_NUM_THREADS='{value}' must be an integer >= 1"):
        usable_threads()


def test_a_containers_quota_counts(monkeypatch):
    monkeypatch.setattr(system, "_cgroup_quota", lambda: 0.5)
    assert usable_processors() == 1
    monkeypatch.setattr(system, "_cgroup_quota", lambda: 1000.0)
    assert usable_processors() == len(os.sched_getaffinity(0))


def test_images_are_read_by_as_many_threads(threads):
    threads.setenv("HF_SGDR_NUM_THREADS", "3")
    _readers_of.cache_clear()
    assert readers()._max_workers == 3
    _readers_of.cache_clear()
