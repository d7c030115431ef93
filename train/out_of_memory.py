"""What a rank says when its device's memory is out: what fills it, and which keys would help."""

from pathlib import Path

from data_prep.errors import RankFailed
from train import backend
from train.config import Config
from train.memory import largest_holders, peak_memory
from train.mesh import Mesh


def out_of_memory(config: Config, mesh: Mesh, micro_batches: float, error: Exception) -> RankFailed:
    """The error to raise in place of the allocator's own. micro_batches: of a step and replica.

    Every block that the allocator holds goes to a file beside the logs, where the device can tell.
    """
    memory = peak_memory(config, data_parallel=mesh.data, micro_batches=micro_batches)
    what = str(error).partition("\n")[0].rstrip(". ")
    path = Path(config.run_dir) / "logs" / f"memory_rank_{mesh.rank}.pickle"
    seen = f"; {path} has every block, for pytorch.org/memory_viz" if backend.write_memory_snapshot(path) else ""
    return RankFailed(
        f"rank {mesh.rank} is out of memory: {what}. By the config the largest holders of the fullest stage "
        f"are: {largest_holders(config, memory)}{seen}"
    )
