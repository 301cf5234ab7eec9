"""`HubTrainer`: a Trainer whose push is the model, its card, figures and configuration, and nothing else."""

import functools
from pathlib import Path
from typing import Any

from transformers import Trainer

from hf_sgdr.hub.card_facts import card_facts
from hf_sgdr.hub.push import hub_api, prepare_repository, push_folder
from hf_sgdr.training.record import write_card, write_run_files


class HubTrainer(Trainer):
    """Write a card from what was measured, and push by this package's own rules; a base of [`SGDRTrainer`]."""

    def create_model_card(self, **facts: Any) -> None:
        """Write the card, `README.md` and pictures in `output_dir`, from this trainer's fits and what it measures now.

        Args:
            **facts: what nobody can measure: see [`~hf_sgdr.hub.card_facts.CardFacts`]. Those of
                [`~transformers.Trainer.create_model_card`] are taken too: `language`, `license`, `tags`, `model_name`,
                `finetuned_from`, `tasks`, `dataset_tags`, `dataset` and `dataset_args`.

        Raises:
            ValueError: if the card cannot hold a fact, or there is no single set of validation images.
        """
        write_card(self, card_facts(facts))

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
        facts = card_facts(kwargs) if any(value is not None for value in kwargs.values()) else None
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
