"""`PrecomputeTrainer`: a Trainer on images with layer groups, of which frozen ones need not run more than once.

While it trains on precomputed features, the Trainer sees the head as its model and rows of features as its data, and
nothing else differs.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

from hf_sgdr.features.extract import resolve_feature_dtype
from hf_sgdr.features.head import FeatureDataset, HeadClassifier, whole_batch
from hf_sgdr.features.reader import FeatureReader
from hf_sgdr.models.boundary import Boundary
from hf_sgdr.models.classifiers import check_trainable
from hf_sgdr.optim.layer_groups import LayerGroups
from hf_sgdr.training.arguments import SGDRTrainingArguments
from hf_sgdr.training.photo_trainer import ImageTrainer

logger = logging.get_logger(__name__)


class PrecomputeTrainer(ImageTrainer):
    """Freeze layer groups, and train on what the last frozen one gives.

    Args:
        model (`PreTrainedModel`): an image classifier.
        args ([`SGDRTrainingArguments`]): what is frozen at first, which precision, how much room.
        layer_groups ([`LayerGroups`], *optional*): by default `args.n_groups` groups of the model.
        **kwargs: those of [`ImageTrainer`].

    Raises:
        ValueError: if the model cannot be trained on images with labels, or not be split into layer groups.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: SGDRTrainingArguments,
        *,
        layer_groups: LayerGroups | None = None,
        **kwargs: Any,
    ) -> None:
        check_trainable(model)
        self.layer_groups = layer_groups or LayerGroups.from_model(model, args.n_groups)
        self.layer_groups.learning_rates(args.group_learning_rates or args.learning_rate)  # a wrong number shows now
        super().__init__(model, args, **kwargs)
        self._features = FeatureReader(model, args, self.accelerator)
        self._boundaries: dict[tuple[int, int], Boundary] = {}
        self._precompute = False
        self.layer_groups.freeze_to(args.freeze_to)
        self.layer_groups.freeze_batch_norm = args.freeze_batch_norm
        self.precompute = args.precompute

    def freeze(self) -> None:
        """Train the head only."""
        self.freeze_to(-1)

    def freeze_to(self, n: int) -> None:
        """Train layer group `n` and those after it.

        With precompute on, what the last frozen group gives is stored from then on; if nothing is frozen any more,
        precompute is switched off.

        Raises:
            ValueError: if there is no group `n`, or precompute is on and the model cannot be cut there; then what is
                frozen stays as it was.
        """
        frozen = self.layer_groups.index(n)
        if self._precompute and frozen > 0:
            self._boundary(frozen)
        self.layer_groups.freeze_to(n)
        if self._precompute and frozen == 0:
            logger.warning("The whole body is to train, so precompute is switched off.")
            self._precompute = False

    def unfreeze(self) -> None:
        """Train all layer groups; precompute is switched off."""
        self.freeze_to(0)

    @property
    def precompute(self) -> bool:
        """Whether training uses precomputed features of the images, so that only what is not frozen runs.

        With the whole body frozen the features are the head's input; after a partial `freeze_to`, the activations
        between the frozen groups and the rest. They are computed when they are first needed.

        Raises:
            ValueError: on setting it True, if nothing is frozen or the model cannot be cut where the frozen groups end.
        """
        return self._precompute

    @precompute.setter
    def precompute(self, value: bool) -> None:
        if value:
            self.check_precompute()
        if value and not self._precompute and self.train_transform.is_random and not self.args.precompute_views:
            logger.warning(
                "Augmentation has no effect with precompute: features are those of the plain images. "
                "precompute_views=4 would store four augmented views of each."
            )
        self._precompute = value

    def check_precompute(self) -> None:
        """Raise a ValueError if precompute is not possible with what is frozen now."""
        self._boundary()
        if self.args.precompute_views and not self.train_transform.is_random:
            raise ValueError(
                f"precompute_views={self.args.precompute_views} needs a training transform that augments: give the "
                'trainer the first one of image_transforms(model, augment="side_on", max_zoom=1.1).'
            )

    # ---- Helpers ----

    @property
    def _groups_in_training(self) -> LayerGroups:
        if isinstance(self.model, HeadClassifier):
            names = [name for name, _ in self.model.named_parameters()]
            return LayerGroups(self.model, {self.layer_groups.names[-1]: names})
        return self.layer_groups

    @contextmanager
    def _replaced(self, **attributes: Any) -> Iterator[None]:
        """Have other values for some attributes inside."""
        before = {name: getattr(self, name) for name in attributes}
        try:
            for name, value in attributes.items():
                setattr(self, name, value)
            yield
        finally:
            for name, value in before.items():
                setattr(self, name, value)

    @contextmanager
    def _features_instead_of_images(self) -> Iterator[None]:
        """Inside, the model is the head and the data are features, if precompute is on."""
        if not self._precompute:
            yield
            return
        args = copy.copy(self.args)
        args.dataloader_num_workers, args.dataloader_persistent_workers, args.dataloader_prefetch_factor = (
            0,
            False,
            None,
        )
        boundary = self._boundary()
        train = self._training_features(boundary)
        evaluation = self.eval_dataset
        if isinstance(evaluation, dict):
            evaluation = {
                name: self._evaluation_features(boundary, images, name) for name, images in evaluation.items()
            }
        elif evaluation is not None:
            evaluation = self._evaluation_features(boundary, evaluation, "validation")
        replaced: dict[str, Any] = {"args": args, "train_dataset": train, "eval_dataset": evaluation}
        if boundary.skipped is None:
            head_model = HeadClassifier(self.model, boundary.module)
            replaced |= {"model": head_model, "model_wrapped": head_model}
        try:
            with (
                self._replaced(data_collator=whole_batch, **replaced),
                nullcontext() if boundary.skipped is None else boundary.fed_with_features(),
            ):
                yield
        finally:
            self.callback_handler.model = self.model
            self.accelerator._models.clear()  # forgets the head, so that the whole model is prepared again

    def _boundary(self, frozen: int | None = None) -> Boundary:
        """Where the frozen groups end, or would end with so many frozen.

        Raises:
            ValueError: if nothing is frozen, or the model cannot be cut there.
        """
        frozen = self.layer_groups.frozen if frozen is None else frozen
        size = self.eval_transform.spec.size
        if (frozen, size) not in self._boundaries:
            self._boundaries[frozen, size] = Boundary.at_boundary(self.layer_groups, size, frozen)
        return self._boundaries[frozen, size]

    def _training_features(self, boundary: Boundary) -> FeatureDataset:
        """The plain images' features, and those of the augmented views, if any."""
        views = [self._images(self.train_dataset, self.eval_transform.fast())]
        for view in range(self.args.precompute_views):
            views.append(self._images(self.train_dataset, self.train_transform, seed_of=("view", view)))
        return self._features.dataset(views, boundary, "train", self.args.feature_dtype)

    @property
    def feature_dtype(self) -> str:
        """The precision in which training features are computed: "float32" or "bfloat16"."""
        return str(resolve_feature_dtype(self.args.device, self.args.feature_dtype)).removeprefix("torch.")

    def _evaluation_features(self, boundary: Boundary, dataset: Any, name: str) -> FeatureDataset:
        dtype = "bfloat16" if self.args.feature_dtype == "bfloat16" else "float32"
        return self._features.dataset([self._images(dataset, self.eval_transform)], boundary, name, dtype)
