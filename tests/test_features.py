import json
import math
import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from hf_sgdr import FeatureStore
from hf_sgdr._utils import store as shards
from hf_sgdr._utils.files import cache_folder, file_identity
from hf_sgdr.features.__main__ import main, stores
from hf_sgdr.features.store import module_hash, stacked


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr("hf_sgdr._utils.store.ROWS_PER_SHARD", 4)


@pytest.fixture
def rows() -> torch.Tensor:
    return torch.randn(10, 3, generator=torch.Generator().manual_seed(0))


def filled(tmp_path, rows, **depends_on) -> FeatureStore:
    store = FeatureStore(depends_on, len(rows), tmp_path)
    for shard in range(store.num_shards):
        store.write(shard, rows[store.shard_rows(shard).start : store.shard_rows(shard).stop])
    return store


def reopened(store: FeatureStore, tmp_path) -> FeatureStore:
    return FeatureStore(store.manifest["depends_on"], store.rows, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_written_is_read_in_order(tmp_path, rows, dtype):
    store = filled(tmp_path, rows.to(dtype), body="a")
    read = reopened(store, tmp_path).read()
    assert read.dtype == dtype
    assert torch.equal(read, rows.to(dtype))
    assert [len(store.shard_rows(shard)) for shard in range(3)] == [4, 4, 2]


def test_the_manifest_says_what_the_features_depend_on(tmp_path, rows):
    store = filled(tmp_path, rows, body="a", transform={"size": 32})
    assert json.loads((store.folder / "manifest.json").read_text()) == {
        "format": 1,
        "rows": 10,
        "rows_per_shard": 4,
        "depends_on": {"body": "a", "transform": {"size": 32}},
    }


def test_another_dependence_or_length_is_another_store():
    keys = {
        FeatureStore(depends_on, rows).key for depends_on in ({"a": 1}, {"a": 2}, {"b": 1}, {}) for rows in (10, 11)
    }
    assert len(keys) == 8
    assert FeatureStore({"a": 1, "b": 2}, 3).key == FeatureStore({"b": 2, "a": 1}, 3).key


@pytest.mark.parametrize("where", [0, 8, 40, -1, -12])
def test_a_flipped_bit_is_never_read(tmp_path, rows, where, logs):

    store = filled(tmp_path, rows)
    path = store.folder / "shard-000001.safetensors"
    content = bytearray(path.read_bytes())
    content[where] ^= 4
    path.write_bytes(content)
    damaged = reopened(store, tmp_path)
    assert damaged.missing() == [1]
    assert "shard-000001.safetensors is damaged" in logs.text
    with pytest.raises(RuntimeError, match="not complete"):
        damaged.read()
    damaged.write(1, rows[4:8])
    assert torch.equal(reopened(store, tmp_path).read(), rows)


def test_cut_off_and_left_over_files_do_not_count(tmp_path, rows):
    store = filled(tmp_path, rows)
    path = store.folder / "shard-000002.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    (store.folder / ".tmp-abandoned").write_bytes(b"half a shard")
    (store.folder / "shard-000000.safetensors").unlink()
    assert reopened(store, tmp_path).missing() == [0, 2]


def test_a_shard_of_another_length_is_refused(tmp_path, rows):
    with pytest.raises(ValueError, match="Shard 2 has 2 rows, 4 given"):
        FeatureStore({}, 10, tmp_path).write(2, rows[:4])


def test_a_full_disk_is_one_clear_error_and_the_store_stays_intact(tmp_path, rows, monkeypatch):
    store = filled(tmp_path, rows)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hf_sgdr._utils.store.save_file", full)
    with pytest.raises(OSError, match=r"cannot be written .*No space left on device.*set HF_SGDR_CACHE"):
        store.write(0, rows[:4])
    assert torch.equal(reopened(store, tmp_path).read(), rows)
    assert not [path for path in store.folder.iterdir() if path.name.startswith(".tmp")]


def test_a_folder_that_may_only_be_read_gives_what_it_has(tmp_path, rows, monkeypatch):
    store = filled(tmp_path, rows)

    def refused(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    for name in ("hf_sgdr._utils.store.tempfile.NamedTemporaryFile", "hf_sgdr._utils.store.os.utime"):
        monkeypatch.setattr(name, refused)
    assert torch.equal(reopened(store, tmp_path).read(), rows)
    with pytest.raises(OSError, match=r"cannot be written .*Permission denied.*set HF_SGDR_CACHE to a folder"):
        reopened(store, tmp_path).write(0, rows[:4])


def test_no_room_in_memory_is_one_clear_error(tmp_path, rows, monkeypatch):
    store = filled(tmp_path, rows)

    def full(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("hf_sgdr.features.store.torch.empty", full)
    with pytest.raises(MemoryError, match=r"do not fit into memory: lower feature_memory_gb.*what is stored stays"):
        reopened(store, tmp_path).read()


@pytest.mark.parametrize("shape", [(3,), (2, 3), ()])
def test_rows_on_disk_are_indexed_as_a_tensor_is(tmp_path, shape):
    rows = torch.arange(10 * math.prod(shape), dtype=torch.float16).view(10, *shape)
    on_disk = filled(tmp_path, rows).open()
    assert (len(on_disk), on_disk.shape, on_disk.dtype, on_disk.nbytes) == (10, rows.shape, rows.dtype, rows.nbytes)
    for index in (3, -1, torch.tensor([9, 0, 4, 4]), torch.tensor([], dtype=torch.int64)):
        assert torch.equal(on_disk[index], rows[index])
    with pytest.raises(IndexError, match="row 10 of 10"):
        on_disk[10]


def test_stores_after_one_another_are_indexed_as_one(tmp_path, rows):
    parts = [filled(tmp_path, rows[:5], part=0).open(), filled(tmp_path, rows[5:], part=1).open()]
    stack = stacked(parts)
    assert (len(stack), stack.shape, stack.dtype) == (len(rows), rows.shape, rows.dtype)
    for index in (3, torch.tensor(6), torch.tensor([9, 0, 4]), torch.tensor([[5, 1], [4, 4]])):
        assert torch.equal(stack[index], rows[index])


def test_many_threads_may_read_a_file_that_is_not_mapped_yet(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)))
    identity = file_identity(path)

    def byte(i: int) -> int:
        return int(shards.mapped(identity)[i])

    with ThreadPoolExecutor(8) as pool:
        for _ in range(300):
            shards.mapped.cache_clear()
            assert list(pool.map(byte, range(8))) == list(range(8))


def test_a_shard_is_checked_once_a_process_and_again_when_its_file_changed(tmp_path, rows, monkeypatch):
    store = filled(tmp_path, rows)
    checked = []
    checksum = shards.tensors_hash
    monkeypatch.setattr(shards, "tensors_hash", lambda tensors: checked.append(1) or checksum(tensors))
    for _ in range(3):
        assert torch.equal(reopened(store, tmp_path).read(), rows)
    assert not checked  # this process wrote it
    path = next(store.folder.glob("shard-*"))
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(1, 1))
    assert reopened(store, tmp_path).missing() == [0]
    path.write_bytes(content)
    os.utime(path, ns=(2, 2))
    assert reopened(store, tmp_path).missing() == reopened(store, tmp_path).missing() == []
    assert len(checked) == 2


def test_rows_on_disk_survive_pickling_as_spawned_workers_do_it(tmp_path, rows):
    on_disk = pickle.loads(pickle.dumps(filled(tmp_path, rows).open()))
    assert torch.equal(on_disk[torch.arange(len(rows))], rows)
    assert len(pickle.dumps(on_disk)) < 2_000  # names of files, not their content


def test_a_store_of_many_rows_has_few_shards_and_files_of_the_users_umask(tmp_path):
    store = FeatureStore({}, 1_000_000, tmp_path)
    assert store.num_shards <= 256
    umask = os.umask(0o027)
    try:
        filled(tmp_path, torch.zeros(3, 2))
    finally:
        os.umask(umask)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert modes == {"manifest.json": 0o640, "shard-000000.safetensors": 0o640}


def test_what_a_killed_run_left_half_written_is_removed_in_time(tmp_path, rows):
    store = filled(tmp_path, rows)
    for name, age in (("old", 7200), ("new", 60)):
        path = store.folder / f".tmp-{name}"
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age,) * 2)
    reopened(store, tmp_path).read()
    assert [path.name for path in store.folder.glob(".tmp-*")] == [".tmp-new"]


def test_the_cache_folder_is_named_by_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_SGDR_CACHE", str(tmp_path / "here"))
    assert cache_folder() == tmp_path / "here"
    assert FeatureStore({}, 1).folder.parent == tmp_path / "here" / "features"
    monkeypatch.delenv("HF_SGDR_CACHE")
    assert cache_folder().name == "hf_sgdr"


def test_stores_are_listed_and_pruned(tmp_path, rows, capsys):
    config = {"architecture": "resnet34"}
    old = filled(tmp_path, rows, config=config, transform={"size": 64}, dtype="bfloat16")
    new = filled(tmp_path, rows, config=config, transform={"size": 224}, dtype="float32")
    (new.folder / "shard-000001.safetensors").unlink()
    for file in old.folder.iterdir():
        os.utime(file, (time.time() - 40 * 86_400,) * 2)
    main(["--root", str(tmp_path), "ls"])
    newer, older = capsys.readouterr().out.splitlines()
    assert newer.startswith(new.key)
    assert newer.endswith("resnet34 at 224 px, float32  incomplete")
    assert older.startswith(f"{old.key}        10 rows")
    assert older.endswith("40.0 days  resnet34 at 64 px, bfloat16")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").touch()
    os.utime(tmp_path / "photos" / "holiday.jpg", (0, 0))
    with pytest.raises(SystemExit):
        main(["--root", str(tmp_path), "prune", "--days", "-1"])
    main(["--root", str(tmp_path), "prune", "--days", "30"])
    assert (tmp_path / "photos" / "holiday.jpg").exists()  # a mistyped --root removes nothing of yours
    assert capsys.readouterr().out.startswith("Removed 1 stores")
    assert [store.folder for store in stores(tmp_path)] == [new.folder]


def test_reading_a_store_keeps_it_from_being_pruned(tmp_path, rows):
    store = filled(tmp_path, rows)
    for file in store.folder.iterdir():
        os.utime(file, (0, 0))
    reopened(store, tmp_path).read()
    assert stores(tmp_path)[0].days < 1
    assert stores(tmp_path / "nowhere") == []


HEAD = {"2.weight", "2.bias"}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def test_a_hash_sees_every_weight_and_buffer_but_not_the_head():
    model = network()
    before = module_hash(model, leave_out=HEAD)
    assert module_hash(network(), leave_out=()) == module_hash(model)
    with torch.no_grad():
        model[2].weight += 1
    assert module_hash(model, leave_out=HEAD) == before
    for name, tensor in (*model[0].named_parameters(), *model[1].named_buffers()):
        changed = network()
        part = changed[0] if name in dict(changed[0].named_parameters()) else changed[1]
        with torch.no_grad():
            part.state_dict()[name].add_(1)
        assert module_hash(changed, leave_out=HEAD) != before, (name, tensor.shape)
    assert module_hash(model.to(torch.float64), leave_out=HEAD) != before


def test_a_hash_does_not_see_the_memory_format():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 2))
    before = module_hash(model)
    assert module_hash(model.to(memory_format=torch.channels_last)) == before
