"""A page for an image classifier: drop images, see what the model thinks of them. A Gradio Space, or local.

    python recipes/space/app.py --model out

The model is a folder or a model id of the Hub: `--model`, else the variable MODEL_ID, else the first one under
`models:` in the README.md beside this file, where `--push_space` writes it. Pictures in a folder `examples` beside it
are shown as examples. The page asks nothing of any other address.
"""

import argparse
import base64
import os
import re
import sys
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import gradio as gr
from huggingface_hub import ModelCard, RepoCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image

from hf_sgdr._utils.text import html_text, markdown_text, printable
from hf_sgdr.cli.main import run_cli
from hf_sgdr.data.images import UnreadableImageError, read_image
from hf_sgdr.data.labels import MULTI_LABEL, class_names
from hf_sgdr.inference.pipeline import TTAImageClassificationPipeline, pipeline

HERE = Path(__file__).parent
VIEWS = 4  # of test-time augmentation
BARS = 5  # the likeliest classes
MOST_IMAGES, MOST_MEGABYTES = 20, 50  # at once, and each: a page is for everybody
THUMBNAIL = (320, 384)  # pixels
PICTURES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}
HEADING = re.compile(r"^(#{1,5} )", re.MULTILINE)
CODE_BLOCK = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)
CARD_PICTURE = re.compile(r"""(!\[[^\]]*\]\(|<img src=")([^):"]+)([)"])""")  # a relative link in Markdown or HTML
# Fonts of the visitor's own machine, and a blue that is dark enough to be seen beside white and light beside black.
THEME = gr.themes.Default(
    primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
).set(block_info_text_color="*neutral_600")
# Run once. A phone offers its camera and pictures; gr.File(file_types=["image"]) would see to that, too, but refuses
# other files in words of its own. And a card's tables, too wide for a phone, can be moved by keys when they are there.
WHEN_LOADED = """() => {
    document.addEventListener(
        "click", event => { if (event.target.type === "file") event.target.accept = "image/*" }, true)
    const attributes = Object.entries({tabindex: 0, role: "region", "aria-label": "Model card"})
    new MutationObserver(() => {
        const card = document.querySelector("#card:not([role])")
        if (card) for (const [name, value] of attributes) card.setAttribute(name, value)
    }).observe(document.body, {childList: true, subtree: true})
}"""
# The box is drawn anew when it has taken images; whoever works by keyboard stays where they were.
FOCUS_ON_BOX = """() => {
    if (document.activeElement === document.body) document.querySelector("#images button").focus() }"""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or model id of the Hub")
    model = parser.parse_args(argv).model or os.environ.get("MODEL_ID") or model_of_card(HERE / "README.md")
    if not model:
        raise ValueError("Which model? Give --model FOLDER_OR_ID, set MODEL_ID, or write models: into README.md.")
    look = {"theme": THEME, "css_paths": HERE / "style.css", "js": WHEN_LOADED, "footer_links": []}
    page(model).launch(max_file_size=f"{MOST_MEGABYTES}mb", **look)
    return 0


def model_of_card(path: Path) -> str | None:
    """The first model that a Space's card names."""
    models = RepoCard.load(path).data.get("models") if path.exists() else None
    return models[0] if models else None


def page(model: str) -> gr.Blocks:
    """The page for one model."""
    classifier = pipeline(model)
    if classifier.model.config.problem_type == MULTI_LABEL:
        raise ValueError(f"{model} gives an image several labels; this page is for one. recipes/predict.py shows them.")
    classes = class_names(classifier.model.config)
    name = printable(Path(model).resolve().name if Path(model).is_dir() else model)

    def classify(files: list[str] | None, with_tta: bool) -> tuple[str, str]:
        """Results as a list in HTML, and what a screen reader says of them."""
        files = files or []
        taken = files[:MOST_IMAGES]
        views = VIEWS if with_tta and taken else 0
        answers = classifier(taken, tta=views, top_k=min(BARS, len(classes)), return_exceptions=True)
        items, sentences = [], ["With test-time augmentation:"] if views else []
        for path, answer in zip(taken, answers, strict=True):
            file = Path(path).name
            if isinstance(answer, UnreadableImageError):
                items.append(failure_item(file, str(answer.reason)))
                sentences.append(f"{file} is not a picture that can be read.")
            else:
                items.append(result_item(file, read_image(path, shorter_side=THUMBNAIL[1]), answer))
                sentences.append(f"{file}: {answer[0]['label']}, {percent(answer[0]['score'])}.")
        if len(files) > MOST_IMAGES:
            sentences.append(f"These are the first {MOST_IMAGES} of {len(files)} images.")
        return f'<ul class="results">{"".join(items)}</ul>' if items else "", html_text(" ".join(sentences))

    with gr.Blocks(title=f"What is in the image? {name}", analytics_enabled=False) as blocks:
        gr.Markdown(f"# What is in the image?\n\nThe model **{markdown_text(name)}** tells apart {listed(classes)}.")
        latest = gr.State([])
        with gr.Row():
            with gr.Column():
                files = gr.File(label="Images", file_count="multiple", elem_id="images", height=180)
                gr.Markdown(
                    f"JPEG, PNG, WebP, GIF, BMP or TIFF; up to {MOST_IMAGES} images at once, "
                    f"of {MOST_MEGABYTES} MB each."
                )
                with_tta = gr.Checkbox(
                    label="Test-time augmentation",
                    info=f"Looks at {VIEWS} altered views of each image too: slower, often a little better.",
                    visible=has_views(classifier),
                )
                samples = examples(HERE / "examples")
                if samples:
                    gr.Markdown("Examples")
                with gr.Row(elem_classes="examples"):
                    buttons = [
                        gr.Button(f"Example {number}", icon=path, min_width=80)
                        for number, path in enumerate(samples, start=1)
                    ]
            with gr.Column():
                results = gr.HTML(apply_default_css=False)
                status = gr.HTML("", html_template='<p role="status" class="unseen">${value}</p>')
        with gr.Accordion("About this model", open=False):
            gr.Markdown(card_text(model), elem_id="card")

        shown = [results, status]
        # The box is emptied at once, so that it can always take more; the results show which images they are of.
        taken = files.upload(lambda paths: (None, paths), files, [files, latest], api_visibility="private")
        taken.then(classify, [latest, with_tta], shown, api_visibility="private").then(None, js=FOCUS_ON_BOX)
        with_tta.change(classify, [latest, with_tta], shown, api_visibility="private")
        for button, path in zip(buttons, samples, strict=True):
            chosen = button.click(lambda path=path: [path], None, latest, api_visibility="private")
            chosen.then(classify, [latest, with_tta], shown, api_visibility="private")
    return blocks


def has_views(classifier: TTAImageClassificationPipeline) -> bool:
    """Whether the model says how to draw views, or the lesson's serve; one trained without augmentation has none."""
    try:
        return classifier.views.augmented.is_random
    except ValueError:
        return False


def result_item(file: str, image: Image.Image, scores: Sequence[dict[str, Any]]) -> str:
    """One image's result: the picture, the likeliest class, and a table of classes with bars."""
    rows = "".join(
        f'<tr><th scope="row">{html_text(entry["label"])}</th><td><span class="bar" '
        f'style="width: {100 * entry["score"]:.1f}%"></span></td><td>{percent(entry["score"])}</td></tr>'
        for entry in scores
    )
    return (
        f'<li><img src="{thumbnail(image)}" alt=""><div><h2>{html_text(scores[0]["label"])}</h2>'
        f'<p>{html_text(file)}</p><table aria-label="Probabilities for {html_text(file)}"><tbody>{rows}</tbody></table>'
        "</div></li>"
    )


def failure_item(file: str, reason: str) -> str:
    """What is said of a file that is no image."""
    return (
        f'<li class="failed"><div><h2>{html_text(file)}</h2><p>This is not a picture that can be read '
        f"({html_text(reason)}). Please try an image, such as a JPEG, PNG or WebP file.</p></div></li>"
    )


def thumbnail(image: Image.Image) -> str:
    """A small JPEG as a data URI, so that no file is kept for it."""
    small = image.copy()
    small.thumbnail(THUMBNAIL)
    buffer = BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return data_uri(buffer.getvalue(), "image/jpeg")


def data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def percent(probability: float) -> str:
    return f"{100 * probability:.1f} %"


def listed(classes: Sequence[str]) -> str:
    """The classes in words, the first twelve of many."""
    names = [markdown_text(name) for name in classes]
    if len(names) > 12:
        names = [*names[:12], f"{len(names) - 12} more"]
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]


def examples(folder: Path) -> list[str]:
    """The example images, if somebody put some there."""
    return [str(path) for path in sorted(folder.glob("*")) if path.suffix.lower() in PICTURES]


def card_text(model: str) -> str:
    """The model's card without its metadata, a level of headings lower, its own pictures in it."""
    local = Path(model, "README.md")
    try:
        card = ModelCard(local.read_text(encoding="utf-8")) if Path(model).is_dir() else ModelCard.load(model)
    except (OSError, EntryNotFoundError):
        return "This model has no card."
    parts = CODE_BLOCK.split(card.text)  # every second one is a block of code, in which a # is no heading
    parts[::2] = [HEADING.sub(r"#\1", part) for part in parts[::2]]
    return CARD_PICTURE.sub(lambda link: f"{link[1]}{picture_of_card(model, link[2])}{link[3]}", "".join(parts))


def picture_of_card(model: str, name: str) -> str:
    """A picture beside the card as a data URI; what is none stays the link that it is."""
    kind = PICTURES.get(Path(name).suffix.lower())
    if kind is None or Path(name).is_absolute() or ".." in Path(name).parts:
        return name
    try:
        path = Path(model, name) if Path(model).is_dir() else Path(hf_hub_download(model, name))
        return data_uri(path.read_bytes(), kind)
    except (OSError, EntryNotFoundError):
        return name


if __name__ == "__main__":
    sys.exit(run_cli(main))
