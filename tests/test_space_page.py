"""The page in a real browser: `pytest -m browser`. HF_SGDR_SCREENSHOTS may name a folder for pictures."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

for module in ("axe_playwright_python", "gradio", "playwright"):
    pytest.importorskip(module, reason=f"{module} is not installed; the extra `test-space` has it")

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect, sync_playwright
from playwright.sync_api import TimeoutError as PlaywrightTimeoutError

from hf_sgdr import SGDRTrainer, SGDRTrainingArguments, create_image_classifier, image_transforms, load_image_folder
from hf_sgdr.demo import DEMO_MODEL, demo_image_folder, demo_weights_file
from hf_sgdr.hub.space import make_space

TEMPLATE = Path(__file__).parent.parent / "recipes" / "space"
pytestmark = pytest.mark.browser
expect.set_options(timeout=30_000)
CLASSES = {"0": "zero", "1": "one", "4": "four"}


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """A folder with images of three digits, and `space`, where a Space runs with a model trained on them."""
    root = tmp_path_factory.mktemp("page")
    for digit, name in CLASSES.items():
        for number, path in enumerate(sorted((demo_image_folder() / digit).glob("*.png"))[:60]):
            folder = root / "images" / ("train" if number < 45 else "valid") / name
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / f"{name}-{number:02d}.png")
    images = load_image_folder(root / "images")
    model = create_image_classifier(
        DEMO_MODEL, labels=images["train"].features["label"].names, weights_file=demo_weights_file()
    )
    train_transform, eval_transform = image_transforms(model, image_size=80, augment="basic", max_zoom=1.1)
    arguments = SGDRTrainingArguments(
        str(root / "digits"), precompute=True, per_device_train_batch_size=16, seed=42, save_strategy="no"
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
    examples = [root / "images" / "valid" / name / f"{name}-50.png" for name in CLASSES.values()]
    make_space(root / "space", TEMPLATE, "ann/digits", examples)
    (root / "notes.txt").write_text("A text, and no picture.\n")
    (root / "notes.jpg").write_text("A text, and no picture.\n")
    return root


@pytest.fixture(scope="module")
def address(digits) -> str:
    """Where the page is: the Space as it would be published, in a process of its own that reaches no network."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "GRADIO_SERVER_PORT": str(port), "MODEL_ID": str(digits / "digits")}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", "import hf_sgdr; print(hf_sgdr.__file__)"],
        cwd=digits / "space", capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert Path(done.stdout.strip()).is_relative_to(digits / "space")  # not the one that is installed
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


def test_the_page_is_up_and_says_what_it_knows(open_page):
    page = open_page()
    expect(page).to_have_title("What is in the image? digits")
    expect(page.get_by_text("The model digits tells apart four, one and zero.")).to_be_visible()
    expect(
        page.get_by_text("JPEG, PNG, WebP, GIF, BMP or TIFF; up to 20 images at once, of 50 MB each.")
    ).to_be_visible()
    expect(page.get_by_role("checkbox", name="Test-time augmentation")).not_to_be_checked()
    assert page.locator("html").get_attribute("lang") == "en"


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


def test_test_time_augmentation_is_switched_by_the_space_key(open_page, digits):
    page = open_page()
    choose(page, digits / "images" / "valid" / "four" / "four-48.png")
    expect(said(page)).to_contain_text("four-48.png")
    plain = said(page).inner_text(), page.get_by_role("table").inner_text()
    box = page.get_by_role("checkbox", name="Test-time augmentation")
    box.focus()
    page.keyboard.press("Space")
    expect(box).to_be_checked()
    expect(said(page)).to_have_text(re.compile(r"^With test-time augmentation: four-48\.png: four, \d+\.\d %\.$"))
    page.keyboard.press("Space")
    expect(said(page)).to_have_text(plain[0])
    assert page.get_by_role("table").inner_text() == plain[1]


@pytest.mark.parametrize("name", ["notes.txt", "notes.jpg"])
def test_a_text_file_gives_a_friendly_error_and_the_image_beside_it_its_label(open_page, digits, name):
    page = open_page()
    choose(page, digits / name, digits / "images" / "valid" / "zero" / "zero-49.png")
    expect(said(page)).to_contain_text(f"{name} is not a picture that can be read. zero-49.png: zero")
    failed = page.locator(".results .failed")
    expect(failed).to_contain_text("This is not a picture that can be read")
    expect(failed).to_contain_text("Please try an image, such as a JPEG, PNG or WebP file.")
    assert "/" not in failed.inner_text()  # no path of the server
    expect(page.get_by_role("heading", name="zero", exact=True)).to_be_visible()


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
    result = Axe().run(page).response
    assert [(rule["id"], [node["html"] for node in rule["nodes"]]) for rule in result["violations"]] == []
    shown = np.asarray(Image.open(picture(page, f"page-{scheme}-{width}", tmp_path)).convert("L"))
    assert (shown.mean() > 128) == (scheme == "light")
