"""Training on precomputed features: the small model and the rows of data that take the places of the large.

Both are ordinary for a Trainer: a module with a loss, and a data set that indexes a whole batch at once.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from hf_sgdr.features.store import RowsOnDisk

Rows = torch.Tensor | RowsOnDisk


class FeatureDataset(Dataset[dict[str, torch.Tensor]]):
    """Rows of features and their labels; a whole batch is one indexing operation.

    Args:
        views (sequence of `Tensor` or [`RowsOnDisk`]): the features of each view of the images, each (rows, ...), of
            any floating type; epoch `e` gives view `e % len(views)`.
        labels (`Tensor`): (rows,), class ids.
    """

    def __init__(self, views: Sequence[Rows], labels: torch.Tensor) -> None:
        self.views, self.labels = views, labels
        self.features = views[0]

    def set_epoch(self, epoch: int) -> None:
        """Give the view of another epoch; [`DatasetEpoch`] calls it."""
        self.features = self.views[epoch % len(self.views)]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"features": self.features[index].float(), "labels": self.labels[index]}

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        rows = torch.as_tensor(indices)
        return {"features": self.features[rows].float(), "labels": self.labels[rows]}


def whole_batch(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The collator for a dataset that already returns whole batches."""
    return batch


class HeadClassifier(nn.Module):
    """A model's head alone, on precomputed features; its tensors are the model's own.

    Args:
        model (`PreTrainedModel`): the whole classifier, for its configuration and loss.
        head (`nn.Module`): the model's last layer group.
    """

    main_input_name = "features"

    def __init__(self, model: PreTrainedModel, head: nn.Module) -> None:
        super().__init__()
        self.head = head
        self.config = model.config
        self._whole = (model,)  # in a tuple, because it is no part of this module
        self.loss_function = model.loss_function

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """A head alone has no activations worth computing twice; the Trainer asks for it all the same."""

    gradient_checkpointing_enable = activation_checkpointing_enable  # its name before transformers 5.23

    @property
    def whole_model(self) -> PreTrainedModel:
        """The model that the head belongs to."""
        return self._whole[0]

    def forward(
        self, features: torch.Tensor, labels: torch.Tensor | None = None, **loss_kwargs: Any
    ) -> ImageClassifierOutput:
        """Logits (batch, classes), and the model's own loss where labels are given."""
        logits = self.head(features)
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **loss_kwargs)
        return ImageClassifierOutput(loss=loss, logits=logits)
