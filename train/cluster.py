"""The schema of `cluster.*`: where a job's ranks run."""

from dataclasses import dataclass


@dataclass
class ClusterConfig:
    """Where the ranks run; read by `python -m launch` and the planner."""

    launcher: str = "local"
    """local: torchrun's agent on this machine."""
    nodes: int = 1
    """Machines."""
    gpus_per_node: int | None = None
    """Accelerators on each; null detects."""
    processes: int | None = None
    """Ranks on this machine; null means one an accelerator, or one on a CPU."""
    hardware: str | None = None
    """Accelerator name for the planner and MFU when it cannot be detected, such as a100_40g; null detects."""
