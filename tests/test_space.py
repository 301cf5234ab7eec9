"""The page: its parts alone, the Space put together and published, and all of it in a real browser.

The browser's tests carry the marker `browser`: `pytest -m browser`. HF_SGDR_SCREENSHOTS may name a folder for pictures.
"""

import contextlib
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from huggingface_hub import SpaceCard, constants
from loopback_hub import TOKEN
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright
from playwright.sync_api import TimeoutError as PlaywrightTimeoutError

from hf_sgdr import SGDRTrainer, SGDRTrainingArguments, create_image_classifier, image_transforms, load_image_folder
from hf_sgdr.cli.main import run_cli
from hf_sgdr.data.images import UnreadableImageError
from hf_sgdr.demo import DEMO_MODEL, demo_image_folder, demo_weights_file
from hf_sgdr.hub.retry import HubError
from hf_sgdr.hub.space import make_space, push_space

ROOT = Path(__file__).parent.parent
TEMPLATE = ROOT / "recipes" / "space"
NASTY = '<img src=x onerror=alert(1)>\x1b[31m"&'


@pytest.fixture(scope="module")
def app():
    """recipes/space/app.py as a module."""
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


def test_a_space_without_its_model_or_a_broken_hub_is_said(hub, api):
    with pytest.raises(HubError, match=r"Looking up ann/none: 404"):
        push_space("ann/none", TEMPLATE, api=api)
    hub.add("ann/cats", {"config.json": b"{}"})
    hub.fail("POST", "/commit/", "midway", times=2)
    waited: list[float] = []
    push_space("ann/cats", TEMPLATE, api=api, wait=waited.append)
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
    train = push("train.py", "--push_space", "--output_dir", "new")
    assert (train.returncode, (tmp_path / "new").exists()) == (2, False)
    assert "--push_space shows a model of the Hub: give --push_to_hub, too." in train.stderr


# ---- In a browser ----

browser_test = pytest.mark.browser
expect.set_options(timeout=30_000)
CLASSES = {"0": "zero", "1": "one", "4": "four"}


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """A folder with images of three digits, and `space`, where a Space runs with a model trained on them."""
    place = tmp_path_factory.mktemp("page")
    for digit, name in CLASSES.items():
        for number, path in enumerate(sorted((demo_image_folder() / digit).glob("*.png"))[:60]):
            folder = place / "images" / ("train" if number < 45 else "valid") / name
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / f"{name}-{number:02d}.png")
    images = load_image_folder(place / "images")
    model = create_image_classifier(
        DEMO_MODEL, labels=images["train"].features["label"].names, weights_file=demo_weights_file()
    )
    train_transform, eval_transform = image_transforms(model, image_size=80, augment="basic", max_zoom=1.1)
    arguments = SGDRTrainingArguments(
        str(place / "digits"), precompute=True, per_device_train_batch_size=16, seed=42, save_strategy="no"
    )
    trainer = SGDRTrainer(
        model, arguments, train_dataset=images["train"], eval_dataset=images["validation"],
        train_transform=train_transform, eval_transform=eval_transform,
    )  # fmt: skip
    trainer.lr_find()
    trainer.fit(1e-2, 4)
    assert (trainer.log_predictions().argmax(1) == images["validation"]["label"]).mean() > 0.95
    trainer.save_model()
    trainer.create_model_card()
    examples = [place / "images" / "valid" / name / f"{name}-50.png" for name in CLASSES.values()]
    make_space(place / "space", TEMPLATE, "ann/digits", examples)
    (place / "notes.txt").write_text("A text, and no picture.\n")
    (place / "notes.jpg").write_text("A text, and no picture.\n")
    return place


@pytest.fixture(scope="module")
def address(digits) -> str:
    """Where the page is: the Space as it would be published, in a process of its own that reaches no network."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "GRADIO_SERVER_PORT": str(port), "MODEL_ID": str(digits / "digits")}
    environment.pop("PYTHONPATH", None)
    found = subprocess.run(
        [sys.executable, "-c", "import hf_sgdr; print(hf_sgdr.__file__)"],
        cwd=digits / "space", capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert Path(found.stdout.strip()).is_relative_to(digits / "space")  # not the one that is installed
    url = f"http://127.0.0.1:{port}"
    with (digits / "app.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "app.py"], cwd=digits / "space", env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            for _ in range(120):
                try:
                    urllib.request.urlopen(url, timeout=5).close()
                    break
                except OSError:
                    assert process.poll() is None, (digits / "app.log").read_text()
                    time.sleep(1)
            yield url
        finally:
            process.terminate()
            process.wait(timeout=30)


@pytest.fixture(scope="module")
def browser():
    named = os.environ.get("HF_SGDR_CHROMIUM")
    path = named or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.fail(
            "No browser: install Chromium (apt-get install chromium), or name one by HF_SGDR_CHROMIUM=/path/to/it."
        )
    with sync_playwright() as playwright:
        # A container's root has no sandbox of its own for the browser to use; the pages are ours.
        yield playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])


@pytest.fixture
def open_page(browser, address):
    """`open_page()` is the page in a new window; afterwards it must have asked nothing of any other address."""
    windows, outside = [], []

    def ask(request) -> None:
        if not request.url.startswith((address, "data:", "blob:")):
            outside.append(request.url)

    def open_one(width: int = 1280, height: int = 800, scheme: str = "light") -> Page:
        window = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        windows.append(window)
        page = window.new_page()
        page.on("request", ask)
        page.goto(address)
        page.get_by_role("heading", name="What is in the image?").wait_for()
        return page

    yield open_one
    for window in windows:
        window.close()
    assert outside == []


def choose(page: Page, *paths: Path) -> None:
    """Choose files by keyboard: from the top of the page to the box, and Enter."""
    box = page.get_by_role("button", name="Click to upload or drop files")
    expect(box).to_be_visible()
    for _ in range(10):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.getAttribute('aria-label')") == "Click to upload or drop files":
            break
    expect(box).to_be_focused()
    for _ in range(5):  # on a busy machine the page may not listen yet
        with contextlib.suppress(PlaywrightTimeoutError):
            with page.expect_file_chooser(timeout=5_000) as chooser:
                page.keyboard.press("Enter")
            chooser.value.set_files(list(paths))
            return
    pytest.fail("Enter on the box opens no choice of files.")


def said(page: Page):
    """What a screen reader says of the results."""
    return page.locator("p[role=status]")


def picture(page: Page, name: str, tmp_path: Path) -> Path:
    folder = Path(os.environ.get("HF_SGDR_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"{name}.png", full_page=True)
    return folder / f"{name}.png"


@browser_test
def test_the_page_is_up_and_says_what_it_knows(open_page):
    page = open_page()
    expect(page).to_have_title("What is in the image? digits")
    expect(page.get_by_text("The model digits tells apart four, one and zero.")).to_be_visible()
    expect(page.get_by_role("checkbox", name="Test-time augmentation")).not_to_be_checked()
    assert page.locator("html").get_attribute("lang") == "en"


@browser_test
@pytest.mark.parametrize("name", CLASSES.values())
def test_a_image_in_the_right_label_out_by_keyboard_alone(open_page, digits, name):
    page = open_page()
    choose(page, digits / "images" / "valid" / name / f"{name}-47.png")
    expect(page.get_by_role("heading", name=name, exact=True)).to_be_visible()
    expect(said(page)).to_have_text(re.compile(rf"^{name}-47\.png: {name}, \d+\.\d %\.$"))
    table = page.get_by_role("table", name=f"Probabilities for {name}-47.png")
    rows = table.get_by_role("row").all_inner_texts()
    assert len(rows) == 3
    probabilities = [float(re.search(r"([\d.]+) %", row)[1]) for row in rows]
    assert sum(probabilities) == pytest.approx(100, abs=0.2)
    bars = [bar.bounding_box()["width"] for bar in table.locator(".bar").all()]
    assert bars == sorted(bars, reverse=True)
    # the keyboard is where it was, so that the next image is one key away
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Click to upload or drop files"


@browser_test
def test_test_time_augmentation_is_switched_by_the_space_key(open_page, digits):
    page = open_page()
    choose(page, digits / "images" / "valid" / "four" / "four-48.png")
    expect(said(page)).to_contain_text("four-48.png")
    bar = page.locator(".bar").first
    plain = bar.evaluate("bar => bar.style.width"), page.get_by_role("table").inner_text()
    box = page.get_by_role("checkbox", name="Test-time augmentation")
    box.focus()
    page.keyboard.press("Space")
    expect(box).to_be_checked()
    page.wait_for_function("before => document.querySelector('.results table').innerText !== before", arg=plain[1])
    page.keyboard.press("Space")
    expect(page.get_by_role("table")).to_have_text(re.compile(re.escape(plain[1].split()[1])))


@browser_test
@pytest.mark.parametrize("name", ["notes.txt", "notes.jpg"])
def test_a_text_file_gives_a_friendly_error_and_the_image_beside_it_its_label(open_page, digits, name):
    page = open_page()
    choose(page, digits / name, digits / "images" / "valid" / "zero" / "zero-49.png")
    expect(said(page)).to_contain_text(f"{name} is not a picture that can be read. zero-49.png: zero")
    failed = page.locator(".results .failed")
    expect(failed).to_contain_text("This is not a picture that can be read")
    expect(failed).to_contain_text("Please try an image, such as a JPEG, PNG or WebP file.")
    assert "/" not in failed.inner_text()  # no place of the server
    expect(page.get_by_role("heading", name="zero", exact=True)).to_be_visible()


@browser_test
def test_images_can_be_dropped(open_page, digits):
    page = open_page()
    content = (digits / "images" / "valid" / "one" / "one-50.png").read_bytes()
    transfer = page.evaluate_handle(
        """bytes => {
            const transfer = new DataTransfer()
            transfer.items.add(new File([new Uint8Array(bytes)], "dropped.png", {type: "image/png"}))
            return transfer
        }""",
        list(content),
    )
    page.get_by_role("button", name="Click to upload or drop files").dispatch_event("drop", {"dataTransfer": transfer})
    expect(said(page)).to_contain_text("dropped.png: one")


@browser_test
def test_examples_and_card_open_by_keyboard(open_page):
    page = open_page()
    page.get_by_role("button", name="Example 2").press("Enter")
    expect(said(page)).to_contain_text("02.jpg: one")
    card = page.get_by_role("button", name="About this model")
    card.press("Enter")
    expect(page.get_by_role("heading", name="How to use it")).to_be_visible()
    shown = page.locator("main img:not(.results img):not(button img)").all()
    assert len(shown) >= 2  # range test and confusion matrix
    assert [picture for picture in shown if picture.evaluate("img => img.naturalWidth") < 100] == []


@browser_test
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
def test_it_reads_well_at_each_size_in_light_and_dark(open_page, digits, tmp_path, scheme, width, height):
    page = open_page(width, height, scheme)
    valid = digits / "images" / "valid"
    choose(page, valid / "zero" / "zero-49.png", valid / "one" / "one-51.png", digits / "notes.jpg")
    expect(said(page)).to_contain_text("notes.jpg")
    page.get_by_role("button", name="About this model").click()
    expect(page.get_by_role("heading", name="How to use it")).to_be_visible()
    page.wait_for_timeout(500)  # the accordion slides
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing to scroll to at the side
    card = page.get_by_role("region", name="Model card")
    if card.evaluate("card => card.scrollWidth > card.clientWidth"):  # its tables, on a phone
        card.press("ArrowRight")
        page.wait_for_function("document.querySelector('#card').scrollLeft > 0")
    else:
        assert width > 390
    found = Axe().run(page).response
    assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in found["violations"]] == []
    shown = np.asarray(Image.open(picture(page, f"page-{scheme}-{width}", tmp_path)).convert("L"))
    assert (shown.mean() > 128) == (scheme == "light")
