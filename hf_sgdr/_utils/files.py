"""Names of folders that several rooms know."""

# Below an output folder: what a run keeps for itself, and what an unfinished one left.
RUNS_FOLDER, UNFINISHED_RUNS_FOLDER = "_runs", "_runs-unfinished"
