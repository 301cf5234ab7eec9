import pickle
from pathlib import Path

import pytest
import timm
import torch
from helpers import tiny_vit
from safetensors.torch import save_file
from transformers import AutoModelForImageClassification

from hf_sgdr import create_image_classifier
from hf_sgdr.demo import DEMO_MODEL, demo_weights_file

LABELS = ["cats", "dogs"]


@pytest.fixture
def network():
    torch.manual_seed(1)
    return timm.create_model("test_resnet")


def body_equal(model, network) -> bool:
    ours = model.timm_model.state_dict()
    return all(torch.equal(ours[name], value) for name, value in network.state_dict().items() if "fc." not in name)


def test_a_body_that_is_not_pretrained_says_so_loudly(logs):
    model = create_image_classifier("test_resnet", labels=LABELS, pretrained=False)
    assert "the body is NOT pretrained" in logs.text
    assert model.config.id2label == {0: "cats", 1: "dogs"}
    assert model.config.label2id == {"cats": 0, "dogs": 1}
    assert model.timm_model.fc.out_features == 2


@pytest.mark.parametrize("kind", ["safetensors", "pth", "transformers' prefix"])
def test_local_weights_reach_the_body(network, tmp_path, kind):
    weights = network.state_dict()
    path = tmp_path / ("w.pth" if kind == "pth" else "w.safetensors")
    if kind == "pth":
        torch.save({"state_dict": weights}, path)
    else:
        prefix = "timm_model." if kind.startswith("transformers") else ""
        save_file({prefix + name: value for name, value in weights.items()}, path)
    model = create_image_classifier("test_resnet", labels=LABELS, weights_file=path)
    assert body_equal(model, network)
    assert model.timm_model.fc.weight.shape == (2, network.fc.in_features)


def test_the_demos_weights_are_imagenets_in_timms_keys():
    model = create_image_classifier(DEMO_MODEL, labels=LABELS, weights_file=demo_weights_file())
    wheel = torch.load(demo_weights_file(), weights_only=True)
    ours = model.timm_model.state_dict()
    for theirs, name in (
        ("_conv_stem.weight", "conv_stem.weight"),
        ("_blocks.0._project_conv.weight", "blocks.0.0.conv_pw.weight"),
        ("_blocks.3._expand_conv.weight", "blocks.2.0.conv_pw.weight"),
        ("_blocks.15._bn2.running_var", "blocks.6.0.bn3.running_var"),
        ("_bn1.bias", "bn2.bias"),
    ):
        assert torch.equal(wheel[theirs], ours[name]), name


class Anything:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_weights_that_do_not_fit_are_refused(network, tmp_path, capsys):
    other = tmp_path / "other.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), other)
    pickled = tmp_path / "pickled.pth"
    pickled.write_bytes(pickle.dumps(Anything()))
    listing = tmp_path / "list.pth"
    torch.save([1, 2], listing)
    for path, message in (
        (other, "does not fit ResNet"),
        (demo_weights_file(), "does not fit ResNet"),
        (pickled, "neither safetensors nor a plain state dict"),
        (listing, "holds list, not a state dict of tensors"),
    ):
        with pytest.raises(ValueError, match=message):
            create_image_classifier("test_resnet", labels=LABELS, weights_file=path)
    assert "this must not run" not in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match=r"nowhere.pth': no such file"):
        create_image_classifier("test_resnet", labels=LABELS, weights_file=tmp_path / "nowhere.pth")


@pytest.mark.parametrize("kind", ["timm", "vit"])
@pytest.mark.parametrize(
    ("new", "kept"), [(["a", "b"], True), (["b", "a"], False), (["x", "y"], False), (["a", "b", "c"], False)]
)
def test_a_folders_head_is_kept_for_the_same_labels_only(tmp_path, kind, new, kept):
    old = (
        create_image_classifier("test_resnet", labels=["a", "b"], pretrained=False)
        if kind == "timm"
        else tiny_vit("ab")
    )
    old.save_pretrained(tmp_path)
    model = create_image_classifier(tmp_path, labels=new)
    head = model.timm_model.fc if kind == "timm" else model.classifier
    old_head = old.timm_model.fc if kind == "timm" else old.classifier
    assert head.out_features == len(new)
    assert (head.weight.shape == old_head.weight.shape and torch.equal(head.weight, old_head.weight)) == kept
    name = "timm_model.conv1.0.weight" if kind == "timm" else "vit.layers.0.mlp.fc1.weight"
    assert torch.equal(model.get_parameter(name), old.get_parameter(name))
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "again")
    assert list(again.config.id2label.values()) == new
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(again.eval()(pixels).logits, model.eval()(pixels).logits)


def test_a_timm_models_folder_without_its_weights_draws_them_as_timm_does(tmp_path):
    create_image_classifier("test_resnet", labels=["a", "b"], pretrained=False).save_pretrained(tmp_path)
    for place in (tmp_path, "test_resnet"):
        model = create_image_classifier(place, labels=["a", "b"], pretrained=False)
        first = next(model.timm_model.parameters())
        assert first.std() > 0.05  # transformers would draw .02 everywhere


def test_a_bare_name_is_timms_and_a_folder_that_is_called_so_is_named_by_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_vit("ab").save_pretrained("test_resnet")
    kinds = [
        type(create_image_classifier(name, labels=["a", "b"], pretrained=False)).__name__
        for name in ("test_resnet", "./test_resnet", Path("test_resnet"))
    ]
    assert kinds == ["TimmWrapperForImageClassification", *["ViTForImageClassification"] * 2]


def test_a_folder_without_its_weights(tmp_path):
    tiny_vit("ab").save_pretrained(tmp_path)
    model = create_image_classifier(tmp_path, labels=["a", "b"], pretrained=False)
    assert not torch.equal(model.vit.layers[0].mlp.fc1.weight, tiny_vit("ab").vit.layers[0].mlp.fc1.weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": "cats"}, "labels='cats': give a list of class names, not one string."),
        ({"labels": ["cats"]}, "labels=['cats']: give at least two class names."),
        (
            {"labels": ["cats", "dogs", "cats"]},
            "labels=['cats', 'dogs', 'cats']: give at least two class names; ['cats'] are there twice.",
        ),
        (
            {"model_name_or_path": "resnt34"},
            "'resnt34' is neither a folder, nor a timm architecture, nor a model id of the Hub (user/name). "
            "Did you mean resnet34",
        ),
        ({"in_chans": 1}, "in_chans=1: give images in RGB, three channels; leave it out."),
        ({"model_name_or_path": "user/name", "weights_file": "w.pth"}, "weights_file goes with a bare timm name"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    values = {"model_name_or_path": "test_resnet", "labels": LABELS, "pretrained": False, **arguments}
    with pytest.raises(ValueError, match=r"give|neither|goes with") as error:
        create_image_classifier(**values)
    assert str(error.value).startswith(message)


def test_a_change_that_would_make_the_body_random_is_refused(tmp_path):
    tiny_vit("ab").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"image_size=64: the weights of .* do not fit, and 'vit.embeddings.position"):
        create_image_classifier(tmp_path, labels=["a", "b"], image_size=64)
    assert create_image_classifier(tmp_path, labels=["a", "b", "c"]).config.num_labels == 3


def test_keys_of_another_network_and_tags_that_are_unknown_are_named(tmp_path):
    torch.save({"_conv_stem.weight": torch.zeros(1), "_blocks.30._se_reduce.weight": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="does not fit EfficientNet"):
        create_image_classifier("tf_efficientnet_lite0", labels=LABELS, weights_file=tmp_path / "w.pt")
    with pytest.raises(OSError, match=r"'resnet18.nothing' could not be loaded .*Invalid pretrained tag"):
        create_image_classifier("resnet18.nothing", labels=LABELS)


def test_weights_that_the_hub_does_not_give_are_one_clear_error():
    with pytest.raises(OSError, match=r"pretrained weights of 'resnet18' could not be loaded .* Give weights_file="):
        create_image_classifier("resnet18", labels=LABELS)
