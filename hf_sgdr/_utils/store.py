"""A store of rows as files that anyone can read, and never stale: what features and reduced images are kept in.

A store is a folder named by the hash of everything its rows depend on; it holds `manifest.json`, which spells those
things out, and safetensors shards. A shard is written under a temporary name and renamed, carries a checksum, and is
read only if that fits: what is missing or damaged is computed again. Whoever writes a shard writes the same bytes, so
processes and runs may share a store without a lock.
"""

import contextlib
import functools
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_file, save_model
from torch import nn
from transformers.utils import logging

from hf_sgdr._utils.files import FileIdentity, cache_folder, file_identity

logger = logging.get_logger(__name__)

FORMAT = 1
ROWS_PER_SHARD = 512
# More would be more open files than a process may have; a store of many rows has longer shards instead.
MOST_SHARDS = 256
_AN_HOUR = 3600.0
# Shards that this process wrote or checked, by `file_identity`.
_VERIFIED: set[FileIdentity] = set()


class ShardStore:
    """Rows in shards, each shard a few named tensors; a subclass says which of them has an item a row.

    Args:
        depends_on (`dict`): plain values; all that the rows depend on. Its hash is the store's name.
        rows (`int`): how many rows the whole has.
        root (`Path`, *optional*): the folder of all stores; by default `features` below [`cache_folder`].
    """

    row_tensor: ClassVar[str]

    def __init__(self, depends_on: dict[str, Any], rows: int, root: Path | None = None) -> None:
        self.rows = rows
        self.rows_per_shard = max(ROWS_PER_SHARD, -(-rows // MOST_SHARDS))
        self.manifest = {
            "format": FORMAT,
            "rows": rows,
            "rows_per_shard": self.rows_per_shard,
            "depends_on": depends_on,
        }
        canonical = json.dumps(self.manifest, sort_keys=True, allow_nan=False)
        self.key = hashlib.sha256(canonical.encode()).hexdigest()[:32]
        self.folder = (root or cache_folder() / "features") / self.key

    @property
    def num_shards(self) -> int:
        """How many shards the whole has."""
        return -(-self.rows // self.rows_per_shard)

    def shard_rows(self, shard: int) -> range:
        """Which rows a shard holds."""
        return range(shard * self.rows_per_shard, min((shard + 1) * self.rows_per_shard, self.rows))

    def missing(self) -> list[int]:
        """The shards that are not there or are damaged; a damaged one is named in a warning."""
        return [shard for shard in range(self.num_shards) if not self._is_intact(shard)]

    def check_shared(self) -> None:
        """Raise an OSError if shards are missing that another process of this run wrote."""
        if self.missing():
            raise OSError(
                f"{self.folder} lacks what other processes of this run wrote: set HF_SGDR_CACHE to a folder that all "
                "machines share."
            )

    def check_space(self, size: int, missing: Collection[int], what: str, limit_gb: float, argument: str) -> None:
        """Refuse before it starts what would not fit.

        Args:
            size (`int`): bytes that the whole will take.
            missing (collection of `int`): the shards that are still to be written.
            what (`str`): what they are, for the message.
            limit_gb (`float`): budget in GB (1e9 bytes).
            argument (`str`): the argument that holds it.

        Raises:
            ValueError: if the size exceeds the budget.
            OSError: if the disk has not as much room as what is missing takes.
        """
        if size > limit_gb * 1e9:
            raise ValueError(
                f"{what} would take {size / 1e9:.2f} GB on disk, more than {argument}={limit_gb:g} allows: raise it, "
                "or store less (a smaller image_size, fewer precompute_views, fewer images, fewer frozen groups)."
            )
        folder = next(folder for folder in (self.folder, *self.folder.parents) if folder.exists())
        free = shutil.disk_usage(folder).free
        needed = size * sum(len(self.shard_rows(shard)) for shard in missing) // self.rows
        if needed > free:
            more = " more" if needed < size else ""
            raise OSError(
                f"{what} would take {needed / 1e9:.2f} GB{more}, but {folder} has {free / 1e9:.2f} GB free: make room, "
                "or set HF_SGDR_CACHE to a folder on another disk."
            )

    def write_tensors(self, shard: int, tensors: dict[str, torch.Tensor]) -> None:
        """Store a shard. The manifest is written with the first one.

        Raises:
            ValueError: if it has not as many rows as the shard.
            OSError: if the folder cannot be written; what is already stored stays intact.
        """
        if not self._has_all_rows(shard, tensors):
            given = len(tensors[self.row_tensor])
            raise ValueError(f"Shard {shard} has {len(self.shard_rows(shard))} rows, {given} given.")
        tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / "manifest.json").exists():
                manifest = json.dumps(self.manifest, indent=1)
                self._put("manifest.json", lambda path: path.write_text(manifest, encoding="utf-8"))
            metadata = {"sha256": tensors_hash(sorted(tensors.items()))}
            self._put(self._path(shard).name, lambda path: save_file(tensors, path, metadata=metadata))
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"{self.folder} cannot be written ({error}). Make room, or set HF_SGDR_CACHE to a folder "
                "that can be written; what is stored stays."
            ) from error
        _VERIFIED.add(file_identity(self._path(shard)))

    def _put(self, name: str, write: Callable[[Path], object]) -> None:
        """Write a file that other processes may write at the same time: the last one's is kept, whole."""
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".tmp-", delete=False) as file:
            temporary = Path(file.name)
        try:
            write(temporary)
            apply_umask(temporary)
            temporary.replace(self.folder / name)
        finally:
            temporary.unlink(missing_ok=True)

    def read_tensors(self, shard: int) -> dict[str, torch.Tensor]:
        """A shard's tensors, its checksum looked at unless this process did so already.

        Raises:
            RuntimeError: if the shard is missing or damaged.
        """
        if not self._is_intact(shard):
            raise RuntimeError(f"{self.folder}: the store is not complete, shard {shard} is missing or damaged.")
        return self._load(shard)[0]

    def touch(self) -> None:
        """Note that the store was used, so that it is not pruned, and remove what killed runs left half written."""
        with contextlib.suppress(OSError):  # a cache that may only be read
            os.utime(self.folder / "manifest.json")
            for leftover in self.folder.glob(".tmp-*"):
                if time.time() - leftover.stat().st_mtime > _AN_HOUR:
                    leftover.unlink()

    def _path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:06d}.safetensors"

    def _load(self, shard: int) -> tuple[dict[str, torch.Tensor], str]:
        with safe_open(self._path(shard), "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()["sha256"]  # noqa: SIM118

    def _is_intact(self, shard: int) -> bool:
        path = self._path(shard)
        try:
            identity = file_identity(path)
        except FileNotFoundError:
            return False
        if identity not in _VERIFIED:
            try:
                tensors, checksum = self._load(shard)
                if checksum != tensors_hash(sorted(tensors.items())) or not self._has_all_rows(shard, tensors):
                    raise ValueError("its checksum does not fit")
            except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
                logger.warning(f"{path} is damaged ({error}): computing it again.")
                return False
            _VERIFIED.add(identity)
        return True

    def _has_all_rows(self, shard: int, tensors: dict[str, torch.Tensor]) -> bool:
        return len(tensors[self.row_tensor]) == len(self.shard_rows(shard))

    def locate(self, shard: int, name: str) -> tuple[FileIdentity, int]:
        """The file that holds a shard's tensor, and where in it the tensor's bytes begin; for [`mapped`]."""
        path = self._path(shard)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            start: int = json.loads(file.read(length))[name]["data_offsets"][0]
        return file_identity(path), 8 + length + start


@functools.lru_cache(maxsize=2 * MOST_SHARDS)
def mapped(file: FileIdentity) -> NDArray[np.uint8]:
    """A file's bytes, mapped into memory: what is indexed is read, and the system may drop it again."""
    return np.asarray(np.memmap(file[0], mode="r"))  # an ordinary array is indexed faster than its subclass


def replace_file(path: Path, content: bytes) -> None:
    """Write a file, which no other process writes, under a temporary name and rename it: nobody ever sees half of it.

    What a killed process left is taken away by the next writing of the same file.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_weights(path: Path, model: nn.Module, metadata: dict[str, str] | None = None) -> None:
    """Save a model's weights as safetensors, whole or not at all, with the rights of an ordinary file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        save_model(model, str(temporary), metadata=metadata)
        apply_umask(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_weights(model: nn.Module, path: Path, mend: str) -> None:
    """Give a model the weights that [`replace_weights`] saved.

    Raises:
        ValueError: if the file is [`damaged`].
    """
    try:
        load_model(model, path)
    except (OSError, SafetensorError) as error:
        raise damaged(path, error, mend) from error


def damaged(path: Path, error: Exception, mend: str) -> ValueError:
    """That a file is damaged, and how, in one line that ends with the mend."""
    return ValueError(f"{path} is damaged ({' '.join(str(error).split())}){mend}")


def tensors_hash(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 of named tensors in their order: names, shapes, types and contents."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def apply_umask(*files: Path) -> None:
    """Give files the rights of ordinary new ones: temporary files and those of safetensors are their owner's alone."""
    umask = os.umask(0o077)  # there is no way to ask for it but to set it
    os.umask(umask)
    for file in files:
        file.chmod(0o666 & ~umask)
