"""Other pipeline schedules than 1F1B, simulated with measured costs: what would they win, and what would they hold?

    python -m benchmarks.schedules        # writes benchmarks/schedules.csv; a minute on one core, no GPU

The lists of actions are torch.distributed.pipelining's own (its schedule objects, its placing of sends and receives).
They are played on the measured times of the 3 B model's two stages on two H200s (benchmarks/parallel/split.csv), cut
into forward, gradient of the input and gradient of the weights as the profile of a step has them
(benchmarks/step/profile.csv). `deepspeed` rows are what training does today, by `launch.simulate_step`. Everything in
the table is simulated, except that the cost of a send makes one row, so marked, equal to its measured step.

Legend: p ranks, m micro-batches a step, v stages a rank; stage 0 holds the embedding, stage p·v − 1 the head.
"""

import argparse
import csv
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.pipelining import schedules

from benchmarks.pipeline_simulation import calibrate
from benchmarks.step_worker import SHAPES
from launch.simulate_step import SimulatedStep, StageTimes, simulate_step

HERE = Path(__file__).parent
SCHEDULES = {
    "1F1B": (schedules.Schedule1F1B, 1),
    "interleaved 1F1B": (schedules.ScheduleInterleaved1F1B, 2),
    "zero bubble": (schedules.ScheduleInterleavedZeroBubble, 1),
    "interleaved zero bubble": (schedules.ScheduleInterleavedZeroBubble, 2),
    "ZBV zero bubble": (schedules.ScheduleZBVZeroBubble, 2),
}
"""torch's schedules and how many stages a rank holds in each."""
LAYERS = SHAPES["3b"].layers
Orders = Mapping[int, Sequence[Any]]
"""Of each rank its list of torch's actions: (stage_index, computation_type, microbatch_index)."""


@dataclass(frozen=True)
class PassTimes:
    """Seconds of one stage and micro-batch."""

    forward: float
    backward_input: float
    backward_weight: float

    @property
    def total(self) -> float:
        """All three passes."""
        return self.forward + self.backward_input + self.backward_weight

    def __mul__(self, factor: float) -> "PassTimes":
        return PassTimes(factor * self.forward, factor * self.backward_input, factor * self.backward_weight)


@dataclass(frozen=True)
class Measured:
    """What the 3 B pipeline was measured to need for one micro-batch, in seconds."""

    layer: PassTimes
    head: PassTimes
    step: float
    """Of 16 micro-batches on two ranks."""
    one_gpu: float
    """Of the same batch on one GPU."""

    def stages(self, cut: Sequence[int]) -> list[PassTimes]:
        """Each stage's, with so many layers; the lookup at the front is free."""
        times = [self.layer * layers for layers in cut]
        head = self.head
        times[-1] = PassTimes(
            *(getattr(times[-1], name) + getattr(head, name) for name in PassTimes.__dataclass_fields__)
        )
        return times


def read_measured() -> Measured:
    """The committed figures. A stage's time is its rank's traced computing, a share of the optimizer's included."""
    split = {(row["row"], row["rank"]): row for row in _read(HERE / "parallel/split.csv") if row["shape"] == "3b"}
    speed = {row["row"]: row for row in _read(HERE / "parallel/speed.csv") if row["shape"] == "3b"}
    count = int(speed["pipeline_2_16"]["micro_batches"])
    first, last = (
        float(row["compute"]) * float(row["step_ms"]) / 1e3 / count
        for row in (split["pipeline_2_16", str(rank)] for rank in range(2))
    )
    shares, layer = _shares(), first / (LAYERS // 2)
    one_gpu = float(speed["one_gpu"]["step_ms"]) / 1e3 / int(speed["one_gpu"]["micro_batches"])
    return Measured(
        layer=shares * layer,
        # All products: forward, gradient of the hidden states, gradient of the table.
        head=PassTimes(1 / 3, 1 / 3, 1 / 3) * (last - first),
        step=float(speed["pipeline_2_16"]["step_ms"]) / 1e3,
        one_gpu=one_gpu * count,
    )


def _shares() -> PassTimes:
    """Of a layer's time, by the profile of a narrower model: products grow with the width squared, the rest with it."""
    parts: dict[str, float] = defaultdict(float)
    for row in _read(HERE / "step/profile.csv"):
        if row["contender"] == "tiankong":
            parts[row["part"]] += float(row["ms"])
    wider = SHAPES["3b"].hidden / SHAPES["anchor"].hidden
    product = wider * parts["products"] / 3
    forward = sum(ms for part, ms in parts.items() if part.startswith("GeneratedBackwardFor"))  # the forward calls
    backward = sum(parts[part] for part in ("attention", "activation", "norm", "rotary", "sums"))
    times = PassTimes(product + forward, product + backward, product)
    return times * (1 / times.total)


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def rank_of(name: str, ranks: int) -> list[int]:
    """The rank of each stage: round and round, or down and up again in a V."""
    return [*range(ranks), *reversed(range(ranks))] if name.startswith("ZBV") else [*range(ranks)] * SCHEDULES[name][1]


def orders(name: str, ranks: int, micro_batches: int) -> Orders:
    """torch's lists, sends and receives included. Raises ValueError where the schedule does not take these sizes."""
    kind, held = SCHEDULES[name]
    stage = SimpleNamespace(
        num_stages=ranks * held, group_size=ranks, group_rank=0, stage_index=0, submod=nn.Identity(), is_last=False
    )
    stage.has_backward = True
    if kind is schedules.Schedule1F1B:
        lists = schedules._add_send_recv(_plain_1f1b(stage, micro_batches), lambda stage: stage, ranks)
    else:
        lists = kind([stage] * held, micro_batches).pipeline_order_with_comms  # type: ignore[arg-type, union-attr]
    wanted = {*_PASSES, *_SENDS, *_RECEIVES}
    return {rank: [action for action in order if action.computation_type in wanted] for rank, order in lists.items()}


def _plain_1f1b(stage: Any, micro_batches: int) -> dict[int, list[Any]]:
    """torch's order of 1F1B, which its own loop does not read; the last rank's forward passes count from 1 there."""
    found = schedules.Schedule1F1B(stage, micro_batches)._get_pipeline_order()
    assert found is not None
    lists: dict[int, list[Any]] = {rank: [action for action in order if action] for rank, order in found.items()}
    for order in lists.values():
        numbers = iter(range(micro_batches))
        for place, action in enumerate(order):
            if action.computation_type == schedules.FORWARD:
                order[place] = action._replace(microbatch_index=next(numbers))
    return lists


_PASSES = {
    schedules.FORWARD: ("forward",),
    schedules.BACKWARD_INPUT: ("backward_input",),
    schedules.BACKWARD_WEIGHT: ("backward_weight",),
    schedules.FULL_BACKWARD: ("backward_input", "backward_weight"),
}
_SENDS = {schedules.SEND_F: 1, schedules.SEND_B: -1}
_RECEIVES = {schedules.RECV_F: -1, schedules.RECV_B: 1}


def play(lists: Orders, times: Sequence[PassTimes], ranks: Sequence[int], send_seconds: float) -> SimulatedStep:
    """Work through the lists as torch's runtime does on GPUs.

    ranks: of each stage. Passes run one after the other. Each pair of ranks has a queue of its own, as NCCL has for
    isend and irecv: a message starts when it is first in line at both ends and the pass before it in each list is done.
    Only a pass that needs the message waits.
    """
    count = len(lists)
    place, clock, busy = [0] * count, [0.0] * count, [0.0] * count
    # (rank, its peer) -> messages (from stage, to stage, micro-batch) that it wants moved, and since when
    queues: dict[tuple[int, int], list[tuple[tuple[int, int, int], float]]] = defaultdict(list)
    free: dict[tuple[int, int], float] = defaultdict(float)
    arrived: dict[tuple[int, int, int], float] = {}
    moved = True
    while moved:
        moved = False
        for rank in range(count):
            while place[rank] < len(lists[rank]):
                stage, kind, number, *_ = lists[rank][place[rank]]
                if kind in _PASSES:
                    source = _source(stage, kind, len(times))
                    if source is not None and ranks[source] != rank:
                        if (source, stage, number) not in arrived:
                            break
                        clock[rank] = max(clock[rank], arrived[source, stage, number])
                    spent = sum(getattr(times[stage], name) for name in _PASSES[kind])
                    clock[rank] += spent
                    busy[rank] += spent
                else:
                    other = stage + (_SENDS | _RECEIVES)[kind]
                    message = (stage, other, number) if kind in _SENDS else (other, stage, number)
                    queues[rank, ranks[other]].append((message, clock[rank]))
                place[rank] += 1
                moved = True
        for low, high in [pair for pair in queues if pair[0] < pair[1]]:
            here, there = queues[low, high], queues[high, low]
            while here and there and here[0][0] == there[0][0]:
                (message, ready), (_, ready_there) = here.pop(0), there.pop(0)
                free[low, high] = max(free[low, high], ready, ready_there) + send_seconds
                arrived[message] = free[low, high]
                moved = True
    assert all(place[rank] == len(lists[rank]) for rank in range(count)), "two ranks wait for each other"
    return SimulatedStep(finish=np.array(clock)[:, None], busy=np.array(busy)[:, None])


def _source(stage: int, kind: Any, stages: int) -> int | None:
    """The stage whose message a pass needs."""
    if kind == schedules.FORWARD:
        return stage - 1 if stage else None
    return stage + 1 if kind != schedules.BACKWARD_WEIGHT and stage < stages - 1 else None


def held(lists: Orders, stages_a_rank: int) -> float:
    """Most activations that a rank holds at once, in micro-batches of all its layers; kept to the weights' pass."""
    most = 0
    for order in lists.values():
        live = 0
        for _, kind, *_ in order:
            live += kind == schedules.FORWARD
            most = max(most, live)
            live -= kind in (schedules.BACKWARD_WEIGHT, schedules.FULL_BACKWARD)
    return most / stages_a_rank


def messages(lists: Orders, micro_batches: int) -> float:
    """Hidden states and gradients that the busiest rank sends for each micro-batch."""
    return max(sum(action[1] in _SENDS for action in order) for order in lists.values()) / micro_batches


def cut(measured: Measured, ranks: Sequence[int]) -> list[int]:
    """Layers of each stage with which the slowest rank is fastest, the even cut where it is as good.

    A layer at a time goes from the slowest rank to the fastest, from its last stage to the other's first: a pipeline
    does not mind which of its own stages a rank has them in.
    """
    best = [LAYERS // len(ranks)] * len(ranks)
    while True:
        load = _load(measured.stages(best), ranks)
        slow, fast = load.index(max(load)), load.index(min(load))
        trial = list(best)
        trial[max(stage for stage, rank in enumerate(ranks) if rank == slow)] -= 1
        trial[min(stage for stage, rank in enumerate(ranks) if rank == fast)] += 1
        if max(_load(measured.stages(trial), ranks)) >= max(load) - 1e-9:
            return best
        best = trial


def _load(times: Sequence[PassTimes], ranks: Sequence[int]) -> list[float]:
    return [sum(one.total for one, rank in zip(times, ranks, strict=True) if rank == wanted) for wanted in set(ranks)]


def rows(measured: Measured, send: float) -> Iterable[dict[str, Any]]:
    """The table: even stages for every size, then the measured 3 B model on two ranks, cut evenly and by cost."""
    rank_total = (measured.layer * (LAYERS // 2)).total
    for ranks in (2, 4, 8):
        for count in (8, 16, 32, 64):
            yield _deepspeed("even", [measured.layer * (LAYERS // 2)] * ranks, count, send, ranks * count * rank_total)
            for name, (_, stages) in SCHEDULES.items():
                times = [measured.layer * (LAYERS // 2 / stages)] * ranks * stages
                yield _torch("even", name, times, count, send, ranks * count * rank_total)
    for count in (16, 64):
        alone = measured.one_gpu * count / 16
        for layers in ([LAYERS // 2] * 2, cut(measured, [0, 1])):
            yield _deepspeed(f"3 B {layers}", measured.stages(layers), count, send, alone)
        for name in SCHEDULES:
            ranks_of = rank_of(name, 2)
            even = [LAYERS // len(ranks_of)] * len(ranks_of)
            for layers in (even, cut(measured, ranks_of)):
                yield _torch(f"3 B {layers}", name, measured.stages(layers), count, send, alone)


def _deepspeed(work: str, times: Sequence[PassTimes], count: int, send: float, alone: float) -> dict[str, Any]:
    step = simulate_step(_whole(times), count, send_seconds=send)
    # The first rank is ahead by all others; it sends an activation a micro-batch, the ranks between a gradient too.
    return _row(work, "1F1B, deepspeed", len(times), count, step, alone, min(len(times), count), min(2, len(times) - 1))


def _torch(work: str, name: str, times: Sequence[PassTimes], count: int, send: float, alone: float) -> dict[str, Any]:
    ranks = len(times) // SCHEDULES[name][1]
    lists = orders(name, ranks, count)
    step = play(lists, times, rank_of(name, ranks), send)
    return _row(work, name, ranks, count, step, alone, held(lists, SCHEDULES[name][1]), messages(lists, count))


def _row(
    work: str, name: str, ranks: int, count: int, step: SimulatedStep, alone: float, live: float, sends: float
) -> dict[str, Any]:
    return {
        "stages": work,
        "schedule": name,
        "p": ranks,
        "m": count,
        "simulated_step_ms": f"{1e3 * step.seconds:.1f}",
        "simulated_bubble": f"{step.bubble:.4f}",
        "closed_form_1f1b": f"{(ranks - 1) / (count + ranks - 1):.4f}",
        "simulated_x_one_gpu": f"{alone / step.seconds:.3f}",
        "micro_batches_held": f"{live:g}",
        "sends_a_micro_batch": f"{sends:g}",
    }


def _whole(times: Sequence[PassTimes]) -> list[StageTimes]:
    return [StageTimes(one.forward, one.backward_input + one.backward_weight) for one in times]


def send_seconds(measured: Measured) -> float:
    """What a send must cost for DeepSpeed's step, simulated, to be the measured one."""
    return calibrate(_whole(measured.stages([LAYERS // 2] * 2)), 16, measured.step)


def main() -> None:
    """Simulate all cases and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".csv"))
    arguments = parser.parse_args()
    measured = read_measured()
    send = send_seconds(measured)
    table = list(rows(measured, send))
    layer = measured.layer
    with arguments.output.open("w", encoding="utf-8", newline="") as file:
        file.write(
            f"# python -m benchmarks.schedules; torch {torch.__version__}'s schedules; every time is simulated\n"
        )
        file.write(
            f"# from measured: a layer and micro-batch {1e3 * layer.forward:.2f} ms forward, "
            f"{1e3 * layer.backward_input:.2f} gradient of its input, {1e3 * layer.backward_weight:.2f} of its "
            f"weights; head {1e3 * measured.head.total:.2f}; one GPU {1e3 * measured.one_gpu / 16:.2f}\n"
        )
        file.write(
            f"# a send of {1e3 * send:.2f} ms makes '3 B [12, 12]', deepspeed, m 16 the measured "
            f"{1e3 * measured.step:.1f} ms\n"
        )
        writer = csv.DictWriter(file, fieldnames=list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    print(arguments.output.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
