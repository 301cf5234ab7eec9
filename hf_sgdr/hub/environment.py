"""The software and the machine of a run, in words that do not tell whose machine it is."""

import platform
import re
from importlib.metadata import version
from pathlib import Path

import torch

from hf_sgdr._utils.system import usable_processors
from hf_sgdr.version import __version__

PACKAGES = ("torch", "torchvision", "transformers", "timm", "datasets", "accelerate", "huggingface_hub")


def environment(device: torch.device) -> dict[str, str]:
    """Versions of what takes part in a run, and the kind of processor or GPU; no host, user or path.

    Args:
        device (`torch.device`): what the model is on.
    """
    is_cuda = device.type == "cuda"
    machine = torch.cuda.get_device_name(device) if is_cuda else f"{_processor()}, {usable_processors()} processors"
    versions = {name: version(name) for name in PACKAGES}
    return {"hf_sgdr": __version__, "Python": platform.python_version(), **versions, "machine": machine}


def _processor() -> str:
    """The model's name where the system tells it (Linux), else the architecture."""
    file = Path("/proc/cpuinfo")
    match = (
        re.search(r"^model name\s*:\s*(.+)$", file.read_text(encoding="utf-8"), re.MULTILINE) if file.exists() else None
    )
    return match[1] if match else platform.processor() or platform.machine()
