"""The commands of README and docs, as they stand there, on made-up images, a tiny model and a Hub of the tests."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from loopback_hub import TOKEN

from hf_sgdr import create_image_classifier, load_image_folder

pytestmark = pytest.mark.commands
PROJECT = Path(__file__).parents[1]
PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").rglob("*.md"), key=str)]
# Blocks without a language are commands; `text` marks what needs more than one machine, or changes it.
BLOCKS = [
    found
    for page in PAGES
    for found in re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
]
COMMANDS = list(
    dict.fromkeys(
        line for language, block in BLOCKS if not language for line in block.replace("\\\n", " ").strip().splitlines()
    )
)
# .ci/run runs these in a new environment.
INSTALLATION = [command for command in COMMANDS if "pip install" in command]


def test_there_are_two_commands_that_install():
    assert len(INSTALLATION) == 2
    assert len(COMMANDS) > 12


def test_all_other_commands_run_one_after_the_other(hub, tmp_path, make_image_folder):
    make_image_folder(tmp_path / "images", {"train": {"cats": 4, "dogs": 4}, "valid": {"cats": 2, "dogs": 2}})
    (tmp_path / "photos").symlink_to(tmp_path / "images")
    make_image_folder(tmp_path / "dogscats", {"train": {"cats": 2, "dogs": 2}, "valid": {"cats": 1, "dogs": 1}})
    make_image_folder(tmp_path / "more_images", {"": {"": 3}})
    (tmp_path / "cat.jpg").write_bytes((tmp_path / "more_images" / "000.jpg").read_bytes())
    # A folder of this name wins over the model id of the Hub, so the command's own words are run.
    model = create_image_classifier("test_resnet", labels=["a", "b"], pretrained=False)
    model.config.pretrained_cfg = {**model.config.pretrained_cfg, "input_size": [3, 32, 32]}
    model.save_pretrained(tmp_path / "timm" / "resnet34.a1_in1k")
    for split, rows in load_image_folder(tmp_path / "images").items():
        (tmp_path / "ann" / "data").mkdir(parents=True, exist_ok=True)
        rows = rows.rename_columns({"image": "img", "label": "kind"})
        rows.to_parquet(str(tmp_path / "ann" / "data" / f"{split}-00000-of-00001.parquet"))
    for name in ("recipes", "benchmarks", "docs", "notebooks"):
        (tmp_path / name).symlink_to(PROJECT / name)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(tmp_path / "home"),
        "HF_SGDR_CACHE": str(tmp_path / "cache"),
    }
    environment.pop("HF_HUB_OFFLINE")
    for command in COMMANDS:
        if command in INSTALLATION:
            continue
        command = command.replace("user/", "ann/")  # who is logged in there
        if "--weights_file" in command:
            command += " --image_size 64"  # the one network of full size
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"


def test_the_benchmark_of_the_start_finds_all_that_it_times(tmp_path, make_image_folder):
    make_image_folder(tmp_path / "images", {"train": {"cats": 16, "dogs": 16}, "valid": {"cats": 4, "dogs": 4}})
    words = ["--data_dir", "images", "--model", "test_resnet", "--pretrained", "false", "--image_size", "32"]
    words += ["--stages", "precomputed", "--n_aug", "0", "--output_dir", "out", "--per_device_train_batch_size", "8"]
    done = subprocess.run(
        [sys.executable, str(PROJECT / "benchmarks" / "start.py"), "seconds.json", *words],
        env={**os.environ, "HF_SGDR_CACHE": str(tmp_path / "cache"), "HF_SGDR_BENCHMARK_STARTED": str(time.time())},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seconds = json.loads((tmp_path / "seconds.json").read_text())
    assert seconds.pop("images") == 40
    assert [kind for kind, spent in seconds.items() if spent == 0] == []
