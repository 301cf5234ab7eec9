import shutil

import datasets
import pytest
from PIL import Image

from hf_sgdr import load_image_dataset, load_image_folder
from hf_sgdr.data.splits import stratified_split


def names_of(split) -> list[str]:
    rows = split.cast_column("image", datasets.Image(decode=False))
    return [row["image"]["path"].rsplit("/", 3)[1:] for row in rows]


def test_the_lessons_own_layout_is_read_and_sample_stays_out(tmp_path, make_image_folder):
    root = make_image_folder(
        tmp_path / "dogscats",
        {
            "train": {"dogs": 4, "cats": 5},
            "valid": {"cats": 2, "dogs": 3},
            "test1": {"": 4},
            "sample/train": {"cats": 2, "dogs": 2},
            "sample/valid": {"cats": 1, "dogs": 1},
            "models/tmp": {},
        },
    )
    (root / "models").mkdir(exist_ok=True)
    images = load_image_folder(root)
    assert {split: len(rows) for split, rows in images.items()} == {"train": 9, "validation": 5, "test": 4}
    for split in images.values():
        assert split.column_names == ["image", "label"]
        assert isinstance(split.features["image"], datasets.Image)
        assert split.features["label"].names == ["cats", "dogs"]
    assert images["train"]["label"] == [0] * 5 + [1] * 4
    assert images["test"]["label"] == [-1] * 4
    assert images["train"][0]["image"].size == (56, 84)


@pytest.mark.parametrize("name", ["valid", "val", "validation"])
def test_validation_folders_have_three_names(tmp_path, make_image_folder, name):
    root = make_image_folder(tmp_path, {"train": {"a": 2, "b": 2}, name: {"a": 1, "b": 2}})
    assert load_image_folder(root)["validation"]["label"] == [0, 1, 1]


def test_a_labelled_test_folder_keeps_its_labels(tmp_path, make_image_folder):
    root = make_image_folder(tmp_path, {"train": {"a": 2, "b": 2}, "valid": {"a": 1, "b": 1}, "test": {"b": 2}})
    assert load_image_folder(root)["test"]["label"] == [1, 1]


def test_a_class_that_validation_lacks_does_not_shift_the_ids(tmp_path, make_image_folder):
    root = make_image_folder(tmp_path, {"train": {"a": 2, "b": 2, "c": 2}, "valid": {"a": 1, "c": 2}})
    assert load_image_folder(root)["validation"]["label"] == [0, 2, 2]


def test_class_folders_alone_are_split_by_class_and_seed(tmp_path, make_image_folder, caplog):
    root = make_image_folder(tmp_path, {"": {"a": 10, "b": 20}})
    images = load_image_folder(root, validation_fraction=0.2)
    assert sorted(images["validation"]["label"]) == [0] * 2 + [1] * 4
    taken = [tuple(name) for split in ("train", "validation") for name in names_of(images[split])]
    assert len(set(taken)) == len(taken) == 30
    assert names_of(load_image_folder(root)["validation"]) == names_of(load_image_folder(root)["validation"])
    assert names_of(load_image_folder(root)["validation"]) != names_of(load_image_folder(root, seed=1)["validation"])


@pytest.mark.parametrize(
    ("files", "sign"),
    [
        (["results.json", "README.md"], "results.json"),
        (["_runs/progress.json"], "_runs"),
        (["recipe.yaml"], "recipe.yaml"),
        (["range-test.json"], "range-test.json"),
        (["config.json", "model.safetensors"], "config.json and model.safetensors"),
    ],
)
def test_the_output_of_a_run_beside_the_classes_is_none(tmp_path, make_image_folder, caplog, files, sign):
    root = make_image_folder(tmp_path, {"": {"cats": 4, "dogs": 4}})
    expected = load_image_folder(root)
    out = root / "hf_sgdr_out"
    for file in files:
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        (out / file).write_text("{}")
    Image.new("RGB", (9, 9)).save(out / "head-range-test.png")
    (root / "cats" / "config.json").write_text("{}")  # alone it says nothing
    images = load_image_folder(root)
    assert images["train"].features["label"].names == ["cats", "dogs"]
    assert [names_of(rows) for rows in images.values()] == [names_of(rows) for rows in expected.values()]
    assert f"{out}: holds {sign}, so it is the output of a run and left out." in caplog.messages


def test_the_split_leaves_a_image_of_every_class_in_train(tmp_path, make_image_folder):
    root = make_image_folder(tmp_path, {"": {"a": 1, "b": 2, "c": 3}})
    images = load_image_folder(root, validation_fraction=0.9)
    assert set(images["train"]["label"]) == {0, 1, 2}
    train, held_out = stratified_split(images["train"], 0.5, 0)
    assert len(train) + len(held_out) == len(images["train"])


def test_one_image_a_class_leaves_none_for_validation_and_it_is_said(tmp_path, make_image_folder):
    root = make_image_folder(tmp_path, {"": {"a": 1, "b": 1, "c": 1}})
    with pytest.raises(
        ValueError, match=r"none can be split off, since each class has one image only \(3 in all\)"
    ) as error:
        load_image_folder(root)
    assert "\n" not in str(error.value)
    assert "PATH/valid/CLASS" in str(error.value)


ODD = ("with space", "ha#sh", "100%", "ünïcode", "emoji 🐈", "[brackets]*?", "new\nline", 'it\'s "quoted"', "test_tube")


def test_odd_names_of_folders_and_files_are_only_names(tmp_path):
    for name in ODD:
        folder = tmp_path / "train" / name
        folder.mkdir(parents=True)
        for file in ("a#1 [x].jpg", "%20.PNG", "b\nc.jpeg"):
            Image.new("RGB", (9, 9)).save(folder / file)
    shutil.copytree(tmp_path / "train", tmp_path / "valid")
    images = load_image_folder(tmp_path)
    assert images["train"].features["label"].names == sorted(ODD)
    assert images["train"]["label"] == [i for i in range(len(ODD)) for _ in range(3)]
    assert images["train"][-1]["image"].size == (9, 9)


def test_deeper_folders_belong_to_their_class_and_what_is_no_image_is_left_out(tmp_path, make_image_folder):
    root = make_image_folder(tmp_path, {"train": {"a": 1, "b": 1, "a/deep/deeper": 2}, "valid": {"a": 1, "b": 1}})
    for name in (".DS_Store", ".hidden.jpg", "Thumbs.db", "notes.txt"):
        (root / "train" / "a" / name).write_bytes(b"x")
    (root / "train" / "empty").mkdir()
    (root / "train" / ".ipynb_checkpoints").mkdir()
    (root / "train" / "a" / "round").symlink_to(root / "train" / "a")
    images = load_image_folder(root)
    assert images["train"].features["label"].names == ["a", "b"]
    assert images["train"]["label"] == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("splits", "parts"),
    [
        ({"train": {"a": 1, "b": 1}, "valid": {"a": 1, "zebra": 1}}, ["valid", "'zebra'", "not among", "'a', 'b'"]),
        ({"train": {"a": 3}, "valid": {"a": 1}}, ["one class only ('a')", "PATH/train/CLASS"]),
        ({"": {"": 3}}, ["no image in class folders", "3 .jpg"]),
        ({"valid": {"a": 1, "b": 1}}, ["there is valid/ but no train/"]),
        ({"train": {"a": 1, "b": 1}, "valid": {"": 2}}, ["valid: no image in class folders"]),
        ({"one/train": {"a": 1, "b": 1}, "two/train": {"a": 1, "b": 1}}, ["'one', 'two' are data sets of their own"]),
    ],
)
def test_what_cannot_be_used_is_named_with_the_mend(tmp_path, make_image_folder, splits, parts):
    root = make_image_folder(tmp_path, splits)
    with pytest.raises(ValueError, match=r"Lay the images out|Add images|Name one") as error:
        load_image_folder(root)
    assert all(word in str(error.value) for word in parts), str(error.value)
    assert "\n" not in str(error.value)


def test_an_empty_folder_and_a_missing_one(tmp_path):
    with pytest.raises(ValueError, match="it holds nothing"):
        load_image_folder(tmp_path)
    (tmp_path / "image.jpg").touch()
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder. Beside it: 'image.jpg'"):
        load_image_folder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="is a file, not a folder"):
        load_image_folder(tmp_path / "image.jpg")


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_the_share_lies_between_nothing_and_all(tmp_path, make_image_folder, fraction):
    with pytest.raises(ValueError, match="give a share between 0 and 1"):
        load_image_folder(make_image_folder(tmp_path, {"": {"a": 2, "b": 2}}), validation_fraction=fraction)


@pytest.fixture
def parquet(tmp_path, make_image_folder):
    root = make_image_folder(tmp_path / "images", {"train": {"a": 5, "b": 5}, "valid": {"a": 1, "b": 1}})
    for split, rows in load_image_folder(root).items():
        rows = rows.rename_columns({"image": "img", "label": "kind"}).add_column("extra", range(len(rows)))
        (tmp_path / "data").mkdir(exist_ok=True)
        rows.to_parquet(str(tmp_path / "data" / f"{split}-00000-of-00001.parquet"))
    return str(tmp_path / "data")


def test_a_data_set_with_other_names_gets_ours(parquet):
    images = load_image_dataset(parquet, image_column_name="img", label_column_name="kind")
    assert {split: (rows.column_names, len(rows)) for split, rows in images.items()} == {
        "train": (["image", "label"], 10),
        "validation": (["image", "label"], 2),
    }
    assert images["train"].features["label"].names == ["a", "b"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "has no column 'image': it has 'img', 'kind', 'extra'. Name it with image_column_name."),
        ({"image_column_name": "img"}, "has no column 'label'"),
        ({"image_column_name": "extra", "label_column_name": "kind"}, "column 'extra' holds"),
        (
            {"train_split_name": "all"},
            "has no split 'all': it has 'train', 'validation'. Name it with train_split_name.",
        ),
    ],
)
def test_a_data_set_without_them_says_what_it_has(parquet, arguments, message):
    with pytest.raises(ValueError, match=r"has no|holds") as error:
        load_image_dataset(parquet, **arguments)
    assert message in str(error.value)


@pytest.fixture
def make_parquet(tmp_path):
    """`make_parquet(train=labels, validation=labels)`: a data set of one-pixel-wide images with these label columns."""

    def make(feature=None, **splits):
        (tmp_path / "labelled").mkdir()
        for split, labels in splits.items():
            images = [Image.new("RGB", (8, 8), (i, i, i)) for i in range(len(labels))]
            rows = datasets.Dataset.from_dict({"image": images}).add_column("label", labels, feature=feature)
            rows.to_parquet(str(tmp_path / "labelled" / f"{split}-00000-of-00001.parquet"))
        return str(tmp_path / "labelled")

    return make


def test_string_labels_are_numbered_once_as_train_sorts_them(make_parquet):
    images = load_image_dataset(make_parquet(train=["cat", "ant", "bee", "ant"], validation=["bee", "cat", "bee"]))
    assert images["train"]["label"] == [2, 0, 1, 0]
    assert images["validation"]["label"] == [1, 2, 1]
    for split in images.values():
        assert split.features["label"] == datasets.ClassLabel(names=["ant", "bee", "cat"])
    assert [image.getpixel((0, 0))[0] for image in images["validation"]["image"]] == [0, 1, 2]  # rows keep their order


def test_integer_labels_are_numbered_by_value(make_parquet):
    images = load_image_dataset(make_parquet(train=[10, 2, 30, 2], validation=[30, 10]))
    assert images["train"].features["label"].names == ["2", "10", "30"]
    assert images["train"]["label"] == [1, 0, 2, 0]
    assert images["validation"]["label"] == [2, 1]


def test_a_missing_label_becomes_unlabelled(make_parquet):
    images = load_image_dataset(make_parquet(train=["a", None, "b"], validation=[None, "b"]))
    assert (images["train"]["label"][:], images["validation"]["label"][:]) == ([0, -1, 1], [-1, 1])


def test_splits_with_another_order_of_class_names_count_as_train_does(tmp_path, make_image_folder, monkeypatch):
    images = load_image_folder(make_image_folder(tmp_path, {"train": {"a": 2, "b": 2}, "valid": {"a": 1, "b": 2}}))
    other = (
        images["validation"]
        .map(lambda row: {"label": 1 - row["label"]})
        .cast_column("label", datasets.ClassLabel(names=["b", "a"]))
    )
    splits = {"train": images["train"], "validation": other}
    monkeypatch.setattr("hf_sgdr.data.hub.load_dataset", lambda name, streaming: splits)
    assert load_image_dataset("any")["validation"]["label"] == images["validation"]["label"]


def test_a_label_that_train_lacks_and_a_label_that_is_no_class_are_named(make_parquet, tmp_path):
    with pytest.raises(
        ValueError, match=r"split 'validation': 'zebra' not among the classes of the training images \('a'"
    ):
        load_image_dataset(make_parquet(train=["a", "b"], validation=["a", "zebra"]))
    for file in (tmp_path / "labelled").iterdir():
        file.unlink()
    (tmp_path / "labelled").rmdir()
    with pytest.raises(ValueError, match=r"column .label. holds .*; it must hold classes"):
        load_image_dataset(make_parquet(train=[{"a": 1}, {"a": 2}], validation=[{"a": 1}, {"a": 2}]))


def test_lists_are_several_labels_an_image_by_trains_names(make_parquet):
    images = load_image_dataset(make_parquet(train=[["b", "a"], ["b"]], validation=[[], ["a"]]))
    assert images["train"].features["label"] == datasets.List(datasets.ClassLabel(names=["a", "b"]))
    assert images["train"]["label"][:] == [[0, 1], [1]]
    assert images["validation"]["label"][:] == [[], [0]]


def test_a_data_set_of_which_nothing_can_be_split_off_and_an_empty_split_are_named(make_parquet, monkeypatch):
    name = make_parquet(train=["a", "b"])
    with pytest.raises(ValueError, match=r"none can be split off, since each class has one image only \(2 in all\)"):
        load_image_dataset(name)
    loaded = datasets.load_dataset(name)
    splits = {**loaded, "test": loaded["train"].select([])}
    monkeypatch.setattr("hf_sgdr.data.hub.load_dataset", lambda name, streaming: splits)
    with pytest.raises(ValueError, match="any, split 'test': no image that can be read; it must have at least one"):
        load_image_dataset("any")


@pytest.mark.photos
@pytest.mark.parametrize(
    ("name", "classes", "sizes"),
    [("dogscats", ["cats", "dogs"], (600, 200)), ("hymenoptera", ["ants", "bees"], (245, 153))],
)
def test_the_real_images_are_read(shared_photos, name, classes, sizes):
    images = load_image_folder(shared_photos / name)
    assert images["train"].features["label"].names == classes
    assert (len(images["train"]), len(images["validation"])) == sizes


def test_what_a_run_wrote_is_no_image_of_a_pattern_either(tmp_path, make_image_folder, caplog):
    root = make_image_folder(tmp_path, {"": {"cat_1": 3, "dog_1": 3}, "hf_sgdr_out": {"plots": 2}})
    (root / "hf_sgdr_out" / "_runs").mkdir()
    for folder in ("cat_1", "dog_1"):
        for file in (root / folder).iterdir():
            file.rename(root / f"{folder}_{file.name}")
    assert load_image_folder(root, label_pattern=r"^(.+?)_")["train"].features["label"].names == ["cat", "dog"]
    assert "hf_sgdr_out: holds _runs, so it is the output of a run and left out." in caplog.text


@pytest.mark.parametrize("names", [("Train", "Test"), ("training_set", "test_set")])
def test_splits_that_are_spelled_otherwise_are_no_classes(tmp_path, make_image_folder, names):
    make_image_folder(tmp_path, {name: {"cats": 2, "dogs": 2} for name in names})
    with pytest.raises(ValueError, match=r"hold the same folders \('cats', 'dogs'\), so they look like splits: rename"):
        load_image_folder(tmp_path)


def test_empty_cells_of_a_data_set_of_the_hub(tmp_path, make_image_folder):
    files = sorted(map(str, make_image_folder(tmp_path / "images", {"": {"a": 6}}).rglob("*.jpg")))
    kinds = {
        "one": datasets.ClassLabel(names=["a", "b"]),
        "several": datasets.List(datasets.ClassLabel(names=["a", "b"])),
    }
    for name, labels in (("one", [0, 1, None, 1, 0, 0]), ("several", [[0], [1, None], [1], [0], [], [1]])):
        features = datasets.Features({"image": datasets.Image(), "label": kinds[name]})
        rows = datasets.Dataset.from_dict({"image": [*files[:5], None], "label": labels}, features)
        (tmp_path / name).mkdir()
        rows.to_parquet(tmp_path / name / "train.parquet")
        with pytest.raises(ValueError, match=r"1 of 6 images cannot be read:\n.*: no image in this row"):
            load_image_dataset(str(tmp_path / name))
        images = load_image_dataset(str(tmp_path / name), on_error="skip")
        assert images["train"].features["label"] == kinds[name]
        found = [label for part in images.values() for label in part["label"][:]]
        expected = [0, 1, -1, 1, 0] if name == "one" else [[0], [1], [1], [0], []]
        assert sorted(map(str, found)) == sorted(map(str, expected))


def test_classes_may_hold_the_same_folders(tmp_path, make_image_folder):
    make_image_folder(tmp_path, {"cats": {"in": 2, "out": 2}, "dogs": {"in": 2, "out": 2}})
    assert load_image_folder(tmp_path)["train"].features["label"].names == ["cats", "dogs"]


@pytest.mark.parametrize("named", [{"label_column_name": "kind"}, {"label_delimiter": ";"}])
@pytest.mark.parametrize("pattern", [None, r"^(\d)"])
def test_columns_and_delimiters_are_refused_where_no_table_is_read(tmp_path, make_image_folder, named, pattern):
    root = make_image_folder(tmp_path, {"": {"a": 2, "b": 2}})
    with pytest.raises(ValueError, match=r"are of a table, and no metadata\.csv, .* is read here: leave them out"):
        load_image_folder(root, label_pattern=pattern, **named)
