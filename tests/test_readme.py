import re
from pathlib import Path

import pytest

from hf_sgdr import create_image_classifier

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_there_are_code_blocks_to_run():
    assert len(BLOCKS) >= 3


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_every_python_block_of_readme_runs(block, tmp_path, monkeypatch, make_photo_folder, capsys):
    make_photo_folder(tmp_path / "dogscats", {"train": {"cats": 9, "dogs": 9}, "valid": {"cats": 3, "dogs": 3}})
    # A folder of this name wins over the model id of the Hub, so the block's own words are run.
    model = create_image_classifier("test_resnet", labels=["a", "b"], pretrained=False)
    model.config.pretrained_cfg = {**model.config.pretrained_cfg, "input_size": [3, 32, 32]}
    model.save_pretrained(tmp_path / "timm" / "resnet34.a1_in1k")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
