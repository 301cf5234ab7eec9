"""List and prune stores of features and of decoded images.

hf-sgdr features ls
hf-sgdr features prune --days 30
"""

import argparse
import json
import re
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_sgdr._utils.files import cache_folder

DAY = 86_400


@dataclass(frozen=True)
class Listed:
    """A store as it lies on disk.

    Args:
        folder (`Path`): where.
        manifest (`dict`): what its `manifest.json` says; empty if that cannot be read.
        shards (`int`): how many shards are there.
        size (`int`): bytes of all files.
        days (`float`): since it was last written or read.
    """

    folder: Path
    manifest: dict[str, Any]
    shards: int
    size: int
    days: float

    @property
    def is_complete(self) -> bool:
        """Whether every shard is there; their checksums are only looked at when they are read."""
        if not self.manifest:
            return False
        return self.shards == -(-self.manifest["rows"] // self.manifest["rows_per_shard"])


def stores(root: Path) -> list[Listed]:
    """All stores below a folder, the one used last first; what is not called as a store is called is none."""
    folders = (folder for folder in root.iterdir() if folder.is_dir()) if root.is_dir() else ()
    found = [_listed(folder) for folder in folders if re.fullmatch("[0-9a-f]{32}", folder.name)]
    return sorted(found, key=lambda store: store.days)


def prune(root: Path, days: float) -> list[Listed]:
    """Remove the stores that were not used for so many days; returns what is gone."""
    old = [store for store in stores(root) if store.days >= days]
    for store in old:
        shutil.rmtree(store.folder)
    return old


def main(argv: Sequence[str]) -> None:
    """The command `hf-sgdr features`, or `python -m hf_sgdr.features`."""
    parser = argparse.ArgumentParser(
        "hf-sgdr features", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=cache_folder() / "features", help="the folder of all stores")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("ls", help="list the stores, the one used last first")
    pruning = commands.add_parser("prune", help="remove stores")
    pruning.add_argument("--days", type=float, required=True, help="that were not used for so many days; 0: all")
    options = parser.parse_args(argv)
    if options.command == "ls":
        for store in stores(options.root):
            print(_line(store))
        return
    if options.days < 0:
        pruning.error(f"--days {options.days:g}: give a number of days, 0 for all.")
    gone = prune(options.root, options.days)
    print(f"Removed {len(gone)} stores, {sum(store.size for store in gone) / 1e6:.1f} MB, from {options.root}.")


def _listed(folder: Path) -> Listed:
    files = [file for file in folder.iterdir() if file.is_file()]
    manifest = folder / "manifest.json"
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = {}
    if not isinstance(content, dict) or not {"rows", "rows_per_shard"} <= content.keys():
        content = {}
    used = max((file.stat().st_mtime for file in files), default=folder.stat().st_mtime)
    shards = sum(file.suffix == ".safetensors" for file in files)
    return Listed(folder, content, shards, sum(file.stat().st_size for file in files), (time.time() - used) / DAY)


def _line(store: Listed) -> str:
    state = "" if store.is_complete else "  incomplete"
    return (
        f"{store.folder.name}  {store.manifest.get('rows', '?'):>8} rows  {store.size / 1e6:>9.1f} MB  "
        f"{store.days:>6.1f} days  {_content(store.manifest.get('depends_on', {}))}{state}"
    )


def _content(depends_on: dict[str, Any]) -> str:
    if "kept" in depends_on:
        kept = depends_on["kept"]
        return f"decoded images, {kept.get('shorter_side') or kept.get('size', '?')} px"
    model = depends_on.get("config", {}).get("architecture") or depends_on.get("model", "?")
    boundary = "" if depends_on.get("cut", "head") == "head" else f" before {depends_on['cut']}"
    return f"{model}{boundary} at {depends_on.get('transform', {}).get('size', '?')} px, {depends_on.get('dtype', '?')}"


if __name__ == "__main__":
    main(sys.argv[1:])
