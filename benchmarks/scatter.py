"""Gradient sums scattered under the last backward pass beside a scatter at the end: one engine, the same batches.

    torchrun --nproc-per-node 2 -m benchmarks.scatter                                     # 80 s on two GPUs
    torchrun --nproc-per-node 2 -m benchmarks.scatter --shape toy --micro-batches 2       # on a CPU: does it run?

Data parallel over the ranks, ZeRO 1 in bf16. First every contender trains a step with a learning rate of 0: the sums
that its optimizer is handed must be those of the first contender, to the last bit with two ranks. Then steps are timed
in turns, and one of each is traced (`benchmarks.trace`). Writes benchmarks/scatter.csv row by row.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import step_worker, trace, turns
from benchmarks.parallel_worker import together
from benchmarks.step_worker import LR, SHAPES, batch_of
from benchmarks.turns import in_time, say
from train import backend, scatter
from train.engine import Engine

CONTENDERS: dict[str, int | None] = {"at the end": None, "under the backward pass": 0, "the same, 8 CTAs": 8}
"""How many of a device's processors a message may take; 0: as many as NCCL likes; None: all at the end."""


class Bench:
    """An engine that scatters in one way or another."""

    def __init__(self, options: argparse.Namespace) -> None:
        shape, count = SHAPES[options.shape], options.micro_batches
        self.gpu = torch.cuda.is_available()
        if not self.gpu:
            scatter.LEAST = 1  # the layers of a toy are small
        backend.start()
        world = dist.get_world_size()
        whole = f"global_batch_size={options.micro_batch * count * world}"
        config = step_worker.glm(shape, options.micro_batch, count, whole)
        self.engine = Engine.start(config, backend.make_mesh(config))
        assert self.engine.model.scatter is not None
        self.scatter = self.engine.model.scatter
        self.groups = {0: self.scatter._groups}
        first = dist.get_rank() * count
        self.batches = [batch_of(shape, options.micro_batch, first + number) for number in range(count)]
        optimizer = self.engine.deepspeed.optimizer
        self.handed: list[Tensor] = []
        """Copies of this rank's sums, made by a step while `keeps`."""
        self.keeps = False
        optimizer.optimizer.register_step_pre_hook(
            lambda *_: self.handed.extend(g["params"][0].grad.clone() for g in optimizer.param_groups if self.keeps)
        )

    def step(self, name: str, lr: float) -> Tensor:
        """A whole step as this contender does it; its loss."""
        ctas = CONTENDERS[name]
        if ctas is None:
            with mock.patch.object(self.scatter, "begin", return_value=None):
                return self.engine.step(self.batches, lr, 1.0).loss
        if ctas not in self.groups:
            group = self._group(ctas)
            self.groups[ctas] = [group] * len(self.groups[0])
        with mock.patch.object(self.scatter, "_groups", self.groups[ctas]):
            return self.engine.step(self.batches, lr, 1.0).loss

    def _group(self, ctas: int) -> Any:
        options = None
        if self.gpu:
            options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
            options.config.max_ctas = ctas
        return dist.new_group(pg_options=options)


def check(bench: Bench) -> dict[str, dict[str, Any]]:
    """Each contender's sums on the same weights against the first's."""
    found: dict[str, dict[str, Any]] = {}
    wanted: list[Tensor] = []
    bench.keeps = True
    for name in CONTENDERS:
        loss = bench.step(name, 0.0)
        sums, bench.handed = bench.handed, []
        wanted = wanted or sums
        apart = max(
            float((mine - base).abs().max() / base.abs().max()) for mine, base in zip(sums, wanted, strict=True)
        )
        worst = torch.tensor([apart, -loss], dtype=torch.float64, device=bench.engine.mesh.device)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        found[name] = {"scatter": name, "sums_apart": f"{float(worst[0]):.1e}"}
        say(found[name] | {"loss": float(-worst[1])})
        if not float(worst[0]) <= (0.0 if dist.get_world_size() == 2 else 1e-6):
            raise RuntimeError(f"{name}: sums are {float(worst[0]):.1e} apart from those scattered at the end")
    bench.keeps = False
    return found


def main() -> None:
    """Check, then time in turns, then trace."""
    options = parse()
    deadline = time.monotonic() + options.budget
    bench = Bench(options)
    say({"seconds_left": round(deadline - time.monotonic()), "what": "built"})
    rows = check(bench)
    say({"seconds_left": round(deadline - time.monotonic()), "what": "checked"})
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(options.rounds):
        for name in CONTENDERS:
            times[name].append(1e3 * together(lambda name=name: bench.step(name, LR), bench.gpu)[0])
            say({"scatter": name, "step_ms": round(times[name][-1], 1)})
        for name, row in rows.items():
            middle = statistics.median(times[name])
            row["step_ms"] = round(middle, 1)
            row["spread"] = f"{min(times[name]) / middle:.3f}-{max(times[name]) / middle:.3f}"
        write(options, rows)
        if not in_time(deadline):
            break
    for name, row in rows.items():
        if not in_time(deadline):
            break
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, trace.split_step(lambda name=name: bench.step(name, LR)))
        for rank, (part, gaps) in enumerate(parts):
            whole = part.pop("whole")
            row |= {f"{key}_{rank}": round(value / whole, 4) for key, value in part.items()}
            say({"scatter": name, "rank": rank, "traced_ms": round(whole, 1), "gaps": gaps})
        write(options, rows)
    for row in rows.values():
        say(row)
    backend.stop()


def write(options: argparse.Namespace, rows: dict[str, dict[str, Any]]) -> None:
    """The table anew."""
    note = f"{options.shape}, {options.micro_batches} micro-batches of {options.micro_batch} a rank"
    turns.write(options.output, "benchmarks.scatter", list(rows.values()), note)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="3b", choices=SHAPES)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--micro-batches", type=int, default=8, help="of each rank a step (default 8)")
    parser.add_argument("--rounds", type=int, default=4, help="timed steps of each (default 4)")
    parser.add_argument("--budget", type=float, default=70, help="seconds after which nothing new begins (default 70)")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".csv"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
