"""Several labels an image, from a table to a saved model: training both ways, solving, prediction, report and card."""

import csv
import json
import math
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml
from helpers import tiny_vit
from huggingface_hub import ModelCard
from PIL import Image
from sklearn.metrics import average_precision_score, f1_score

import hf_sgdr
from hf_sgdr import (
    MultiLabelInterpretation,
    SGDRTrainer,
    SGDRTrainingArguments,
    Stage,
    load_image_folder,
    load_image_table,
    pipeline,
    run_stages,
)
from hf_sgdr._utils.metrics import average_precision, multi_label_metrics
from hf_sgdr.cli.arguments import ModelArguments
from hf_sgdr.cli.build import build_trainer
from hf_sgdr.cli.main import run_cli
from hf_sgdr.data.dataset import ImageDataset

RECIPES = Path(__file__).parents[1] / "recipes"
NAMES = ["blue", "green", "red"]


def write_pairs(folder: Path, count: int) -> Path:
    """Images whose halves have the hues of their labels, one, two or none of three, and their table."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        labels = sorted(set(rng.integers(0, 4, 2)) - {3})
        pixels = rng.integers(0, 90, (40, 60, 3))
        for place, label in enumerate(labels):
            pixels[:, 30 * place : 30 * (place + 1), 2 - label] += 150
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.jpg", quality=92)
        rows.append((f"{i}.jpg", " ".join(NAMES[label] for label in labels), "valid" if i % 3 == 0 else "train"))
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "tags", "part"), *rows])
    return folder / "labels.csv"


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"), 48)


@pytest.fixture(scope="module")
def images(table):
    return load_image_table(table, label_column_name="tags", label_delimiter=" ", split_column_name="part")


def test_metrics_are_scikit_learns():
    rng = np.random.default_rng(1)
    truth, scores = rng.random((50, 4)) > 0.6, np.round(rng.random((50, 4)), 1)  # with equal scores
    for label in range(4):
        expected = average_precision_score(truth[:, label], scores[:, label])
        assert average_precision(scores[:, label], truth[:, label]) == pytest.approx(expected)
    metrics = multi_label_metrics(scores, truth)
    assert metrics["map"] == pytest.approx(average_precision_score(truth, scores, average="macro"))
    assert metrics["f1"] == pytest.approx(f1_score(truth, scores > 0.5, average="macro"))


def test_metrics_go_by_the_threshold_that_is_given():
    scores, truth = [[0.4, 0.1], [0.2, 0.45], [0.1, 0.1]], [[1, 0], [0, 1], [0, 0]]
    assert MultiLabelInterpretation(scores, truth, ["a", "b"], threshold=0.3).metrics["f1"] == 1.0
    assert MultiLabelInterpretation(scores, truth, ["a", "b"]).metrics["f1"] == 0.0


def test_labels_are_rows_of_zeros_and_ones(images, tiny_model):
    rows = ImageDataset(images["train"], hf_sgdr.image_transforms(tiny_model, image_size=32)[1])
    for index in (0, 5):
        expected = [float(label in images["train"][index]["label"]) for label in range(3)]
        assert rows[index]["labels"].tolist() == expected
        assert rows.labels()[index] == expected


@pytest.mark.parametrize("precompute", [False, True])
def test_training_lowers_the_loss_and_logs_map_and_f1(make_trainer, precompute):
    trainer = make_trainer(precompute=precompute, freeze_to=-1 if precompute else 0)
    assert trainer.model.config.problem_type == "multi_label_classification"
    before = trainer.evaluate()
    assert before["eval_loss"] == pytest.approx(math.log(2), abs=0.2)
    trainer.fit(0.1, 2, cycle_len=2)
    entries = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert entries[-1]["eval_loss"] < before["eval_loss"]
    assert {"eval_map", "eval_f1"} <= entries[-1].keys()
    assert "eval_accuracy" not in entries[-1]
    record = trainer.history.fits[-1]
    assert record["eval_map"] == entries[-1]["eval_map"]
    assert "eval_accuracy" not in record


def test_weights_of_one_and_accumulation_change_no_step(make_trainer):
    steps = []
    for kwargs in (
        {"per_device_train_batch_size": 8},
        {"per_device_train_batch_size": 8, "class_weights": dict.fromkeys(NAMES, 1.0)},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4,
            "class_weights": dict.fromkeys(NAMES, 1.0),
        },
    ):
        model = tiny_vit(NAMES, problem_type="multi_label_classification")
        trainer = make_trainer(model, folder=str(len(steps)), augment=None, max_zoom=1.0, max_steps=1, **kwargs)
        trainer.fit(0.1, 1)
        steps.append((trainer.model.classifier.weight.detach().clone(), trainer.evaluate()["eval_loss"]))
    for weight, loss in steps[1:]:
        torch.testing.assert_close(weight, steps[0][0], atol=1e-5, rtol=1e-4)
        assert loss == pytest.approx(steps[0][1], abs=1e-5)


def test_features_train_as_images_do(make_trainer):
    losses = []
    for precompute in (False, True):
        trainer = make_trainer(
            augment=None, max_zoom=1.0, precompute=precompute, feature_dtype="float32", folder=str(precompute)
        )
        trainer.eval_transform = trainer.eval_transform.fast()
        trainer.train_transform = trainer.eval_transform
        trainer.fit(0.05, 2, cycle_len=1)
        losses.append([entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry])
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-4)


def test_the_solved_head_is_each_labels_own_problem(make_trainer):
    trainer = make_trainer()
    solution = trainer.solve_head(strengths=[0.01, 1.0], folds=3)
    assert solution.out_of_fold.shape == (len(trainer.train_dataset), 3)
    assert trainer.evaluate()["eval_loss"] < math.log(2)


def test_a_range_test_and_views_of_an_image(make_trainer):
    trainer = make_trainer(precompute=True)
    assert np.isfinite(trainer.lr_find(num_steps=12).history["loss"]).all()
    trainer.fit(0.1, 1)
    views = trainer.tta(2)
    assert views.shape == (len(trainer.eval_dataset), 3)
    trainer.save_model()
    pipe = pipeline(trainer.args.output_dir, tta=2, device="cpu")
    answers = pipe([row["image"] for row in trainer.eval_dataset], top_k=3)
    for row, answer in zip(views, answers, strict=True):
        scores = {entry["label"]: entry["score"] for entry in answer}
        np.testing.assert_allclose([scores[name] for name in NAMES], row, atol=1e-5)


def test_the_saved_model_is_stock_and_a_threshold_keeps_what_reaches_it(make_trainer):
    trainer = make_trainer(freeze_to=0)
    trainer.fit(0.1, 2)
    trainer.save_model()
    pictures = [row["image"] for row in trainer.eval_dataset]
    stock = transformers.pipeline("image-classification", trainer.args.output_dir, device="cpu")(pictures, top_k=3)
    ours = pipeline(trainer.args.output_dir, device="cpu")
    expected = np.exp(trainer.log_predictions())
    for row, theirs, mine in zip(expected, stock, ours(pictures, top_k=3), strict=True):
        scores = {entry["label"]: entry["score"] for entry in theirs}
        np.testing.assert_allclose([scores[name] for name in NAMES], row, atol=1e-4)
        np.testing.assert_allclose([x["score"] for x in mine], [x["score"] for x in theirs], atol=1e-5)
    for row, answer in zip(expected, ours(pictures, threshold=0.5), strict=True):
        assert {entry["label"] for entry in answer} == {
            name for name, score in zip(NAMES, row, strict=True) if score >= 0.5
        }
    with pytest.raises(ValueError, match="threshold=2: must be a score from 0 to 1"):
        ours(pictures, threshold=2)


def test_interpretation_tells_each_label_and_the_surest_mistakes(make_trainer):
    trainer = make_trainer()
    trainer.solve_head(strengths=[0.001], folds=2)
    seen = MultiLabelInterpretation.from_trainer(trainer)
    metrics = trainer.evaluate()
    assert seen.metrics == pytest.approx({k: metrics[f"eval_{k}"] for k in ("loss", "map", "f1")}, abs=1e-5)
    truth, said = seen.labels, seen.probabilities > 0.5
    for i, report in enumerate(seen.per_class()):
        assert report.images == truth[:, i].sum()
        assert report.average_precision == pytest.approx(average_precision_score(truth[:, i], seen.probabilities[:, i]))
        assert report.f1 == pytest.approx(f1_score(truth[:, i], said[:, i], zero_division=0))
    mistakes = seen.most_incorrect(1000)
    assert len(mistakes) == (truth != said).sum()
    assert [x.loss for x in mistakes] == sorted((x.loss for x in mistakes), reverse=True)
    assert all(x.label == "red" for x in seen.most_incorrect(3, of_class="red"))
    assert mistakes[0].image.size == (60, 40)
    seen.plot_most_incorrect(2)
    seen.plot_per_class()
    with pytest.raises(ValueError, match="Each image has several labels: MultiLabelInterpretation"):
        hf_sgdr.ClassifierInterpretation.from_trainer(trainer)


@pytest.mark.parametrize(
    ("probabilities", "labels", "message"),
    [
        ([[0.5, 0.5]], [[1, 0], [0, 1]], "both must be"),
        ([[0.5, 1.5]], [[1, 0]], "from 0 to 1"),
        ([[0.5, 0.5]], [[2, 0]], "must be 0 and 1"),
    ],
)
def test_what_is_no_prediction_of_labels_is_refused(probabilities, labels, message):
    with pytest.raises(ValueError, match=message):
        MultiLabelInterpretation(probabilities, labels, ["a", "b"])


def test_model_and_images_must_agree(make_trainer, images, make_image_folder, tmp_path):
    single = hf_sgdr.create_image_classifier("test_resnet", labels=NAMES, pretrained=False)
    single.config.problem_type = "single_label_classification"
    with pytest.raises(ValueError, match="have several labels each, and the model is made for single_label"):
        make_trainer(single)
    several = hf_sgdr.create_image_classifier(
        "test_resnet", labels=["cats", "dogs"], pretrained=False, problem_type="multi_label_classification"
    )
    folder = make_image_folder(tmp_path / "one", {"train": {"cats": 3, "dogs": 3}, "valid": {"cats": 1, "dogs": 1}})
    with pytest.raises(ValueError, match="have one label each, and the model is made for multi_label"):
        make_trainer(several, images=folder)
    several.save_pretrained(tmp_path / "several")
    model = ModelArguments(str(tmp_path / "several"), image_size=32)
    trainer = build_trainer(
        load_image_folder(folder), model, SGDRTrainingArguments(str(tmp_path / "out"), use_cpu=True)
    )
    assert trainer.model.config.problem_type is None
    with pytest.raises(ValueError, match='best_by="accuracy": of several labels an image there is none'):
        make_trainer(best_by="accuracy")
    with pytest.raises(ValueError, match="label_smoothing_factor needs one label an image"):
        make_trainer(label_smoothing_factor=0.1)


def test_a_run_resumed_and_judged_by_f1_keeps_the_highest(make_trainer):
    trainer = make_trainer(best_by="f1", precompute=True)
    results = run_stages(trainer, [Stage("head", lr=0.05, cycles=3, precompute=True)])
    scores = [entry["eval_f1"] for entry in trainer.state.log_history if "eval_f1" in entry]
    assert results.best["eval_f1"] == max([*scores, results.solved["eval_f1"]])
    assert results.best["metric"] == "eval_f1"


@pytest.fixture(scope="module")
def trained(table, tmp_path_factory):
    """`recipes/train.py` on the table, in this process."""
    out = tmp_path_factory.mktemp("run") / "out"
    model = tmp_path_factory.mktemp("model")
    hf_sgdr.create_image_classifier("test_resnet", labels=["a", "b"], pretrained=False).save_pretrained(model)
    stages = ['{"name": "head", "lr": "auto", "precompute": true, "range_test_steps": 12}',
              '{"name": "whole", "lr": 0.01, "freeze_to": 0, "cycle_len": 1}']  # fmt: skip
    words = [
        "--labels_file",
        table,
        "--label_column_name",
        "tags",
        "--label_delimiter",
        " ",
        "--split_column_name",
        "part",
    ]
    words += ["--model", model, "--image_size", 32, "--output_dir", out, "--per_device_train_batch_size", 8]
    words += [
        "--n_aug",
        1,
        "--report_to",
        "none",
        "--disable_tqdm",
        "true",
        "--save_strategy",
        "no",
        "--stages",
        *stages,
    ]
    assert run("train.py", *words) == 0
    return out


def columns(table: Path) -> list[object]:
    names = ["--label_column_name", "tags", "--label_delimiter", " ", "--split_column_name", "part"]
    return ["--labels_file", table, *names]


def run(recipe: str, *words: object) -> int:
    before, sys.argv = sys.argv, [str(RECIPES / recipe), *map(str, words)]
    try:
        return run_cli(runpy.run_path(str(RECIPES / recipe))["main"])
    finally:
        sys.argv = before


def test_the_recipe_records_map_and_f1_everywhere(trained):
    results = json.loads((trained / "results.json").read_text())
    for record in (*results["stages"], results["best"], results["solved"]):
        assert {"eval_loss", "eval_map", "eval_f1"} <= record.keys()
        assert "eval_accuracy" not in record
    assert set(results["tta"]) == {"loss", "map", "f1", "plain_weight"}
    recipe = yaml.safe_load((trained / "recipe.yaml").read_text())
    assert recipe["label_delimiter"] == " "
    assert recipe["split_column_name"] == "part"
    config = json.loads((trained / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"


def test_the_card_tells_labels(trained):
    card = ModelCard.load(trained / "README.md")
    assert {result.metric_type for result in card.data.eval_results} == {"map", "f1", "loss"}
    assert card.data.metrics == ["map", "f1"]
    for text in ("gives an image any of 3 labels", "mean average precision", "average precision |", "macro-F1"):
        assert text in card.text
    assert "confusion" not in card.text.lower()
    assert "Wilson" not in card.text


def test_predict_gives_labels_above_a_threshold(trained, table, tmp_path, capsys):
    files = [str(table.parent / f"{i}.jpg") for i in range(4)]
    assert run("predict.py", "--model", trained, *files, "--output", tmp_path / "p.json", tmp_path / "p.csv") == 0
    for row in json.loads((tmp_path / "p.json").read_text()):
        assert set(row["label"]) == {name for name, score in row["probabilities"].items() if score >= 0.5}
    assert run("predict.py", "--model", trained, *files, "--threshold", 0) == 0
    assert all(line.count(";") == 2 for line in capsys.readouterr().out.splitlines()[-4:])


def test_the_report_tells_labels(trained, table, tmp_path, capsys):
    words = ["--model", trained, "--labels_file", table, "--label_column_name", "tags", "--label_delimiter", " "]
    words += [
        "--split_column_name",
        "part",
        "--output",
        tmp_path / "r.html",
        tmp_path / "r.md",
        tmp_path / "r.json",
        "--photos",
    ]
    assert run("report.py", *words) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    best = json.loads((trained / "results.json").read_text())["best"]
    assert report["photos"] == 16
    assert report["metrics"] == pytest.approx({k: best[f"eval_{k}"] for k in ("loss", "map", "f1")}, abs=1e-4)
    assert report["in_training"] == 0
    assert {"average_precision", "photos", "precision"} <= report["classes"][0].keys()
    html = (tmp_path / "r.html").read_text()
    for text in ("mean average precision", "The surest mistakes", "average precision"):
        assert text in html
    assert "Confusion" not in html
    assert "blue" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("is_made_for_several", "table", "words", "message"),
    [
        (True, None, ["--data_dir", "."], "--data_dir .: class folders give an image one label, and the model m is"),
        (True, "one.csv", [], "--labels_file one.csv: a cell is one label, and the model m is made for several: give"),
        (True, "one.jsonl", [], "The images have one label each, and the model is made for several: give a table with"),
        (False, "many.csv", ["--label_delimiter", " "], "--label_delimiter ' ' gives an image several labels, and the"),
        (False, "many.jsonl", [], "The images have several labels each, and the model is made for one: give each"),
    ],
)
def test_a_report_says_where_model_and_images_do_not_agree(
    tmp_path, monkeypatch, make_image_folder, capsys, is_made_for_several, table, words, message
):
    monkeypatch.chdir(make_image_folder(tmp_path, {"": {"blue": 3, "red": 3}}))
    kind = "multi_label_classification" if is_made_for_several else None
    model = hf_sgdr.create_image_classifier("test_resnet", labels=NAMES, pretrained=False, problem_type=kind)
    model.save_pretrained("m")
    if table is not None:
        lines = ["file_name,label"] if table.endswith(".csv") else []
        for name in ("blue", "red"):
            labels = ["green", name] if table.startswith("many") else [name]
            for i in range(3):
                row = {"file_name": f"{name}/{i:03d}.jpg", "label": labels if len(labels) > 1 else name}
                lines.append(f"{row['file_name']},{' '.join(labels)}" if table.endswith(".csv") else json.dumps(row))
        Path(table).write_text("\n".join(lines) + "\n")
        words = ["--labels_file", table, *words]
    assert run("report.py", "--model", "m", *words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert message in line


@pytest.mark.photos
def test_pairs_of_real_photos_side_by_side(shared_photos, tmp_path):
    """An image is two photos of dogscats, its labels what is on them."""
    rng, rows = np.random.default_rng(0), []
    for split, count in (("train", 60), ("valid", 24)):
        files = {name: sorted((shared_photos / "dogscats" / split / name).glob("*.jpg")) for name in ("cats", "dogs")}
        for i in range(count):
            names = rng.choice(["cats", "dogs"], 2)
            both = [Image.open(rng.choice(files[name])).convert("RGB").resize((96, 96)) for name in names]
            pair = Image.new("RGB", (192, 96))
            pair.paste(both[0], (0, 0))
            pair.paste(both[1], (96, 0))
            pair.save(tmp_path / f"{split}{i}.jpg")
            rows.append({"file_name": f"{split}{i}.jpg", "label": sorted(set(names.tolist())), "split": split})
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    images = load_image_table(tmp_path / "t.jsonl", split_column_name="split")
    from hf_sgdr.demo import demo_weights_file

    model = hf_sgdr.create_image_classifier(
        "tf_efficientnet_lite0", labels=["cats", "dogs"], weights_file=demo_weights_file()
    )
    transforms = hf_sgdr.image_transforms(model, image_size=128)
    args = hf_sgdr.SGDRTrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to="none", disable_tqdm=True)
    trainer = SGDRTrainer(
        model, args, train_dataset=images["train"], eval_dataset=images["validation"],
        train_transform=transforms[0], eval_transform=transforms[1],
    )  # fmt: skip
    trainer.solve_head()
    assert trainer.evaluate()["eval_map"] > 0.85
    assert torch.isfinite(torch.from_numpy(trainer.log_predictions())).all()
