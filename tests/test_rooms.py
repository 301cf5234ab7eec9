import json
import subprocess
import sys

import pytest

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
