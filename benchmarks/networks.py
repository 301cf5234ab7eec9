"""Which network: a dozen that people use, where each can be cut, what it takes and how fast its features are.

    python benchmarks/networks.py [--only resnet34] [--repeat 5]

Weights are random, which costs the same as trained ones. Features a second are those of the bare forward pass up to the
head, in the precision that features have by default, each network in turn with tf_efficientnet_lite0 and the best of
the repetitions. docs/networks.md has the table.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import timm
import torch
from transformers.utils import logging

from hf_sgdr import LayerGroups, create_image_classifier
from hf_sgdr.features.extract import resolve_feature_dtype
from hf_sgdr.models.boundary import Boundary

REFERENCE = "tf_efficientnet_lite0.in1k"
NETWORKS = (
    REFERENCE,
    "tf_efficientnet_lite2.in1k",
    "mobilenetv4_conv_medium.e500_r224_in1k",
    "resnet34.a1_in1k",
    "resnet50.a1_in1k",
    "regnety_032.ra_in1k",
    "convnext_tiny.in12k_ft_in1k",
    "swin_tiny_patch4_window7_224.ms_in1k",
    "vit_small_patch16_224.augreg_in21k_ft_in1k",
    "vit_small_patch14_dinov2.lvd142m",
    "vit_small_patch16_dinov3.lvd1689m",
    "vit_base_patch16_siglip_224.v2_webli",
)
BATCH = 16


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")  # of timm's own models
    dtype = resolve_feature_dtype(torch.device("cpu"))
    print(f"{torch.get_num_threads()} threads, {dtype}, batches of {BATCH}")
    print(
        "| network | input | parameters, millions | width | cut at | features a second | of lite0's | licence |\n"
        + "|---" * 8
        + "|"
    )
    reference, *_ = features_of(REFERENCE, dtype)
    for name in options.only:
        run, size, width, cuts, parameters = features_of(name, dtype)
        ours, theirs = [], []
        run()
        for _ in range(options.repeat):
            theirs.append(seconds(reference))
            ours.append(seconds(run))
        ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
        licence = timm.get_pretrained_cfg(name).license or "not stated"
        print(
            f"| {name} | {size} | {parameters / 1e6:.1f} | {width:,} | {cuts} | {BATCH / min(ours):.0f} | {ratio:.2f} "
            f"| {licence} |",
            flush=True,
        )


def features_of(name: str, dtype: torch.dtype) -> tuple[Callable[[], object], int, int, str, int]:
    """A batch's forward pass up to the head; the input's side, the features' width, where to cut, and parameters."""
    torch.manual_seed(0)
    own = timm.get_pretrained_cfg(name).input_size[-1]
    size = 224 if own == 518 else own  # DINOv2's own 518 px are five times the tokens; people take 224
    arguments = {} if size == own else {"img_size": size}
    model = create_image_classifier(name, labels=["a", "b"], pretrained=False, **arguments).eval()
    model = model.to(memory_format=torch.channels_last)
    groups = LayerGroups.from_model(model)
    cuts = []
    for frozen in range(1, len(groups)):
        try:
            cuts.append(Boundary.at_boundary(groups, size, frozen).name.removeprefix("timm_model."))
        except ValueError:
            cuts.append("-")
    boundary = Boundary.at_boundary(groups, size, len(groups) - 1)
    images = torch.randn(BATCH, 3, size, size).contiguous(memory_format=torch.channels_last)

    def run() -> torch.Tensor:
        with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return boundary.caught(images)[0]

    width = run().shape[-1]
    return run, size, width, ", ".join(cuts), sum(parameter.numel() for parameter in model.parameters())


def seconds(run: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
