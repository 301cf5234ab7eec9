import getpass
import platform
from importlib.metadata import version

import torch

from hf_sgdr.hub.environment import PACKAGES, environment
from hf_sgdr.version import __version__


def test_versions_are_those_that_are_installed():
    result = environment(torch.device("cpu"))
    assert result["hf_sgdr"] == __version__
    assert result["Python"] == platform.python_version()
    assert {name: result[name] for name in PACKAGES} == {name: version(name) for name in PACKAGES}


def test_the_machine_is_told_by_its_kind(monkeypatch):
    machine = environment(torch.device("cpu"))["machine"]
    assert machine.endswith(" processors")
    assert platform.node() not in machine
    assert getpass.getuser() not in machine
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert environment(torch.device("cuda"))["machine"] == "NVIDIA H200"
