"""The software and the machine of a run, in words that do not tell whose machine it is."""

import platform
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
    versions = {name: version(name) for name in PACKAGES}
    return {"hf_sgdr": __version__, "Python": platform.python_version(), **versions, "machine": _machine(device)}


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor_name()}, {usable_processors()} processors"


def _processor_name() -> str:
    """The model's name where the system tells it (Linux), else the architecture."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
