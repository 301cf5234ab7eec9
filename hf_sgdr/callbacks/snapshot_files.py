"""Where snapshots of cycles lie and which of them are the best; files alone, no model."""

import json
from collections.abc import Sequence
from pathlib import Path

FIGURES = "figures.json"

Snapshots = str | Path | Sequence[str | Path]


def recorded_figures(folder: Path) -> dict[str, dict[str, float | None]]:
    """What the evaluations at the ends of cycles gave, by snapshot."""
    path = folder / FIGURES
    figures: dict[str, dict[str, float | None]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return figures


def snapshot_files(snapshots: Snapshots) -> list[Path]:
    """The files of a folder of snapshots, in the order of their cycles; or those that are given.

    Raises:
        ValueError: if there is none.
    """
    if isinstance(snapshots, str | Path):
        files = sorted(Path(snapshots).glob("cycle-*.safetensors"))
    else:
        files = [Path(file) for file in snapshots]
    if not files:
        raise ValueError(f"{snapshots}: no snapshot there; SnapshotCallback writes cycle-001.safetensors and so on.")
    return files


def best_snapshots(snapshots: Snapshots, count: int) -> list[Path]:
    """The snapshots with the lowest validation loss at the end of their cycle, in the order of their cycles.

    Args:
        snapshots: a folder of [`SnapshotCallback`], or safetensors files.
        count (`int`): how many.

    Raises:
        ValueError: if there is no snapshot, fewer than `count`, or one without a recorded loss.
    """
    files = snapshot_files(snapshots)
    if not 1 <= count <= len(files):
        raise ValueError(f"The {count} best of {len(files)} snapshots: give a number from 1 to {len(files)}.")
    losses: dict[Path, float] = {}
    for file in files:
        loss = recorded_figures(file.parent).get(file.stem, {}).get("eval_loss")
        if loss is None:
            raise ValueError(
                f"{file}: no validation loss is recorded: the best need an evaluation at each end of a cycle."
            )
        losses[file] = loss
    return sorted(sorted(files, key=lambda file: losses[file])[:count])
