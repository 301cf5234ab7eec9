import hashlib
import io
import os
import struct
import subprocess
import sys
import threading
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from hf_sgdr import SGDRTrainer, SGDRTrainingArguments, image_transforms, load_image_folder
from hf_sgdr.data.dataset import ImageDataset
from hf_sgdr.data.hashes import image_hash
from hf_sgdr.data.images import UnreadableImageError, one_ahead, read_image, read_pixels


def picture(height=20, width=30) -> Image.Image:
    ramp = np.linspace(0, 255, width)[None, :, None] * np.array([1.0, 0.5, 0.25])
    return Image.fromarray(np.broadcast_to(ramp, (height, width, 3)).astype(np.uint8))


def saved(image: Image.Image, **kwargs) -> bytes:
    file = io.BytesIO()
    image.save(file, **kwargs)
    return file.getvalue()


def sixteen_bit() -> Image.Image:
    grey = np.asarray(picture().convert("L")).astype(np.uint16) * 257
    return Image.fromarray(grey)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (saved(picture(), format="PNG"), picture()),
        (saved(picture().convert("L"), format="PNG"), picture().convert("L")),
        (saved(picture().convert("RGBA"), format="PNG"), picture()),
        (saved(picture().convert("CMYK"), format="TIFF"), picture()),
        (saved(picture().quantize(64), format="PNG", transparency=0), picture().quantize(64)),
        (saved(sixteen_bit(), format="PNG"), picture().convert("L")),
        (saved(picture().convert("1"), format="PNG"), picture().convert("1")),
        (saved(picture().convert("LA"), format="PNG"), picture().convert("L")),
        (saved(picture(), format="BMP"), picture()),
        (saved(picture().convert("F"), format="TIFF"), picture().convert("L")),
    ],
    ids=["rgb", "grey", "rgba", "cmyk", "palette", "16 bit", "1 bit", "grey and alpha", "bmp", "float"],
)
def test_every_kind_of_picture_becomes_rgb(content, expected):
    read = read_image(content)
    assert read.mode == "RGB"
    difference = np.abs(np.asarray(read).astype(int) - np.asarray(expected.convert("RGB")).astype(int))
    assert difference.max() <= 2


def grey_tiff(values, bits: int, sample_format: int = 1, byte_order: str = "<") -> bytes:
    """A TIFF of one row of grey integers as no writer of Pillow's makes them: of 12 bits, or signed."""
    if bits == 12:
        packed = "".join(f"{value:012b}" for value in values)
        packed += "0" * (-len(packed) % 8)
        content = int(packed, 2).to_bytes(len(packed) // 8, "big")
    else:
        content = np.asarray(values, f"{byte_order}{'u' if sample_format == 1 else 'i'}{bits // 8}").tobytes()
    tags = {256: len(values), 257: 1, 258: bits, 259: 1, 262: 1, 277: 1, 278: 1, 279: len(content), 339: sample_format}
    start = 8 + 2 + 12 * (len(tags) + 1) + 4
    entries = b"".join(
        struct.pack(
            f"{byte_order}HHII" if tag in (273, 279) else f"{byte_order}HHIHxx",
            tag,
            4 if tag in (273, 279) else 3,
            1,
            value,
        )
        for tag, value in sorted({**tags, 273: start}.items())
    )
    head = (b"II*\0" if byte_order == "<" else b"MM\0*") + struct.pack(f"{byte_order}IH", 8, len(tags) + 1)
    return head + entries + bytes(4) + content


def greys(image) -> list[int]:
    pixels = np.asarray(read_image(image))
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0].ravel().tolist()


SIXTEEN = [0, 128, 255, 256, 257, 32896, 65535]
AS_EIGHT = [0, 0, 1, 1, 1, 128, 255]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bits_are_scaled_alike_whatever_the_brightest_pixel_is(kind):
    for brightest in range(1, len(SIXTEEN) + 1):
        image = Image.fromarray(np.array([SIXTEEN[:brightest]], np.uint16))
        assert greys(saved(image, format=kind)) == AS_EIGHT[:brightest]
        assert greys(image) == greys(np.asarray(image)) == AS_EIGHT[:brightest]


def test_the_depth_of_a_tiff_says_what_white_is():
    assert greys(grey_tiff(SIXTEEN, 16, byte_order=">")) == AS_EIGHT
    assert greys(grey_tiff([0, 255, 256, 2056, 4095], 12)) == [0, 16, 16, 128, 255]
    assert greys(grey_tiff([-32768, -1, 0, 16512, 32767], 16, sample_format=2)) == [0, 0, 0, 129, 255]


def test_a_turned_16_bit_picture_is_scaled_like_others():
    image = Image.fromarray(np.array([[0, 255, 32896]], np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 3
    assert greys(saved(image, format="PNG", exif=exif)) == [128, 1, 0]


@pytest.mark.parametrize("values", [[0, 255], [0, 70_000]])
def test_integers_of_32_bits_are_refused(values):
    image = Image.fromarray(np.array([values], np.int32))
    for given in (image, saved(image, format="TIFF")):
        with pytest.raises(ValueError, match="integers of 32 bits, whose white is not known; convert it to 8 or 16"):
            read_image(given)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 0.5, 1], [0, 128, 255]),
        ([0, 0.001, 0.1], [0, 0, 26]),
        ([-0.5, 0.2, 1.03], [0, 51, 255]),  # as bicubic resizing overshoots
        ([np.nan, 0.2, 1], [0, 51, 255]),
        ([np.inf, -np.inf, 0.2], [255, 0, 51]),
        ([np.nan, np.nan], [0, 0]),
        ([0, 128, 255], [0, 128, 255]),
        ([np.nan, -3, 200, np.inf], [0, 0, 200, 255]),
    ],
)
def test_floats_are_0_to_1_or_0_to_255(values, expected):
    image = Image.fromarray(np.array([values], np.float32))
    assert greys(image) == greys(saved(image, format="TIFF")) == expected


def test_floats_of_another_range_are_refused():
    image = Image.fromarray(np.array([[0, 4095]], np.float32))
    with pytest.raises(
        ValueError, match="float values up to 4095; scale them to 0 to 1, or convert it to 8 or 16 bits"
    ):
        read_image(saved(image, format="TIFF"))


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    content = saved(frames[0], format="GIF", save_all=True, append_images=frames[1:])
    assert read_image(content).getpixel((4, 4)) == (255, 0, 0)


def test_a_cmyk_jpeg_is_read():
    assert read_image(saved(picture().convert("CMYK"), format="JPEG")).mode == "RGB"


def test_a_image_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned a quarter to the left
    read = read_image(saved(picture(20, 30), format="JPEG", exif=exif))
    assert read.size == (20, 30)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK"])
def test_a_turned_tiff_is_the_same_from_a_file_as_from_its_bytes(mode, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    content = saved(picture(20, 30).convert(mode), format="TIFF", exif=exif)
    (tmp_path / "a.tif").write_bytes(content)
    read = read_image(tmp_path / "a.tif")
    assert read.size == (20, 30)
    assert read.tobytes() == read_image(content).tobytes()


@pytest.mark.parametrize(("needed", "decoded"), [(None, 800), (201, 800), (200, 400), (75, 200), (45, 100), (5, 100)])
def test_a_large_jpeg_is_decoded_no_larger_than_needed(needed, decoded):
    content = saved(picture(800, 1200), format="JPEG")
    read = read_image(content, needed)
    assert min(read.size) == decoded
    assert read_image(saved(picture(800, 1200), format="PNG"), needed).size == (1200, 800)
    assert torch.equal(read_pixels(content, needed), as_tensor(read))


def as_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("kind", "mode"), [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "L")]
)
def test_pixels_are_those_of_the_picture_whoever_decodes_it(tmp_path, kind, mode, turned):
    exif = Image.Exif()
    exif[0x0112] = 6 if turned else 1
    content = saved(picture(70, 90).convert(mode), format=kind, exif=exif)
    path = tmp_path / "image"
    path.write_bytes(content)
    expected = as_tensor(read_image(content))
    for given in (content, path, str(path), {"bytes": content, "path": None}, {"bytes": None, "path": str(path)}):
        assert torch.equal(read_pixels(given), expected)


def outcome(read, path):
    try:
        return read(path).tolist()
    except UnreadableImageError as error:
        return str(error)


JPEG = saved(picture(70, 90), format="JPEG")


@pytest.mark.parametrize("given", [b"", JPEG[:3], JPEG[:200], JPEG[:-90], JPEG[:300] + bytes(60) + JPEG[360:]])
def test_what_cannot_be_read_has_one_reason_whoever_decodes_it(tmp_path, given):
    path = tmp_path / "image.jpg"
    path.write_bytes(given)
    outcomes = [outcome(read, path) for read in (lambda path: as_tensor(read_image(path)), read_pixels)]
    assert outcomes[0] == outcomes[1]


def test_all_that_can_hold_a_picture_is_read(tmp_path):
    image = picture()
    path = tmp_path / "p.png"
    image.save(path)
    pixels = np.asarray(image)
    for given in (
        path,
        str(path),
        path.read_bytes(),
        {"path": str(path), "bytes": None},
        {"path": None, "bytes": path.read_bytes()},
        image,
        pixels,
        torch.from_numpy(pixels.copy()).permute(2, 0, 1),
    ):
        assert np.array_equal(np.asarray(read_image(given)), pixels)
    with pytest.raises(TypeError, match="float is no picture: give a path, bytes, a Pillow image or an array"):
        read_image(1.0)


@pytest.mark.parametrize(
    "content",
    [b"", b"<html>no such image</html>", saved(picture(), format="JPEG")[:300], b"\xff\xd8\xff\xe0" + b"\0" * 50],
)
def test_what_cannot_be_read_is_named_with_the_reason(tmp_path, content):
    path = tmp_path / "bad.jpg"
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"bad.jpg: cannot be read as a picture \(.+\). Remove or replace it."
    ) as error:
        read_image(path)
    assert "\n" not in str(error.value)


@pytest.fixture
def images(tmp_path, make_image_folder):
    root = make_image_folder(tmp_path / "images", {"train": {"cats": 4, "dogs": 4}, "valid": {"cats": 1, "dogs": 1}})
    return load_image_folder(root)["train"]


@pytest.fixture
def augmented(tiny_model):
    return image_transforms(tiny_model, image_size=32, augment="side_on", max_zoom=1.2)[0]


def test_rows_are_pixels_and_labels(images, tiny_model):
    _, transform = image_transforms(tiny_model, image_size=32)
    dataset = ImageDataset(images, transform)
    assert len(dataset) == 8
    assert dataset[5]["labels"] == 1
    assert dataset[5]["pixel_values"].dtype == torch.uint8
    assert torch.equal(transform.normalize(dataset[5]["pixel_values"][None])[0], transform(images[5]["image"]))
    assert "labels" not in ImageDataset(images.map(lambda row: {"label": -1}), transform)[0]
    assert "labels" not in ImageDataset(images.remove_columns("label"), transform)[0]


def test_labels_are_all_there_or_it_is_said(images, augmented):
    assert ImageDataset(images, augmented).labels() == [0] * 4 + [1] * 4
    with pytest.raises(ValueError, match=r"No label column 'kind': the dataset has \['image', 'label'\]"):
        ImageDataset(images, augmented, label_column="kind").labels()
    some = images.map(lambda row, i: {"label": -1 if i < 3 else row["label"]}, with_indices=True)
    with pytest.raises(ValueError, match="3 of 8 images have no label"):
        ImageDataset(some, augmented).labels()


def test_labels_of_rows_that_are_no_data_set(images, augmented):
    rows = [{"image": picture(), "label": label} for label in (1, np.int64(0), torch.tensor(1))]
    assert ImageDataset(rows, augmented).labels() == [1, 0, 1]
    rows = [{"image": picture(), "label": label} for label in ("dogs", "cats")]
    assert ImageDataset(rows, augmented, names=["cats", "dogs"]).labels() == [1, 0]
    rows = [{"image": picture(), "label": label} for label in (30, 2, "7")]
    assert ImageDataset(rows, augmented, names=["2", "7", "30"]).labels() == [2, 0, 1]
    rows = [{"image": picture(), "label": labels} for labels in (["b", "a"], [1], ())]
    assert ImageDataset(rows, augmented, names=["a", "b"]).labels() == [[1, 1], [0, 1], [0, 0]]
    for wrong, names, message in (
        ("cat", None, "The label 'cat' is of no class: the model names no classes."),
        ("cat", ["a", "b"], "The label 'cat' is of no class: the classes are 'a', 'b'."),
        (0.5, None, r"The label 0.5 is a float; it must be a class id \(integer\) or a name."),
        ([0, 2], ["a", "b"], r"The label 2 is of no class: ids are 0 to 1 \('a', 'b'\)"),
        ([0, -1], ["a", "b"], "must be of the 2 classes"),
    ):
        with pytest.raises(ValueError, match=message):
            ImageDataset([{"image": picture(), "label": wrong}], augmented, names=names)[0]


def with_floats(images):
    return images.cast_column("label", datasets.Value("float32"))


USELESS = [
    (lambda images: datasets.DatasetDict(train=images, extra=images), "of the splits ['train', 'extra']: give one of"),
    (lambda images: images.select([]), "is empty: it must have at least one image."),
    (lambda images: [], "is empty: it must have at least one image."),
    (with_floats, "the labels in 'label' are Value('float32'); they must be class ids or names."),
    (
        lambda images: images.remove_columns("label").add_column("label", [[0, 1]] * len(images)),
        "they must be class ids or names.",
    ),
]


@pytest.mark.parametrize(("change", "message"), USELESS)
def test_a_dataset_of_no_use_is_refused_with_the_mend(images, augmented, tiny_model, tmp_path, change, message):
    with pytest.raises(ValueError, match="dataset") as error:
        ImageDataset(change(images), augmented)
    assert message in str(error.value)
    args = SGDRTrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="train_dataset") as error:
        SGDRTrainer(tiny_model, args, train_dataset=change(images), eval_dataset=images)
    assert message in str(error.value)
    if not isinstance(change(images), dict):  # several evaluation sets are a dict
        for evaluation, name in ((change(images), "eval_dataset"), ({"one": change(images)}, r"eval_dataset\['one'\]")):
            with pytest.raises(ValueError, match=name) as error:
                SGDRTrainer(tiny_model, args, train_dataset=images, eval_dataset=evaluation)
            assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_mend_for_string_labels_is_one(images, augmented):
    names = images.features["label"].names
    strings = images.remove_columns("label").add_column("label", [names[label] for label in images["label"]])
    mended = strings.cast_column("label", datasets.ClassLabel(names=names))
    assert ImageDataset(mended, augmented).labels() == images["label"][:]


def test_a_trainer_says_what_data_it_cannot_take(images, tiny_model, tmp_path):
    args = SGDRTrainingArguments(
        str(tmp_path / "out"), use_cpu=True, report_to="none", disable_tqdm=True, dataloader_drop_last=True,
        eval_strategy="no", per_device_train_batch_size=16, per_device_eval_batch_size=4, dataloader_num_workers=0,
    )  # fmt: skip
    _, transform = image_transforms(tiny_model, image_size=32)
    trainer = SGDRTrainer(tiny_model, args, train_dataset=images, eval_transform=transform)
    with pytest.raises(ValueError, match="drop_last=True leaves no batch: the 8 images are fewer than a batch"):
        trainer.fit(1e-3, 1)
    with pytest.raises(ValueError, match="data set is empty"):
        trainer.predict(images.select([]))
    some = images.map(lambda row, i: {"label": -1 if i < 3 else row["label"]}, with_indices=True)
    with pytest.raises(ValueError, match=r"3 of 8 images have no label. Give .* dataset.remove_columns\('label'\)"):
        trainer.predict(some)
    assert trainer.predict(some.remove_columns("label")).predictions.shape == (8, 2)


def test_a_missing_image_column_is_named(images, augmented):
    with pytest.raises(ValueError, match=r"No image column 'img': the dataset has \['image', 'label'\]"):
        ImageDataset(images, augmented, image_column="img")


def views(images, augmented, workers=0, epoch=0, order=None, seed=0):
    dataset = ImageDataset(images, augmented, seed=seed)
    dataset.set_epoch(epoch)
    loader = DataLoader(dataset, batch_size=3, num_workers=workers, sampler=order)
    batches = torch.cat([batch["pixel_values"] for batch in loader])
    return batches if order is None else batches[np.argsort(order)]


def test_the_number_of_workers_and_the_order_change_nothing(images, augmented):
    expected = views(images, augmented)
    assert torch.equal(views(images, augmented, workers=2), expected)
    assert torch.equal(views(images, augmented, order=[3, 1, 7, 0, 2, 6, 5, 4]), expected)


def test_epoch_and_seed_change_the_views(images, augmented):
    expected = views(images, augmented)
    assert not torch.equal(views(images, augmented, epoch=1), expected)
    assert not torch.equal(views(images, augmented, seed=1), expected)


def test_the_hash_is_of_the_content_and_its_order(images, augmented, tmp_path):
    def hash_of(rows):
        return ImageDataset(rows, augmented).content_hash()

    before = hash_of(images)
    path = images.cast_column("image", datasets.Image(decode=False))[0]["image"]["path"]
    os.utime(path, (1, 1))
    assert hash_of(images) == before
    assert hash_of(images.map(lambda row: {"label": 1 - row["label"]})) == before
    assert hash_of(images.select([1, 0, *range(2, 8)])) != before
    with open(path, "ab") as file:
        file.write(b"\0")
    assert hash_of(images) != before


def test_a_file_is_hashed_once_until_it_changes(images, augmented, monkeypatch):
    read = []
    digest = hashlib.file_digest
    monkeypatch.setattr("hashlib.file_digest", lambda file, *args: (read.append(file.name), digest(file, *args))[1])
    expected = ImageDataset(images, augmented).content_hash()
    read.clear()
    assert ImageDataset(images, augmented).content_hash() == expected
    paths = [row["image"]["path"] for row in ImageDataset(images, augmented).rows]
    assert ImageDataset([{"image": path} for path in paths], augmented).content_hash() == expected
    assert ImageDataset(images.select([2, 0]), augmented).content_hash() != expected
    assert read == []
    os.utime(paths[1], ns=(1, 1))
    content = bytearray(Path(paths[2]).read_bytes())
    content[-3] ^= 1
    Path(paths[2]).write_bytes(content)  # of the same size
    os.utime(paths[2], ns=(2, 2))
    assert ImageDataset(images, augmented).content_hash() != expected
    assert sorted(read) == paths[1:3]
    os.remove(paths[3])
    with pytest.raises(ValueError, match=r"003.jpg: cannot be read as a picture \(No such file or directory\)"):
        ImageDataset(images, augmented).content_hash()


def test_encoded_bytes_files_and_paths_of_one_content_hash_alike(images, augmented):
    def hash_of(rows):
        return ImageDataset(rows, augmented).content_hash()

    expected = hash_of(images)
    paths = [row["image"]["path"] for row in ImageDataset(images, augmented).rows]
    encoded = [{"bytes": Path(path).read_bytes(), "path": None} for path in paths]
    mixed = [
        image if i % 3 else {"bytes": None, "path": path}
        for i, (image, path) in enumerate(zip(encoded, paths, strict=True))
    ]
    kind = datasets.Features({"image": datasets.Image()})
    for column, features in (
        (encoded, kind),
        (mixed, kind),
        (paths, None),
        ([image["bytes"] for image in encoded], None),
    ):
        rows = datasets.Dataset.from_dict({"image": column}, features=features)
        assert hash_of(rows) == hash_of(rows.select(range(8))) == expected
        assert hash_of(rows.select([3, 1, 2])) == hash_of(images.select([3, 1, 2]))


FORKED = """
import os, sys
from hf_sgdr.data.dataset import ImageDataset
from hf_sgdr.data.images import readers
images = ImageDataset([{"image": path} for path in sys.argv[1:]], None)
expected = images.content_hash()
assert list(readers().map(abs, [-1, -2])) == [1, 2]
child = os.fork()
if child == 0:
    ok = list(readers().map(abs, [-1, -2])) == [1, 2] and images.content_hash() == expected
    os._exit(0 if ok else 1)
_, status = os.waitpid(child, 0)
assert list(readers().map(abs, [-3])) == [3]  # the parent's own go on
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_reads_with_threads_of_its_own(images, augmented):
    paths = [row["image"]["path"] for row in ImageDataset(images, augmented).rows]
    command = [sys.executable, "-W", "ignore", "-c", FORKED, *paths]
    assert subprocess.run(command, timeout=60, check=False).returncode == 0


def test_a_file_and_its_bytes_have_one_hash_and_pixels_their_own(tmp_path):
    path = tmp_path / "p.png"
    picture().save(path)
    assert image_hash(path) == image_hash(path.read_bytes()) == image_hash({"path": str(path), "bytes": None})
    assert image_hash(picture()) == image_hash(np.asarray(picture()))
    assert image_hash(picture(30, 20)) != image_hash(picture(20, 30))


def test_the_next_batch_is_made_while_one_is_worked_on():
    made, worked_on = [], threading.Event()

    def batches():
        for number in range(3):
            made.append(number)
            if number == 1:
                worked_on.set()
            yield number

    for number in one_ahead(batches()):
        if number == 0:
            assert worked_on.wait(10)  # made before this one is done
    assert made == [0, 1, 2]
    with pytest.raises(ValueError, match="somebody's own"):
        list(one_ahead(broken()))


def broken():
    yield 0
    raise ValueError("somebody's own")
