"""Learning rate, batch size and EGS alpha as functions of the samples consumed.

Samples, not steps, are the clock: a ramped batch or a resumed run never bends a curve, and a run of 50 steps resumed
to 100 equals a run of 100.
"""

import math
from dataclasses import dataclass

from train.config import Config, ScheduleConfig


def learning_rate(schedule: ScheduleConfig, peak: float, consumed_samples: int) -> float:
    """The rate of a step that ends with `consumed_samples` consumed (so the first step's rate is not 0)."""
    if consumed_samples < schedule.warmup_samples:
        return peak * consumed_samples / schedule.warmup_samples
    if schedule.kind == "constant":
        return peak
    span = max(1, schedule.decay_samples - schedule.warmup_samples)
    progress = min(1.0, (consumed_samples - schedule.warmup_samples) / span)
    shape = 1.0 - progress if schedule.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return schedule.min_lr + (peak - schedule.min_lr) * shape


@dataclass(frozen=True)
class BatchSize:
    """Global batch size of the step that starts at a number of consumed samples; picklable for loader workers.

    The ramp-up holds each size for rampup_samples / (number of increments) samples, as Megatron-LM's does.
    """

    final: int
    start: int | None = None
    increment: int = 1
    rampup_samples: int = 0

    @staticmethod
    def of(config: Config) -> "BatchSize":
        """The batch-size schedule of a config."""
        schedule = config.schedule
        return BatchSize(
            config.global_batch_size, schedule.rampup_start, schedule.rampup_increment, schedule.rampup_samples
        )

    def __call__(self, consumed_samples: int) -> int:
        if self.start is None or self.start >= self.final or consumed_samples >= self.rampup_samples:
            return self.final
        increments = (self.final - self.start) // self.increment
        return self.start + self.increment * (consumed_samples * increments // self.rampup_samples)


def embedding_shrink(config: Config, consumed_samples: int) -> float:
    """EGS alpha of the step that starts at `consumed_samples`."""
    alpha = config.stability.embedding_gradient_shrink
    for sample, value in sorted(config.stability.embedding_gradient_shrink_schedule):
        if consumed_samples >= sample:
            alpha = value
    return alpha


@dataclass(frozen=True)
class RunLength:
    """Where a run ends: after `max_steps` if that is set, else after `max_samples`, else with the schedule."""

    max_steps: int | None
    samples: int
    batch_size_at: BatchSize

    @staticmethod
    def of(config: Config) -> "RunLength":
        """The length of a config's run."""
        samples = config.max_samples or config.schedule.decay_samples
        return RunLength(config.max_steps, samples, BatchSize.of(config))

    def reached(self, step: int, consumed_samples: int) -> bool:
        """Whether nothing is left to do."""
        if self.max_steps is not None:
            return step >= self.max_steps
        return consumed_samples >= self.samples

    def last_step(self, step: int, consumed_samples: int) -> int:
        """The step that the run ends with, following the batch ramp-up from where it stands."""
        while not self.reached(step, consumed_samples):
            if self.max_steps is not None:
                return self.max_steps
            size = self.batch_size_at(consumed_samples)
            if size == self.batch_size_at.final:
                return step - (consumed_samples - self.samples) // size
            step, consumed_samples = step + 1, consumed_samples + size
        return step
