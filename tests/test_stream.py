"""Streams: their features are those of the same rows in memory, stored chunk by chunk; nothing else trains on them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from datasets import ClassLabel, List
from helpers import same, tiny_resnet, weights
from safetensors.torch import load_file
from test_ranks import launched
from transformers import AutoModelForImageClassification

from hf_sgdr import Stage, run_stages
from hf_sgdr.data import stream as streams
from hf_sgdr.data.images import undecoded
from hf_sgdr.features import reader
from hf_sgdr.features.store import FeatureStore

RECIPES = Path(__file__).parents[1] / "recipes"
STAGES = (
    Stage("solved", solve=True),
    Stage("head", lr=0.05, cycles=2, precompute=True),
    Stage("late", freeze_to=-2, lr=0.01, cycles=1, precompute=True),
)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch, tmp_path):
    """Chunks and batches of eight images, and a store of each test's own."""
    monkeypatch.setattr(streams, "CHUNK", 8)
    monkeypatch.setattr(reader, "CPU_BATCH", 8)
    monkeypatch.setenv("HF_SGDR_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def written(monkeypatch):
    """The rows of every shard of features that was written."""
    rows = []
    write = FeatureStore.write
    monkeypatch.setattr(
        FeatureStore, "write", lambda self, shard, features: (rows.append(len(features)), write(self, shard, features))
    )
    return rows


def streamed(images):
    return {"train": images["train"].to_iterable_dataset(num_shards=2), "validation": images["validation"]}


def test_a_stream_trains_to_the_weights_of_the_same_rows(make_trainer, images):
    expected = make_trainer(images=images)
    known = run_stages(expected, STAGES)
    trainer = make_trainer(images=streamed(images), folder="stream")
    results = run_stages(trainer, STAGES)
    assert same(weights(expected.model), weights(trainer.model))
    assert results.best == known.best
    assert trainer.classes.training_counts == (13, 13)
    trainer.save_model()
    assert AutoModelForImageClassification.from_pretrained(trainer.args.output_dir).config.id2label[1] == "dogs"


def test_views_of_a_stream_differ_from_chunk_to_chunk_and_are_used(make_trainer, images):
    row = images["train"].select([0] * 16)
    trainer = make_trainer(
        images={"train": row.to_iterable_dataset(), "validation": images["validation"]},
        precompute=True,
        precompute_views=2,
    )
    trainer.fit(0.01, 1)
    dataset = trainer.features.training(trainer.train_dataset)
    plain, first, second = dataset.views
    assert len(dataset) == 16
    assert torch.equal(plain[0], plain[15])
    views = {tuple(row[:8].tolist()) for view in (first, second) for row in torch.as_tensor(view[:]).float()}
    assert len(views) > 28  # of 32; some are not turned, flipped or zoomed noticeably


def test_a_second_run_begins_the_stream_anew_and_computes_nothing(make_trainer, images, written):
    first = make_trainer(images=streamed(images), precompute=True)
    first.fit(0.05, 1)
    assert sum(written) == 26 + 11
    del written[:]
    second = make_trainer(images=streamed(images), precompute=True, folder="second")
    second.fit(0.05, 1)
    assert written == []
    assert same(weights(first.model), weights(second.model))


def test_features_of_a_stream_may_stay_on_disk(make_trainer, images):
    ends = []
    for budget in (None, 0.0):
        trainer = make_trainer(images=streamed(images), precompute=True, precompute_views=1, feature_memory_gb=budget)
        trainer.solve_head(strengths=[0.1])
        trainer.fit(0.05, 2)
        ends.append(weights(trainer.model))
    assert same(*ends)


def breaking(images, after):
    """A stream of the training images that breaks off, as a connection does, until `after[0]` is None."""
    rows = undecoded(images["train"])

    def read():
        for number, row in enumerate(rows):
            if number == after[0]:
                raise ConnectionError("the Hub went away")
            yield row

    return datasets.IterableDataset.from_generator(read, features=images["train"].features)


def test_what_was_read_before_a_stream_broke_off_is_kept(make_trainer, images, written):
    after = [21]
    split = {"train": breaking(images, after), "validation": images["validation"]}
    trainer = make_trainer(images=split)
    with pytest.raises(ValueError, match=r"broke off after 21 images \(the Hub went away\). .* 16 of them are stored"):
        run_stages(trainer, STAGES[1:2])
    assert sum(written) == 16
    after[0] = None
    trainer = make_trainer(images=split)
    run_stages(trainer, STAGES[1:2], resume=True)
    assert sum(written) == 26 + 11
    whole = make_trainer(images=images, folder="whole")
    run_stages(whole, STAGES[1:2])
    assert same(weights(whole.model), weights(trainer.model))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((Stage("whole", freeze_to=0, lr=0.01),), r"Stage 'whole' trains on the images of a stream: .*materialise"),
        ((STAGES[1], Stage("augmented", lr=0.01)), r"'augmented' trains on the images of a stream: .*list\(stream"),
    ],
)
def test_training_on_images_of_a_stream_is_refused_before_anything_is_read(
    make_trainer, images, stages, message, written
):
    trainer = make_trainer(images=streamed(images))
    with pytest.raises(ValueError, match=message) as error:
        run_stages(trainer, stages)
    assert "\n" not in str(error.value)
    assert written == []


def test_a_fit_and_an_evaluation_on_a_stream_are_refused(make_trainer, images):
    with pytest.raises(ValueError, match="train_dataset is a stream, whose images cannot be trained on"):
        make_trainer(images=streamed(images)).fit(0.01, 1)
    both = {name: rows.to_iterable_dataset() for name, rows in images.items()}
    with pytest.raises(ValueError, match="eval_dataset is a stream, and evaluation needs rows with a length"):
        make_trainer(images=both)


def test_what_a_stream_lacks_is_named(make_trainer, images):
    rows = undecoded(images["train"])

    def trainer_on(labels, feature):
        def read():
            for row, label in zip(rows, labels, strict=True):
                yield {"image": row["image"], "label": label}

        features = datasets.Features({"image": rows.features["image"], "label": feature})
        stream = datasets.IterableDataset.from_generator(read, features=features).cast_column("image", datasets.Image())
        split = {"train": stream, "validation": images["validation"]}
        return make_trainer(create(images), images=split, precompute=True)

    classes = ClassLabel(names=["cats", "dogs"])
    with pytest.raises(ValueError, match="Image 3 of the stream has no label"):
        trainer_on([0, 1, 0, None] + [0] * 22, classes).fit(0.01, 1)
    with pytest.raises(ValueError, match="'label' a ClassLabel, or a list of it; give stream"):
        trainer_on(["a"] * 26, datasets.Value("string"))
    with pytest.raises(ValueError, match="The stream has no image for this process"):
        make_trainer(
            images={"train": images["train"].to_iterable_dataset().take(0), "validation": images["validation"]},
            precompute=True,
        ).fit(0.01, 1)
    with pytest.raises(ValueError, match="wolves"):
        trainer_on([0] * 26, ClassLabel(names=["cats", "wolves"]))


def test_several_labels_an_image_come_from_a_stream(make_trainer, images):
    features = datasets.Features({"image": datasets.Image(), "label": List(ClassLabel(names=["cats", "dogs"]))})

    def several(rows):
        labels = [[label] if i % 3 else [0, 1] for i, label in enumerate(rows["label"][:])]
        return rows.remove_columns("label").add_column("label", labels, feature=features["label"])

    rows = {split: several(part) for split, part in images.items()}
    ends = []
    for split in (rows, streamed(rows)):
        model = create(images)
        trainer = make_trainer(model, images=split, folder=f"out{len(ends)}")
        results = run_stages(trainer, STAGES[:2])
        assert {"eval_map", "eval_f1"} <= set(results.best)
        assert model.config.problem_type == "multi_label_classification"
        ends.append(weights(model))
    assert same(*ends)


def create(images):
    return tiny_resnet(images["train"].features["label"].names)


@pytest.mark.commands
def test_a_data_set_of_the_hub_is_streamed_by_the_command(hub, images, tmp_path):
    files = {}
    for split, rows in images.items():
        path = tmp_path / f"{split}.parquet"
        rows.to_parquet(str(path))
        files[f"data/{split}-00000-of-00001.parquet"] = path.read_bytes()
    hub.add("datasets/ann/pets", files)
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"),
        "HF_SGDR_CACHE": str(tmp_path / "cache"),
    }

    def run(output, *flags):
        command = [sys.executable, str(RECIPES / "train.py"), *flags, "--dataset_name", "ann/pets", "--no_pretrained"]
        command += ["--model", "test_resnet", "--image_size", "32", "--output_dir", str(output), "--use_cpu"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)

    refused = run(tmp_path / "refused", "--streaming")
    assert refused.returncode != 0
    assert "trains on the images of a stream" in refused.stderr
    ends = []
    for name, flags in {"stream": ["--streaming"], "rows": []}.items():
        finished = run(tmp_path / name, str(RECIPES / "configs" / "fast.yaml"), *flags)
        assert finished.returncode == 0, finished.stderr[-3000:]
        ends.append(load_file(tmp_path / name / "model.safetensors"))
    assert same(*ends)
    assert yaml.safe_load((tmp_path / "stream" / "recipe.yaml").read_text())["streaming"] is True


@pytest.mark.ranks
def test_two_processes_read_a_part_each(images, tmp_path):
    for split, rows in images.items():
        (tmp_path / "pets").mkdir(exist_ok=True)
        rows.to_parquet(str(tmp_path / "pets" / f"{split}-00000-of-00001.parquet"))
    process = launched(
        2,
        *(RECIPES / "train.py", RECIPES / "configs" / "fast.yaml", "--dataset_name", tmp_path / "pets", "--streaming"),
        *(
            "--model",
            "test_resnet",
            "--no_pretrained",
            "--image_size",
            32,
            "--use_cpu",
            "--output_dir",
            tmp_path / "out",
        ),
        env={**os.environ, "HF_SGDR_CACHE": str(tmp_path / "cache")},
    )
    output, _ = process.communicate(timeout=280)
    assert process.returncode == 0, output[-3000:]
    stores = [json.loads(file.read_text()) for file in (tmp_path / "cache").rglob("manifest.json")]
    rows = sorted(store["rows"] for store in stores)
    assert rows == sorted([11, *[13] * (len(stores) - 1)])  # validation, and each half in every view
    assert len(stores) % 2 == 1
    assert json.loads((tmp_path / "out" / "results.json").read_text())["solved"]["eval_accuracy"] > 0.5
