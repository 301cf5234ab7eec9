"""Images decoded and resized once, for all epochs that follow: 8-bit pixels on disk, keyed as features are.

Under a random transform an image is kept whole, its shorter side as long as the highest zoom needs; every epoch draws
its view from that. Under another one the view itself is kept, so nothing is left to do.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers.utils import logging

from hf_sgdr._utils.files import FileIdentity
from hf_sgdr._utils.store import ShardStore, mapped
from hf_sgdr._utils.system import progress_bar
from hf_sgdr.data.dataset import ImageDataset
from hf_sgdr.data.images import pixel_versions, readers

logger = logging.get_logger(__name__)

# What an error may be in another process, where its own type may not be known.
_KINDS = (ValueError, TypeError, OSError, MemoryError, ArithmeticError)
# So many images tell, before it starts, how much room all will take.
_SAMPLE = 32


class ImageCache(ShardStore):
    """Decoded images, each uint8 (3, height, width) of its own size, by number; what is asked for is read from disk.

    Args:
        images ([`ImageDataset`]): the images in their order, with an [`ImageTransform`].
    """

    row_tensor = "sizes"

    def __init__(self, images: ImageDataset) -> None:
        depends_on = {"kept": images.transform.kept(), "photos": images.content_hash(), "versions": pixel_versions()}
        super().__init__(depends_on, len(images))
        self._locations: list[tuple[FileIdentity, int, int, int]] = []

    def open(self) -> "ImageCache":
        """Locate every image; then they can be asked for.

        Raises:
            RuntimeError: if a shard is missing or damaged.
        """
        self._locations = []
        for shard in range(self.num_shards):
            sizes = self.read_tensors(shard)["sizes"].tolist()
            file, start = self.locate(shard, "pixels")
            for height, width in sizes:
                self._locations.append((file, start, height, width))
                start += 3 * height * width
        self.touch()
        return self

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> torch.Tensor:
        file, start, height, width = self._locations[index]
        pixels = mapped(file)[start : start + 3 * height * width].copy()
        return torch.from_numpy(pixels).view(height, width, 3).permute(2, 0, 1)


def fill_cache(
    images: ImageDataset,
    *,
    rank: int = 0,
    world_size: int = 1,
    progress: str | None = None,
    bars: bool = True,
    max_gb: float,
) -> ImageCache:
    """Decode and resize what is not cached yet; every process takes its own shards.

    Args:
        images ([`ImageDataset`]): the images, with the transform that will be asked for views.
        rank, world_size, progress, bars: as for [`extract_features`].
        max_gb (`float`): refuse if they would take more GB than this.

    Returns:
        [`ImageCache`]: `open()` it after all processes are done.

    Raises:
        ValueError: if an image cannot be read, or they would take more than `max_gb`.
        OSError: if the cache cannot be written, or the disk has not enough room.
    """
    cache = ImageCache(images)
    missing = cache.missing()
    todo = [shard for shard in missing if shard % world_size == rank]
    if not todo:
        return cache

    def decode(index: int) -> torch.Tensor:
        return images.transform.to_keep(images.rows[index][images.image_column])

    sample = range(0, len(images), max(1, len(images) // _SAMPLE))
    size = sum(readers().map(lambda index: decode(index).numel(), sample)) * len(images) // len(sample)
    logger.warning(f"{len(images)} decoded images will take about {size / 1e6:,.0f} MB in {cache.folder}.")
    cache.check_space(size, missing, f"{len(images)} decoded images", max_gb, "cache_disk_gb")
    with progress_bar(progress, sum(len(cache.shard_rows(shard)) for shard in todo), bars=bars) as bar:
        for shard in todo:
            flat, sizes = [], []
            for pixels in readers().map(decode, cache.shard_rows(shard)):
                sizes.append(pixels.shape[1:])
                flat.append(pixels.permute(1, 2, 0).reshape(-1))  # as Pillow has them, so that this copies nothing
                bar.update()
            cache.write_tensors(shard, {"pixels": torch.cat(flat), "sizes": torch.tensor(sizes, dtype=torch.int32)})
    return cache


@contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """After the body all processes wait for each other; an error in one of them is raised in all, instead of a wait."""
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    if accelerator.num_processes > 1:
        kind = next((kind for kind in _KINDS if isinstance(error, kind)), RuntimeError)
        for rank, told in enumerate(gather_object([None if error is None else (kind, str(error))])):
            if told is not None and error is None:
                error = told[0](f"Process {rank}: {told[1]}")
    if error is not None:
        raise error


class CacheArguments(Protocol):
    """What a cache wants to know of a Trainer's arguments; [`SGDRTrainingArguments`] say it."""

    cache_disk_gb: float
    disable_tqdm: bool | None


class ImageCaches:
    """The image caches of one trainer.

    Args:
        args ([`CacheArguments`]): budget, progress bars.
        accelerator (`Accelerator`): the processes that share the work.
    """

    def __init__(self, args: CacheArguments, accelerator: Accelerator) -> None:
        self.args, self.accelerator = args, accelerator
        self._open: list[tuple[Any, dict[str, Any], ImageCache]] = []

    def of(self, images: ImageDataset, dataset: Any, name: str) -> ImageCache:
        """The cache of these images, filled when it is first asked for.

        Args:
            images ([`ImageDataset`]): with their transform.
            dataset: the rows that they were made of; while they are the same, nothing is hashed again.
            name (`str`): for the progress bar.
        """
        kept = images.transform.kept()
        for rows, depends_on, cache in self._open:
            if rows is dataset and depends_on == kept:
                return cache
        with together(self.accelerator):
            cache = fill_cache(
                images,
                rank=self.accelerator.process_index,
                world_size=self.accelerator.num_processes,
                progress=f"Decoding ({name})" if self.accelerator.is_local_main_process else None,
                bars=not self.args.disable_tqdm,
                max_gb=self.args.cache_disk_gb,
            )
        with together(self.accelerator):
            cache.check_shared()
            cache.open()
        self._open.append((dataset, kept, cache))
        return cache
