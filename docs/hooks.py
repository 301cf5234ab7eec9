"""What the package's docstrings, written as transformers writes its own, need on the site."""

import re
from typing import Any

_TYPE = re.compile(r"<code>[^<]*`[^<]*</code>")
_MARKS = str.maketrans("", "", "`*")
_REFERENCE = re.compile(r"\[<code>~?(?:[\w.]+\.)?(\w+)</code>\]")


def on_page_content(html: str, **kwargs: Any) -> str:
    """Types without their marks, names in brackets as code."""
    return _REFERENCE.sub(r"<code>\1</code>", _TYPE.sub(lambda match: match[0].translate(_MARKS), html))
