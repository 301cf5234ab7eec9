import base64
import io
import itertools
import json
import logging
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import numpy as np
import pytest
import simplejpeg
import torch
import transformers
from PIL import Image
from transformers import ConvNextConfig, EfficientNetImageProcessor, MobileViTImageProcessor, ViTConfig
from transformers.pipelines.pt_utils import KeyDataset

from hf_sgdr import create_image_classifier
from hf_sgdr.data.images import UnreadableImageError, read_image
from hf_sgdr.demo import DEMO_MODEL, demo_weights_file
from hf_sgdr.inference.pipeline import TTAImageClassificationPipeline, pipeline

LABELS = ["cats", "dogs", "owls"]
NAMES = dict(enumerate(LABELS))


def stock(model, **kwargs):
    return transformers.pipeline("image-classification", model=str(model), device="cpu", **kwargs)


def scores(answer):
    return [{entry["label"]: entry["score"] for entry in one} for one in answer]


def assert_same(ours, theirs, atol=1e-5):
    assert len(ours) == len(theirs)
    for one, other in zip(scores(ours), scores(theirs), strict=True):
        assert one.keys() == other.keys()
        np.testing.assert_allclose([one[name] for name in other], list(other.values()), atol=atol, rtol=0)


def decided(model):
    """The same model with logits of mean 0 and spread 1.5 over images; those of a random one are all alike."""
    head = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
    colours = torch.rand(32, 3, 2, 2, generator=torch.Generator().manual_seed(1)) * 4 - 2
    size = model.config.to_dict().get("image_size") or 224
    with torch.no_grad():
        logits = model.eval()(torch.nn.functional.interpolate(colours, (size, size), mode="bilinear")).logits
        factor = 1.5 / logits.std(dim=0)
        head.bias.copy_((head.bias - logits.mean(dim=0)) * factor)
        head.weight.mul_(factor[:, None])
    return model


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Folders of models: a timm network, transformers' own, and two whose processors do more than resize and crop."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    timm_model = decided(create_image_classifier("test_resnet", labels=LABELS, pretrained=False))
    timm_model.config.hf_sgdr = {"augment": "side_on", "max_zoom": 1.1}
    timm_model.save_pretrained(root / "timm")
    vit = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=64, id2label=NAMES
    )
    convnext = ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], image_size=64, id2label=NAMES)
    side = {"height": 64, "width": 64}
    kinds = {
        "vit": (vit, transformers.ViTImageProcessor(size=side)),
        "convnext": (convnext, transformers.ConvNextImageProcessor(size={"shortest_edge": 64}, crop_pct=0.875)),
        "efficientnet": (vit, EfficientNetImageProcessor(size=side)),
        "mobilevit": (vit, MobileViTImageProcessor(size={"shortest_edge": 72}, crop_size=side)),
    }
    for name, (config, processor) in kinds.items():
        decided(transformers.AutoModelForImageClassification.from_config(config)).save_pretrained(root / name)
        processor.save_pretrained(root / name)
    return root


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> list[str]:
    """Files of every kind that people have."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)

    def picture(height, width):
        coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)

    exif = Image.Exif()
    exif[0x0112] = 6
    picture(190, 261).save(folder / "a-landscape.jpg", quality=92)
    picture(333, 145).save(folder / "b-portrait.jpg", quality=92)
    picture(200, 300).save(folder / "c-turned.jpg", quality=92, exif=exif)
    picture(190, 261).convert("L").save(folder / "d-grey.jpg")
    picture(190, 261).convert("CMYK").save(folder / "e-cmyk.jpg")
    picture(190, 261).quantize(64).save(folder / "f-palette.png", transparency=3)
    picture(190, 261).convert("RGBA").save(folder / "g-alpha.png")
    picture(20, 31).save(folder / "h-small.png")
    return sorted(str(path) for path in folder.iterdir())


@pytest.fixture
def pipe(saved):
    return pipeline(saved / "timm", device="cpu")


# ---- The stock pipeline's answers ----


@pytest.mark.parametrize("kind", ["timm", "vit", "convnext", "efficientnet", "mobilevit"])
def test_without_augmentation_the_answers_are_the_stock_pipelines(saved, pictures, kind):
    ours = pipeline(saved / kind, device="cpu", batch_size=3)(pictures)
    assert_same(ours, stock(saved / kind)(pictures), atol=1e-4)
    assert np.std([one["cats"] for one in scores(ours)]) > 2e-3  # they are not all alike


@pytest.mark.photos
def test_on_real_images_the_answers_are_the_stock_pipelines(shared_photos, tmp_path):
    torch.manual_seed(0)
    model = create_image_classifier(DEMO_MODEL, labels=["cats", "dogs"], weights_file=demo_weights_file())
    decided(model).save_pretrained(tmp_path)
    files = sorted(map(str, (shared_photos / "dogscats" / "valid").rglob("*.jpg")))[::25]
    assert_same(pipeline(tmp_path, device="cpu")(files), stock(tmp_path)(files), atol=1e-4)


@pytest.mark.parametrize(
    "words", [{"top_k": 1}, {"top_k": 99}, {"function_to_apply": "sigmoid"}, {"function_to_apply": "none"}]
)
def test_the_arguments_of_a_call_are_the_stock_pipelines(pipe, saved, pictures, words):
    assert_same(pipe(pictures[:2], **words), stock(saved / "timm")(pictures[:2], **words), atol=1e-4)
    assert_same(
        pipeline(saved / "timm", device="cpu", **words)(pictures[:2]),
        stock(saved / "timm", **words)(pictures[:2]),
        1e-4,
    )


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification", "single_label_classification"])
def test_the_kind_of_problem_decides_the_scores_as_in_the_stock_pipeline(saved, pictures, problem):
    ours, theirs = pipeline(saved / "vit", device="cpu"), stock(saved / "vit")
    ours.model.config.problem_type = theirs.model.config.problem_type = problem
    assert_same(ours(pictures[:2]), theirs(pictures[:2]), atol=1e-4)
    ours(pictures[:2], tta=2)


def test_five_labels_are_given_best_first_unless_more_are_asked_for(tmp_path, pictures):
    create_image_classifier("test_resnet", labels=list("abcdefg"), pretrained=False).save_pretrained(tmp_path)
    pipe = pipeline(tmp_path, device="cpu")
    found = [entry["score"] for entry in pipe(pictures[0])]
    assert len(found) == 5
    assert found == sorted(found, reverse=True)
    assert sum(entry["score"] for entry in pipe(pictures[0], top_k=7)) == pytest.approx(1)


# ---- What it takes, and what it gives ----


@pytest.fixture
def web(pictures):
    folder = str(Path(pictures[0]).parent)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_a_image_may_come_in_any_form(pipe, pictures, web):
    path = next(name for name in pictures if name.endswith("g-alpha.png"))
    content = Path(path).read_bytes()
    pixels = np.asarray(Image.open(path).convert("RGB"))
    text = base64.b64encode(content).decode()
    forms = [
        Path(path), content, {"bytes": content, "path": None}, Image.open(path), pixels, pixels.transpose(2, 0, 1),
        torch.from_numpy(pixels.copy()).permute(2, 0, 1), f"{web}/g-alpha.png", text, f"data:image/png;base64,{text}",
    ]  # fmt: skip
    expected = pipe(path, tta=2)
    assert isinstance(expected, list)
    assert set(expected[0]) == {"label", "score"}
    for form in forms:
        assert pipe(form, tta=2) == expected
    assert_same(pipe(forms, tta=2), [expected] * len(forms))


def test_many_images_may_come_in_any_form(pipe, pictures):
    rows = datasets.Dataset.from_dict({"number": range(len(pictures)), "image": pictures})
    rows = rows.cast_column("image", datasets.Image())
    expected = pipe(pictures)
    assert isinstance(expected, list)
    assert pipe(tuple(pictures)) == expected
    streams = [
        rows, rows["image"], rows.to_iterable_dataset(), KeyDataset(rows, "image"),
        rows.with_transform(lambda batch: {"image": batch["image"]}),
        (name for name in pictures), iter(pictures), map(Path, pictures),
    ]  # fmt: skip
    for images in streams:
        answers = pipe(images)
        assert iter(answers) is answers
        assert_same(list(answers), expected)


def test_an_iterator_over_a_data_set_has_its_length(pipe, pictures):
    assert len(pipe(datasets.Dataset.from_dict({"image": pictures}), batch_size=3)) == len(pictures)


def test_nothing_gives_nothing(pipe, pictures):
    rows = datasets.Dataset.from_dict({"image": pictures})
    for none in ([], (), rows.select([]), (name for name in ())):
        assert list(pipe(none)) == []


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_generator_is_asked_for_the_batch_at_hand_and_no_further(pipe, pictures, batch_size):
    asked = itertools.count()
    answers = pipe((pictures[next(asked) % 8] for _ in itertools.count()), batch_size=batch_size)
    for number in range(7):
        next(answers)
        assert next(asked) == (number // batch_size + 1) * batch_size + number
    assert number == 6


def test_one_opened_image_may_be_given_many_times(pipe, pictures):
    image = Image.open(pictures[1])
    assert_same(pipe([image] * 20, batch_size=7), [pipe(pictures[1])] * 20)


def test_which_column_and_which_split_must_be_clear(pipe, pictures):
    rows = datasets.Dataset.from_dict({"one": pictures, "two": pictures})
    with pytest.raises(
        ValueError, match=r"Which column holds the pictures\? The data set has \['one', 'two'\]: give K"
    ):
        pipe(rows)
    with pytest.raises(ValueError, match=r"several splits: give one of \['train'\], such as images\['train'\]"):
        pipe(datasets.DatasetDict(train=rows))


# ---- Test-time augmentation ----


def test_a_images_scores_depend_neither_on_its_batch_nor_on_its_place(pipe, pictures):
    expected = [pipe(name, tta=3) for name in pictures]
    assert_same(pipe(pictures, tta=3, batch_size=5), expected)
    assert_same(pipe(pictures[::-1], tta=3), expected[::-1])
    assert_same(list(pipe((name for name in pictures[2:]), tta=3, batch_size=2)), expected[2:])
    assert_same(pipe([Image.open(name) for name in pictures], tta=3), expected)


def test_the_scores_are_of_the_views_mean_logits_or_with_beta_their_mean(pipe, pictures):
    views = pipe.views(read_image(pictures[0]), 3)["pixel_values"][0]
    assert len({view.numpy().tobytes() for view in views}) == 4
    with torch.inference_mode():
        logits = pipe.model(pipe.views.plain.normalize(views)).logits
    each, weights = logits.softmax(dim=-1), torch.tensor([3.0, 1.0, 1.0, 1.0]) / 6
    for beta, expected in (
        (None, (weights @ logits).softmax(dim=-1)),
        (0.25, 0.25 * each[0] + 0.75 * each[1:].mean(dim=0)),
    ):
        found = scores([pipe(pictures[0], tta=3, beta=beta)])[0]
        np.testing.assert_allclose([found[name] for name in LABELS], expected, atol=1e-6)
    assert each.std(dim=0).max() > 1e-3  # the views do differ


@pytest.mark.parametrize("kind", ["efficientnet", "mobilevit"])
def test_a_processor_that_does_more_also_gets_augmented_views(saved, pictures, kind):
    pipe = pipeline(saved / kind, device="cpu", augment="side_on", max_zoom=1.1)
    views = pipe.views(Image.new("RGB", (90, 120), (240, 120, 10)), 4)["pixel_values"][0]
    assert views.shape == (5, 3, 64, 64)
    plain, *others = views.flatten(2).mean(dim=2)  # the order and the range of the channels are the processor's
    for other in others:
        assert (other - plain).abs().max() < 0.2 * (plain.max() - plain.min())
    assert_same(pipe(pictures, tta=2), [pipe(name, tta=2) for name in pictures])


def test_the_views_are_those_that_the_model_was_trained_with(saved, caplog):
    pipe = pipeline(saved / "timm", device="cpu", tta=1)
    pipe.model.config.hf_sgdr = {"augment": "basic", "max_zoom": 1.3}
    transform = pipeline(pipe.model, device="cpu", tta=1).views.augmented
    assert (transform.augment, transform.max_zoom) == ("basic", 1.3)
    transform = pipeline(pipe.model, device="cpu", tta=1, augment="top_down", max_zoom=1.0).views.augmented
    assert (transform.augment, transform.max_zoom) == ("top_down", 1.0)


def test_for_a_model_of_others_the_views_are_the_lessons_and_the_log_says_so(saved, caplog):
    with caplog.at_level(logging.WARNING, "hf_sgdr"):
        transform = pipeline(saved / "vit", device="cpu", tta=1).views.augmented
    assert (transform.augment, transform.max_zoom) == ("side_on", 1.1)
    assert 'draws views with augment="side_on" (which flips) and max_zoom=1.1' in caplog.text


@pytest.mark.parametrize(
    ("recorded", "message"),
    [
        ({"augment": None, "max_zoom": 1.0}, "this model was trained without augmentation: use tta=0"),
        ({"augment": "upside", "max_zoom": 1.1}, "augment='upside': give None or one of"),
        ({"augment": "basic"}, "does not say which views to draw: give augment= and max_zoom="),
        ({"augment": "basic", "max_zoom": "big"}, "does not say which views to draw"),
        ("basic", "does not say which views to draw"),
        (
            {"augment": "basic", "max_zoom": 1.1, "plain_weight": "all"},
            "plain_weight='all' in the model's config.hf_sgdr must be a number from 0 to 1",
        ),
    ],
)
def test_a_model_without_views_to_draw_says_so_at_once(saved, pictures, recorded, message):
    pipe = pipeline(saved / "timm", device="cpu")
    pipe.model.config.hf_sgdr = recorded
    pipe(pictures[0])
    with pytest.raises(ValueError, match=message):
        pipe(pictures[0], tta=2)
    with pytest.raises(ValueError, match=message):
        pipeline(pipe.model, device="cpu", tta=2)


# ---- Errors ----


def test_what_cannot_be_read_is_named_and_what_comes_before_it_is_answered(pipe, pictures, tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"<html>not found</html>")
    rows = datasets.Dataset.from_dict({"image": [*pictures[:2], str(bad), pictures[2]]})
    answers = pipe(rows)
    assert_same([next(answers), next(answers)], pipe(pictures[:2]))
    with pytest.raises(UnreadableImageError, match=r"bad\.jpg: cannot be read as a picture \(an HTML page"):
        next(answers)
    found = pipe([*pictures[:2], str(bad), pictures[2]], return_exceptions=True, tta=1)
    assert [type(one) for one in found] == [list, list, UnreadableImageError, list]
    assert_same(found[3:], [pipe(pictures[2], tta=1)])
    assert [str(one) for one in pipe([bad], return_exceptions=True)] == [str(found[2])]


def test_pixels_that_are_no_picture_do_not_take_the_others_along(pipe, pictures):
    pixels = torch.rand(3, 40, 40)
    bad = [torch.rand(1, 3, 40, 40), np.zeros((0, 0, 3), np.uint8), Image.new("RGB", (0, 5))]
    found = pipe([*bad, pictures[0]], return_exceptions=True)
    assert [type(one) for one in found] == [UnreadableImageError] * 3 + [list]
    same = [pixels.bfloat16().float(), pixels.bfloat16(), pixels.bfloat16().float().requires_grad_()]
    first, *others = pipe(same)
    assert_same(others, [first, first])


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (
            "nowhere.jpg",
            r"nowhere.jpg: cannot be read as a picture \(no such file, and neither an address nor base64\)",
        ),
        (Path("nowhere.jpg"), r"nowhere.jpg: cannot be read as a picture \(No such file or directory\)"),
        ("aGVsbG8gd29ybGQ=" * 20, r"^aGVsb.{92}\.\.\.: cannot be read as a picture \("),
        ("{web}/no.jpg", r"/no.jpg: cannot be read as a picture \(404 File not found\)"),
        ("http://127.0.0.1:9/x.jpg", r"http://127.0.0.1:9/x.jpg: cannot be read as a picture \(.*refused"),
        (".", r"\.: cannot be read as a picture \(a folder, not a file\)"),
        (np.zeros((2, 2)), r"ndarray \(2, 2\): cannot be read as a picture"),
    ],
)
def test_a_image_that_is_not_there_is_named(pipe, web, image, message):
    if isinstance(image, str):
        image = image.replace("{web}", web)
    with pytest.raises(ValueError, match=message):
        pipe(image)


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size=0: must be an integer >= 1"),
        ({"tta": -1}, ValueError, "tta=-1: must be an integer >= 0"),
        ({"beta": 2.0}, ValueError, "beta=2.0: give the plain image's weight, from 0 to 1"),
        ({"top_k": 0}, ValueError, "top_k=0: must be an integer >= 1"),
        ({"function_to_apply": "tanh"}, ValueError, "tanh"),
        ({"device": "gpu"}, ValueError, 'device=\'gpu\': .* Give "cpu", "cuda:0" or the like'),
        ({"augment": "upside", "tta": 1}, ValueError, "augment='upside': give None or one of"),
        ({"speed": 9}, TypeError, "speed"),
    ],
)
def test_a_wrong_argument_is_named(saved, words, error, message):
    with pytest.raises(error, match=message):
        pipeline(saved / "timm", **{"device": "cpu", **words})


def test_neither_a_wrong_model_nor_a_wrong_image_is_taken(pipe):
    with pytest.raises(TypeError, match="model is int: give a folder, a model id of the Hub, or a PreTrainedModel"):
        pipeline(3)
    with pytest.raises(OSError, match=r"model 'nobody/x': no such folder, and not loaded from the Hub \(.*Give a"):
        pipeline("nobody/x")
    with pytest.raises(TypeError, match="float is no picture: give a path"):
        pipe([1.5], return_exceptions=True)


# ---- Models and devices ----


@pytest.mark.parametrize("device", ["cpu", -1, torch.device("cpu")])
def test_the_device_is_named_as_in_transformers(saved, device):
    assert pipeline(saved / "timm", device=device).device == torch.device("cpu")


def test_a_model_may_be_an_object_and_stays_as_it_is(saved, pictures):
    for kind in ("timm", "vit"):
        model = transformers.AutoModelForImageClassification.from_pretrained(saved / kind).train()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        config = json.dumps(model.config.to_dict(), default=str)
        assert_same(pipeline(model, device="cpu")(pictures), stock(saved / kind)(pictures), atol=1e-4)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert json.dumps(model.config.to_dict(), default=str) == config


def test_precision_is_the_models(saved, pictures):
    pipe = pipeline(saved / "timm", device="cpu", dtype=torch.bfloat16)
    assert pipe.dtype == torch.bfloat16
    assert_same(pipe(pictures), pipeline(saved / "timm", device="cpu")(pictures), atol=0.1)


def test_it_is_a_pipeline_class_of_transformers(saved, pictures):
    expected = pipeline(saved / "timm", device="cpu", tta=2)(pictures[:3])
    words = {"model": str(saved / "timm"), "device": "cpu"}
    by_class = transformers.pipeline("image-classification", pipeline_class=TTAImageClassificationPipeline, **words)
    assert isinstance(by_class, transformers.ImageClassificationPipeline)
    assert_same(by_class(pictures[:3], tta=2), expected)


def test_what_it_saves_is_stock(saved, pictures, tmp_path):
    for kind, files in (("timm", set()), ("vit", {"preprocessor_config.json"})):
        pipe = pipeline(saved / kind, device="cpu")
        pipe.save_pretrained(tmp_path / kind)
        assert {path.name for path in (tmp_path / kind).iterdir()} == {"config.json", "model.safetensors", *files}
        assert "custom_pipelines" not in (tmp_path / kind / "config.json").read_text()
        assert_same(stock(tmp_path / kind)(pictures), pipe(pictures), atol=1e-4)


def large_image() -> bytes:
    rng = np.random.default_rng(1)
    coarse = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))
    file = io.BytesIO()
    coarse.resize((4000, 3000), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def test_large_images_are_decoded_in_part_where_that_is_asked_for(saved, monkeypatch):
    image, decoded, decode = large_image(), [], simplejpeg.decode_jpeg

    def decode_jpeg(*args, **kwargs):
        decoded.append(decode(*args, **kwargs).shape)
        return decode(*args, **kwargs)

    monkeypatch.setattr(simplejpeg, "decode_jpeg", decode_jpeg)
    exact = pipeline(saved / "timm", device="cpu")(image, tta=1)
    assert not decoded
    fast = pipeline(saved / "timm", device="cpu", exact=False)(image, tta=1)
    assert decoded == [(375, 500, 3)]
    assert_same([fast], [exact], atol=0.1)
