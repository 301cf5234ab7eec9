"""The feature store: precomputed features as files that anyone can read, and never stale.

A store is a folder named by the hash of everything its features depend on; it holds `manifest.json`, which spells those
things out, and safetensors shards. A shard is written under a temporary name and renamed, carries a checksum, and is
read only if that fits: what is missing or damaged is computed again.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.utils import logging

logger = logging.get_logger(__name__)

FORMAT = 1
ROWS_PER_SHARD = 512


def cache_folder() -> Path:
    """Where stores and measurements live: `HF_SGDR_CACHE`, by default `hf_sgdr` below `HF_HOME`."""
    return Path(os.environ.get("HF_SGDR_CACHE") or Path(constants.HF_HOME, "hf_sgdr"))


class FeatureStore:
    """Rows of features of equal shape, in shards of `ROWS_PER_SHARD` rows.

    Args:
        depends_on (`dict`): plain values; all that the features depend on. Its hash is the store's name.
        rows (`int`): how many rows the whole has.
        root (`Path`, *optional*): the folder of all stores; by default `features` below [`cache_folder`].
    """

    def __init__(self, depends_on: dict[str, Any], rows: int, root: Path | None = None) -> None:
        self.rows = rows
        self.manifest = {"format": FORMAT, "rows": rows, "rows_per_shard": ROWS_PER_SHARD, "depends_on": depends_on}
        canonical = json.dumps(self.manifest, sort_keys=True, allow_nan=False)
        self.key = hashlib.sha256(canonical.encode()).hexdigest()[:32]
        self.folder = (root or cache_folder() / "features") / self.key
        self._intact: dict[int, torch.Tensor] = {}

    @property
    def num_shards(self) -> int:
        """How many shards the whole has."""
        return -(-self.rows // ROWS_PER_SHARD)

    def shard_rows(self, shard: int) -> range:
        """Which rows a shard holds."""
        return range(shard * ROWS_PER_SHARD, min((shard + 1) * ROWS_PER_SHARD, self.rows))

    def missing(self) -> list[int]:
        """The shards that are not there or are damaged; a damaged one is named in a warning."""
        return [shard for shard in range(self.num_shards) if self._read(shard) is None]

    def write(self, shard: int, features: torch.Tensor) -> None:
        """Store a shard, (rows of the shard, ...). The manifest is written with the first one.

        Raises:
            OSError: if the folder cannot be written; what is already stored stays intact.
        """
        features = features.contiguous().cpu()
        if len(features) != len(self.shard_rows(shard)):
            raise ValueError(f"Shard {shard} has {len(self.shard_rows(shard))} rows, {len(features)} given.")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / "manifest.json").exists():
                _replace(self.folder / "manifest.json", json.dumps(self.manifest, indent=1).encode())
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".tmp-", delete=False) as file:
                temporary = Path(file.name)
            try:
                save_file({"features": features}, temporary, metadata={"sha256": _checksum(features)})
                temporary.replace(self._path(shard))
            finally:
                temporary.unlink(missing_ok=True)
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"Features cannot be stored in {self.folder} ({error}). Make room, or set HF_SGDR_CACHE to a folder "
                "that can be written; what is stored stays."
            ) from error
        self._intact[shard] = features

    def read(self) -> torch.Tensor:
        """All rows, in order, as stored: (rows, ...).

        Raises:
            RuntimeError: if a shard is missing or damaged; `missing()` names them.
        """
        shards = [self._read(shard) for shard in range(self.num_shards)]
        if any(shard is None for shard in shards):
            raise RuntimeError(f"{self.folder}: the store is not complete.")
        self._intact.clear()
        with contextlib.suppress(OSError):  # a cache that may only be read
            os.utime(self.folder / "manifest.json")  # what was read lately is not pruned
        return torch.cat([shard for shard in shards if shard is not None])

    def _path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:06d}.safetensors"

    def _read(self, shard: int) -> torch.Tensor | None:
        if shard in self._intact:
            return self._intact[shard]
        path = self._path(shard)
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                features, checksum = file.get_tensor("features"), file.metadata()["sha256"]
            if checksum != _checksum(features) or len(features) != len(self.shard_rows(shard)):
                raise ValueError("its checksum does not fit")
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            logger.warning(f"{path} is damaged ({error}): computing its features again.")
            return None
        self._intact[shard] = features
        return features


def module_hash(module: nn.Module, *, leave_out: nn.Module | None = None) -> str:
    """SHA-256 of a module's parameters and buffers, names, shapes and types included.

    Args:
        module (`nn.Module`): what is hashed.
        leave_out (`nn.Module`, *optional*): a submodule that does not count, such as the head.
    """
    outside = set() if leave_out is None else {tensor.data_ptr() for tensor in leave_out.state_dict().values()}
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        if tensor.numel() == 0 or tensor.data_ptr() not in outside:
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def _checksum(tensor: torch.Tensor) -> str:
    return hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype};".encode() + bytes(_bytes(tensor))).hexdigest()


def _bytes(tensor: torch.Tensor) -> memoryview:
    array: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    temporary.write_bytes(content)
    temporary.replace(path)
