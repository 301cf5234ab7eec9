"""Labels and probabilities for images, by a model that a recipe saved or anyone pushed.

    hf-sgdr predict --model out images/ cat.jpg --output predictions.csv predictions.json
    hf-sgdr predict --model user/name images/ --tta 4 --top_k 3 --output predictions.jsonl

Rows are written as they come, so a run that is stopped leaves those it has done. What cannot be read is named on stderr
and left out; the exit code is then 1.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Subset
from tqdm.auto import tqdm

from hf_sgdr._utils.system import followed
from hf_sgdr._utils.text import printable
from hf_sgdr.cli.main import INTERRUPTED, run_cli
from hf_sgdr.cli.parser import OneLineParser
from hf_sgdr.cli.quiet import hide_bars
from hf_sgdr.cli.rows import check_outputs, distinct_names, row_of, row_writers
from hf_sgdr.data.folders import image_files
from hf_sgdr.data.images import UnreadableImageError
from hf_sgdr.data.labels import MULTI_LABEL
from hf_sgdr.inference.pipeline import TTAImageClassificationPipeline, pipeline
from hf_sgdr.optim.schedule import require_whole


def main(argv: Sequence[str]) -> int:
    hide_bars()
    args = parser().parse_args(argv)
    if args.top_k is not None:
        require_whole("--top_k", args.top_k, at_least=1)
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        raise ValueError(f"--threshold {args.threshold:g}: must be a probability from 0 to 1.")
    check_outputs(args.output)
    files = list(files_of(args.images))
    pipe = pipeline(args.model, tta=args.tta, device=args.device, batch_size=args.batch_size)
    names, is_multi_label = distinct_names(pipe.model.config), pipe.model.config.problem_type == MULTI_LABEL
    if args.threshold is not None and not is_multi_label:
        raise ValueError("--threshold: this model gives each image one label; it is for models of several.")
    threshold = (0.5 if args.threshold is None else args.threshold) if is_multi_label else None
    unreadable = 0
    with row_writers(args.output, names, args.top_k) as writers:
        try:
            for file, answer in predict(pipe, files):
                if isinstance(answer, UnreadableImageError):
                    unreadable += 1
                    tqdm.write(printable(answer), file=sys.stderr)
                    continue
                row = row_of(file, answer, names, args.top_k, threshold)
                for write in writers:
                    write(row)
        except KeyboardInterrupt:
            print("Interrupted; the rows so far are written.", file=sys.stderr)
            return INTERRUPTED
    return 1 if unreadable else 0


def predict(pipe: TTAImageClassificationPipeline, files: Sequence[Path]) -> Iterator[tuple[Path, Any]]:
    """Each file with its answer, all classes in it, or with the error of one that cannot be read."""
    # as a data set, which is answered while it is read; a list is answered at its end
    images = Subset(files, range(len(files)))
    answers = pipe(images, top_k=pipe.model.config.num_labels, return_exceptions=True)
    yield from followed(zip(files, answers, strict=True), "Predicting", len(files))


def files_of(names: Sequence[str]) -> Iterator[Path]:
    for path in map(Path, names):
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder.")
        files = list(map(Path, image_files(path))) if path.is_dir() else [path]
        if not files:
            raise ValueError(f"{path}: no image in this folder.")
        yield from files


def parser() -> OneLineParser:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("images", nargs="+", help="image files, and folders that are searched for them")
    parser.add_argument("--model", "--model_name_or_path", required=True, help="folder or model id of the Hub")
    parser.add_argument("--output", nargs="+", default=[], type=Path, metavar="FILE", help="FILE.csv, .json or .jsonl")
    parser.add_argument("--tta", type=int, default=0, help="augmented views averaged with the plain image; 0 for none")
    parser.add_argument("--top_k", type=int, help="only the best so many classes; by default all, in the model's order")
    parser.add_argument(
        "--threshold", type=float, help="of several labels an image, those with this probability; by default 0.5"
    )
    parser.add_argument("--batch_size", type=int, help="images a forward pass; by default 32 on the CPU, 64 elsewhere")
    parser.add_argument(
        "--device", type=device, help='"cpu", "cuda:0" or 0; by default the first accelerator, or the CPU'
    )
    return parser


def device(name: str) -> int | str | None:
    return int(name) if name.lstrip("-").isdigit() else name or None


if __name__ == "__main__":
    sys.exit(run_cli(main))
