"""Images that cannot be read, and images that only look as if they could not."""

import io
import os
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_sgdr import load_image_folder
from hf_sgdr.data.audit import UnreadableImagesError, readable
from hf_sgdr.data.folders import image_files
from hf_sgdr.data.hashes import image_hash
from hf_sgdr.data.images import UnreadableImageError, read_image
from hf_sgdr.data.transforms import image_transforms


def encoded(kind: str, mode: str = "RGB", size=(40, 30), **kwargs) -> bytes:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    file = io.BytesIO()
    (image if mode == "RGB" else image.convert(mode)).save(file, kind, **kwargs)
    return file.getvalue()


def png_of_zeros(width: int, height: int) -> bytes:
    """A PNG of one grey, a kilobyte or two whatever its size."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    compress = zlib.compressobj()
    rows = b"".join(compress.compress(bytes(1 + width)) for _ in range(height)) + compress.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


JPEG = encoded("JPEG")
frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
GOOD = {
    "plain.jpg": JPEG,
    "a png.jpg": encoded("PNG"),
    "a jpeg.png": JPEG,
    "cmyk.jpg": encoded("JPEG", "CMYK"),
    "16 bit.png": encoded("PNG", "I;16"),
    "palette.png": encoded("PNG", "P", transparency=0),
    "animated.gif": encoded("GIF", save_all=True, append_images=frames),
    "turned.jpg": encoded("JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"),
    "1x1.png": encoded("PNG", size=(1, 1)),
    "1x500.jpg": encoded("JPEG", size=(1, 500)),
    "new\nline.jpg": JPEG,
    "🐕.jpg": JPEG,
    "100%.jpg": JPEG,
    "#1.jpg": JPEG,
    "\x1b[31m.jpg": JPEG,
    "=1+1.jpg": JPEG,
}
BAD = {
    "cut.jpg": (encoded("JPEG", size=(200, 200))[:5000], "truncated"),
    "cut.png": (encoded("PNG", size=(200, 200))[:5000], "truncated"),
    "empty.jpg": (b"", "an empty file, 0 bytes"),
    "page.jpg": (b"\n<!DOCTYPE html>\n<html><body>404</body></html>", "an HTML page"),
    "drawing.png": (b'<?xml version="1.0"?>\n<svg xmlns="x"></svg>', "SVG drawing; convert it to PNG"),
    "answer.jpg": (b'{"error": "rate limit"}', "no picture format"),
    "book.jpg": (b"%PDF-1.7 ...", "no picture format"),
    "script.jpg": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
        "no picture format",
    ),
    "archive.jpg": (b"PK\x03\x04" + bytes(40), "no picture format"),
    "phone.HEIC": (b"\0\0\0\x18ftypheic" + bytes(40), "HEIC, which Pillow does not read; convert it to JPEG"),
    "film.jpg": (b"\0\0\0\x18ftypmp42" + bytes(40), "no picture format"),
    "pointer.jpg": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "noise.jpg": (bytes(range(1, 200)), "no picture format"),
    "huge.png": (png_of_zeros(20_000, 20_000), "more than 178,956,970 pixels"),
    "bad\x1b[2J.jpg": (b"x", "no picture format"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of images; in each all that can be read, and in one all that cannot."""
    root = tmp_path_factory.mktemp("hostile")
    for split in ("train", "valid"):
        for name in ("cats", "dogs"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for file, content in GOOD.items():
                (folder / file).write_bytes(content)
    cats = root / "train" / "cats"
    (cats / "deep" / "deeper").mkdir(parents=True)
    for file, (content, _) in BAD.items():
        (cats / "deep" / file).write_bytes(content)
    (cats / "nothing").mkdir()
    (cats / "loop.jpg").symlink_to("loop.jpg")
    (cats / "gone.jpg").symlink_to("nowhere.jpg")
    (cats / "device.jpg").symlink_to("/dev/zero")
    os.mkfifo(cats / "pipe.jpg")
    (cats / "round").symlink_to(cats)
    (cats / "deep" / "up").symlink_to(root)
    (root / "train" / "all").symlink_to(root / "train")
    return root


SPECIAL = {
    "loop.jpg": "Too many levels of symbolic links",
    "gone.jpg": "No such file or directory",
    "device.jpg": "a pipe or a device",
    "pipe.jpg": "a pipe or a device",
}


def test_all_that_cannot_be_read_is_named_with_its_reason(folder):
    with pytest.raises(UnreadableImagesError, match="images cannot be read") as error:
        load_image_folder(folder)
    reasons = {os.path.basename(file): reason for file, reason in error.value.reasons.items()}
    expected = {**{file: reason for file, (_, reason) in BAD.items()}, **SPECIAL}
    assert reasons.keys() == expected.keys()
    for file, reason in expected.items():
        assert reason in reasons[file], (file, reasons[file])
    message = str(error.value)
    assert message.startswith(f"{len(expected)} of ")
    assert "\x1b" not in message
    assert message.endswith('Remove or replace them, or leave them out with on_error="skip".')


def test_what_cannot_be_read_is_left_out_if_asked(folder, caplog):
    images = load_image_folder(folder, on_error="skip")
    assert {split: len(rows) for split, rows in images.items()} == {"train": 2 * len(GOOD), "validation": 2 * len(GOOD)}
    assert images["train"].features["label"].names == ["cats", "dogs"]
    assert sum("left out, it cannot be read" in line for line in caplog.messages) == len(BAD) + len(SPECIAL)
    assert "\x1b" not in "".join(caplog.messages)


def test_without_an_audit_images_are_only_listed(folder):
    assert len(load_image_folder(folder, on_error=None)["train"]) == 2 * len(GOOD) + len(BAD) + len(SPECIAL)


def test_what_is_left_trains(folder, tiny_model):
    images = load_image_folder(folder, on_error="skip")
    train, evaluation = image_transforms(tiny_model, image_size=32, augment="top_down", max_zoom=1.5)
    rows = images["train"].cast_column("image", images["train"].features["image"].__class__(decode=False))
    for row in rows:
        for transform in (train, evaluation):
            assert transform.pixels(row["image"], (1,)).shape == (3, 32, 32)


def test_on_error_is_one_of_three(folder):
    with pytest.raises(ValueError, match="on_error='ignore': give 'raise', 'skip' or None"):
        load_image_folder(folder, on_error="ignore")


def test_a_class_of_which_nothing_can_be_read_is_said(tmp_path, make_image_folder, caplog):
    root = make_image_folder(tmp_path, {"train": {"a": 2, "b": 2}, "valid": {"a": 1, "b": 1, "c": 1}})
    (root / "train" / "c").mkdir()
    (root / "train" / "c" / "x.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="'c' not among the classes of train"):
        load_image_folder(root, on_error="skip")
    assert any("no image of 'c' can be read" in line for line in caplog.messages)
    for file in (root / "train").rglob("*.jpg"):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"no image in class folders.*PATH/CLASS"):
        load_image_folder(root, on_error="skip")


def test_names_that_are_not_utf8(tmp_path, make_image_folder):
    root = make_image_folder(tmp_path, {"train": {"a": 2, "b": 2}, "valid": {"a": 1, "b": 1}})
    with open(os.fsencode(root / "train" / "a") + b"/\xff.jpg", "wb") as file:
        file.write(JPEG)
    with pytest.raises(UnreadableImagesError, match="its name is not UTF-8; rename it"):
        load_image_folder(root)
    assert len(load_image_folder(root, on_error="skip")["train"]) == 4
    os.mkdir(os.fsencode(root / "train") + b"/\xfe")
    with open(os.fsencode(root / "train") + b"/\xfe/1.jpg", "wb") as file:
        file.write(JPEG)
    with pytest.raises(ValueError, match=r"udcfe: its name is not UTF-8, so it can name no class. Rename it"):
        load_image_folder(root)


READ_AS_NOBODY = """
import os, sys
from pathlib import Path
from hf_sgdr.data.audit import UnreadableImagesError, readable
from hf_sgdr.data.folders import image_files
readable([b"x"], ["x"], "skip")  # whatever is imported late, now
if os.getuid() == 0:
    os.setuid(65534)
files = list(image_files(Path(sys.argv[1])))
try:
    readable(files, files, "raise")
except UnreadableImagesError as error:
    print(error)
"""


def test_what_may_not_be_read_is_named(make_image_folder):
    with tempfile.TemporaryDirectory() as temporary:  # pytest's own folders are closed to other users
        os.chmod(temporary, 0o755)
        root = make_image_folder(Path(temporary), {"": {"a": 2, "b": 2, "b/locked": 1}})
        image, folder = root / "a" / "000.jpg", root / "b" / "locked"
        image.chmod(0)
        folder.chmod(0)
        command = [sys.executable, "-c", READ_AS_NOBODY, temporary]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        folder.chmod(0o755)
    assert f"{image}: Permission denied" in done.stdout, done.stderr
    assert f"{folder}: Permission denied" in done.stdout
    assert done.stdout.startswith("2 of 5 images cannot be read")


def test_a_hash_waits_for_no_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(UnreadableImageError, match=r"pipe.jpg: cannot be read as a picture \(a pipe or a device"):
        image_hash(str(tmp_path / "pipe.jpg"))


def test_a_picture_of_400_million_pixels_takes_no_memory(tmp_path):
    (tmp_path / "huge.png").write_bytes(BAD["huge.png"][0])
    code = (
        "import resource, sys; from hf_sgdr.data.images import read_image\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: read_image(sys.argv[1])\n"
        "except ValueError as error: print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "huge.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    message, grown = done.stdout.splitlines()
    assert "make it smaller" in message
    assert int(grown) < 20_000  # kilobytes; decoded it would be 1.2 million


def test_a_decoder_that_fails_in_any_way_is_reported(tmp_path, monkeypatch):
    for error in (IndexError("list index"), MemoryError(), struct.error("unpack"), KeyError(7), RecursionError()):

        def fail(self, error=error):
            raise error

        monkeypatch.setattr("PIL.JpegImagePlugin.JpegImageFile.load", fail)
        with pytest.raises(UnreadableImageError):
            read_image(JPEG)
    assert readable([JPEG], ["one"], "skip") == []


def test_image_files_of_nothing(tmp_path):
    assert list(image_files(tmp_path)) == []
