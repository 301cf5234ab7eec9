"""Rows of any kind train to the same weights as a `datasets.Dataset`: lists, torch data sets, their own transforms."""

import datasets
import numpy as np
import pytest
import torch
from helpers import same, weights
from torch.utils.data import Dataset

from hf_sgdr import ClassifierInterpretation, Stage, create_image_classifier, run_stages

STAGES = (Stage("head", lr=0.05, cycles=1, precompute=True), Stage("whole", lr=0.01, freeze_to=0, cycle_len=1))


class TorchRows(Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return dict(self.rows[index])


def files(rows):
    return [row["path"] for row in rows.cast_column("image", datasets.Image(decode=False))["image"]]


def as_list(rows):
    return [{"image": file, "label": label} for file, label in zip(files(rows), rows["label"][:], strict=True)]


def with_names(rows):
    names = rows.features["label"].names
    return [{"image": row["image"], "label": names[row["label"]]} for row in as_list(rows)]


def with_strings(rows):
    names = rows.features["label"].names
    return rows.remove_columns("label").add_column("label", [names[label] for label in rows["label"][:]])


FORMS = {
    "list of paths": as_list,
    "list with names": with_names,
    "torch data set": lambda rows: TorchRows(as_list(rows)),
    "strings": with_strings,
    "own transform": lambda rows: rows.with_transform(lambda batch: batch),
}


@pytest.fixture(scope="module")
def expected(build_trainer, images, tmp_path_factory):
    trainer = build_trainer(tmp_path_factory.mktemp("run") / "out", images)
    results = run_stages(trainer, STAGES)
    return weights(trainer.model), results.best, trainer.tta(2), trainer.classes.training_counts


@pytest.mark.parametrize("form", FORMS)
def test_every_form_trains_to_the_same_weights(make_trainer, images, expected, form):
    rows = {split: FORMS[form](part) for split, part in images.items()}
    trainer = make_trainer(create(images), images=rows)
    results = run_stages(trainer, STAGES)
    ends, best, views, counts = expected
    assert same(ends, weights(trainer.model))
    assert results.best == best
    np.testing.assert_array_equal(trainer.tta(2), views)
    assert trainer.classes.training_counts == counts
    seen = ClassifierInterpretation.from_trainer(trainer)
    assert seen.loss == pytest.approx(best["eval_loss"], abs=1e-5)
    assert seen.most_uncertain(1)[0].image.mode == "RGB"


def create(images):
    torch.manual_seed(0)
    return create_image_classifier("test_resnet", labels=images["train"].features["label"].names, pretrained=False)


def test_integers_with_gaps_are_names_where_the_models_names_are_other_integers(make_trainer, images):
    values = [10, 40]
    rows = {
        split: part.remove_columns("label").add_column("label", [values[label] for label in part["label"][:]])
        for split, part in images.items()
    }
    model = create_image_classifier("test_resnet", labels=["10", "40"], pretrained=False)
    trainer = make_trainer(model, images=rows)
    assert trainer.images.labels(rows["train"]) == images["train"]["label"][:]
    trainer.fit(0.01, 1)


def test_an_id_that_the_model_has_not_is_named(make_trainer, images):
    rows = {split: [{**row, "label": 2 * row["label"]} for row in as_list(part)] for split, part in images.items()}
    with pytest.raises(ValueError, match=r"The label 2 is of no class: ids are 0 to 1 \("):
        make_trainer(create(images), images=rows).fit(0.05, 1)


def test_a_name_that_the_model_has_not_is_named(make_trainer, images):
    strange = with_strings(images["validation"]).map(lambda row: {"label": row["label"].replace("cats", "zebra")})
    with pytest.raises(ValueError, match=r"eval_dataset has labels that are none of the model's classes: 'zebra'"):
        make_trainer(images={"train": images["train"], "validation": strange})
    strange = [{**row, "label": "zebra"} for row in as_list(images["validation"])]
    trainer = make_trainer(images={"train": images["train"], "validation": strange})
    with pytest.raises(ValueError, match="The label 'zebra' is of no class: the classes are 'cats', 'dogs'"):
        trainer.fit(0.01, 1)


def test_a_transform_that_gives_inputs_is_taken_as_it_is(make_trainer, images):
    def inputs(batch):
        pixels = [torch.from_numpy(np.asarray(image.convert("RGB").resize((32, 32)))) for image in batch["image"]]
        return {"pixel_values": [x.permute(2, 0, 1).float() / 255 for x in pixels], "labels": batch["label"]}

    rows = {split: part.with_transform(inputs) for split, part in images.items()}
    trainer = make_trainer(create(images), images=rows)
    trainer.fit(0.01, 1)
    assert np.isfinite(trainer.state.log_history[-1]["train_loss"])
    with pytest.raises(ValueError, match="Precomputing needs images, and these rows have pixel_values, labels"):
        make_trainer(create(images), images=rows, precompute=True, folder="other").fit(0.01, 1)


def test_a_transform_that_draws_cannot_be_precomputed(make_trainer, images):
    def flip(batch):
        return {**batch, "image": [image.rotate(float(torch.rand(()) * 90)) for image in batch["image"]]}

    rows = {split: part.with_transform(flip) for split, part in images.items()}
    make_trainer(create(images), images=rows).fit(0.01, 1)
    with pytest.raises(ValueError, match="the rows' own transform draws at random"):
        make_trainer(create(images), images=rows, precompute=True, folder="other").fit(0.01, 1)
