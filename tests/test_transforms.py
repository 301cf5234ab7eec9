import collections
import math

import numpy as np
import pytest
import timm
import torch
from helpers import tiny_vit
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config
from transformers import ConvNextImageProcessor, ViTForImageClassification, ViTImageProcessor

import hf_sgdr.data.transforms as transforms
from hf_sgdr import (
    ImageTransform,
    SGDRTrainingArguments,
    create_image_classifier,
    fine_tuning_size,
    image_transforms,
)
from hf_sgdr.cli.arguments import ModelArguments
from hf_sgdr.cli.build import build_trainer
from hf_sgdr.cli.parser import parse
from hf_sgdr.data.image_spec import ImageSpec
from hf_sgdr.data.inputs import ImageInputs

SIZES = [(40, 40), (61, 97), (97, 61), (300, 50), (33, 500), (224, 224)]


def noise(height: int, width: int) -> Image.Image:
    rng = np.random.default_rng((height, width))
    small = rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def network():
    return timm.create_model("test_resnet").eval()


# ---- Evaluation ----


@pytest.mark.parametrize("name", ["test_resnet", "tf_efficientnet_lite0", "vit_tiny_patch16_224"])
def test_evaluation_is_timms_own_transform(name):
    network = timm.create_model(name) if name == "test_resnet" else None
    config = dict(network.pretrained_cfg if network is not None else timm.get_pretrained_cfg(name).to_dict())
    network = network if network is not None else timm.create_model(name)
    theirs = create_transform(**resolve_data_config(config), is_training=False)
    _, ours = image_transforms(network)
    for height, width in SIZES:
        assert torch.equal(ours(noise(height, width)), theirs(noise(height, width)))


@pytest.mark.parametrize("size", [32, 96, 224, 251])
def test_evaluation_at_another_size_is_what_the_saved_configuration_says(size):
    model = create_image_classifier("test_resnet", labels=["a", "b"], pretrained=False)
    _, ours = image_transforms(model, image_size=size)
    processor = ours.spec.write_to(model)
    assert ImageSpec.from_model(model) == ours.spec
    for height, width in SIZES:
        theirs = processor(noise(height, width), return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(ours(noise(height, width)), theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "processor",
    [
        ViTImageProcessor(size={"height": 32, "width": 32}),
        ViTImageProcessor(
            size={"shortest_edge": 37},
            do_center_crop=True,
            crop_size={"height": 32, "width": 32},
            resample=3,
            image_mean=[0.1, 0.2, 0.3],
            image_std=[0.4, 0.5, 0.6],
        ),
        ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.875),
        ViTImageProcessor(size={"height": 32, "width": 32}, do_normalize=False),
        ViTImageProcessor(size={"height": 32, "width": 32}, rescale_factor=1 / 127.5),
    ],
    ids=["squash", "crop", "convnext", "not normalised", "rescaled"],
)
def test_evaluation_is_the_stock_processor_of_a_model_of_transformers(processor, tmp_path):
    tiny_vit().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model = ViTForImageClassification.from_pretrained(tmp_path)
    _, ours = image_transforms(model)
    written = ours.spec.write_to(model)
    for height, width in SIZES[:-1]:
        theirs = processor(noise(height, width), return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(ours(noise(height, width)), theirs, atol=1e-5, rtol=0)
        again = written(noise(height, width), return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(again, theirs, atol=1e-5, rtol=0)


def test_a_model_without_a_processor_gets_stated_defaults(logs):
    _, transform = image_transforms(tiny_vit())
    assert "comes with no image processor: evaluating at 32 px" in logs.text
    assert (transform.spec.size, transform.spec.resize) == (32, 36)


def test_fast_resizing_differs_by_two_of_255_at_most(network):
    _, exact = image_transforms(network)
    for height, width in SIZES:
        a, b = (t.pixels(noise(height, width), (0,)).int() for t in (exact, exact.fast()))
        assert (a - b).abs().max() <= 2


@pytest.mark.photos
def test_on_real_images_the_fast_path_has_the_same_features(shared_photos):
    from hf_sgdr.demo import DEMO_MODEL, demo_weights_file

    model = create_image_classifier(DEMO_MODEL, labels=["a", "b"], weights_file=demo_weights_file()).eval()
    _, exact = image_transforms(model)
    files = sorted((shared_photos / "dogscats" / "valid" / "cats").iterdir())[:12]
    features = []
    with torch.inference_mode():
        for transform in (exact, exact.fast()):
            pixels = transform.normalize(torch.stack([transform.pixels(file, (0,)) for file in files]))
            network = model.timm_model
            features.append(network.forward_head(network.forward_features(pixels), pre_logits=True))
    assert torch.cosine_similarity(*features).min() >= 0.999


# ---- Which size ----


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("tf_efficientnet_lite0", 288),  # 9/7 of 224
        ("tf_efficientnet_lite2", 320),  # of 260, in whole strides
        ("resnet18", 288),  # where timm tests it
        ("mobilenetv4_conv_small_050", 256),
        ("vit_tiny_patch16_224", 224),  # takes no other size
    ],
)
def test_a_network_is_fine_tuned_at_more_pixels_than_it_was_trained_at(name, size):
    assert fine_tuning_size(create_image_classifier(name, labels=["cats", "dogs"], pretrained=False)) == size


def test_a_model_that_was_saved_here_and_one_of_transformers_keep_their_size(tmp_path):
    model = create_image_classifier("test_resnet", labels=["cats", "dogs"], pretrained=False)
    assert fine_tuning_size(model) == 192
    ImageInputs(*image_transforms(model, image_size=192), columns=("image", "label"), seed=0).record_in(model)
    model.save_pretrained(tmp_path)
    assert fine_tuning_size(create_image_classifier(tmp_path, labels=["ants", "bees"])) == 192
    assert fine_tuning_size(tiny_vit()) == 32


@pytest.mark.parametrize(
    ("words", "size"),
    [([], 192), (["--image_size", "32"], 32), (["--pretrained", "false"], 160)],
)
def test_a_recipe_takes_that_size_unless_told_otherwise(images, tmp_path, words, size):
    words = ["--output_dir", str(tmp_path / "out"), "--model", "test_resnet", *words]
    if "--pretrained" not in words:
        save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "w.safetensors")
        words += ["--weights_file", str(tmp_path / "w.safetensors")]
    model, training = parse((ModelArguments, SGDRTrainingArguments), words, "")
    trainer = build_trainer(images, model, training)
    assert {transform.spec.size for transform in (trainer.train_transform, trainer.eval_transform)} == {size}


# ---- Augmentation ----


def draws(augment, max_zoom, monkeypatch, count=600):
    """What a training transform decides for each of many seeds: side, rotation, brightness, contrast and crop."""
    seen = collections.defaultdict(list)
    network = timm.create_model("test_resnet")
    transform, _ = image_transforms(network, image_size=32, augment=augment, max_zoom=max_zoom)
    resize, turned, lighting = ImageTransform._resize, transforms._turned, transforms._lighting

    def noting_resize(self, pixels, height, width):
        seen["side"].append(min(height, width))
        return resize(self, pixels, height, width)

    def noting_turned(x, y, degrees, turns, is_flipped):
        seen["degrees"].append(degrees)
        seen["corner"].append((y + (seen["side"][-1] - 32) / 2, x + (seen["side"][-1] - 32) / 2))
        return turned(x, y, degrees, turns, is_flipped)

    def noting_lighting(pixels, brightness, contrast):
        seen["brightness"].append(brightness)
        seen["contrast"].append(contrast)
        return lighting(pixels, brightness, contrast)

    monkeypatch.setattr(ImageTransform, "_resize", noting_resize)
    monkeypatch.setattr(transforms, "_turned", noting_turned)
    monkeypatch.setattr(transforms, "_lighting", noting_lighting)
    image = noise(64, 64)
    for seed in range(count):
        view = transform.pixels(image, (seed,))
        assert view.shape == (3, 32, 32)
    return {name: np.array(values) for name, values in seen.items()}


def test_zoom_rotation_and_lighting_have_the_lessons_ranges(monkeypatch):
    seen = draws("basic", 2.0, monkeypatch)
    zoomed = seen["side"] > 32
    assert 0.68 < zoomed.mean() < 0.80  # .75, less the zooms below one pixel
    assert seen["side"].max() <= 64
    assert seen["side"][zoomed].mean() == pytest.approx(48, abs=2)
    rotated = seen["degrees"] != 0
    assert 0.69 < rotated.mean() < 0.81
    assert np.abs(seen["degrees"]).max() <= 10
    assert seen["degrees"][rotated].std() == pytest.approx(20 / math.sqrt(12), rel=0.08)
    for name in ("brightness", "contrast"):
        assert np.abs(seen[name]).max() <= 0.05
        assert seen[name].std() == pytest.approx(0.1 / math.sqrt(12), rel=0.08)
        assert abs(seen[name].mean()) < 0.004


def test_the_crop_is_anywhere(monkeypatch):
    seen = draws("basic", 1.5, monkeypatch)
    room = np.maximum(seen["side"] - 32, 0)
    assert (seen["corner"] >= 0).all()
    assert (seen["corner"] <= room[:, None]).all()
    wide = room >= 8
    for axis in (0, 1):
        assert (seen["corner"][wide, axis] / room[wide]).mean() == pytest.approx(0.5, abs=0.05)


def symmetries(augment: str, count: int = 400) -> collections.Counter:
    """Which symmetry of the square each view is nearest to, for a picture with a mark in one corner."""
    pixels = np.full((32, 32, 3), 40, dtype=np.uint8)
    pixels[2:14, 2:8] = 220  # higher than wide, at the top left
    transform, _ = image_transforms(timm.create_model("test_resnet"), image_size=32, augment=augment)
    plain = torch.from_numpy(pixels).permute(2, 0, 1).float()
    candidates = {
        (turns, flipped): torch.rot90(plain, turns, (1, 2)).flip(2) if flipped else torch.rot90(plain, turns, (1, 2))
        for turns in range(4)
        for flipped in (False, True)
    }
    counts = collections.Counter()
    for seed in range(count):
        view = transform.pixels(pixels, (seed,)).float()
        counts[min(candidates, key=lambda key: float((candidates[key] - view).abs().sum()))] += 1
    return counts


def test_basic_flips_nothing_side_on_half_and_top_down_all_eight_ways():
    assert set(symmetries("basic")) == {(0, False)}
    side_on = symmetries("side_on")
    assert set(side_on) == {(0, False), (0, True)}
    assert 0.42 < side_on[(0, True)] / 400 < 0.58
    top_down = symmetries("top_down", 800)
    assert len(top_down) == 8
    assert all(60 < count < 145 for count in top_down.values())


def test_lighting_is_fast_ais_formula():
    pixels = torch.randint(0, 256, (3, 4, 4), dtype=torch.uint8)
    mean = pixels.float().mean()
    for contrast, factor in ((0.05, 1.05), (-0.05, 1 / 1.05), (0.0, 1.0)):
        scale, summand = transforms._lighting(pixels, 0.02, contrast)
        lit = (pixels.float() - mean) * factor + mean + 0.02 * 255
        torch.testing.assert_close(pixels.float() * scale + summand, lit, atol=1e-3, rtol=0)


def rotated(pixels, degrees, turns=0, is_flipped=False):
    view = torch.tensor([*transforms._turned(0, 0, degrees, turns, is_flipped), 1.0, 0.0])
    return transforms.render(pixels[None], view[None], pixels.shape[2])[0]


def test_rotation_turns_about_the_middle_and_reflects_the_border():
    pixels = torch.arange(3 * 8 * 8, dtype=torch.uint8).view(3, 8, 8)
    assert torch.equal(rotated(pixels, 90.0), torch.rot90(pixels, 1, (1, 2)))
    assert rotated(torch.full((3, 16, 16), 255, dtype=torch.uint8), 7.0).min() == 255


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("is_flipped", [False, True])
def test_quarter_turns_come_before_the_flip(turns, is_flipped):
    pixels = torch.arange(3 * 8 * 8, dtype=torch.uint8).view(3, 8, 8)
    expected = torch.rot90(pixels, turns, (1, 2))
    assert torch.equal(rotated(pixels, 0.0, turns, is_flipped), expected.flip(2) if is_flipped else expected)


def test_a_seed_names_a_view(network):
    transform, evaluation = image_transforms(network, image_size=32, augment="side_on", max_zoom=1.1)
    image = noise(50, 70)
    assert torch.equal(transform.pixels(image, (1, 2, 3)), transform.pixels(image, (1, 2, 3)))
    assert not torch.equal(transform.pixels(image, (1, 2, 3)), transform.pixels(image, (1, 2, 4)))
    torch.manual_seed(0)
    first = transform(image)
    assert not torch.equal(first, transform(image))
    torch.manual_seed(0)
    assert torch.equal(first, transform(image))
    assert torch.equal(evaluation(image), evaluation(image))


def test_without_augmentation_and_zoom_training_is_evaluation(network):
    training, evaluation = image_transforms(network)
    assert training == evaluation
    assert not training.is_random
    assert image_transforms(network, max_zoom=1.1)[0].is_random


# ---- Arguments ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"augment": "flip"}, "augment='flip': give None or one of basic, side_on, top_down."),
        ({"max_zoom": 0.9}, "max_zoom=0.9: give a number of at least 1.0 (1.0 zooms nothing)."),
        ({"max_zoom": math.nan}, "max_zoom=nan: give a number of at least 1.0 (1.0 zooms nothing)."),
        ({"image_size": 4}, "image_size=4: give the side of the square input in pixels, at least 8."),
        ({"image_size": 64.0}, "image_size=64.0: give the side of the square input in pixels, at least 8."),
    ],
)
def test_wrong_arguments_are_refused(network, arguments, message):
    with pytest.raises(ValueError, match=r"give") as error:
        image_transforms(network, **arguments)
    assert str(error.value) == message


def test_a_size_that_the_model_cannot_take_is_refused_and_its_mode_kept():
    model = tiny_vit()
    model.train()
    with pytest.raises(ValueError, match="image_size=48: ViTForImageClassification cannot take pictures of that size"):
        image_transforms(model, image_size=48)
    assert model.training


def test_a_processor_that_makes_no_square_is_refused(tmp_path):
    tiny_vit().save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 48}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must make a square"):
        image_transforms(ViTForImageClassification.from_pretrained(tmp_path))


def test_inputs_that_are_not_square_are_refused():
    model = timm.create_model("test_resnet")
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 32, 64)}
    with pytest.raises(ValueError, match="only square inputs of three channels are supported"):
        image_transforms(model)
