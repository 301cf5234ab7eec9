import os
import subprocess
import sys

import pytest

from hf_sgdr.demo import demo_image_folder

pytest.importorskip("sklearn", reason="the demo needs scikit-learn")

WHEN_TOLD = """
import sys
import sklearn.datasets
from hf_sgdr.demo import demo_image_folder
print("ready", flush=True)
sys.stdin.readline()
print(demo_image_folder(), len(list(demo_image_folder().glob("*/*.png"))))
"""


def test_processes_that_start_together_on_an_empty_cache_all_get_the_digits(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_SGDR_CACHE", str(tmp_path))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([sys.executable, "-c", WHEN_TOLD], **pipes) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert out == f"{tmp_path / 'demo' / 'digits'} 1797\n"
    assert os.listdir(tmp_path / "demo") == ["digits"]  # and nothing half made
    assert demo_image_folder() == tmp_path / "demo" / "digits"
