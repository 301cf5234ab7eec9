"""The forward pass by torch and by OpenVINO's runtime: whether an engine of its own earns its keep.

    pip install -e ".[bench]" openvino
    python benchmarks/engines.py [--models resnet34] [--rounds 5] [--dtype bfloat16]

Both in the same precision, batches of 32, random weights, which cost the same as trained ones; torch as features are
extracted: batch norms folded, channels last, freed memory kept, bfloat16 by autocast. OpenVINO: static batch, the
better one of its hints for latency and for throughput. The last ratio is of 5,000 images, conversion included.
docs/experiments.md has the table.
"""

import argparse
import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F

from hf_sgdr._utils.system import keep_freed_memory
from hf_sgdr.models.fuse import fused_batch_norms

MODELS = (
    "tf_efficientnet_lite0",
    "mobilenetv4_conv_small",
    "mobilenetv4_conv_medium",
    "resnet34",
    "efficientnet_b0",
    "convnext_atto",
    "vit_tiny_patch16_224",
)
BATCH, PASSES, IMAGES = 32, 4, 5_000
# By the names of torch and of OpenVINO.
PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="names of timm")
    parser.add_argument("--rounds", type=int, default=5, help="medians of so many, the engines in turn")
    parser.add_argument("--dtype", choices=list(PRECISIONS), default="float32")
    options = parser.parse_args()
    keep_freed_memory()
    print("| network | torch, images/s | OpenVINO | ratio | conversion, s | ratio at 5,000 images | cosine, least |")
    print("|---|---|---|---|---|---|---|")
    for name in options.models:
        print(compared(name, options.rounds, options.dtype), flush=True)


def compared(name: str, rounds: int, dtype: str) -> str:
    """A row of the table."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0).eval().to(memory_format=torch.channels_last)
    size = model.pretrained_cfg["input_size"][-1]
    pixels = torch.randn(BATCH, 3, size, size)
    start = time.perf_counter()
    theirs = converted(model, pixels, PRECISIONS[dtype])
    conversion = time.perf_counter() - start
    last = pixels.contiguous(memory_format=torch.channels_last)

    def ours() -> None:
        for _ in range(PASSES):
            model(last)

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")  # as features are extracted
    with torch.inference_mode(), autocast:
        cosine = F.cosine_similarity(model(last).float(), torch.from_numpy(theirs[0]())).min()
        with fused_batch_norms(model, size):
            rates = [PASSES * BATCH / seconds for seconds in in_turn([ours, *theirs[1:]], rounds)]
    torch_rate, rate = rates[0], max(rates[1:])
    whole = IMAGES / torch_rate / (conversion + IMAGES / rate)
    cells = [f"{torch_rate:.1f}", f"{rate:.1f}", f"{rate / torch_rate:.2f}", f"{conversion:.1f}", f"{whole:.2f}"]
    return f"| {name} | {' | '.join(cells)} | {cosine:.7f} |"


def converted(model: torch.nn.Module, pixels: torch.Tensor, precision: str) -> list[Callable[[], Any]]:
    """One pass, and some passes in each of two ways."""
    openvino = importlib.import_module("openvino")
    core, values = openvino.Core(), pixels.numpy()
    network = openvino.convert_model(model, example_input=pixels[:1], input=list(pixels.shape))
    by_hint = [
        core.compile_model(network, "CPU", {"PERFORMANCE_HINT": hint, "INFERENCE_PRECISION_HINT": precision})
        for hint in ("LATENCY", "THROUGHPUT")
    ]
    queue = openvino.AsyncInferQueue(by_hint[1])

    def queued() -> None:
        for _ in range(PASSES):
            queue.start_async(values)
        queue.wait_all()

    return [lambda: by_hint[0](values)[0], lambda: [by_hint[0](values) for _ in range(PASSES)], queued]


def in_turn(runs: list[Callable[[], Any]], rounds: int) -> list[float]:
    """Median seconds of each."""
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds + 1):
        for run, values in zip(runs, seconds, strict=True):
            start = time.perf_counter()
            run()
            values.append(time.perf_counter() - start)
    return [statistics.median(values[1:]) for values in seconds]


if __name__ == "__main__":
    main()
