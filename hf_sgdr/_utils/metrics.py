"""Metrics of the `evaluate` library that need no network: `evaluate.load("accuracy")` asks the Hub for its code."""

from typing import Any

import datasets
import evaluate
import numpy as np
from numpy.typing import NDArray
from transformers import EvalPrediction


class ClassMetric(evaluate.Metric):
    """A metric of predicted class ids and their references."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__,
            citation="",
            inputs_description="predictions, references: class ids.",
            features=datasets.Features({name: datasets.Value("int32") for name in ("predictions", "references")}),
        )


class Accuracy(ClassMetric):
    """The share of predictions that equal their reference; the same number as `evaluate.load("accuracy")`."""

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


class MacroAverages(ClassMetric):
    """Precision, recall and F1, each the plain mean over the classes, so that a rare class counts like a frequent one.

    The same numbers as scikit-learn's with `average="macro", zero_division=0`: over the classes that occur among
    predictions or references, 0 where one is undefined.
    """

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        classes, ids = np.unique([predictions, references], return_inverse=True)
        predicted, truth = ids.reshape(2, -1)
        counted = (predicted, truth, truth[predicted == truth])
        of_predicted, of_truth, right = (np.bincount(ids, minlength=len(classes)) for ids in counted)
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


def accuracy_of_logits(prediction: EvalPrediction) -> dict[str, float]:
    """The accuracy of the highest logit, a `compute_metrics` for image classifiers."""
    predicted = np.asarray(prediction.predictions).argmax(axis=-1)
    return Accuracy().compute(predictions=predicted, references=prediction.label_ids) or {}
