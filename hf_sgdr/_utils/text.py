"""Text that comes from outside (folder and file names, labels, errors) made safe for the place it is shown in.

A class is named by a folder, and a folder may be called anything: a terminal's escape sequence, a spreadsheet's
formula, a piece of HTML. JSON and YAML are written by their libraries and need none of this.
"""

import difflib
import html
import re
import unicodedata
from collections.abc import Iterable, Sequence

# Bidirectional controls, which show text in another order than it is read in.
_REORDERING = {*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C}
# What a formula begins with, also in the wide forms of East Asian text.
_FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+\-.!|~$:@])")


def printable(text: object) -> str:
    """Text for a terminal or a log: one line, controls and lone surrogates as their Python escapes.

    Source: what terminals obey are the C0 and C1 controls (ECMA-48); Unicode TR 36 lists the reordering ones.
    """
    return "".join(_escaped(character) if _is_control(character) else character for character in str(text))


def csv_cell(text: object) -> str:
    """Text for a cell of a CSV file: a spreadsheet shows it and does not compute it.

    Source: OWASP, "CSV Injection": a cell that begins with one of `= + - @` or a control gets an apostrophe before it.
    """
    text = printable(text)
    return "'" + text if text.lstrip().startswith(_FORMULA) else text


def html_text(text: object) -> str:
    """Text for an element or a quoted attribute of HTML."""
    return html.escape(printable(text))


def markdown_text(text: object) -> str:
    """Text for a paragraph or a table's cell in Markdown: neither markup nor HTML in it counts."""
    return html.escape(_MARKDOWN.sub(r"\\\1", printable(text)))


def plot_text(text: object, longest: int = 40) -> str:
    """Text for a picture by Matplotlib: no formula between dollars, and cut in the middle if it is long."""
    text = printable(text)
    if len(text) > longest:
        text = text[: longest // 2] + "…" + text[-(longest - longest // 2 - 1) :]
    return text.replace("$", r"\$")


def few(names: Sequence[str]) -> str:
    """The first eight names of a list, quoted, and how many there are beside them."""
    shown = ", ".join(repr(printable(name)) for name in names[:8]) or "nothing"
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean ...?)` with the known name that is spelled most like one that is not; empty if none is near."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f" (did you mean {near[0]}?)" if near else ""


def _is_control(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or ord(character) in _REORDERING


def _escaped(character: str) -> str:
    short = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
    code = ord(character)
    return short.get(character) or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")
