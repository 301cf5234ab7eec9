"""Classes of unequal size: weights in the loss and in the solved head, metrics that see rare classes, a warning."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, Features, Image
from helpers import losses, tiny_vit, weights
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, f1_score
from transformers import EvalPrediction

from hf_sgdr import SGDRTrainingArguments, Stage, balanced_loss, run_stages
from hf_sgdr._utils.metrics import unbalanced_of_logits
from hf_sgdr.optim.balance import BalancedLoss, class_weights
from hf_sgdr.optim.solve import solve_head

SPLITS = {"train": {"cats": 24, "dogs": 6}, "valid": {"cats": 5, "dogs": 5}}


def test_metrics_are_scikit_learns():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(60, 4)), rng.integers(0, 4, 60)
    metrics = unbalanced_of_logits(EvalPrediction(predictions=logits, label_ids=labels))
    predicted = logits.argmax(1)
    assert metrics["accuracy"] == (predicted == labels).mean()
    assert metrics["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert metrics["f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))


def test_weights_are_scikit_learns_balanced_ones():
    np.testing.assert_allclose(class_weights("balanced", [24, 6], 30, ["a", "b"]), [30 / 48, 30 / 12])
    np.testing.assert_allclose(class_weights("balanced", [24, 0, 6], 30, ["a", "b", "c"]), [30 / 48, 1, 30 / 12])
    np.testing.assert_allclose(class_weights({"b": 3.0}, [24, 6], 30, ["a", "b"]), [1, 3])
    np.testing.assert_allclose(class_weights("balanced", [10, 20], 30, ["a", "b"], True), [2, 0.5])


def test_the_loss_is_torchs_weighted_one_while_gradients_are_wanted():
    labels = torch.tensor([0, 0, 0, 1])
    loss, logits = balanced_loss(labels), torch.randn(4, 2, requires_grad=True)
    expected = F.cross_entropy(logits, labels, weight=torch.tensor([4 / 6, 4 / 2]), reduction="none")
    torch.testing.assert_close(loss({"logits": logits}, labels), expected.mean())
    torch.testing.assert_close(loss({"logits": logits}, labels, num_items_in_batch=8), expected.sum() / 8)
    with torch.no_grad():
        torch.testing.assert_close(loss({"logits": logits}, labels), F.cross_entropy(logits, labels))
    several = torch.tensor([[1, 0], [0, 0], [1, 1], [1, 1]])
    loss = balanced_loss(several)
    assert loss.weights.tolist() == pytest.approx([1 / 3, 1.0])
    expected = F.binary_cross_entropy_with_logits(logits, several.float(), pos_weight=loss.weights)
    torch.testing.assert_close(loss({"logits": logits}, several), expected)
    with pytest.raises(ValueError, match="give class ids"):
        balanced_loss([[2, 0]])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_on_a_stock_trainer_training_is_weighted_and_evaluation_is_not(make_stock_trainer, accumulation):
    torch.manual_seed(0)
    rows = [{"pixel_values": torch.randn(3, 32, 32), "labels": int(i < 2)} for i in range(8)]
    options = {"eval_dataset": rows, "per_device_train_batch_size": 8 // accumulation, "max_steps": 1}
    options |= {"gradient_accumulation_steps": accumulation, "optim": "sgd", "learning_rate": 0.1}
    loss = balanced_loss([row["labels"] for row in rows])
    trainer = make_stock_trainer(tiny_vit(), rows, compute_loss_func=loss, **options)
    plain = make_stock_trainer(tiny_vit(), rows, **options).evaluate()["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain)
    model = tiny_vit()
    pixels, labels = (torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in ("pixel_values", "labels"))
    each = F.cross_entropy(model(pixel_values=pixels).logits, labels, torch.tensor([8 / 12, 8 / 4]), reduction="none")
    each.mean().backward()
    assert trainer.train().training_loss == pytest.approx(float(each.detach().mean()), rel=1e-5)
    bias = model.classifier.bias
    torch.testing.assert_close(trainer.model.classifier.bias, bias - 0.1 * bias.grad * min(1, 1 / norm_of(model)))


def norm_of(model):
    """The norm of all gradients, to which transformers clips those of a step by default."""
    return float(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm())


def test_a_last_class_without_images_has_the_weight_one():
    logits, labels = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 1, 1, 0])
    expected = torch.nn.functional.cross_entropy(logits, labels, torch.tensor([0.75, 1.5, 1.0]), reduction="none")
    torch.testing.assert_close(balanced_loss([0, 0, 1])({"logits": logits}, labels), expected.mean())


def test_labels_that_do_not_count_are_no_part_of_the_mean():
    logits, labels = torch.randn(4, 2, requires_grad=True), torch.tensor([0, -100, 1, -100])
    loss = balanced_loss([0, 0, 1])
    torch.testing.assert_close(loss({"logits": logits}, labels), loss({"logits": logits[::2]}, labels[::2]))
    with torch.no_grad():
        torch.testing.assert_close(loss({"logits": logits}, labels), F.cross_entropy(logits, labels))


def test_with_features_and_without_weights_count_alike(make_trainer):
    seen = []
    for precompute in (False, True):
        options = {"augment": None, "max_zoom": 1.0, "feature_dtype": "float32", "folder": str(precompute)}
        trainer = make_trainer(precompute=precompute, class_weights="balanced", **options)
        trainer.eval_transform = trainer.eval_transform.fast()
        trainer.train_transform = trainer.eval_transform
        trainer.fit(0.05, 2, cycle_len=1)
        seen.append((losses(trainer), trainer.history.fits[-1]["train_loss"]))
    np.testing.assert_allclose(seen[0][0], seen[1][0], atol=1e-4)
    assert seen[0][1] == pytest.approx(seen[1][1], abs=1e-4)


def test_micro_batches_change_nothing(make_trainer):
    ends = []
    for size in (8, 3):
        trainer = make_trainer(class_weights={"dogs": 3.0}, micro_batch_size=size, folder=str(size), augment=None)
        trainer.fit(0.05, 1)
        ends.append(weights(trainer.model))
    for key, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][key], atol=1e-5, rtol=1e-4)


def test_the_solved_head_has_the_weights_of_classes(make_trainer):
    trainer = make_trainer(class_weights="balanced", feature_dtype="float32", augment=None, max_zoom=1.0)
    solution = trainer.solve_head(strengths=[0.1], folds=3)
    trainer.precompute = True
    rows = trainer.features.training(trainer.train_dataset)
    features, labels = rows.features.double().numpy(), rows.labels.numpy()
    expected = LogisticRegression(C=0.1, class_weight="balanced", max_iter=5000).fit(features, labels)
    np.testing.assert_allclose((solution.weight[1] - solution.weight[0]).numpy(), expected.coef_[0], atol=2e-3)


def test_several_labels_have_weights_of_their_own():
    rng = np.random.default_rng(0)
    features = torch.from_numpy(rng.normal(size=(90, 12))).float()
    labels = np.stack([features[:, 0].numpy() > 1, features[:, 1].numpy() > 0], axis=1).astype(int)
    ones = np.where(labels == 1, [5.0, 2.0], 1.0)
    solution = solve_head(features, labels, strengths=[0.1], sample_weight=ones)
    for column in range(2):
        alone = LogisticRegression(C=0.1, max_iter=5000)
        alone.fit(features.double().numpy(), labels[:, column], sample_weight=ones[:, column])
        np.testing.assert_allclose(solution.weight[column], alone.coef_[0], atol=2e-3)


def test_unequal_classes_get_their_metrics_and_f1_may_choose(make_trainer):
    trainer = make_trainer(best_by="f1")
    results = run_stages(trainer, [Stage("head", lr=0.05, cycles=3, precompute=True)])
    for record in (*results.stages, results.best, results.solved):
        assert {"eval_accuracy", "eval_balanced_accuracy", "eval_f1"} <= record.keys()
    scores = [entry["eval_f1"] for entry in trainer.state.log_history if "eval_f1" in entry]
    assert results.best["eval_f1"] == max([*scores, results.solved["eval_f1"]])
    assert results.metrics == ["accuracy", "balanced_accuracy", "f1"]


def test_of_equal_scores_the_lowest_loss_is_kept(make_trainer):
    trainer = make_trainer(best_by="accuracy")
    results = run_stages(trainer, [Stage("head", lr=1e-6, cycles=3, precompute=True)])
    entries = [entry for entry in trainer.state.log_history if "eval_loss" in entry and entry["epoch"] > 0]
    best = min(entries, key=lambda entry: (-entry["eval_accuracy"], entry["eval_loss"]))
    if results.best["stage"] == "head":
        assert results.best["eval_loss"] == best["eval_loss"]
    assert (results.best["eval_accuracy"], -results.best["eval_loss"]) >= (best["eval_accuracy"], -best["eval_loss"])


def rows_of(counts):
    from PIL import Image as Pillow

    pixels = [Pillow.new("RGB", (40, 40), (i * 20 % 255, 0, 0)) for i in range(sum(counts))]
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    return Dataset.from_dict(
        {"image": pixels, "label": labels}, Features({"image": Image(), "label": ClassLabel(names=["cats", "dogs"])})
    )


@pytest.mark.parametrize(
    ("counts", "options", "is_warned", "has_f1"),
    [((20, 2), {}, True, True), ((20, 2), {"class_weights": "balanced"}, False, True), ((18, 2), {}, False, True),
     ((6, 2), {}, False, False), ((6, 2), {"best_by": "f1"}, False, True)],
)  # fmt: skip
def test_one_warning_at_ten_times_and_metrics_at_three(make_trainer, logs, counts, options, is_warned, has_f1):
    rows = rows_of(counts)
    trainer = make_trainer(images={"train": rows, "validation": rows}, **options)
    assert logs.text.count("rare classes count alike") == is_warned
    if is_warned:
        assert "cats has 20 training images and dogs 2" in logs.text
        assert "--class_weights balanced" in logs.text
    assert ("eval_f1" in trainer.evaluate()) == has_f1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_weights": "even"}, "class_weights='even': give \"balanced\", or weights above 0 by class name"),
        ({"class_weights": {"cats": 0}}, 'give "balanced", or weights above 0'),
        ({"class_weights": '{"cats": "x"}'}, 'give "balanced", or weights above 0'),
        (
            {"class_weights": "balanced", "label_smoothing_factor": 0.1},
            "class_weights and label_smoothing_factor: give one",
        ),
        ({"best_by": "recall"}, "best_by='recall': give loss, accuracy or f1."),
    ],
)
def test_bad_arguments_are_one_line(options, message, tmp_path):
    with pytest.raises(ValueError) as error:  # noqa: PT011  # its text is compared below
        SGDRTrainingArguments(str(tmp_path), use_cpu=True, **options)
    assert message in str(error.value)


def test_weights_by_name_are_checked_and_recorded(make_trainer):
    with pytest.raises(ValueError, match="class_weights: 'mice' not among 'cats', 'dogs'"):
        make_trainer(class_weights={"mice": 2.0})
    with pytest.raises(ValueError, match="class_weights and compute_loss_func: give one of the two"):
        make_trainer(class_weights="balanced", compute_loss_func=BalancedLoss([1.0, 1.0]))
    args = SGDRTrainingArguments("x", use_cpu=True, class_weights=json.dumps({"dogs": 2}))
    assert args.class_weights == {"dogs": 2.0}
