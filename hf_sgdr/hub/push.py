"""A run on the Hub: what is pushed, what must be there before, and snapshots as branches.

What is pushed is on a list; everything else that lies in an output folder (checkpoints, caches, pickles, whatever a
person put there) stays. A push is one commit, so one that breaks off leaves the repository as it was.
"""

import fnmatch
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, not in __all__
from safetensors.torch import load_model
from transformers import AutoModelForImageClassification

from hf_sgdr._utils.files import RUN_PICTURE, RUNS_FOLDER, STAGE_PLOTS
from hf_sgdr.callbacks.snapshots import best_snapshots, snapshot_files
from hf_sgdr.hub.card_facts import put_model_id
from hf_sgdr.hub.retry import LOG_IN, HubError, retry
from hf_sgdr.version import __version__

WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
MODEL_FILES = ("config.json", *WEIGHTS, *PROCESSOR_FILES)
CARD = "README.md"
RUN_FILES = ("results.json", "recipe.yaml", RUN_PICTURE, *STAGE_PLOTS)
# Pushed where the card shows them; what an earlier card showed and this one does not, images above all, is removed.
CARD_PICTURES = ("confusion-matrix.png", "most-*.png")
SNAPSHOTS_FOLDER = f"{RUNS_FOLDER}/snapshots"

_TEXT = (".json", ".md", ".yaml")
# A picture that the card shows, by its name beside the card.
_PICTURE = re.compile(r"[\w.-]+\.png")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}\b")


def hub_api(token: str | None = None) -> HfApi:
    """The Hub's client; without a token it takes that of the login."""
    return HfApi(token=token, library_name="hf_sgdr", library_version=__version__)


def pushed_files(folder: str | Path) -> list[Path]:
    """The files of an output folder that a push takes.

    The model, its processor, the card and the pictures it shows, the figures, the plots of stages and the
    configuration; no links, nothing from folders below.

    Args:
        folder (`str` or `Path`): where a recipe or `save_model` has written.

    Raises:
        FileNotFoundError: if there is no model.
        ValueError: if a text among them holds an access token or the path of a folder of this machine.
    """
    folder = Path(folder)
    paths = folder.iterdir() if folder.is_dir() else []
    here = {path.name: path for path in paths if path.is_file() and not path.is_symlink()}
    if "config.json" not in here or not any(_matches(name, WEIGHTS) for name in here):
        raise FileNotFoundError(
            f"{folder}: no model to push; give a folder that holds config.json and model.safetensors (not links), as "
            "`hf-sgdr train` and trainer.save_model() leave it."
        )
    shown = _PICTURE.findall(here[CARD].read_text(encoding="utf-8")) if CARD in here else []
    files = [here[name] for name in sorted(here) if name in shown or _matches(name, (CARD, *MODEL_FILES, *RUN_FILES))]
    _require_clean([file for file in files if file.suffix in _TEXT], folder)
    return files


def require_login(model_id: str, api: HfApi | None = None) -> str:
    """The full id of the repository that will be pushed to; asked before any work.

    Args:
        model_id (`str`): `user/name`, or the name alone for a repository of whoever is logged in.
        api (`HfApi`, *optional*): the client; defaults to that of the login.

    Raises:
        HubError: if nobody is logged in, the token may not write, or the Hub cannot be asked.
        ValueError: if the id is none.
    """
    validate_repo_id(model_id)
    api = api or hub_api()
    login = retry(lambda: api.whoami(cache=True), "Looking up the login on the Hub")
    if login.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise HubError(f"The token of {login['name']} may only read: {LOG_IN}.")
    return model_id if "/" in model_id else f"{login['name']}/{model_id}"


def prepare_repository(model_id: str, *, private: bool | None = None, api: HfApi | None = None) -> str:
    """Make the repository, unless it is there, and make sure that it can be pushed to.

    Args:
        model_id (`str`): `user/name`, or the name alone.
        private (`bool`, *optional*): whether a new one is private; by default as your account says.
        api: see [`require_login`].

    Returns:
        `str`: the full id.

    Raises:
        HubError: if there is no login, it may not write there, the repository is public where a private one was asked
            for, or the Hub cannot be asked.
    """
    api = api or hub_api()
    model_id = require_login(model_id, api)

    def prepare() -> bool | None:
        api.create_repo(model_id, private=private, exist_ok=True)
        try:
            api.auth_check(model_id, write=True)
        except HfHubHTTPError as error:
            # The repository is there now, so it is this question that a server compatible with the Hub does not know:
            # the commit will show whether the login may write.
            if error.response.status_code != 404:
                raise
        return api.model_info(model_id).private

    if retry(prepare, f"Preparing the repository {model_id}") is False and private:
        raise HubError(
            f"{model_id} is there already and is public: make it private in its settings, or give another user/name."
        )
    return model_id


def push_folder(
    folder: str | Path,
    model_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Model, figures and card",
    tag: str | None = None,
    api: HfApi | None = None,
) -> CommitInfo:
    """Push what [`pushed_files`] names as one commit; what an earlier push left and this one has not is removed.

    Pushing the same again changes nothing.

    Args:
        folder (`str` or `Path`): where a recipe or `save_model` has written.
        model_id (`str`): `user/name`, or the name alone.
        private (`bool`, *optional*): whether a new repository is private.
        revision (`str`, *optional*, defaults to "main"): the branch, made if it is not there.
        commit_message (`str`, *optional*): of the commit.
        tag (`str`, *optional*): a name for the pushed revision, such as "v1".
        api: see [`require_login`].

    Returns:
        `CommitInfo`: of huggingface_hub.

    Raises:
        FileNotFoundError, ValueError: see [`pushed_files`].
        HubError: if it cannot be pushed; the message ends with the command that pushes again.
    """
    files: dict[str, Path | bytes] = {file.name: file for file in pushed_files(folder)}
    api = api or hub_api()

    def commit() -> CommitInfo:
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        return commit_files(api, repository, files, _is_replaced, commit_message=commit_message, revision=revision)

    try:
        repository = prepare_repository(model_id, private=private, api=api)
        if CARD in files:  # names the model by its id, whatever it was called when the card was written
            card = Path(folder, CARD).read_text(encoding="utf-8")
            files[CARD] = put_model_id(card, repository).encode()
        info = retry(commit, f"Pushing to {repository}{'' if revision is None else f', {revision}'}")
        if tag is not None:
            retry(lambda: _tag(api, repository, tag, info.oid), f"Tagging {repository} as {tag}")
    except HubError as error:
        command = push_command(folder, model_id, hub_private_repo=private, revision=revision, tag=tag)
        raise HubError(f"{error} All of it is in {folder}; to push it again: {command}") from error
    return info


def push_snapshots(
    folder: str | Path,
    model_id: str,
    *,
    best: int | None = None,
    private: bool | None = None,
    api: HfApi | None = None,
) -> dict[str, CommitInfo]:
    """Push the snapshots of a run, each as a branch that holds a whole model: `revision="cycle-001"` loads it.

    Args:
        folder (`str` or `Path`): the run's output folder, with its model and `_runs/snapshots`.
        model_id, private, api: see [`push_folder`].
        best (`int`, *optional*): only so many, those with the lowest validation loss.

    Returns:
        `dict[str, CommitInfo]`: by branch.

    Raises:
        FileNotFoundError, ValueError: if there is no model or snapshot, one is not of the model, or `best` is out of
            range or asks for losses that were not recorded.
        HubError: if one cannot be pushed.
    """
    folder = Path(folder)
    pushed_files(folder)
    snapshots = snapshot_files(folder / SNAPSHOTS_FOLDER)
    if best is not None:
        snapshots = best_snapshots(snapshots, best)
    commits: dict[str, CommitInfo] = {}
    for snapshot in snapshots:
        branch = snapshot.stem
        with tempfile.TemporaryDirectory() as whole:
            _write_model(folder, snapshot, Path(whole))
            try:
                commits[branch] = push_folder(
                    whole, model_id, private=private, revision=branch, commit_message=branch, api=api
                )
            except HubError as error:
                command = push_command(folder, model_id, hub_private_repo=private, snapshots=True, best=best)
                reason = error.__cause__ or error  # without the command for the temporary folder
                raise HubError(f"{reason} The snapshots are in {folder}; to push them again: {command}") from error
    return commits


def commit_files(
    api: HfApi, repository: str, files: Mapping[str, Path | bytes], is_replaced: Callable[[str], bool], **kwargs: Any
) -> CommitInfo:
    """Push files as one commit, which also removes what an earlier one left.

    `HfApi.upload_folder` may split a push into several commits, makes one whose answer was lost twice, and waits as
    long as it is told to (huggingface_hub 2.4).

    Args:
        api (`HfApi`): the client.
        repository (`str`): `user/name`.
        files (mapping): contents, or where they are, by their names in the repository.
        is_replaced: whether a file of the repository, by its name, goes if it is not among them.
        **kwargs: `commit_message`, `revision` and `repo_type` of [`~huggingface_hub.HfApi.create_commit`].
    """
    where = {name: kwargs.get(name) for name in ("revision", "repo_type")}
    old = [name for name in api.list_repo_files(repository, **where) if is_replaced(name) and name not in files]
    additions = [CommitOperationAdd(name, content) for name, content in files.items()]  # the client marks them as sent
    return api.create_commit(repository, [*additions, *map(CommitOperationDelete, old)], **kwargs)


def push_command(folder: str | Path, model_id: str, **flags: Any) -> str:
    """The command line that pushes a folder."""
    words = ["hf-sgdr", "push", str(folder), model_id]
    for name, value in flags.items():
        if value is not None and value is not False:
            words += [f"--{name}", *([] if value is True else [str(value)])]
    return shlex.join(words)


def _write_model(folder: Path, snapshot: Path, target: Path) -> None:
    """The model of a run's folder with the weights of a snapshot, and its processor."""
    model = AutoModelForImageClassification.from_pretrained(folder)
    try:
        load_model(model, snapshot)
    except RuntimeError as error:
        raise ValueError(f"{snapshot} is not of the model in {folder}: {str(error).splitlines()[0]}") from error
    model.save_pretrained(target)
    for name in PROCESSOR_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)


def _tag(api: HfApi, repository: str, tag: str, revision: str) -> None:
    """Name a revision; a name that it has already is fine."""
    tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(repository).tags}
    if tag not in tags:
        api.create_tag(repository, tag=tag, revision=revision)
    elif tags[tag] != revision:
        raise HubError(f"the tag is there already, of revision {tags[tag][:8]}; the push itself is done. Give another.")


def _is_replaced(name: str) -> bool:
    """Whether a push may have left a file of this name in a repository; a card may as well be a person's, and stays."""
    return _matches(name, (*MODEL_FILES, *RUN_FILES, *CARD_PICTURES))


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return "/" not in name and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _require_clean(files: Iterable[Path], folder: Path) -> None:
    """No token and no path of this machine in a text that is pushed."""
    paths = {str(path) for path in (Path.home(), Path.cwd(), folder.resolve()) if len(path.parts) > 1}
    local = re.compile("|".join(rf"(?<![\w./-]){re.escape(path)}(?![\w-])" for path in sorted(paths)) or r"(?!)")
    for file in files:
        text = file.read_text(encoding="utf-8")
        if _TOKEN.search(text):
            raise ValueError(f"{file} holds what looks like an access token of the Hub: take it out, then push again.")
        found = local.search(text)
        if found:
            raise ValueError(f"{file} names a folder of this machine ({found[0]}), which would be public: take it out.")
