"""Every image classifier of transformers and a dozen families of timm: groups, cut, both ways of training, saving.

The models are tiny and their weights random, so that one process trains all of them in about a minute.
"""

import inspect
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    CLIPForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    Siglip2ForImageClassification,
    SiglipForImageClassification,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperForImageClassification

import hf_sgdr
from hf_sgdr import (
    LayerGroups,
    SGDRTrainer,
    SGDRTrainingArguments,
    create_image_classifier,
    image_transforms,
    load_image_folder,
)
from hf_sgdr.models.classifiers import check_trainable

SIZE = 64
LABELS = ["bees", "cats", "dogs"]

CLASSES: dict[type[PreTrainedModel], type[PreTrainedConfig]] = {
    kind: config
    for config, kinds in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.items()
    for kind in (kinds if isinstance(kinds, tuple) else (kinds,))
    if kind is not TimmWrapperForImageClassification  # below
}

# What the names of sizes mean in all configurations; a list keeps its length.
SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": SIZE,
    "embed_dim": 16, "pooler_output_size": 32, "depths": 1, "num_heads": 2, "embedding_size": 16, "groups_width": 16,
    "width_multiplier": 0.25, "depth_multiplier": 0.25, "width_coefficient": 0.25, "depth_coefficient": 0.1,
    "num_latents": 8, "d_latents": 16, "num_self_attends_per_block": 2, "num_self_attention_heads": 2,
    "num_cross_attention_heads": 1, "num_groups": 4, "projection_dim": 32, "window_size": 4, "decoder_hidden_size": 32,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout_prob": 0.0,
}  # fmt: skip
WIDTHS = {"hidden_sizes", "embed_dims"}

# The classes that make no loss of images and labels.
REFUSED = {
    "DeiTForImageClassificationWithTeacher", "ImageGPTForImageClassification", "LevitForImageClassificationWithTeacher",
    "PPLCNetForImageClassification", "ShieldGemma2ForImageClassification",
}  # fmt: skip
# It cannot be built without a package that compiles kernels of its own.
NEEDS_NATTEN = "DinatForImageClassification"

# What else a configuration needs so that its parts fit together.
OVERRIDES: dict[str, dict[str, Any]] = {
    # of its depth's rates, stage i reads entry i
    "CvtConfig": {"embed_dim": [16, 32, 32], "num_heads": [1, 2, 2], "depth": [1, 2, 3]},
    "DonutSwinConfig": {"patch_size": 2},  # so that a window is left in the last stage
    "EfficientNetConfig": {"hidden_dim": 320},
    "HGNetV2Config": {
        "stem_channels": [3, 8, 16],
        "stage_in_channels": [16, 16, 32, 48],
        "stage_mid_channels": [8, 8, 8, 8],
        "stage_out_channels": [16, 32, 48, 64],
    },
    "PerceiverConfig": {"image_size": 32},  # it attends to each pixel
    "SwinConfig": {"patch_size": 2},
    "TextNetConfig": {"stem_out_channels": 16},
}


def small_config(kind: type[PreTrainedConfig]) -> PreTrainedConfig:
    default = kind().to_dict()
    values: dict[str, Any] = {
        name: [SMALL[name]] * len(default[name]) if isinstance(default[name], list | tuple) else SMALL[name]
        for name in SMALL.keys() & default.keys()
    }
    for name in WIDTHS & default.keys():
        values[name] = [16 * (i + 1) for i in range(len(default[name]))]
    for name in ("text_config", "vision_config"):
        if name in default:
            values[name] = {key: SMALL[key] for key in SMALL.keys() & default[name].keys()}
    values |= OVERRIDES.get(kind.__name__, {})
    if "num_labels" in inspect.signature(kind).parameters:  # a field of Pvt's, which its labels do not change
        values["num_labels"] = len(LABELS)
    return kind(**values, id2label=dict(enumerate(LABELS)), label2id={name: i for i, name in enumerate(LABELS)})


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Models as small as these gain nothing from more, and lose much where other processes want the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def images(tmp_path_factory, make_image_folder):
    classes = dict.fromkeys(LABELS, 2)
    root = make_image_folder(tmp_path_factory.mktemp("images"), {"train": classes, "valid": classes})
    return load_image_folder(root)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def moved(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}


def goes_the_whole_way(
    model: PreTrainedModel, images: Any, folder: Any, *, size: int = SIZE, precompute: bool = True
) -> None:
    groups = LayerGroups.from_model(model)
    names = [set(groups.parameter_names(i)) for i in range(3)]
    assert groups.names == ["early", "middle", "head"]
    _, transform = image_transforms(model, image_size=size)
    arguments = SGDRTrainingArguments(
        str(folder / "out"), per_device_train_batch_size=3, use_cpu=True, report_to="none", disable_tqdm=True,
        save_strategy="no",
    )  # fmt: skip
    trainer = SGDRTrainer(
        model, arguments, train_dataset=images["train"], eval_dataset=images["validation"],
        train_transform=transform, eval_transform=transform,
    )  # fmt: skip

    trainer.precompute = precompute
    before = weights(model)
    trainer.fit(1e-2, 1)
    on_features = next(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    assert moved(model, before)
    assert moved(model, before) <= names[2]

    trainer.precompute = False  # the rest gives of features what the whole model gives of images
    assert trainer.evaluate()["eval_loss"] == pytest.approx(on_features, rel=1e-3)
    trainer.unfreeze()
    before = weights(model)
    trainer.fit(1e-2, 1)
    assert all(moved(model, before) & group for group in names)

    trainer.save_model(folder / "saved")
    again = AutoModelForImageClassification.from_pretrained(folder / "saved").eval()
    assert type(again) is type(model)
    check_trainable(again)  # which lets SigLIP 2 take images
    pixels = torch.randn(2, 3, size, size)
    with torch.no_grad():
        # the trained one has another memory layout, which rounds otherwise
        torch.testing.assert_close(again(pixels).logits, model.eval()(pixels).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "kind", [kind for kind in CLASSES if kind.__name__ not in REFUSED | {NEEDS_NATTEN}], ids=lambda kind: kind.__name__
)
def test_classifiers_of_transformers_train(kind, images, tmp_path):
    torch.manual_seed(0)
    config = small_config(CLASSES[kind])
    goes_the_whole_way(kind(config), images, tmp_path, size=32 if config.model_type == "perceiver" else SIZE)


def test_a_saved_siglip_2_answers_square_images_in_a_stock_pipeline_as_here(images, tmp_path):
    torch.manual_seed(0)
    model = Siglip2ForImageClassification(small_config(CLASSES[Siglip2ForImageClassification]))
    _, transform = image_transforms(model, image_size=SIZE)
    arguments = SGDRTrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to="none", disable_tqdm=True)
    trainer = SGDRTrainer(model, arguments, eval_dataset=images["validation"], eval_transform=transform)
    trainer.save_model(tmp_path)
    square = Image.fromarray(np.random.default_rng(0).integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8))
    answers = [
        {answer["label"]: answer["score"] for answer in made("image-classification", model=str(tmp_path))(square)}
        for made in (transformers.pipeline, lambda task, model: hf_sgdr.pipeline(model))
    ]
    assert answers[0] == pytest.approx(answers[1], abs=1e-4)
    with pytest.raises(ValueError, match="image_size=65: must be a multiple of the model's patches, which are 16 px"):
        model(torch.zeros(1, 3, 65, 65))


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_classifiers_that_make_no_loss_of_images_and_labels_are_refused_in_one_line(name, tmp_path):
    kind = next(kind for kind in CLASSES if kind.__name__ == name)
    with torch.device("meta"):
        model = kind(CLASSES[kind]())
    with pytest.raises(ValueError, match=f"^{name} cannot be trained on images with labels: [^\n]+\\.$"):
        SGDRTrainer(model, SGDRTrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))


@pytest.mark.parametrize("name", ["DeiTForImageClassificationWithTeacher", "CLIPForImageClassification"])
def test_a_saved_classifier_gets_a_head_for_other_labels_or_is_refused(name, tmp_path):
    kind = next(kind for kind in CLASSES if kind.__name__ == name)
    torch.manual_seed(0)
    saved = kind(small_config(CLASSES[kind]))
    saved.save_pretrained(tmp_path)
    if name in REFUSED:
        with pytest.raises(ValueError, match=f"^{name} cannot be trained on images with labels: "):
            create_image_classifier(tmp_path, labels=["a", "b"])
        return
    model = create_image_classifier(tmp_path, labels=["a", "b"])
    head = LayerGroups.from_model(model).head
    assert isinstance(head, nn.Linear)
    assert head.out_features == 2
    body = {name: value for name, value in weights(saved).items() if "classifier" not in name}
    assert all(torch.equal(model.get_parameter(name), value) for name, value in body.items())


@pytest.mark.parametrize("kind", [CLIPForImageClassification, SiglipForImageClassification])
def test_the_image_size_is_that_of_the_vision_model(kind):
    train, evaluation = image_transforms(kind(small_config(CLASSES[kind])))
    assert train.spec.size == evaluation.spec.size == SIZE


TIMM: dict[str, dict[str, Any]] = {
    "test_resnet": {},
    "test_efficientnet": {},
    "test_convnext": {},
    "test_vit": {"img_size": SIZE},
    "swin_tiny_patch4_window7_224": {
        "img_size": SIZE, "window_size": 2, "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2],
    },
    "mobilenetv3_small_050": {},
    "mobilenetv4_conv_small_050": {},
    "regnetx_002": {},
    "densenet121": {"growth_rate": 8, "block_config": [2, 2, 2, 2]},
    "rdnet_tiny": {
        "num_init_features": 16, "growth_rates": [8, 8, 8], "num_blocks_list": [1, 1, 1],
        "is_downsample_block": [None, True, True], "transition_compression_ratio": 0.5,
        "block_type": ["Block"] * 3, "bottleneck_width_ratio": 2, "drop_path_rate": 0.0,
    },
    "repvit_m0_9": {},
    # logits are the mean of two heads
    "levit_128s": {"img_size": SIZE},
    "efficientformer_l1": {"depths": [1, 1, 1, 2], "embed_dims": [16, 16, 32, 32]},
    "swiftformer_xs": {},
}  # fmt: skip
SIZES = {"efficientformer_l1": 224}  # it takes no other


@pytest.mark.parametrize("name", TIMM)
def test_families_of_timm_train(name, images, tmp_path):
    torch.manual_seed(0)
    model = create_image_classifier(name, labels=LABELS, pretrained=False, **TIMM[name])
    goes_the_whole_way(model, images, tmp_path, size=SIZES.get(name, SIZE))


def test_two_heads_on_two_tokens_train_without_precompute(images, tmp_path):
    torch.manual_seed(0)
    model = create_image_classifier(
        "deit_tiny_distilled_patch16_224", labels=LABELS, pretrained=False, img_size=SIZE, depth=3
    )
    with pytest.raises(ValueError, match=r"cannot be precomputed: .* Train with precompute=False\.$"):
        goes_the_whole_way(model, images, tmp_path)
    goes_the_whole_way(model, images, tmp_path, precompute=False)
