"""`report_to`, tried for real: TensorBoard's event files and Trackio's data base are read back."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hf_sgdr import Stage, run_stages
from hf_sgdr._utils.plots import new_axes
from hf_sgdr.callbacks.trackers import pixels
from hf_sgdr.training.stages import save_results

SPLITS = {"train": {"cats": 8, "dogs": 8}, "valid": {"cats": 4, "dogs": 4}}
STAGES = (
    Stage("head", lr="auto", cycles=1, cycle_len=1, range_test_steps=10),
    Stage("whole", lr=[1e-4, 1e-3, 1e-2], cycles=2, cycle_len=1, freeze_to=0),
)
GROUPS = ("early", "middle", "head")


def events(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


def scalars(run: EventAccumulator, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in run.Scalars(name)]


def picture(run: EventAccumulator, name: str) -> np.ndarray:
    (event,) = run.Images(name)
    return np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))


def test_tensorboard_has_each_fits_rates_cycles_losses_and_pictures(make_trainer, tmp_path):
    trainer = make_trainer(report_to="tensorboard", logging_strategy="steps", logging_steps=1)
    results = run_stages(trainer, STAGES)
    save_results(results, tmp_path / "out" / "results.json")  # which tidies up: the trackers' files must stay
    (began,) = (tmp_path / "out" / "runs").iterdir()
    assert sorted(path.name for path in began.iterdir()) == ["head", "whole"]

    head, whole = events(began / "head"), events(began / "whole")
    suggested = results.stages[0]["learning_rates"]
    assert scalars(head, "train/cycle") == [(1, 1), (2, 1)]
    assert scalars(whole, "train/cycle") == [(1, 1), (2, 1), (3, 2), (4, 2)]
    for number, name in enumerate(GROUPS):
        rate = 1e-4 * 10**number
        cosine = [rate, rate / 2] * 2  # two cycles of two steps
        steps, rates = zip(*scalars(whole, f"train/learning_rate/{name}"), strict=True)
        assert steps == (1, 2, 3, 4)
        assert rates == pytest.approx(cosine)
        assert scalars(head, f"train/learning_rate/{name}")[0] == (1, pytest.approx(suggested[number]))
    assert [step for step, _ in scalars(whole, "eval/loss")] == [2, 4]
    assert scalars(whole, "eval/accuracy")[-1][1] == pytest.approx(results.stages[1]["eval_accuracy"])

    assert head.Tags()["images"] == ["range_test", "learning_rates"]
    assert whole.Tags()["images"] == ["learning_rates"]  # its rates were given
    range_test = picture(head, "range_test")
    on_disk = np.asarray(Image.open(tmp_path / "out" / "head-range-test.png").convert("RGB"))
    assert np.array_equal(range_test, on_disk)
    assert np.array_equal(picture(whole, "learning_rates"), pixels(trainer.plot_lr()))


def test_a_folder_for_tensorboard_has_a_run_for_each_fit(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = make_trainer(report_to="tensorboard")
    trainer.fit(1e-2, 1)
    trainer.fit(1e-3, 1, cycle_len=1, name="annealed")
    assert sorted(path.name for path in (tmp_path / "board").iterdir()) == ["annealed", "fit-001"]
    assert "train/cycle" not in events(tmp_path / "board" / "fit-001").Tags()["scalars"]  # a constant rate has none
    assert scalars(events(tmp_path / "board" / "annealed"), "train/cycle") == [(2, 1)]


def test_a_range_test_alone_begins_no_run(make_trainer, tmp_path):
    make_trainer(report_to="tensorboard").lr_find(num_steps=5)
    assert not (tmp_path / "out" / "runs").exists()


def test_trackio_has_each_fits_rates_cycles_losses_and_pictures(make_trainer, tmp_path):
    import trackio
    from trackio.sqlite_storage import SQLiteStorage
    from trackio.utils import MEDIA_DIR

    assert Path(MEDIA_DIR).is_relative_to(os.environ["HF_HOME"])  # of the tests, not of the user
    trainer = make_trainer(
        report_to="trackio", project="lesson", run_name="dogscats", logging_strategy="steps", logging_steps=1
    )
    trainer.args.trackio_static_space_id = False
    run_stages(trainer, STAGES)
    assert sorted(run.name for run in trackio.Api().runs("lesson")) == ["dogscats-head", "dogscats-whole"]
    head, whole = (SQLiteStorage.get_logs("lesson", f"dogscats-{name}") for name in ("head", "whole"))

    def logged(run, name):
        return [(row["train/global_step"], row[name]) for row in run if name in row]

    assert logged(head, "train/cycle") == [(1, 1), (2, 1)]
    assert logged(whole, "train/cycle") == [(1, 1), (2, 1), (3, 2), (4, 2)]
    assert [rate for _, rate in logged(whole, "train/learning_rate/middle")] == pytest.approx([1e-3, 5e-4] * 2)
    assert len(logged(whole, "eval/accuracy")) == 2
    pictures = {name: row[name] for row in head for name in ("range_test", "learning_rates") if name in row}
    assert sorted(pictures) == ["learning_rates", "range_test"]
    on_disk = np.asarray(Image.open(tmp_path / "out" / "head-range-test.png").convert("RGB"))
    shown = np.asarray(Image.open(MEDIA_DIR / pictures["range_test"]["file_path"]).convert("RGB"))
    assert np.array_equal(shown, on_disk)


def test_without_a_tracker_nothing_is_drawn(make_trainer, monkeypatch):
    trainer = make_trainer(report_to="none")
    monkeypatch.setattr("hf_sgdr.callbacks.trackers.pixels", lambda axes: pytest.fail("drawn for nobody"))
    trainer.lr_find(num_steps=5)
    trainer.fit(1e-2, 1)


def test_the_pixels_of_a_plot_are_an_opaque_picture():
    ax = new_axes()
    ax.plot([0, 1], [0, 1])
    shown = pixels(ax)
    assert shown.dtype == np.uint8
    assert shown.shape == (480, 768, 3)  # 6.4 x 4 inches at 120 dots
    assert shown[0, 0].tolist() == [255, 255, 255]
    assert shown.min() < 100  # and something is drawn on it
