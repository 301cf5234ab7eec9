"""Folders with names that are code somewhere: whatever a recipe writes or prints, they change nothing but the label."""

import csv
import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import markdown_it
import pytest
import yaml
from PIL import Image
from transformers import AutoConfig

RECIPES = Path(__file__).parents[1] / "recipes"
NAMES = [
    "\x1b[31mred\x1b[0m",
    "=HYPERLINK(\"http:example.org\")",
    "<script>alert(1)<",
    "| a | b |",
    "a: [b, !!python",
    "$\\frac{1}{0}$",
    "new\nline\n# heading",
    "{{ 7 * 7 }}{% raw %}",
    "---",
]  # fmt: skip

pytestmark = pytest.mark.recipe


@pytest.fixture(scope="module")
def place(tmp_path_factory, make_image_folder):
    """A recipe run, a prediction and an evaluation on images of such classes; `.out` files hold what was printed."""
    place = tmp_path_factory.mktemp("names")
    images = make_image_folder(place / "images", {"train": dict.fromkeys(NAMES, 3), "valid": dict.fromkeys(NAMES, 1)})
    train = ["--model", "test_resnet", "--pretrained", "false", "--image_size", "32", "--learning_rate", "0.01"]
    train += ["--stages", "precomputed", "--n_aug", "1", "--card_photos", "true"]
    reports = place / "report.html", place / "report.md"
    for recipe, words in {
        "train": ["--data_dir", images, "--output_dir", place / "out", *train],
        "predict": ["--model", place / "out", images, "--output", place / "p.csv", place / "p.json"],
        "report": ["--model", place / "out", "--data_dir", images, "--photos", "true", "--output", *reports],
    }.items():
        done = subprocess.run(
            [sys.executable, str(RECIPES / f"{recipe}.py"), *map(str, words)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "HF_SGDR_CACHE": str(place / "cache")},
        )
        (place / f"{recipe}.out").write_text(done.stdout + done.stderr)
        assert done.returncode == 0, (recipe, done.stderr[-2000:])
    return place


def test_the_terminal_gets_no_escapes(place):
    for file in place.glob("*.out"):
        assert "\x1b" not in file.read_text().replace("\x1b[A", ""), file  # progress bars move the cursor up


def test_labels_are_the_folders_names(place):
    id2label = AutoConfig.from_pretrained(place / "out").id2label
    assert [id2label[i] for i in range(len(NAMES))] == sorted(NAMES)
    rows = json.loads((place / "p.json").read_text())
    assert {row["label"] for row in rows} <= set(NAMES)
    assert set(rows[0]["probabilities"]) == set(NAMES)


def test_a_spreadsheet_computes_nothing(place):
    with (place / "p.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert len({len(row) for row in rows}) == 1
    assert len(rows) == 1 + 4 * len(NAMES)
    for row in rows:
        assert not any(cell.startswith(("=", "+", "@", "\t", "\r")) for cell in row)
        assert not any(cell.startswith("-") for cell in row)


def test_the_cards_metadata_and_text_hold_names_only(place):
    text = (place / "out" / "README.md").read_text(encoding="utf-8")
    _, metadata, body = text.split("---\n", 2)
    assert set(yaml.safe_load(metadata)) <= {
        "library_name", "pipeline_tag", "tags", "model-index", "license", "datasets", "base_model", "metrics",
    }  # fmt: skip
    assert_safe(markdown_it.MarkdownIt("gfm-like", {"linkify": False}).render(body))
    assert "49" not in [word.strip("`|, ") for word in body.split()]  # Jinja would have computed 7 * 7
    recipe = yaml.safe_load((place / "out" / "recipe.yaml").read_text(encoding="utf-8"))
    assert recipe["stages"][0]["name"] == "precomputed"


def test_reports_hold_names_only(place):
    assert_safe((place / "report.html").read_text(encoding="utf-8"))
    body = (place / "report.md").read_text(encoding="utf-8")
    assert_safe(markdown_it.MarkdownIt("gfm-like", {"linkify": False}).render(body))


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen, self.headings, self.links = [], [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.links += [value for name, value in attributes if name == "href"]

    def handle_data(self, data):
        if self.seen and self.seen[-1] in ("h1", "h2", "h3"):
            self.headings.append(data.strip())


def assert_safe(page: str) -> None:
    tags = Tags()
    tags.feed(page)
    assert "script" not in tags.seen
    assert "heading" not in tags.headings
    assert not any("example.org" in link for link in tags.links)
    assert "\x1b" not in page
    for name in ("red", "HYPERLINK", "frac"):
        assert name in page


def test_pictures_were_made(place):
    for file in (place / "out").rglob("*.png"):
        Image.open(file).verify()
    assert len(list((place / "out").rglob("*.png"))) >= 2
