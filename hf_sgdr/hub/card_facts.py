"""`CardFacts`: what a model card says and no run can measure, checked before anything is written."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, not in __all__
from transformers.utils import logging

logger = logging.get_logger(__name__)

TASK = "image-classification"

# Where the model is, as long as nobody has pushed it.
PLACEHOLDER = "user/name"


@dataclass(frozen=True)
class CardFacts:
    """What whoever shares a model says about it.

    Args:
        images_name (`str`, *optional*): what the images are called.
        dataset (`str`, *optional*): the id of the images on the Hub, if they are from there.
        dataset_config (`str`, *optional*): which configuration of the data set the images are.
        base_model (`str`, *optional*): the id on the Hub of the model that this one started from; defaults to the id
            that it was loaded by, if any.
        origin (`str`, *optional*): a sentence about the weights that it started from, where no id names them.
        license (`str`, *optional*): the Hub's identifier of the licence that you give the model.
        tags (iterable of `str`, *optional*): further tags for the Hub.
        tta_views (`int`, *optional*, defaults to 0): augmented views that `results.tta` was measured with.
        command (`str`, *optional*): the command that makes the run again.
        with_images (`bool`, *optional*, defaults to False): show the most correct, incorrect and uncertain validation
            images. They are then part of the card, which may be public.
        model_name (`str`, *optional*): the card's title; defaults to the architecture and what the images are called.
        language (`str` or `list[str]`, *optional*): of the classes' names, by the Hub's codes, such as "en".

    Raises:
        ValueError: if an id or the licence does not have the form that the Hub wants.
    """

    images_name: str | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    base_model: str | None = None
    origin: str | None = None
    license: str | None = None
    tags: Iterable[str] = ()
    tta_views: int = 0
    command: str | None = None
    with_images: bool = False
    model_name: str | None = None
    language: str | list[str] | None = None

    def __post_init__(self) -> None:
        for name, value in (("dataset", self.dataset), ("base_model", self.base_model)):
            if value is not None and hub_id(value, with_user=name != "dataset") is None:
                raise ValueError(f"{name}={value!r}: give an id of the Hub, such as user/name, or leave it out.")
        require_license(self.license)


def card_facts(given: Mapping[str, Any]) -> CardFacts:
    """[`CardFacts`] from keywords, theirs or those of [`~transformers.Trainer.create_model_card`].

    Args:
        given (mapping): `CardFacts` by name; also `finetuned_from`, `tasks`, `dataset_tags`, `dataset` (a name or an
            id) and `dataset_args`. What is None counts as not given.

    Raises:
        ValueError: if `tasks` is another task, several data sets are named, or a fact is refused by [`CardFacts`].
    """
    facts = {name: value for name, value in given.items() if value is not None}
    tasks = _listed(facts.pop("tasks", ()))
    if any(task != TASK for task in tasks):
        raise ValueError(f"tasks={', '.join(tasks)}: the card is that of an image classifier; give {TASK}.")
    if "tags" in facts:
        facts["tags"] = [tag for tag in _listed(facts["tags"]) if tag != TASK]  # the card's pipeline_tag says that
    source = facts.pop("finetuned_from", None)
    if source is not None and hub_id(source) is None:
        logger.warning(f"finetuned_from={source!r} is no id of the Hub, so the card does not name it.")
    elif source is not None:
        facts.setdefault("base_model", source)
    dataset_id, name, config = (_single(facts, key) for key in ("dataset_tags", "dataset", "dataset_args"))
    if dataset_id is None and name is not None:
        dataset_id = hub_id(name, with_user=False)
    if name is not None:
        is_folder = dataset_id is None and (Path(name).is_absolute() or Path(name).exists())
        facts.setdefault("images_name", Path(name).name if is_folder else name)  # no path of this machine
    return CardFacts(**{"dataset": dataset_id, "dataset_config": config, **facts})


def local_origin(name: str, weights_file: str | None, pretrained: bool) -> str | None:
    """A sentence about weights that no id of the Hub names; None where one does.

    Args:
        name (`str`): of the model, as it was given.
        weights_file (`str` or None): told by its own name and its SHA-256, not by where it lies.
        pretrained (`bool`): False is random weights, without a file.
    """
    if weights_file is not None:
        file = Path(weights_file)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        return f"It started from the weights in {file.name}, a local file with the SHA-256 {digest}."
    if not pretrained:
        return "It started from random weights."
    return "It started from a model in a local folder." if Path(name).is_dir() else None


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


def _listed(value: str | Iterable[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _single(facts: dict[str, Any], name: str) -> str | None:
    """Take a fact out; None if it is not there."""
    values = _listed(facts.pop(name, ()))
    if len(values) > 1:
        raise ValueError(f"{name}={', '.join(values)}: the card's figures are of one set of images; give one.")
    return values[0] if values else None


def put_model_id(card: str, model_id: str) -> str:
    """The text of a card with a model's id on the Hub in the lines that load it.

    Args:
        card (`str`): the content of a `README.md` that [`write_model_card`] wrote; in others nothing changes.
        model_id (`str`): such as "user/name".
    """
    card = re.sub(r'(pipeline\("image-classification", model=)"[^"\n]*"', rf'\1"{model_id}"', card)
    card = re.sub(r'(hf_sgdr\.pipeline\()"[^"\n]*"', rf'\1"{model_id}"', card)
    return re.sub(rf"^`{PLACEHOLDER}` stands for .*\n\n", "", card, flags=re.MULTILINE)
