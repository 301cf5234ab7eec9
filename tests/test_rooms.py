import ast
import json
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hf_sgdr"

# A child for each name, of a process that has loaded only what is not ours.
COUNT = """
import json, os, sys
import datasets, timm, torch, transformers
for name in sys.argv[1:]:
    if not os.fork():
        getattr(__import__("hf_sgdr"), name)
        print(json.dumps([name, sorted(module for module in sys.modules if module.startswith("hf_sgdr."))]), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, name
"""
PLUG_INS = (
    "SnapshotCallback", "StagedUnfreezing", "LRRangeTest", "LayerGroups", "get_sgdr_schedule", "image_transforms",
    "load_image_folder", "FeatureStore",
)  # fmt: skip


PREDICTION = ("pipeline", "ClassifierInterpretation")


@pytest.fixture(scope="module")
def loaded() -> dict[str, list[str]]:
    """The modules of ours that importing each name loads, without rooms' empty doors."""
    command = [sys.executable, "-c", COUNT, *PLUG_INS, *PREDICTION]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {
        name: [module for module in modules if not any(other.startswith(f"{module}.") for other in modules)]
        for name, modules in map(json.loads, done.stdout.splitlines())
    }


@pytest.mark.parametrize("name", PLUG_INS)
def test_a_plug_in_loads_a_handful_of_modules_and_nothing_of_training(loaded, name):
    modules = loaded[name]
    assert 0 < len(modules) <= 10, modules
    assert not [module for module in modules if module.startswith(("hf_sgdr.training", "hf_sgdr.cli"))]


@pytest.mark.parametrize("name", PREDICTION)
def test_prediction_loads_fifteen_modules_at_most(loaded, name):
    assert 0 < len(loaded[name]) <= 15


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
