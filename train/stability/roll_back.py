"""The checkpoint that a roll-back goes to."""

from pathlib import Path

from train.checkpoint.read import newest_whole
from train.checkpoint.select import checkpoint_steps, read_state
from train.collective import from_rank_zero
from train.mesh import Mesh


def checkpoint_before(mesh: Mesh, run_dir: Path, step: int, every: int) -> tuple[int, int] | None:
    """(step, consumed samples) of the newest whole checkpoint before a step, the same on all ranks; None without one.

    every: saving.every_steps. One that a signal made between them does not count: an undisturbed run would not have it,
    and a resumed run must go back to where that would.
    """
    # One rank's listing counts for all: a file system may show them different ones for a moment.
    steps = from_rank_zero(mesh, lambda: checkpoint_steps(run_dir))
    folder, _ = newest_whole(mesh, run_dir, [saved for saved in steps if saved < step and saved % every == 0])
    if folder is None:
        return None
    state = from_rank_zero(mesh, lambda: read_state(folder))
    return int(state["step"]), int(state["consumed_samples"])
