"""Metrics of the `evaluate` library that need no network: `evaluate.load("accuracy")` asks the Hub for its code."""

import math
from typing import Any

import datasets
import evaluate
import numpy as np
from numpy.typing import NDArray
from transformers import EvalPrediction

# The 97.5 % point of the normal distribution, for an interval of 95 %.
Z_95 = 1.959964


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


def average_precision(scores: NDArray[Any], truth: NDArray[Any]) -> float:
    """The area below precision against recall, as scikit-learn's `average_precision_score`; 0 where nothing is true.

    Args:
        scores (array of float (images,)): the higher, the likelier.
        truth (array of bool (images,)): which images are of the class.
    """
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(truth[order])
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # equal scores come at once
    precision, recall = hits[ends] / (ends + 1), hits[ends] / max(hits[-1], 1)
    return float((precision * np.diff(recall, prepend=0)).sum())


def multi_label_metrics(probabilities: NDArray[Any], truth: NDArray[Any], threshold: float = 0.5) -> dict[str, float]:
    """Macro mean average precision and macro-F1, over the labels that some image has.

    Args:
        probabilities (array of float (images, classes)): of each label by itself.
        truth (array (images, classes)): 0 and 1.
        threshold (`float`, *optional*, defaults to 0.5): a label is predicted above this probability.
    """
    is_there, said = truth > 0.5, probabilities > threshold
    kept = np.flatnonzero(is_there.any(axis=0))
    right = (is_there & said).sum(axis=0)
    f1 = 2 * right / np.maximum(is_there.sum(axis=0) + said.sum(axis=0), 1)
    precisions = [average_precision(probabilities[:, i], is_there[:, i]) for i in kept]
    return {"map": float(np.mean(precisions or [0.0])), "f1": float(f1[kept].mean()) if len(kept) else 0.0}


def multi_label_of_logits(prediction: EvalPrediction) -> dict[str, float]:
    """[`multi_label_metrics`], a `compute_metrics` for several labels an image."""
    logits = np.asarray(prediction.predictions, dtype=np.float64)
    return multi_label_metrics(np.exp(-np.logaddexp(0, -logits)), np.asarray(prediction.label_ids))


def balanced_accuracy(predicted: NDArray[Any], labels: NDArray[Any]) -> float:
    """The mean recall of the classes that occur, as scikit-learn's `balanced_accuracy_score`."""
    return float(np.mean([(predicted[labels == label] == label).mean() for label in np.unique(labels)]))


def unbalanced_of_logits(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy, balanced accuracy and macro-F1 of the highest logit, a `compute_metrics` for unequal classes."""
    predicted, labels = np.asarray(prediction.predictions).argmax(axis=-1), np.asarray(prediction.label_ids)
    metrics = class_metrics(predicted, labels)
    balanced = balanced_accuracy(predicted, labels)
    return {"accuracy": metrics["accuracy"], "balanced_accuracy": balanced, "f1": metrics["f1"]}


def accuracy_of_logits(prediction: EvalPrediction) -> dict[str, float]:
    """The accuracy of the highest logit, a `compute_metrics` for image classifiers."""
    predicted = np.asarray(prediction.predictions).argmax(axis=-1)
    return Accuracy().compute(predictions=predicted, references=prediction.label_ids) or {}


def wilson_interval(right: int, count: int) -> tuple[float, float]:
    """The interval of a share, `right` of `count`, with 95 % confidence.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    share, spread = right / count, Z_95 * Z_95 / count
    middle = (share + spread / 2) / (1 + spread)
    half = Z_95 / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)
