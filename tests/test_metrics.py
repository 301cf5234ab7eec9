import numpy as np
import pytest
from sklearn.metrics import precision_recall_fscore_support
from transformers import EvalPrediction

from hf_sgdr._utils.metrics import Accuracy, MacroAverages, accuracy_of_logits, class_metrics


def test_accuracy_is_the_share_of_equal_ids():
    assert Accuracy().compute(predictions=[0, 1, 1, 2], references=[0, 1, 2, 2]) == {"accuracy": 0.75}


def test_it_can_be_given_in_batches_as_every_metric_of_evaluate():
    metric = Accuracy()
    metric.add_batch(predictions=[0, 1], references=[0, 0])
    metric.add_batch(predictions=[1, 1], references=[1, 1])
    assert metric.compute() == {"accuracy": 0.75}


def test_logits_are_judged_by_the_highest():
    logits = np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])
    assert accuracy_of_logits(EvalPrediction(predictions=logits, label_ids=np.array([1, 0, 0]))) == {"accuracy": 2 / 3}


@pytest.mark.parametrize("seed", range(4))
def test_macro_averages_are_those_of_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    predicted, truth = rng.integers(0, 5, 60), rng.integers(seed, 6, 60)  # some classes on one side only
    expected = precision_recall_fscore_support(truth, predicted, average="macro", zero_division=0)
    found = MacroAverages().compute(predictions=predicted, references=truth)
    assert [found["precision"], found["recall"], found["f1"]] == pytest.approx(list(expected[:3]), rel=1e-12)


def test_class_metrics_are_both_together():
    predicted, truth = np.array([0, 1, 1]), np.array([0, 1, 0])
    found = class_metrics(predicted, truth)
    assert found == {"accuracy": 2 / 3, "precision": 0.75, "recall": 0.75, "f1": pytest.approx(2 / 3)}
