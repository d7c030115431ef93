"""A training step as events: each stage of each replica works through its list of commands and waits for neighbours.

The lists are DeepSpeed's 1F1B schedule, sends and receives included: a send and its receive meet (whoever comes first
waits), which the closed form, (m - 1) times the slowest stage and once all stages, leaves out. All replicas are
computed at once: a time is an array over replicas, so that jitter and slow nodes can be different in each.

Legend: p stages, m micro-batches a replica and step, R replicas.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Times = NDArray[np.float64]  # [R]


@dataclass(frozen=True)
class Command:
    """One entry of a stage's list."""

    kind: str
    """forward, backward, send_activation, receive_activation, send_gradient or receive_gradient."""
    micro_batch: int


@dataclass(frozen=True)
class StageTimes:
    """Seconds that a stage takes for one micro-batch, without sends."""

    forward: float
    backward: float


@dataclass(frozen=True)
class Noise:
    """How much the same work differs. Standard deviations of the logarithm."""

    operation: float = 0.0
    """From one pass to the next."""
    node: float = 0.0
    """From one stage's machine to another's, the same all through the step."""


@dataclass(frozen=True)
class SimulatedStep:
    """What a simulation found."""

    finish: NDArray[np.float64]
    """[p, R]: when each stage had done its last micro-batch."""
    busy: NDArray[np.float64]
    """[p, R]: seconds that it computed."""

    @property
    def seconds(self) -> float:
        """When the slowest replica was done: the others wait for it to add up their gradients."""
        return float(self.finish.max())

    @property
    def bubble(self) -> float:
        """Share of the step in which the average stage computed nothing."""
        return 1.0 - float(self.busy.mean()) / self.seconds


def commands(stage: int, stages: int, micro_batches: int) -> Iterator[Command]:
    """A stage's list, as DeepSpeed's `TrainSchedule` gives it.

    Time is cut in 2 (m + p - 1) slots, forward and backward by turns, neighbours opposite; at each slot's start the
    stage first exchanges with the neighbour that just did the opposite.
    """
    previous: int | None = None
    for slot in range(2 * (micro_batches + stages - 1)):
        is_forward = slot % 2 == stage % 2
        if is_forward:
            number = (slot - stage) // 2
        else:
            number = (slot + stage + 1) // 2 - stages
        current = number if 0 <= number < micro_batches else None
        if is_forward:
            if previous is not None and stage > 0:
                yield Command("send_gradient", previous)
            if current is not None:
                if stage > 0:
                    yield Command("receive_activation", current)
                yield Command("forward", current)
        else:
            if current is not None and stage < stages - 1:
                yield Command("receive_gradient", current)
            if previous is not None and stage < stages - 1:
                yield Command("send_activation", previous)
            if current is not None:
                yield Command("backward", current)
        previous = current


_PARTNERS = {
    "send_activation": ("receive_activation", 1),
    "receive_activation": ("send_activation", -1),
    "send_gradient": ("receive_gradient", -1),
    "receive_gradient": ("send_gradient", 1),
}


def simulate_step(
    stages: Sequence[StageTimes],
    micro_batches: int,
    *,
    send_seconds: float = 0.0,
    replicas: int = 1,
    noise: Noise | None = None,
    seed: int = 0,
) -> SimulatedStep:
    """Run all stages' lists to their ends.

    send_seconds: one tensor between neighbours, during which both wait. seed: of the noise.
    """
    noise = noise or Noise()
    generator = np.random.default_rng(seed)
    count = len(stages)
    lists = [list(commands(stage, count, micro_batches)) for stage in range(count)]
    place = [0] * count
    clock = np.zeros((count, replicas))
    busy = np.zeros((count, replicas))
    pace = np.exp(noise.node * generator.standard_normal((count, replicas)))
    while any(place[stage] < len(lists[stage]) for stage in range(count)):
        moved = False
        for stage in range(count):
            while place[stage] < len(lists[stage]):
                command = lists[stage][place[stage]]
                if command.kind in ("forward", "backward"):
                    spent = getattr(stages[stage], command.kind) * pace[stage]
                    if noise.operation:
                        spent = spent * np.exp(noise.operation * generator.standard_normal(replicas))
                    clock[stage] += spent
                    busy[stage] += spent
                else:
                    kind, step = _PARTNERS[command.kind]
                    other = stage + step
                    if place[other] == len(lists[other]) or lists[other][place[other]] != Command(
                        kind, command.micro_batch
                    ):
                        break  # the neighbour is not there yet
                    clock[stage] = clock[other] = np.maximum(clock[stage], clock[other]) + send_seconds
                    place[other] += 1
                place[stage] += 1
                moved = True
        assert moved, "two stages wait for each other"
    return SimulatedStep(finish=clock, busy=busy)
