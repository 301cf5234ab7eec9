import csv
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard

from hf_sgdr import SGDRTrainingArguments, create_image_classifier, pipeline
from hf_sgdr.cli.arguments import DataArguments, ModelArguments
from hf_sgdr.cli.build import chosen_stages, load_images
from hf_sgdr.cli.main import run_cli
from hf_sgdr.cli.parser import parse
from hf_sgdr.cli.summary import print_summary
from hf_sgdr.recipe import LESSON, RunResults, Stage

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


COMMAND = [
    "--data_dir", "images", "--model", "body", "--image_size", 32, "--output_dir", "out",
    "--per_device_train_batch_size", 8, "--n_aug", 1, "--stages", *SHORT, "--report_to", "none",
]  # fmt: skip


def run(recipe: str, *args: object, cwd: Path, expect: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, str(RECIPES / recipe), *map(str, args)],
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
def trained(tmp_path_factory, make_image_folder):
    """A short recipe run on made-up images, in a process of its own."""
    root = tmp_path_factory.mktemp("recipe")
    make_image_folder(root / "images", {"train": {"cats": 8, "dogs": 8}, "valid": {"cats": 4, "dogs": 4}})
    create_image_classifier("test_resnet", labels=["a", "b"], pretrained=False).save_pretrained(root / "body")
    return root, run("train.py", *COMMAND, cwd=root)


@pytest.fixture
def here(trained, monkeypatch, capsys):
    """`here(recipe, *args, expect=0)` runs one beside the images, in this process; gives what it printed."""

    def run_here(recipe, *args, expect=0):
        monkeypatch.chdir(trained[0])
        monkeypatch.setattr(sys, "argv", [str(RECIPES / recipe), *map(str, args)])
        assert run_cli(runpy.run_path(str(RECIPES / recipe))["main"]) == expect
        return capsys.readouterr()

    return run_here


@pytest.mark.parametrize("form", ["table", "metadata"])
def test_a_table_of_the_same_images_gives_the_same_weights(trained, tmp_path, form):
    root, _ = trained
    rows = [(str(file.relative_to(root / "images")), file.parent.name, file.parts[-3]) for split in ("train", "valid")
            for file in sorted((root / "images" / split).rglob("*.jpg"))]  # fmt: skip
    lines = "".join(f"{','.join(row)}\n" for row in [("file_name", "kind", "split"), *rows])
    args = [str(word) for word in COMMAND]
    args[args.index("out")] = str(tmp_path / "out")
    args += ["--label_column_name", "kind"]
    if form == "table":
        (tmp_path / "labels.csv").write_text(lines)
        args += ["--labels_file", str(tmp_path / "labels.csv"), "--split_column_name", "split"]
    else:
        shutil.copytree(root / "images", tmp_path / "images")
        (tmp_path / "images" / "metadata.csv").write_text(lines)
        args[args.index("images")] = str(tmp_path / "images")
    run("train.py", *args, cwd=root)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (root / "out" / "model.safetensors").read_bytes()
    recipe = (tmp_path / "out" / "recipe.yaml").read_text()
    assert "label_column_name: kind" in recipe
    assert str(tmp_path) not in recipe


def test_train_leaves_model_results_and_plots_and_says_so(trained):
    root, done = trained
    out = root / "out"
    assert {path.name for path in out.iterdir()} == {
        "_runs", "config.json", "model.safetensors", "results.json", "recipe.yaml", "README.md",
        "run.png", "head-range-test.png", "whole-learning-rate.png", "confusion-matrix.png",
    }  # fmt: skip
    results = json.loads((out / "results.json").read_text())
    assert [stage["name"] for stage in results["stages"]] == ["head", "whole"]
    assert set(results["tta"]) == {"loss", "accuracy", "plain_weight"}
    for word in ("stage", "head", "whole", "best", "with TTA"):
        assert word in done.stdout
    assert not list(out.rglob("*training_args*"))
    assert not [path for path in out.rglob("*") if path.name.startswith(".tmp")]


def test_what_train_saved_is_stock_without_our_package(trained, here):
    root, _ = trained
    code = (
        "import sys; sys.modules['hf_sgdr'] = None\n"
        "from transformers import pipeline\n"
        "import json, glob\n"
        "answer = pipeline('image-classification', model='out', device='cpu')(sorted(glob.glob('images/valid/*/*')))\n"
        "print(json.dumps(answer))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    stock = [{entry["label"]: entry["score"] for entry in row} for row in json.loads(done.stdout.splitlines()[-1])]
    here("predict.py", "--model", "out", "images/valid", "--output", "p.json", "p.csv")
    ours = json.loads((root / "p.json").read_text())
    assert [Path(row["file"]).parent.name for row in ours] == ["cats"] * 4 + ["dogs"] * 4
    for row, scores in zip(ours, stock, strict=True):
        np.testing.assert_allclose([row["probabilities"][n] for n in scores], list(scores.values()), atol=1e-4)
        assert row["label"] == max(scores, key=scores.get)
    table = list(csv.DictReader((root / "p.csv").open()))
    assert [row["file"] for row in table] == [row["file"] for row in ours]
    assert [float(row["p(cats)"]) for row in table] == [row["probabilities"]["cats"] for row in ours]


def test_train_writes_a_card_that_claims_only_what_is_true(trained):
    root, _ = trained
    card = ModelCard.load(root / "out" / "README.md")
    results = json.loads((root / "out" / "results.json").read_text())
    values = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert values["Accuracy"] == pytest.approx(results["best"]["eval_accuracy"], abs=1e-6)
    assert values["Loss with test-time augmentation (1 augmented view)"] == pytest.approx(
        results["tta"]["loss"], abs=1e-6
    )
    assert (card.data.base_model, card.data.datasets, card.data.license) == (None, None, "unknown")
    assert card.data.model_name == "test_resnet on images"
    assert "It started from a model in a local folder" in card.text.replace("\\", "")
    assert "hf-sgdr train recipe.yaml IMAGES --model MODEL\n" in card.text
    assert str(root) not in card.content


def test_a_finished_run_is_left_alone_by_resume(trained, here):
    root, _ = trained
    before = {path: path.stat().st_mtime_ns for path in (root / "out").rglob("*")}
    done = here("train.py", *COMMAND, "--resume")
    assert "is finished" in done.out
    assert {path: path.stat().st_mtime_ns for path in (root / "out").rglob("*")} == before


def test_predict_names_what_it_cannot_read_and_goes_on(trained, here, tmp_path):
    root, _ = trained
    good = next((root / "images" / "valid" / "cats").iterdir())
    (tmp_path / "bad.jpg").write_bytes(b"<html>not found</html>")
    done = here("predict.py", "--model", root / "out", good, tmp_path / "bad.jpg", good, expect=1)
    assert "bad.jpg: cannot be read as a picture" in done.err
    assert "\r" not in done.err  # which is no terminal here
    assert [line.split("\t")[0] for line in done.out.splitlines()] == [str(good)] * 2


def predict_here(*args: object) -> int:
    return runpy.run_path(str(RECIPES / "predict.py"))["main"]([str(word) for word in args])


def test_predict_takes_views_and_the_number_of_classes(trained, tmp_path, capsys):
    root, _ = trained
    folder = root / "images" / "valid"
    outputs = [tmp_path / name for name in ("p.csv", "p.json", "p.jsonl")]
    args = ["--model", root / "out", "--tta", 3, "--top_k", 1, "--batch_size", 3, "--device", "cpu"]
    assert predict_here(folder, *args, "--output", *outputs) == 0
    table, rows, lines = read_outputs(tmp_path)
    files = sorted(map(str, folder.rglob("*.jpg")))
    expected = pipeline(root / "out", device="cpu", tta=3)(files, top_k=1)
    assert [row["file"] for row in rows] == files
    assert lines == rows
    for row, cells, answer in zip(rows, table, expected, strict=True):
        assert row["probabilities"] == {row["label"]: row["probability"]}
        assert (row["label"], row["probability"]) == (answer[0]["label"], pytest.approx(answer[0]["score"], abs=1e-5))
        assert set(cells) == {"file", "label", "probability", "label_1", "probability_1"}
        assert (cells["label_1"], float(cells["probability_1"])) == (row["label"], row["probability"])
    capsys.readouterr()
    assert predict_here(files[0], *args[:-4], "--top_k", 2) == 0
    cells = capsys.readouterr().out.rstrip("\n").split("\t")
    assert (cells[0], sorted(cells[1::2])) == (files[0], ["cats", "dogs"])


def read_outputs(root: Path):
    table = list(csv.DictReader((root / "p.csv").open(newline="", encoding="utf-8")))
    lines = [json.loads(line) for line in (root / "p.jsonl").read_text(encoding="utf-8").splitlines()]
    return table, json.loads((root / "p.json").read_text(encoding="utf-8")), lines


def test_predict_leaves_the_rows_done_so_far_whenever_it_is_stopped(trained, tmp_path, monkeypatch, capsys):
    root, _ = trained
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
    args = [str(root / "images" / "valid"), "--model", str(root / "out"), "--output", *outputs, "--device", "cpu"]
    assert recipe["main"](args) == 130
    assert seen == [[number] * 3 for number in range(1, 6)]
    assert "Interrupted; the rows so far are written" in capsys.readouterr().err


def test_predict_writes_text_from_outside_so_that_it_is_only_text(trained, tmp_path, capsys):
    root, _ = trained
    model = create_image_classifier("test_resnet", labels=["=1+1", "\x1b[31mred"], pretrained=False)
    model.save_pretrained(tmp_path / "model")
    image = next((root / "images").rglob("*.jpg")).read_bytes()
    names = ["=cmd.jpg", "two\nlines.jpg", "\x1b[2Jclear.jpg", os.fsdecode(b"latin-\xe4.jpg"), 'café, "q".jpg']
    folder = tmp_path / "=images"
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(image)
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
    root, _ = trained
    read, write = os.pipe()
    os.close(read)  # as `| head` does when it has enough
    command = [sys.executable, str(RECIPES / "predict.py"), "--model", "out", "images", "--device", "cpu"]
    done = subprocess.run(command, cwd=root, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    os.close(write)
    assert done.returncode == 141, done.stderr
    assert not [word for word in ("error", "Broken pipe", "Traceback", "Exception") if word in done.stderr]


def test_a_broken_pipe_of_something_else_is_an_error(capsys):
    def main(argv):
        raise BrokenPipeError(32, "Broken pipe of a worker")

    assert run_cli(main) == 2
    assert "error: [Errno 32] Broken pipe of a worker" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["crane", "owl", "crane"], ["crane (0)", "owl", "crane (2)"]),
        (["crane", "crane", "crane (0)"], ["crane (0) (0)", "crane (1)", "crane (0) (2)"]),
    ],
)
def test_classes_that_share_a_name_are_told_apart(trained, tmp_path, names, shown):
    root, _ = trained
    model = create_image_classifier("test_resnet", labels=["a", "b", "c"], pretrained=False)
    model.config.id2label = dict(enumerate(names))
    model.save_pretrained(tmp_path / "model")
    output = tmp_path / "p.json"
    assert predict_here(root / "images", "--model", tmp_path / "model", "--device", "cpu", "--output", output) == 0
    for row in json.loads(output.read_text()):
        assert list(row["probabilities"]) == shown
        assert sum(row["probabilities"].values()) == pytest.approx(1)


def test_find_lr_prints_suggestions_and_leaves_the_curve(trained, here):
    root, _ = trained
    done = here(
        "find_lr.py", "--data_dir", "images", "--model", "body", "--image_size", 32, "--precompute",
        "--num_steps", 30, "--output_dir", "found", "--per_device_train_batch_size", 8,
    )  # fmt: skip
    for method in ("lesson", "valley", "steep", "minimum"):
        assert f"\n{method}" in "\n" + done.out
    assert (root / "found" / "range-test.png").stat().st_size > 1000
    assert len(json.loads((root / "found" / "range-test.json").read_text())["history"]["lr"]) > 8


@pytest.mark.parametrize(
    ("recipe", "args", "message"),
    [
        ("train.py", ["--data_dir", "nowhere"], "train.py: error: nowhere: no such folder."),
        ("train.py", ["--data_dir", "images", "--model", "resnt34"], "train.py: error: 'resnt34' is neither a folder"),
        ("train.py", ["--data_dir", "images", "--augment", "upside"], "augment='upside': give None or one of basic"),
        ("train.py", ["--data_dir", "images", "--num_cycles", "2"], "--num_cycles: the stages say that"),
        ("train.py", ["--data_dir", "images", "--freeze_batch_norm"], "--freeze_batch_norm: the stages say that"),
        (
            "train.py",
            ["--data_dir", "images", "--num_train_epochs", "5"],
            "--num_train_epochs: the stages say how long",
        ),
        ("train.py", ["--data_dir", "images", "--num-train-epochs=5"], "--num_train_epochs: the stages say how long"),
        ("train.py", ["--data-dir", "nowhere"], "train.py: error: nowhere: no such folder."),
        ("train.py", ["--data-dir=nowhere"], "train.py: error: nowhere: no such folder."),
        ("train.py", ["--data", "images"], "unrecognized arguments: --data ("),
        ("train.py", ["--data_dri", "images"], "unrecognized arguments: --data_dri (did you mean --data_dir?)"),
        ("train.py", ["images", "more"], "unrecognized arguments: more"),
        ("train.py", ["images", "--data-dir", "more"], "images and --data_dir: give the folder once"),
        ("train.py", ["images", "--stages", "augmentd"], "--stages augmentd (did you mean augmented?): give lesson"),
        ("train.py", ["--data_dir", "images", "--n_aug", "-3"], "n_aug=-3"),
        ("train.py", ["--data_dir", "images", "--max_train_samples", "0"], "max_train_samples=0"),
        ("train.py", ["--data_dir", "images", "--max-eval-samples", "-1"], "max_eval_samples=-1"),
        ("train.py", ["--data_dir", "images", "--max_train_samples", "few"], "invalid int value: 'few'"),
        ("train.py", ["--data_dir", "images", "--stages", "{name: x"], "--stages {name: x: not valid JSON"),
        ("train.py", ["--data_dir", "images", "--stages", "all"], "--stages all: give lesson, or any of precomputed"),
        ("train.py", ["--data_dir", "images", "--no_such_flag"], "--no_such_flag"),
        ("train.py", ["--data_dir", "images", "--license", "My own"], "license='My own': give an identifier of"),
        ("train.py", ["--data_dir", "images", "--learning_rate", "fast"], "invalid float value: 'fast'"),
        ("train.py", ["--data_dir", "images", "--dataset_name", "x"], "--dataset_name: give no --data_dir"),
        ("train.py", ["--data_dir", "images", "--image_size", "2"], "image_size=2: give the side of the square input"),
        ("train.py", ["--data_dir", "images", "--hub_token", "x"], "hub_token is not taken as an argument"),
        (
            "train.py",
            ["--data_dir", "images", "--per_device_train_batch_size", "0"],
            "must be an integer >= 1",
        ),
        ("train.py", ["--data_dir", "images", "--image_size", "32", "--push_to_hub"], "train.py: error: "),
        ("train.py", ["missing.yaml"], "missing.yaml: no such file."),
        ("find_lr.py", ["--data_dir", "images", "--start_lr", "5", "--end_lr", "1"], "give 0 < start_lr < end_lr"),
        (
            "train.py",
            ["--data_dir", "images", "--resume_from_checkpoint", "out/checkpoint-5"],
            "--resume_from_checkpoint: give --resume, which goes on from the last checkpoint",
        ),
        ("train.py", ["--data_dir", "images", "--train_split_name", "a"], "--train_split_name needs --dataset_name."),
        (
            "train.py",
            ["--data_dir", "images", "--push_to_hub", "--push_space", "--hub_revision", "dev"],
            "--push_space shows the model of the main branch",
        ),
        ("push.py", ["out", "ann/cats", "--revision", "dev", "--push_space"], "without --revision."),
        ("find_lr.py", ["--image_size", "32"], "No images: give --data_dir FOLDER"),
        ("predict.py", ["--model", "body", "nowhere.jpg"], "nowhere.jpg: no such file or folder."),
        ("predict.py", ["--model", "body", "images", "--output", "p.xls"], "name that ends in .csv, .json, .jsonl"),
        ("predict.py", ["--model", "body", "images", "--output", "no/p.csv"], "--output no/p.csv: no folder no."),
        ("predict.py", ["--model", "nobody", "images", "--output", "p.csv"], "model 'nobody': no such folder"),
        (
            "predict.py",
            ["--model", "body", "images", "--output", "p.csv", "--tta", "-1"],
            "tta=-1: must be an integer",
        ),
        ("predict.py", ["--model", "body", "images", "--top_k", "0"], "--top_k=0: must be an integer >= 1"),
        ("predict.py", ["--model", "body", "images", "--device", "gpu", "--output", "p.csv"], "device='gpu'"),
        ("predict.py", ["--model", "body", "images", "--no_such_flag"], "--no_such_flag"),
        ("predict.py", ["--model", "body", "images", "--top", "1"], "unrecognized arguments: --top 1"),
        ("predict.py", ["--model", "body", "images", "--top-k=0"], "--top_k=0: must be an integer >= 1"),
        ("find_lr.py", ["--data-dir", "nowhere"], "find_lr.py: error: nowhere: no such folder."),
        ("push.py", ["out"], "push.py: error: the following arguments are required: model_id"),
        ("push.py", ["out", "ann/cats", "--privat"], "unrecognized arguments: --privat"),
        ("push.py", ["out", "ann/cats", "--best", "two"], "invalid int value: 'two'"),
    ],
)
def test_bad_input_gets_one_line_and_leaves_nothing(trained, monkeypatch, capsys, recipe, args, message):
    root, _ = trained
    monkeypatch.chdir(root)
    if recipe in ("train.py", "find_lr.py"):
        args = [*args, *([] if "--model" in args else ["--model", "body"]), "--output_dir", "new"]
    monkeypatch.setattr(sys, "argv", [str(RECIPES / recipe), *args])
    before = sorted(root.rglob("*"))
    assert run_cli(runpy.run_path(str(RECIPES / recipe))["main"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert message in lines[0]
    assert sorted(root.rglob("*")) == before


def test_a_recipe_run_by_hand_ends_without_a_traceback(trained):
    root, _ = trained
    done = run("train.py", "--data_dir", "nowhere", cwd=root, expect=2)
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


@pytest.mark.parametrize("args", [["--learning_rate", "0.01"], ["--learning-rate=0.01"]])
def test_a_given_rate_takes_the_place_of_the_range_test_also_where_it_is_the_default(args, tmp_path, monkeypatch):
    main = runpy.run_path(str(RECIPES / "train.py"))["main"]
    seen = []

    def stop(*args):
        seen.extend(chosen_stages(*args))
        raise ValueError("seen")

    monkeypatch.setitem(main.__globals__, "chosen_stages", stop)
    with pytest.raises(ValueError, match="seen"):
        main(["--data_dir", "images", "--output_dir", str(tmp_path / "out"), *args])
    assert [stage.lr for stage in seen] == [0.01, None, 0.01]


def test_stages_by_name():
    assert chosen_stages(None) == LESSON
    assert chosen_stages(["augmented"]) == (LESSON[1],)
    assert [stage.lr for stage in chosen_stages(["augmented", "unfrozen"], 0.02)] == [0.02, 0.02]
    assert [stage.lr for stage in chosen_stages(None, 0.02)] == [0.02, None, 0.02]


# ---- Arguments ----


@pytest.mark.parametrize(
    ("args", "is_demo"),
    [
        ([], True),
        (["--output_dir", "out"], True),
        (["--data_dir", "images"], False),
        (["--data-dir", "images"], False),
        (["--data-dir=images"], False),
        (["--dataset-name", "ann/images"], False),
        (["--run_name", "--data_dir"], None),
    ],
)
def test_the_demo_runs_only_where_no_images_are_named(args, is_demo, tmp_path, monkeypatch, capsys):
    main = runpy.run_path(str(RECIPES / "train.py"))["main"]
    seen = []

    def stop(data, training):
        seen.append(data)
        raise ValueError("seen")

    monkeypatch.setitem(main.__globals__, "load_images", stop)
    monkeypatch.setitem(main.__globals__, "demo_image_folder", lambda: Path("digits"))
    monkeypatch.setitem(main.__globals__, "demo_weights_file", lambda: Path("weights"))
    if is_demo is None:
        with pytest.raises(ValueError, match="--run-name: expected one argument"):
            main(args)
        return
    with pytest.raises(ValueError, match="seen"):
        main([*args, "--output-dir", str(tmp_path)])
    assert ("This is the embedded demo" in capsys.readouterr().out) is is_demo
    assert (seen[0].data_dir == "digits") is is_demo


def config(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return str(path)


KINDS = (DataArguments, ModelArguments, Output)


def test_null_in_a_yaml_file_is_none(tmp_path):
    text = "data_dir: a\nimage_size: null\naugment:\nweights-file: ~\nmodel: m\n"
    data, model, _ = parse(KINDS, [config(tmp_path, text)], "")
    assert (data.data_dir, model.image_size, model.augment, model.weights_file) == ("a", None, None, None)
    assert model.model_name_or_path == "m"
    model = parse(KINDS, [config(tmp_path, text), "--image_size", "32"], "")[1]
    assert model.image_size == 32
    assert parse(KINDS, [config(tmp_path, text)], "").given == {"data_dir", "model_name_or_path"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "validation_fraction: null",
            "c.yaml: validation_fraction: null is no value of it: give another one, or leave",
        ),
        ("pretrained:", "c.yaml: pretrained: null is no value of it"),
        ("model: null", "c.yaml: model: null is no value of it"),
        ("augment: no", "c.yaml: augment: false is no value of it (unquoted, YAML reads yes, no, on and off as true"),
        ("image_size: yes", "c.yaml: image_size: true is no value of it"),
        ("image_size: 32.5", "invalid int value: '32.5'"),
        ("image_sise: 32", "c.yaml: image_sise: no such argument (did you mean image_size?)."),
        ("- 1", "c.yaml: give `argument: value` lines, not a list."),
        ("a: [", "c.yaml: not valid YAML"),
    ],
)
def test_a_value_that_does_not_fit_its_argument_is_one_line(text, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        parse(KINDS, [config(tmp_path, text)], "")
    assert "\n" not in str(error.value)


def test_a_text_that_looks_like_a_flag_is_a_value(tmp_path):
    assert parse(KINDS, [config(tmp_path, 'data_dir: "-images"\npretrained: false\n')], "")[0].data_dir == "-images"


# ---- Fewer images ----


def arguments(seed=42):
    return SGDRTrainingArguments("unused", use_cpu=True, report_to="none", seed=seed)


@pytest.fixture
def many(tmp_path, make_image_folder):
    classes = {"bee": 20, "cat": 8, "dog": 3, "eel": 1}
    make_image_folder(tmp_path / "many", {"train": classes, "valid": dict.fromkeys(classes, 4)})
    return str(tmp_path / "many")


def counts(dataset):
    return np.bincount(dataset["label"], minlength=4).tolist()


def paths(dataset):
    return [row["path"] for row in dataset.cast_column("image", datasets.Image(decode=False))["image"]]


def test_fewer_samples_keep_the_share_of_each_class_and_lose_none(many):
    loaded = load_images(DataArguments(data_dir=many, max_train_samples=16, max_eval_samples=8), arguments())
    assert counts(loaded["train"]) == [10, 4, 1, 1]
    assert counts(loaded["validation"]) == [2, 2, 2, 2]
    whole = load_images(DataArguments(data_dir=many), arguments())
    assert set(paths(loaded["train"])) < set(paths(whole["train"]))
    assert paths(loaded["train"]) == sorted(paths(loaded["train"]))


@pytest.mark.parametrize(("count", "expected"), [(4, [1, 1, 1, 1]), (32, [20, 8, 3, 1]), (1000, [20, 8, 3, 1])])
def test_every_class_has_a_sample_and_more_than_there_are_is_all_of_them(many, count, expected):
    loaded = load_images(DataArguments(data_dir=many, max_train_samples=count), arguments())
    assert counts(loaded["train"]) == expected
    assert counts(loaded["validation"]) == [4, 4, 4, 4]


def test_the_seed_decides_which_samples(many):
    def drawn(seed):
        return paths(load_images(DataArguments(data_dir=many, max_train_samples=8), arguments(seed))["train"])

    assert drawn(1) == drawn(1) != drawn(2)
    assert len(load_images(DataArguments(data_dir=many, max_train_samples=2), arguments())["train"]) == 2


def test_fewer_samples_of_a_data_set_likewise(many):
    loaded = load_images(DataArguments(dataset_name=f"{many}/train", max_train_samples=10), arguments())
    assert len(loaded["train"]) == 10
    assert counts(loaded["train"])[0] == max(counts(loaded["train"]))


# ---- Runs that go on ----


def test_resume_with_other_images_begins_anew_and_says_so(trained, make_image_folder, tmp_path):
    root, _ = trained
    make_image_folder(tmp_path / "others", {"train": {"owls": 4, "rats": 4}, "valid": {"owls": 2, "rats": 2}})
    shutil.copytree(root / "out", tmp_path / "out")
    command = [word if word != "images" else "others" for word in COMMAND]
    command[command.index("body")] = root / "body"
    done = run("train.py", *command, "--max_train_samples", 6, "--n_aug", 0, "--resume", cwd=tmp_path)
    assert "is finished" not in done.stdout
    assert "results.json is of another run" in done.stderr
    assert "This run begins anew." in done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["run"] != json.loads((root / "out" / "results.json").read_text())["run"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["label_names"] == ["owls", "rats"]
    assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["max_train_samples"] == 6
    assert len((tmp_path / "out" / "_runs" / "training-images.txt").read_text().split()) == 6


def test_the_summary_says_what_decides_and_gives_a_command_that_works(trained, here):
    root, done = trained
    results = json.loads((root / "out" / "results.json").read_text())
    stage, epoch = results["best"]["stage"], results["best"]["epoch"]
    assert f"lowest valid loss: {stage}" + (f", epoch {epoch:g}" if epoch else "") in done.stdout
    (_,) = [line for line in done.stdout.splitlines() if line.startswith(stage.split()[0]) and line.endswith("*")]
    assert f"{results['best']['eval_loss']:.4f}" in done.stdout
    predict, report, push = (shlex.split(line, comments=True) for line in done.stdout.splitlines()[-3:])
    assert predict == ["hf-sgdr", "predict", "--model", "out", "IMAGES"]
    assert here("predict.py", *predict[2:-1], next((root / "images").rglob("*.jpg"))).out.count("\t") == 2
    assert report[:3] == ["hf-sgdr", "report", "--model"]
    assert (
        "out on 8 images: images/valid"
        in here("report.py", *(word.replace("FOLDER", "images") for word in report[2:])).out
    )
    assert push == ["hf-sgdr", "push", "out", "user/name", "--push_space"]
    assert "Augmentation has no effect" not in done.stderr


def test_a_log_has_lines_and_no_bars(trained):
    _, done = trained
    assert "\r" not in done.stdout + done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert not [line for line in done.stderr.splitlines() if "%|" in line or "it/s" in line or not line.strip()]


def test_a_short_trial_is_called_one(capsys):
    stage = {"name": "head", "epochs": 0, "train_loss": None, "eval_loss": 0.5, "eval_accuracy": 0.75, "seconds": 1.0}
    best = {"stage": "head", "epoch": 0.5, "eval_loss": 0.5, "eval_accuracy": 0.75}
    results = RunResults(1, [stage], best)
    training = SGDRTrainingArguments("out", use_cpu=True, report_to="none")
    print_summary(results, training)
    assert "--max_steps" not in capsys.readouterr().out
    training.max_steps = 3
    print_summary(results, training)
    assert "each fit ended after 3 steps (--max_steps)" in capsys.readouterr().out


@pytest.mark.parametrize("launcher", ["python", "accelerate launch"])
def test_ctrl_c_is_one_line_that_says_how_to_go_on(trained, tmp_path, launcher):
    root, _ = trained
    args = [str(word) for word in COMMAND]
    args[args.index("out")] = str(tmp_path / "my out")
    args += [
        "--stages",
        '{"name": "head", "lr": 0.01, "cycles": 500, "precompute": true}',
    ]  # longer than it takes to see
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if launcher != "python":
        environment["ACCELERATE_MIXED_PRECISION"] = "no"  # what the launcher sets for its child
    recipe = [str(RECIPES / "train.py"), *args]
    child = subprocess.Popen(
        [sys.executable, *recipe],
        cwd=root,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    for line in child.stdout:
        if line.startswith("head:"):
            child.send_signal(signal.SIGINT)
            break
    _, err = child.communicate(timeout=120)
    assert child.returncode == 130, err
    assert "Traceback" not in err
    # not always the last one: a progress bar may end after it
    assert f"train.py: interrupted; to go on: {launcher} {shlex.join([*recipe, '--resume'])}" in err.splitlines()
    assert not (tmp_path / "my out" / "_runs" / "lock.json").exists()
