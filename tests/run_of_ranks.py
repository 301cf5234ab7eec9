"""What tests/test_ranks.py launches: the lesson's calls on a tiny model, or a stock Trainer that unfreezes by stages.

    python run_of_ranks.py IMAGES PLACE GLOBAL_BATCH KIND:PORT [KIND:PORT ...]

Each rank writes what it saw of each kind. A kind is a forked process of its own, for a process joins one group only;
what takes long, the imports, is done once.
"""

import hashlib
import json
import multiprocessing
import os
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTConfig, ViTForImageClassification

from hf_sgdr import (
    LayerGroups,
    SGDRTrainer,
    SGDRTrainingArguments,
    StagedUnfreezing,
    create_image_classifier,
    image_transforms,
    load_image_folder,
)
from hf_sgdr.callbacks.loop import EqualBuffers


def digest(tensors) -> str:
    return hashlib.sha256(b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)).hexdigest()


class Losses(TrainerCallback):
    def __init__(self):
        self.values = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.values += [logs[key] for key in ("loss", "eval_loss", "eval_accuracy") if key in logs]


def make_vit() -> ViTForImageClassification:
    return ViTForImageClassification(ViTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, image_size=32,
        patch_size=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        id2label={0: "cats", 1: "dogs"}, label2id={"cats": 0, "dogs": 1},
    ))  # fmt: skip


def staged_unfreezing(outputs: Path, kind: str, batch: int, **kwargs) -> None:
    """StagedUnfreezing on a stock Trainer: the weights of each rank after each epoch."""
    torch.manual_seed(0)
    model = make_vit() if kind == "stock vit" else create_image_classifier(
        "test_resnet", labels=["cats", "dogs"], pretrained=False
    )  # fmt: skip
    groups, seen = LayerGroups.from_model(model), []

    class Note(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            seen.append([digest(groups.parameters(i)) for i in range(3)])

    pixels = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    trainer = Trainer(
        model,
        TrainingArguments(
            str(outputs / kind), num_train_epochs=3, per_device_train_batch_size=batch, use_cpu=True, report_to="none",
            disable_tqdm=True, save_strategy="no", **kwargs,
        ),
        train_dataset=[{"pixel_values": image, "labels": i % 2} for i, image in enumerate(pixels)],
        optimizers=(torch.optim.SGD(groups.param_groups(1e-2), momentum=0.9), None),
        callbacks=[StagedUnfreezing({0: -1, 1: 1, 2: 0}, groups), EqualBuffers(), Note()],
    )  # fmt: skip
    try:
        trainer.train()
        refusal = None
    except ValueError as error:
        refusal = str(error)
    values = {name: tensor.tolist() for name, tensor in model.state_dict().items()}
    content = {"seen": seen, "buffers": digest(model.buffers()), "values": values, "refusal": refusal}
    (outputs / f"{kind}-{trainer.args.process_index}.json").write_text(json.dumps(content))


def main() -> None:
    folder, outputs, global_batch, *kinds = sys.argv[1:]
    batch = int(global_batch) // int(os.environ.get("WORLD_SIZE", "1"))
    for kind, port in (arg.rsplit(":", 1) for arg in kinds):
        process = multiprocessing.get_context("fork").Process(
            target=run, args=(folder, Path(outputs), kind, batch, port)
        )
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(f"{kind} ended with {process.exitcode}")


def run(folder: str, outputs: Path, kind: str, batch: int, port: str) -> None:
    """One kind, in a group of processes that meets at a port of its own."""
    if "MASTER_PORT" in os.environ:
        os.environ |= {"MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "False"}
    torch.set_num_threads(1)
    if kind.startswith("stock"):
        refused = {"ddp_find_unused_parameters": False} if kind == "stock refused" else {}
        staged_unfreezing(outputs, kind, batch, **refused)
    else:
        lesson(folder, outputs, kind, batch)


def lesson(folder: str, outputs: Path, kind: str, batch: int) -> None:
    """The calls of the lesson: weights and buffers after each fit, losses, predictions."""
    images = load_image_folder(folder)
    torch.manual_seed(0)
    if kind == "vit":
        model = make_vit()
    else:
        model = create_image_classifier("test_resnet", labels=["cats", "dogs"], pretrained=False)
    train_transform, eval_transform = image_transforms(model, image_size=32, augment="side_on", max_zoom=1.1)
    trainer = SGDRTrainer(
        model,
        SGDRTrainingArguments(
            str(outputs / kind), per_device_train_batch_size=batch, use_cpu=True, report_to="none",
            disable_tqdm=True, save_strategy="no", logging_strategy="steps", logging_steps=1,
            freeze_batch_norm=kind == "still",
        ),
        train_dataset=images["train"], eval_dataset=images["validation"],
        train_transform=train_transform, eval_transform=eval_transform,
    )  # fmt: skip
    seen = {"rank": trainer.args.process_index, "weights": [], "buffers": []}
    losses = Losses()
    trainer.add_callback(losses)

    def note() -> None:
        seen["weights"].append(digest(trainer.model.parameters()))
        seen["buffers"].append(digest(trainer.model.buffers()))

    trainer.precompute = True
    result = trainer.lr_find(1e-4, 10.0, 8)
    seen["range test"] = [result.history["loss"], result.suggestion()]
    trainer.fit(1e-2, 2)
    note()
    trainer.freeze_to(1)
    trainer.fit(1e-2, 1, cycle_len=1)
    note()
    trainer.precompute = False
    trainer.fit(1e-2, 1, cycle_len=1)
    note()
    trainer.unfreeze()
    seen["second range test"] = trainer.lr_find(1e-5, 1.0, 6).history["loss"]
    trainer.fit([1e-4, 1e-3, 1e-2], 2, cycle_len=1, cycle_mult=2)
    note()
    seen["losses"] = losses.values
    seen["evaluation"] = [trainer.evaluate()[key] for key in ("eval_loss", "eval_accuracy")]
    seen["predictions"] = np.exp(trainer.log_predictions()).tolist()
    seen["tta"] = trainer.tta(2).tolist()
    (outputs / f"{kind}-{trainer.args.process_index}.json").write_text(json.dumps(seen))
    trainer.end()


if __name__ == "__main__":
    main()
