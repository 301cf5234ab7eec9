"""Push what a recipe or `trainer.save_model()` left in a folder: for the first time, or again.

    hf-sgdr push out user/name
    hf-sgdr push out user/name --hub_private_repo --tag v1
    hf-sgdr push out user/name --best 2       # and the two best snapshots, each as a branch
    hf-sgdr push out user/name --push_space   # and a page for the model, a Gradio Space

Pushing the same again changes nothing.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoConfig

from hf_sgdr.cli.main import run_cli
from hf_sgdr.cli.parser import OneLineParser
from hf_sgdr.cli.quiet import hide_bars
from hf_sgdr.cli.recipes import recipes_folder
from hf_sgdr.data.labels import MULTI_LABEL
from hf_sgdr.hub.push import push_folder, push_snapshots, pushed_files
from hf_sgdr.hub.space import push_space


def main(argv: Sequence[str]) -> int:
    hide_bars()
    args = parser().parse_args(argv)
    if args.space_examples and not args.push_space:
        raise ValueError("--space_examples are for the page: give --push_space, too.")
    if args.revision is not None and args.push_space:
        raise ValueError("--push_space shows the model of the main branch: push it there, without --revision.")
    private = args.hub_private_repo or None
    names = [file.name for file in pushed_files(args.output_dir)]
    if args.push_space and AutoConfig.from_pretrained(args.output_dir).problem_type == MULTI_LABEL:
        raise ValueError("--push_space: the page is for one label an image, and this model gives several.")
    branches: Sequence[str] = ()
    if args.snapshots or args.best is not None:
        branches = list(push_snapshots(args.output_dir, args.model_id, best=args.best, private=private))
    commit = push_folder(
        args.output_dir,
        args.model_id,
        private=private,
        revision=args.revision,
        commit_message=args.message,
        tag=args.tag,
    )
    model_id = commit.repo_url.repo_id
    print(f"{', '.join(names)}\npushed to {commit.repo_url} (commit {commit.oid[:8]}).")
    for branch in branches:
        print(f"Snapshot: from_pretrained({model_id!r}, revision={branch!r})")
    if args.push_space:
        page = push_space(model_id, recipes_folder() / "space", examples=args.space_examples)
        print(f"The page: {page.repo_url}")
    return 0


def parser() -> OneLineParser:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("output_dir", help="folder with the model, its card and plots")
    parser.add_argument("model_id", help="user/name, or the name alone")
    parser.add_argument("--hub_private_repo", action="store_true", help="make a new repository a private one")
    parser.add_argument("--revision", metavar="BRANCH", help="push to a branch, made if it is not there")
    parser.add_argument("--tag", help="a name for the pushed revision, as v1")
    parser.add_argument("--message", default="Model, figures and card", help="of the commit")
    parser.add_argument("--snapshots", action="store_true", help="also each snapshot, as branch cycle-001 and so on")
    parser.add_argument("--best", type=int, metavar="K", help="only the K snapshots of lowest validation loss")
    parser.add_argument("--push_space", action="store_true", help="also publish a page for the model, a Gradio Space")
    parser.add_argument(
        "--space_examples", nargs="+", type=Path, default=[], metavar="IMAGE", help="that everybody may see on the page"
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_cli(main))
