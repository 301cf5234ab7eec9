"""What a model of timm or transformers is made of: its head, and the stages of its body."""

import re
from collections.abc import Callable
from typing import Any

from timm.models import group_parameters
from torch import nn


def timm_network(model: nn.Module) -> Any:
    """The timm network that a model is or wraps, None for others."""
    network = getattr(model, "timm_model", model)
    return network if hasattr(network, "get_classifier") else None


def timm_classifiers(network: Any) -> tuple[nn.Module, ...]:
    """The classifiers of a timm network; distilled ones have two."""
    classifier = network.get_classifier()
    return classifier if isinstance(classifier, tuple) else (classifier,)


def head_modules(model: nn.Module) -> list[nn.Module]:
    """The modules with weights that turn a body's features into logits; empty where none can be told from the body."""
    network = timm_network(model)
    if network is not None:
        return [head for head in timm_classifiers(network) if _has_weights(head)]
    body = getattr(model, "base_model", model)
    beside_body = [child for child in model.children() if child is not body and _has_weights(child)]
    if body is not model and beside_body:
        return beside_body
    # Without a base model beside the head (CLIP, HGNetV2), or with the head inside it (Perceiver): the last layer that
    # gives as many values as there are labels.
    num_labels = getattr(getattr(model, "config", None), "num_labels", None)
    return [layer for layer in model.modules() if _out_features(layer) == num_labels is not None][-1:]


def _out_features(layer: nn.Module) -> int | None:
    if isinstance(layer, nn.Linear):
        return layer.out_features
    return layer.out_channels if isinstance(layer, nn.Conv2d) else None


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def body_stages(model: nn.Module, body: list[str]) -> list[list[str]]:
    """The body's parameter names, stage by stage, from the input on."""
    network = timm_network(model)
    if network is not None and hasattr(network, "group_matcher"):
        prefix = next(name for name, module in model.named_modules() if module is network)
        prefix = f"{prefix}." if prefix else ""
        stage_of = {prefix + name: stage for name, stage in _timm_stages(network).items()}
        if stage_of:
            return _collect(body, lambda name: stage_of[name])
    blocks_name, count = _largest_list_of_layers(model, body)
    if count == 0:
        return [body]
    pattern = re.compile(re.escape(blocks_name) + r"\.(\d+)\.")
    first = min(i for i, name in enumerate(body) if pattern.match(name))

    def stage(name: str) -> int:
        match = pattern.match(name)
        if match:
            return int(match[1]) + 1
        return 0 if body.index(name) < first else count

    return _collect(body, stage)


def _timm_stages(network: Any) -> dict[str, int]:
    """The stage of each parameter by timm's own account; empty where it has none."""
    for coarse in (True, False):
        try:
            matched = group_parameters(network, network.group_matcher(coarse=coarse))
        except Exception:  # whatever timm raises: rdnet asserts that it is not asked for coarse stages
            continue
        stage_of = {name: stage for stage, names in matched.items() for name in names}
        last = max(matched)  # the classifier, and what timm leaves with it: norms and convolutions after the last stage
        stages, stage = {}, 0
        for name, _ in network.named_parameters():
            # what no pattern covers goes with the parameter before it
            stage = min(stage_of.get(name, stage), max(last - 1, 0))
            stages[name] = stage
        return stages
    return {}


def _collect(names: list[str], stage_of: Callable[[str], int]) -> list[list[str]]:
    stages: dict[int, list[str]] = {}
    for name in names:
        stages.setdefault(stage_of(name), []).append(name)
    return [stages[stage] for stage in sorted(stages)]


def _largest_list_of_layers(model: nn.Module, body: list[str]) -> tuple[str, int]:
    """The ModuleList or Sequential of at least two children that holds most of the body's parameters; the outermost."""
    sizes = {name: model.get_parameter(name).numel() for name in body}
    largest, layers = 0, ("", 0)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1:
            share = sum(size for parameter, size in sizes.items() if parameter.startswith(f"{name}."))
            if share > largest:
                largest, layers = share, (name, len(module))
    return layers
