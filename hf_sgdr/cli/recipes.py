"""Where the recipes are, and copies of them to change."""

import shutil
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
# Each recipe's files, from its script on.
FILES = {
    "train": ("train.py", "configs/lesson.yaml"),
    "find-lr": ("find_lr.py",),
    "predict": ("predict.py",),
    "report": ("report.py",),
    "push": ("push.py",),
}


def recipes_folder() -> Path:
    """`hf_sgdr/recipes` where the package is installed; in a checkout `recipes` beside it."""
    installed = PACKAGE / "recipes"
    return installed if installed.is_dir() else PACKAGE.parent / "recipes"


def copy_recipe(name: str, folder: Path) -> list[Path]:
    """Copy a recipe's script and its YAML file into a folder, which is made; nothing is overwritten.

    Returns:
        `list[Path]`: the copies, the script first.

    Raises:
        FileExistsError: if a file of that name is there.
        OSError: if the folder cannot be written.
    """
    copies = {recipes_folder() / file: folder / Path(file).name for file in FILES[name]}
    if existing := [copy for copy in copies.values() if copy.exists()]:
        raise FileExistsError(f"{existing[0]} is there already and is left as it is: give another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    for source, copy in copies.items():
        shutil.copyfile(source, copy)
    return list(copies.values())
