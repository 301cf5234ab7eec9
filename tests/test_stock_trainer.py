"""Each plug-in alone on a stock `transformers.Trainer`: a timm model, a ViT of transformers, a text classifier."""

import pytest
import torch
from datasets import Dataset
from helpers import Interrupt, cosine, same, tiny_resnet, tiny_vit, weights
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    TrainerCallback,
)

from hf_sgdr import (
    FeatureStore,
    LayerGroups,
    LRRangeTest,
    StagedUnfreezing,
    get_sgdr_schedule,
    image_transforms,
    load_image_folder,
)
from hf_sgdr.data.dataset import ImageDataset
from hf_sgdr.features.extract import extract_features
from hf_sgdr.features.head import FeatureDataset, whole_batch

ROWS, BATCH, STEPS = 24, 4, 6


def text() -> PreTrainedModel:
    return BertForSequenceClassification(BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=16, num_labels=2,
    ))  # fmt: skip


def rows_of(model: PreTrainedModel) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(ROWS) % 2
    if model.main_input_name == "pixel_values":
        inputs = torch.randn(ROWS, 3, 32, 32, generator=generator) + labels[:, None, None, None]
    else:
        inputs = torch.randint(0, 25, (ROWS, 8), generator=generator) + 25 * labels[:, None]
    return Dataset.from_dict({model.main_input_name: inputs.numpy(), "labels": labels.numpy()}).with_format("torch")


@pytest.fixture(params=[tiny_resnet, tiny_vit, text])
def model(request):
    torch.manual_seed(0)
    return request.param()


@pytest.fixture
def make_trainer(make_stock_trainer):
    def make(model, optimizer=None, scheduler=None, callbacks=None, **kwargs):
        values = {"seed": 1, "per_device_train_batch_size": BATCH, "num_train_epochs": 3, "logging_steps": 1, **kwargs}
        optimizers = (optimizer, scheduler)
        return make_stock_trainer(model, rows_of(model), optimizers=optimizers, callbacks=callbacks, **values)

    return make


class Watch(TrainerCallback):
    """What trains, and every group's rate, step by step."""

    def __init__(self):
        self.frozen, self.rates = [], []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.frozen.append({name for name, value in kwargs["model"].named_parameters() if value.grad is None})
        self.rates.append([group["lr"] for group in kwargs["optimizer"].param_groups])


def test_schedule_and_groups(model, make_trainer):
    groups = LayerGroups.from_model(model)
    optimizer = torch.optim.SGD(groups.param_groups([1e-4, 1e-3, 1e-2]), momentum=0.9)
    schedule = get_sgdr_schedule(optimizer, STEPS, 2, 2)
    watch = Watch()
    make_trainer(model, optimizer, schedule, [watch]).train()
    expected = [cosine(i, STEPS) for i in range(STEPS)] + [cosine(i, 2 * STEPS) for i in range(2 * STEPS)]
    for rates, multiplier in zip(watch.rates, expected, strict=True):
        assert rates == pytest.approx([rate * multiplier for rate in (1e-4, 1e-3, 1e-2)])


def test_range_test(model, make_trainer):
    trainer = make_trainer(model, optim="sgd")
    before = weights(model)
    result = LRRangeTest(1e-5, 1.0, 12).run(trainer)
    assert result.history["lr"][0] == pytest.approx(1e-5)
    assert len(result.history["loss"]) >= 5
    assert result.suggestion() is not None or result.reason
    assert same(before, model.state_dict())


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_staged_unfreezing(model, make_trainer, weight_decay):
    groups, watch = LayerGroups.from_model(model), Watch()
    optimizer = torch.optim.AdamW(groups.param_groups(1e-3, weight_decay=weight_decay))
    before = weights(model)
    seen = {}

    class Note(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            seen[round(state.epoch)] = weights(model)

    unfreezing = StagedUnfreezing({0: -1, 1: 1, 2: 0}, groups)
    make_trainer(model, optimizer, None, [unfreezing, watch, Note()]).train()
    names = [set(groups.parameter_names(i)) for i in range(3)]
    assert watch.frozen[0] == names[0] | names[1]
    assert watch.frozen[STEPS] == names[0]
    assert watch.frozen[2 * STEPS] == set()
    assert all(torch.equal(seen[1][name], before[name]) for name in names[0] | names[1])
    assert all(torch.equal(seen[2][name], before[name]) for name in names[0])
    assert not all(torch.equal(seen[2][name], before[name]) for name in names[1])
    assert not all(torch.equal(seen[3][name], before[name]) for name in names[0])
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_layer_groups_can_be_named_in_unfreezing(model, make_trainer):
    watch = Watch()
    make_trainer(model, callbacks=[StagedUnfreezing({0: "head", 1: "middle", 2: 0}), watch]).train()
    groups = LayerGroups.from_model(model)
    names = [set(groups.parameter_names(i)) for i in range(3)]
    assert watch.frozen[::STEPS] == [names[0] | names[1], names[0], set()]


def test_a_name_that_no_layer_group_has_is_refused(model, make_trainer):
    with pytest.raises(ValueError, match="StagedUnfreezing") as error:
        make_trainer(model, callbacks=[StagedUnfreezing({0: "head", 1: "body"})]).train()
    assert str(error.value) == "StagedUnfreezing: there is no layer group 'body'; there are early, middle, head."


def test_unfreezing_goes_on_where_it_was_after_a_resume(model, make_trainer, tmp_path):
    start = weights(model)
    make_trainer(model, callbacks=[StagedUnfreezing({0: -1, 1: 1, 2: 0})], save_strategy="epoch").train()
    expected = weights(model)
    model.load_state_dict(start)
    again = make_trainer(model, callbacks=[StagedUnfreezing({0: -1, 1: 1, 2: 0})])
    again.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{STEPS}"))
    assert same(expected, model.state_dict())


def test_one_callback_unfreezes_the_model_of_each_training(make_trainer):
    unfreezing = StagedUnfreezing({0: -1, 2: 0})
    for model in (tiny_vit(), tiny_vit()):
        watch = Watch()
        make_trainer(model, callbacks=[unfreezing, watch]).train()
        groups = LayerGroups.from_model(model)
        names = {*groups.parameter_names(0), *groups.parameter_names(1)}
        assert watch.frozen[::STEPS] == [names, names, set()]
    given = StagedUnfreezing({0: -1}, LayerGroups.from_model(tiny_vit()))
    with pytest.raises(ValueError, match="the layer groups are of another model than this ViTForImageClassification"):
        make_trainer(tiny_vit(), callbacks=[given]).train()


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


@pytest.mark.parametrize("resumed_at", [None, 2, STEPS + 2])
def test_epochs_of_data_without_a_length_are_counted(make_stock_trainer, tmp_path, resumed_at):
    model, watch = tiny_vit(), Watch()
    stream = Stream(list(rows_of(model)))
    values = {"per_device_train_batch_size": BATCH, "max_steps": 3 * STEPS, "save_strategy": "steps", "save_steps": 2}
    make_stock_trainer(model, stream, callbacks=[StagedUnfreezing({0: -1, 1: 1, 2: 0}), watch], **values).train()
    groups = LayerGroups.from_model(model)
    early, middle = (set(groups.parameter_names(i)) for i in range(2))
    assert watch.frozen == [early | middle] * STEPS + [early] * STEPS + [set()] * STEPS
    if resumed_at is not None:
        resumed = Watch()
        again = make_stock_trainer(model, stream, callbacks=[StagedUnfreezing({0: -1, 1: 1, 2: 0}), resumed], **values)
        again.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{resumed_at}"))
        assert resumed.frozen[:2] == watch.frozen[resumed_at : resumed_at + 2]
        if resumed_at < STEPS:
            assert resumed.frozen == watch.frozen[resumed_at:]


def test_parameters_are_as_frozen_after_training_as_before(make_trainer):
    model = tiny_resnet()
    groups = LayerGroups.from_model(model)
    optimizer = torch.optim.SGD(groups.param_groups(1e-2))
    groups.freeze_to(1)
    before = [parameter.requires_grad for parameter in model.parameters()]
    unfreezing = StagedUnfreezing({0: -1, 1: 1})
    trainer = make_trainer(model, optimizer, callbacks=[unfreezing, Interrupt("on_step_end", 2)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train()
    assert [parameter.requires_grad for parameter in model.parameters()] == before
    statistics = model.timm_model.bn1.running_mean.clone()
    model.train()
    model(torch.randn(4, 3, 32, 32))
    assert torch.equal(model.timm_model.bn1.running_mean, statistics)


def test_what_was_frozen_before_the_optimizer_was_made_is_refused(model, make_trainer):
    LayerGroups.from_model(model).freeze_to(-1)
    trainer = make_trainer(model, callbacks=[StagedUnfreezing({0: -1, 1: 0})])
    with pytest.raises(
        ValueError, match=r"are to train later, but were frozen when the optimizer was made\. Leave all"
    ):
        trainer.train()


@pytest.mark.parametrize("wrong", [{}, {1: 0}, {0: -1, -1: 0}, {0: 1.5}, {0: True}])
def test_stages_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match="StagedUnfreezing"):
        StagedUnfreezing(wrong)


def test_a_group_that_is_not_there_is_refused(model, make_trainer):
    with pytest.raises(ValueError, match=r"freeze_to\(5\): there are 3 layer groups"):
        make_trainer(model, callbacks=[StagedUnfreezing({0: -1, 1: 5})]).train()


def test_frozen_batch_norm(make_trainer):
    model = tiny_resnet()
    groups = LayerGroups.from_model(model)
    groups.freeze_to(1)
    before = weights(model)
    trainer = make_trainer(model, torch.optim.SGD(groups.param_groups(1e-2)))
    trainer.train()
    after = model.state_dict()
    statistics = [name for name in after if "running_" in name]
    early = {name.rpartition(".")[0] for name in groups.parameter_names(0)}
    still = [name for name in statistics if name.rpartition(".")[0] in early]
    assert still
    assert all(torch.equal(before[name], after[name]) for name in still)
    assert not any(torch.equal(before[name], after[name]) for name in statistics if name not in still)
    groups.freeze_batch_norm = True
    before = weights(model)
    make_trainer(model, torch.optim.SGD(groups.param_groups(1e-2))).train()
    assert all(torch.equal(before[name], model.state_dict()[name]) for name in statistics)


class Head(torch.nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, features, labels):
        logits = self.linear(features)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("make", [tiny_resnet, tiny_vit])
def test_the_feature_store(make, make_stock_trainer, make_image_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_SGDR_CACHE", str(tmp_path / "cache"))
    model = make()
    images = load_image_folder(make_image_folder(tmp_path / "images", {"train": {"cats": 8, "dogs": 8}}))["train"]
    transform = image_transforms(model, image_size=32)[1]
    head = LayerGroups.from_model(model).head
    store = extract_features(model, head, ImageDataset(images, transform), dtype=torch.float32)
    assert isinstance(store, FeatureStore)
    rows = FeatureDataset([store.read()], torch.tensor(images["label"]))
    trainer = make_stock_trainer(
        Head(head), rows, num_train_epochs=20, per_device_train_batch_size=4, learning_rate=1e-2,
        remove_unused_columns=False, logging_strategy="epoch", data_collator=whole_batch,
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
