import pytest
from helpers import Interrupt, losses, same
from transformers import TrainerCallback


class Worsen(TrainerCallback):
    """After two epochs the head goes uphill."""

    def on_epoch_begin(self, args, state, control, optimizer=None, **kwargs):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 if (state.epoch or 0) < 2 else -1e-1


@pytest.mark.parametrize("precompute", [True, False])
def test_keep_best_ends_with_the_weights_of_the_lowest_validation_loss(make_trainer, precompute, capsys):
    trainer = make_trainer(precompute=precompute, callbacks=[Worsen()])
    trainer.fit(1e-2, 4, keep_best=True)
    record, history = trainer.history.fits[-1], losses(trainer)
    best = history.index(min(history))
    assert best < 3
    assert record["best_epoch"] == record["kept"]["epoch"] == best + 1
    assert record["eval_loss"] == history[-1] > min(history) == record["kept"]["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(history), rel=1e-4)
    assert f"best: epoch {best + 1}, valid loss {min(history):.4f}" in capsys.readouterr().out


def test_without_keep_best_the_last_weights_stay_and_the_table_says_which_epoch_was_best(make_trainer, capsys):
    trainer = make_trainer(precompute=True, callbacks=[Worsen()])
    trainer.fit(1e-2, 4)
    history = losses(trainer)
    assert history[-1] > min(history)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(history[-1], rel=1e-4)
    assert trainer.history.fits[-1]["kept"]["eval_loss"] == history[-1]
    assert capsys.readouterr().out.count(f"best: epoch {1 + history.index(min(history))}, valid loss") == 1


def test_a_resumed_fit_keeps_the_best_of_what_was_before(make_trainer):
    values = {"precompute": True, "save_strategy": "epoch"}
    whole = make_trainer(folder="whole", callbacks=[Worsen()], **values)
    whole.fit(1e-2, 4, keep_best=True)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(callbacks=[Worsen(), Interrupt("on_step_end", 10)], **values).fit(1e-2, 4, keep_best=True)
    resumed = make_trainer(callbacks=[Worsen()], **values)
    resumed.fit(1e-2, 4, keep_best=True, resume_from_checkpoint=True)
    kept = whole.history.fits[-1]["kept"]
    assert resumed.history.fits[-1]["kept"] == kept
    assert kept["epoch"] <= 2
    assert same(whole.model.state_dict(), resumed.model.state_dict())


def test_keep_best_without_a_validation_loss_is_refused(make_trainer):
    with pytest.raises(ValueError, match="keep_best=True compares validation losses: it needs an eval_strategy"):
        make_trainer(eval_strategy="no").fit(1e-2, 1, keep_best=True)
