"""What tests of training share: tiny models, the formula of a cycle, and callbacks that record or interrupt."""

import math

import torch
from transformers import TrainerCallback, ViTConfig, ViTForImageClassification

from hf_sgdr import create_image_classifier

LABELS = ("cats", "dogs")


def tiny_resnet(labels=LABELS):
    """A residual network of 373,000 weights, random but seeded."""
    torch.manual_seed(0)
    return create_image_classifier("test_resnet", labels=list(labels), pretrained=False)


def tiny_vit(labels=LABELS, **kwargs):
    """A vision transformer of transformers, random but seeded."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    return ViTForImageClassification(ViTConfig(**{**sizes, "image_size": 32, "patch_size": 8, **names, **kwargs}))


def cosine(step, steps):
    """A cycle's multiplier."""
    return (1 + math.cos(math.pi * step / steps)) / 2


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(expected, given):
    """Whether tensors by name are equal, bit for bit; `given` may hold more."""
    return all(torch.equal(tensor, given[name]) for name, tensor in expected.items())


def losses(trainer, key="eval_loss"):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def without_times(history):
    """A log history's entries without what differs from run to run."""
    times = ("runtime", "_per_second", "total_flos")
    return [{key: value for key, value in entry.items() if not key.endswith(times)} for entry in history]


class RateRecorder(TrainerCallback):
    """Every parameter group's rate at every optimizer step."""

    def __init__(self):
        self.rates = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append([group["lr"] for group in optimizer.param_groups])


class Interrupt(TrainerCallback):
    """Ctrl-C at the count-th call of an event of training, of those at `step` if it is given."""

    def __init__(self, event, count=1, step=None):
        self.left, self.step = count, step
        setattr(self, event, self._interrupt)

    def _interrupt(self, args, state, control, **kwargs):
        self.left -= self.step in (None, state.global_step)
        if self.left == 0:
            raise KeyboardInterrupt
