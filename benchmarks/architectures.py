"""Which architectures of timm can be trained: one small one of each of its model files, with random weights.

    python benchmarks/architectures.py [--only resnet vision_transformer] [--limit 10] [--write]

For each: its layer groups, whether it can be cut at its head, so that features are precomputed, and whether one step
moves all groups. `--write` puts the table into benchmarks/ARCHITECTURES.md; all of it
took a quarter of an hour on one busy core.
"""

import argparse
import warnings
from collections.abc import Callable
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import list_modules
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_sgdr import LayerGroups, create_image_classifier
from hf_sgdr.models.boundary import Boundary

TABLE = Path(__file__).parent / "ARCHITECTURES.md"
LABELS = ["a", "b", "c"]
SIZES = (64, 128, 224, 256)
# In the names of small architectures, the smallest first.
SMALL = ("test_", "zepto", "atto", "femto", "pico", "nano", "xxs", "xs", "tiny", "mini", "small", "_t", "_s", "0", "1")
CANDIDATES = 4


def main() -> None:
    """Try and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list_modules(), help="model files of timm")
    parser.add_argument("--limit", type=int, help="try the first so many model files only")
    parser.add_argument("--write", action="store_true", help=f"write benchmarks/{TABLE.name}")
    options = parser.parse_args()
    logging.set_verbosity_error()
    getLogger("hf_sgdr").setLevel(ERROR)
    warnings.simplefilter("ignore")  # of timm's own models
    rows = []
    for module in sorted(options.only)[: options.limit]:
        name = smallest(module)
        if name is None:
            continue
        rows.append(f"| {module} | {name} | {' | '.join(tried(name))} |")
        print(rows[-1], flush=True)
    heading = "| model file | architecture | input | layer groups | cut at head | one step | note |"
    works = sum("| yes | yes |" in row for row in rows)
    about = (
        f"torch {torch.__version__}, timm {timm.__version__}: {works} of {len(rows)} train and can be precomputed. "
        "Random weights; the input is the smallest of "
        f"{', '.join(map(str, SIZES))} pixels and the model's own that it takes."
    )
    text = "\n".join([about, "", heading, "|---|---|---|---|---|---|---|", *rows])
    print(about)
    if options.write:
        TABLE.write_text(f"# Architectures of timm\n\n{text}\n", encoding="utf-8")


def smallest(module: str) -> str | None:
    """The architecture of a model file with the fewest parameters, among those whose names sound smallest."""
    names = timm.list_models(module=module)
    names.sort(key=lambda name: next((i for i, word in enumerate(SMALL) if word in name), len(SMALL)))
    sizes: dict[str, int] = {}
    for name in names[:CANDIDATES]:
        with torch.device("meta"):
            try:
                model = timm.create_model(name, num_classes=len(LABELS))
            except Exception:  # some cannot be built without memory
                continue
        sizes[name] = sum(parameter.numel() for parameter in model.parameters())
    return min(sizes, key=lambda name: sizes[name]) if sizes else next(iter(names), None)


def tried(name: str) -> tuple[str, str, str, str, str]:
    """Input, layer groups, cut at head, one step and note of an architecture."""
    notes: list[str] = []
    torch.manual_seed(0)
    try:
        model, size = working(name)
        groups = LayerGroups.from_model(model)
    except Exception as error:
        return "-", "no", "-", "-", first_line(error)
    counts = [sum(parameter.numel() for parameter in groups.parameters(i)) for i in range(len(groups))]
    shown = ", ".join(f"{count:,}" for count in counts)
    results = [answer(check, model, groups, size, notes) for check in (cut_at_head, one_step)]
    return str(size), shown, results[0], results[1], "; ".join(notes)


def working(name: str) -> tuple[PreTrainedModel, int]:
    """The model, and the smallest side of a picture that it takes."""
    own = timm.get_pretrained_cfg(name)
    for size in (*SIZES, own.input_size[-1] if own else 224):
        for arguments in ({"img_size": size}, {}):
            try:
                model = create_image_classifier(name, labels=LABELS, pretrained=False, **arguments)
                with torch.inference_mode():
                    model.eval()(torch.zeros(2, 3, size, size))
            except Exception as error:  # another size, or it has no such argument
                reason = error
                continue
            return model, size
    raise reason


def answer(check: Callable[..., None], model: Any, groups: LayerGroups, size: int, notes: list[str]) -> str:
    """Whether it goes; why not goes to the notes."""
    try:
        check(model, groups, size)
    except Exception as error:
        notes.append(first_line(error))
        return "no"
    return "yes"


def cut_at_head(model: Any, groups: LayerGroups, size: int) -> None:
    """What comes after the features must make the model's logits of them."""
    groups.freeze_to(-1)
    boundary = Boundary.at_boundary(groups, size)
    with torch.inference_mode():
        features, logits = boundary.caught(torch.randn(2, 3, size, size), with_logits=True)
        alone = boundary.logits(features)
    if alone.shape != logits.shape or not torch.allclose(alone, logits, rtol=1e-3, atol=1e-4):
        raise ValueError("what comes after the features does not give its logits")


def one_step(model: Any, groups: LayerGroups, size: int) -> None:
    """A step moves all layer groups."""
    groups.unfreeze()
    before = [[parameter.clone() for parameter in groups.parameters(i)] for i in range(len(groups))]
    optimizer = torch.optim.SGD(groups.param_groups(1e-2))
    loss = model.train()(pixel_values=torch.randn(4, 3, size, size), labels=torch.tensor([0, 1, 2, 0])).loss
    loss.backward()
    optimizer.step()
    if not loss.isfinite():
        raise ValueError(f"the loss is {loss.item()}")
    for i, old in enumerate(before):
        if all(torch.equal(a, b) for a, b in zip(old, groups.parameters(i), strict=True)):
            raise ValueError(f"the group {groups.names[i]} does not move")


def first_line(error: Exception) -> str:
    """An error in a table's cell."""
    text = next(iter(str(error).splitlines()), "") or type(error).__name__
    return text.replace("|", "/")[:160]


if __name__ == "__main__":
    main()
