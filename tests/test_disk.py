"""Disks that are full or may only be read, small ones mounted for the test: one clear line, and nothing is lost."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import same, weights
from transformers import TrainerCallback

from hf_sgdr import create_image_classifier
from hf_sgdr._utils.file_index import file_index
from hf_sgdr._utils.files import disk_failure
from hf_sgdr.cli.errors import error_line
from hf_sgdr.features.store import FeatureStore
from hf_sgdr.recipe import Stage
from hf_sgdr.training.stages import run_stages, save_results

SPLITS = {"train": {"cats": 12, "dogs": 12}, "valid": {"cats": 4, "dogs": 4}}
STAGES = (
    Stage("head", lr=1e-2, cycles=1, precompute=True),
    Stage("whole", lr=1e-2, cycles=2, cycle_len=1, freeze_to=0),
)


@pytest.fixture
def small_disk(tmp_path):
    """`small_disk(megabytes)` mounts a disk of that size in memory; skipped where nobody may mount one."""
    mounted: list[Path] = []

    def mount(megabytes: float) -> Path:
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", f"size={int(megabytes * 1024)}k", "tmpfs", str(folder)]
        try:
            done = subprocess.run(words, capture_output=True, text=True)
        except OSError as error:
            pytest.skip(f"no disk can be mounted here: {error}")
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, but: int = 0) -> Path:
    """A file that takes all of a disk's room, but for so many bytes."""
    file = folder / "filler"
    try:
        with file.open("wb", buffering=0) as opened:
            while True:
                opened.write(bytes(1 << 12))
    except OSError:
        pass
    with file.open("r+b") as opened:
        opened.truncate(max(0, file.stat().st_size - but))
    return file


def remount(folder: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(folder)], check=True)


def one_line(error: Exception) -> str:
    line = error_line(error)
    assert "\n" not in line
    assert "Traceback" not in line
    return line


def test_a_cache_that_fills_up_keeps_the_shards_that_it_has(small_disk):
    disk = small_disk(2)
    rows = torch.arange(1024 * 64.0).view(1024, 64)
    store = FeatureStore({}, len(rows), disk)
    store.write(0, rows[:512])
    filler = fill(disk, but=1 << 14)
    with pytest.raises(OSError, match=rf"{store.folder} cannot be written \(.*No space left on device.*HF_SGDR_CACHE"):
        store.write(1, rows[512:])
    assert not list(store.folder.glob(".tmp-*"))
    assert FeatureStore({}, len(rows), disk).missing() == [1]
    filler.unlink()
    store.write(1, rows[512:])
    assert torch.equal(FeatureStore({}, len(rows), disk).read(), rows)


def test_a_cache_without_room_is_refused_before_anything_is_computed(make_trainer, small_disk, monkeypatch):
    disk = small_disk(1)
    monkeypatch.setenv("HF_SGDR_CACHE", str(disk))
    fill(disk)
    with pytest.raises(OSError, match=r"GB, but .* has 0\.00 GB free: make room, or set HF_SGDR_CACHE"):
        make_trainer(precompute=True).fit(1e-2, 1)


def test_a_cache_that_may_only_be_read_is_used_and_says_what_it_cannot_take(
    make_trainer, images, small_disk, monkeypatch
):
    disk = small_disk(4)
    monkeypatch.setenv("HF_SGDR_CACHE", str(disk))
    first = make_trainer(precompute=True)
    first.fit(1e-2, 1)
    file_index()._connection.close()  # as at a process's end: no file on the disk stays open
    remount(disk, "ro")
    second = make_trainer(precompute=True)
    second.fit(1e-2, 1)
    assert same(first.model.state_dict(), second.model.state_dict())
    fewer = make_trainer(precompute=True, train_dataset=images["train"].select(range(9)))
    with pytest.raises(OSError, match=r"cannot be written .*Read-only file system.*set HF_SGDR_CACHE") as error:
        fewer.fit(1e-2, 1)
    one_line(error.value)
    file_index()._connection.close()
    remount(disk, "rw")
    fewer.fit(1e-2, 1)


@pytest.mark.parametrize("room", [1 << 12, 1_600_000, 3_300_000])  # best weights, checkpoint, its optimizer
def test_an_output_folder_that_fills_up_can_be_gone_on_with(make_trainer, small_disk, room):
    values = {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 4}
    whole = make_trainer(folder="whole", **values)
    expected = run_stages(whole, STAGES)
    disk = small_disk(64)
    broken = make_trainer(folder=disk / "out", **values)
    fillers: list[Path] = []

    class Fill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            if Path(args.output_dir).name == "whole" and state.global_step == 2:
                fillers.append(fill(disk, room))

    broken.add_callback(Fill())
    with pytest.raises(OSError, match=rf"^{disk}.* cannot be written \(.+\): make room, and resume; what was") as error:
        run_stages(broken, STAGES)
    one_line(error.value)
    fillers[0].unlink()
    resumed = make_trainer(folder=disk / "out", **values)
    results = run_stages(resumed, STAGES, resume=True)
    assert same(weights(whole.model), resumed.model.state_dict())
    assert results.best == expected.best
    full = small_disk(1)
    fill(full)
    with pytest.raises(OSError, match="No space left on device") as error:
        save_results(results, full / "results.json")
    assert "make room" in one_line(error.value)
    assert [path.name for path in full.iterdir()] == ["filler"]


def test_the_demo_on_a_cache_that_may_only_be_read_names_it(small_disk):
    disk = small_disk(1)
    remount(disk, "ro")
    code = "import sys; from hf_sgdr.demo import demo_image_folder; from hf_sgdr.cli.main import run_cli\n"
    code += "sys.argv = ['train.py']; sys.exit(run_cli(lambda words: demo_image_folder() and 0))"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"HF_SGDR_CACHE": str(disk / "cache")}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("train.py: error: [Errno 30] Read-only file system: ")
    assert str(disk) in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("save", "is_full"),
    [
        (lambda folder: torch.save(torch.zeros(1 << 20), folder / "a.pt"), True),
        (lambda folder: create_image_classifier("test_resnet", labels=["a", "b"], pretrained=False)
            .save_pretrained(folder), True),
        (lambda folder: (folder / "a").write_bytes(bytes(1 << 20)), True),
        (lambda folder: (folder / "no folder" / "a").write_bytes(b""), False),
        (lambda folder: torch.zeros(2).view(3), False),
    ],
)  # fmt: skip
def test_the_errors_of_all_that_writes_are_known(small_disk, save: Callable[[Path], None], is_full):
    disk = small_disk(1)
    fill(disk, but=1 << 14)
    with pytest.raises(Exception) as error:  # noqa: PT011  # of kinds of their own
        save(disk)
    assert (disk_failure(error.value) is not None) == is_full
