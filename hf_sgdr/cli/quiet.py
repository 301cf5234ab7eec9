"""What a run does not show."""

import datasets
from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]  # public, not in __all__
from transformers.utils import logging

from hf_sgdr._utils.system import shows_bars


def hide_bars() -> None:
    """Hide the bars of transformers' loading, and where no bar can be seen those of all libraries, downloads too."""
    logging.disable_progress_bar()
    if not shows_bars():
        datasets.disable_progress_bars()
        disable_progress_bars()
