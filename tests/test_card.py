import getpass
import logging
import platform
import re
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from markdown_tables import tables
from PIL import Image
from scipy.stats import binomtest
from sklearn.metrics import precision_recall_fscore_support

from hf_sgdr import (
    ClassifierInterpretation,
    SGDRTrainer,
    Stage,
    run_stages,
)
from hf_sgdr.hub.card import metric, names, stated_license, views, wilson_interval, write_model_card
from hf_sgdr.hub.card_facts import PLACEHOLDER, CardFacts, put_model_id
from hf_sgdr.hub.record import RunRecord
from hf_sgdr.recipe import RunResults
from hf_sgdr.training.record import run_record

HOSTILE = "|{{ 7 * 7 }}|<script>alert(1)<", "=1+1\n# head\x1b[31m", "__a__ `b` [c](https:x) $d$"
SPLITS = {"train": {"cats": 24, "dogs": 12}, "valid": {"cats": 8, "dogs": 5}}
STAGES = (
    Stage("head", lr="auto", range_test_steps=20, cycles=1, precompute=True),
    Stage("whole", lr=0.01, lr_spread=10.0, cycles=2, cycle_len=1, freeze_to=0),
)


@pytest.fixture(scope="module")
def run(build_trainer, images, tmp_path_factory):
    """A short recipe, and the trainer with the weights that it kept."""
    trainer = build_trainer(tmp_path_factory.mktemp("card") / "out", images)
    results = run_stages(trainer, STAGES)
    results.tta = {"loss": 0.25, "accuracy": 12 / 13}
    return trainer, results


@pytest.fixture(scope="module")
def record(run) -> RunRecord:
    """That run as plain data."""
    trainer, _ = run
    return run_record(trainer, ClassifierInterpretation.from_trainer(trainer))


def write_card(trainer: SGDRTrainer, folder: Path | None = None, **facts) -> Path:
    return write_model_card(
        run_record(trainer, ClassifierInterpretation.from_trainer(trainer)), CardFacts(**facts), folder
    )


def table(text: str, head: str) -> list[list[str]]:
    return next(rows for rows in tables(text) if rows[0][0] == head)[1:]


def test_the_metadata_say_what_was_measured_and_read_back(run, tmp_path):
    trainer, results = run
    path = write_card(trainer, tmp_path, images_name="pets", tta_views=2, license="cc-by-4.0")
    assert path == tmp_path / "README.md"
    data = ModelCard.load(path).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "image-classification", "cc-by-4.0")
    assert data.metrics == ["accuracy"]
    assert {"hf_sgdr", "sgdr", "vision"} <= set(data.tags)
    assert data.model_name == "test_resnet on pets"
    measured = trainer.evaluate()
    values = {result.metric_name: result.metric_value for result in data.eval_results}
    assert values == {
        "Accuracy": pytest.approx(measured["eval_accuracy"], abs=1e-6),
        "Loss": pytest.approx(measured["eval_loss"], abs=1e-5),
        "Accuracy with test-time augmentation (2 augmented views)": pytest.approx(12 / 13, abs=1e-6),
        "Loss with test-time augmentation (2 augmented views)": 0.25,
    }
    assert results.best["eval_loss"] == pytest.approx(values["Loss"], abs=1e-5)
    assert {(result.task_type, result.dataset_name, result.dataset_split) for result in data.eval_results} == {
        ("image-classification", "pets", "validation")
    }


def test_nothing_is_claimed_that_nobody_said(run, tmp_path):
    trainer, _ = run
    card = ModelCard.load(write_card(trainer, tmp_path))
    assert card.data.base_model is None
    assert card.data.datasets is None
    assert card.data.license == "unknown"
    assert "has not stated a licence" in card.text
    assert "no model of the Hub is known" in card.text
    assert "How to make it again" not in card.text


def test_base_model_and_datasets_are_ids_of_the_hub_where_they_are_true(run, tmp_path, monkeypatch):
    trainer, _ = run
    monkeypatch.setattr(trainer.model, "name_or_path", "timm/resnet34.a1_in1k")
    card = ModelCard.load(write_card(trainer, tmp_path, dataset="user/pets", images_name="user/pets"))
    assert card.data.base_model == "timm/resnet34.a1_in1k"
    assert card.data.datasets == ["user/pets"]
    assert "https://huggingface.co/timm/resnet34.a1_in1k" in card.text
    assert card.text.endswith("from which it started, holds too: apache\\-2\\.0.")  # as timm states it
    assert {result.dataset_type for result in card.data.eval_results} == {"user/pets"}
    (tmp_path / "timm" / "resnet34.a1_in1k").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert ModelCard.load(write_card(trainer, tmp_path)).data.base_model is None


def test_the_licence_of_the_base_model_is_the_one_that_the_hub_states(hub):
    hub.add("ann/pets", {"README.md": b"---\nlicense: cc-by-4.0\n---\n"})
    hub.add("ann/none", {"README.md": b"# no metadata"})
    assert stated_license("ann/pets") == "cc-by-4.0"
    assert [stated_license(name) for name in ("ann/none", "ann/nowhere")] == [None, None]
    assert stated_license("timm/swin_tiny_patch4_window7_224.ms_in1k") == "mit"
    assert "/api/models/ann/pets" in "".join(f"/{path}" for path in hub.asked)
    hub.fail("GET", "/ann/pets", "drop")
    assert stated_license("ann/pets") is None


def test_a_model_that_goes_on_from_itself_is_not_its_own_base(run, tmp_path, monkeypatch):
    trainer, _ = run
    monkeypatch.setattr(trainer.model, "name_or_path", "user/pets")
    monkeypatch.setattr(trainer.args, "hub_model_id", "user/pets")
    card = ModelCard.load(write_card(trainer, tmp_path))
    assert card.data.base_model is None
    assert "an earlier version of itself" in card.text
    assert 'model="user/pets"' in card.text
    assert PLACEHOLDER not in card.text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"license": "My own, see below"},
            "license='My own, see below': give an identifier of the Hub, such as apache",
        ),
        ({"dataset": "/data/pets"}, "dataset='/data/pets': give an id of the Hub"),
        ({"base_model": "resnet34"}, "base_model='resnet34': give an id of the Hub"),
    ],
)
def test_what_is_no_id_is_refused_and_nothing_written(run, tmp_path, given, message):
    trainer, _ = run
    with pytest.raises(ValueError, match=re.escape(message)):
        write_card(trainer, tmp_path / "card", **given)
    assert not (tmp_path / "card").exists()


def test_the_table_of_stages_is_that_of_the_results(run, tmp_path):
    trainer, results = run
    text = write_card(trainer, tmp_path).read_text(encoding="utf-8")
    solved, head, whole = table(text, "stage")
    first, second = results.stages
    loss, accuracy = f"{results.solved['eval_loss']:.4f}", f"{results.solved['eval_accuracy']:.4f}"
    what = "head, solved on precomputed features"
    assert solved[:-1] == ["solved head", what, "0 (0)", "–", "–", loss, accuracy]
    rate = first["learning_rates"][-1]
    assert head[:-1] == [
        "head", "head, on precomputed features", "1 (1)", f"head {rate:.2g}",
        f"{first['train_loss']:.4f}", f"{first['eval_loss']:.4f}", f"{first['eval_accuracy']:.4f}",
    ]  # fmt: skip
    assert whole[1:4] == ["everything", "2 (2)", "early 0.0001, middle 0.001, head 0.01"]
    assert whole[4:] == [
        f"{second['train_loss']:.4f}", f"{second['eval_loss']:.4f}", f"{second['eval_accuracy']:.4f}",
        f"{second['seconds']:.1f}",
    ]  # fmt: skip
    assert f"of all epochs: {results.best['stage']}." in text


def test_the_table_of_classes_is_scikit_learns_report(run, tmp_path):
    trainer, _ = run
    text = write_card(trainer, tmp_path).read_text(encoding="utf-8")
    labels = np.asarray(trainer.eval_dataset["label"])
    predicted = trainer.log_predictions().argmax(axis=1)
    scores = precision_recall_fscore_support(labels, predicted, labels=[0, 1], zero_division=np.nan)
    rows = table(text, "class")
    assert [row[:3] for row in rows] == [["cats", "24", "8"], ["dogs", "12", "5"]]
    for number, row in enumerate(rows):
        expected = [kind[number] for kind in scores[:3]]
        assert row[3:] == ["–" if np.isnan(value) else f"{value:.4f}" for value in expected]


def test_the_settings_are_those_of_the_run(run, tmp_path):
    trainer, _ = run
    rows = dict(table(write_card(trainer, tmp_path).read_text(encoding="utf-8"), "setting"))
    assert rows["images"] == "36 for training, 13 for validation"
    assert rows["input"].startswith("32 px (shorter side resized to ")
    assert rows["augmentation"].endswith("left and right exchanged; zoom up to 1.1")
    assert rows["layer groups"] == "early, middle, head"
    assert rows["optimizer"] == "sgd, momentum 0.9, weight decay 0"
    assert (rows["images a step"], rows["processes"], rows["seed"]) == ("8", "1", "42")
    assert rows["precision of training features"] == trainer.features.dtype


def test_pictures_lie_beside_the_card_and_are_opaque(run, tmp_path):
    trainer, _ = run
    text = write_card(trainer, tmp_path, with_images=True).read_text(encoding="utf-8")
    shown = [image or tag for image, tag in re.findall(r'!\[[^\]]+\]\(([^)]+)\)|<img src="([^"]+)" alt="[^"]+"', text)]
    assert set(shown) == {path.name for path in tmp_path.glob("*.png")}
    assert {"head-range-test.png", "whole-learning-rate.png", "confusion-matrix.png"} < set(shown)
    assert "whole-range-test.png" not in shown
    for name in shown:
        with Image.open(tmp_path / name) as picture:
            assert np.asarray(picture.convert("RGBA"))[..., 3].min() == 255


def test_images_are_shown_only_on_request_and_go_when_it_is_taken_back(run, tmp_path):
    trainer, _ = run
    text = write_card(trainer, tmp_path).read_text(encoding="utf-8")
    assert not list(tmp_path.glob("most-*"))
    assert "Most correct" not in text
    text = write_card(trainer, tmp_path, with_images=True).read_text(encoding="utf-8")
    assert (tmp_path / "most-uncertain.png").exists()
    assert text.index("Most correct") < text.index("Most incorrect") < text.index("Most uncertain")
    write_card(trainer, tmp_path)
    assert not list(tmp_path.glob("most-*"))


def test_nothing_of_the_machine_but_its_kind(run, tmp_path):
    trainer, _ = run
    text = write_card(trainer, tmp_path, images_name="pets").read_text(encoding="utf-8")
    rows = dict(table(text, "what"))
    assert rows["torch"] == version("torch")
    assert rows["machine"].endswith(" processors")
    assert str(tmp_path) not in text
    assert str(Path(trainer.args.output_dir)) not in text
    assert not re.search(r"(?<![\w./)-])/\w", text)  # no path from the root, of whatever machine
    assert not re.search(rf"\b{re.escape(platform.node())}\b", text)
    assert not re.search(rf"\b{re.escape(getpass.getuser())}\b", text)


def test_names_from_outside_are_text_and_nothing_else(make_trainer, tmp_path, make_image_folder):
    images = make_image_folder(
        tmp_path / "images", {"train": dict.fromkeys(HOSTILE, 4), "valid": dict.fromkeys(HOSTILE, 2)}
    )
    trainer = make_trainer(images=images)
    trainer.fit(0.01, 1)
    trainer.create_model_card(images_name="{{ 6 * 7 }}: <b>\n---\nlicense: mit", with_images=True)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "unknown"
    assert card.data.eval_results[0].dataset_name == "{{ 6 * 7 }}: <b>\\n---\\nlicense: mit"
    html = MarkdownIt("commonmark").enable("table").render(card.text)
    assert not re.findall(
        r"<(?!/?(?:h[1-6]|p|table|thead|tbody|tr|t[hd]|ul|li|em|strong|code|pre|img|br|hr|a)\b)", html
    )
    assert "<h1>test_resnet on {{ 6 * 7 }}: &lt;b&gt;\\n---\\nlicense: mit</h1>" in html
    assert html.count("<h1>") == 1
    assert not re.search(r"<(strong|em|a|code)\b[^>]*>[abc]<", html)
    assert [row[0] for row in table(card.text, "class")] == [
        name.replace("\n", "\\n").replace("\x1b", "\\x1b") for name in sorted(HOSTILE)
    ]
    assert {len(row) for rows in tables(card.text) for row in rows} <= {2, 3, 4, 6, 8}
    assert "\x1b" not in card.content


def test_many_classes_fold_away(make_trainer, tmp_path, make_image_folder):
    names = [f"class {number:02d}" for number in range(24)]
    images = make_image_folder(
        tmp_path / "images", {"train": dict.fromkeys(names, 1), "valid": dict.fromkeys(names, 1)}
    )
    trainer = make_trainer(images=images)
    card = ModelCard.load(write_card(trainer))
    assert "class 11 and 12 more" in card.text
    assert "<details><summary>Figures of all 24 classes</summary>" in card.text
    assert len(table(card.text, "class")) == 24
    assert "Fewer than 20 validation images: class 00" in card.text


def test_fits_that_were_called_one_by_one_are_its_stages(make_trainer, tmp_path):
    trainer = make_trainer(precompute=True)
    trainer.lr_find(num_steps=20)
    trainer.fit(1e-2, 2)
    trainer.precompute = False
    trainer.unfreeze()
    trainer.fit([1e-4, 1e-3, 1e-2], 1, cycle_len=1)
    trainer.create_model_card(license="mit")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    rows = table(card.text, "stage")
    assert [row[1:4] for row in rows] == [
        ["head, on precomputed features", "2 (2)", "head 0.01"],
        ["everything", "1 (1)", "early 0.0001, middle 0.001, head 0.01"],
    ]
    assert [row[6] for row in rows] == [f"{fit['eval_accuracy']:.4f}" for fit in trainer.history.fits]
    assert "of all epochs" not in card.text
    assert card.data.license == "mit"
    assert "generated_from_trainer" not in card.content
    assert len(list((tmp_path / "out").glob("*-range-test.png"))) == 1


def test_after_run_stages_a_card_tells_of_them_without_being_told(run, tmp_path):
    trainer, _ = run
    text = write_card(trainer, tmp_path).read_text(encoding="utf-8")
    assert [row[0] for row in table(text, "stage")] == ["solved head", "head", "whole"]
    assert "of all epochs" in text


def test_results_of_other_weights_are_said_to_be_so(run, tmp_path, caplog, monkeypatch):
    trainer, results = run
    monkeypatch.setattr(logging.getLogger("hf_sgdr"), "propagate", True)
    monkeypatch.setitem(results.best, "eval_accuracy", results.best["eval_accuracy"] - 0.3)
    with caplog.at_level(logging.WARNING):
        write_card(trainer, tmp_path)
    assert "were they trained on?" in caplog.text


def test_a_model_id_goes_into_the_lines_that_load_it(run, tmp_path):
    trainer, _ = run
    text = write_card(trainer, tmp_path, tta_views=3).read_text(encoding="utf-8")
    assert f"`{PLACEHOLDER}` stands for" in text
    for model_id in ("me/pets", "you/pets"):
        text = put_model_id(text, model_id)
        assert f'pipeline("image-classification", model="{model_id}")("image.jpg")' in text
        assert f'hf_sgdr.pipeline("{model_id}", tta=3)("image.jpg")' in text
        assert PLACEHOLDER not in text
    assert put_model_id("# Somebody's own card\n", "me/pets") == "# Somebody's own card\n"


def test_the_plot_of_the_range_test_of_an_earlier_run_does_not_get_into_the_card(make_trainer, tmp_path):
    trainer = make_trainer()
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "head-range-test.png").write_bytes(b"of an earlier run")
    run_stages(trainer, [Stage("head", lr=0.01)])
    text = write_card(trainer).read_text(encoding="utf-8")
    assert "head-range-test.png" not in text
    assert not (tmp_path / "out" / "head-range-test.png").exists()


def test_a_card_without_predictions_is_refused(record, tmp_path):
    with pytest.raises(ValueError, match=r"The record has no interpretation: a card needs predictions"):
        write_model_card(replace(record, interpretation=None), folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


STAGE = {
    "name": "whole", "epochs": 3, "cycles": 2, "learning_rates": [1e-5, 1e-4, 1e-3], "train_loss": 0.25,
    "eval_loss": 0.125, "eval_accuracy": None, "seconds": 2.04, "precompute": False, "freeze_to": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("freeze_to", "precompute", "trains", "rates"),
    [
        (0, False, "everything", "early 1e-05, middle 0.0001, head 0.001"),
        (1, False, "middle, head", "middle 0.0001, head 0.001"),
        (-1, True, "head, on precomputed features", "head 0.001"),
        (2, False, "head", "head 0.001"),
    ],
)
def test_a_row_of_a_stage_names_what_trains_and_its_rates_alone(record, tmp_path, freeze_to, precompute, trains, rates):
    results = RunResults(1, [STAGE | {"freeze_to": freeze_to, "precompute": precompute}])
    text = write_model_card(replace(record, results=results), folder=tmp_path).read_text(encoding="utf-8")
    assert table(text, "stage") == [["whole", trains, "3 (2)", rates, "0.2500", "0.1250", "–", "2.0"]]


def test_metrics_views_and_names_in_words():
    assert [metric(0.98765), metric(1), metric(None)] == ["0.9877", "1.0000", "–"]
    assert [names(["a"], 2), names(["a", "b"], 2), names(["a", "b", "c"], 2)] == ["a", "a and b", "a, b and 1 more"]
    assert [views(1), views(4)] == ["1 augmented view", "4 augmented views"]


@pytest.mark.parametrize(("right", "count"), [(0, 7), (5, 5), (198, 200), (1, 3)])
def test_wilsons_interval_is_scipys(right, count):
    expected = binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert wilson_interval(right, count) == pytest.approx((expected.low, expected.high), abs=1e-6)
