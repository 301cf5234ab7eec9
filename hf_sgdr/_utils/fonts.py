"""Names in plots: which installed fonts draw them, and what stands for a character that none of them has."""

from collections import Counter
from collections.abc import Sequence

from matplotlib import font_manager, rcParams

from hf_sgdr._utils.text import plot_text

# Families that draw what Matplotlib's own lacks, taken where they are installed; its own comes last.
FALLBACKS = ("Noto Sans CJK JP", "Noto Emoji", "Hiragino Sans", "Microsoft YaHei", "Malgun Gothic")
OWN = "DejaVu Sans"
MISSING = "□"


def families() -> list[str]:
    """What to give Matplotlib as `fontfamily`, so that each character is drawn by the first font that has it."""
    # of another weight than the normal one each use would log a line
    installed = {font.name for font in font_manager.fontManager.ttflist if font.weight == 400}
    return list(dict.fromkeys([*rcParams["font.family"], *(name for name in FALLBACKS if name in installed), OWN]))


def picture_text(text: str, longest: int = 40) -> str:
    """A text as Matplotlib can draw it in one line: cut in the middle, □ for a character that no font has.

    Args:
        text (`str`): any, also from outside.
        longest (`int`, *optional*, defaults to 40): how many characters are left.
    """
    paths = (font_manager.findfont(font_manager.FontProperties(family=[name])) for name in families())
    fonts = [font_manager.get_font(path) for path in paths]
    shown = plot_text(text, longest)
    return "".join(c if any(font.get_char_index(ord(c)) for font in fonts) else MISSING for c in shown)


def picture_labels(names: Sequence[str], longest: int = 40) -> list[str]:
    """Names as [`picture_text`]; those that thereby become equal get their index added."""
    labels = [picture_text(name, longest) for name in names]
    count = Counter(labels)
    return [f"{label} #{i}" if count[label] > 1 else label for i, label in enumerate(labels)]
