import json
import os
import subprocess
import sys

import timm
import torch
from loopback_hub import loopback_hub
from safetensors.torch import save_file

CODE = """
import json, torch
from hf_sgdr import LayerGroups, create_image_classifier, image_transforms
model = create_image_classifier("timm/resnet34.a1_in1k", labels=["cats", "dogs"]).eval()
_, transform = image_transforms(model)
groups = LayerGroups.from_model(model)
print(json.dumps({
    "kind": type(model).__name__,
    "labels": model.config.id2label,
    "stem": model.timm_model.conv1.weight[0, 0, 0].tolist(),
    "head": list(model.timm_model.fc.weight.shape),
    "size": transform.spec.size,
    "middle": groups.parameter_names(1)[0],
}))
"""


def test_the_default_model_id_is_loaded_from_a_hub(tmp_path):
    torch.manual_seed(0)
    network = timm.create_model("resnet34")
    folder = tmp_path / "repo"
    folder.mkdir()
    save_file(network.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    config = timm.get_pretrained_cfg("resnet34").to_dict()
    content = {"architecture": "resnet34", "num_classes": 1000, "num_features": 512, "pretrained_cfg": config}
    (folder / "config.json").write_text(json.dumps(content))
    with loopback_hub({"timm/resnet34.a1_in1k": folder}) as (endpoint, asked):
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home")}
        environment.pop("HF_HUB_OFFLINE", None)
        done = subprocess.run(
            [sys.executable, "-c", CODE], capture_output=True, text=True, env=environment, timeout=120, check=False
        )
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert any(path.endswith("/model.safetensors") for path in asked)
    assert seen == {
        "kind": "TimmWrapperForImageClassification",
        "labels": {"0": "cats", "1": "dogs"},
        "stem": network.conv1.weight[0, 0, 0].tolist(),
        "head": [2, 512],
        "size": 224,
        "middle": "timm_model.layer3.0.conv1.weight",
    }
