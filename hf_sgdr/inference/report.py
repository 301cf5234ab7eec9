"""The report of an evaluation, as one HTML file or as Markdown with PNG files.

`templates/evaluation.jinja` is what it tells, `report.html` and `report.md` are how it looks. All text counts as coming
from outside: HTML escapes it by itself, Markdown by the filter `markdown`.
"""

import base64
from collections.abc import Iterable
from dataclasses import astuple
from datetime import date
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes

from hf_sgdr._utils.text import markdown_text, printable
from hf_sgdr.inference.evaluation import Evaluation

TEMPLATES = Path(__file__).parent / "templates"
FORMATS = (".html", ".md")


def write_report(path: Path, evaluation: Evaluation, *, with_images: bool = False) -> None:
    """Write a report: `.html` holds its plots, `.md` has them beside it.

    Args:
        path (`Path`): a file whose name ends in `.html` or `.md`.
        evaluation ([`Evaluation`]): what is told.
        with_images (`bool`, *optional*, defaults to False): show images, which may be private.

    Raises:
        ValueError: if the name ends in something else.
    """
    if path.suffix not in FORMATS:
        raise ValueError(f"{path}: give a name that ends in .html or .md.")
    is_html = path.suffix == ".html"

    def save(axes: Axes, name: str) -> dict[str, Any]:
        figure, png = axes.figure.canvas.figure, BytesIO()
        figure.savefig(png, format="png", dpi=150, metadata={"Software": None})
        if is_html:
            source = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
        else:
            file = path.with_name(f"{path.stem}-{name}.png")
            file.write_bytes(png.getvalue())
            source = quote(file.name)
        width, height = (round(96 * inches) for inches in figure.get_size_inches())
        return {"source": Markup(source), "width": width, "height": height}

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=is_html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_printable if is_html else None,
    )
    environment.filters |= {"markdown": markdown_text, "shown": _shown, "astuple": astuple}
    environment.filters |= {"percent": Percent, "percents": _percents}
    template = environment.get_template(f"report{path.suffix}")
    title = f"Evaluation of {evaluation.model}"
    text = template.render(title=title, evaluation=evaluation, with_images=with_images, save=save, today=date.today())
    path.write_text(text.strip() + "\n", encoding="utf-8")


def _printable(value: Any) -> Any:
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


class Percent(float):
    """A share that a table shows in per cent."""


def _percents(row: Iterable[Any]) -> list[Any]:
    """A table's row with its floats in per cent."""
    return [Percent(value) if isinstance(value, float) else value for value in row]


def _shown(value: str | float | None) -> str:
    """The value of a table's cell: floats with four decimals, shares in per cent, None as a dash."""
    if isinstance(value, Percent):
        return f"{value:.1%}"
    return "–" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
