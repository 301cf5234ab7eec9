"""The whole lesson on a folder of photos: find rates, train the head on features, augment, unfreeze, anneal.

    accelerate launch recipes/train.py                                  # the embedded demo, offline
    accelerate launch recipes/train.py --data_dir dogscats --model timm/resnet34.a1_in1k
    accelerate launch recipes/train.py recipes/configs/lesson.yaml --data_dir dogscats --output_dir out

Copy it and change it: everything it does is here or in one call of hf_sgdr.
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import CommitInfo

from hf_sgdr.cli.arguments import (
    DataArguments,
    ModelArguments,
    build_trainer,
    chosen_stages,
    given_arguments,
    has_config,
    load_images,
    parse,
)
from hf_sgdr.cli.errors import remove_empty_dir_on_error, run_cli
from hf_sgdr.demo import ORIGIN, demo_image_folder, demo_weights_file
from hf_sgdr.hub.card_facts import hub_id, local_origin, require_license
from hf_sgdr.hub.push import push_folder, require_login
from hf_sgdr.hub.recipe_file import RECIPE_FILE, write_recipe
from hf_sgdr.hub.space import push_space
from hf_sgdr.optim.schedule import require_whole
from hf_sgdr.recipe import RunResults, Stage
from hf_sgdr.training.arguments import SGDRTrainingArguments
from hf_sgdr.training.record import run_record
from hf_sgdr.training.stages import is_finished, run_stages, save_results
from hf_sgdr.training.trainer import SGDRTrainer

CONFIGS = Path(__file__).parent / "configs"
SPACE = Path(__file__).parent / "space"
# What a stage says and the command line therefore cannot.
SAID_BY_STAGES = (
    "cycle_len",
    "cycle_mult",
    "num_cycles",
    "group_learning_rates",
    "freeze_to",
    "precompute",
)
HOW_LONG = (
    "--num_train_epochs: the stages say how long: give cycles and cycle_len to the stages of a YAML file "
    "(recipes/configs/lesson.yaml is one), or --max_steps for a short trial."
)


@dataclass
class RecipeArguments:
    """What is done."""

    stages: list[str] | None = field(
        default=None,
        metadata={"help": "lesson (the default), or some of its stages: precomputed, augmented, unfrozen."},
    )
    n_aug: int = field(default=4, metadata={"help": "Augmented views of test-time augmentation at the end; 0: none."})
    license: str | None = field(
        default=None, metadata={"help": "For the card: the Hub's identifier of the licence you give, as apache-2.0."}
    )
    card_photos: bool = field(
        default=False, metadata={"help": "Show some validation photos in the card; it may become public."}
    )
    push_space: bool = field(
        default=False, metadata={"help": "With --push_to_hub: also publish a page for the model, a Gradio Space."}
    )
    resume: bool = field(
        default=False, metadata={"help": "Go on with an unfinished run; a finished one stays as it is."}
    )

    def __post_init__(self) -> None:
        require_whole("n_aug", self.n_aug, at_least=0)
        require_license(self.license)


def main(argv: Sequence[str]) -> int:
    kinds = (DataArguments, ModelArguments, RecipeArguments, SGDRTrainingArguments)
    given = given_arguments(kinds, argv, __doc__)
    check_given(given)
    is_demo = not given & {"data_dir", "dataset_name"} and not has_config(argv)
    data, model_args, recipe, training = parse(kinds, argv, __doc__, CONFIGS / "demo.yaml" if is_demo else None)
    stages = stages_of(recipe, training, "learning_rate" in given)
    # Saving pushes, too, and figures and card are not there yet: the recipe pushes at its end.
    push, training.push_to_hub = training.push_to_hub, False
    if recipe.push_space and not push:
        raise ValueError("--push_space shows a model of the Hub: give --push_to_hub, too.")
    if push and training.process_index == 0:
        require_login(hub_name(training))
    if is_demo:
        if training.process_index == 0:
            print(
                "This is the embedded demo: 1,797 handwritten digits, tf_efficientnet_lite0. Yours: --data_dir FOLDER."
            )
        data.data_dir = str(demo_image_folder())
        model_args.weights_file = model_args.weights_file or str(demo_weights_file())
    columns = {"image_column_name": training.image_column_name, "label_column_name": training.label_column_name}
    photos = load_images(data, training)
    with remove_empty_dir_on_error(training.output_dir):
        trainer = build_trainer(photos, model_args, training)
        finished = recipe.resume and is_finished(trainer, stages)
        if push and not finished:
            trainer.init_hf_repo()
    results_file = Path(training.output_dir, "results.json")
    if finished:
        if training.process_index == 0:
            print(f"The run in {training.output_dir} is finished; {results_file} has its figures. Nothing to train.")
            if push:
                show_push(push_folder(training.output_dir, hub_name(training), **said_for_push(training)), recipe)
        return 0
    results = run_stages(trainer, stages, resume=recipe.resume)
    if recipe.n_aug and trainer.train_transform.is_random:
        results.tta = test_time_augmentation(trainer, recipe.n_aug)
    trainer.save_model()
    trainer.create_model_card(**said_for_card(data, model_args, recipe, is_demo))
    if trainer.is_world_process_zero():
        said = {"n_aug": recipe.n_aug, **(columns if data.dataset_name is not None else {})}
        write_recipe(run_record(trainer), model=asdict(model_args), data=asdict(data), more=said)
        save_results(results, results_file)  # from here on the run is finished
        print_summary(results, training)
    if push:
        show_push(trainer.push_to_hub(), recipe)
    trainer.end()
    return 0


def check_given(given: set[str]) -> None:
    """Refuse what the stages say."""
    if "num_train_epochs" in given:
        raise ValueError(HOW_LONG)
    said = [name for name in SAID_BY_STAGES if name in given]
    if said:
        raise ValueError(
            f"{', '.join('--' + name for name in said)}: the stages say that; write stages in a YAML file."
        )


def stages_of(recipe: RecipeArguments, training: SGDRTrainingArguments, has_rate: bool) -> tuple[Stage, ...]:
    """The stages; a --learning_rate takes the place of the range test."""
    stages = chosen_stages(recipe.stages)
    if has_rate:
        stages = tuple(replace(stage, lr=training.learning_rate) if stage.lr == "auto" else stage for stage in stages)
    return stages


def said_for_card(
    data: DataArguments, model_args: ModelArguments, recipe: RecipeArguments, is_demo: bool
) -> dict[str, Any]:
    """What the model card says beside what was measured."""
    name, dataset = model_args.model_name_or_path, hub_id(data.dataset_name or "", with_user=False)
    command = ["accelerate launch recipes/train.py", RECIPE_FILE]
    if dataset is None:
        command.append("--data_dir PHOTOS")
    if model_args.weights_file is not None:
        command.append("--weights_file WEIGHTS")
    if Path(name).is_dir():
        command.append("--model MODEL")
    facts = {
        "dataset": dataset,
        "images_name": dataset or Path(data.data_dir or data.dataset_name).resolve().name,
        "origin": local_origin(name, model_args.weights_file, model_args.pretrained),
        "license": recipe.license,
        "tta_views": recipe.n_aug,
        "command": " ".join(command),
        "with_images": recipe.card_photos,
    }
    if is_demo:
        facts["license"] = recipe.license or "apache-2.0"  # that of the weights and of this package
        facts |= {"command": "accelerate launch recipes/train.py", "origin": ORIGIN, "with_images": True}
    return facts


def hub_name(training: SGDRTrainingArguments) -> str:
    """The repository to push to: as given, else called as the output folder."""
    return training.hub_model_id or Path(training.output_dir).absolute().name


def said_for_push(training: SGDRTrainingArguments) -> dict[str, Any]:
    return {"private": training.hub_private_repo, "revision": training.hub_revision}


def show_push(commit: CommitInfo | None, recipe: RecipeArguments) -> None:
    """On the main process, which pushed, say so; then the page."""
    if commit is not None:
        print(f"Pushed to {commit.repo_url} (commit {commit.oid[:8]}).")
        if recipe.push_space:
            print(f"The page: {push_space(commit.repo_url.repo_id, SPACE).repo_url}")


def test_time_augmentation(trainer: SGDRTrainer, n_aug: int) -> dict[str, float]:
    """Loss and accuracy on the validation photos."""
    probabilities = trainer.tta(n_aug)
    labels = np.asarray(trainer.eval_dataset[trainer.args.label_column_name])
    of_truth = probabilities[np.arange(len(labels)), labels]
    return {
        "loss": float(np.abs(np.log(np.maximum(of_truth, np.finfo(np.float32).tiny))).mean()),
        "accuracy": float((probabilities.argmax(axis=1) == labels).mean()),
    }


def print_summary(results: RunResults, training: SGDRTrainingArguments) -> None:
    print(f"\n{'stage':<14}{'epochs':>7}{'train loss':>12}{'valid loss':>12}{'accuracy':>10}{'seconds':>9}")
    for stage in results.stages:
        print(
            f"{stage['name']:<14}{stage['epochs']:>7}{shown(stage['train_loss'])}{shown(stage['eval_loss'])}"
            f"{shown(stage['eval_accuracy'], 10)}{stage['seconds']:>9.1f}"
        )
    if training.max_steps > 0:
        print(f"each fit ended after {training.max_steps} steps (--max_steps)")
    best = results.best
    print(
        f"{'best':<14}{'':>7}{'':>12}{shown(best['eval_loss'])}{shown(best['eval_accuracy'], 10)}   "
        f"lowest valid loss: {best['stage']}, epoch {best['epoch']:g}"
    )
    if results.tta:
        print(f"{'with TTA':<14}{'':>7}{'':>12}{shown(results.tta['loss'])}{shown(results.tta['accuracy'], 10)}")
    predict = [*("python", str(Path(sys.argv[0]).with_name("predict.py"))), "--model", training.output_dir]
    print(f"\nModel, plots and results.json are in {training.output_dir}. Try it: {shlex.join(predict)} PHOTO.jpg")


def shown(value: float | None, width: int = 12) -> str:
    """A figure in its column; a fit that ends early may have no training loss."""
    return f"{'–' if value is None else f'{value:.4f}':>{width}}"


if __name__ == "__main__":
    sys.exit(run_cli(main))
