import numpy as np
from transformers import EvalPrediction

from hf_sgdr.metrics import Accuracy, accuracy_of_logits


def test_accuracy_is_the_share_of_equal_ids():
    assert Accuracy().compute(predictions=[0, 1, 1, 2], references=[0, 1, 2, 2]) == {"accuracy": 0.75}


def test_it_can_be_given_in_batches_as_every_metric_of_evaluate():
    metric = Accuracy()
    metric.add_batch(predictions=[0, 1], references=[0, 0])
    metric.add_batch(predictions=[1, 1], references=[1, 1])
    assert metric.compute() == {"accuracy": 0.75}


def test_logits_are_judged_by_the_highest():
    compute = accuracy_of_logits()
    logits = np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])
    assert compute(EvalPrediction(predictions=logits, label_ids=np.array([1, 0, 0]))) == {"accuracy": 2 / 3}
