"""`HubTrainer`: a Trainer whose push is the model, its card, figures and configuration, and nothing else."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.utils import logging

from hf_sgdr.hub.card import hub_id, write_model_card
from hf_sgdr.hub.push import hub_api, prepare_repository, push_folder
from hf_sgdr.hub.run_files import write_run_files

logger = logging.get_logger(__name__)

TASK = "image-classification"


class HubTrainer(Trainer):
    """Write a card from what was measured, and push by this package's own rules; a base of [`SGDRTrainer`]."""

    def create_model_card(self, **facts: Any) -> None:
        """Write the card, `README.md` and pictures in `output_dir`, from this trainer's fits and what it measures now.

        Args:
            **facts: what nobody can measure: see [`~hf_sgdr.hub.card.write_model_card`]. Those of
                [`~transformers.Trainer.create_model_card`] are taken too: `language`, `license`, `tags`, `model_name`,
                `finetuned_from`, `tasks`, `dataset_tags`, `dataset` and `dataset_args`.

        Raises:
            ValueError: if `tasks` is another task, or several data sets are named: the figures are of one.
        """
        write_model_card(self, **card_facts(facts))

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the model and push it with its processor, card, plots, `results.json` and `recipe.yaml`.

        What of these is missing in `output_dir`, or older than the last training, is written first; nothing else from
        there is pushed. The model goes on being the whole one while precompute is on.

        Args:
            commit_message, token, revision (`str`, *optional*): as in [`~transformers.Trainer.push_to_hub`].
            blocking (`bool`, *optional*, defaults to True): False pushes in the background and returns a future.
            private (`bool`, *optional*): whether a new repository is private; by default `args.hub_private_repo`.
            **kwargs: facts for the card, which is then written anew: see [`create_model_card`]. Transformers' own names
                are taken, as its example scripts give them.

        Returns:
            `CommitInfo` of huggingface_hub, or a future of it; None on other processes than the main one.

        Raises:
            HubError: if it cannot be pushed; everything is saved, and the message ends with the command that pushes.
            ValueError: if the card cannot hold a fact; nothing is written then.
        """
        facts = card_facts(kwargs)
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        write_run_files(self, facts)
        if not self.is_world_process_zero():
            return None
        api = hub_api(token)
        push = functools.partial(
            push_folder,
            self.args.output_dir,
            self.hub_model_id or self._hub_name,
            private=private if private is not None else self.args.hub_private_repo,
            revision=revision or self.args.hub_revision,
            commit_message=commit_message or "End of training",
            api=api,
        )
        return push() if blocking else api.run_as_future(push)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository and look at the login, before anything is trained.

        Raises:
            HubError: if there is no login, it may not write there, or the Hub cannot be asked.
        """
        if self.is_world_process_zero():
            private = private if private is not None else self.args.hub_private_repo
            self.hub_model_id = prepare_repository(self._hub_name, private=private, api=hub_api(token))
            self.push_in_progress = None

    @property
    def _hub_name(self) -> str:
        """The repository to push to: as given, else called as the output folder."""
        return self.args.hub_model_id or Path(self.args.output_dir).absolute().name


def card_facts(given: Mapping[str, Any]) -> dict[str, Any]:
    """Facts under transformers' names as those that [`~hf_sgdr.hub.card.write_model_card`] takes; others stay.

    Args:
        given (mapping): as for [`~transformers.Trainer.create_model_card`]; what is None says nothing.

    Raises:
        ValueError: if `tasks` is another task, or several data sets are named.
    """
    facts = {name: value for name, value in given.items() if value is not None}
    tasks = _words(facts.pop("tasks", ()))
    if any(task != TASK for task in tasks):
        raise ValueError(f"tasks={', '.join(tasks)}: the card is that of an image classifier; give {TASK}.")
    if "tags" in facts:
        facts["tags"] = [tag for tag in _words(facts["tags"]) if tag != TASK]  # the card says that as its pipeline_tag
    source = facts.pop("finetuned_from", None)
    if source is not None and hub_id(source) is None:
        logger.warning(f"finetuned_from={source!r} is no id of the Hub, so the card does not name it.")
    elif source is not None:
        facts.setdefault("base_model", source)
    ids, names = _single(facts, "dataset_tags"), _single(facts, "dataset")
    dataset = ids or (names if names is not None and hub_id(names, with_user=False) else None)
    if dataset is not None:
        facts["dataset"] = dataset
    if names is not None:
        is_folder = dataset is None and (Path(names).is_absolute() or Path(names).exists())
        facts.setdefault("images_name", Path(names).name if is_folder else names)  # no place of this machine
    config = _single(facts, "dataset_args")
    if config is not None:
        facts["dataset_config"] = config
    return facts


def _words(value: str | list[str] | tuple[str, ...]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _single(facts: dict[str, Any], name: str) -> str | None:
    """Take a fact out; None if it is not there."""
    words = _words(facts.pop(name, ()))
    if len(words) > 1:
        raise ValueError(f"{name}={', '.join(words)}: the card's figures are of one set of images; give one.")
    return words[0] if words else None
