"""NCCL's flight recorder: torch keeps each rank's newest collectives, and writes them down when a hang is found.

torch reads its variables when the process group is made, makes a named pipe for each rank, and writes its records to a
file when somebody writes into the pipe (ProcessGroupNCCL's DumpPipe) or its own timeout has passed. The files lie
beside the stacks; `torchfrtrace --prefix nccl_rank_ RUN/stacks` compares them. Without NCCL nothing listens.
"""

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path


def variables(run_dir: Path, events: int) -> dict[str, str]:
    """What the ranks need in their environment to keep so many collectives each; nothing for 0."""
    if not events:
        return {}
    file = str(run_dir / "stacks" / "nccl_rank_")
    return {
        "TORCH_FR_BUFFER_SIZE": str(events),
        "TORCH_FR_DUMP_TEMP_FILE": file,
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_DEBUG_INFO_PIPE_FILE": _pipes(run_dir),
    }


def ask(run_dir: Path, rank: int) -> None:
    """Have a rank of this machine write its records."""
    # Opened without waiting: where no rank listens there is an error in place of a hang.
    with contextlib.suppress(OSError):
        pipe = os.open(f"{_pipes(run_dir)}{rank}.pipe", os.O_WRONLY | os.O_NONBLOCK)
        try:
            os.write(pipe, b"1\n")
        finally:
            os.close(pipe)


def _pipes(run_dir: Path) -> str:
    """Where the pipes of a run's ranks begin; on the machine's own disk, for a shared one may have no pipes."""
    return str(Path(tempfile.gettempdir()) / f"tiankong-{hashlib.sha256(str(run_dir).encode()).hexdigest()[:12]}-")
