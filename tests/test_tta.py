"""One test-time augmentation: trainer, pipeline and interpretation see the same views and give the same mean."""

from functools import partial
from unittest.mock import ANY

import numpy as np
import pytest
import torch
import transformers
from helpers import tiny_resnet, tiny_vit
from PIL import Image
from transformers import ViTImageProcessor

from hf_sgdr import (
    ClassifierInterpretation,
    create_image_classifier,
    image_transforms,
    load_image_folder,
)
from hf_sgdr.data.dataset import ImageDataset, ImageViews
from hf_sgdr.demo import DEMO_MODEL, demo_weights_file
from hf_sgdr.inference.pipeline import pipeline
from hf_sgdr.inference.tta import PLAIN_WEIGHT, fitted_weight, mean_of_views

NAMES = ["cats", "dogs"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_image_folder):
    """Images of every kind that people have: also grey, turned by EXIF, palettes, tiny and with alpha."""
    root = make_image_folder(
        tmp_path_factory.mktemp("tta"), {"train": {"cats": 2, "dogs": 2}, "valid": {"cats": 5, "dogs": 4}}
    )
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in NAMES:
        with Image.open(root / "train" / name / "000.jpg") as image:
            image.convert("L").save(root / "valid" / name / "grey.jpg")
            image.resize((301, 214)).save(root / "valid" / name / "turned.jpg", exif=exif)
            image.quantize(16).save(root / "valid" / name / "palette.png", transparency=3)
            image.convert("RGBA").resize((31, 20)).save(root / "valid" / name / "tiny.png")
    return root


def vit(path):
    tiny_vit(image_size=64, patch_size=16).save_pretrained(path)
    ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(path)
    return transformers.AutoModelForImageClassification.from_pretrained(path)


def sharpened(model):
    """Such that an image's views differ in their probabilities."""
    head = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
    with torch.no_grad():
        head.weight.mul_(40)
    return model


def by_pipeline(trainer, files, **kwargs):
    trainer.save_model()
    answers = pipeline(trainer.args.output_dir, device="cpu", top_k=len(NAMES), **kwargs)(files)
    return np.array(
        [[{label["label"]: label["score"] for label in answer}[name] for name in NAMES] for answer in answers]
    )


@pytest.mark.parametrize("beta", [None, 0.25])
@pytest.mark.parametrize(("make_model", "image_size"), [(lambda path: tiny_resnet(), 48), (vit, None)])
def test_trainer_and_pipeline_agree_on_every_kind_of_image(
    make_trainer, folder, tmp_path, make_model, image_size, beta
):
    model = sharpened(make_model(tmp_path / "start"))
    trainer = make_trainer(model, images=folder, image_size=image_size, per_device_eval_batch_size=7)
    files = [image["path"] for image in ClassifierInterpretation.from_trainer(trainer).images]
    expected = trainer.tta(3, beta)
    np.testing.assert_allclose(by_pipeline(trainer, files, tta=3, beta=beta), expected, atol=1e-6, rtol=0)
    assert np.abs(expected - np.exp(trainer.log_predictions())).max() > 1e-3


def test_interpretation_has_its_loss_and_accuracy(make_trainer, folder):
    trainer = make_trainer(sharpened(tiny_resnet()), images=folder)
    result, probabilities = ClassifierInterpretation.from_trainer(trainer, tta=2), trainer.tta(2)
    np.testing.assert_array_equal(result.probabilities, probabilities)
    labels = np.array(trainer.eval_dataset["label"])
    assert result.accuracy == (probabilities.argmax(axis=1) == labels).mean()
    assert result.loss == pytest.approx(-np.log(probabilities[np.arange(len(labels)), labels]).mean(), rel=1e-6)


def test_the_plain_images_weight_is_chosen_on_validation_and_saved(make_trainer, folder):
    trainer = make_trainer(sharpened(tiny_resnet()), images=folder)
    files = [image["path"] for image in ClassifierInterpretation.from_trainer(trainer).images]
    before = ClassifierInterpretation.from_trainer(trainer, tta=3)
    chosen = trainer.fit_tta(3)
    after = ClassifierInterpretation.from_trainer(trainer, tta=3)
    assert chosen == {"loss": pytest.approx(after.loss, rel=1e-5), "accuracy": after.accuracy, "plain_weight": ANY}
    assert chosen["plain_weight"] != PLAIN_WEIGHT
    assert after.loss < before.loss
    np.testing.assert_allclose(by_pipeline(trainer, files, tta=3), after.probabilities, atol=1e-6, rtol=0)
    assert trainer.model.config.hf_sgdr == {
        "augment": "side_on",
        "max_zoom": 1.1,
        "plain_weight": chosen["plain_weight"],
    }


def test_a_weight_is_of_these_weights_and_views(make_trainer, folder):
    trainer = make_trainer(sharpened(tiny_resnet()), images=folder)
    for change in (
        lambda: trainer.fit(1e-3, 1),
        lambda: trainer.solve_head(folds=2),
        lambda: trainer.set_transforms(trainer.train_transform, trainer.eval_transform),
    ):
        trainer.fit_tta(2)
        assert "plain_weight" in trainer.model.config.hf_sgdr
        change()
        assert set(trainer.model.config.hf_sgdr) == {"augment", "max_zoom"}


@pytest.mark.parametrize("is_multi_label", [False, True])
def test_the_chosen_weight_has_the_lowest_loss_of_all(is_multi_label):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (40, 3), generator=generator) if is_multi_label else torch.arange(40) % 3
    truth = labels.float() if is_multi_label else torch.eye(3)[labels]
    views = 4 * truth + torch.randn(5, 40, 3, generator=generator) * torch.tensor([2.0, 5, 5, 5, 5])[:, None, None]
    score = torch.sigmoid if is_multi_label else partial(torch.softmax, dim=-1)

    def loss(weight):
        likelihood = mean_of_views(views.double(), score, weight=weight)
        missed = torch.where(truth > 0, likelihood, 1 - likelihood if is_multi_label else 1.0)
        return -missed.log().mean()

    best = fitted_weight(views, labels)
    assert 0 < best < 1
    assert loss(best) == min(loss(step / 20) for step in range(21))
    # views that say the opposite count less, and a plain view that does, nothing
    assert fitted_weight(torch.cat([views[:1], -views[1:]]), labels) > best
    assert fitted_weight(torch.cat([4 - 8 * truth[None], views[1:]]), labels) == 0.0


@pytest.mark.photos
def test_trainer_and_pipeline_agree_on_real_photos(make_trainer, shared_photos, tmp_path):
    for name in NAMES:
        for split, stop in (("train", 1), ("valid", 8)):
            (tmp_path / split / name).mkdir(parents=True)
            for file in sorted((shared_photos / "dogscats/valid" / name).iterdir())[:stop]:
                (tmp_path / split / name / file.name).symlink_to(file)
    model = create_image_classifier(DEMO_MODEL, labels=NAMES, weights_file=demo_weights_file())
    trainer = make_trainer(sharpened(model), images=tmp_path, image_size=None, per_device_eval_batch_size=7)
    files = [image["path"] for image in ClassifierInterpretation.from_trainer(trainer).images]
    np.testing.assert_allclose(by_pipeline(trainer, files, tta=4), trainer.tta(4), atol=1e-6, rtol=0)


def test_neither_order_nor_batch_changes_an_images_views(folder):
    images = load_image_folder(folder)["validation"]
    train, evaluation = image_transforms(tiny_resnet(), image_size=32, augment="side_on", max_zoom=1.1)
    views = ImageViews(ImageDataset(images, evaluation), train, 3)
    turned = ImageViews(ImageDataset(images.select(range(len(images))[::-1]), evaluation), train, 3)
    assert len(views) == 4 * len(images)
    batch = views.__getitems__([*range(2, 9), 0])
    for index, view in zip([*range(2, 9), 0], batch, strict=True):
        image, number = divmod(index, 4)
        assert torch.equal(view["pixel_values"], views[index]["pixel_values"])
        same = turned[4 * (len(images) - 1 - image) + number]
        assert torch.equal(view["pixel_values"], same["pixel_values"])
    assert not torch.equal(views[1]["pixel_values"], views[2]["pixel_values"])


def test_the_mean_is_of_logits_or_with_beta_of_probabilities():
    probabilities = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.4, 0.6]], dtype=torch.float64)

    def mean(views, *beta):
        return mean_of_views(views.log(), lambda logits: logits.softmax(dim=-1), *beta).numpy()

    odds = 9**0.5 * (1 * 4 / 6) ** 0.25
    np.testing.assert_allclose(mean(probabilities), [odds / (1 + odds), 1 / (1 + odds)])
    np.testing.assert_allclose(mean(probabilities, 0.25), [0.5625, 0.4375])
    np.testing.assert_allclose(mean(probabilities, 1 / 3), [0.6, 0.4])
    np.testing.assert_allclose(mean(probabilities, 1.0), [0.9, 0.1])
    np.testing.assert_allclose(mean(probabilities[:1], 0.25), [0.9, 0.1])


def test_a_mean_of_several_labels_is_of_each_labels_logits():
    logits = torch.tensor([[3.0, -20.0], [-1.0, 30.0]])
    np.testing.assert_allclose(mean_of_views(logits, torch.sigmoid), torch.sigmoid(torch.tensor([1.0, 5.0])))
