"""A long job on machines that fail: one event after the other, with spares, repairs and fewer nodes where none is left.

Each running node fails after an exponential time. A failure loses the work since the last checkpoint, is noticed after
a while, and training starts again after the restart: with a spare in the failed node's place, or with fewer nodes
(elastic data parallelism: the same batch over fewer replicas, so progress slows in proportion), or waiting for a repair
when fewer than `minimum_nodes` are left. A repaired node joins at the next start.
"""

import heapq
import math
from dataclasses import dataclass, field

import numpy as np

from launch.plan_failures import Failures

DAY = 86400.0


@dataclass(frozen=True)
class Job:
    """What is simulated. Seconds."""

    nodes: int
    """Machines of the whole job."""
    failures: Failures
    """`mtbf` of the whole job at its full size."""
    interval: float
    """Work between two checkpoints."""
    spares: int
    """Machines that wait for one to fail."""
    repair: float
    """From a failure until the machine is back; 0 means at once."""
    minimum_nodes: int
    """Fewer than this cannot hold the model: the job waits."""
    granularity: int = 1
    """Nodes of one replica: what is left of a group idles."""


@dataclass
class Ledger:
    """Where the time went; all seconds, and `work` in seconds of the full job's pace."""

    work: float = 0.0
    """Kept."""
    redone: float = 0.0
    """Lost since the last checkpoint."""
    saving: float = 0.0
    down: float = 0.0
    """Detection and restarts."""
    waiting: float = 0.0
    """For repairs, with too few nodes."""
    slowed: float = 0.0
    """What fewer nodes did not do."""
    failures: int = 0
    sizes: list[int] = field(default_factory=list)
    """Nodes at each start."""

    def goodput(self, horizon: float) -> float:
        """Share of the time that ended up in kept work, 0 to 1."""
        return self.work / horizon


def simulate_month(job: Job, *, horizon: float = 30 * DAY, seed: int = 0) -> Ledger:
    """Run the job for a while; returns where the time went. The parts of the ledger add up to the horizon."""
    generator = np.random.default_rng(seed)
    rate = 1.0 / (job.failures.mtbf * job.nodes)  # of one node
    ledger = Ledger()
    repairs: list[float] = []  # when machines come back
    healthy = job.nodes + job.spares
    now = 0.0
    while now < horizon:
        while repairs and repairs[0] <= now:
            heapq.heappop(repairs)
            healthy += 1
        nodes = min(job.nodes, healthy) // job.granularity * job.granularity
        if nodes < job.minimum_nodes:
            until = min(horizon, repairs[0] if repairs else horizon)
            ledger.waiting += until - now
            now = until
            continue
        ledger.sizes.append(nodes)
        lasts = generator.exponential(1.0 / (rate * nodes))
        _train(job, ledger, min(lasts, horizon - now), nodes / job.nodes, failed=now + lasts < horizon)
        now += lasts
        if now >= horizon:
            break
        ledger.failures += 1
        healthy -= 1
        heapq.heappush(repairs, now + job.repair)
        now = _restart(job, ledger, now, horizon, generator, rate * nodes)
    return ledger


def _train(job: Job, ledger: Ledger, seconds: float, pace: float, *, failed: bool) -> None:
    """Book a stretch of training: whole cycles of work and save, and a rest that a failure loses."""
    cycle = job.interval + job.failures.checkpoint
    cycles = math.floor(seconds / cycle)
    rest = seconds - cycles * cycle
    done = cycles * job.interval
    ledger.saving += cycles * job.failures.checkpoint
    if failed:
        ledger.redone += rest
    else:
        done += min(rest, job.interval)
        ledger.saving += max(0.0, rest - job.interval)
    ledger.work += done * pace
    ledger.slowed += done * (1.0 - pace)


def _restart(
    job: Job, ledger: Ledger, now: float, horizon: float, generator: np.random.Generator, rate: float
) -> float:
    """Book detection and restart, begun anew where another node fails meanwhile; returns when training goes on."""
    start = now
    while True:
        next_failure = generator.exponential(1.0 / rate)
        if next_failure >= job.failures.restart or now + next_failure >= horizon:
            now += job.failures.restart
            break
        now += next_failure
        ledger.failures += 1
    now = min(now, horizon)
    ledger.down += now - start
    return now
