"""The page: its parts alone, and the Space put together and published; test_space_page has it in a browser."""

import importlib.util
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from huggingface_hub import SpaceCard, constants
from loopback_hub import TOKEN
from PIL import Image

from hf_sgdr.cli.main import run_cli
from hf_sgdr.data.images import UnreadableImageError
from hf_sgdr.hub.retry import HubError
from hf_sgdr.hub.space import make_space, push_space

ROOT = Path(__file__).parent.parent
TEMPLATE = ROOT / "recipes" / "space"
NASTY = '<img src=x onerror=alert(1)>\x1b[31m"&'


@pytest.fixture(scope="module")
def app():
    """recipes/space/app.py as a module."""
    pytest.importorskip("gradio", reason="gradio is not installed; the extra `test-space` has it")
    spec = importlib.util.spec_from_file_location("space_app", TEMPLATE / "app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- Its parts ----


def test_names_of_classes_and_files_are_text_and_no_html(app):
    item = app.result_item(NASTY, Image.new("RGB", (8, 8)), [{"label": NASTY, "score": 0.25}])
    for html in (item, app.failure_item(NASTY, NASTY)):
        assert "<img src=x" not in html
        assert "\x1b" not in html
        assert "&lt;img src=x onerror=alert(1)&gt;" in html
    assert 'style="width: 25.0%"' in item
    assert "25.0 %" in item


def test_many_classes_are_listed_in_part(app):
    assert app.listed(["cats"]) == "cats"
    assert app.listed(["cats", "dogs"]) == "cats and dogs"
    assert app.listed([f"kind{i}" for i in range(37)]).endswith("kind11 and 25 more")
    assert "<" not in app.listed(["<b>", "ok"])


def test_the_card_is_shown_without_metadata_a_level_lower_with_its_own_pictures(app, tmp_path):
    (tmp_path / "out").mkdir()
    Image.new("RGB", (4, 4), "red").save(tmp_path / "out" / "curve.png")
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "out" / "README.md").write_text(
        "---\nlicense: mit\n---\n# Cats\n```sh\n# a comment\n```\n### Dogs\n"
        "![curve](curve.png) ![gone](gone.png) ![up](../secret.png)\n"
        '<img src="curve.png" alt="curve" width="375">\n'
        f"![absolute]({tmp_path}/secret.png) ![far](https://example.org/x.png)\n"
    )
    text = app.card_text(str(tmp_path / "out"))
    assert text.startswith("## Cats\n```sh\n# a comment\n```\n#### Dogs\n![curve](data:image/png;base64,")
    assert '<img src="data:image/png;base64,' in text
    assert "license" not in text
    for untouched in ("(gone.png)", "(../secret.png)", f"({tmp_path}/secret.png)", "(https://example.org/x.png)"):
        assert untouched in text
    assert app.card_text(str(tmp_path)) == "This model has no card."


def test_the_card_of_a_model_on_the_hub_is_shown_with_its_pictures(app, hub, monkeypatch):
    template = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + template)
    card = b"---\nlicense: mit\n---\n# Cats\n![curve](curve.png)\n"
    hub.add("ann/cats", {"README.md": card, "curve.png": b"\x89PNG"})
    assert app.card_text("ann/cats").strip() == "## Cats\n![curve](data:image/png;base64,iVBORw==)"
    hub.add("ann/bare", {"config.json": b"{}"})
    assert app.card_text("ann/bare") == "This model has no card."


def test_the_model_is_the_one_that_the_spaces_card_names(app, tmp_path):
    make_space(tmp_path / "space", TEMPLATE, "ann/cats")
    assert app.model_of_card(tmp_path / "space" / "README.md") == "ann/cats"
    assert app.model_of_card(TEMPLATE / "README.md") is None
    assert app.model_of_card(tmp_path / "none.md") is None


def test_a_model_trained_without_augmentation_has_no_views_to_choose(app, tiny_model, tmp_path):
    for augment, expected in (("side_on", True), (None, False)):
        tiny_model.config.hf_sgdr = {"augment": augment, "max_zoom": 1.1 if augment else 1.0}
        assert app.has_views(app.pipeline(tiny_model)) is expected


def test_without_a_model_the_app_says_so_in_one_line(app, monkeypatch, capsys):
    monkeypatch.delenv("MODEL_ID", raising=False)
    monkeypatch.setattr(sys, "argv", [str(TEMPLATE / "app.py")])
    assert run_cli(app.main) == 2
    done = capsys.readouterr()
    assert done.out == ""
    assert done.err.strip() == (
        "app.py: error: Which model? Give --model FOLDER_OR_ID, set MODEL_ID, or write models: into README.md."
    )


# ---- The Space ----


def test_a_space_asks_for_what_the_package_needs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line for line in (TEMPLATE / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert lines == [*project["optional-dependencies"]["space"], *project["dependencies"]]


def test_a_space_is_put_together(tmp_path):
    image = tmp_path / "cat.jpg"
    exif = Image.Exif()
    exif[0x8769] = {0x927C: b"a maker's note"}
    Image.new("RGB", (2000, 1000)).save(image, exif=exif)
    make_space(tmp_path / "space", TEMPLATE, "ann/cats", [image])
    card = SpaceCard.load(tmp_path / "space" / "README.md")
    assert card.data.models == ["ann/cats"]
    assert card.data.title == "What is in the image? cats"
    assert card.data.sdk == "gradio"
    assert (card.data.app_file, card.data.license) == ("app.py", "apache-2.0")
    assert len(card.data.get("short_description")) <= 60  # the Hub's limit
    files = {path.relative_to(tmp_path / "space").as_posix() for path in (tmp_path / "space").rglob("*")}
    assert {"app.py", "style.css", "requirements.txt", "hf_sgdr/inference/pipeline.py", "hf_sgdr/py.typed"} <= files
    assert not [name for name in files if "__pycache__" in name]
    example = Image.open(tmp_path / "space" / "examples" / "01.jpg")
    assert example.size == (1024, 512)
    assert not example.getexif()
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(UnreadableImageError, match=r"notes\.txt: cannot be read"):
        make_space(tmp_path / "other", TEMPLATE, "ann/cats", [tmp_path / "notes.txt"])


def test_a_space_is_published_and_renewed(hub, api, tmp_path):
    hub.add("ann/cats", {"config.json": b"{}"})
    Image.new("RGB", (64, 64)).save(tmp_path / "cat.png")
    first = push_space("ann/cats", TEMPLATE, examples=[tmp_path / "cat.png"], api=api)
    space = hub.repos["spaces/ann/cats"]
    assert str(first.repo_url) == f"{hub.endpoint}/spaces/ann/cats"
    assert not space.private
    assert space.files()["app.py"] == (TEMPLATE / "app.py").read_bytes()
    assert b"models:\n- ann/cats\n" in space.files()["README.md"]
    assert b"/root" not in space.files()["README.md"]
    assert "examples/01.jpg" in space.files()
    again = push_space("ann/cats", TEMPLATE, api=api)
    assert "examples/01.jpg" not in space.files()
    assert again.oid == space.find("main")


def test_a_private_models_space_is_private(hub, api, caplog):
    hub.add("ann/secret", {"config.json": b"{}"}, private=True)
    push_space("ann/secret", TEMPLATE, api=api)
    assert hub.repos["spaces/ann/secret"].private
    hub.add("spaces/ann/other", {})
    hub.add("ann/other", {"config.json": b"{}"}, private=True)
    with pytest.raises(HubError, match="The Space ann/other is there already and is public"):
        push_space("ann/other", TEMPLATE, api=api)


def test_a_space_without_its_model_or_a_broken_hub_is_said(hub, api, monkeypatch):
    with pytest.raises(HubError, match=r"Looking up ann/none: 404"):
        push_space("ann/none", TEMPLATE, api=api)
    hub.add("ann/cats", {"config.json": b"{}"})
    hub.fail("POST", "/commit/", "midway", times=2)
    waited: list[float] = []
    monkeypatch.setattr("hf_sgdr.hub.retry.sleep", waited.append)
    push_space("ann/cats", TEMPLATE, api=api)
    assert waited == [2.0, 4.0]
    assert "app.py" in hub.repos["spaces/ann/cats"].files()


@pytest.mark.recipe
def test_push_publishes_the_page_too(hub, tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "out")
    Image.new("RGB", (64, 64)).save(tmp_path / "cat.png")
    words = ["push.py", "out", "ann/cats", "--push_space", "--space_examples", "cat.png"]
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}

    def push(*words):
        return subprocess.run(
            [sys.executable, str(ROOT / "recipes" / words[0]), *words[1:]],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip

    done = push(*words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"The page: {hub.endpoint}/spaces/ann/cats"
    assert {"app.py", "examples/01.jpg"} <= hub.repos["spaces/ann/cats"].files().keys()
    alone = push("push.py", "out", "ann/cats", "--space_examples", "cat.png")
    assert alone.returncode == 2
    assert "give --push_space, too" in alone.stderr
    tiny_model.config.problem_type = "multi_label_classification"
    tiny_model.save_pretrained(tmp_path / "several")
    several = push("push.py", "several", "ann/several", "--push_space")
    assert (several.returncode, "ann/several" in hub.repos) == (2, False)
    assert "the page is for one label an image, and this model gives several" in several.stderr
    train = push("train.py", "--push_space", "--output_dir", "new")
    assert (train.returncode, (tmp_path / "new").exists()) == (2, False)
    assert "--push_space shows a model of the Hub: give --push_to_hub, too." in train.stderr
