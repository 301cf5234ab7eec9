"""Labels from tables, from file names and from a folder's metadata: the same rows as of class folders."""

import csv
import json
import re

import datasets
import pytest
from datasets import ClassLabel, Dataset, List
from helpers import same, weights

from hf_sgdr import load_image_folder, load_image_table

SPLITS = {"train": {"cats": 5, "dogs": 5}, "valid": {"cats": 2, "dogs": 2}}


@pytest.fixture
def folder(tmp_path, make_image_folder):
    return make_image_folder(tmp_path / "images", SPLITS)


def rows_of(folder):
    """(file, label, split) of class folders, in their order."""
    files = sorted(folder.rglob("*.jpg"), key=lambda file: ("train" not in file.parts, file.parent.name, file.name))
    return [(str(file.relative_to(folder)), file.parent.name, file.parts[-3]) for file in files]


def write(path, rows, columns=("file_name", "label", "split")):
    records = [dict(zip(columns, row, strict=True)) for row in rows]
    if path.suffix == ".parquet":
        Dataset.from_list(records).to_parquet(str(path))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerows([columns, *rows])
    return path


def content(images):
    return {
        split: (rows.features, rows["label"][:], [row["path"] for row in undecoded(rows)["image"]])
        for split, rows in images.items()
    }


def undecoded(rows):
    return rows.cast_column("image", datasets.Image(decode=False))


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_a_table_gives_what_class_folders_give(folder, ending):
    path = write(folder / f"table.{ending}", rows_of(folder))
    assert content(load_image_table(path, split_column_name="split")) == content(load_image_folder(folder))


def test_columns_have_names_of_their_own_and_images_a_folder(folder, tmp_path):
    rows = [(file.removeprefix("train/"), label) for file, label, split in rows_of(folder) if split == "train"]
    path = write(tmp_path / "x.csv", rows, ["picture", "kind"])
    images = load_image_table(
        path, image_column_name="picture", label_column_name="kind", image_dir=folder / "train", seed=3
    )
    assert content(images) == content(load_image_folder(folder / "train", seed=3))


@pytest.mark.parametrize("place", ["root", "splits"])
@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_folder_with_metadata_just_works(folder, place, ending):
    expected = content(load_image_folder(folder))
    if place == "root":
        write(folder / f"metadata.{ending}", rows_of(folder))
    else:
        for split in ("train", "valid"):
            rows = [(row[0].removeprefix(f"{split}/"), row[1]) for row in rows_of(folder) if row[2] == split]
            write(folder / split / f"metadata.{ending}", rows, ["file_name", "label"])
    assert content(load_image_folder(folder)) == expected


def test_a_folder_of_test_images_is_none_of_training_by_either_name(folder):
    rows = rows_of(folder)
    for name in ("test", "test1"):
        (folder / name).mkdir()
        (folder / rows[0][0]).rename(folder / name / "x.jpg")
        write(folder / "metadata.csv", [*rows[1:], (f"{name}/x.jpg", rows[0][1], "test")])
        images = load_image_folder(folder)
        assert {split: len(part) for split, part in images.items()} == {"train": 9, "validation": 4, "test": 1}
        (folder / name / "x.jpg").rename(folder / rows[0][0])


def test_metadata_without_labels_leaves_class_folders_as_they_are(folder, caplog):
    expected = content(load_image_folder(folder))
    write(folder / "metadata.csv", [(row[0], "who") for row in rows_of(folder)], ["file_name", "photographer"])
    assert content(load_image_folder(folder)) == expected
    assert "has no column 'label' (it has 'file_name', 'photographer'), so it names no classes" in caplog.text


def test_names_of_files_are_labels_by_a_pattern(folder, tmp_path):
    expected = load_image_folder(folder)
    for file, label, split in rows_of(folder):
        target = tmp_path / "flat" / split / f"{label}_{file.rsplit('/', 1)[1]}"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((folder / file).read_bytes())
    images = load_image_folder(tmp_path / "flat", label_pattern=r"^([a-z]+)_")
    for split, rows in expected.items():
        assert images[split]["label"][:] == rows["label"][:]
        assert images[split].features == rows.features
    with pytest.raises(ValueError, match=r"finds no class in 10 names: 'cats_000.jpg'.* and 2 more\."):
        load_image_folder(tmp_path / "flat", label_pattern=r"^([A-Z]+)_")
    with pytest.raises(ValueError, match="must be a group of it, in brackets"):
        load_image_folder(tmp_path / "flat", label_pattern=r"^[a-z]+_")
    with pytest.raises(ValueError, match="is no regular expression"):
        load_image_folder(tmp_path / "flat", label_pattern=r"^([a-z]+_")


def test_several_labels_by_delimiter_and_by_lists(folder):
    cells = ["wet; big", "big", "", "wet;big ;old", "old", "wet", "big", "old", "wet", "big"]
    files = [row[0] for row in rows_of(folder)][:10]
    parted = load_image_table(write(folder / "a.csv", list(zip(files, cells, strict=True)), ["image", "label"]),
                              label_delimiter=";")  # fmt: skip
    lists = [[part.strip() for part in cell.split(";") if part.strip()] for cell in cells]
    listed = load_image_table(write(folder / "b.jsonl", list(zip(files, lists, strict=True)), ["image", "label"]))
    assert content(parted) == content(listed)
    assert parted["train"].features["label"] == List(ClassLabel(names=["big", "old", "wet"]))
    rows = [*parted["train"]["label"], *parted["validation"]["label"]]
    assert sorted(map(len, rows)) == sorted(map(len, lists))
    for label in range(3):  # each has its share in both
        assert any(label in row for row in parted["train"]["label"][:])
        assert any(label in row for row in parted["validation"]["label"][:])


def test_numbers_are_classes_by_value_and_text_stays_text(folder):
    files = [row[0] for row in rows_of(folder)][:6]
    numbers = load_image_table(
        write(folder / "a.jsonl", list(zip(files, [10, 2, 7] * 2, strict=True)), ["image", "label"])
    )
    assert numbers["train"].features["label"].names == ["2", "7", "10"]
    text = load_image_table(
        write(folder / "a.csv", list(zip(files, ["01", "1", "NA"] * 2, strict=True)), ["image", "label"])
    )
    assert text["train"].features["label"].names == ["01", "1", "NA"]


def test_an_index_column_and_a_comma_too_many_change_nothing(folder):
    rows = rows_of(folder)
    expected = load_image_table(write(folder / "labels.csv", rows))
    for columns, line in (
        (("", "file_name", "label", "split"), lambda row: ("0", *row)),  # as pandas writes its index
        (("file_name", "label", "split", ""), lambda row: (*row, "")),
        (("file_name", "label", "split"), lambda row: (*row, "")),
    ):
        with (folder / "other.csv").open("w", newline="") as file:
            csv.writer(file).writerows([columns, *map(line, rows)])
        found = load_image_table(folder / "other.csv")
        assert {name: split["label"][:] for name, split in found.items()} == {
            name: split["label"][:] for name, split in expected.items()
        }


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0.5, float("nan")], "1 images have no label"),
        ([{"x": 1}, {"x": 2}], r"column 'label': The label \{'x': 1\} must be text, a number or a list of these"),
        ([[["a"]], [["b"]]], r"column 'label': The label \['a'\] must be text, a number or a list of these"),
    ],
)
def test_labels_of_other_kinds_are_named(folder, labels, message):
    files = [file for file, _, _ in rows_of(folder)]
    rows = [(file, label) for file, label in zip(files, labels, strict=False)]
    with pytest.raises(ValueError, match=message):
        load_image_table(write(folder / "labels.jsonl", rows, ("file_name", "label")))


@pytest.mark.parametrize(
    ("labels", "names"),
    [(("a", ["a", "b"]), ["a", "b"]), ((1, "x"), ["1", "x"]), (([1], ["a"]), ["1", "a"])],
)
def test_labels_of_several_kinds_in_one_column_are_read_as_they_are(folder, labels, names):
    files = [file for file, _, _ in rows_of(folder)][:6]
    rows = [(file, labels[number % 2]) for number, file in enumerate(files)]
    feature = load_image_table(write(folder / "labels.jsonl", rows, ("file_name", "label")))["train"].features["label"]
    assert getattr(feature, "feature", feature).names == names
    assert isinstance(feature, List) == any(isinstance(label, list) for label in labels)


def test_a_missing_label_among_several_is_none(folder):
    files = [file for file, _, _ in rows_of(folder)][:4]
    rows = [(file, label) for file, label in zip(files, (["a", None], ["b"], ["a"], ["b"]), strict=True)]
    images = load_image_table(write(folder / "labels.jsonl", rows, ("file_name", "label")))
    assert images["train"].features["label"].feature.names == ["a", "b"]


def test_test_rows_may_lack_labels(folder):
    rows = [row if row[2] == "train" else (row[0], "", "test") for row in rows_of(folder)]
    images = load_image_table(write(folder / "a.csv", rows), split_column_name="split")
    assert images["test"]["label"][:] == [-1] * 4


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda rows: [], {}, "has no rows"),
        (list, {"label_column_name": "kind"}, "has no column 'kind': it has 'file_name', 'label', 'split'."),
        (list, {"image_column_name": "x"}, "has no column 'x'"),
        (list, {"split_column_name": "label"}, "the splits 'cats', 'dogs'; they must be train, validation"),
        (list, {"label_delimiter": "|"}, "label_delimiter='|' never occurs in column 'label': leave it out."),
        (lambda rows: [*rows, rows[0]], {}, "1 images are listed twice: 'train/cats/000.jpg': remove one."),
        (
            lambda rows: [*rows, (rows[0][0], "dogs", "train")],
            {},
            "1 images are listed under two labels: 'train/cats/000.jpg': an image has one row",
        ),
        (lambda rows: [("", "cats", "train"), *rows], {}, "no file name in row '1'"),
        (lambda rows: [(rows[0][0], "", "train"), *rows[1:]], {}, "1 images have no label: "),
        (lambda rows: [(f"x{i}.jpg", *row[1:]) for i, row in enumerate(rows)], {}, "14 of 14 images have no file: "),
        (lambda rows: [(row[0], "cats", row[2]) for row in rows], {}, "one class only ('cats'); at least two are"),
        (
            lambda rows: [*rows[:-1], (rows[-1][0], "zebra", "valid")],
            {"split_column_name": "split"},
            "validation: 'zebra' not among the classes of the training images ('cats', 'dogs').",
        ),
        (lambda rows: [row for row in rows if row[2] == "valid"], {"split_column_name": "split"}, "no training images"),
        (list, {"image_dir": "nowhere"}, "image_dir=nowhere: no such folder."),
        (list, {"on_error": "stop"}, "on_error='stop'"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(folder, change, options, message):
    path = write(folder / "a.csv", change(rows_of(folder)))
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)) as error:
        load_image_table(path, **options)
    assert "\n" not in str(error.value)


def test_up_to_eight_are_named_and_the_rest_counted_and_skip_leaves_them_out(folder, caplog):
    rows = rows_of(folder)
    path = write(folder / "a.csv", [*rows, *((f"gone{i}.jpg", "cats", "train") for i in range(10))])
    with pytest.raises(ValueError, match=r"10 of 24 images have no file: .*gone7.jpg' and 2 more\."):
        load_image_table(path)
    images = load_image_table(path, on_error="skip", split_column_name="split")
    assert {split: len(part) for split, part in images.items()} == {"train": 10, "validation": 4}
    assert "10 of 24 images have no file" in caplog.text


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("gone.csv", None, "no such file"),
        ("a.xlsx", "x", "give a table whose name ends in .csv, .tsv, .jsonl, .parquet."),
        ("a.csv", "", "has no rows"),
        ("a.jsonl", "{not json}\n", "cannot be read as a table"),
        ("a.parquet", "x", "cannot be read as a table"),
        ("a.csv", "file_name,label\n\xff\xfe", "cannot be read as a table"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        load_image_table(tmp_path / name)


def test_images_inside_of_a_table_have_their_own_reader(folder, tmp_path):
    load_image_folder(folder)["train"].to_parquet(str(tmp_path / "a.parquet"))
    with pytest.raises(ValueError, match="load_image_dataset reads images inside of tables"):
        load_image_table(tmp_path / "a.parquet")


# ---- Real photos ----


@pytest.fixture(scope="module")
def photos(shared_photos, tmp_path_factory):
    """Ten photos of each class for training, four for validation, in class folders; their names say the class, too."""
    root = tmp_path_factory.mktemp("photos")
    for split, count in (("train", 10), ("valid", 4)):
        for name in ("cats", "dogs"):
            (root / split / name).mkdir(parents=True)
            for i, file in enumerate(sorted((shared_photos / "dogscats" / split / name).glob("*.jpg"))[:count]):
                (root / split / name / f"{name}_{i:02d}.jpg").symlink_to(file)
    return root


def weights_after_training(build_trainer, images, folder):
    trainer = build_trainer(folder, images, image_size=64, precompute=True)
    trainer.fit(0.05, 2)  # on features
    trainer.precompute = False
    trainer.unfreeze()
    trainer.fit([1e-4, 1e-3, 1e-2], 1, cycle_len=1)  # on augmented photos
    return weights(trainer.model)


@pytest.fixture(scope="module")
def weights_of_folders(photos, build_trainer, tmp_path_factory):
    return weights_after_training(build_trainer, load_image_folder(photos), tmp_path_factory.mktemp("folders"))


@pytest.mark.photos
@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "parquet", "metadata", "names"])
def test_real_photos_train_to_the_same_weights_in_every_form(form, photos, weights_of_folders, build_trainer, tmp_path):
    rows = rows_of(photos)
    if form == "names":
        for file, _, split in rows:
            (tmp_path / "all" / split).mkdir(parents=True, exist_ok=True)
            (tmp_path / "all" / split / (photos / file).name).symlink_to(photos / file)
        images = load_image_folder(tmp_path / "all", label_pattern=r"^(.+)_\d+")
    elif form == "metadata":
        for split in ("train", "valid"):
            (tmp_path / split).mkdir()
            of_split = [((photos / file).name, label) for file, label, part in rows if part == split]
            for file, label in of_split:
                (tmp_path / split / file).symlink_to(photos / split / label / file)
            write(tmp_path / split / "metadata.csv", of_split, ["file_name", "label"])
        images = load_image_folder(tmp_path)
    else:
        images = load_image_table(write(tmp_path / f"t.{form}", rows), image_dir=photos, split_column_name="split")
    assert same(weights_of_folders, weights_after_training(build_trainer, images, tmp_path / "out"))
