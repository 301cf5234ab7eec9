"""Ratios of speed, measured in one run on one machine: medians of several repetitions.

    pip install -e ".[bench]"                       # without it the rows of others are left out
    python benchmarks/run.py --data_dir dogscats [--only decoding readers extraction inference head training
                             processes memory start] [--repetitions 5] [--quick] [--write]

Compared are like with like: the same images, network, precision and memory layout. `--write` puts the tables, the
machine and the versions into benchmarks/RESULTS.md. `--device cuda` measures what a GPU changes (extraction, head,
training), in one table of its own. `--quick` takes two repetitions, so that all of it ends within half an hour.
`benchmarks/lesson.py` compares the whole lesson with fastai's.
"""

import argparse
import subprocess
import sys
import warnings
from pathlib import Path

import torch
from head import head
from image_path import decoding, extraction
from inference import inference
from memory import memory
from processes import processes
from readers import readers
from start import start
from timing import as_table, write_section
from training import training
from transformers.utils import logging

from hf_sgdr._utils.system import keep_freed_memory
from hf_sgdr.data.folders import image_files

IMAGES, TRAINING_IMAGES, MANY = 256, 128, 50_000


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="a folder with at least 256 images below it")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--quick", action="store_const", const=2, dest="repetitions", help="two repetitions")
    parser.add_argument("--write", action="store_true", help="write benchmarks/RESULTS.md")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: a table of its own")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here (torch.cuda.is_available() is False).")
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")  # of the libraries that ours is compared with
    keep_freed_memory()
    files = [Path(file) for _, file in zip(range(IMAGES), image_files(options.data_dir), strict=False)]
    if options.device == "cuda":
        rows = [*extraction(files, options.repetitions, "cuda"), *head(options.repetitions, "cuda")]
        lines = as_table([*rows, *training(files, options.repetitions, "cuda")])
        print("\n".join(lines))
        if options.write:
            write_section("On a GPU", lines, f"medians of {options.repetitions}, each round in turn")
        return
    if len(options.only) > 1:  # each in a process of its own: what one leaves in memory slows the next one down
        again = [word for word in sys.argv[1:] if word not in ("--only", *SECTIONS)]
        for name in options.only:
            subprocess.run([sys.executable, __file__, *again, "--only", name], check=True)
        return
    title, measure = SECTIONS[options.only[0]]
    lines = measure(files, options.data_dir, options.repetitions)
    print(f"\n{title}\n" + "\n".join(lines), flush=True)
    if options.write:
        write_section(title, lines, f"medians of {options.repetitions}, each round in turn")


SECTIONS = {
    "decoding": ("Decoding", lambda files, data_dir, n: as_table(decoding(files, n))),
    "readers": ("The image path", lambda files, data_dir, n: readers(files, n)),
    "extraction": ("Extraction", lambda files, data_dir, n: as_table(extraction(files, n))),
    "inference": ("Prediction", lambda files, data_dir, n: as_table(inference(files, n))),
    "head": ("Head epochs", lambda files, data_dir, n: as_table(head(n))),
    "training": ("Training epochs", lambda files, data_dir, n: as_table(training(files[:TRAINING_IMAGES], n))),
    "processes": ("Two processes", lambda files, data_dir, n: processes(files, n)),
    "memory": ("Memory (one run each)", lambda files, data_dir, n: memory(files, data_dir, MANY)),
    "start": ("Start to first answer", lambda files, data_dir, n: start(data_dir, n)),
}

if __name__ == "__main__":
    main()
