"""SIGTERM in a process of its own: what is deferred is told, the rest is raised, and a second one ends at once."""

import subprocess
import sys

import pytest

START = """
import os, signal
from hf_sgdr._utils import termination
termination.catch_sigterm()
def told():
    os.kill(os.getpid(), signal.SIGTERM)
"""


def end_of(code: str, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", START + code], capture_output=True, text=True, timeout=60, env=environment
    )
    return done.returncode, done.stdout


def test_outside_training_it_ends_the_process_with_143():
    assert end_of("print('before', flush=True)\ntold()\nprint('after')") == (143, "before\n")


def test_while_deferred_it_is_only_noted_and_the_process_ends_afterwards():
    code = """
with termination.deferred():
    print(termination.is_requested())
    told()
    print(termination.is_requested(), flush=True)
print("after")
"""
    assert end_of(code) == (143, "False\nTrue\n")


def test_an_error_while_deferred_is_not_hidden():
    code = """
try:
    with termination.deferred():
        told()
        raise ValueError("somebody's own")
except ValueError as error:
    print(error)
"""
    assert end_of(code) == (0, "somebody's own\n")


@pytest.mark.parametrize(("launcher", "expected"), [({}, ""), ({"TORCHELASTIC_RUN_ID": "none"}, "goes on\n")])
def test_a_second_one_ends_at_once_unless_the_launcher_passed_the_first_one_on(launcher, expected):
    code = """
with termination.deferred():
    told()
    told()
    print("goes on", flush=True)
"""
    assert end_of(code, **launcher) == (143, expected)


WORKERS = """
import numpy as np
from torch.utils.data import DataLoader
from hf_sgdr import ImageDataset, create_image_classifier, image_transforms
from hf_sgdr._utils import termination
if {is_command}:
    termination.catch_sigterm()
images = [{{"image": np.zeros((32, 32, 3), np.uint8)}}] * 8
transform = image_transforms(create_image_classifier("test_resnet", labels=["a", "b"], pretrained=False))[1]
loader = DataLoader(ImageDataset(images, transform), num_workers=1, persistent_workers={persistent})
batches = iter(loader)
next(batches)
if not {persistent}:
    raise ValueError("somebody's own")
"""


@pytest.mark.parametrize("is_command", [False, True])
@pytest.mark.parametrize("persistent", [False, True])
def test_a_process_ends_whose_workers_are_still_there(is_command, persistent):
    code = WORKERS.format(is_command=is_command, persistent=persistent)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == (0 if persistent else 1), done.stderr
    assert "killed by signal" not in done.stderr
    assert done.stderr.endswith("" if persistent else "ValueError: somebody's own\n")
