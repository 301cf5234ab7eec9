"""The model card: `README.md` and its pictures, written from what a run measured and from nothing else.

The text is in `templates/model_card.md`, where names from outside are escaped by the filter `markdown`.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.axes import Axes
from timm.models import get_pretrained_cfg, is_model
from transformers.utils import logging

from hf_sgdr._utils.files import RUN_PICTURE
from hf_sgdr._utils.metrics import wilson_interval
from hf_sgdr._utils.store import replace_file
from hf_sgdr._utils.text import html_text, markdown_text, printable
from hf_sgdr.hub.card_facts import PLACEHOLDER, CardFacts, hub_id
from hf_sgdr.hub.environment import environment
from hf_sgdr.hub.record import Interpretation, RunRecord
from hf_sgdr.inference.multi_label import MultiLabelInterpretation

logger = logging.get_logger(__name__)

TEMPLATES = Path(__file__).parent / "templates"
# The Hub's own word for a licence that nobody has stated.
UNKNOWN_LICENSE = "unknown"
CONFUSION_MATRIX = "confusion-matrix.png"
NUM_IMAGES = 8
METRICS = {
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "f1": "Macro-F1",
    "map": "Mean average precision",
    "loss": "Loss",
}
MOST_MISTAKES = 3
# More than rounding in 16 bits makes of the accuracy of the same weights.
OTHER_WEIGHTS = 0.02
# Seconds for the Hub to say what a model's licence is.
LONGEST_WAIT = 10
# Of the lesson: `learn.TTA(n_aug=4)`.
DEFAULT_VIEWS = 4


def write_model_card(record: RunRecord, facts: CardFacts | None = None, folder: str | Path | None = None) -> Path:
    """Write the card of a run's model, with its pictures beside it.

    Args:
        record ([`RunRecord`]): with the predictions of the weights that are saved.
        facts ([`CardFacts`], *optional*): what nobody can measure.
        folder (`str` or `Path`, *optional*): where to write; defaults to the run's own, from which plots are taken.

    Returns:
        `Path`: of `README.md`.

    Raises:
        ValueError: if the record has no predictions.
    """
    facts, seen, results = facts or CardFacts(), record.interpretation, record.results
    if seen is None:
        raise ValueError("The record has no interpretation: a card needs predictions of the validation images.")
    measured, several = seen.metrics, isinstance(seen, MultiLabelInterpretation)
    judged = "f1" if several else "accuracy"
    before = results.best.get(f"eval_{judged}") if record.is_recipe else None
    if before is not None and abs(before - measured[judged]) > OTHER_WEIGHTS:
        logger.warning(
            f"The results tell of {METRICS[judged].lower()} {before:.4f}, but the weights have {measured[judged]:.4f} "
            "now: were they trained on? The card has the latter, beside the stages of the former."
        )
    folder = Path(folder) if folder is not None else record.folder
    folder.mkdir(parents=True, exist_ok=True)
    base_model, origin = facts.base_model or hub_id(record.name_or_path), facts.origin
    if base_model is not None and base_model == record.model_id:
        base_model, origin = None, "It went on from an earlier version of itself."
    title = facts.model_name or record.architecture + (f" on {facts.images_name}" if facts.images_name else "")
    of_one: dict[str, Any] = {}  # of classifiers of one label an image
    if not isinstance(seen, MultiLabelInterpretation):
        right = int((seen.predicted == seen.labels).sum())
        save_plot(seen.plot_confusion_matrix(), folder / CONFUSION_MATRIX)
        of_one = {
            "right": right,
            "interval": wilson_interval(right, len(seen.labels)),
            "mistakes": seen.most_confused()[:MOST_MISTAKES],
            "confusion_matrix": CONFUSION_MATRIX,
        }
    text = (
        _template_environment()
        .get_template("model_card.md")
        .render(
            record=record,
            facts=facts,
            seen=seen,
            metadata=_metadata(record, seen, facts, title, base_model).to_yaml(),
            title=title,
            base_model=base_model,
            base_license=stated_license(base_model) if base_model else None,
            origin=origin,
            several=several,
            metric_names=METRICS,
            measured=measured,
            classes=[
                {**vars(report), "training_images": count}
                for report, count in zip(seen.per_class(), record.training_counts, strict=True)
            ],
            run_picture=_bring([RUN_PICTURE], record.folder, folder),
            plots={stage["name"]: _stage_plots(stage["name"], record.folder, folder) for stage in results.stages},
            images=_save_images(seen, folder, facts.with_images),
            **of_one,
            environment=environment(record.device),
            default_views=DEFAULT_VIEWS,
            placeholder=PLACEHOLDER,
        )
    )
    path = folder / "README.md"
    replace_file(path, text.encode())
    return path


def stated_license(model_id: str) -> str | None:
    """The licence that timm or else the Hub states for a model's weights; None if neither does, or can be asked.

    Args:
        model_id (`str`): such as "timm/resnet34.a1_in1k".
    """
    user, name = model_id.split("/")
    stated = get_pretrained_cfg(name) if user == "timm" and is_model(name) else None
    if stated is not None and stated.license:
        return str(stated.license)
    try:
        card = HfApi().model_info(model_id, timeout=LONGEST_WAIT).card_data
    except Exception:  # offline, refused, no such model: no reason to lose a card
        return None
    return card.license if card is not None and isinstance(card.license, str) else None


def metric(value: float | None) -> str:
    """A metric with four decimals, or a dash where there is none."""
    return "–" if value is None else f"{value:.4f}"


def views(count: int) -> str:
    """How many views, in words."""
    return f"{count} augmented view{'' if count == 1 else 's'}"


def names(values: Sequence[str], most: int) -> str:
    """A list of names in words, escaped for Markdown; of more than `most` the rest is counted."""
    *shown, last = map(markdown_text, values[:most])
    if len(values) > most:
        shown, last = [*shown, last], f"{len(values) - most} more"
    return f"{', '.join(shown)} and {last}" if shown else last


def _template_environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"markdown": markdown_text, "html": html_text, "metric": metric, "views": views}
    environment.filters |= {"names": names, "link": lambda id: f"[{markdown_text(id)}](https://huggingface.co/{id})"}
    return environment


def _metadata(
    record: RunRecord, seen: Interpretation, facts: CardFacts, title: str, base_model: str | None
) -> ModelCardData:
    measured = dict(seen.metrics)
    loss = measured.pop("loss")
    metrics = [(kind, METRICS[kind], value) for kind, value in (*measured.items(), ("loss", loss))]
    for kind in (name for name in METRICS if name in record.results.tta):
        name = f"{METRICS[kind]} with test-time augmentation ({views(facts.tta_views)})"
        metrics.append((kind, name, record.results.tta[kind]))
    return ModelCardData(
        language=facts.language,
        library_name="transformers",
        pipeline_tag="image-classification",
        license=facts.license or UNKNOWN_LICENSE,
        base_model=base_model,
        datasets=[facts.dataset] if facts.dataset else None,
        metrics=list(measured),
        tags=["hf_sgdr", "sgdr", "vision", *(["multi-label"] if len(measured) > 1 else []), *facts.tags],
        model_name=printable(title),
        eval_results=[
            EvalResult(
                task_type="image-classification",
                task_name="Image classification",
                # The Hub wants a type also where the images are nowhere but on somebody's disk.
                dataset_type=facts.dataset or "imagefolder",
                dataset_name=printable(facts.images_name or "validation images"),
                dataset_config=facts.dataset_config,
                dataset_split="validation",
                metric_type=kind,
                metric_name=name,
                metric_value=round(value, 6),
            )
            for kind, name, value in metrics
        ],
    )


def _stage_plots(name: str, source: Path, folder: Path) -> list[str]:
    """The names of the plots that a stage left, the range test's first."""
    return _bring([f"{name}-{kind}.png" for kind in ("range-test", "learning-rate")], source, folder)


def _bring(names: list[str], source: Path, folder: Path) -> list[str]:
    """Those of some files that there are in `source`; they are copied beside the card if need be."""
    names = [name for name in names if (source / name).exists()]
    if source.resolve() != folder.resolve():
        for name in names:
            shutil.copyfile(source / name, folder / name)
    return names


def _save_images(seen: Interpretation, folder: Path, wanted: bool) -> list[str]:
    """The names of the pictures of single images; those of an earlier card are removed."""
    saved = []
    for kind in ("correct", "incorrect", "uncertain"):
        path = folder / f"most-{kind}.png"
        path.unlink(missing_ok=True)
        if wanted and hasattr(seen, f"most_{kind}") and getattr(seen, f"most_{kind}")(NUM_IMAGES):
            save_plot(getattr(seen, f"plot_most_{kind}")(NUM_IMAGES), path)
            saved.append(path.name)
    return saved


def save_plot(ax: Axes, path: Path) -> None:
    """Save a plot on an opaque ground, so that its dark text is readable on a dark page."""
    ax.figure.savefig(path, facecolor="white")  # type: ignore[union-attr]
