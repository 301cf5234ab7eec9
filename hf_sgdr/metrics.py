"""Metrics of the `evaluate` library that need no network: `evaluate.load("accuracy")` asks the Hub for its code."""

from collections.abc import Callable
from typing import Any

import datasets
import evaluate
import numpy as np
from transformers import EvalPrediction


class Accuracy(evaluate.Metric):
    """The share of predictions that equal their reference; the same figure as `evaluate.load("accuracy")`."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")})
        return evaluate.MetricInfo(
            description="The share of correct predictions.",
            citation="",
            inputs_description="predictions, references: class ids.",
            features=features,
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


def accuracy_of_logits() -> Callable[[EvalPrediction], dict[str, float]]:
    """A `compute_metrics` for image classifiers: accuracy of the highest logit."""
    metric = Accuracy()

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions
        predicted = np.asarray(logits).argmax(axis=-1)
        return metric.compute(predictions=predicted, references=prediction.label_ids) or {}

    return compute
