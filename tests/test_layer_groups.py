import copy

import pytest
import timm
import torch
from helpers import weights
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from hf_sgdr import LayerGroups

TIMM = (
    "resnet34", "tf_efficientnet_lite0", "convnext_tiny", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224",
    "mobilenetv3_small_100", "densenet121", "regnety_002", "vgg11", "mixer_s32_224", "deit_tiny_distilled_patch16_224",
    "poolformer_s12", "pit_ti_224", "efficientvit_b0",
)  # fmt: skip
TRANSFORMERS = (
    (ViTForImageClassification, ViTConfig()),
    (ConvNextForImageClassification, ConvNextConfig()),
    (ResNetForImageClassification, ResNetConfig()),
    (SwinForImageClassification, SwinConfig()),
    (Dinov2ForImageClassification, Dinov2Config()),
    (MobileNetV2ForImageClassification, MobileNetV2Config()),
    (BertForSequenceClassification, BertConfig()),
)


def on_no_device(make):
    with torch.device("meta"):
        return make()


def outer_modules(groups: LayerGroups, i: int) -> list[str]:
    return list(dict.fromkeys(name.split(".")[0] for name in groups.parameter_names(i)))


def test_resnet34_has_the_three_groups_of_fast_ai():
    groups = LayerGroups.from_model(on_no_device(lambda: timm.create_model("resnet34")))
    assert groups.names == ["early", "middle", "head"]
    assert [outer_modules(groups, i) for i in range(3)] == [
        ["conv1", "bn1", "layer1", "layer2"],
        ["layer3", "layer4"],
        ["fc"],
    ]


@pytest.mark.parametrize("name", TIMM)
def test_timm_models_split_into_early_middle_and_head(name):
    model = on_no_device(lambda: timm.create_model(name, num_classes=3))
    check_split(model)


@pytest.mark.parametrize(("kind", "config"), TRANSFORMERS, ids=lambda value: getattr(value, "__name__", ""))
def test_models_of_transformers_split_into_early_middle_and_head(kind, config):
    check_split(on_no_device(lambda: kind(config)))


def check_split(model: nn.Module) -> None:
    groups = LayerGroups.from_model(model)
    assert groups.names == ["early", "middle", "head"]
    names = [name for i in range(3) for name in groups.parameter_names(i)]
    order = [name for name, _ in model.named_parameters()]
    assert sorted(names) == sorted(order)
    assert all(groups.parameter_names(i) for i in range(3))
    sizes = [sum(p.numel() for p in groups.parameters(i)) for i in range(3)]
    assert sizes[2] < 0.1 * sum(sizes)
    first = [order.index(groups.parameter_names(i)[0]) for i in range(2)]
    assert first[0] == 0 < first[1]


def test_two_groups_are_body_and_head_and_five_are_numbered():
    model = on_no_device(lambda: timm.create_model("resnet34"))
    assert LayerGroups.from_model(model, 2).names == ["body", "head"]
    assert LayerGroups.from_model(model, 5).names == ["body_1", "body_2", "body_3", "body_4", "head"]


@pytest.mark.parametrize(
    ("model", "n_groups", "message"),
    [
        (
            lambda: nn.Linear(2, 2),
            3,
            "Linear cannot be split into layer groups: its head cannot be told from its body.",
        ),
        (lambda: timm.create_model("resnet18"), 9, "n_groups=9: the body of ResNet has 5 stages, so at most 6 groups"),
        (lambda: timm.create_model("resnet18"), 1, "n_groups=1: must be an integer >= 2"),
    ],
)
def test_what_cannot_be_split_says_so(model, n_groups, message):
    with pytest.raises(ValueError, match=r"split|groups") as error:
        LayerGroups.from_model(on_no_device(model), n_groups)
    assert str(error.value).startswith(message)


def test_groups_can_be_given_by_hand_and_must_cover_the_model():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    groups = LayerGroups(model, {"a": ["0.weight", "0.bias"], "b": ["1.weight", "1.bias"]})
    assert groups.parameters(-1) == list(model[1].parameters())
    with pytest.raises(ValueError, match=r"exactly one layer group; look at \['1.bias'\]"):
        LayerGroups(model, {"a": ["0.weight", "0.bias"], "b": ["1.weight"]})


@pytest.fixture
def groups(tiny_model) -> LayerGroups:
    return LayerGroups.from_model(tiny_model)


@pytest.mark.parametrize(
    ("n", "trains"),
    [(-1, [0, 0, 1]), (2, [0, 0, 1]), (-2, [0, 1, 1]), (1, [0, 1, 1]), (0, [1, 1, 1]), (-3, [1, 1, 1])],
)
def test_freeze_to_counts_as_python_does(groups, n, trains):
    groups.freeze_to(n)
    assert [all(p.requires_grad for p in groups.parameters(i)) for i in range(3)] == [bool(t) for t in trains]
    assert [any(p.requires_grad for p in groups.parameters(i)) for i in range(3)] == [bool(t) for t in trains]
    groups.unfreeze()
    assert all(p.requires_grad for i in range(3) for p in groups.parameters(i))


@pytest.mark.parametrize("n", [3, -4, 1.0, True, None])
def test_a_group_that_is_not_there_is_refused(groups, n):
    with pytest.raises(ValueError, match="there are 3 layer groups") as error:
        groups.freeze_to(n)
    assert str(error.value) == (
        f"freeze_to({n!r}): there are 3 layer groups (early, middle, head), so it must be an integer from -3 to 2."
    )


def statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: b.clone() for n, b in model.named_buffers() if n.endswith(("running_mean", "running_var"))}


def moved(model: nn.Module) -> set[str]:
    before = statistics(model)
    model.train()
    model(torch.randn(4, 3, 32, 32))
    return {
        name.rpartition(".")[0] for name, value in statistics(model).items() if not torch.equal(value, before[name])
    }


def test_frozen_batch_norms_stand_still_in_training_mode(groups, tiny_model):
    everything = {name.rpartition(".")[0] for name in statistics(tiny_model)}
    assert moved(tiny_model) == everything
    groups.freeze_to(-1)
    assert moved(tiny_model) == set()
    groups.freeze_to(1)
    middle = moved(tiny_model)
    assert middle
    assert all(".layer3" in name or ".layer4" in name for name in middle)
    groups.unfreeze()
    assert moved(tiny_model) == everything


@pytest.mark.parametrize("copied", [False, True], ids=["the model itself", "a deep copy"])
def test_other_groups_of_a_model_release_the_batch_norms_that_earlier_ones_held(groups, tiny_model, copied):
    groups.freeze_batch_norm = True
    groups.freeze_to(-1)
    model = copy.deepcopy(tiny_model) if copied else tiny_model
    assert moved(model) == set()
    others = LayerGroups.from_model(model)
    assert others.frozen == 2
    others.unfreeze()
    assert moved(model) == {name.rpartition(".")[0] for name in statistics(model)}
    assert groups.frozen == (2 if copied else 0)
    if copied:
        assert moved(tiny_model) == set()


def test_hooks_of_others_stay(groups, tiny_model):
    called = []
    tiny_model.timm_model.bn1.register_forward_pre_hook(lambda module, args: called.append(module))
    groups.freeze_to(-1)
    groups.unfreeze()
    tiny_model(torch.randn(2, 3, 32, 32))
    assert called == [tiny_model.timm_model.bn1]


def test_batch_norms_that_train_can_be_kept_still(groups, tiny_model):
    groups.freeze_batch_norm = True
    assert moved(tiny_model) == set()
    assert all(parameter.requires_grad for parameter in tiny_model.parameters())
    groups.freeze_batch_norm = False
    assert moved(tiny_model)


@pytest.mark.parametrize(
    ("lrs", "expected"),
    [
        (0.1, [0.1, 0.1, 0.1]),
        ([1e-4, 1e-3, 1e-2], [1e-4, 1e-3, 1e-2]),
        (torch.tensor([1.0, 2.0, 3.0]), [1.0, 2.0, 3.0]),
        (slice(1e-4, 1e-2), pytest.approx([1e-4, 1e-3, 1e-2])),
    ],
)
def test_each_group_has_its_rate(groups, lrs, expected):
    param_groups = groups.param_groups(lrs)
    assert [group["lr"] for group in param_groups] == expected
    assert [group["name"] for group in param_groups] == ["early", "middle", "head"]
    assert sum(len(group["params"]) for group in param_groups) == len(list(groups.model.parameters()))
    torch.optim.SGD(param_groups)


@pytest.mark.parametrize(
    ("lrs", "message"),
    [
        (
            [1e-3, 1e-2],
            "2 learning rates for 3 layer groups (early, middle, head): "
            "give one number for all of them, or one rate a group.",
        ),
        (
            -1.0,
            "Learning rates -1.0: each must be a finite number, zero or more, and one above zero; give one number, "
            "one a layer group, or slice(lowest, highest).",
        ),
        (
            float("nan"),
            "Learning rates nan: each must be a finite number, zero or more, and one above zero; give one number, "
            "one a layer group, or slice(lowest, highest).",
        ),
        (slice(1e-3), "slice(None, 0.001, None): give slice(lowest, highest), both rates finite numbers above 0."),
    ],
)
def test_wrong_rates_are_refused(groups, lrs, message):
    with pytest.raises(ValueError, match=r"rates|lowest") as error:
        groups.param_groups(lrs)
    assert str(error.value) == message


def test_biases_and_normalisation_weights_do_not_decay(groups, tiny_model):
    param_groups = groups.param_groups([1.0, 2.0, 3.0], weight_decay=0.1)
    names = {id(parameter): name for name, parameter in tiny_model.named_parameters()}
    decayed = {names[id(p)] for group in param_groups if group["weight_decay"] == 0.1 for p in group["params"]}
    spared = {names[id(p)] for group in param_groups if group["weight_decay"] == 0.0 for p in group["params"]}
    assert "timm_model.bn1.weight" in spared
    assert {name for name in decayed | spared if name.endswith("bias")} <= spared
    assert all(tiny_model.get_parameter(name).ndim > 1 for name in decayed)
    assert decayed | spared == set(names.values())
    assert [(group["name"], group["lr"]) for group in param_groups] == [
        ("early", 1.0), ("early", 1.0), ("middle", 2.0), ("middle", 2.0), ("head", 3.0), ("head", 3.0),
    ]  # fmt: skip


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_on_a_stock_trainer_the_frozen_body_does_not_change_by_a_bit(groups, tiny_model, tmp_path, weight_decay):
    groups.freeze_to(-1)
    before = weights(tiny_model)
    optimizer = torch.optim.SGD(groups.param_groups([1e-3, 1e-2, 1e-1], weight_decay), momentum=0.9)
    rows = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 2} for i in range(8)]
    trainer = Trainer(
        tiny_model,
        TrainingArguments(str(tmp_path), max_steps=3, use_cpu=True, report_to="none", save_strategy="no"),
        train_dataset=rows,
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)),
    )
    trainer.train()
    head = set(groups.parameter_names(-1))
    for name, value in tiny_model.state_dict().items():
        assert torch.equal(before[name], value) == (name not in head), name


def test_layer_wise_decay_with_the_trainers_own_optimizer_in_one_line(groups, tiny_model, tmp_path):
    args = TrainingArguments(str(tmp_path), learning_rate=1e-3, weight_decay=0.1, use_cpu=True, report_to="none")
    optimizer = groups.optimizer(args, lr_decay=0.5)
    assert isinstance(optimizer, torch.optim.AdamW)
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {"early": 2.5e-4, "middle": 5e-4, "head": 1e-3}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}
    with pytest.raises(ValueError, match=r"lr_decay=1\.5: must be a share"):
        groups.optimizer(args, lr_decay=1.5)


def test_the_summary_counts_what_trains(groups, tiny_model):
    groups.freeze_to(1)
    first, *rows, last = groups.summary().splitlines()
    assert first.split() == ["group", "trains", "tensors", "parameters", "from", "to"]
    assert [row.split()[:2] for row in rows] == [["early", "no"], ["middle", "yes"], ["head", "yes"]]
    trained = sum(value.numel() for value in tiny_model.parameters() if value.requires_grad)
    assert last == f"{trained:,} of {sum(map(torch.numel, tiny_model.parameters())):,} parameters train"
    tiny_model.timm_model.conv1[0].weight.requires_grad_(True)
    groups.parameters(1)[0].requires_grad_(False)
    trained = sum(value.numel() for value in tiny_model.parameters() if value.requires_grad)
    _, *rows, last = groups.summary().splitlines()
    assert [row.split()[:2] for row in rows] == [["early", "partly"], ["middle", "partly"], ["head", "yes"]]
    assert last.startswith(f"{trained:,} of ")
    tiny_model.requires_grad_(False)
    _, *rows, last = groups.summary().splitlines()
    assert [row.split()[1] for row in rows] == ["no", "no", "no"]
    assert last.startswith("0 of ")


def test_the_same_parameters_decay_as_in_transformers_trainer(tmp_path):
    model = SwinForImageClassification(
        SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
    )
    args = TrainingArguments(str(tmp_path), weight_decay=0.1, use_cpu=True, report_to="none")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = LayerGroups.from_model(model).optimizer(args)
    decayed = {names[id(p)] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == set(Trainer(model, args).get_decay_parameter_names(model))
