"""The schema of `python -m launch.plan`: a training config, and what the planner wants to know besides."""

from dataclasses import dataclass, field

from train.config import Config


@dataclass
class PlannerConfig:
    """Assumptions of a plan. null takes the figure of `launch/hardware.py`, where there is one."""

    search: bool = True
    """Try every layout; false plans the one that `parallel` and `micro_batch_size` give."""
    utilization: float | None = None
    """Share of the peak that the hardware does, recomputation counted (HFU), measured elsewhere: days follow from it
    without a cost model, also for layouts that do not divide the machines."""
    peak_tflops: float | None = None
    """Dense peak of one accelerator."""
    memory_gib: float | None = None
    """Memory of one accelerator."""
    memory_gb_per_second: float | None = None
    """Memory bandwidth of one accelerator."""
    link_gb_per_second: float | None = None
    """One direction between accelerators of a node."""
    network_gb_per_second: float | None = None
    """One direction between nodes, an accelerator's share."""
    dollars_per_hour: float | None = None
    """Price of one accelerator for an hour."""
    node_watts: float | None = None
    """Power of one node at full load."""
    power_usage_effectiveness: float = 1.2
    """What the building draws for each watt of the machines."""
    attended_share: float | None = None
    """Query-key pairs that the mask leaves; null computes it from data.sampling."""
    target_share: float | None = None
    """Slots with a target, for the head; null computes it from data.sampling."""
    node_mtbf_days: float = 62.0
    """Mean days between failures of one node (OPT-175B: 124 nodes lost two a day)."""
    detection_seconds: float = 180.0
    """From a failure to its notice."""
    restart_seconds: float = 600.0
    """From its notice to the first step: new ranks, loading the checkpoint, warm-up."""
    storage_gb_per_second: float = 40.0
    """All ranks together, writing a checkpoint that the step waits for."""


@dataclass
class PlanConfig(Config):
    """A training run that is planned, not run."""

    tokens: float | None = None
    """Tokens to train on; null takes max_samples, or schedule.decay_samples, times sequence_length."""
    output: str = "plan.json"
    """The plan as JSON; a page of the same name with .html stands beside it."""
    planner: PlannerConfig = field(default_factory=PlannerConfig)
