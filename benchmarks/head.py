"""Head epochs on the same features: SGDRTrainer, a raw loop, a stock Trainer, fastai, Lightning."""

import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from timing import QUIET, Row, medians
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer, TrainingArguments

from hf_sgdr import FeatureStore, SGDRTrainer, SGDRTrainingArguments, create_image_classifier, get_sgdr_schedule
from hf_sgdr.features.head import FeatureDataset, Rows

ROWS, WIDTH, BATCH = 64_000, 512, 64


def head(repetitions: int, device: str = "cpu") -> list[Row]:
    """Steps a second of one epoch of a linear head; a raw loop has its rows on the device already."""
    features = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
    labels = (features[:, 0] > 0).long()
    model = create_image_classifier("resnet18", labels=["a", "b"], pretrained=False)
    linear = model.timm_model.fc = nn.Linear(WIDTH, 2)
    values = {**QUIET, "use_cpu": device == "cpu", "dataloader_num_workers": 0}

    def optimizer() -> torch.optim.Optimizer:
        return torch.optim.SGD(linear.parameters(), lr=0.01, momentum=0.9)

    with tempfile.TemporaryDirectory() as place:
        arguments = SGDRTrainingArguments(place, eval_strategy="no", **values)
        trainer = SGDRTrainer(model, arguments, train_dataset=[0])
        trainer.precompute = True
        store = FeatureStore({"rows": "of this benchmark"}, ROWS, Path(place, "store"))
        for shard in range(store.num_shards):
            store.write(shard, features[store.shard_rows(shard).start : store.shard_rows(shard).stop])

        def ours(rows: Rows) -> None:
            trainer.features.training = lambda _: FeatureDataset([rows], labels)
            trainer.fit(0.01, 1, cycle_len=1)

        rows = [{"features": row, "labels": label} for row, label in zip(features, labels, strict=True)]

        class Stock(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.head = linear

            def forward(self, features: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
                logits = self.head(features)
                return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

        def stock() -> None:
            args = TrainingArguments(place, num_train_epochs=1, per_device_train_batch_size=BATCH, **values)
            sgd = optimizer()
            Trainer(Stock(), args, train_dataset=rows, optimizers=(sgd, get_sgdr_schedule(sgd, ROWS // BATCH))).train()

        def raw() -> None:
            linear.to(device)
            on_device, their_labels = features.to(device), labels.to(device)
            sgd = optimizer()
            schedule = get_sgdr_schedule(sgd, ROWS // BATCH)
            for chosen in torch.randperm(ROWS, device=device).split(BATCH):
                nn.functional.cross_entropy(linear(on_device[chosen]), their_labels[chosen]).backward()
                sgd.step()
                schedule.step()
                sgd.zero_grad()

        runs: dict[str, Callable[[], Any]] = {
            "ours": lambda: ours(features),
            "ours on disk": lambda: ours(store.open()),
            "a raw torch loop": raw,
            "a stock Trainer on rows of tensors": stock,
        }
        data = TensorDataset(features, labels)
        if find_spec("fastai"):
            runs["fastai"] = _with_fastai(linear, data, device)
        if find_spec("lightning"):
            runs["Lightning"] = _with_lightning(linear, data, place, device)
        seconds = medians(runs, repetitions)
    rates = {name: ROWS / BATCH / value for name, value in seconds.items()}
    on_disk = rates.pop("ours on disk")
    rows = [
        ("head epoch, SGDRTrainer, steps", name, rates["ours"], rate) for name, rate in rates.items() if name != "ours"
    ]
    return [*rows, ("head epoch, features on disk, steps", "features in memory", on_disk, rates["ours"])]


def _with_fastai(linear: nn.Module, data: TensorDataset, device: str) -> Callable[[], Any]:
    from fastai.callback.progress import ProgressCallback  # noqa: F401  (it patches Learner)
    from fastai.callback.schedule import fit_sgdr  # noqa: F401  (it patches Learner)
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader as FastaiLoader
    from fastai.learner import Learner
    from fastai.optimizer import SGD

    loaders = DataLoaders(
        FastaiLoader(data, bs=BATCH, shuffle=True, num_workers=0),
        FastaiLoader(data, bs=ROWS, num_workers=0),
        device=torch.device(device),
    )
    learner = Learner(loaders, linear, loss_func=nn.CrossEntropyLoss(), opt_func=SGD)

    def run() -> None:
        with learner.no_bar(), learner.no_logging():
            learner.validate = lambda *args, **kwargs: None
            learner._do_epoch_validate = lambda *args, **kwargs: None
            learner.fit_sgdr(1, 1, lr_max=0.01)

    return run


def _with_lightning(linear: nn.Module, data: TensorDataset, place: str, device: str) -> Callable[[], Any]:
    import logging
    import warnings

    import lightning

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear

        def training_step(self, batch: Any, number: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self.linear(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            sgd = torch.optim.SGD(self.linear.parameters(), lr=0.01, momentum=0.9)
            schedule = {"scheduler": get_sgdr_schedule(sgd, ROWS // BATCH), "interval": "step"}
            return {"optimizer": sgd, "lr_scheduler": schedule}

    def run() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = lightning.Trainer(
                max_epochs=1, accelerator=device, devices=1, logger=False, enable_checkpointing=False,
                enable_progress_bar=False, enable_model_summary=False, default_root_dir=place,
            )  # fmt: skip
            trainer.fit(Module(), DataLoader(data, BATCH, shuffle=True))

    return run
