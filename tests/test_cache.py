from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from hf_sgdr import image_transforms, load_image_folder
from hf_sgdr.data.cache import fill_cache, together
from hf_sgdr.data.dataset import ImageDataset
from hf_sgdr.data.hashes import image_hash
from hf_sgdr.features.__main__ import main

SIZE = 32


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_SGDR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("hf_sgdr._utils.store.ROWS_PER_SHARD", 5)


@pytest.fixture
def images(tmp_path, make_image_folder):
    return load_image_folder(
        make_image_folder(tmp_path / "images", {"train": {"cats": 6, "dogs": 6}, "valid": {"cats": 2, "dogs": 2}})
    )


@pytest.fixture
def transforms(tiny_model):
    return image_transforms(tiny_model, image_size=SIZE, augment="side_on", max_zoom=1.5)


def cached(dataset, transform, **kwargs):
    images = ImageDataset(dataset, transform, seed=3)
    images.cache = fill_cache(images, max_gb=1.0, **kwargs).open()
    return images


def test_evaluation_views_are_kept_bit_for_bit(images, transforms):
    _, transform = transforms
    plain, kept = ImageDataset(images["train"], transform), cached(images["train"], transform)
    for index in range(len(plain)):
        assert torch.equal(plain[index]["pixel_values"], kept[index]["pixel_values"])
        assert plain[index]["labels"] == kept[index]["labels"]


def test_training_views_are_those_of_the_image_itself(images, transforms, shared_photos):
    transform, _ = transforms
    files = sorted((shared_photos / "dogscats" / "valid").rglob("*.jpg"))[:12]
    dataset = [{"image": str(file), "label": 0} for file in files]
    plain, kept = ImageDataset(dataset, transform, seed=3), cached(dataset, transform)
    for epoch in (0, 4):
        for images_ in (plain, kept):
            images_.set_epoch(epoch)
        for index in range(len(files)):
            ours, theirs = (images_[index]["pixel_values"].float().flatten() for images_ in (kept, plain))
            assert torch.cosine_similarity(ours, theirs, dim=0) > 0.99
    assert not torch.equal(kept[0]["pixel_values"], kept[1]["pixel_values"])


def test_a_image_keeps_no_more_pixels_than_the_highest_zoom_needs(transforms):
    transform, _ = transforms
    noise = np.random.default_rng(0).integers(0, 255, (300, 200, 3)).astype(np.uint8)
    assert transform.to_keep(noise).shape == (3, 72, 48)
    assert transform.to_keep(noise[:20, :30]).shape == (3, 20, 30)  # a small one as it is
    assert transform.of_kept(transform.to_keep(noise[:20, :30]), (0,)).shape == (3, SIZE, SIZE)


def test_what_is_kept_is_keyed_by_content_order_and_size_but_not_by_augmentation(images, tiny_model):
    def key(dataset=images["train"], **kwargs):
        transform = image_transforms(tiny_model, **{"image_size": SIZE, "augment": "side_on", **kwargs})[0]
        return cached(dataset, transform).cache.key

    first = key()
    assert key(augment="basic") == key(augment="top_down") == first
    assert len({first, key(max_zoom=1.4), key(image_size=48), key(images["train"].select([1, 0, *range(2, 12)]))}) == 4
    path = (
        images["train"].with_format(None).cast_column("image", images["train"].features["image"])[0]["image"].filename
    )
    content = image_hash(path)
    Image.open(path).rotate(180).save(path)
    assert image_hash(path) != content
    assert key() != first


@pytest.mark.parametrize("what", ["PIL.__version__", "torchvision.__version__", "hf_sgdr.data.images.PIXELS_VERSION"])
def test_what_is_kept_is_keyed_by_what_makes_its_pixels(images, transforms, monkeypatch, what):
    keys = [cached(images["train"], transform).cache.key for transform in transforms]
    monkeypatch.setattr(what, "0.0.1")
    assert not set(keys) & {cached(images["train"], transform).cache.key for transform in transforms}


def test_a_damaged_shard_is_decoded_again_and_processes_share_the_work(images, transforms, monkeypatch):
    transform, _ = transforms
    dataset = ImageDataset(images["train"], transform)
    fill_cache(dataset, max_gb=1.0, rank=0, world_size=2)
    store = fill_cache(dataset, max_gb=1.0, rank=1, world_size=2).open()
    expected = [store[i].clone() for i in range(12)]
    path = store.folder / "shard-000001.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    decoded = []
    to_keep = type(transform).to_keep
    monkeypatch.setattr(type(transform), "to_keep", lambda self, image: (decoded.append(1), to_keep(self, image))[1])
    again = fill_cache(dataset, max_gb=1.0).open()
    assert all(torch.equal(again[i], expected[i]) for i in range(12))
    assert len(decoded) == 12 + 5  # a look at some images for the size, and the damaged shard


def test_too_much_is_refused_before_it_starts(images, transforms, tmp_path):
    with pytest.raises(ValueError, match=r"12 decoded images would take 0\.00 GB .* than cache_disk_gb=1e-06 allows"):
        fill_cache(ImageDataset(images["train"], transforms[0]), max_gb=1e-6)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_an_error_in_one_process_is_raised_in_all(monkeypatch):
    monkeypatch.setattr("hf_sgdr.data.cache.gather_object", lambda own: [*own, (ValueError, "no room")])
    with pytest.raises(ValueError, match="Process 1: no room"), together(SimpleNamespace(num_processes=2)):
        pass
    with pytest.raises(KeyError, match="its own"), together(SimpleNamespace(num_processes=2)):
        raise KeyError("its own")


def test_later_epochs_decode_nothing_and_evaluation_is_the_same(make_trainer, images, monkeypatch):
    plain = make_trainer().evaluate()
    ours = make_trainer(per_device_train_batch_size=4, max_zoom=1.5, cache_images=True)
    assert ours.evaluate()["eval_loss"] == plain["eval_loss"]
    ours.fit(1e-3, 1)
    decoded = []
    monkeypatch.setattr("hf_sgdr.data.transforms.read_image", lambda *args: decoded.append(args))
    ours.fit(1e-3, 3, cycle_len=1)
    ours.unfreeze()
    ours.fit(1e-4, 1)
    assert decoded == []
    monkeypatch.undo()
    others = images["train"].select(range(3))  # which are not the trainer's
    assert ours.predict(others).predictions.shape == (3, 2)


def test_decoded_images_are_listed(images, transforms, capsys):
    cached(images["train"], transforms[0])
    main(["ls"])
    assert capsys.readouterr().out.rstrip().endswith("decoded images, 48 px")
