import numpy as np
import pytest
import torch

from hf_sgdr import image_transforms
from hf_sgdr.data.inputs import ImageInputs


@pytest.fixture
def transforms(tiny_model):
    return image_transforms(tiny_model, image_size=32, augment="side_on", max_zoom=1.1)


@pytest.fixture
def inputs(transforms):
    return ImageInputs(*transforms, columns=("image", "label"), seed=3)


def pixels(dataset):
    return torch.stack([row["pixel_values"] for row in dataset.__getitems__(range(4))])


def test_each_draw_and_each_view_has_augmentations_of_its_own(inputs, images):
    rows = images["train"]
    draws = [inputs.training(rows, 0), inputs.training(rows, 1), inputs.view(rows, 1), inputs.view(rows, 2)]
    assert len({pixels(dataset).sum().item() for dataset in draws}) == 4
    assert torch.equal(pixels(inputs.training(rows, 1)), pixels(draws[1]))


def test_evaluation_and_the_plain_view_draw_nothing(inputs, images):
    rows = images["train"]
    assert torch.equal(pixels(inputs.evaluation(rows)), pixels(inputs.evaluation(rows)))
    assert torch.equal(pixels(inputs.view(rows, 0)), pixels(inputs.view(rows, 0)))


def test_rows_that_draw_are_found_though_the_first_one_comes_out_the_same(inputs, images):
    class Drawing(list):
        def __getitem__(self, index):
            row = super().__getitem__(index)
            return row if index == 0 else {**row, "image": np.random.default_rng().permutation(row["image"])}

    rows = [{**row, "image": np.asarray(row["image"])} for row in images["train"]]
    inputs.view(rows, 0)
    with pytest.raises(ValueError, match="the rows' own transform draws at random"):
        inputs.view(Drawing(rows), 0)


def test_eight_bit_pixels_are_normalised_and_anything_else_stays(inputs, images, transforms):
    batch = {"pixel_values": pixels(inputs.evaluation(images["train"])), "labels": torch.arange(4)}
    normalised = inputs.normalize(batch)
    assert torch.equal(normalised["pixel_values"], transforms[1].normalize(batch["pixel_values"]))
    assert torch.equal(normalised["labels"], batch["labels"])
    assert inputs.normalize(normalised) is normalised
    assert inputs.normalize({"labels": 1}) == {"labels": 1}


def test_the_content_hash_is_of_images_labels_and_order(inputs, images):
    rows = images["train"]
    others = [rows.select([1, 0, 2]), rows.select(range(2)), rows.select(range(3)).map(lambda row: {"label": 1})]
    assert inputs.content_hash(rows.select(range(3))) not in {inputs.content_hash(other) for other in others}
    assert inputs.content_hash(rows.select(range(3))) == inputs.content_hash(rows.select(np.arange(3)))


def test_without_a_training_transform_the_evaluation_serves_and_no_augmentation_is_recorded_over(
    transforms, tiny_model
):
    tiny_model.config.hf_sgdr = {"augment": "basic", "max_zoom": 1.5}
    plain = ImageInputs(None, transforms[1], columns=("image", "label"), seed=3)
    assert plain.train_transform is transforms[1]
    plain.record_in(tiny_model)
    assert tiny_model.config.hf_sgdr == {"augment": "basic", "max_zoom": 1.5}
    plain.train_transform = transforms[0]
    plain.record_in(tiny_model)
    assert tiny_model.config.hf_sgdr == {"augment": "side_on", "max_zoom": 1.1}


def test_what_is_no_transform_is_refused_also_after_construction(make_trainer):
    trainer = make_trainer()
    for name in ("train_transform", "eval_transform"):
        with pytest.raises(TypeError, match=f"{name} is function: give one of those of image_transforms"):
            setattr(trainer, name, lambda image: image)
