"""`hf-sgdr`: its commands, how fast it says what it can do, and what it says."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import TrainingArguments

from hf_sgdr.cli import main as command
from hf_sgdr.cli.arguments import DECIDED_BY_STAGES, GROUPS, TRAINING
from hf_sgdr.cli.parser import parse
from hf_sgdr.cli.recipes import FILES, recipes_folder
from hf_sgdr.training.arguments import SGDRTrainingArguments

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "datasets", "numpy", "matplotlib", "timm")
RUN = """
import sys
from hf_sgdr.cli.main import main
sys.argv = ["hf-sgdr", *sys.argv[1:]]
try:
    status = main()
except SystemExit as end:
    status = end.code
print(*(name for name in {heavy} if name in sys.modules), file=sys.stderr)
sys.exit(status)
"""


def run(*words: object) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own; the last line of stderr names the heavy modules that it loaded."""
    code = RUN.format(heavy=HEAVY)
    return subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=False)


@pytest.fixture
def hf_sgdr(monkeypatch, capsys):
    """`hf_sgdr("train", "photos")` in this process: the exit code, and what was printed."""

    def run_here(*words):
        monkeypatch.setattr(sys, "argv", ["hf-sgdr", *map(str, words)])
        return command.main(), capsys.readouterr()

    return run_here


@pytest.mark.parametrize("words", [["--help"], ["--version"], [], ["features", "ls"], ["copy-recipe", "--help"]])
def test_what_trains_nothing_loads_nothing_heavy(words):
    done = run(*words)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [""]


def test_help_names_every_command_and_the_recipes_are_among_them():
    text = run("--help").stdout
    assert all(f"    {name}" in text for name in command.COMMANDS)
    assert set(FILES) < set(command.COMMANDS)
    assert {path.stem.replace("_", "-") for path in (ROOT / "recipes").glob("[!_]*.py")} == set(FILES)


def test_help_of_train_is_short_and_in_groups_and_loads_no_trainer():
    done = run("train", "--help")
    lines = done.stdout.splitlines()
    assert len(lines) <= 80
    assert [line for line in lines if line.endswith(":") and not line.startswith(" ")] == [f"{t}:" for t in GROUPS]
    assert {"datasets", "timm"}.isdisjoint(done.stderr.split())
    everything = run("train", "--help_all").stdout
    assert len(everything.splitlines()) > 300
    assert "--label_smoothing_factor" in everything
    assert "--label_smoothing_factor" not in done.stdout


def test_every_argument_of_ours_is_in_one_group():
    inherited = {item.name for item in dataclasses.fields(TrainingArguments)}
    own = {item.name for kind in TRAINING for item in dataclasses.fields(kind)} - inherited - DECIDED_BY_STAGES.keys()
    shown = [name for names in GROUPS.values() for name in names]
    assert own <= set(shown)
    assert len(shown) == len(set(shown))
    fields = {item.name for item in dataclasses.fields(SGDRTrainingArguments)}
    assert len((set(shown) & inherited & fields) - DECIDED_BY_STAGES.keys()) <= 20


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "hf-sgdr: error: trian: no such command (did you mean train?)"),
        (["train", "nowhere"], "hf-sgdr train: error: nowhere: no such folder."),
        (["train", "--outptu_dir", "x"], "unrecognized arguments: --outptu_dir (did you mean --output_dir?)"),
        (["find-lr", "nowhere"], "hf-sgdr find-lr: error: nowhere: no such folder."),
        (["find-lr", "lesson.yaml", "nowhere"], "hf-sgdr find-lr: error: nowhere: no such folder."),
        (["demo", "photos"], "hf-sgdr demo: error: the demo has images and stages of its own"),
        (["demo", "--seed", "1", "photos"], "hf-sgdr demo: error: the demo has images and stages of its own"),
        (["demo", "lesson.yaml"], "hf-sgdr demo: error: the demo has images and stages of its own"),
        (["predict", "x.jpg", "--model", "x", "--threshold", "nan"], "--threshold nan: must be a probability"),
        (["demo", "--data-dir", "photos"], "hf-sgdr demo: error: the demo has images and stages of its own"),
        (["copy-recipe", "trian"], "trian: no such recipe (did you mean train?); there are train, find-lr"),
    ],
)
def test_an_error_is_one_line_that_names_the_command(hf_sgdr, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    status, said = hf_sgdr(*words)
    assert status == 2
    (line,) = said.err.splitlines()
    assert message in line
    assert not any(tmp_path.iterdir())


def test_a_list_in_a_yaml_file_is_refused_where_one_value_is_taken(hf_sgdr, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").write_text("image_size: [224, 224]\n")
    status, printed = hf_sgdr("train", "own.yaml", "photos")
    assert (status, "own.yaml: image_size: [224, 224] is a list; it takes one value." in printed.err) == (2, True)


def test_a_folder_needs_no_flag_wherever_it_stands(hf_sgdr, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("data_dir: elsewhere\nstages: [precomputed, augmented]\n")
    for words in (["nowhere", "--n_aug", 0], ["--n_aug", 0, "nowhere"], ["c.yaml", "nowhere"], ["--seed=1", "nowhere"]):
        assert "error: nowhere: no such folder." in hf_sgdr("train", *words)[1].err


def test_a_recipe_is_copied_with_its_yaml_file_and_nothing_is_overwritten(hf_sgdr, tmp_path):
    status, said = hf_sgdr("copy-recipe", "train", tmp_path / "my own")
    script, config = tmp_path / "my own" / "train.py", tmp_path / "my own" / "lesson.yaml"
    assert status == 0
    assert said.out.endswith(f"python '{script}' '{config}'\n")
    assert script.read_bytes() == (recipes_folder() / "train.py").read_bytes()
    assert yaml.safe_load(config.read_text())["stages"][0]["name"] == "precomputed"
    script.write_text("mine")
    status, said = hf_sgdr("copy-recipe", "train", tmp_path / "my own")
    assert (status, script.read_text()) == (2, "mine")
    assert "is there already and is left as it is" in said.err


def test_stores_are_listed_and_removed(hf_sgdr, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_SGDR_CACHE", str(tmp_path))
    (tmp_path / "features" / ("abc0" * 8)).mkdir(parents=True)
    assert "abc0 " in hf_sgdr("features", "ls")[1].out
    assert "Removed 1 stores" in hf_sgdr("features", "prune", "--days", 0)[1].out
    assert os.listdir(tmp_path / "features") == []


def test_a_yaml_file_of_the_package_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, _, recipe, _ = parse(TRAINING, ["fast.yaml", "photos"], "")
    assert (data.data_dir, '"solve": true' in recipe.stages[0]) == ("photos", True)
    (tmp_path / "fast.yaml").write_text("image_size: 32\n")
    assert parse(TRAINING, ["fast.yaml"], "")[1].image_size == 32
    with pytest.raises(FileNotFoundError, match=r"slow\.yaml"):
        parse(TRAINING, ["slow.yaml"], "")
