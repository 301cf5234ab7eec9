"""The whole lesson on a folder of photos: find rates, train the head on features, augment, unfreeze, anneal.

    accelerate launch recipes/train.py                                  # the embedded demo, offline
    accelerate launch recipes/train.py --data_dir dogscats --model timm/resnet34.a1_in1k
    accelerate launch recipes/train.py recipes/configs/lesson.yaml --data_dir dogscats --output_dir out

Copy it and change it: everything it does is here or in one call of hf_sgdr.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import CommitInfo

from hf_sgdr.card_facts import local_origin
from hf_sgdr.clear_errors import nothing_left_on_failure, one_clear_line
from hf_sgdr.cli import DataArguments, ModelArguments, all_words, build_trainer, chosen_stages, load_photos, parse
from hf_sgdr.demo import ORIGIN, demo_photo_folder, demo_weights_file
from hf_sgdr.hub import push_folder, require_login
from hf_sgdr.model_card import hub_id, require_license, write_model_card
from hf_sgdr.recipe_file import RECIPE_FILE, write_recipe
from hf_sgdr.space import push_space
from hf_sgdr.stages import RunResults, Stage, run_stages, save_results
from hf_sgdr.trainer import SGDRTrainer
from hf_sgdr.training_args import SGDRTrainingArguments

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
    "max_steps",
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


def main(argv: Sequence[str]) -> int:
    is_demo = not any(word.split("=")[0] in ("--data_dir", "--dataset_name", "-h", "--help") for word in argv)
    is_demo = is_demo and not (argv and argv[0].endswith((".yaml", ".yml")))
    kinds = (DataArguments, ModelArguments, RecipeArguments, SGDRTrainingArguments)
    data, model_args, recipe, training = parse(kinds, argv, __doc__, CONFIGS / "demo.yaml" if is_demo else None)
    given = {word.split("=")[0].replace("-", "_").lstrip("_") for word in all_words(argv) if word.startswith("--")}
    stages = stages_of(recipe, training, "learning_rate" in given)
    require_license(recipe.license)
    results_file = Path(training.output_dir, "results.json")
    # Saving pushes, too, and figures and card are not there yet: the recipe pushes at its end.
    push, training.push_to_hub = training.push_to_hub, False
    if recipe.push_space and not push:
        raise ValueError("--push_space shows a model of the Hub: give --push_to_hub, too.")
    if push and training.process_index == 0:
        require_login(hub_name(training))
    if recipe.resume and results_file.exists():
        print(f"The run in {training.output_dir} is finished; {results_file} has its figures. Nothing to train.")
        if push and training.process_index == 0:
            show_push(push_folder(training.output_dir, hub_name(training), **said_for_push(training)), recipe)
        return 0
    if is_demo:
        print("This is the embedded demo: 1,797 handwritten digits, tf_efficientnet_lite0. Yours: --data_dir FOLDER.")
        data.data_dir = str(demo_photo_folder())
        model_args.weights_file = model_args.weights_file or str(demo_weights_file())
    columns = {"image_column_name": training.image_column_name, "label_column_name": training.label_column_name}
    photos = load_photos(data, training)
    with nothing_left_on_failure(training.output_dir):
        trainer = build_trainer(photos, model_args, training)
        if push:
            trainer.init_hf_repo()
    results = run_stages(trainer, stages, resume=recipe.resume)
    if recipe.n_aug and trainer.train_transform.is_random:
        results.tta = test_time_augmentation(trainer, recipe.n_aug)
    trainer.save_model()
    write_model_card(trainer, results, **said_for_card(data, model_args, recipe, is_demo))
    if trainer.is_world_process_zero():
        said = {"n_aug": recipe.n_aug, **(columns if data.dataset_name is not None else {})}
        write_recipe(trainer, stages, model=model_args, data=data, more=said)
        save_results(results, results_file)  # from here on the run is finished
        print_summary(results, training.output_dir)
    if push:
        show_push(trainer.push_to_hub(), recipe)
    trainer.end()
    return 0


def stages_of(recipe: RecipeArguments, training: SGDRTrainingArguments, has_rate: bool) -> tuple[Stage, ...]:
    """The stages; a --learning_rate takes the place of the range test."""
    # not from a second SGDRTrainingArguments: making one sets up the processes anew
    default = {item.name: item.default for item in fields(SGDRTrainingArguments)}
    said = [name for name in SAID_BY_STAGES if getattr(training, name) != default[name]]
    if said:
        raise ValueError(
            f"{', '.join('--' + name for name in said)}: the stages say that; write stages in a YAML file."
        )
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
        "photos_name": dataset or Path(data.data_dir or data.dataset_name).resolve().name,
        "origin": local_origin(name, model_args.weights_file, model_args.pretrained),
        "license": recipe.license,
        "tta_views": recipe.n_aug,
        "command": " ".join(command),
        "with_photos": recipe.card_photos,
    }
    if is_demo:
        facts["license"] = recipe.license or "apache-2.0"  # that of the weights and of this package
        facts |= {"command": "accelerate launch recipes/train.py", "origin": ORIGIN, "with_photos": True}
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


def print_summary(results: RunResults, output_dir: str) -> None:
    print(f"\n{'stage':<14}{'epochs':>7}{'train loss':>12}{'valid loss':>12}{'accuracy':>10}{'seconds':>9}")
    for stage in results.stages:
        print(
            f"{stage['name']:<14}{stage['epochs']:>7}{stage['train_loss']:>12.4f}{stage['eval_loss']:>12.4f}"
            f"{stage['eval_accuracy']:>10.4f}{stage['seconds']:>9.1f}"
        )
    best = results.best
    print(f"{'best':<14}{'':>7}{'':>12}{best['eval_loss']:>12.4f}{best['eval_accuracy']:>10.4f}   from {best['stage']}")
    if results.tta:
        print(f"{'with TTA':<14}{'':>7}{'':>12}{results.tta['loss']:>12.4f}{results.tta['accuracy']:>10.4f}")
    print(
        f"\nModel, plots and results.json are in {output_dir}. Try it: pipeline('image-classification', '{output_dir}')"
    )


if __name__ == "__main__":
    sys.exit(one_clear_line(main))
