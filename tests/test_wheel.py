"""The wheel, built and installed into an environment of its own outside the checkout, as somebody else has it."""

import ast
import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from email.parser import Parser
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from hf_sgdr import create_image_classifier

ROOT = Path(__file__).parents[1]
SOURCES = [
    *(path for path in ROOT.glob("hf_sgdr/**/*") if path.is_file() and "__pycache__" not in path.parts),
    *(path for path in ROOT.glob("recipes/**/*") if path.is_file() and "__pycache__" not in path.parts),
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this checkout, whose own folder is left as it is."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for path in [*SOURCES, *(ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE"))]:
        copy = source / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder]
    subprocess.run([*pip, source], check=True)
    (built,) = folder.glob("*.whl")
    return built


def test_every_file_is_in_the_wheel_once_and_nothing_else(wheel):
    expected = {str(path.relative_to(ROOT)).replace("recipes/", "hf_sgdr/recipes/", 1) for path in SOURCES}
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert sorted(names) == sorted(expected)


def test_metadata_name_the_authors_and_no_address(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = Parser().parsestr(archive.read(name).decode())
    assert metadata["Author"] == "hf_sgdr contributors"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert len(metadata["Keywords"].split(",")) > 5
    assert "Programming Language :: Python :: 3.11" in metadata.get_all("Classifier")
    assert not {"Home-page", "Project-URL", "Download-URL", "Author-email"} & set(metadata.keys())


# Imported only where they are in use already: in a notebook, in a run that reports to that tracker.
BROUGHT = {"hf_sgdr", "IPython", "trackio"}


def imports_of(source: Path) -> set[str]:
    """The packages that a file imports, wherever in it."""
    nodes = list(ast.walk(ast.parse(source.read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    return {name.split(".")[0] for name in names}


def test_every_package_that_is_imported_is_asked_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *extras["demo"], *extras["space"]]
    asked = {canonicalize_name(re.split(r"[^\w.-]", word)[0]) for word in asked}
    imported = set().union(*(imports_of(path) for path in SOURCES if path.suffix == ".py"))
    distributions = packages_distributions()
    for name in imported - sys.stdlib_module_names - BROUGHT:
        assert asked & {canonicalize_name(owner) for owner in distributions[name]}, name


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory, make_image_folder):
    """An environment with the wheel that sees the dependencies of this one, not this checkout; images and a model."""
    root = tmp_path_factory.mktemp("elsewhere")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", root / "env"], check=True)
    python = root / "env" / "bin" / "python"
    packages = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    # plain folders: what an editable installation of this checkout adds to them is not followed
    folders = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    Path(packages, "dependencies.pth").write_text("\n".join([*folders, sysconfig.get_path("purelib")]) + "\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--ignore-installed", wheel], check=True)
    make_image_folder(root / "photos", {"": {"cats": 4, "dogs": 4}})
    create_image_classifier("test_resnet", labels=["a", "b"], pretrained=False).save_pretrained(root / "body")
    return root


def run(root: Path, *words: object, expect: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSTARTUP")}
    environment |= {"PATH": f"{root / 'env' / 'bin'}{os.pathsep}{environment['PATH']}", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(word) for word in words],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == expect, f"{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    return done


TRAINING = ["--model", "body", "--image_size", 32, "--n_aug", 1, "--report_to", "none", "--use_cpu", "true"]
TRAINING += ["--validation_fraction", 0.25, "--learning_rate", 0.01]


@pytest.mark.recipe
def test_the_installed_command_trains_predicts_and_copies_a_recipe_that_runs(installed):
    where = run(
        installed, "python", "-c", "import hf_sgdr, hf_sgdr.recipes.train as t; print(hf_sgdr.__file__, t.__file__)"
    )
    assert [path.startswith(str(installed)) for path in where.stdout.split()] == [True, True]
    done = run(installed, "hf-sgdr", "train", "photos", *TRAINING, "--stages", "precomputed", "--output_dir", "out")
    assert "hf-sgdr predict --model out IMAGES" in done.stdout
    assert "\r" not in done.stderr
    assert "\nhf-sgdr train recipe.yaml IMAGES --model MODEL\n" in (installed / "out" / "README.md").read_text()
    run(installed, "hf-sgdr", "predict", "--model", "out", "photos", "--output", "p.json")
    assert [row["label"] in ("cats", "dogs") for row in json.loads((installed / "p.json").read_text())] == [True] * 8
    run(installed, "hf-sgdr", "copy-recipe", "train", "mine")
    script, config = installed / "mine" / "train.py", installed / "mine" / "lesson.yaml"
    script.write_text(script.read_text().replace("hide_bars()\n", 'hide_bars()\n    print("changed")\n', 1))
    config.write_text("stages:\n  - {name: mine, lr: 0.01, cycles: 1, precompute: true}\n")
    words = ["python", script, config, "photos", *TRAINING[:-2], "--output_dir", "again"]
    assert run(installed, *words).stdout.startswith("changed\n")
    assert json.loads((installed / "again" / "results.json").read_text())["stages"][0]["name"] == "mine"
    missing = run(installed, "hf-sgdr", "train", "nowhere", expect=2)
    assert missing.stderr.splitlines()[-1].startswith("hf-sgdr train: error: nowhere: no such folder.")
