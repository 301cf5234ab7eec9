"""A report of headings, paragraphs, tables and pictures, written as one HTML file or as Markdown with PNG files.

It knows nothing of what it reports. All text counts as coming from outside and is escaped where it is written.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from urllib.parse import quote

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_sgdr._utils.text import html_text, markdown_text

Cell = str | int | float | None


@dataclass(frozen=True)
class Heading:
    """A heading below the title."""

    text: str


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of plain text."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        caption (`str`): what it shows.
        columns (sequence of `str`): their heads.
        rows (sequence of sequences of `str`, `int`, `float` or None): floats are shown with four decimals, None as a
            dash. The first cell names the row.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Picture:
    """A plot.

    Args:
        axes (`Axes`): its whole figure is shown.
        name (`str`): of its file in Markdown, after the report's own name; letters and hyphens.
        description (`str`): what it shows, for people who do not see it.
    """

    axes: Axes
    name: str
    description: str


Block = Heading | Paragraph | Table | Picture
FORMATS = (".html", ".md")


def write_report(path: Path, title: str, blocks: Sequence[Block]) -> None:
    """Write a report: `.html` holds its pictures, `.md` has them beside it.

    Args:
        path (`Path`): a file whose name ends in `.html` or `.md`.
        title (`str`): the first heading.
        blocks (sequence of [`Heading`], [`Paragraph`], [`Table`] and [`Picture`]): what follows, in order.

    Raises:
        ValueError: if the name ends in something else.
    """
    if path.suffix == ".html":
        text = _html(title, blocks)
    elif path.suffix == ".md":
        text = _markdown(title, blocks, path)
    else:
        raise ValueError(f"{path}: give a name that ends in .html or .md.")
    path.write_text(text, encoding="utf-8")


# ---- HTML ----

# Nothing is fetched and nothing runs, whatever the names in the report say.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light dark; --line: #c9ced6; --soft: #5a6472; }
@media (prefers-color-scheme: dark) { :root { --line: #49515c; --soft: #a9b2be; } }
body { font: 1rem/1.5 system-ui, sans-serif; margin: 0; }
main { max-width: 60rem; margin: 0 auto; padding: 1.5rem; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.25; }
h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; min-width: min(100%, 30rem); font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: .3rem; }
th, td { padding: .25rem 1.2rem .25rem 0; border-bottom: 1px solid var(--line); text-align: left; font-weight: normal; }
thead th { color: var(--soft); }
.number { text-align: right; white-space: nowrap; }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; background: white; border-radius: .4rem; }
"""


def _html(title: str, blocks: Sequence[Block]) -> str:
    body = "\n".join(_html_block(block) for block in blocks)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n<h1>{html_text(title)}</h1>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _html_block(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h2>{html_text(block.text)}</h2>"
    if isinstance(block, Paragraph):
        return f"<p>{html_text(block.text)}</p>"
    if isinstance(block, Table):
        return _html_table(block)
    figure = _figure(block)
    png = _png(figure)
    width, height = (round(inches * 96) for inches in figure.get_size_inches())
    source = "data:image/png;base64," + base64.b64encode(png).decode()
    return (
        f'<figure><img src="{source}" alt="{html_text(block.description)}" width="{width}" height="{height}"></figure>'
    )


def _html_table(table: Table) -> str:
    kinds = [' class="number"' if is_number else "" for is_number in _numeric(table)]
    heads = "".join(
        f'<th scope="col"{kind}>{html_text(name)}</th>' for name, kind in zip(table.columns, kinds, strict=True)
    )
    rows = []
    for row in table.rows:
        first, *rest = (html_text(_shown(cell)) for cell in row)
        cells = "".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(rest, kinds[1:], strict=True))
        rows.append(f'<tr><th scope="row"{kinds[0]}>{first}</th>{cells}</tr>')
    caption = html_text(table.caption)
    return (
        # what scrolls must be within the reach of the keyboard
        f'<div class="wide" role="region" aria-label="{caption}" tabindex="0"><table>\n<caption>{caption}</caption>\n'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody>\n</table></div>"
    )


# ---- Markdown ----


def _markdown(title: str, blocks: Sequence[Block], path: Path) -> str:
    parts = [f"# {markdown_text(title)}"]
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"## {markdown_text(block.text)}")
        elif isinstance(block, Paragraph):
            parts.append(markdown_text(block.text))
        elif isinstance(block, Table):
            parts.append(_markdown_table(block))
        else:
            file = path.with_name(f"{path.stem}-{block.name}.png")
            file.write_bytes(_png(_figure(block)))
            parts.append(f"![{markdown_text(block.description)}]({quote(file.name)})")
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: Table) -> str:
    lines = [
        " | ".join(map(markdown_text, table.columns)),
        " | ".join("---:" if is_number else "---" for is_number in _numeric(table)),
        *(" | ".join(_markdown_cell(cell) for cell in row) for row in table.rows),
    ]
    return f"{markdown_text(table.caption)}\n\n" + "\n".join(f"| {line} |" for line in lines)


def _markdown_cell(cell: Cell) -> str:
    return markdown_text(cell) if isinstance(cell, str) else _shown(cell)


# ---- Both ----


def _numeric(table: Table) -> list[bool]:
    """Which columns hold numbers; they stand to the right."""
    return [not any(isinstance(row[i], str) for row in table.rows) for i in range(len(table.columns))]


def _shown(cell: Cell) -> str:
    if cell is None:
        return "–"
    return f"{cell:.4f}" if isinstance(cell, float) else str(cell)


def _figure(picture: Picture) -> Figure:
    return picture.axes.figure.canvas.figure


def _png(figure: Figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()
