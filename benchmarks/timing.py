"""What all measurements share: medians in turn, a heading that names the machine, sections of RESULTS.md."""

import contextlib
import io
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "RESULTS.md"
QUIET = {"disable_tqdm": True, "save_strategy": "no", "report_to": "none"}
# What, against what, ours and theirs in things a second.
Row = tuple[str, str, float, float]


def medians(runs: dict[str, Callable[[], Any]], repetitions: int) -> dict[str, float]:
    """Median seconds of each, taken in turn so that all meet the same drifts of the machine; one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repetitions + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def as_table(rows: list[Row]) -> list[str]:
    """Rows as Markdown."""
    lines = ["| what | against | ours, a second | theirs, a second | ratio |", "|---|---|---|---|---|"]
    return lines + [f"| {what} | {against} | {a:,.0f} | {b:,.0f} | {a / b:.2f} |" for what, against, a, b in rows]


def write_section(title: str, lines: list[str], about: str) -> None:
    """Put a section into RESULTS.md in place of the one of that title, with date, machine and versions."""
    text = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else ""
    sections = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL))
    sections[title] = "\n".join(["", f"{_machine()}; {about}.", "", *lines, "", ""])
    body = "".join(f"## {name}\n{content.rstrip()}\n\n" for name, content in sections.items())
    RESULTS.write_text(f"# Measured\n\n{body.rstrip()}\n", encoding="utf-8")


def _machine() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    names = ("torch", "transformers", "timm", "accelerate", "pillow", "fastai", "lightning")
    packages = []
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            packages.append(f"{name} {version(name)}")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else torch.backends.cpu.get_cpu_capability()
    return f"{date.today()}, {cpu}, {os.cpu_count()} processors, {device}; {', '.join(packages)}"
