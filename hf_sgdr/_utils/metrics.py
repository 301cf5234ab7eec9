"""Metrics of the `evaluate` library that need no network: `evaluate.load("accuracy")` asks the Hub for its code."""

from collections.abc import Callable
from typing import Any

import datasets
import evaluate
import numpy as np
from numpy.typing import NDArray
from transformers import EvalPrediction

_CLASS_IDS = {"predictions": datasets.Value("int32"), "references": datasets.Value("int32")}


class Accuracy(evaluate.Metric):
    """The share of predictions that equal their reference; the same figure as `evaluate.load("accuracy")`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="The share of correct predictions.",
            citation="",
            inputs_description="predictions, references: class ids.",
            features=datasets.Features(_CLASS_IDS),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


class MacroAverages(evaluate.Metric):
    """Precision, recall and F1, each the plain mean over the classes, so that a rare class counts like a frequent one.

    The same figures as scikit-learn's with `average="macro", zero_division=0`: over the classes that occur among
    predictions or references, 0 where one is undefined.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Precision, recall and F1, averaged over the classes.",
            citation="",
            inputs_description="predictions, references: class ids.",
            features=datasets.Features(_CLASS_IDS),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        predicted, truth = np.asarray(predictions), np.asarray(references)
        classes = np.union1d(predicted, truth)
        right = np.array([((predicted == one) & (truth == one)).sum() for one in classes])
        of_predicted = np.array([(predicted == one).sum() for one in classes])
        of_truth = np.array([(truth == one).sum() for one in classes])
        return {
            "precision": float((right / np.maximum(of_predicted, 1)).mean()),
            "recall": float((right / np.maximum(of_truth, 1)).mean()),
            "f1": float((2 * right / (of_predicted + of_truth)).mean()),
        }


def class_metrics(predicted: NDArray[Any], labels: NDArray[Any]) -> dict[str, float]:
    """[`Accuracy`] and [`MacroAverages`] together: accuracy, precision, recall and f1.

    Args:
        predicted, labels (arrays of int (images,)): class ids.
    """
    return evaluate.combine([Accuracy(), MacroAverages()]).compute(predictions=predicted, references=labels) or {}


def accuracy_of_logits() -> Callable[[EvalPrediction], dict[str, float]]:
    """A `compute_metrics` for image classifiers: accuracy of the highest logit."""
    metric = Accuracy()

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions
        predicted = np.asarray(logits).argmax(axis=-1)
        return metric.compute(predictions=predicted, references=prediction.label_ids) or {}

    return compute
