"""A Gradio Space for a model on the Hub: its folder put together from a template, and published as one commit."""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from huggingface_hub import CommitInfo, HfApi, SpaceCard
from PIL import Image
from transformers.utils import logging

from hf_sgdr.data.images import read_image
from hf_sgdr.hub.push import commit_files, hub_api, require_login
from hf_sgdr.hub.retry import HubError, retry

logger = logging.get_logger(__name__)

PACKAGE = Path(__file__).parents[1]
EXAMPLES = "examples"
# Pixels; an example is for looking at, and the model sees less.
LONGEST_SIDE = 1024


def make_space(folder: Path, template: Path, model_id: str, examples: Sequence[Path] = ()) -> None:
    """Put a Space together: the template's files, this package beside them, the model's id in the card, examples.

    The package goes along as source, so that the Space runs the version that published it and no package index need
    have it. Examples are written anew, without what a camera notes in an image, such as the place.

    Args:
        folder (`Path`): a new folder.
        template (`Path`): the folder with `app.py` and what it needs: `recipes/space`.
        model_id (`str`): as on the Hub, `user/name`.
        examples (sequence of `Path`, *optional*): pictures that everybody may see; none by default.

    Raises:
        FileNotFoundError: if the template is not there.
        UnreadableImageError: a `ValueError`, if an example cannot be read.
    """
    folder.mkdir(parents=True)
    for name in ("app.py", "style.css", "requirements.txt"):
        shutil.copyfile(template / name, folder / name)
    card = SpaceCard.load(template / "README.md")
    card.data["title"] = f"What is in the image? {model_id.split('/')[-1]}"
    card.data["models"] = [model_id]
    card.save(folder / "README.md")
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__", ".*", "recipes"))
    for number, example in enumerate(examples, start=1):
        image = read_image(example)
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
        (folder / EXAMPLES).mkdir(exist_ok=True)
        Image.fromarray(np.asarray(image)).save(folder / EXAMPLES / f"{number:02d}.jpg", quality=90)


def push_space(
    model_id: str,
    template: Path,
    *,
    examples: Sequence[Path] = (),
    private: bool | None = None,
    api: HfApi | None = None,
) -> CommitInfo:
    """Publish a page for a model that is on the Hub, as a Space of the model's own name; once more: renew it.

    Args:
        model_id (`str`): `user/name`, or the name alone.
        template, examples: see [`make_space`].
        private (`bool`, *optional*): whether only you may see a new Space; by default as the model is.
        api (`HfApi`, *optional*): the client; by default that of the login.

    Returns:
        `CommitInfo`: of huggingface_hub; `repo_url` is the page's address.

    Raises:
        HubError: if there is no such model, no login that may write there, the Space is public where it should be
            private, or the Hub cannot be asked.
        FileNotFoundError, ValueError: see [`make_space`].
    """
    api = api or hub_api()
    model_id = require_login(model_id, api)
    doing = f"Publishing the Space {model_id}"
    model_is_private = bool(retry(lambda: api.model_info(model_id).private, f"Looking up {model_id}"))
    private = model_is_private if private is None else private

    def prepare() -> bool | None:
        api.create_repo(model_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
        return api.space_info(model_id).private

    def is_replaced(name: str) -> bool:
        return name.startswith((f"{PACKAGE.name}/", f"{EXAMPLES}/"))

    def commit() -> CommitInfo:
        message = f"A page for {model_id}"
        return commit_files(api, model_id, files, is_replaced, commit_message=message, repo_type="space")

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "space")
        make_space(folder, template, model_id, examples)
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        if retry(prepare, doing) is False and private:
            raise HubError(f"The Space {model_id} is there already and is public: make it private in its settings.")
        info = retry(commit, doing)
    if model_is_private:
        logger.warning(
            f"The model {model_id} is private: give the Space, in its settings, a secret HF_TOKEN that may read it."
        )
    return info
