"""`HubTrainer`: a Trainer whose push is the model, its card, figures and configuration, and nothing else."""

import functools
from pathlib import Path
from typing import Any

from transformers import Trainer


class HubTrainer(Trainer):
    """Write a card from what was measured, and push by this package's own rules; a base of [`SGDRTrainer`]."""

    def create_model_card(self, **facts: Any) -> None:
        """Write the card, `README.md` and pictures in `output_dir`, from this trainer's fits and what it measures now.

        Args:
            **facts: what nobody can measure: see [`~hf_sgdr.model_card.write_model_card`].
        """
        from hf_sgdr.model_card import write_model_card  # at the side: it knows the trainer

        write_model_card(self, **facts)

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
            **kwargs: facts for the card, which is then written anew: see [`create_model_card`].

        Returns:
            `CommitInfo` of huggingface_hub, or a future of it; None on other processes than the main one.

        Raises:
            HubError: if it cannot be pushed; everything is saved, and the message ends with the command that pushes.
        """
        from hf_sgdr.hub import hub_api, push_folder  # at the side: they know the trainer
        from hf_sgdr.run_files import write_run_files

        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        write_run_files(self, kwargs)
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
            from hf_sgdr.hub import hub_api, prepare_repository

            private = private if private is not None else self.args.hub_private_repo
            self.hub_model_id = prepare_repository(self._hub_name, private=private, api=hub_api(token))
            self.push_in_progress = None

    @property
    def _hub_name(self) -> str:
        """The repository to push to: as given, else called as the output folder."""
        return self.args.hub_model_id or Path(self.args.output_dir).absolute().name
