import pytest
import timm
import torch
from helpers import same, weights
from torch import nn

from hf_sgdr.models.fuse import fused_batch_norms

SIZE = 64


def network(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize("name", ["test_resnet", "resnet18", "tf_efficientnet_lite0", "mobilenetv3_small_050"])
def test_it_gives_the_same_without_batch_norms_and_leaves_everything_as_it_was(name, monkeypatch):
    model = network(name).to(memory_format=torch.channels_last)
    pixels = torch.randn(3, 3, SIZE, SIZE)
    parameters = dict(model.named_parameters())
    counted = []
    batch_norm = nn.functional.batch_norm
    monkeypatch.setattr(
        nn.functional, "batch_norm", lambda *args, **kwargs: (counted.append(1), batch_norm(*args, **kwargs))[1]
    )
    with torch.inference_mode():
        expected = model(pixels)
        assert counted
        with fused_batch_norms(model, SIZE):
            counted.clear()
            folded = model(pixels)
            assert counted == []
        torch.testing.assert_close(folded, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(model(pixels), expected)
    now = dict(model.named_parameters())
    assert now.keys() == parameters.keys()
    assert all(now[key] is parameters[key] for key in now)
    assert not [module for module in model.modules() if "forward" in vars(module)]


class Peeking(nn.Module):
    """It uses the convolution's own output too, so that folding would change what it gives."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)
        nn.init.constant_(self.norm.weight, 3.0)

    def forward(self, pixels):
        raw = self.conv(pixels)
        return self.fc((self.norm(raw) + raw.sin()).mean((2, 3)))


def test_where_folding_would_change_something_nothing_is_folded():
    torch.manual_seed(0)
    model = Peeking().eval()
    pixels = torch.randn(2, 3, SIZE, SIZE)
    with torch.inference_mode():
        expected = model(pixels)
        with fused_batch_norms(model, SIZE):
            assert torch.equal(model(pixels), expected)


def test_a_norm_behind_a_cut_stays_out_of_what_is_before_it():
    model = network("resnet18")
    pixels, seen = torch.randn(2, 3, SIZE, SIZE), []
    model.bn1.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.inference_mode():
        model(pixels)
        with fused_batch_norms(model, SIZE, model.bn1):
            seen[1:] = []
            model(pixels)
    torch.testing.assert_close(seen[-1], seen[0])


def test_an_exception_inside_leaves_the_model_as_it_was():
    model = network("test_resnet")
    before = weights(model)
    with pytest.raises(KeyboardInterrupt), fused_batch_norms(model, SIZE):
        raise KeyboardInterrupt
    assert same(before, model.state_dict())
