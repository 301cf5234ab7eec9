"""recipes/report.py, in the tests' own process; once in a process of its own."""

import base64
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import markdown_it
import numpy as np
import pytest
import torch
from sklearn import metrics

from hf_sgdr import SGDRTrainer, SGDRTrainingArguments, create_image_classifier, image_transforms, load_image_folder
from hf_sgdr.cli.arguments import DataArguments
from hf_sgdr.cli.main import run_cli
from hf_sgdr.hub.recipe_file import write_recipe
from hf_sgdr.inference.interpretation import ClassifierInterpretation
from hf_sgdr.recipe import Stage
from hf_sgdr.training.record import run_record
from hf_sgdr.training.stages import run_stages

RECIPE = Path(__file__).parent.parent / "recipes" / "report.py"
pytestmark = pytest.mark.recipe

# Names that folders may have, and that must do no harm where they are shown.
SCRIPT, TABLE, FORMULA = "<script>alert(1)</script>".replace("/", "∕"), "| a | **b** |", "$x$ 犬"


@pytest.fixture(scope="module")
def place(tmp_path_factory, make_image_folder):
    """A model of cats, dogs and birds, in that order, and images in folders that sort otherwise."""
    place = tmp_path_factory.mktemp("evaluate")
    make_image_folder(
        place / "images",
        {"train": {"birds": 3, "cats": 3, "dogs": 3}, "valid": {"birds": 4, "cats": 5, "dogs": 6}, "test": {"dogs": 3}},
    )
    make_image_folder(place, {"flat": {"birds": 10, "cats": 10, "dogs": 10}})
    torch.manual_seed(0)
    model = create_image_classifier("test_resnet", labels=["cats", "dogs", "birds"], pretrained=False)
    train_tf, eval_tf = image_transforms(model, image_size=32, augment="side_on", max_zoom=1.1)
    images = load_image_folder(place / "images")["train"]
    ids = [["cats", "dogs", "birds"].index(images.features["label"].names[label]) for label in images["label"]]
    args = SGDRTrainingArguments(str(place / "out"), report_to="none", eval_strategy="no", use_cpu=True, freeze_to=0)
    trainer = SGDRTrainer(
        model,
        args,
        train_dataset=images.remove_columns("label").add_column("label", ids),
        train_transform=train_tf,
        eval_transform=eval_tf,
    )
    trainer.fit(0.05, 10)
    trainer.save_model()
    return place


@pytest.fixture
def evaluate(place, monkeypatch, capsys):
    """`evaluate(words, expect=0)` runs the recipe in the place; returns what it printed."""
    monkeypatch.chdir(place)
    main = runpy.run_path(str(RECIPE))["main"]

    def run(*words, model="out", expect=0):
        monkeypatch.setattr(sys, "argv", [str(RECIPE), "--model", model, *map(str, words)])
        assert run_cli(main) == expect
        return capsys.readouterr()

    return run


def figures(file):
    content = json.loads(Path(file).read_text())
    return content, np.array(content["confusion_matrix"])


def own_predictions(place, folder):
    """File by file, with nothing of the recipe."""
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(place / "out").eval()
    _, view = image_transforms(model)
    files = sorted((place / folder).glob("*/*.jpg"))
    with torch.inference_mode():
        probabilities = torch.cat([model(view(file)[None]).logits for file in files])
    probabilities = probabilities.double().softmax(dim=-1).numpy()
    return [model.config.label2id[file.parent.name] for file in files], probabilities


# ---- Figures ----


def test_figures_are_those_of_scikit_learn_on_single_predictions_whatever_the_order_of_folders(place, evaluate):
    done = evaluate("--data_dir", "images", "--output", "one.json")
    content, matrix = figures(place / "one.json")
    truth, probabilities = own_predictions(place, "images/valid")
    predicted = probabilities.argmax(axis=1)
    np.testing.assert_array_equal(matrix, metrics.confusion_matrix(truth, predicted, labels=[0, 1, 2]))
    assert [one["name"] for one in content["classes"]] == ["cats", "dogs", "birds"]
    assert [one["photos"] for one in content["classes"]] == [5, 6, 4]
    macro = metrics.precision_recall_fscore_support(truth, predicted, average="macro", zero_division=0)
    assert content["metrics"] == pytest.approx(
        {
            "accuracy": metrics.accuracy_score(truth, predicted),
            "balanced_accuracy": metrics.balanced_accuracy_score(truth, predicted),
            "loss": metrics.log_loss(truth, probabilities, labels=[0, 1, 2]),
            **dict(zip(("precision", "recall", "f1"), macro, strict=False)),
        },
        rel=1e-4,
    )
    assert content["metrics"]["accuracy"] > 0.5  # it did learn: a mistaken order of classes would show
    for name, value in content["metrics"].items():
        assert re.search(rf"^{name} +{value:.4f}$", done.out, re.MULTILINE)
    assert "\r" not in done.err  # which is no terminal here


@pytest.mark.parametrize(
    ("words", "images", "said"),
    [
        (["--data_dir", "images", "--split", "train"], 9, "images/train"),
        (["--data_dir", "images", "--split", "test"], 3, "images/test"),
        (["--data_dir", "images", "--split", "all"], 27, "all of images"),
        (["--data_dir", "flat", "--split", "all"], 30, "all of flat"),
        (["--data_dir", "flat"], 6, "the validation share of flat (validation is 0.2 of each class, seed 42)"),
        (["--data_dir", "flat", "--split", "train", "--validation_fraction", "0.5"], 15, "the train share of flat"),
        (["--data_dir", "images/test", "--split", "all"], 3, "all of test"),  # a single class
    ],
)
def test_each_split_is_the_images_it_names(place, evaluate, words, images, said):
    done = evaluate(*words, "--output", "split.json")
    content, matrix = figures(place / "split.json")
    assert content["photos"] == matrix.sum() == images
    assert said in content["of"]
    assert said in done.out


def test_the_share_split_off_is_the_one_of_training(place, evaluate):
    held_out = load_image_folder(place / "flat", seed=7)["validation"]
    kept = place / "held_out"
    for number, row in enumerate(held_out):
        folder = kept / held_out.features["label"].names[row["label"]]
        folder.mkdir(parents=True, exist_ok=True)
        row["image"].save(folder / f"{number}.png")
    evaluate("--data_dir", "flat", "--seed", 7, "--output", "share.json")
    evaluate("--data_dir", "held_out", "--split", "all", "--output", "same.json")
    (share, _), (same, _) = figures(place / "share.json"), figures(place / "same.json")
    assert share["metrics"]["loss"] == pytest.approx(same["metrics"]["loss"], rel=1e-6)


def test_tta_is_said_and_counts(place, evaluate):
    evaluate("--data_dir", "images", "--tta", 2, "--output", "tta.json", "tta.md")
    evaluate("--data_dir", "images", "--output", "plain.json")
    (tta, _), (plain, _) = figures(place / "tta.json"), figures(place / "plain.json")
    assert (tta["tta"], plain["tta"]) == (2, 0)
    assert tta["metrics"]["loss"] != plain["metrics"]["loss"]
    assert "2 augmented views" in (place / "tta.md").read_text()


def test_a_model_saved_in_half_precision_is_evaluated_in_single(place, evaluate):
    model = create_image_classifier(place / "out", labels=["cats", "dogs", "birds"])
    model.half().save_pretrained(place / "half")
    evaluate("--data_dir", "images", "--output", "half.json", model="half")
    evaluate("--data_dir", "images", "--output", "plain.json")
    (half, _), (plain, _) = figures(place / "half.json"), figures(place / "plain.json")
    assert half["model"] == "half"
    assert half["metrics"]["loss"] == pytest.approx(plain["metrics"]["loss"], rel=1e-2)


# ---- Reports ----


class Page(HTMLParser):
    """Tags with their attributes, and the text between."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def test_the_html_is_one_file_that_fetches_nothing_and_can_be_read_aloud(place, evaluate):
    evaluate("--data_dir", "images", "--output", "report.html")
    text = (place / "report.html").read_text()
    page = Page(text)
    assert page.all("html") == [{"lang": "en"}]
    assert next(tag for tag, _ in page.tags if tag in ("h1", "h2")) == "h1"
    assert {"script", "link", "iframe"}.isdisjoint(tag for tag, _ in page.tags)
    images = page.all("img")
    assert len(images) == 2
    for image in images:
        assert image["alt"]
        kind, _, content = image["src"].partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(content).startswith(b"\x89PNG")
    assert len(page.all("caption")) == len(page.all("table")) >= 2
    assert all(head.get("scope") in ("col", "row") for head in page.all("th"))
    assert "prefers-color-scheme: dark" in text
    assert "http" not in text.replace("http-equiv", "")
    assert str(place) not in text


def test_images_are_shown_only_where_asked_for(place, evaluate):
    evaluate("--data_dir", "images", "--output", "with.html", "with.md", "--photos")
    evaluate("--data_dir", "images", "--output", "without.html", "without.md")
    assert {path.name for path in place.glob("without*.png")} == {
        "without-confusion-matrix.png",
        "without-classes.png",
    }
    assert len(list(place.glob("with-*.png"))) == 2 + 3 * 2 + 1
    assert ".jpg" not in (place / "without.html").read_text()
    assert "Most correct: dogs" in (place / "with.html").read_text()
    assert len(Page((place / "with.html").read_text()).all("img")) == 9


def test_the_markdown_shows_its_pictures_and_tables(place, evaluate):
    evaluate("--data_dir", "images", "--output", "my report.md")
    text = (place / "my report.md").read_text()
    page = Page(markdown_it.MarkdownIt("commonmark").enable("table").render(text))
    for image in page.all("img"):
        assert (place / image["src"].replace("%20", " ")).is_file()
        assert image["alt"]
    assert len(page.all("img")) == 2
    assert len(page.all("table")) >= 2
    assert str(place) not in text


def test_any_class_name_is_text_and_nothing_else(tmp_path, monkeypatch, make_image_folder, evaluate, recwarn):
    names = [SCRIPT, TABLE, FORMULA]
    monkeypatch.chdir(tmp_path)
    make_image_folder(tmp_path, {"images": dict.fromkeys(names, 2)})
    model = create_image_classifier("test_resnet", labels=names, pretrained=False)
    model.config.pretrained_cfg = {**model.config.pretrained_cfg, "input_size": [3, 32, 32]}
    model.save_pretrained("nasty")
    done = evaluate(
        "--data_dir", "images", "--split", "all", "--photos", "--output", "r.html", "r.md", "r.json", model="nasty"
    )
    page = Page((tmp_path / "r.html").read_text())
    assert "script" not in [tag for tag, _ in page.tags]
    rendered = Page(markdown_it.MarkdownIt("commonmark").enable("table").render((tmp_path / "r.md").read_text()))
    assert {"script", "strong"}.isdisjoint(tag for tag, _ in rendered.tags)
    for name in names:
        assert name in page.text
        assert name in rendered.text
        assert name in done.out
    assert [one["name"] for one in figures("r.json")[0]["classes"]] == names
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_what_cannot_be_read_is_named_left_out_and_reported(tmp_path, monkeypatch, make_image_folder, evaluate, place):
    monkeypatch.chdir(tmp_path)
    make_image_folder(tmp_path / "images", {"valid": {"cats": 2, "dogs": 2}})
    (tmp_path / "images/valid/cats/bad.jpg").write_bytes(b"<html>not found</html>")
    done = evaluate("--data_dir", "images", "--output", "r.html", "r.json", model=str(place / "out"), expect=1)
    assert "images/valid/cats/bad.jpg: left out, it cannot be read as a picture (an HTML page" in done.err
    content, matrix = figures("r.json")
    assert matrix.sum() == 4
    assert list(content["unreadable"]) == ["cats/bad.jpg"]
    assert content["model"] == "out"
    text = (tmp_path / "r.html").read_text()
    assert "cats/bad.jpg" in text
    assert str(tmp_path) not in text
    assert str(place) not in (tmp_path / "r.json").read_text()


# ---- Wrong input ----


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data_dir", "nowhere"], "nowhere: no such folder. Lay the images out as"),
        (["--data_dir", "out/config.json"], "out/config.json: a file, not a folder."),
        (["--data_dir", "half", "--split", "test"], "half is divided into --split train; it has no test."),
        (["--data_dir", "flat", "--split", "test"], "flat has no folder test; --split all takes every image."),
        (["--data_dir", "images", "--split", "dev"], "--split: invalid choice: 'dev'"),
        (
            ["--data_dir", "unknown", "--split", "all"],
            "'fish', 'wolves' not among the model's classes, which are 'cats'",
        ),
        (["--data_dir", "empty", "--split", "all"], "empty: no image in class folders that can be read."),
        (["--data_dir", "few"], "few: too few images to split off any; --split all takes every one."),
        (["--data_dir", "flat", "--validation_fraction", "1"], "validation_fraction=1.0"),
        (["--data_dir", "flat", "--output", "r.pdf"], "--output r.pdf: give names that end in .html, .md or .json."),
        (["--data_dir", "flat", "--output", "no/r.md"], "--output no/r.md: there is no folder no."),
        (["--data_dir", "flat", "--photos"], "--photos shows images in a report: give --output report.html"),
        (["--data_dir", "flat", "--tta", "-1"], "tta=-1"),
        (["--data_dir", "flat", "--batch_size", "0"], "batch_size=0"),
        ([], "Which images? Give --data_dir FOLDER or --labels_file TABLE."),
    ],
)
def test_what_a_user_can_mend_is_one_line_before_anything_is_written(
    place, evaluate, make_image_folder, words, message
):
    if not (place / "unknown").exists():
        make_image_folder(place, {"unknown": {"cats": 1, "fish": 1, "wolves": 1}, "few": {"cats": 1, "dogs": 1}})
        make_image_folder(place / "half", {"train": {"cats": 1}})
        (place / "empty" / "cats").mkdir(parents=True)
    before = sorted(place.rglob("*"))
    done = evaluate(*words, expect=2)
    (line,) = [line for line in done.err.splitlines() if "error:" in line]
    assert message in line
    assert sorted(place.rglob("*")) == before


def test_a_model_that_is_not_there_is_said(evaluate):
    done = evaluate("--data_dir", "flat", model="no_such_model", expect=2)
    assert "--model no_such_model: no such folder, and no model id of the Hub (user/name)." in done.err


def test_in_a_process_of_its_own_it_does_not_hide_the_library_of_its_name(place):
    done = subprocess.run(
        [sys.executable, str(RECIPE), "--model", "out", "--data_dir", "images", "--output", "process.json"],
        cwd=place,
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Written: process.json" in done.stdout
    expected = {"accuracy", "balanced_accuracy", "loss", "precision", "recall", "f1"}
    assert set(figures(place / "process.json")[0]["metrics"]) == expected


@pytest.mark.photos
def test_on_real_images_it_agrees_with_the_trainer(shared_photos, tmp_path, monkeypatch, evaluate):
    """An untrained head on ImageNet features: what counts is that the two ways agree."""
    monkeypatch.chdir(tmp_path)
    from hf_sgdr.demo import demo_weights_file

    torch.manual_seed(0)
    model = create_image_classifier("tf_efficientnet_lite0", labels=["cats", "dogs"], weights_file=demo_weights_file())
    for kind in ("cats", "dogs"):
        (tmp_path / "images/train" / kind).mkdir(parents=True)
        (tmp_path / "images/valid" / kind).mkdir(parents=True)
        for number, file in enumerate(sorted((shared_photos / "dogscats/valid" / kind).iterdir())[:12]):
            (tmp_path / "images" / ("valid" if number < 10 else "train") / kind / file.name).symlink_to(file)
    images = load_image_folder(tmp_path / "images")
    trainer = SGDRTrainer(model, SGDRTrainingArguments("out", use_cpu=True), eval_dataset=images["validation"])
    expected = trainer.evaluate()
    trainer.save_model()
    evaluate("--data_dir", "images", "--output", "r.json")
    found = figures("r.json")[0]["metrics"]
    assert found["accuracy"] == expected["eval_accuracy"]
    assert found["loss"] == pytest.approx(expected["eval_loss"], abs=1e-4)
    assert ClassifierInterpretation.from_trainer(trainer).loss == pytest.approx(expected["eval_loss"], rel=1e-6)


# ---- Which images a saved run was trained on ----


@pytest.fixture(scope="module")
def saved_run(place):
    """A recipe's run on the folder without splits, with a seed of its own; what its evaluation gives."""
    images = load_image_folder(place / "flat", seed=1, validation_fraction=0.3)
    torch.manual_seed(0)
    model = create_image_classifier("test_resnet", labels=["birds", "cats", "dogs"], pretrained=False)
    train_tf, eval_tf = image_transforms(model, image_size=32)
    args = SGDRTrainingArguments(str(place / "run"), report_to="none", use_cpu=True, save_strategy="no", seed=1)
    trainer = SGDRTrainer(
        model,
        args,
        train_dataset=images["train"],
        eval_dataset=images["validation"],
        train_transform=train_tf,
        eval_transform=eval_tf,
    )
    stages = (Stage("head", lr=1e-2),)
    run_stages(trainer, stages)
    trainer.save_model()
    write_recipe(run_record(trainer), data=asdict(DataArguments(data_dir="flat", validation_fraction=0.3)))
    return trainer.evaluate()


def test_a_folder_that_training_split_is_split_as_the_saved_run_did(place, evaluate, saved_run):
    done = evaluate("--data_dir", "flat", "--output", "run.json", model="run")
    content, _ = figures(place / "run.json")
    assert content["photos"] == 9
    assert content["of"] == "the validation share of flat (validation is 0.3 of each class, seed 1)"
    assert content["in_training"] == 0
    assert content["metrics"]["loss"] == pytest.approx(saved_run["eval_loss"], abs=1e-4)
    assert "None of these images was among those that the model was trained on." in done.out


@pytest.mark.parametrize(
    ("words", "images", "in_training"),
    [(["--split", "all"], 30, 21), (["--split", "train"], 21, 21), (["--seed", "42"], 9, None)],
)
def test_images_of_training_among_those_evaluated_are_counted_and_said(
    place, evaluate, saved_run, words, images, in_training
):
    done = evaluate("--data_dir", "flat", *words, "--output", "seen.json", "seen.md", model="run")
    content, _ = figures(place / "seen.json")
    assert content["photos"] == images
    assert content["in_training"] == in_training if in_training is not None else content["in_training"] > 0
    said = f"{content['in_training']} of these {images} images are among those that the model was trained on"
    assert said in done.out
    assert said in (place / "seen.md").read_text()


def test_all_images_of_a_folder_that_is_not_that_of_training_are_evaluated(
    place, evaluate, saved_run, make_image_folder
):
    make_image_folder(place, {"foreign": {"birds": 4, "cats": 4}})
    done = evaluate("--data_dir", "foreign", "--output", "foreign.json", model="run")
    content, _ = figures(place / "foreign.json")
    assert (content["photos"], content["of"], content["in_training"]) == (8, "all of foreign", 0)
    assert "None of these images" in done.out


def test_all_images_of_a_table_that_is_not_that_of_training_are_evaluated(
    place, tmp_path, evaluate, saved_run, make_image_folder
):
    make_image_folder(tmp_path, {"foreign": {"birds": 4, "cats": 4}})
    files = sorted((tmp_path / "foreign").rglob("*.jpg"))
    rows = "".join(f"{file.relative_to(tmp_path)},{file.parent.name}\n" for file in files)
    (tmp_path / "foreign.csv").write_text(f"file_name,label\n{rows}")
    evaluate("--labels_file", str(tmp_path / "foreign.csv"), "--output", "foreign.json", model="run")
    content, _ = figures(place / "foreign.json")
    assert (content["photos"], content["of"], content["in_training"]) == (8, "all of foreign.csv", 0)


def test_where_training_is_not_known_that_is_said(place, evaluate):
    done = evaluate("--data_dir", "flat", "--output", "unknown.json")
    assert figures(place / "unknown.json")[0]["in_training"] is None
    assert "It is not known whether the model was trained on some of these images." in done.out


# ---- Labels as training reads them ----


def test_names_of_files_a_folders_own_table_and_a_class_called_test_are_read_as_in_training(
    place, tmp_path, evaluate, make_image_folder
):
    evaluate("--data_dir", "flat", "--split", "all", "--output", "labels.json")
    expected = figures(place / "labels.json")[0]
    files = sorted((place / "flat").rglob("*.jpg"))
    (tmp_path / "by_name").mkdir()
    (tmp_path / "by_table" / "all").mkdir(parents=True)
    lines = ["file_name,label"]
    for number, file in enumerate(files):
        shutil.copy(file, tmp_path / "by_name" / f"{file.parent.name}_{number}.jpg")
        shutil.copy(file, tmp_path / "by_table" / "all" / f"{number}.jpg")
        lines.append(f"all/{number}.jpg,{file.parent.name}")
    (tmp_path / "by_table" / "metadata.csv").write_text("\n".join(lines) + "\n")
    by_name = ("--data_dir", str(tmp_path / "by_name"), "--label_pattern", r"^(.+)_\d+")
    for words in (by_name, ("--data_dir", str(tmp_path / "by_table"))):
        evaluate(*words, "--split", "all", "--output", "labels.json")
        found = figures(place / "labels.json")[0]
        assert found["photos"] == expected["photos"] == 30
        assert found["metrics"] == pytest.approx(expected["metrics"], abs=1e-5)
    shutil.copytree(place / "flat" / "dogs", tmp_path / "with_test" / "test")
    shutil.copytree(place / "flat" / "cats", tmp_path / "with_test" / "cats")
    done = evaluate("--data_dir", str(tmp_path / "with_test"), expect=2)
    assert "'test' not among the model's classes" in done.err


def test_two_classes_of_one_name_are_told_apart(place, tmp_path, evaluate):
    shutil.copytree(place / "out", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["label_names"] = ["cats", "dogs", "cats"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    shutil.copytree(place / "flat" / "dogs", tmp_path / "images" / "dogs")
    shutil.copytree(place / "flat" / "cats", tmp_path / "images" / "cats (0)")
    done = evaluate("--data_dir", str(tmp_path / "images"), "--split", "all", model=str(tmp_path / "out"))
    assert "on 20 images" in done.out
