"""The feature store: precomputed features on disk, read into memory or, where they do not fit, row by row."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hf_sgdr._utils.store import ShardStore, mapped, tensors_hash


class FeatureStore(ShardStore):
    """Rows of features of equal shape, in shards.

    Args:
        depends_on (`dict`): plain values; all that the features depend on. Its hash is the store's name.
        rows (`int`): how many rows the whole has.
        root (`Path`, *optional*): the folder of all stores; by default `features` below [`cache_folder`].
    """

    row_tensor = "features"

    def write(self, shard: int, features: torch.Tensor) -> None:
        """Store a shard, (rows of the shard, ...). The manifest is written with the first one.

        Raises:
            ValueError: if it has not as many rows as the shard.
            OSError: if the folder cannot be written; what is already stored stays intact.
        """
        self.write_tensors(shard, {"features": features})

    def read(self) -> torch.Tensor:
        """All rows in memory, in order, as stored: (rows, ...).

        Raises:
            RuntimeError: if a shard is missing or damaged; `missing()` names them.
            MemoryError: if there is no room for them.
        """
        on_disk = self.open()
        try:
            features = torch.empty((self.rows, *on_disk.shape[1:]), dtype=on_disk.dtype)
        except RuntimeError as error:
            raise MemoryError(
                f"{on_disk.nbytes / 1e9:.2f} GB of features do not fit into memory: lower feature_memory_gb, so that "
                "they are read from disk; what is stored stays."
            ) from error
        for shard in range(self.num_shards):
            rows = self.shard_rows(shard)
            features[rows.start : rows.stop] = self.read_tensors(shard)["features"]
        return features

    def open(self) -> "RowsOnDisk":
        """All rows, left on disk.

        Raises:
            RuntimeError: if a shard is missing or damaged; `missing()` names them.
        """
        if self.missing():
            raise RuntimeError(f"{self.folder}: the store is not complete.")
        self.touch()
        return RowsOnDisk(self)


class RowsOnDisk:
    """The rows of a complete store, indexed as a tensor is: memory-mapped, so that only what is indexed is read.

    Args:
        store ([`FeatureStore`]): it was found complete and intact.
    """

    def __init__(self, store: FeatureStore) -> None:
        first = store.read_tensors(0)["features"]
        self.shape = torch.Size([store.rows, *first.shape[1:]])
        self.dtype = first.dtype
        self._bytes_per_row = first[0].numel() * first.element_size()
        self._rows_per_shard = store.rows_per_shard
        self._shards = [store.locate(shard, "features") for shard in range(store.num_shards)]

    @property
    def nbytes(self) -> int:
        """How many bytes all rows take."""
        return self._bytes_per_row * len(self)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> torch.Tensor:
        """One row for a number, (count, ...) for a tensor of row numbers.

        Raises:
            IndexError: if there is no such row.
        """
        wanted = torch.as_tensor(rows)
        batch = np.empty((wanted.numel(), self._bytes_per_row), dtype=np.uint8)
        for i, row in enumerate(wanted.reshape(-1).tolist()):
            batch[i] = self._row(row)
        return torch.from_numpy(batch.reshape(-1)).view(self.dtype).view([*wanted.shape, *self.shape[1:]])

    def _row(self, row: int) -> NDArray[np.uint8]:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        shard, position = divmod(row % len(self), self._rows_per_shard)
        file, start = self._shards[shard]
        start += position * self._bytes_per_row
        return mapped(file)[start : start + self._bytes_per_row]


class _Stack:
    """Several sets of rows of one shape, one after the other, indexed as one."""

    def __init__(self, parts: Sequence[torch.Tensor | RowsOnDisk]) -> None:
        self._parts = parts
        self._starts = np.cumsum([0, *map(len, parts)])
        self.shape = torch.Size([len(self), *parts[0].shape[1:]])
        self.dtype = parts[0].dtype

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, rows: Any) -> torch.Tensor:
        given = torch.as_tensor(rows)
        wanted = given.reshape(-1)
        owners = np.searchsorted(self._starts, wanted.numpy(), side="right") - 1
        result = torch.empty((len(wanted), *self.shape[1:]), dtype=self.dtype)
        for number in np.unique(owners):
            chosen = torch.from_numpy(owners == number)
            result[chosen] = self._parts[number][wanted[chosen] - int(self._starts[number])]
        return result.view([*given.shape, *self.shape[1:]])


def stacked(parts: Sequence[torch.Tensor | RowsOnDisk]) -> Any:
    """Rows one after the other: a tensor where all parts are in memory, else something that is indexed as one."""
    if len(parts) == 1:
        return parts[0]
    if all(isinstance(part, torch.Tensor) for part in parts):
        return torch.cat([part for part in parts if isinstance(part, torch.Tensor)])
    return _Stack(parts)


def module_hash(module: nn.Module, *, leave_out: Collection[str] = ()) -> str:
    """SHA-256 of a module's parameters and buffers, names, shapes and types included.

    Args:
        module (`nn.Module`): what is hashed.
        leave_out (collection of `str`, *optional*): the entries of its `state_dict` that do not count.
    """
    return tensors_hash((name, tensor) for name, tensor in module.state_dict().items() if name not in leave_out)
