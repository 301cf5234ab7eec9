import ast
import json
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hf_sgdr"

COUNT = """
import json, sys
from hf_sgdr import {name}
print(json.dumps(sorted(module for module in sys.modules if module.startswith("hf_sgdr."))))
"""
PLUG_INS = (
    "SnapshotCallback", "StagedUnfreezing", "LRRangeTest", "LayerGroups", "get_sgdr_schedule", "image_transforms",
    "load_image_folder", "FeatureStore",
)  # fmt: skip


def loaded(name: str) -> list[str]:
    """The modules of ours that importing a name loads, without rooms' empty doors."""
    done = subprocess.run([sys.executable, "-c", COUNT.format(name=name)], capture_output=True, text=True, check=True)
    modules = json.loads(done.stdout)
    return [module for module in modules if not any(other.startswith(f"{module}.") for other in modules)]


@pytest.mark.parametrize("name", PLUG_INS)
def test_a_plug_in_loads_a_handful_of_modules_and_nothing_of_training(name):
    modules = loaded(name)
    assert len(modules) <= 10, modules
    assert not [module for module in modules if module.startswith(("hf_sgdr.training", "hf_sgdr.cli"))]


@pytest.mark.parametrize("name", ["pipeline", "ClassifierInterpretation"])
def test_prediction_loads_fifteen_modules_at_most(name):
    assert len(loaded(name)) <= 15


def imports() -> dict[str, set[str]]:
    """For each file of the package the files of it that it imports, wherever the import stands."""
    files = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        graph[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                whole = {f"{node.module}.{alias.name}" for alias in node.names} & files.keys()
                graph[name] |= whole or {node.module} & files.keys()
    return graph


def test_no_import_runs_in_a_circle_and_the_house_is_eleven_floors_high_at_most():
    graph, floors = imports(), {}
    for name in TopologicalSorter(graph).static_order():  # raises CycleError with the circle
        floors[name] = 1 + max((floors[other] for other in graph[name]), default=0)
    assert max(floors.values()) <= 11, [name for name, floor in floors.items() if floor > 11]


def test_the_package_has_sixteen_entries_at_most():
    entries = [path.name for path in PACKAGE.iterdir() if not path.name.startswith(("__pycache__", "."))]
    assert len(entries) <= 16, entries
