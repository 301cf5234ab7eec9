import re
from pathlib import Path

import pytest
import yaml
from markdown_tables import tables

from hf_sgdr import Stage, create_image_classifier

PROJECT = Path(__file__).parent.parent
README = (PROJECT / "README.md").read_text(encoding="utf-8")
PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").rglob("*.md"))]


def blocks(language: str) -> list:
    """The code of each page of README and docs that has any: blocks of a page go on from one another."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if code := re.findall(rf"^ *```{language}\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE):
            found.append(pytest.param("\n".join(code), id=page.relative_to(PROJECT).stem))
    return found


def test_there_are_code_blocks_to_run():
    names = {block.id for block in blocks("python")}
    assert names >= {"README", "lesson", "plug-ins", "from-trainer", "images-and-labels", "predict"}
    assert len(blocks("yaml")) >= 1


def write_tables(folder, make_image_folder) -> None:
    """Images in one folder, `all`, with two tables and, in a folder of its own, the ecosystem's metadata."""
    make_image_folder(folder / "all", {"": {"": 12}})
    (folder / "with_metadata").mkdir()
    tables = {
        "labels.csv": ["file_name,kind,part"],
        "tags.csv": ["image,tags"],
        "with_metadata/metadata.csv": ["file_name,label"],
    }
    for i, file in enumerate(sorted((folder / "all").glob("*.jpg"))):
        kind, part = ("beach", "forest")[i % 2], "valid" if i > 7 else "train"
        name = f"{kind}_{i}.jpg"
        file.rename(folder / "all" / name)
        rows = (f"{name},{kind},{part}", f"all/{name},{kind}{' sunny' if i % 3 else ''}", f"{name},{kind}")
        for lines, row in zip(tables.values(), rows, strict=True):
            lines.append(row)
    for table, lines in tables.items():
        (folder / table).write_text("\n".join(lines))
    for file in (folder / "all").iterdir():
        (folder / "with_metadata" / file.name).symlink_to(file)


@pytest.mark.parametrize("page", blocks("python"))
def test_the_python_of_every_page_runs(page, tmp_path, monkeypatch, make_image_folder, capsys):
    for name in ("dogscats", "photos"):
        make_image_folder(tmp_path / name, {"train": {"cats": 9, "dogs": 9}, "valid": {"cats": 3, "dogs": 3}})
    write_tables(tmp_path, make_image_folder)
    # A folder of this name wins over the model id of the Hub, so the block's own words are run.
    model = create_image_classifier("test_resnet", labels=["a", "b"], pretrained=False)
    model.config.pretrained_cfg = {**model.config.pretrained_cfg, "input_size": [3, 32, 32]}
    model.save_pretrained(tmp_path / "timm" / "resnet34.a1_in1k")
    monkeypatch.chdir(tmp_path)
    # Pictures of 224 px, which the lesson names, would take the test's time and show nothing more.
    exec(compile(page.replace("image_size=224", "image_size=32"), "page", "exec"), {"__name__": "page"})


@pytest.mark.parametrize("block", blocks("yaml"))
def test_every_yaml_block_of_readme_has_stages(block):
    assert [Stage.from_dict(stage) for stage in yaml.safe_load(block)["stages"]]


# ---- Figures ----

RATIOS = {  # a row of README, and the rows of benchmarks/RESULTS.md that it stands for
    "features of images on disk, the bare forward pass on tensors in memory": [
        "extraction, float32 | the bare forward"
    ],
    "features of images on disk, a frozen epoch of fastai 2.8": ["extraction, one pass | fastai, frozen epoch"],
    "decoding and transform, one core, timm's evaluation transform": [
        "decode and transform, as features are computed |"
    ],
    "an epoch of the head on features, a raw torch loop": ["head epoch, SGDRTrainer, steps | a raw torch loop"],
    "an epoch of the head on features, a stock Trainer, fastai, Lightning": [
        f"head epoch, SGDRTrainer, steps | {other}" for other in ("a stock Trainer", "fastai", "Lightning")
    ],
    "an epoch of the head on features left on disk, on features in memory": ["head epoch, features on disk"],
    "all layers on two processes of one thread, one process of two threads, the same global batch": [
        "training, all layers, global batch 64 |"
    ],
    "steps 3, 4 and 8 of the lesson, twelve epochs (benchmarks/lesson.py), fastai": ["all |"],
    "an augmented epoch, frozen body, fastai": ["epoch, frozen, augmented | fastai"],
    "an augmented epoch, unfrozen, fastai": ["epoch, unfrozen, augmented | fastai"],
    "prediction of a folder of 12-megapixel images, exact=False, transformers' pipeline": [
        "prediction of a folder, images of 12 megapixels, exact=False |"
    ],
}


def test_the_ratios_of_speed_are_those_last_measured():
    (table,) = (rows[1:] for rows in tables(README) if rows[0][-1] == "times as fast")
    assert sorted(f"{what}, {against}" for what, against, _ in table) == sorted(RATIOS)
    measured = (PROJECT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8").splitlines()
    for what, against, shown in table:
        for start, figure in zip(RATIOS[f"{what}, {against}"], shown.split(", "), strict=True):
            (row,) = (line for line in measured if line.startswith(f"| {start}"))
            ratio = next(cell for cell in reversed(row.strip("| ").split(" | ")) if cell.strip())
            assert float(figure) == pytest.approx(float(ratio), abs=0.5 * 10.0 ** -len(figure.partition(".")[2]) + 1e-9)


# README's sets, and what benchmarks/quality.py calls them.
SETS = {"dogs and cats": "dogscats", "ants and bees": "hymenoptera", "rubbish": "trash", "digits": "digits"}


def test_the_figures_of_quality_are_those_last_measured():
    (table,) = (rows[1:] for rows in tables(README) if rows[0][1] == "solved head")
    results = (PROJECT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8").splitlines()
    measured = results[results.index("## Quality") :]
    assert len(table) == len(SETS)
    for images, *cells in table:
        name = next(name for start, name in SETS.items() if images.startswith(start))
        row = next(line for line in measured if line.startswith(f"| {name} |")).split(" | ")
        for shown, cell in zip(cells, row[1:], strict=False):
            loss, accuracy = re.fullmatch(r"(\S+) \(\S+\) / (\S+)", cell).groups()
            assert [float(part) for part in shown.split(" / ")] == pytest.approx(
                [float(loss), float(accuracy)], abs=0.00051
            )
