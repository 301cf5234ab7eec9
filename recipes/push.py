"""Push what a recipe or `trainer.save_model()` left in a folder: for the first time, or again.

    python recipes/push.py out user/name
    python recipes/push.py out user/name --hub_private_repo --tag v1
    python recipes/push.py out user/name --best 2       # and the two best snapshots, each as a branch
    python recipes/push.py out user/name --push_space   # and a page for the model, a Gradio Space (recipes/space)

Pushing the same again changes nothing.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_sgdr.cli.errors import OneLineParser, run_cli
from hf_sgdr.hub.push import push_folder, push_snapshots, pushed_files

SPACE = Path(__file__).parent / "space"


def main(argv: Sequence[str]) -> int:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", help="folder with the model, its card and figures")
    parser.add_argument("model_id", help="user/name, or the name alone")
    parser.add_argument("--hub_private_repo", action="store_true", help="make a new repository a private one")
    parser.add_argument("--revision", metavar="BRANCH", help="push to a branch, made if it is not there")
    parser.add_argument("--tag", help="a name for the pushed revision, as v1")
    parser.add_argument("--message", default="Model, figures and card", help="of the commit")
    parser.add_argument("--snapshots", action="store_true", help="also each snapshot, as branch cycle-001 and so on")
    parser.add_argument("--best", type=int, metavar="K", help="only the K snapshots of lowest validation loss")
    parser.add_argument("--push_space", action="store_true", help="also publish a page for the model, a Gradio Space")
    parser.add_argument(
        "--space_examples",
        nargs="+",
        type=Path,
        default=[],
        metavar="PHOTO",
        help="that everybody may see, on the page",
    )
    options = parser.parse_args(argv)
    if options.space_examples and not options.push_space:
        raise ValueError("--space_examples are for the page: give --push_space, too.")
    private = options.hub_private_repo or None
    names = [file.name for file in pushed_files(options.output_dir)]
    branches: Sequence[str] = ()
    if options.snapshots or options.best is not None:
        branches = list(push_snapshots(options.output_dir, options.model_id, best=options.best, private=private))
    done = push_folder(
        options.output_dir,
        options.model_id,
        private=private,
        revision=options.revision,
        commit_message=options.message,
        tag=options.tag,
    )
    print(f"{', '.join(names)}\npushed to {done.repo_url} (commit {done.oid[:8]}).")
    for branch in branches:
        print(f"Snapshot: from_pretrained({done.repo_url.repo_id!r}, revision={branch!r})")
    if options.push_space:
        from hf_sgdr.hub.space import push_space  # importing what reads photos takes seconds

        page = push_space(done.repo_url.repo_id, SPACE, examples=options.space_examples)
        print(f"The page: {page.repo_url}")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
