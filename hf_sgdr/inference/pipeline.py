"""Prediction: transformers' image-classification pipeline with test-time augmentation, and images read by threads.

Without augmentation the scores are the stock pipeline's; what differs is the way there. A model needs neither to have
been trained here nor to be timm's.
"""

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sized
from concurrent.futures import Future
from typing import Any

import torch
import transformers
from torch import nn
from transformers import ImageClassificationPipeline, PreTrainedModel
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor
from transformers.pipelines.image_classification import ClassificationFunction
from transformers.utils.generic import ModelOutput

from hf_sgdr._utils.system import keep_freed_memory, use_all_processors
from hf_sgdr.data.image_spec import image_processor_of
from hf_sgdr.data.images import UnreadableImageError
from hf_sgdr.data.transforms import Augment
from hf_sgdr.inference.inputs import SizedIterator, as_image, as_inputs, read_in_threads
from hf_sgdr.inference.tta import ModelViews, check_beta, mean_of_views, plain_weight, views_at_once
from hf_sgdr.models.patches import take_square_images
from hf_sgdr.optim.schedule import require_whole


def pipeline(
    model: str | os.PathLike[str] | PreTrainedModel,
    *,
    tta: int = 0,
    beta: float | None = None,
    device: int | str | torch.device | None = None,
    batch_size: int | None = None,
    **kwargs: Any,
) -> "TTAImageClassificationPipeline":
    """An image-classification pipeline: `pipeline("out")("cat.jpg")` gives `[{"label": "cats", "score": 0.99}, ...]`.

    Args:
        model (`str`, `PathLike` or `PreTrainedModel`): a folder, a model id of the Hub, or a model: any image
            classifier of transformers or timm.
        tta (`int`, *optional*, defaults to 0): augmented views beside the plain image; see
            [`TTAImageClassificationPipeline`], also for `beta` and for what else it takes.
        device (`int`, `str` or `torch.device`, *optional*): as in transformers: "cpu" or -1, "cuda:0" or 0; by default
            the first accelerator, or the CPU.
        batch_size (`int`, *optional*): images a forward pass; 32 on the CPU, 64 elsewhere.
        **kwargs: what [`~transformers.pipeline`] takes (`top_k`, `revision`, `dtype`, `image_processor`, ...). A model
            given as an object that is not timm's gets the image processor of the place that it was loaded from; after
            training at another size, give `image_processor=trainer.processing_class`.

    Raises:
        ValueError: if an argument is out of range, the device is not there, or the model leaves no views to draw.
        TypeError: if `model` is none of these.
        OSError: if there is no such model.
    """
    if isinstance(model, PreTrainedModel):
        kwargs.setdefault("image_processor", image_processor_of(model))
    elif not isinstance(model, str | os.PathLike):
        raise TypeError(f"model is {type(model).__name__}: give a folder, a model id of the Hub, or a PreTrainedModel.")
    else:
        model = os.fspath(model)
    _check_device(device)
    settings: dict[str, Any] = {
        "pipeline_class": TTAImageClassificationPipeline,
        "device": device,
        "batch_size": batch_size,
    }
    try:
        pipe: Any = transformers.pipeline("image-classification", model=model, tta=tta, beta=beta, **settings, **kwargs)
    except OSError as error:
        if not isinstance(model, str):
            raise
        reason = str(error).splitlines()[0]
        if not os.path.isdir(model):
            reason = f"no such folder, and not loaded from the Hub ({reason}). Give a folder or a model id (user/name)."
        raise OSError(f"model {model!r}: {reason}") from error
    result: TTAImageClassificationPipeline = pipe
    return result


class TTAImageClassificationPipeline(ImageClassificationPipeline):
    """Labels and scores for images; also `transformers.pipeline("image-classification", pipeline_class=this class)`.

    An image is a path, a URL, encoded bytes, base64 text, a Pillow image, or an array or tensor of pixels. One image
    gives a list of `{"label", "score"}`, best first; a list or tuple gives a list of those; a data set of torch or
    `datasets`, a generator or another iterator gives an iterator, which works as it is read. A generator is never asked
    for more than the batch at hand: with `batch_size=1` each image is answered before the next one is asked for.

    With test-time augmentation the logits are averaged over the plain image and `tta` views of it, drawn as the model
    was trained (its configuration's `hf_sgdr`; otherwise `DEFAULT_AUGMENT` and `DEFAULT_MAX_ZOOM`, and the log says
    so), the plain image counting as much as suited validation (in `hf_sgdr`, too; otherwise half). An image's views
    depend on its content alone, so neither batch nor order changes its scores. (`SGDRTrainer.tta` is
    the same average.)

    Args:
        tta (`int`, *optional*, defaults to 0): how many views; also an argument of a call.
        beta (`float`, *optional*): average scores instead of logits, the plain image counting `beta`, in [0, 1], and
            the mean of the views the rest; also of a call.
        batch_size (`int`, *optional*): images a forward pass; 32 on the CPU, 64 elsewhere; also of a call.
        augment, max_zoom (*optional*): the views, as in [`image_transforms`]; by default as said above.
        exact (`bool`, *optional*, defaults to True): read images just as the model's own image processor does. False
            decodes JPEGs no larger than needed and resizes on tensors: measured with tf_efficientnet_lite0, images of
            12 megapixels are read eight times as fast and scores move by up to .007, by .0005 for images of 440 x 374.
        return_exceptions (`bool`, *optional*, defaults to False): give an [`UnreadableImageError`] in the place of the
            answer for an image that cannot be read, instead of raising it; also of a call.
        threshold (`float`, *optional*): give only labels with at least this score, maybe none; for models of several
            labels an image, whose scores are each label's own. Also of a call.
        **kwargs: of [`~transformers.ImageClassificationPipeline`]: `top_k`, `function_to_apply`, `timeout`.
            `num_workers` has no effect: images are read by threads, one a processor.

    Raises:
        ValueError: if a number is out of range, or there are no views to draw.
        UnreadableImageError: a `ValueError`, from a call, if an image cannot be read; it names the file.
    """

    def __init__(
        self,
        *args: Any,
        tta: int = 0,
        batch_size: int | None = None,
        augment: Augment | None = None,
        max_zoom: float | None = None,
        exact: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, tta=tta, **kwargs)
        if batch_size is None:
            batch_size = views_at_once(self.device)
        require_whole("batch_size", batch_size, at_least=1)
        self.batch_size = batch_size
        take_square_images(self.model)
        processor: Any = self.image_processor
        self.views = ModelViews(processor, self.model.config, augment=augment, max_zoom=max_zoom, exact=exact)
        if tta:
            self.views.augmented  # noqa: B018  # so that an error shows now
        if self.device.type == "cpu":
            keep_freed_memory()
            use_all_processors()
        if sum(isinstance(module, nn.Conv2d) for module in self.model.modules()) > 1:
            nn.Module.to(self.model, memory_format=torch.channels_last)

    def __call__(self, inputs: Any, *args: Any, batch_size: int | None = None, **kwargs: Any) -> Any:
        """Answers for one image or many; see the class for what it takes and gives."""
        batch_size = self.batch_size if batch_size is None else batch_size
        require_whole("batch_size", batch_size, at_least=1)
        images = as_inputs(inputs)
        if isinstance(images, list) and not images:
            return []
        return super().__call__(images, *args, batch_size=batch_size, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save model and image processor, both stock: none of this code goes with them."""
        self.model.save_pretrained(save_directory, **kwargs)
        processor: Any = self.image_processor
        if not isinstance(processor, TimmWrapperImageProcessor):  # that one is all in config.json
            processor.save_pretrained(save_directory, **kwargs)

    # ---- What transformers calls ----

    def _sanitize_parameters(  # type: ignore[override]  # as transformers documents it
        self,
        tta: int | None = None,
        beta: float | None = None,
        return_exceptions: bool | None = None,
        top_k: int | None = None,
        threshold: float | None = None,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if top_k is not None:
            require_whole("top_k", top_k, at_least=1)
        reading, forward, answering = super()._sanitize_parameters(top_k=top_k, **kwargs)
        if tta is not None:
            require_whole("tta", tta, at_least=0)
            reading["tta"] = tta
        if beta is not None:
            check_beta(beta)
            answering["beta"] = beta
        if threshold is not None:
            if not 0.0 <= threshold <= 1.0:
                raise ValueError(f"threshold={threshold!r}: must be a score from 0 to 1.")
            answering["threshold"] = threshold
        if return_exceptions is not None:
            reading["return_exceptions"] = return_exceptions
        return reading, forward, answering

    def get_inference_context(self) -> Callable[[], Any]:
        """No gradients, and none later either."""
        return torch.inference_mode

    def run_single(
        self,
        inputs: Any,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> Any:
        """One image, by the way of all."""
        return next(
            self.get_iterator([inputs], 0, self.batch_size, preprocess_params, forward_params, postprocess_params)
        )

    def get_iterator(
        self,
        inputs: Any,
        num_workers: int,
        batch_size: int,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> Iterator[Any]:
        """Answers in the order of the images, as long as they are where those have a length."""
        if preprocess_params.get("tta"):
            self.views.augmented  # noqa: B018  # an error shows now, not in the middle of the images
        is_sized = isinstance(inputs, Sized)
        images = (inputs[i] for i in range(len(inputs))) if is_sized else iter(inputs)
        read = functools.partial(self.preprocess, **preprocess_params)
        # Beside an accelerator the processor can read the next batch; on the CPU the two would only slow each other.
        ahead = int(is_sized and self.device.type != "cpu")
        batches = read_in_threads(images, read, batch_size if self.views.plain else 1, ahead)
        answers = self._answers(batches, {**forward_params, "at_once": batch_size}, postprocess_params)
        return SizedIterator(answers, len(inputs)) if is_sized else answers

    def _answers(
        self, batches: Iterator[list[Future[Any]]], forward_params: dict[str, Any], postprocess_params: dict[str, Any]
    ) -> Iterator[Any]:
        for batch in batches:
            failed = next((i for i, future in enumerate(batch) if future.exception() is not None), len(batch))
            read = [future.result() for future in batch[:failed]]  # what comes before an error is answered
            inputs = [item for item in read if not isinstance(item, UnreadableImageError)]
            outputs: Iterator[Any] = iter(())
            if inputs:
                together = {name: torch.cat([item[name] for item in inputs]) for name in inputs[0]}
                logits = self.forward(together, **forward_params)["logits"]
                outputs = (self.postprocess({"logits": image}, **postprocess_params) for image in logits.split(1))
            for item in read:
                yield item if isinstance(item, UnreadableImageError) else next(outputs)
            for future in batch[failed:]:
                future.result()  # raises

    def preprocess(  # type: ignore[override]
        self, image: Any, timeout: float | None = None, tta: int = 0, return_exceptions: bool = False
    ) -> Any:
        """An image's views, (1, 1 + tta, ...) each; see [`ModelViews`]."""
        try:
            return self.views(as_image(image, timeout, self.views.reader(tta)), tta)
        except UnreadableImageError as error:
            if not return_exceptions:
                raise
            return error

    def _forward(self, model_inputs: Mapping[str, torch.Tensor], at_once: int = 1) -> ModelOutput:  # type: ignore[override]
        """Logits (images, views, classes), `at_once` views a pass."""
        if self.model.training:  # a model in training mode would drop out, and move its batch norms
            self.model.eval()
        shape = next(iter(model_inputs.values())).shape[:2]
        split = {name: value.flatten(0, 1).split(at_once) for name, value in model_inputs.items()}
        dtype = self.model.dtype
        passes = [dict(zip(split, chunk, strict=True)) for chunk in zip(*split.values(), strict=True)]
        logits = torch.cat([self.model(**self.views.model_inputs(inputs, dtype)).logits for inputs in passes])
        return ModelOutput(logits=logits.unflatten(0, shape))

    def postprocess(  # type: ignore[override]
        self,
        model_outputs: Mapping[str, torch.Tensor],
        function_to_apply: ClassificationFunction | None = None,
        top_k: int = 5,
        beta: float | None = None,
        threshold: float | None = None,
    ) -> list[dict[str, Any]]:
        """The best `top_k` labels of one image, from its logits (1, views, classes): see [`mean_of_views`]."""
        logits = model_outputs["logits"][0].float()
        scores = _FUNCTIONS[function_to_apply or self._default_function()]
        has_views = len(logits) > 1
        score = mean_of_views(logits, scores, beta, plain_weight(self.model.config) if has_views else 1.0)
        best = score.argsort(descending=True, stable=True)[:top_k]
        names: Any = self.model.config.id2label
        scored = zip(best.tolist(), score[best].tolist(), strict=True)
        return [{"label": names[i], "score": value} for i, value in scored if threshold is None or value >= threshold]

    def _default_function(self) -> ClassificationFunction:
        """As in the stock pipeline: by the kind of problem that the configuration names, and the number of labels."""
        config = self.model.config
        if config.problem_type == "regression":
            return ClassificationFunction.NONE
        if config.problem_type == "multi_label_classification" or config.num_labels == 1:
            return ClassificationFunction.SIGMOID
        return ClassificationFunction.SOFTMAX


def _check_device(device: int | str | torch.device | None) -> None:
    """Raise a ValueError unless a device that is named is there."""
    if isinstance(device, str | torch.device):
        try:
            torch.empty(0, device=device)
        except (AssertionError, NotImplementedError, RuntimeError) as error:
            raise ValueError(
                f'device={str(device)!r}: {str(error).splitlines()[0]} Give "cpu", "cuda:0" or the like.'
            ) from error


_FUNCTIONS: dict[ClassificationFunction, Callable[[torch.Tensor], torch.Tensor]] = {
    ClassificationFunction.SIGMOID: torch.sigmoid,
    ClassificationFunction.SOFTMAX: lambda logits: logits.softmax(dim=-1),
    ClassificationFunction.NONE: lambda logits: logits,
}
