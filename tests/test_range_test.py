import dataclasses
import math
import random
import re

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from hf_sgdr import LayerGroups, StagedUnfreezing
from hf_sgdr.optim.range_test import LRRangeResult, LRRangeTest
from hf_sgdr.optim.suggestions import edge, smooth, smoothed_losses


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.head(self.dropout(self.norm(torch.relu(self.body(x)))))
        loss = nn.functional.cross_entropy(logits, labels) if labels is not None else None
        return {"loss": loss, "logits": logits}


def rows(count: int = 64) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 4, generator=generator)
    return [{"x": row, "labels": (row.sum() > 0).long()} for row in x]


@pytest.fixture
def stock_trainer(make_stock_trainer):
    def make(model=None, **kwargs):
        values = {"learning_rate": 0.05, "max_grad_norm": 0, "per_device_train_batch_size": 8, "num_train_epochs": 2}
        return make_stock_trainer(model or TwoLayers(), rows(), **{**values, **kwargs})

    return make


def everything(trainer: Trainer) -> dict[str, object]:
    return {
        "weights": {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()},
        "grads": [parameter.grad for parameter in trainer.model.parameters()],
        "requires_grad": [parameter.requires_grad for parameter in trainer.model.parameters()],
        "training": [module.training for module in trainer.model.modules()],
        "generators": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
        "trainer": {name: value for name, value in vars(trainer).items() if name != "accelerator"},
        "state": vars(trainer.state).copy(),
        "prepared": {n: list(getattr(trainer.accelerator, n)) for n in ("_models", "_optimizers", "_dataloaders")},
        "gradient_state": (
            trainer.accelerator.gradient_state.sync_gradients,
            trainer.accelerator.gradient_state.dataloader_references,
        ),
    }


def assert_same(before: dict[str, object], after: dict[str, object]) -> None:
    for name, tensor in before.pop("weights").items():
        assert torch.equal(tensor, after["weights"][name]), name
    after.pop("weights")
    assert before == after


def test_rates_rise_exponentially_and_reach_both_ends():
    rates = LRRangeTest(1e-3, 10.0, 5).learning_rates()
    assert rates == pytest.approx([1e-3, 1e-2, 1e-1, 1.0, 10.0])
    assert rates[0] == 1e-3
    assert rates[-1] == 10.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 1.0, 10), "start_lr=0.0, end_lr=1.0: give 0 < start_lr < end_lr."),
        ((1.0, 0.1, 10), "start_lr=1.0, end_lr=0.1: give 0 < start_lr < end_lr."),
        ((1e-3, math.nan, 10), "start_lr=0.001, end_lr=nan: give 0 < start_lr < end_lr."),
        ((1e-3, 1.0, 1), "num_steps=1: must be an integer >= 2."),
    ],
)
def test_wrong_numbers_are_refused_before_any_work(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        LRRangeTest(*arguments)
    assert str(error.value) == message


def test_history_has_every_step_of_a_stock_trainer(stock_trainer):
    result = LRRangeTest(1e-5, 1.0, 30).run(stock_trainer())
    history = result.history
    assert set(history) == {"step", "lr", "loss", "smoothed_loss", "learning_rates"}
    assert history["step"] == list(range(30))
    assert history["lr"] == LRRangeTest(1e-5, 1.0, 30).learning_rates()
    assert history["smoothed_loss"] == pytest.approx(smoothed_losses(history["loss"], 0.98))
    assert result.stop_reason == "finished"


def test_minus_one_step_is_all_of_them_and_none_is_refused(stock_trainer):
    test = LRRangeTest(1e-5, 1e-3, 4)
    assert [len(test.run(stock_trainer(), max_steps=most).history["lr"]) for most in (None, -1, 3)] == [4, 4, 3]
    with pytest.raises(ValueError, match="max_steps=0: must be an integer >= 1"):
        test.run(stock_trainer(), max_steps=0)


def test_gradual_unfreezing_is_named_unless_what_it_freezes_is_frozen(make_stock_trainer, tiny_model, logs):
    rows = [{"pixel_values": torch.full((3, 32, 32), float(i % 2)), "labels": i % 2} for i in range(8)]
    trainer = make_stock_trainer(tiny_model, rows, callbacks=[StagedUnfreezing({0: -1, 1: 0})])
    LRRangeTest(1e-5, 1e-4, 2).run(trainer)
    assert logs.text.count("moves all parameters, which StagedUnfreezing does not at first") == 1
    LayerGroups.from_model(tiny_model).freeze_to(-1)
    LRRangeTest(1e-5, 1e-4, 2).run(trainer)
    assert logs.text.count("moves all parameters") == 1


def test_groups_keep_their_ratios_and_the_last_one_is_reported(stock_trainer):
    model = TwoLayers()
    optimizer = torch.optim.SGD(
        [{"params": model.body.parameters(), "lr": 0.01}, {"params": model.head.parameters(), "lr": 0.1}], lr=1.0
    )
    result = LRRangeTest(1e-3, 1.0, 10).run(stock_trainer(model, optimizers=(optimizer, None)))
    for lr, (early, head) in zip(result.history["lr"], result.history["learning_rates"], strict=True):
        assert head == lr
        assert early == pytest.approx(lr / 10)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.1]
    assert not optimizer.state


def test_gradient_accumulation_counts_optimizer_steps(stock_trainer):
    result = LRRangeTest(1e-5, 1e-4, 7).run(stock_trainer(gradient_accumulation_steps=3))
    assert len(result.history["loss"]) == 7
    assert all(0.2 < loss < 2 for loss in result.history["loss"])  # a mean, not a sum or a third


def test_everything_is_as_before(stock_trainer):
    trainer = stock_trainer()
    before = everything(trainer)
    LRRangeTest(1e-5, 10.0, 20).run(trainer)
    assert_same(before, everything(trainer))


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_everything_is_as_before_after_an_exception_inside(stock_trainer, error):
    trainer = stock_trainer()
    trainer.train()
    before = everything(trainer)
    steps = iter(range(5))
    original = trainer.compute_loss

    def breaks(*args, **kwargs):
        if next(steps, None) is None:
            raise error
        return original(*args, **kwargs)

    trainer.compute_loss = breaks
    with pytest.raises(type(error)):
        LRRangeTest(1e-3, 1.0, 20).run(trainer)
    del trainer.compute_loss
    assert_same(before, everything(trainer))


@pytest.mark.parametrize("precision", [{}, {"bf16": True}], ids=["float32", "autocast"])
def test_training_is_identical_with_and_without_a_test_before(stock_trainer, precision):
    weights = []
    for tests in (0, 2):
        torch.manual_seed(7)
        trainer = stock_trainer(**precision)
        for _ in range(tests):
            LRRangeTest(1e-4, 10.0, 15).run(trainer)
        trainer.train()
        weights.append(trainer.model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_without_a_batch_it_says_so(stock_trainer):
    trainer = stock_trainer(per_device_train_batch_size=65, dataloader_drop_last=True)
    before = everything(trainer)
    message = "no batch: 64 rows, for batches of 65 a process with dataloader_drop_last=True. Give more rows"
    with pytest.raises(ValueError, match=message):
        LRRangeTest().run(trainer)
    assert_same(before, everything(trainer))


def test_no_callback_is_called_and_nothing_is_written(stock_trainer, tmp_path):
    calls = []

    class Listener(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            calls.append("step")

        def on_log(self, args, state, control, **kwargs):
            calls.append("log")

    trainer = stock_trainer(callbacks=[Listener()])
    files = sorted(tmp_path.rglob("*"))
    LRRangeTest(1e-5, 1.0, 10).run(trainer)
    assert calls == []
    assert sorted(tmp_path.rglob("*")) == files


def test_it_stops_where_the_loss_diverges(stock_trainer):
    result = LRRangeTest(1e-2, 1e6, 60).run(stock_trainer())
    assert len(result.history["loss"]) < 60
    assert "learning rate" in result.stop_reason
    assert all(math.isfinite(loss) for loss in result.history["loss"])


def test_it_stops_at_a_loss_that_is_no_number(stock_trainer):
    trainer = stock_trainer()
    trainer.model.head.weight.data[0, 0] = math.inf
    result = LRRangeTest(1e-2, 1.0, 10).run(trainer)
    assert result.history["loss"] == []
    assert result.stop_reason.startswith("the loss was nan at step 0") or result.stop_reason.startswith(
        "the loss was inf"
    )
    assert result.suggestion() is None
    assert result.reason == "the test has 0 steps; a curve needs at least 8"
    result.plot()
    result.plot_lr()


def falling_curve() -> LRRangeResult:
    lrs = list(np.geomspace(1e-6, 10, 80))
    losses = [1 / (1 + (lr / 1e-2) ** 0.8) + (lr / 3) ** 2 for lr in lrs]
    history = {
        "step": list(range(80)),
        "lr": lrs,
        "loss": losses,
        "smoothed_loss": smoothed_losses(losses, 0.98),
        "learning_rates": [[lr / 10, lr] for lr in lrs],
    }
    return LRRangeResult(history, "finished", ["body", "head"])


def test_plots_take_and_return_axes():
    result = falling_curve()
    ax = result.plot()
    assert ax.get_xscale() == "log"
    assert len(ax.lines) == 3  # each step, the curve and the suggestion
    assert result.plot(ax) is ax
    rates = result.plot_lr()
    assert [line.get_label() for line in rates.lines] == ["body", "head"]


def test_an_unknown_method_is_named_with_those_that_exist():
    with pytest.raises(ValueError, match="method='best': give one of lesson, valley, steep, minimum"):
        falling_curve().suggestion("best")


def test_the_edge_is_where_the_loss_takes_off():
    lrs = list(np.geomspace(1e-6, 10, 80))
    losses = [0.3 if lr < 1e-2 else 3.0 for lr in lrs]
    result = LRRangeResult({"lr": lrs, "loss": losses, "smoothed_loss": losses, "learning_rates": []}, "finished")
    assert result.suggestion() is None
    assert 5e-3 < result.edge() < 2e-2
    assert falling_curve().edge() > 1


def test_one_step_above_is_an_edge_only_where_it_ended_the_test():
    lrs = list(np.geomspace(1e-4, 1.5e-3, 12))
    noisy, high = [0.3, 0.2] * 5 + [0.2, 1.2], [0.3, 0.2] * 5 + [1.2, 1.2]
    history = {"lr": lrs, "loss": noisy, "smoothed_loss": noisy, "learning_rates": []}
    result = LRRangeResult(history, "finished")
    assert edge(lrs, noisy) == lrs[-1]
    assert result.edge() is None
    assert dataclasses.replace(result, stop_reason="the loss was nan").edge() == lrs[-1]
    assert dataclasses.replace(result, history={**history, "loss": high}).edge() == lrs[-2]
    flat = {**history, "loss": [0.3] * 12}
    assert dataclasses.replace(result, history=flat, stop_reason="the loss was nan").edge() == lrs[-1]


def test_its_repr_is_one_short_line(stock_trainer):
    result = LRRangeTest(1e-3, 1.0, 10).run(stock_trainer())
    assert repr(result) == "LRRangeResult(10 steps, 1.0e-03 to 1.0e+00, stop_reason='finished')"
    assert repr(dataclasses.replace(result, history={name: [] for name in result.history})).startswith(
        "LRRangeResult(0 steps,"
    )


def words(ax):
    return [text.get_text() for text in (*ax.get_legend().get_texts(), *ax.texts)]


def test_the_picture_says_what_the_suggestion_follows_from():
    result = falling_curve()
    ax = result.plot()
    low, high = ax.patches[0].get_x(), ax.patches[0].get_x() + ax.patches[0].get_width()
    assert (
        low
        < result.suggestion()
        < high
        == pytest.approx(result.history["lr"][int(np.argmin(smooth(result.history["loss"])))])
    )
    assert words(ax) == ["the loss falls", f"suggested: {result.suggestion():.1e}, where 85% of the fall is done"]
    assert ax.lines[0].get_ydata().tolist() == result.history["loss"]
    assert ax.lines[0].get_alpha() < 0.5


def test_where_there_is_no_suggestion_the_picture_has_the_reason_and_the_edge():
    lrs = list(np.geomspace(1e-6, 10, 80))
    losses = [0.3 if lr < 1e-2 else 3.0 for lr in lrs]
    result = LRRangeResult({"lr": lrs, "loss": losses, "smoothed_loss": losses, "learning_rates": []}, "finished")
    edge, reason = words(result.plot())
    assert edge == f"below {result.edge():.1e}, where the loss takes off"
    assert " ".join(reason.split()).startswith("No suggestion: the loss does not clearly fall: its smoothed curve")


def test_a_rate_above_the_suggestion_was_chosen_by_how_far_it_can_go():
    result = falling_curve()
    suggested, edge = result.suggestion(), result.edge()
    below = words(result.plot(chosen=suggested / 2))
    assert below == [*words(result.plot()), f"chosen: {suggested / 2:.1e}"]
    assert words(result.plot(chosen=suggested * 2)) == [
        f"below {edge:.1e}, where the loss takes off",
        f"chosen: {suggested * 2:.1e}",
    ]
    lrs = result.history["lr"][:60]  # before it takes off
    history = {"lr": lrs, "loss": result.history["loss"][:60], "smoothed_loss": [], "learning_rates": []}
    assert words(LRRangeResult(history, "finished").plot(chosen=lrs[-1])) == [
        "the loss does not take off",
        f"chosen: {lrs[-1]:.1e}",
    ]


def test_ends_can_be_left_out_of_the_picture_and_still_count():
    result = falling_curve()
    ax = result.plot(skip_start=10, skip_end=5)
    assert ax.lines[1].get_xdata().tolist() == result.history["lr"][10:-5]
    assert words(ax) == words(result.plot())
    with pytest.raises(ValueError, match=r"skip_start=50 and skip_end=30 leave none of 80 steps: give less"):
        result.plot(skip_start=50, skip_end=30)
    with pytest.raises(ValueError, match=r"skip_end=-1: must be an integer >= 0"):
        result.plot(skip_end=-1)
