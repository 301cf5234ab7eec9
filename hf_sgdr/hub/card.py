"""The model card: `README.md` and its pictures, written from what a run measured and from nothing else.

The text is in `templates/model_card.md`, the figures in it come from `card_facts`; here is what the Hub wants to know.
"""

import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from matplotlib.axes import Axes
from transformers.utils import logging

from hf_sgdr._utils.store import replace_file
from hf_sgdr._utils.text import html_text, markdown_text, printable
from hf_sgdr.hub import card_sentences as card_facts
from hf_sgdr.hub.environment import environment
from hf_sgdr.hub.record import TrainedRun
from hf_sgdr.inference.interpretation import ClassifierInterpretation
from hf_sgdr.recipe import RunResults

logger = logging.get_logger(__name__)

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
# Where the model is, as long as nobody has pushed it.
PLACEHOLDER = "user/name"
# The Hub's own word for a licence that nobody has stated.
UNKNOWN_LICENSE = "unknown"
CONFUSION_MATRIX = "confusion-matrix.png"
NUM_IMAGES = 8
# More than rounding in 16 bits makes of the accuracy of the same weights.
OTHER_WEIGHTS = 0.02
# Of the lesson: `learn.TTA(n_aug=4)`.
DEFAULT_VIEWS = 4


def write_model_card(
    trainer: TrainedRun,
    results: RunResults | None = None,
    folder: str | Path | None = None,
    *,
    images_name: str | None = None,
    dataset: str | None = None,
    base_model: str | None = None,
    origin: str | None = None,
    license: str | None = None,
    tags: Iterable[str] = (),
    tta_views: int = 0,
    command: str | None = None,
    with_images: bool = False,
    model_name: str | None = None,
    language: str | list[str] | None = None,
    dataset_config: str | None = None,
) -> Path:
    """Write the card of the model that a trainer holds, with its pictures beside it.

    The validation images are predicted once more, so that every figure is of the weights that are saved. Under several
    processes all of them call it, and the main one writes.

    Args:
        trainer ([`TrainedRun`]): with the weights that are saved, and with validation images.
        results ([`RunResults`], *optional*): of the run that made these weights; by default those of the
            trainer's last [`run_stages`], or else its own fits.
        folder (`str` or `Path`, *optional*): where to write; by default the trainer's `output_dir`. Plots of stages are
            taken from `output_dir`.
        images_name (`str`, *optional*): what the images are called.
        dataset (`str`, *optional*): the id of the images on the Hub, if they are from there.
        base_model (`str`, *optional*): the id on the Hub of the model that this one started from; by default the id
            that it was loaded by, if any.
        origin (`str`, *optional*): a sentence about the weights that it started from, where no id names them.
        license (`str`, *optional*, defaults to "unknown"): the Hub's identifier of the licence that you give the model.
        tags (iterable of `str`, *optional*): further tags for the Hub.
        tta_views (`int`, *optional*, defaults to 0): augmented views that `results.tta` was measured with.
        command (`str`, *optional*): the command that makes the run again.
        with_images (`bool`, *optional*, defaults to False): show the most correct, incorrect and uncertain validation
            images. They are then part of the card, which may be public.
        model_name (`str`, *optional*): the card's title; by default the architecture and what the images are called.
        language (`str` or `list[str]`, *optional*): of the classes' names, by the Hub's codes, such as "en".
        dataset_config (`str`, *optional*): which configuration of the data set the images are.

    Returns:
        `Path`: of `README.md`.

    Raises:
        ValueError: if an id or the licence is none of the Hub's form, or the trainer has no single set of validation
            images.
    """
    for name, value in (("dataset", dataset), ("base_model", base_model)):
        if value is not None and hub_id(value, with_user=name != "dataset") is None:
            raise ValueError(f"{name}={value!r}: give an id of the Hub, such as user/name, or leave it out.")
    require_license(license)
    if results is None and trainer.history.run is not None:
        results = trainer.history.run[1]
    seen = ClassifierInterpretation.from_trainer(trainer)
    place = Path(folder if folder is not None else trainer.args.output_dir)
    path = place / "README.md"
    if not trainer.is_world_process_zero():
        return path
    accuracy = results.best.get("eval_accuracy") if results is not None else None
    if accuracy is not None and abs(accuracy - seen.accuracy) > OTHER_WEIGHTS:
        logger.warning(
            f"The results tell of an accuracy of {accuracy:.4f}, but that of the weights is {seen.accuracy:.4f} now: "
            "were they trained on? The card has the latter, beside the stages of the former."
        )
    place.mkdir(parents=True, exist_ok=True)
    model_id = trainer.hub_model_id or trainer.args.hub_model_id
    base_model = base_model if base_model is not None else hub_id(trainer.model.name_or_path)
    if base_model is not None and base_model == model_id:
        base_model, origin = None, "It went on from an earlier version of itself."
    done = results if results is not None else _own_fits(trainer)
    title = model_name or card_facts.architecture(trainer) + (f" on {images_name}" if images_name else "")
    _save(seen.plot_confusion_matrix(), place / CONFUSION_MATRIX)
    card = ModelCard.from_template(
        _metadata(
            seen, done, title, images_name, dataset, base_model, license, tags, tta_views, language, dataset_config
        ),
        template_path=str(TEMPLATE),
        title=markdown_text(title),
        summary=card_facts.summary(trainer, base_model),
        validation_images=len(seen.labels),
        loss=seen.loss,
        accuracy=seen.accuracy,
        right=int((seen.predicted == seen.labels).sum()),
        tta=done.tta,
        tta_words=card_facts.views(tta_views),
        tta_right=round(done.tta.get("accuracy", 0.0) * len(seen.labels)),
        pipeline_views=(tta_views or DEFAULT_VIEWS) if trainer.train_transform.is_random else 0,
        model_id=model_id or PLACEHOLDER,
        placeholder=PLACEHOLDER,
        origin=card_facts.origin_of_weights(trainer, base_model, origin),
        stages=[card_facts.stage_row(stage, trainer.layer_groups.names) for stage in done.stages],
        best=done.best,
        is_recipe=results is not None,
        settings=card_facts.settings(trainer, done),
        pictures=_stage_pictures(done, Path(trainer.args.output_dir), place),
        confusion_matrix=CONFUSION_MATRIX,
        classes=card_facts.class_rows(trainer, seen.per_class()),
        images=_image_pictures(seen, place, with_images),
        limits=card_facts.limits(trainer, seen, done),
        environment=environment(trainer.args.device),
        command=command,
        licence=card_facts.licence(license, base_model),
    )
    replace_file(path, str(card).encode())
    return path


def put_model_id(card: str, model_id: str) -> str:
    """The text of a card with a model's id on the Hub in the lines that load it.

    Args:
        card (`str`): the content of a `README.md` that [`~hf_sgdr.hub.card.write_model_card`] wrote; in others
            nothing changes.
        model_id (`str`): such as "user/name".
    """
    card = re.sub(r'(pipeline\("image-classification", model=)"[^"\n]*"', rf'\1"{model_id}"', card)
    card = re.sub(r'(hf_sgdr\.pipeline\()"[^"\n]*"', rf'\1"{model_id}"', card)
    return re.sub(rf"^`{PLACEHOLDER}` stands for .*\n\n", "", card, flags=re.MULTILINE)


def hub_id(name: str, *, with_user: bool = True) -> str | None:
    """The name, if it has the form of an id of the Hub and is no folder or file here; else None.

    Args:
        name (`str`): such as "user/name".
        with_user (`bool`, *optional*, defaults to True): False takes "name" alone, too, as old data sets are called.
    """
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name if ("/" in name or not with_user) and not Path(name).exists() else None


def require_license(identifier: str | None) -> None:
    """Raise a ValueError unless it is None or has the form of the Hub's identifiers of licences."""
    if identifier is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", identifier):
        raise ValueError(
            f"license={identifier!r}: give an identifier of the Hub, such as apache-2.0, cc-by-4.0, other or unknown."
        )


def _metadata(
    seen: ClassifierInterpretation,
    results: RunResults,
    title: str,
    images_name: str | None,
    dataset: str | None,
    base_model: str | None,
    license: str | None,
    tags: Iterable[str],
    tta_views: int,
    language: str | list[str] | None,
    dataset_config: str | None,
) -> ModelCardData:
    measured: list[tuple[str, str, float]] = [("accuracy", "Accuracy", seen.accuracy), ("loss", "Loss", seen.loss)]
    for kind, value in results.tta.items():
        measured.append(
            (kind, f"{kind.capitalize()} with test-time augmentation ({card_facts.views(tta_views)})", value)
        )
    images = printable(images_name or "validation images")
    return ModelCardData(
        language=language,
        library_name="transformers",
        pipeline_tag="image-classification",
        license=license or UNKNOWN_LICENSE,
        base_model=base_model,
        datasets=[dataset] if dataset else None,
        metrics=["accuracy"],
        tags=["hf_sgdr", "sgdr", "vision", *tags],
        model_name=printable(title),
        eval_results=[
            EvalResult(
                task_type="image-classification",
                task_name="Image classification",
                # The Hub wants a type also where the images are nowhere but on somebody's disk.
                dataset_type=dataset or "imagefolder",
                dataset_name=images,
                dataset_config=dataset_config,
                dataset_split="validation",
                metric_type=kind,
                metric_name=name,
                metric_value=round(value, 6),
            )
            for kind, name, value in measured
        ],
    )


def _own_fits(trainer: TrainedRun) -> RunResults:
    """The fits that were called one by one, and their plots, of rates as far as they are known, in `output_dir`."""
    folder = Path(trainer.args.output_dir)
    for number, fit in enumerate(trainer.history.fits, start=1):
        found = trainer.history.range_tests.get(fit["name"])
        range_test, rates = folder / f"{fit['name']}-range-test.png", folder / f"{fit['name']}-learning-rate.png"
        for path in (range_test, rates):  # of an earlier run
            path.unlink(missing_ok=True)
        if found is not None:
            _save(found.plot(chosen=fit["learning_rates"][-1]), range_test)
        if number == len(trainer.history.fits):
            _save(trainer.plot_lr(), rates)
    return RunResults(trainer.args.world_size, trainer.history.fits)


def _stage_pictures(results: RunResults, source: Path, place: Path) -> list[dict[str, Any]]:
    """The plots that the stages left, with a sentence for each stage; they are copied beside the card if need be."""
    found = []
    for stage in results.stages:
        name, chosen = stage["name"], f"{stage['learning_rates'][-1]:.2g}"
        range_test = source / f"{name}-range-test.png"
        plots = {
            range_test: f"Range test before {name}: training loss against learning rate",
            source / f"{name}-learning-rate.png": f"Learning rate of each layer group in {name}, step by step",
        }
        pictures = [{"file": file.name, "words": html_text(words)} for file, words in plots.items() if file.exists()]
        for picture in pictures:
            if source.resolve() != place.resolve():
                shutil.copyfile(source / picture["file"], place / picture["file"])
        if pictures:
            when = "After the range test" if range_test.exists() else "Without a range test of its own"
            words = f"{when}, the head's highest rate is {chosen}."
            found.append({"name": markdown_text(name), "pictures": pictures, "words": words})
    return found


def _image_pictures(seen: ClassifierInterpretation, place: Path, wanted: bool) -> list[dict[str, str]]:
    """Pictures of single images; those of an earlier card are removed where they are not wanted any more."""
    kinds: dict[str, tuple[str, str, Any, Any]] = {
        "most-correct.png": (
            "Most correct",
            "Right, and with the highest probability.",
            seen.most_correct,
            seen.plot_most_correct,
        ),
        "most-incorrect.png": (
            "Most incorrect",
            "Wrong, and with the lowest probability of the true class.",
            seen.most_incorrect,
            seen.plot_most_incorrect,
        ),
        "most-uncertain.png": (
            "Most uncertain",
            "The two likeliest classes are closest to each other.",
            seen.most_uncertain,
            seen.plot_most_uncertain,
        ),
    }
    found = []
    for file, (title, words, images, plot) in kinds.items():
        (place / file).unlink(missing_ok=True)
        if wanted and images(NUM_IMAGES):
            _save(plot(NUM_IMAGES), place / file)
            found.append({"title": title, "body": f"{words}\n\n![{title}: {words}]({file})"})
        elif wanted:
            found.append({"title": title, "body": "There is none."})
    return found


def _save(ax: Axes, path: Path) -> None:
    # An opaque ground, so that the dark text of a plot is readable on a dark page.
    ax.figure.savefig(path, facecolor="white")  # type: ignore[union-attr]
