import copy
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from timm.layers import SelectAdaptivePool2d

from hf_sgdr import create_image_classifier, image_transforms, load_image_folder
from hf_sgdr.data.dataset import ImageDataset
from hf_sgdr.demo import DEMO_MODEL, demo_weights_file
from hf_sgdr.features.extract import extract_features, resolve_feature_dtype
from hf_sgdr.features.head import FeatureDataset, HeadClassifier, whole_batch
from hf_sgdr.features.store import FeatureStore
from hf_sgdr.models.boundary import Boundary
from hf_sgdr.optim.layer_groups import LayerGroups

SIZE = 32


@pytest.fixture
def folder(tmp_path, make_image_folder):
    return make_image_folder(tmp_path / "images", {"train": {"cats": 6, "dogs": 6}, "valid": {"cats": 2, "dogs": 2}})


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_SGDR_CACHE", str(tmp_path / "cache"))


def extract(model, folder, size=SIZE, dtype=torch.float32, order=None, **kwargs):
    images = load_image_folder(folder)["train"]
    if order is not None:
        images = images.select(order)
    _, transform = image_transforms(model, image_size=size)
    head = LayerGroups.from_model(model).head
    return extract_features(model, head, ImageDataset(images, transform), dtype=dtype, **kwargs)


def count_forwards(model):
    """The batch sizes of the forward passes from now on; an all-zero batch only tries a picture size."""
    calls = []

    def note(module, args, output):
        if args[0].any():
            calls.append(len(args[0]))

    model.register_forward_hook(note)
    return calls


def test_features_are_the_heads_input_in_the_images_order(tiny_model, folder):
    features = extract(tiny_model, folder, batch_size=5).read()
    images = load_image_folder(folder)["train"]
    _, transform = image_transforms(tiny_model, image_size=SIZE)
    with torch.inference_mode():
        network = tiny_model.eval().timm_model
        for row, image in zip(features, images["image"], strict=True):
            body = network.forward_features(transform(image)[None])
            torch.testing.assert_close(row, network.forward_head(body, pre_logits=True)[0], atol=1e-5, rtol=1e-4)


def test_a_second_run_reads_what_the_first_stored(tiny_model, folder):
    first = extract(tiny_model, folder)
    calls = count_forwards(tiny_model)
    second = extract(tiny_model, folder)
    assert calls == []
    assert second.key == first.key
    assert torch.equal(first.read(), second.read())
    manifest = json.loads((first.folder / "manifest.json").read_text())
    assert manifest["rows"] == 12
    assert manifest["depends_on"]["transform"]["size"] == SIZE


def repaint(folder):
    path = sorted((folder / "train" / "cats").iterdir())[0]
    picture = np.asarray(Image.open(path)).copy()
    picture[:20, :20] = 255 - picture[:20, :20]
    Image.fromarray(picture).save(path)


def change_weight(model):
    with torch.no_grad():
        next(model.parameters())[0] += 1e-3


def change_buffer(model):
    _, buffer = next((name, buffer) for name, buffer in model.named_buffers() if name.endswith("running_mean"))
    buffer[0] += 1e-3


@pytest.mark.parametrize(
    "change",
    [
        lambda model, folder: (repaint(folder), {})[1],
        lambda model, folder: (change_weight(model), {})[1],
        lambda model, folder: (change_buffer(model), {})[1],
        lambda model, folder: {"size": 48},
        lambda model, folder: {"dtype": torch.bfloat16},
        lambda model, folder: {"order": [1, 0, *range(2, 12)]},
        lambda model, folder: {"order": range(11)},
    ],
    ids=["image", "weight", "buffer", "size", "dtype", "order", "fewer"],
)
def test_whatever_the_features_depend_on_makes_another_store(tiny_model, folder, change):
    before = extract(tiny_model, folder)
    kwargs = change(tiny_model, folder)
    calls = count_forwards(tiny_model)
    assert extract(tiny_model, folder, **kwargs).key != before.key
    assert sum(calls) >= 11


@pytest.mark.parametrize("what", ["PIL.__version__", "torchvision.__version__", "hf_sgdr.data.images.PIXELS_VERSION"])
def test_what_makes_the_pixels_is_part_of_the_key(tiny_model, folder, monkeypatch, what):
    before = extract(tiny_model, folder)
    monkeypatch.setattr(what, "0.0.1")
    assert extract(tiny_model, folder).key != before.key


def test_what_they_do_not_depend_on_does_not(tiny_model, folder):
    before = extract(tiny_model, folder)
    with torch.no_grad():
        tiny_model.timm_model.fc.weight += 1
    tiny_model.config.id2label = {0: "Katzen", 1: "Hunde"}
    tiny_model.name_or_path = "moved"
    path = sorted((folder / "train" / "cats").iterdir())[0]
    path.write_bytes(path.read_bytes())  # a new time, the same content
    calls = count_forwards(tiny_model)
    assert extract(tiny_model, folder).key == before.key
    assert calls == []


def test_the_interpolation_and_the_normalisation_are_part_of_the_key(folder):
    keys = set()
    for changes in ({}, {"interpolation": "lanczos"}, {"mean": [0.1, 0.1, 0.1]}, {"crop_pct": 1.0}):
        torch.manual_seed(0)
        model = create_image_classifier("test_resnet", labels=["cats", "dogs"], pretrained=False)
        model.config.pretrained_cfg = {**model.config.pretrained_cfg, **changes}
        keys.add(extract(model, folder).key)
    assert len(keys) == 4


def test_only_missing_and_damaged_shards_are_computed_again(tiny_model, folder, monkeypatch):
    monkeypatch.setattr("hf_sgdr._utils.store.ROWS_PER_SHARD", 5)
    store = extract(tiny_model, folder)
    expected = store.read()
    assert sorted(path.name for path in store.folder.glob("*.safetensors")) == [
        f"shard-{i:06d}.safetensors" for i in range(3)
    ]
    (store.folder / "shard-000000.safetensors").unlink()
    damaged = store.folder / "shard-000002.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    calls = count_forwards(tiny_model)
    assert torch.equal(extract(tiny_model, folder).read(), expected)
    assert sum(calls) == 5 + 2


EXTRACTION = """
import sys, time, torch
import hf_sgdr._utils.store
from hf_sgdr import create_image_classifier, image_transforms, load_image_folder
from hf_sgdr.optim.layer_groups import LayerGroups
from hf_sgdr.data.dataset import ImageDataset
from hf_sgdr.features.extract import extract_features

hf_sgdr._utils.store.ROWS_PER_SHARD = 2
torch.manual_seed(0)
model = create_image_classifier("test_resnet", labels=["cats", "dogs"], pretrained=False)
images = load_image_folder(sys.argv[1])["train"]
model.timm_model.conv1.register_forward_pre_hook(lambda *args: time.sleep(float(sys.argv[2])))
forwards = []
model.register_forward_pre_hook(lambda module, args: forwards.append(len(args[0])) if args[0].any() else None)
_, transform = image_transforms(model, image_size=32)
print("ready", flush=True)
head = LayerGroups.from_model(model).head
extract_features(model, head, ImageDataset(images, transform), dtype=torch.float32, batch_size=2)
print(sum(forwards), flush=True)
"""


def extraction(folder, pause, **kwargs):
    command = [sys.executable, "-c", EXTRACTION, str(folder), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, **kwargs)


def test_after_kill_9_the_shards_that_are_there_are_not_computed_again(folder, tmp_path, tiny_model, monkeypatch):
    first = extraction(folder, 0.3)
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "cache").rglob("shard-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    there = len(list((tmp_path / "cache").rglob("shard-*")))
    assert 2 <= there < 6
    output, _ = extraction(folder, 0).communicate()
    assert int(output.split()[-1]) == 12 - 2 * there
    monkeypatch.setattr("hf_sgdr._utils.store.ROWS_PER_SHARD", 2)
    torch.manual_seed(0)
    fresh = create_image_classifier("test_resnet", labels=["cats", "dogs"], pretrained=False)
    calls = count_forwards(fresh)
    stored = extract(fresh, folder)
    assert calls == []
    monkeypatch.setenv("HF_SGDR_CACHE", str(tmp_path / "another"))
    assert torch.equal(stored.read(), extract(fresh, folder, batch_size=2).read())


def test_two_runs_at_once_end_with_one_good_store(folder, tmp_path):
    runs = [extraction(folder, 0.05) for _ in range(2)]
    assert [run.wait() for run in runs] == [0, 0]
    folders = list((tmp_path / "cache" / "features").iterdir())
    assert len(folders) == 1
    manifest = json.loads((folders[0] / "manifest.json").read_text())
    assert not [name for name in os.listdir(folders[0]) if name.startswith(".tmp")]
    assert len(list(folders[0].glob("shard-*"))) == 6
    store = FeatureStore(manifest["depends_on"], 12)
    store.folder, store.rows_per_shard = folders[0], 2
    assert store.read().isfinite().all()


def test_processes_share_the_work(tiny_model, folder, monkeypatch):
    monkeypatch.setattr("hf_sgdr._utils.store.ROWS_PER_SHARD", 4)
    calls = count_forwards(tiny_model)
    store = extract(tiny_model, folder, rank=0, world_size=2)
    assert sum(calls) == 8
    assert FeatureStore(store.manifest["depends_on"], 12).missing() == [1]
    assert len(extract(tiny_model, folder, rank=1, world_size=2).read()) == 12
    assert sum(calls) == 12


def test_an_augmented_view_is_stored_by_its_seed(tiny_model, folder):
    images = load_image_folder(folder)["train"]
    train_transform, _ = image_transforms(tiny_model, image_size=SIZE, augment="side_on")
    head = LayerGroups.from_model(tiny_model).head
    first, again, other = (
        extract_features(tiny_model, head, ImageDataset(images, train_transform, seed=seed), dtype=torch.float32)
        for seed in (1, 1, 2)
    )
    assert first.key == again.key != other.key
    assert not torch.equal(first.read(), other.read())
    with pytest.raises(TypeError, match="The transform is int: give one of image_transforms"):
        extract_features(tiny_model, head, ImageDataset(images, 3), dtype=torch.float32)


def test_a_head_that_does_not_give_the_logits_is_refused_and_nothing_is_stored(tiny_model, folder, tmp_path):
    wrong = tiny_model.timm_model.layer4
    images = ImageDataset(load_image_folder(folder)["train"], image_transforms(tiny_model, image_size=SIZE)[1])
    with pytest.raises(ValueError, match="cannot be precomputed: its head alone does not give its logits"):
        extract_features(tiny_model, wrong, images, dtype=torch.float32)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_model_with_two_heads_is_refused(folder):
    model = create_image_classifier("deit_tiny_distilled_patch16_224", labels=["cats", "dogs"], pretrained=False)
    images = ImageDataset(load_image_folder(folder)["train"], image_transforms(model)[1])
    with pytest.raises(ValueError, match=r"The head of TimmWrapper.* is None, .* Give a model with one head"):
        extract_features(model, LayerGroups.from_model(model).head, images, dtype=torch.float32)


def test_extraction_leaves_torchs_generator_alone(tiny_model, folder):
    before = torch.get_rng_state()
    extract(tiny_model, folder)
    assert torch.equal(before, torch.get_rng_state())


def test_a_feature_data_set_gives_whole_batches():
    features = torch.arange(12, dtype=torch.bfloat16).view(6, 2)
    dataset = FeatureDataset([features], torch.arange(6))
    batch = whole_batch(dataset.__getitems__([4, 1]))
    assert batch["features"].dtype == torch.float32
    assert batch["features"].tolist() == [[8, 9], [2, 3]]
    assert batch["labels"].tolist() == [4, 1]
    assert dataset[3]["features"].tolist() == [6, 7]


def test_epochs_take_the_views_in_turn():
    dataset = FeatureDataset([torch.full((2, 1), float(view)) for view in range(3)], torch.zeros(2))
    seen = []
    for epoch in range(7):
        dataset.set_epoch(epoch)
        seen.append(dataset.__getitems__([1])["features"].item())
    assert seen == [0, 1, 2, 0, 1, 2, 0]


def test_the_heads_tensors_are_the_models_own(tiny_model):
    head = HeadClassifier(tiny_model, tiny_model.timm_model.fc)
    assert [parameter.data_ptr() for parameter in head.parameters()] == [
        parameter.data_ptr() for parameter in tiny_model.timm_model.fc.parameters()
    ]
    features = torch.randn(3, tiny_model.timm_model.fc.in_features)
    output = head(features, torch.tensor([0, 1, 1]))
    expected = torch.nn.functional.cross_entropy(tiny_model.timm_model.fc(features), torch.tensor([0, 1, 1]))
    assert torch.equal(output["loss"], expected)


def test_a_change_of_what_is_no_tensor_makes_another_store(tiny_model, folder):
    plain = extract(tiny_model, folder, size=64)
    other = copy.deepcopy(tiny_model)
    other.timm_model.global_pool = SelectAdaptivePool2d(pool_type="max", flatten=True)
    pooled = extract(other, folder, size=64)
    assert pooled.key != plain.key
    assert not torch.allclose(pooled.read(), plain.read())
    assert (
        extract(tiny_model.train(), folder, size=64).key
        == extract(copy.deepcopy(tiny_model), folder, size=64).key
        == plain.key
    )


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False}, torch.float32),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"neon": True, "bf16": True}, torch.bfloat16),
        ({}, torch.float32),
    ],
)
def test_features_are_bfloat16_where_the_processor_has_it(capabilities, expected, monkeypatch):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: capabilities)
    cpu = torch.device("cpu")
    assert resolve_feature_dtype(cpu) == expected
    assert resolve_feature_dtype(cpu, "bfloat16") == torch.bfloat16
    assert resolve_feature_dtype(cpu, "float32") == torch.float32


@pytest.mark.parametrize(("has_it", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_features_are_bfloat16_where_the_gpu_has_it(has_it, expected, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: has_it)
    assert resolve_feature_dtype(torch.device("cuda")) == expected


def test_bfloat16_features_cost_little(tiny_model, folder):
    exact = extract(tiny_model, folder).read()
    rounded = extract(tiny_model, folder, dtype=torch.bfloat16).read().float()
    assert torch.cosine_similarity(exact, rounded).min() > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_at_a_cut_are_stored_in_16_bits(tiny_model, folder, dtype):
    groups = LayerGroups.from_model(tiny_model)
    groups.freeze_to(1)
    images = ImageDataset(load_image_folder(folder)["train"], image_transforms(tiny_model, image_size=SIZE)[1])
    boundary = Boundary.at_boundary(groups, SIZE)
    store = extract_features(tiny_model, boundary, images, dtype=dtype)
    rows = store.read()
    assert rows.dtype == (torch.float16 if dtype == torch.float32 else torch.bfloat16)
    assert store.manifest["depends_on"]["cut"] == "timm_model.layer3"
    before = store.key
    with torch.no_grad():  # what comes after the cut does not count, what comes before does
        tiny_model.timm_model.layer4[0].conv1.weight.add_(1)
    assert extract_features(tiny_model, boundary, images, dtype=dtype).key == before
    with torch.no_grad():
        tiny_model.timm_model.layer2[0].conv1.weight.mul_(2)
    assert extract_features(tiny_model, boundary, images, dtype=dtype).key != before


def test_an_activation_beyond_float16_is_said(tiny_model, folder):
    groups = LayerGroups.from_model(tiny_model)
    groups.freeze_to(1)
    with torch.no_grad():
        tiny_model.timm_model.layer2[-1].bn2.weight.fill_(1e7)
    images = ImageDataset(load_image_folder(folder)["train"], image_transforms(tiny_model, image_size=SIZE)[1])
    with pytest.raises(OverflowError, match="more than float16 holds: give feature_dtype=bfloat16"):
        extract_features(tiny_model, Boundary.at_boundary(groups, SIZE), images, dtype=torch.float32)


@pytest.fixture(scope="module")
def lite0():
    return create_image_classifier(DEMO_MODEL, labels=["cats", "dogs"], weights_file=demo_weights_file())


@pytest.mark.photos
def test_the_precision_of_features_on_real_images(lite0, shared_photos):
    files = sorted((shared_photos / "dogscats" / "valid").rglob("*.jpg"))[::12]
    _, transform = image_transforms(lite0)
    head = LayerGroups.from_model(lite0).head

    def features(some, view, dtype=torch.float32):
        images = ImageDataset([{"image": str(file)} for file in some], view)
        return extract_features(lite0, head, images, dtype=dtype).read()

    exact, fast = features(files, transform), features(files, transform.fast())
    rounded = features(files[::4], transform.fast(), torch.bfloat16)  # few: slow on processors without it
    assert torch.cosine_similarity(exact, fast).min() >= 0.999
    assert torch.cosine_similarity(exact[::4], rounded.float()).min() >= 0.997


@pytest.mark.photos
def test_scaled_decoding_of_a_large_image_costs_little(lite0, shared_photos, tmp_path):
    files = sorted((shared_photos / "dogscats" / "valid").rglob("*.jpg"))[::25]
    large = []
    for file in files:  # as a telephone takes them
        picture = Image.open(file).convert("RGB")
        scale = (12e6 / (picture.width * picture.height)) ** 0.5
        large.append(str(tmp_path / file.name))
        picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC).save(
            large[-1], quality=92
        )
    _, transform = image_transforms(lite0)
    head = LayerGroups.from_model(lite0).head
    exact, fast = (
        extract_features(
            lite0, head, ImageDataset([{"image": file} for file in large], decoder), dtype=torch.float32
        ).read()
        for decoder in (transform, transform.fast())
    )
    assert torch.cosine_similarity(exact, fast).min() >= 0.99


BIG_STORE = """
import resource, sys
import torch
from pathlib import Path
from torch import nn
from transformers import Trainer, TrainingArguments
from hf_sgdr import FeatureStore
from hf_sgdr.features.head import FeatureDataset, whole_batch

class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(512, 2)
    def forward(self, features, labels):
        logits = self.linear(features)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

rows = int(sys.argv[2])
store = FeatureStore({"made up": True}, rows, Path(sys.argv[1]))
generator = torch.Generator().manual_seed(0)
for shard in range(store.num_shards):
    store.write(shard, torch.randn(len(store.shard_rows(shard)), 512, generator=generator).half())
features = FeatureStore({"made up": True}, rows, Path(sys.argv[1])).open()
labels = torch.cat([(features[torch.arange(i, min(i + 4096, rows))][:, 0] > 0).long() for i in range(0, rows, 4096)])
def train(some):
    args = TrainingArguments(sys.argv[1] + "/out", max_steps=some, per_device_train_batch_size=64, learning_rate=1e-2,
                             use_cpu=True, save_strategy="no", report_to="none", disable_tqdm=True,
                             remove_unused_columns=False)
    trainer = Trainer(Head(), args, train_dataset=FeatureDataset([features], labels), data_collator=whole_batch)
    return trainer.train().training_loss
train(5)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loss = train(rows // 64)
print(loss, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_a_head_trains_on_a_store_without_loading_it_whole(tmp_path):
    command = [sys.executable, "-c", BIG_STORE, str(tmp_path), "100000"]  # 100 MB
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    loss, megabytes = map(float, output.splitlines()[-1].split())
    assert loss < 0.3
    assert megabytes < 30
