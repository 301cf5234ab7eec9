import csv
import json
import os
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard

from hf_sgdr import create_image_classifier, pipeline
from hf_sgdr.clear_errors import one_clear_line
from hf_sgdr.cli import DataArguments, ModelArguments, chosen_stages, parse
from hf_sgdr.stages import LESSON, Stage

RECIPES = Path(__file__).parent.parent / "recipes"
pytestmark = pytest.mark.recipe


@dataclass
class Output:
    output_dir: str = "out"
    save_strategy: str = "no"


SHORT = [
    '{"name": "head", "lr": "auto", "range_test_steps": 20, "cycles": 1, "precompute": true}',
    '{"name": "whole", "lr": 0.01, "cycles": 1, "cycle_len": 1, "freeze_to": 0}',
]


def run(recipe: str, *words: object, cwd: Path, expect: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, str(RECIPES / recipe), *map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert done.returncode == expect, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def trained(tmp_path_factory, make_photo_folder):
    """A short recipe run on made-up photos, in a process of its own."""
    place = tmp_path_factory.mktemp("recipe")
    make_photo_folder(place / "photos", {"train": {"cats": 8, "dogs": 8}, "valid": {"cats": 4, "dogs": 4}})
    create_image_classifier("test_resnet", labels=["a", "b"], pretrained=False).save_pretrained(place / "body")
    done = run(
        "train.py", "--data_dir", "photos", "--model", "body", "--image_size", 32, "--output_dir", "out",
        "--per_device_train_batch_size", 8, "--n_aug", 1, "--stages", *SHORT, "--report_to", "none",
        cwd=place,
    )  # fmt: skip
    return place, done


@pytest.fixture
def here(trained, monkeypatch, capsys):
    """`here(recipe, *words, expect=0)` runs one beside the photos, in this process; gives what it printed."""

    def run_here(recipe, *words, expect=0):
        monkeypatch.chdir(trained[0])
        monkeypatch.setattr(sys, "argv", [str(RECIPES / recipe), *map(str, words)])
        assert one_clear_line(runpy.run_path(str(RECIPES / recipe))["main"]) == expect
        return capsys.readouterr()

    return run_here


def test_train_leaves_model_results_and_plots_and_says_so(trained):
    place, done = trained
    out = place / "out"
    assert {path.name for path in out.iterdir()} == {
        "_runs", "config.json", "model.safetensors", "results.json", "recipe.yaml", "README.md",
        "head-range-test.png", "head-learning-rate.png", "whole-learning-rate.png", "confusion-matrix.png",
    }  # fmt: skip
    results = json.loads((out / "results.json").read_text())
    assert [stage["name"] for stage in results["stages"]] == ["head", "whole"]
    assert set(results["tta"]) == {"loss", "accuracy"}
    for word in ("stage", "head", "whole", "best", "with TTA"):
        assert word in done.stdout
    assert not list(out.rglob("*training_args*"))
    assert not [path for path in out.rglob("*") if path.name.startswith(".tmp")]


def test_what_train_saved_is_stock_without_our_package(trained, here):
    place, _ = trained
    code = (
        "import sys; sys.modules['hf_sgdr'] = None\n"
        "from transformers import pipeline\n"
        "import json, glob\n"
        "answer = pipeline('image-classification', model='out', device='cpu')(sorted(glob.glob('photos/valid/*/*')))\n"
        "print(json.dumps(answer))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True, check=True)
    stock = [{entry["label"]: entry["score"] for entry in row} for row in json.loads(done.stdout.splitlines()[-1])]
    here("predict.py", "--model", "out", "photos/valid", "--output", "p.json", "p.csv")
    ours = json.loads((place / "p.json").read_text())
    assert [Path(row["file"]).parent.name for row in ours] == ["cats"] * 4 + ["dogs"] * 4
    for row, scores in zip(ours, stock, strict=True):
        np.testing.assert_allclose([row["probabilities"][n] for n in scores], list(scores.values()), atol=1e-4)
        assert row["label"] == max(scores, key=scores.get)
    table = list(csv.DictReader((place / "p.csv").open()))
    assert [row["file"] for row in table] == [row["file"] for row in ours]
    assert [float(row["p(cats)"]) for row in table] == [row["probabilities"]["cats"] for row in ours]


def test_train_writes_a_card_that_claims_only_what_is_true(trained):
    place, _ = trained
    card = ModelCard.load(place / "out" / "README.md")
    results = json.loads((place / "out" / "results.json").read_text())
    values = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert values["Accuracy"] == pytest.approx(results["best"]["eval_accuracy"], abs=1e-6)
    assert values["Loss with test-time augmentation (1 augmented view)"] == pytest.approx(
        results["tta"]["loss"], abs=1e-6
    )
    assert (card.data.base_model, card.data.datasets, card.data.license) == (None, None, "unknown")
    assert card.data.model_name == "test_resnet on photos"
    assert "It started from a model in a local folder" in card.text.replace("\\", "")
    assert "accelerate launch recipes/train.py recipe.yaml --data_dir PHOTOS --model MODEL\n" in card.text
    assert str(place) not in card.content


def test_a_finished_run_is_left_alone_by_resume(trained, here):
    place, _ = trained
    before = {path: path.stat().st_mtime_ns for path in (place / "out").rglob("*")}
    done = here("train.py", "--data_dir", "photos", "--model", "body", "--output_dir", "out", "--resume")
    assert "is finished" in done.out
    assert {path: path.stat().st_mtime_ns for path in (place / "out").rglob("*")} == before


def test_predict_names_what_it_cannot_read_and_goes_on(trained, here, tmp_path):
    place, _ = trained
    good = next((place / "photos" / "valid" / "cats").iterdir())
    (tmp_path / "bad.jpg").write_bytes(b"<html>not found</html>")
    done = here("predict.py", "--model", place / "out", good, tmp_path / "bad.jpg", good, expect=1)
    assert "bad.jpg: cannot be read as a picture" in done.err
    assert "photo/s" in done.err  # the progress bar
    assert [line.split("\t")[0] for line in done.out.splitlines()] == [str(good)] * 2


def predict_here(*words: object) -> int:
    return runpy.run_path(str(RECIPES / "predict.py"))["main"]([str(word) for word in words])


def test_predict_takes_views_and_the_number_of_classes(trained, tmp_path, capsys):
    place, _ = trained
    folder = place / "photos" / "valid"
    outputs = [tmp_path / name for name in ("p.csv", "p.json", "p.jsonl")]
    words = ["--model", place / "out", "--tta", 3, "--top_k", 1, "--batch_size", 3, "--device", "cpu"]
    assert predict_here(folder, *words, "--output", *outputs) == 0
    table, rows, lines = read_outputs(tmp_path)
    files = sorted(map(str, folder.rglob("*.jpg")))
    expected = pipeline(place / "out", device="cpu", tta=3)(files, top_k=1)
    assert [row["file"] for row in rows] == files
    assert lines == rows
    for row, cells, answer in zip(rows, table, expected, strict=True):
        assert row["probabilities"] == {row["label"]: row["probability"]}
        assert (row["label"], row["probability"]) == (answer[0]["label"], pytest.approx(answer[0]["score"], abs=1e-5))
        assert set(cells) == {"file", "label", "probability", "label_1", "probability_1"}
        assert (cells["label_1"], float(cells["probability_1"])) == (row["label"], row["probability"])
    capsys.readouterr()
    assert predict_here(files[0], *words[:-4], "--top_k", 2) == 0
    cells = capsys.readouterr().out.rstrip("\n").split("\t")
    assert (cells[0], sorted(cells[1::2])) == (files[0], ["cats", "dogs"])


def read_outputs(place: Path):
    table = list(csv.DictReader((place / "p.csv").open(newline="", encoding="utf-8")))
    lines = [json.loads(line) for line in (place / "p.jsonl").read_text(encoding="utf-8").splitlines()]
    return table, json.loads((place / "p.json").read_text(encoding="utf-8")), lines


def test_predict_leaves_the_rows_done_so_far_whenever_it_is_stopped(trained, tmp_path, monkeypatch, capsys):
    place, _ = trained
    recipe = runpy.run_path(str(RECIPES / "predict.py"))
    predict, seen = recipe["predict"], []

    def stopped(pipe, files):
        for number, item in enumerate(predict(pipe, files)):
            if number:
                seen.append([len(rows) for rows in read_outputs(tmp_path)])  # after each row all files are whole
            if number == 5:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setitem(recipe["main"].__globals__, "predict", stopped)
    outputs = [str(tmp_path / name) for name in ("p.csv", "p.json", "p.jsonl")]
    words = [str(place / "photos" / "valid"), "--model", str(place / "out"), "--output", *outputs, "--device", "cpu"]
    assert recipe["main"](words) == 130
    assert seen == [[number] * 3 for number in range(1, 6)]
    assert "interrupted; the rows so far are written" in capsys.readouterr().err


def test_predict_writes_text_from_outside_so_that_it_is_only_text(trained, tmp_path, capsys):
    place, _ = trained
    model = create_image_classifier("test_resnet", labels=["=1+1", "\x1b[31mred"], pretrained=False)
    model.save_pretrained(tmp_path / "model")
    photo = next((place / "photos").rglob("*.jpg")).read_bytes()
    names = ["=cmd.jpg", "two\nlines.jpg", "\x1b[2Jclear.jpg", os.fsdecode(b"latin-\xe4.jpg"), 'café, "q".jpg']
    folder = tmp_path / "=photos"
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(photo)
    outputs = [tmp_path / name for name in ("p.csv", "p.json", "p.jsonl")]
    assert predict_here(folder, "--model", tmp_path / "model", "--device", "cpu", "--output", *outputs) == 0
    table, rows, lines = read_outputs(tmp_path)
    assert sorted(row["file"] for row in rows) == sorted(str(folder / name) for name in names)
    assert lines == rows
    assert {row["label"] for row in rows} <= {"=1+1", "\x1b[31mred"}
    assert {row["label"] for row in table} <= {"'=1+1", "\\x1b[31mred"}
    assert "\x1b" not in (tmp_path / "p.csv").read_text(encoding="utf-8")
    assert len((tmp_path / "p.csv").read_text(encoding="utf-8").splitlines()) == 1 + len(names)
    capsys.readouterr()
    assert predict_here(folder, "--model", tmp_path / "model", "--device", "cpu") == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert len(out.splitlines()) == len(names)


def test_predict_ends_quietly_when_nobody_reads_on(trained):
    place, _ = trained
    read, write = os.pipe()
    os.close(read)  # as `| head` does when it has enough
    command = [sys.executable, str(RECIPES / "predict.py"), "--model", "out", "photos", "--device", "cpu"]
    done = subprocess.run(command, cwd=place, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    os.close(write)
    assert done.returncode == 141, done.stderr
    assert not [word for word in ("error", "Broken pipe", "Traceback", "Exception") if word in done.stderr]


def test_a_broken_pipe_of_something_else_is_an_error(capsys):
    def main(argv):
        raise BrokenPipeError(32, "Broken pipe of a worker")

    assert one_clear_line(main) == 2
    assert "error: [Errno 32] Broken pipe of a worker" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["crane", "owl", "crane"], ["crane (0)", "owl", "crane (2)"]),
        (["crane", "crane", "crane (0)"], ["crane (0) (0)", "crane (1)", "crane (0) (2)"]),
    ],
)
def test_classes_that_share_a_name_are_told_apart(trained, tmp_path, names, shown):
    place, _ = trained
    model = create_image_classifier("test_resnet", labels=["a", "b", "c"], pretrained=False)
    model.config.id2label = dict(enumerate(names))
    model.save_pretrained(tmp_path / "model")
    output = tmp_path / "p.json"
    assert predict_here(place / "photos", "--model", tmp_path / "model", "--device", "cpu", "--output", output) == 0
    for row in json.loads(output.read_text()):
        assert list(row["probabilities"]) == shown
        assert sum(row["probabilities"].values()) == pytest.approx(1)


def test_find_lr_prints_suggestions_and_leaves_the_curve(trained, here):
    place, _ = trained
    done = here(
        "find_lr.py", "--data_dir", "photos", "--model", "body", "--image_size", 32, "--precompute",
        "--num_steps", 30, "--output_dir", "found", "--per_device_train_batch_size", 8,
    )  # fmt: skip
    for method in ("lesson", "valley", "steep", "minimum"):
        assert f"\n{method}" in "\n" + done.out
    assert (place / "found" / "range-test.png").stat().st_size > 1000
    assert len(json.loads((place / "found" / "range-test.json").read_text())["history"]["lr"]) > 8


@pytest.mark.parametrize(
    ("recipe", "words", "message"),
    [
        ("train.py", ["--data_dir", "nowhere"], "train.py: error: nowhere: no such folder."),
        ("train.py", ["--data_dir", "photos", "--model", "resnt34"], "train.py: error: 'resnt34' is neither a folder"),
        ("train.py", ["--data_dir", "photos", "--augment", "upside"], "augment='upside': give None or one of basic"),
        ("train.py", ["--data_dir", "photos", "--num_cycles", "2"], "--num_cycles: the stages say that"),
        ("train.py", ["--data_dir", "photos", "--stages", "all"], "--stages all: give lesson, or any of precomputed"),
        ("train.py", ["--data_dir", "photos", "--no_such_flag"], "--no_such_flag"),
        ("train.py", ["--data_dir", "photos", "--license", "My own"], "license='My own': give an identifier of"),
        ("train.py", ["--data_dir", "photos", "--learning_rate", "fast"], "invalid float value: 'fast'"),
        ("train.py", ["--data_dir", "photos", "--dataset_name", "x"], "give one of the two"),
        ("train.py", ["--data_dir", "photos", "--image_size", "2"], "image_size=2: give the side of the square input"),
        ("train.py", ["--data_dir", "photos", "--hub_token", "x"], "hub_token is not taken as an argument"),
        (
            "train.py",
            ["--data_dir", "photos", "--per_device_train_batch_size", "0"],
            "give a whole number of at least 1",
        ),
        ("train.py", ["--data_dir", "photos", "--image_size", "32", "--push_to_hub"], "train.py: error: "),
        ("train.py", ["missing.yaml"], "missing.yaml: no such file."),
        ("find_lr.py", ["--data_dir", "photos", "--start_lr", "5", "--end_lr", "1"], "give 0 < start_lr < end_lr"),
        ("find_lr.py", ["--image_size", "32"], "No photos: give --data_dir FOLDER"),
        ("predict.py", ["--model", "body", "nowhere.jpg"], "nowhere.jpg: no such file or folder."),
        ("predict.py", ["--model", "body", "photos", "--output", "p.xls"], "name that ends in .csv, .json, .jsonl"),
        ("predict.py", ["--model", "body", "photos", "--output", "no/p.csv"], "--output no/p.csv: no folder no."),
        ("predict.py", ["--model", "nobody", "photos", "--output", "p.csv"], "model 'nobody': no such folder"),
        (
            "predict.py",
            ["--model", "body", "photos", "--output", "p.csv", "--tta", "-1"],
            "tta=-1: give a whole number",
        ),
        ("predict.py", ["--model", "body", "photos", "--top_k", "0"], "--top_k=0: give a whole number of at least 1"),
        ("predict.py", ["--model", "body", "photos", "--device", "gpu", "--output", "p.csv"], "device='gpu'"),
        ("predict.py", ["--model", "body", "photos", "--no_such_flag"], "--no_such_flag"),
    ],
)
def test_bad_input_gets_one_line_and_leaves_nothing(trained, monkeypatch, capsys, recipe, words, message):
    place, _ = trained
    monkeypatch.chdir(place)
    if recipe != "predict.py":
        words = [*words, *([] if "--model" in words else ["--model", "body"]), "--output_dir", "new"]
    monkeypatch.setattr(sys, "argv", [str(RECIPES / recipe), *words])
    before = sorted(place.rglob("*"))
    assert one_clear_line(runpy.run_path(str(RECIPES / recipe))["main"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert message in lines[0]
    assert sorted(place.rglob("*")) == before


def test_a_recipe_run_by_hand_ends_without_a_traceback(trained):
    place, _ = trained
    done = run("train.py", "--data_dir", "nowhere", cwd=place, expect=2)
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("train.py: error: nowhere: no such folder.")


def test_every_config_is_a_recipe():
    for config in sorted((RECIPES / "configs").glob("*.yaml")):
        values = yaml.safe_load(config.read_text())
        stages = [Stage.from_dict(stage) for stage in values["stages"]]
        assert stages[0].precompute, config
    assert tuple(stages_of("lesson.yaml")) == LESSON


def stages_of(name: str) -> list[Stage]:
    return [Stage.from_dict(stage) for stage in yaml.safe_load((RECIPES / "configs" / name).read_text())["stages"]]


def test_flags_win_over_the_file(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("data_dir: a\nimage_size: 64\naugment: basic\n")
    data, model = parse((DataArguments, ModelArguments, Output), [str(config), "--image_size", "32"], "")[:2]
    assert (data.data_dir, model.image_size, model.augment) == ("a", 32, "basic")


@pytest.mark.parametrize("words", [["--learning_rate", "0.01"], ["--learning-rate=0.01"]])
def test_a_given_rate_takes_the_place_of_the_range_test_also_where_it_is_the_default(words, tmp_path, monkeypatch):
    main = runpy.run_path(str(RECIPES / "train.py"))["main"]
    seen = []

    def stop(recipe, training, has_rate):
        seen.extend(stages_of_recipe(recipe, training, has_rate))
        raise ValueError("seen")

    stages_of_recipe = main.__globals__["stages_of"]
    monkeypatch.setitem(main.__globals__, "stages_of", stop)
    with pytest.raises(ValueError, match="seen"):
        main(["--data_dir", "photos", "--output_dir", str(tmp_path / "out"), *words])
    assert [stage.lr for stage in seen] == [0.01, None, 0.01]


def test_stages_by_name():
    assert chosen_stages(None) == LESSON
    assert chosen_stages(["augmented"]) == (LESSON[1],)
