"""No pickle is trusted, no remote code is run, and files come where they belong, as the user's umask says."""

import ast
import os
import pickle
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_sgdr import create_image_classifier
from hf_sgdr.training.checkpoints import newest_checkpoint

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("hf_sgdr/**/*.py"), *ROOT.glob("recipes/**/*.py"), *ROOT.glob("benchmarks/*.py")], key=str)


def calls_of(source: Path):
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {word.arg: word.value for word in node.keywords}


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_unpickles_or_trusts_remote_code(source):
    tree = ast.parse(source.read_text(encoding="utf-8"))
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not modules & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    for name, keywords in calls_of(source):
        assert name not in ("eval", "exec", "compile", "__import__", "yaml.load", "yaml.unsafe_load", "torch.hub.load")
        assert "trust_remote_code" not in keywords
        if name == "torch.load":
            assert ast.unparse(keywords["weights_only"]) == "True"
        if name in ("np.load", "numpy.load"):
            assert ast.unparse(keywords.get("allow_pickle", ast.Constant(False))) == "False"


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_training_args_are_neither_kept_nor_read(make_trainer, tmp_path):
    trap = tmp_path / "sprung"
    trainer = make_trainer(save_strategy="epoch")
    trainer.fit(1e-2, 2)
    trainer.save_model()
    assert not list((tmp_path / "out").rglob("training_args.bin"))
    checkpoint = newest_checkpoint(tmp_path / "out" / "_runs" / "fit-001")
    for folder in (checkpoint, tmp_path / "out"):
        (folder / "training_args.bin").write_bytes(pickle.dumps(Trap(trap)))
    again = make_trainer()
    again.fit(1e-2, 2, resume_from_checkpoint=str(checkpoint))
    again.save_model()
    assert not trap.exists()
    create_image_classifier(str(tmp_path / "out"), labels=["cats", "dogs"])
    assert not trap.exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_planted_pickle_in_a_checkpoint_does_nothing(name, make_trainer, tmp_path):
    trap = tmp_path / "sprung"
    trainer = make_trainer(save_strategy="epoch")
    trainer.fit(1e-2, 2)
    checkpoint = newest_checkpoint(tmp_path / "out" / "_runs" / "fit-001")
    torch.save(Trap(trap), checkpoint / name)
    with pytest.raises(ValueError, match="is damaged"):
        make_trainer().fit(1e-2, 2, resume_from_checkpoint=str(checkpoint))
    assert not trap.exists()


def test_a_planted_pickle_as_weights_does_nothing(tmp_path):
    trap = tmp_path / "sprung"
    torch.save({"fc.weight": Trap(trap)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="neither safetensors nor a plain state dict"):
        create_image_classifier("test_resnet", labels=["a", "b"], weights_file=str(tmp_path / "weights.pth"))
    assert not trap.exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.recipe
@pytest.mark.parametrize("umask", [0o027, 0o002])
def test_a_recipe_writes_where_it_should_and_as_the_user_wants(umask, tmp_path, make_image_folder):
    images = make_image_folder(tmp_path / "images", {"train": {"a": 8, "b": 8}, "valid": {"a": 2, "b": 2}})
    before = contents(images)
    for name in ("home", "temporary", "here", "cache"):
        (tmp_path / name).mkdir()
    environment = {
        **os.environ,
        "HOME": str(tmp_path / "home"),
        "TMPDIR": str(tmp_path / "temporary"),
        "HF_HOME": str(tmp_path / "home" / "hf"),
        "HF_SGDR_CACHE": str(tmp_path / "cache"),
        "MPLCONFIGDIR": str(tmp_path / "home" / "mpl"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    args = ["--model", "test_resnet", "--pretrained", "false", "--image_size", "32", "--cache_images", "true"]
    args += ["--per_device_train_batch_size", "8", "--learning_rate", "0.01", "--stages", "precomputed", "augmented"]
    args += ["--data_dir", str(images), "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "recipes" / "train.py"), *args],
        capture_output=True,
        text=True,
        cwd=tmp_path / "here",
        env=environment,
        umask=umask,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert {path.name for path in tmp_path.iterdir()} == {"images", "home", "temporary", "here", "cache", "out"}
    assert contents(images) == before
    assert not any((tmp_path / "here").iterdir())
    assert not any((tmp_path / "temporary").iterdir())
    assert contents(tmp_path / "out").keys() >= {"config.json", "model.safetensors", "results.json"}
    assert contents(tmp_path / "cache")
    assert not contents(tmp_path / "home").keys() - {
        name for name in contents(tmp_path / "home") if name.startswith(("mpl", "hf/"))
    }
    for folder in (tmp_path / "out", tmp_path / "cache"):
        for path in (folder, *folder.rglob("*")):
            if path == tmp_path / "cache":
                continue  # made here
            mode = stat.S_IMODE(path.stat().st_mode)
            assert mode == (0o777 if path.is_dir() else 0o666) & ~umask, (path, oct(mode))
