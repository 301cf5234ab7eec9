"""Checkpoints that are whole or do not count: a seal written last, and what transformers' own state leaves out."""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from hf_sgdr._utils.store import replace_file

logger = logging.get_logger(__name__)

SEAL = "sgdr_state.json"


def seal(checkpoint: Path, state: dict[str, Any]) -> None:
    """Write, as a checkpoint's last file, the hashes of all others, and plain values to go on with."""
    files = {
        str(path.relative_to(checkpoint)): _sha256(path)
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != SEAL and not path.name.startswith(".tmp-")
    }
    replace_file(checkpoint / SEAL, json.dumps({"files": files, "state": state}).encode())


def sealed_state(checkpoint: Path) -> dict[str, Any] | None:
    """What [`seal`] was given, None if the checkpoint is not whole: a file is missing, cut off or changed."""
    try:
        content = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
        if any(_sha256(checkpoint / name) != digest for name, digest in content["files"].items()):
            return None
        state: dict[str, Any] = content["state"]
        return state
    except (OSError, ValueError, KeyError, TypeError):
        return None


def newest_checkpoint(folder: Path) -> Path | None:
    """The last whole checkpoint of a folder; a later one that is not whole is named in a warning and passed over."""
    for checkpoint in _newest_first(folder):
        if sealed_state(checkpoint) is not None:
            return checkpoint
        logger.warning(f"{checkpoint} was not written to its end, or was changed: passed over for the one before it.")
    return None


def _newest_first(folder: Path) -> Iterator[Path]:
    found = {}
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)
        if match and path.is_dir():
            found[int(match[1])] = path
    return (found[step] for step in sorted(found, reverse=True))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
