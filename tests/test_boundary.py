import pytest
import timm
import torch
from torch import nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_sgdr import LayerGroups, create_image_classifier
from hf_sgdr.models.boundary import Boundary

SIZE = 64
LABELS = {"id2label": {0: "cats", 1: "dogs"}, "label2id": {"cats": 0, "dogs": 1}}
SMALL = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}


def of_timm(name, **kwargs):
    torch.manual_seed(0)
    if "vit" in name:
        kwargs = {"img_size": SIZE}
    model = timm.create_model(name, num_classes=2, **kwargs)
    return model.eval()


def of_transformers(kind):
    torch.manual_seed(0)
    if kind == "vit":
        return ViTForImageClassification(ViTConfig(**SMALL, image_size=SIZE, patch_size=8, **LABELS)).eval()
    if kind == "dinov2":
        sizes = {key: SMALL[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
        return Dinov2ForImageClassification(Dinov2Config(**sizes, image_size=SIZE, patch_size=8, **LABELS)).eval()
    if kind == "swin":
        config = SwinConfig(
            image_size=SIZE, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4, **LABELS
        )
        return SwinForImageClassification(config).eval()
    config = ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], **LABELS)
    return ConvNextForImageClassification(config).eval()


MODELS = {
    **{
        name: lambda name=name: of_timm(name)
        for name in (
            "test_resnet", "resnet18", "tf_efficientnet_lite0", "mobilenetv3_small_050", "convnext_atto", "test_vit",
            "densenet121", "regnetx_002",
        )
    },
    "wrapped": lambda: create_image_classifier("test_resnet", labels=["cats", "dogs"], pretrained=False).eval(),
    **{kind: lambda kind=kind: of_transformers(kind) for kind in ("vit", "dinov2", "swin", "convnext")},
}  # fmt: skip


def logits_of(output):
    return output if isinstance(output, torch.Tensor) else output.logits


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("n_groups", [3, 4])
def test_the_rest_makes_the_models_logits_and_gradients_of_the_features(name, n_groups):
    model = MODELS[name]()
    groups = LayerGroups.from_model(model, n_groups)
    pixels = torch.randn(3, 3, SIZE, SIZE)
    for frozen in range(1, n_groups):
        groups.freeze_to(frozen)
        boundary = Boundary.at_boundary(groups, SIZE)
        model.zero_grad()
        logits = logits_of(model(pixels))
        logits.square().sum().backward()
        expected = {key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None}
        with torch.no_grad():
            features, _ = boundary.caught(pixels)
        model.zero_grad()
        alone = boundary.logits(features)
        torch.testing.assert_close(alone, logits)
        alone.square().sum().backward()
        got = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
        assert got.keys() == expected.keys()
        for key in expected:  # convolutions in another memory layout round otherwise
            assert (got[key] - expected[key]).norm() <= 1e-2 * expected[key].norm(), key
        assert not [module for module in model.modules() if "forward" in vars(module)]
        torch.testing.assert_close(logits_of(model(pixels)), logits)  # and it takes images again


def test_the_frozen_part_does_not_run_on_features(monkeypatch):
    model = of_timm("resnet18")
    groups = LayerGroups.from_model(model)
    groups.freeze_to(1)
    boundary = Boundary.at_boundary(groups, SIZE)
    assert boundary.name == "layer3"
    with torch.no_grad():
        features, _ = boundary.caught(torch.randn(2, 3, SIZE, SIZE))
        assert features.shape == (2, 128, SIZE // 8, SIZE // 8)
        convolve, ran = nn.functional.conv2d, []
        monkeypatch.setattr(nn.functional, "conv2d", lambda *args: (ran.append(args[1].shape), convolve(*args))[1])
        boundary.logits(features)
    expected = [module for stage in (model.layer3, model.layer4) for module in stage.modules()]
    assert len(ran) == sum(isinstance(module, nn.Conv2d) for module in expected)


def test_the_names_on_which_features_do_not_depend():
    model = of_transformers("vit")
    groups = LayerGroups.from_model(model)
    groups.freeze_to(1)
    boundary = Boundary.at_boundary(groups, SIZE)
    after = boundary.names_after()
    trained = {name for i in (1, 2) for name in groups.parameter_names(i)}
    assert after == trained
    groups.freeze_to(-1)
    assert Boundary.at_boundary(groups, SIZE).names_after() == {"classifier.weight", "classifier.bias"}


class Heads(nn.Module):
    """One head or two on the same tensor, and something after them."""

    def __init__(self, count):
        super().__init__()
        self.body, self.heads = nn.Linear(3, 4), nn.ModuleList(nn.Linear(4, 2) for _ in range(count))

    def forward(self, pixel_values):
        features = self.body(pixel_values.mean((2, 3))).relu()
        return 3 * sum(head(features) for head in self.heads)


@pytest.mark.parametrize("count", [1, 2])
def test_what_comes_after_or_beside_the_head_is_part_of_the_rest(count):
    torch.manual_seed(0)
    model = Heads(count).eval()
    names = [name for name, _ in model.named_parameters()]
    groups = LayerGroups(model, {"body": names[:2], "head": names[2:]}, model.heads[0] if count == 1 else None)
    groups.freeze_to(-1)
    boundary = Boundary.at_boundary(groups, SIZE)
    pixels = torch.randn(3, 3, SIZE, SIZE)
    with torch.no_grad():
        features, _ = boundary.caught(pixels)
        assert features.shape == (3, 4)
        torch.testing.assert_close(boundary.logits(features), model(pixels))


class Skipping(nn.Module):
    """Its last layer looks back at its first: there is no one place to cut."""

    def __init__(self):
        super().__init__()
        self.stem, self.middle, self.fc = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(8, 2)

    def forward(self, pixel_values):
        first = self.stem(pixel_values.mean((2, 3)))
        return self.fc(torch.cat([self.middle(first), first], dim=1))


def test_what_cannot_be_cut_says_so():
    model = Skipping().eval()
    names = [name for name, _ in model.named_parameters()]
    groups = LayerGroups(model, {"early": names[:2], "middle": names[2:4], "head": names[4:]}, model.fc)
    groups.freeze_to(1)
    boundary = Boundary.at_boundary(groups, SIZE)
    pixels = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        features, logits = boundary.caught(pixels, with_logits=True)
        assert not torch.allclose(
            boundary.logits(features), logits
        )  # which extraction looks at before it stores anything
    mixed = LayerGroups(model, {"early": names[1:2], "rest": names[:1] + names[2:]})
    mixed.freeze_to(1)
    with pytest.raises(
        ValueError, match=r"Skipping cannot be cut there: stem.weight is to train but is used before middle"
    ):
        Boundary.at_boundary(mixed, SIZE)
    groups.freeze_to(0)
    with pytest.raises(ValueError, match="Nothing is frozen"):
        Boundary.at_boundary(groups, SIZE)
