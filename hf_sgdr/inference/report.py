"""The report of an evaluation, as one HTML file or as Markdown with PNG files; `templates/` holds its form.

All text counts as coming from outside: HTML escapes it by itself, Markdown by the filter `markdown`.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes

from hf_sgdr._utils.text import markdown_text, printable
from hf_sgdr.inference.evaluation import Evaluation
from hf_sgdr.inference.interpretation import ImagePrediction

TEMPLATES = Path(__file__).parent / "templates"
FORMATS = (".html", ".md")
CLASSES_ONE_BY_ONE = 4  # up to so many, images are shown class by class, as the lesson does
MOST_MISTAKES = 20  # kinds of them that are listed
ABREAST = 4  # images of a kind


@dataclass(frozen=True)
class Table:
    """A table: `rows` of text, integers, floats (shown with four decimals) or None; the first cell names the row."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | int | float | None]]

    @property
    def is_number(self) -> list[bool]:
        """Which columns hold numbers; they stand to the right."""
        return [not any(isinstance(row[i], str) for row in self.rows) for i in range(len(self.columns))]


@dataclass(frozen=True)
class Picture:
    """A plot: its whole figure, the name of its file after the report's own, and what it shows, for who cannot see."""

    axes: Axes
    name: str
    description: str


@dataclass(frozen=True)
class Section:
    """A heading, and below it paragraphs, pictures and tables."""

    heading: str
    paragraphs: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = field(default=())


def write_report(path: Path, evaluation: Evaluation, *, with_images: bool = False) -> None:
    """Write a report: `.html` holds its pictures, `.md` has them beside it.

    Args:
        path (`Path`): a file whose name ends in `.html` or `.md`.
        evaluation ([`Evaluation`]): what is told.
        with_images (`bool`, *optional*, defaults to False): show images, which may be private.

    Raises:
        ValueError: if the name ends in something else.
    """
    render(path, f"Evaluation of {evaluation.model}", sections_of(evaluation, with_images))


def render(path: Path, title: str, sections: Sequence[Section]) -> None:
    """Write sections of any kind, as [`write_report`] does."""
    if path.suffix not in FORMATS:
        raise ValueError(f"{path}: give a name that ends in .html or .md.")
    is_html = path.suffix == ".html"
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=is_html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_printable if is_html else None,
    )
    environment.filters |= {"markdown": markdown_text, "cell": _cell}
    content = [
        {**vars(section), "pictures": [_picture(picture, path) for picture in section.pictures]} for section in sections
    ]
    text = environment.get_template(f"report{path.suffix}").render(title=title, sections=content)
    path.write_text(text, encoding="utf-8")


def sections_of(evaluation: Evaluation, with_images: bool) -> list[Section]:
    """What a report of an evaluation tells."""
    result, metrics = evaluation.result, evaluation.metrics
    images = f"{len(result.labels)} images ({evaluation.images}), {len(result.names)} classes."
    if evaluation.tta:
        images += f" Predictions are the mean over each image and {evaluation.tta} augmented views of it."
    meanings = {
        "accuracy": "share of images whose likeliest class is theirs",
        "loss": "mean of -log of the probability of the true class",
        "precision": "mean over the classes that occur or are predicted",
        "recall": "mean over these classes",
        "f1": "mean over these classes",
    }
    mistakes = result.most_confused()
    some = f" ({MOST_MISTAKES} of {len(mistakes)} kinds)" if len(mistakes) > MOST_MISTAKES else ""
    caption = f"Mistakes, the most frequent first{some}"
    sections = [
        Section(
            "",
            [images, evaluation.seen_before()],
            tables=[
                Table(
                    "Metrics of all images",
                    ["metric", "value", "what it is"],
                    [[name, metrics[name], meaning] for name, meaning in meanings.items()],
                )
            ],
        ),
        Section(
            "What is taken for what",
            [] if mistakes else ["No image is taken for another class than its own."],
            [
                Picture(
                    result.plot_confusion_matrix(),
                    "confusion-matrix",
                    "Confusion matrix, a row for each true class, a column for each prediction; tables say it, too.",
                )
            ],
            [Table(caption, ["truth", "predicted", "images"], mistakes[:MOST_MISTAKES])] if mistakes else [],
        ),
        Section(
            "Class by class",
            [
                "Precision: of the images predicted as the class, the share that is of it. "
                "Recall: of its images, the share predicted as it."
            ],
            [
                Picture(
                    result.plot_per_class(),
                    "classes",
                    "Precision and recall of each class; the table below has the numbers.",
                )
            ],
            [
                Table(
                    "Metrics of each class",
                    ["class", "images", "precision", "recall", "f1"],
                    [[one.name, one.images, one.precision, one.recall, one.f1] for one in result.per_class()],
                )
            ],
        ),
    ]
    if with_images:
        sections += _images(evaluation)
    if evaluation.unreadable:
        rows = list(evaluation.unreadable.items())
        sections.append(Section("Left out", tables=[Table("Images that cannot be read", ["file", "reason"], rows)]))
    return sections


def _images(evaluation: Evaluation) -> list[Section]:
    """The lesson's pictures: most correct and incorrect, class by class where there are few, and most uncertain."""
    result, n = evaluation.result, ABREAST
    classes: list[str | None] = [None] if len(result.names) > CLASSES_ONE_BY_ONE else [*result.names]
    kinds = []
    for number, name in enumerate(classes):
        of = "" if name is None else f": {name}"
        right, wrong = result.most_correct(n, name), result.most_incorrect(n, name)
        kinds += [
            (f"Most correct{of}", result.plot_most_correct(n, name), f"most-correct-{number}", "Right", right),
            (f"Most incorrect{of}", result.plot_most_incorrect(n, name), f"most-incorrect-{number}", "Wrong", wrong),
        ]
    uncertain = result.most_uncertain(n)
    kinds.append(("Most uncertain", result.plot_most_uncertain(n), "most-uncertain", "Undecided", uncertain))

    def described(kind: str, predictions: Sequence[ImagePrediction]) -> str:
        each = [
            f"{Path(one.file).relative_to(evaluation.folder).as_posix()}, {one.predicted} {one.probability:.1%}"
            for one in predictions
            if one.file is not None
        ]
        return f"{kind}: {'; '.join(each) or 'none'}"

    return [
        Section(heading, pictures=[Picture(axes, name, described(kind, predictions))])
        for heading, axes, name, kind, predictions in kinds
    ]


def _picture(picture: Picture, report: Path) -> dict[str, Any]:
    """What a template wants to know of a picture; beside Markdown its file is written."""
    figure = picture.axes.figure.canvas.figure
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    width, height = (round(inches * 96) for inches in figure.get_size_inches())
    file = report.with_name(f"{report.stem}-{picture.name}.png")
    if report.suffix == ".md":
        file.write_bytes(buffer.getvalue())
    encoded = base64.b64encode(buffer.getvalue()).decode()
    known = {"description": picture.description, "file": file.name, "base64": encoded}
    return {**known, "width": width, "height": height}


def _printable(value: Any) -> Any:
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _cell(value: Any) -> Any:
    if value is None:
        return "–"
    return f"{value:.4f}" if isinstance(value, float) else value
