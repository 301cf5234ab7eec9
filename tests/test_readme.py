import re
from pathlib import Path

import pytest
import yaml

from hf_sgdr import Stage, create_image_classifier

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_there_are_code_blocks_to_run():
    assert len(blocks("python")) >= 6
    assert len(blocks("yaml")) >= 1


@pytest.mark.parametrize("block", blocks("python"), ids=range(len(blocks("python"))))
def test_every_python_block_of_readme_runs(block, tmp_path, monkeypatch, make_photo_folder, capsys):
    make_photo_folder(tmp_path / "dogscats", {"train": {"cats": 9, "dogs": 9}, "valid": {"cats": 3, "dogs": 3}})
    # A folder of this name wins over the model id of the Hub, so the block's own words are run.
    model = create_image_classifier("test_resnet", labels=["a", "b"], pretrained=False)
    model.config.pretrained_cfg = {**model.config.pretrained_cfg, "input_size": [3, 32, 32]}
    model.save_pretrained(tmp_path / "timm" / "resnet34.a1_in1k")
    monkeypatch.chdir(tmp_path)
    # Pictures of 224 px, which the lesson names, would take the test's time and show nothing more.
    exec(compile(block.replace("image_size=224", "image_size=32"), "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("block", blocks("yaml"))
def test_every_yaml_block_of_readme_has_stages(block):
    assert [Stage.from_dict(stage) for stage in yaml.safe_load(block)["stages"]]
