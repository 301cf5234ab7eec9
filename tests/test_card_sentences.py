import hashlib

import pytest
from scipy.stats import binomtest

from hf_sgdr.hub.card_sentences import figure, local_origin, stage_row, views, wilson_interval

STAGE = {
    "name": "whole", "epochs": 3, "cycles": 2, "learning_rates": [1e-5, 1e-4, 1e-3], "train_loss": 0.25,
    "eval_loss": 0.125, "eval_accuracy": None, "seconds": 2.04, "precompute": False, "freeze_to": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("freeze_to", "precompute", "trains", "rates"),
    [
        (0, False, "everything", "early 1e-05, middle 0.0001, head 0.001"),
        (1, False, "middle, head", "middle 0.0001, head 0.001"),
        (-1, True, "head, on precomputed features", "head 0.001"),
        (2, False, "head", "head 0.001"),
    ],
)
def test_a_row_of_a_stage_names_what_trains_and_its_rates_alone(freeze_to, precompute, trains, rates):
    row = stage_row(STAGE | {"freeze_to": freeze_to, "precompute": precompute}, ["early", "middle", "head"])
    assert (row["trains"], row["rates"]) == (trains, rates)
    assert (row["train_loss"], row["eval_loss"], row["eval_accuracy"], row["seconds"]) == (
        "0.2500",
        "0.1250",
        "–",
        "2.0",
    )


def test_figures_and_views_in_words():
    assert [figure(0.98765), figure(1), figure(None)] == ["0.9877", "1.0000", "–"]
    assert [views(1), views(4)] == ["1 augmented view", "4 augmented views"]


@pytest.mark.parametrize(("right", "count"), [(0, 7), (5, 5), (198, 200), (1, 3)])
def test_wilsons_interval_is_scipys(right, count):
    expected = binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert wilson_interval(right, count) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_weights_from_a_file_are_told_by_their_digest_and_not_by_their_place(tmp_path):
    file = tmp_path / "body.pth"
    file.write_bytes(b"weights")
    said = local_origin("resnet34", str(file), True)
    assert "body.pth" in said
    assert f"SHA-256 {hashlib.sha256(b'weights').hexdigest()}" in said
    assert str(tmp_path) not in said
    assert local_origin("resnet34", None, False) == "It started from random weights."
    assert local_origin(str(tmp_path), None, True) == "It started from a model in a local folder."
    assert local_origin("timm/resnet34.a1_in1k", None, True) is None
