"""Zero bubble beside DeepSpeed's 1F1B: the same two stages, batches and optimizer in one process on each GPU.

    torchrun --nproc-per-node 2 -m benchmarks.zero_bubble                                    # 60 s on two GPUs
    torchrun --nproc-per-node 2 -m benchmarks.zero_bubble --shape toy --micro-batches 4      # on a CPU: does it run?

First every contender runs the passes of one batch on the same weights: its loss must be DeepSpeed's, and how far its
fp32 sums of gradients are from DeepSpeed's is told. Then whole steps are timed in turns, and passes without what ends a
step. Writes benchmarks/zero_bubble.csv row by row; the last columns are a trace of one step (`benchmarks.trace`).
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import step_worker, trace, turns
from benchmarks.parallel_worker import device_allocations
from benchmarks.step_worker import LR, SHAPES, batch_of
from benchmarks.turns import in_time, say
from data_prep.batch import Batch
from train import backend
from train.engine import PipelineEngine

CONTENDERS: dict[str, Callable[[int], int] | None] = {
    "1F1B, DeepSpeed's": None,
    "1F1B, messages beside the passes": lambda stage: 0,
    "zero bubble": lambda stage: stage,
}
"""By how many micro-batches a stage puts its weights' gradients off; None runs DeepSpeed's own schedule."""
END = ("ReduceTiedGrads", "ReduceGrads", "OptimizerStep")


class Bench:
    """An engine whose schedule can be exchanged."""

    def __init__(self, options: argparse.Namespace) -> None:
        shape, count = SHAPES[options.shape], options.micro_batches
        words = ["parallel.pipeline_parallel=2", "parallel.pipeline_schedule=zero_bubble"]
        words += [f"parallel.layers_per_stage={options.layers}".replace(" ", "")] if options.layers else []
        config = step_worker.glm(shape, options.micro_batch, count, *words)
        backend.start()
        self.engine = PipelineEngine(config, backend.make_mesh(config))
        self.batches: list[Batch | None] = [batch_of(shape, options.micro_batch, k) for k in range(count)]
        self.runner = self.engine.zero_bubble
        self.gpu = torch.cuda.is_available()

    def choose(self, name: str) -> None:
        """From now on steps run as this contender does."""
        assert self.runner is not None
        put_off = CONTENDERS[name]
        self.runner.active(put_off is not None)
        self.engine.zero_bubble = None if put_off is None else self.runner
        if put_off is not None:
            self.runner.put_off = put_off(self.engine.mesh.stage)

    def step(self) -> None:
        """A whole step."""
        self.engine.step(self.batches, LR, 1.0)

    def passes(self) -> None:
        """Forward and backward passes; their sums are left."""
        self.engine._clear()
        with self._without_end():
            self.engine._train(self.batches)

    @contextlib.contextmanager
    def _without_end(self) -> Iterator[None]:
        engine = self.engine.deepspeed
        table = {kind: _nothing if kind.__name__ in END else run for kind, run in engine._INSTRUCTION_MAP.items()}
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(engine, "_INSTRUCTION_MAP", table))
            for name in ("_exec_reduce_tied_grads", "_exec_reduce_grads", "_exec_optimizer_step"):
                stack.enter_context(mock.patch.object(engine, name, _nothing))
            yield

    def loss(self) -> float:
        """Of the batch that ran last, from the stage with the head."""
        total = self.engine._losses[0].clone() / len(self.batches)
        dist.all_reduce(total)
        return float(total)

    def sums(self) -> list[Tensor]:
        """This stage's fp32 sums of gradients, a tensor a parameter group."""
        return list(self.engine.deepspeed.optimizer.fp32_groups_gradients_flat)

    def clear(self) -> None:
        """Forget the sums."""
        self.engine.deepspeed.optimizer.clear_hp_grads()

    def seconds(self, function: Callable[[], None]) -> float:
        """Of one call, from when both ranks begin to when the later one's device is done."""
        self._together()
        clock = time.perf_counter()
        function()
        self._together()
        return time.perf_counter() - clock

    def memory(self) -> str:
        """Most GiB in use on each rank since it was reset; empty on a CPU."""
        if not self.gpu:
            return ""
        found: list[Any] = [None, None]
        dist.all_gather_object(found, round(torch.cuda.max_memory_allocated() / 2**30, 2))
        return " ".join(map(str, found))

    def allocations(self) -> Tensor:
        """How often each rank has asked its device for memory; zeros on a CPU."""
        found: list[Any] = [None, None]
        dist.all_gather_object(found, device_allocations(self.gpu))
        return torch.tensor(found)

    def _together(self) -> None:
        backend.synchronize()
        dist.barrier()
        backend.synchronize()


def _nothing(*_: Any, **__: Any) -> None:
    return None


def check(bench: Bench) -> dict[str, dict[str, Any]]:
    """Each contender's passes on the same weights against DeepSpeed's; they are its warm-up too."""
    found: dict[str, dict[str, Any]] = {}
    wanted: list[Tensor] = []
    for name in CONTENDERS:
        bench.choose(name)
        bench.clear()
        bench.passes()
        loss = bench.loss()
        if not wanted:
            wanted = [total.clone() for total in bench.sums()]
        apart = max(
            float((total - base).norm() / base.norm().clamp(min=1e-30))
            for total, base in zip(bench.sums(), wanted, strict=True)
        )
        worst = torch.tensor(apart, dtype=torch.float64, device=bench.engine.mesh.device)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        found[name] = {"schedule": name, "loss": loss, "gradient_apart": f"{float(worst):.1e}"}
        say(found[name])
    first = found[next(iter(CONTENDERS))]["loss"]
    for name, row in found.items():
        if not abs(row["loss"] - first) <= 1e-5 * abs(first):
            raise RuntimeError(f"{name}: loss {row['loss']}, DeepSpeed's is {first}")
    return found


def main() -> None:
    """Check, then time in turns."""
    options = parse()
    deadline = time.monotonic() + options.budget
    bench = Bench(options)
    say({"seconds_left": round(deadline - time.monotonic()), "what": "built"})
    rows = check(bench)
    bench.clear()
    bench.step()  # the first update makes Adam's moments
    say({"seconds_left": round(deadline - time.monotonic()), "what": "checked"})
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    passes: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for turn in range(options.rounds):
        for name in CONTENDERS:
            bench.choose(name)
            if bench.gpu:
                torch.cuda.reset_peak_memory_stats()
            before = bench.allocations()
            times[name].append(1e3 * bench.seconds(bench.step))
            rows[name] |= bench.engine.waiting()
            say(
                {
                    "schedule": name,
                    "step_ms": round(times[name][-1], 1),
                    "allocations": (bench.allocations() - before).tolist(),
                }
            )
            if turn == 0:
                rows[name]["memory_gib"] = bench.memory()
                passes[name].append(1e3 * bench.seconds(bench.passes))
                bench.clear()
        for name, row in rows.items():
            middle = statistics.median(times[name])
            row |= {"step_ms": round(middle, 1), "passes_ms": round(statistics.median(passes[name]), 1)}
            row["spread"] = f"{min(times[name]) / middle:.3f}-{max(times[name]) / middle:.3f}"
            row["bubble"], row["bubble_least"] = (round(row[key], 4) for key in ("bubble", "bubble_least"))
        write(options, rows)
        if not in_time(deadline):
            break
    for name in CONTENDERS if options.trace else ():
        if not in_time(deadline):
            break
        bench.choose(name)
        parts: list[Any] = [None, None]
        dist.all_gather_object(parts, trace.split_step(bench.step))
        for rank, (part, gaps) in enumerate(parts):
            say({"schedule": name, "rank": rank, "gaps": gaps})
            whole = part.pop("whole")
            rows[name] |= {f"{key}_{rank}": round(value / whole, 4) for key, value in part.items()}
        write(options, rows)
    for row in rows.values():
        say(row)
    backend.stop()


def write(options: argparse.Namespace, rows: dict[str, dict[str, Any]]) -> None:
    """The table anew."""
    note = f"{options.shape}, layers {options.layers or 'by slots'}, {options.micro_batches} micro-batches of "
    note += f"{options.micro_batch}; gradient_apart: of the fp32 sums; shares of a traced step by rank"
    turns.write(options.output, "benchmarks.zero_bubble", list(rows.values()), note)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="3b", choices=SHAPES)
    parser.add_argument("--layers", type=int, nargs=2, help="layers of the two stages (default: by slots)")
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--micro-batches", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each (default 3)")
    parser.add_argument("--budget", type=float, default=45, help="seconds after which nothing new begins (default 45)")
    parser.add_argument("--trace", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".csv"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
