"""What is known of files from earlier runs: trusted only while path, size and time of modification agree."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from hf_sgdr import SGDRTrainingArguments
from hf_sgdr._utils.file_index import FileIndex, file_index
from hf_sgdr._utils.files import file_identity
from hf_sgdr.data import audit, hashes
from hf_sgdr.data.images import UnreadableImageError


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Three images, a cache of their own, and what of them is read: names, a list that grows."""
    monkeypatch.setenv("HF_SGDR_CACHE", str(tmp_path / "cache"))
    paths = [tmp_path / f"{name}.png" for name in "abc"]
    for number, path in enumerate(paths):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(path)
    return paths


@pytest.fixture
def read(monkeypatch):
    names, image_hash, reason = [], hashes.image_hash, audit._reason
    monkeypatch.setattr(hashes, "image_hash", lambda image: (names.append(Path(image).stem), image_hash(image))[1])
    monkeypatch.setattr(audit, "_reason", lambda image: (names.append(Path(image).stem), reason(image))[1])
    return names


def hashes_of(files):
    rows = [{"image": str(file)} for file in files]
    return list(hashes.image_hashes(rows, "image"))


def touched(path: Path) -> None:
    time = path.stat().st_mtime_ns + 10**9
    os.utime(path, ns=(time, time))


def test_a_file_is_read_again_only_when_size_time_or_path_differs(files, read):
    first = hashes_of(files)
    assert sorted(read) == ["a", "b", "c"]
    read.clear()
    assert hashes_of(files) == first
    assert read == []
    touched(files[0])
    with files[1].open("ab") as file:
        file.write(b" ")
    times = files[1].stat()
    os.utime(files[1], ns=(times.st_atime_ns, times.st_mtime_ns))
    moved = files[2].rename(files[2].with_name("d.png"))
    again = hashes_of([files[0], files[1], moved])
    assert sorted(read) == ["a", "b", "d"]
    assert (again[0], again[2]) == (first[0], first[2])
    assert again[1] != first[1]


def test_verify_hashes_everything(files, read, tmp_path):
    first = hashes_of(files)
    stat = files[0].stat()
    content = bytearray(files[0].read_bytes())
    content[-1] ^= 1
    files[0].write_bytes(content)
    os.utime(files[0], ns=(stat.st_atime_ns, stat.st_mtime_ns))  # path, size and time as before
    assert hashes_of(files) == first
    read.clear()
    SGDRTrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to="none", verify=True)
    assert hashes_of(files)[0] != first[0]
    assert sorted(read) == ["a", "b", "c"]


def test_what_the_audit_found_whole_is_not_decoded_again_and_the_rest_is(files, read):
    names = [str(file) for file in files]
    files[1].write_bytes(b"no picture")
    assert audit.readable(names, names, "skip") == [0, 2]
    read.clear()
    assert audit.readable(names, names, "skip") == [0, 2]
    assert read == ["b"]
    touched(files[2])
    read.clear()
    with pytest.raises(ValueError, match=r"b\.png: of no picture format"):
        audit.readable(names, names, "raise")
    assert sorted(read) == ["b", "c"]


def test_encoded_images_that_bear_a_files_name_are_not_taken_for_it(files):
    expected = hashes_of(files[:1])
    content = files[1].read_bytes()
    row = {"image": {"bytes": content, "path": str(files[0])}}
    assert list(hashes.image_hashes([row], "image")) == [hashes.image_hash(files[1])]
    assert hashes_of(files[:1]) == expected


def test_a_file_that_is_gone_is_named(files):
    hashes_of(files)
    files[0].unlink()
    with pytest.raises(UnreadableImageError, match=r"a\.png: cannot be read as a picture \(No such file"):
        hashes_of(files)


@pytest.mark.parametrize("damage", ["garbage", "cut", "folder"])
def test_an_index_that_is_damaged_begins_anew(files, read, tmp_path, damage):
    path = tmp_path / "index" / "hashes.sqlite"
    index = FileIndex(path)
    identity = file_identity(files[0])
    index.put("sha256", [(identity, b"x")])
    assert FileIndex(path).get("sha256", [identity, None]) == [b"x", None]
    del index
    if damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        content = path.read_bytes()
        path.write_bytes(b"no database" * 999 if damage == "garbage" else content[: len(content) // 2])
    again = FileIndex(path)
    assert again.get("sha256", [identity]) == [None]
    again.put("sha256", [(identity, b"y")])
    assert again.get("sha256", [identity]) in ([b"y"], [None])  # in memory, or not noted: never wrong


def test_a_name_that_is_no_text_is_a_file_like_others(tmp_path, files):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/latin-\xe4.png")
    Image.new("RGB", (9, 9)).save(path)
    index = file_index()
    index.put("sha256", [(file_identity(path), b"z")])
    assert index.get("sha256", [file_identity(path)]) == [b"z"]


def test_several_processes_write_one_index(tmp_path, files):
    code = (
        "import sys; from pathlib import Path; from hf_sgdr._utils.file_index import FileIndex\n"
        "index, rank = FileIndex(Path(sys.argv[1])), int(sys.argv[2])\n"
        "for i in range(50): index.put('sha256', [((f'/{rank}-{i}-{j}', i, j), b'%d' % rank) for j in range(20)])\n"
    )
    path = tmp_path / "shared.sqlite"
    processes = [subprocess.Popen([sys.executable, "-c", code, str(path), str(rank)]) for rank in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    asked = [(f"/{rank}-{i}-{j}", i, j) for rank in range(2) for i in range(50) for j in range(20)]
    assert FileIndex(path).get("sha256", asked) == [b"0"] * 1000 + [b"1"] * 1000
