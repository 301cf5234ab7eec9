"""Progress in logs: plain lines, no carriage returns, and nothing where nobody is to see it."""

import time

from hf_sgdr._utils import system
from hf_sgdr._utils.system import followed, progress_bar


def test_in_a_log_a_line_comes_every_half_minute(monkeypatch, capfd):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    assert list(followed(range(8), "Features (train)", 8)) == list(range(8))
    assert capfd.readouterr().err.splitlines() == [
        "Features (train): 3 of 8 images in 00:30, 00:50 to go",
        "Features (train): 6 of 8 images in 01:00, 00:20 to go",
    ]


def test_of_a_stream_nobody_knows_the_end(monkeypatch, capfd):
    monkeypatch.setattr(system, "PROGRESS_SECONDS", 0.0)
    with progress_bar("Features (stream)") as bar:
        bar.update(1024)
    assert capfd.readouterr().err == "Features (stream): 1,024 images in 00:00\n"


def test_short_work_and_other_processes_say_nothing(capfd):
    list(followed(range(100), "Checking images", 100))
    with progress_bar(None, 100) as bar:
        bar.update(100)
    assert capfd.readouterr().err == ""


def test_on_a_terminal_a_bar_is_shown_unless_none_is_wanted(monkeypatch, capfd):
    monkeypatch.setattr(system, "shows_bars", lambda: True)
    list(followed(range(3), "Checking images", 3))
    assert "\rChecking images: 100%" in capfd.readouterr().err
    list(followed(range(3), "Checking images", 3, bars=False))
    assert capfd.readouterr().err == ""
