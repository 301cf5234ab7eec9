"""Draws docs/lesson.png, README's picture, from a run of the whole lesson.

python docs/make_picture.py --data_dir dogscats
"""

import argparse
from pathlib import Path

from transformers import set_seed

from hf_sgdr import (
    SGDRTrainer,
    SGDRTrainingArguments,
    create_image_classifier,
    image_transforms,
    load_image_folder,
    run_stages,
)
from hf_sgdr.demo import DEMO_MODEL, demo_weights_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--output_dir", default="picture_out")
    args = parser.parse_args()
    set_seed(42)
    images = load_image_folder(args.data_dir)
    model = create_image_classifier(
        DEMO_MODEL, labels=images["train"].features["label"].names, weights_file=demo_weights_file()
    )
    train_transform, eval_transform = image_transforms(model, augment="side_on", max_zoom=1.1)
    trainer = SGDRTrainer(
        model,
        SGDRTrainingArguments(args.output_dir, n_groups=3),
        train_dataset=images["train"],
        eval_dataset=images["validation"],
        train_transform=train_transform,
        eval_transform=eval_transform,
    )
    run_stages(trainer)
    trainer.history.plot().savefig(Path(__file__).parent / "lesson.png")


if __name__ == "__main__":
    main()
