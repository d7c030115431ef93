"""Goodput of a long job on machines that fail, and how often to save.

Failures of the whole job come at rate nodes / MTBF. Each costs its detection, the restart and the work since the last
checkpoint; each checkpoint costs its write. M mean time between failures of the job, C seconds a checkpoint, R seconds
from a failure to training again, tau seconds of work between checkpoints.

Young 1974: tau = sqrt(2 C M). Daly 2006 (equation 37): tau = sqrt(2 C M) [1 + sqrt(C / 2M) / 3 + C / 18M] - C, or M
where C >= 2M. Wall time of work T under exponential failures (Daly, equation 13, failures during restarts included):

    T_wall = M e^(R/M) (e^((tau + C)/M) - 1) T / tau
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Failures:
    """How a job loses time. Seconds."""

    mtbf: float
    """Mean time between failures of any node of the job."""
    checkpoint: float
    """The step waits so long for a save."""
    restart: float
    """From a failure to the next step: detection, new ranks, loading."""


def young_interval(failures: Failures) -> float:
    """Seconds of work between checkpoints, first order."""
    return math.sqrt(2 * failures.checkpoint * failures.mtbf)


def daly_interval(failures: Failures) -> float:
    """Seconds of work between checkpoints, higher order."""
    checkpoint, mtbf = failures.checkpoint, failures.mtbf
    if checkpoint >= 2 * mtbf:
        return mtbf
    ratio = checkpoint / (2 * mtbf)
    return math.sqrt(2 * checkpoint * mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - checkpoint


def goodput(failures: Failures, interval: float) -> float:
    """Share of the time that ends up in kept steps, 0 to 1, with a checkpoint each so many seconds of work."""
    exponent = (interval + failures.checkpoint) / failures.mtbf
    if exponent > 700:
        return 0.0
    stretch = failures.mtbf * math.exp(failures.restart / failures.mtbf) * math.expm1(exponent) / interval
    return 1.0 / stretch
