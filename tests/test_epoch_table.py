import re

import pytest
import torch
from helpers import losses

from hf_sgdr.callbacks import epoch_table


def test_the_epoch_table_has_a_line_an_epoch(make_trainer, capsys):
    trainer = make_trainer(precompute=True)
    capsys.readouterr()
    trainer.fit(1e-2, 2)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    header, *table = [line for line in lines if line[0] in ("epoch", "1", "2")]
    assert " ".join(header) == "epoch train loss valid loss accuracy lr (head) time"
    assert [line[0] for line in table] == ["1", "2"]
    assert [float(line[2]) for line in table] == pytest.approx(losses(trainer), abs=1e-4)
    assert {line[4] for line in table} == {"1.00e-02"}


def test_the_epoch_table_shows_metrics_called_loss_and_the_losses_of_several_sets(make_trainer, images, capsys):
    sets = {"a": images["validation"], "b": images["validation"].select(range(4))}
    trainer = make_trainer(
        precompute=True,
        eval_dataset=sets,
        compute_metrics=lambda predicted: {"accuracy": 0.5, "log_loss": 0.25, "loss_per_second": 0.125},
    )
    capsys.readouterr()
    trainer.fit(1e-2, 2)
    header, *lines = capsys.readouterr().out.splitlines()
    names = ["a_loss", "a_accuracy", "a_log_loss", "a_loss_per_second", "b_loss", "b_accuracy", "b_log_loss"]
    assert header.split() == ["epoch", "train", "loss", *names, "b_loss_per_second", "lr", "(head)", "time"]
    assert [line.split()[0] for line in lines] == ["1", "2"]
    assert [float(line.split()[2]) for line in lines] == pytest.approx(losses(trainer, "eval_a_loss"), abs=1e-4)
    assert [float(line.split()[6]) for line in lines] == pytest.approx(losses(trainer, "eval_b_loss"), abs=1e-4)
    trainer = make_trainer(precompute=True, compute_metrics=lambda predicted: {"log_loss": 0.25})
    trainer.fit(1e-2, 1)
    assert capsys.readouterr().out.splitlines()[1].split()[2:4] == [f"{losses(trainer, 'eval_loss')[0]:.4f}", "0.2500"]


def test_a_star_marks_the_lowest_loss_so_far_also_of_earlier_fits(make_trainer, capsys):
    trainer = make_trainer(precompute=True)
    capsys.readouterr()
    lines, history = [], []
    for rate in (1e-2, 1e-2, 10.0):
        trainer.fit(rate, 2)
        lines += [line for line in capsys.readouterr().out.splitlines() if line.split()[0] in "12"]
        history += losses(trainer)
    assert [line.endswith(" *") for line in lines] == [
        loss < min(history[:number], default=float("inf")) for number, loss in enumerate(history)
    ]
    epoch_table.print_row(trainer, "worse", {"eval_loss": 9.0}, 0.5)
    assert not capsys.readouterr().out.rstrip().endswith("*")
    assert lines[0].endswith(" *")


@pytest.mark.parametrize("eval_strategy", ["epoch", "no"])
@pytest.mark.parametrize("sets", ["one", "two"])
def test_where_no_training_loss_is_logged_a_line_has_a_dash(
    make_stock_trainer, tiny_model, capsys, eval_strategy, sets
):  # fmt: skip
    rows = [{"pixel_values": torch.full((3, 32, 32), float(i % 2)), "labels": i % 2} for i in range(8)]
    eval_dataset = {"a": rows[:4], "b": rows} if sets == "two" else rows
    values = {"num_train_epochs": 2, "eval_strategy": eval_strategy, "eval_on_start": eval_strategy == "epoch"}
    trainer = make_stock_trainer(tiny_model, rows, eval_dataset=eval_dataset, **values)
    epoch_table.show_epoch_table(trainer)
    trainer.train()
    trainer.evaluate()
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["epoch", "train", "loss"]
    assert [line.split()[:2] for line in lines if line[:5] != "best:"] == [["1", "–"], ["2", "–"]]


def test_in_a_notebook_the_table_is_html_in_one_place(make_trainer, monkeypatch, capsys):
    ipython = pytest.importorskip("IPython.display")
    shown = []

    class Handle:
        def update(self, html):
            shown[-1] = html.data

    def display(html, display_id):
        shown.append(html.data)
        return Handle()

    monkeypatch.setattr(epoch_table, "is_in_notebook", lambda: True)
    monkeypatch.setattr(ipython, "display", display)
    trainer = make_trainer(precompute=True)
    capsys.readouterr()
    trainer.fit(1e-2, 2)
    epoch_table.print_row(trainer, "<average>", {"eval_loss": 1e-9, "eval_accuracy": 1.0}, 0.5)
    trainer.fit(1e-2, 1)
    assert capsys.readouterr().out == ""
    assert [re.findall(r"<tr><td>(?:<b>)?(.*?)<", html) for html in shown] == [["1", "2", "&lt;average&gt;"], ["1"]]
    assert "<td><b>0.0000</b></td>" in shown[0]  # the average's loss
    assert "<b>" not in shown[1]
