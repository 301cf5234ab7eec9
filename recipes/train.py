"""The whole lesson on a folder of images: find rates, train the head on features, augment, unfreeze, anneal.

    hf-sgdr train dogscats --model timm/resnet34.a1_in1k
    hf-sgdr train lesson.yaml dogscats --output_dir out
    accelerate launch -m hf_sgdr.recipes.train dogscats     # several processes
    hf-sgdr demo                                            # the embedded demo, offline, as without images

Copy it and change it (hf-sgdr copy-recipe train): everything it does is here or in one call of hf_sgdr.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from hf_sgdr.cli.arguments import DECIDED_BY_STAGES, GROUPS, TRAINING
from hf_sgdr.cli.build import build_trainer, chosen_stages, load_images
from hf_sgdr.cli.main import run_cli
from hf_sgdr.cli.parser import parse
from hf_sgdr.cli.quiet import hide_bars
from hf_sgdr.cli.recipes import recipes_folder
from hf_sgdr.cli.summary import print_summary, stated_facts
from hf_sgdr.data.labels import is_multi_label
from hf_sgdr.demo import DEMO_MODEL, demo_image_folder, demo_weights_file
from hf_sgdr.hub.push import push_folder, require_login
from hf_sgdr.hub.recipe_file import write_recipe
from hf_sgdr.hub.space import push_space
from hf_sgdr.training.record import run_record
from hf_sgdr.training.stages import is_finished, run_stages, save_results


def main(argv: Sequence[str]) -> int:
    hide_bars()
    demo = recipes_folder() / "configs" / "demo.yaml"
    args = parse(TRAINING, argv, __doc__, demo=demo, refused=DECIDED_BY_STAGES, groups=GROUPS)
    data, model_args, recipe, training = args
    stages = chosen_stages(recipe.stages, training.learning_rate if "learning_rate" in args.given else None)
    push, is_main, output_dir = training.push_to_hub, training.process_index == 0, Path(training.output_dir)
    if recipe.push_space and not push:
        raise ValueError("--push_space shows a model of the Hub: give --push_to_hub, too.")
    if recipe.push_space and training.hub_revision is not None:
        raise ValueError("--push_space shows the model of the main branch: push it there, without --hub_revision.")
    if push and is_main:
        training.hub_model_id = require_login(training.hub_model_id or output_dir.absolute().name)
    if args.is_demo:
        if is_main:
            print("This is the embedded demo: 1,797 handwritten digits, tf_efficientnet_lite0.")
            print("Images of your own: hf-sgdr train FOLDER")
        data.data_dir = str(demo_image_folder())
        if model_args.model_name_or_path == DEMO_MODEL and model_args.pretrained:
            model_args.weights_file = model_args.weights_file or str(demo_weights_file())
    settings = {"n_aug": recipe.n_aug}  # for recipe.yaml, beside the data's, the model's and the trainer's
    columns = {name: getattr(training, name) for name in ("image_column_name", "label_column_name")}
    settings |= columns if data.dataset_name is not None else {k: v for k, v in columns.items() if k in args.given}

    images = load_images(data, training)
    if recipe.push_space and is_multi_label(images["train"].features["label"]):
        raise ValueError("--push_space: the page is for one label an image, and these images have several.")
    trainer = build_trainer(images, model_args, training)  # with --push_to_hub it makes the repository
    training.push_to_hub = False  # saving would push, too, before card and results are there
    commit = None
    if recipe.resume and is_finished(trainer, stages):
        if is_main:
            print(f"The run in {output_dir} is finished; its metrics are in results.json. Nothing to train.")
        if push and is_main:
            hub = {"private": training.hub_private_repo, "revision": training.hub_revision}
            commit = push_folder(output_dir, training.hub_model_id, **hub)
    else:
        results = run_stages(trainer, stages, resume=recipe.resume)
        if recipe.n_aug and trainer.train_transform.is_random:
            results.tta = trainer.fit_tta(recipe.n_aug)
        trainer.save_model()
        is_demo = args.is_demo and args.given.isdisjoint({"model_name_or_path", "weights_file", "pretrained", "stages"})
        trainer.create_model_card(**stated_facts(data, model_args, recipe, is_demo, training.world_size))
        if is_main:
            write_recipe(run_record(trainer), model=asdict(model_args), data=asdict(data), more=settings)
            save_results(results, output_dir / "results.json")  # from here on the run is finished
            print_summary(results, training)
        if push:
            commit = trainer.push_to_hub()
    if commit is not None:  # on the main process, which pushed
        print(f"Pushed to {commit.repo_url} (commit {commit.oid[:8]}).")
        if recipe.push_space:
            print(f"The page: {push_space(commit.repo_url.repo_id, recipes_folder() / 'space').repo_url}")
    trainer.end()
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
