"""The simulated pipeline step against real ones: DeepSpeed's engine over gloo on this machine, with sleeps as work.

    python -m benchmarks.pipeline_simulation        # writes benchmarks/pipeline_simulation.csv

Two cores cannot compute for four stages at once, so each stage's forward and backward pass sleeps for a set time on top
of a tiny model's real work; schedule, sends and receives are the engine's own. Passes are timed where they run; the
simulation gets their means in the quickest step (other programs disturb it least) and must predict that step. The cost
of a send is taken from one layout (`CALIBRATION`), whose row says so.
"""

import argparse
import csv
import os
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from launch.simulate_step import StageTimes, simulate_step
from tests.train import parity
from train.cli import compose_train

Sleeps = Sequence[tuple[float, float]]
"""Seconds of each stage's forward and backward pass."""
EVEN: tuple[float, float] = (0.1, 0.2)
CALIBRATION = (2, 16, "even")
CASES: list[tuple[int, int, str, Sleeps]] = [
    *((2, count, "even", [EVEN] * 2) for count in (2, 4, 16)),
    (2, 16, "last stage 1.5 x", [EVEN, (0.15, 0.3)]),
    *((4, count, "even", [EVEN] * 4) for count in (4, 8, 16, 32)),
    (4, 16, "last stage 1.5 x", [*[EVEN] * 3, (0.15, 0.3)]),
    (4, 16, "ends lighter", [(0.07, 0.16), EVEN, EVEN, (0.08, 0.17)]),
]


class _Sleep(torch.autograd.Function):
    """Identity that takes a while in both directions."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, forward: float, backward: float) -> torch.Tensor:
        ctx.backward_seconds = backward
        time.sleep(forward)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        time.sleep(ctx.backward_seconds)
        return grad, None, None


def measure(stages: int, micro_batches: int, sleeps: Sleeps, steps: int) -> dict[str, Any]:
    """On each rank: times of the passes and of whole steps, gathered on all."""
    import torch.distributed

    from train import backend
    from train.engine import Engine

    words = [f"parallel.pipeline_parallel={stages}", f"global_batch_size={2 * micro_batches}", "model.num_layers=6"]
    config = compose_train([*parity.OVERRIDES, *words])
    mesh = backend.make_mesh(config)
    engine = Engine.start(config, mesh)
    passes: dict[str, list[float]] = {"forward": [], "backward": []}
    sleep = sleeps[mesh.stage]
    last = engine.model.items[-1] if mesh.stage < stages - 1 else engine.model.items[-2]
    last.register_forward_hook(lambda _module, _inputs, out: (_Sleep.apply(out[0], *sleep), *out[1:]))
    for name in passes:
        _timed(engine.deepspeed, name, passes[name])
    batches = [parity.batch_of(2 * number, 2) if engine.needs_batches else None for number in range(micro_batches)]
    engine.step(batches, 1e-3, 1.0)
    found: list[list[Any]] = []
    for _ in range(steps):
        for seconds in passes.values():
            seconds.clear()
        torch.distributed.barrier()
        begin = time.perf_counter()
        engine.deepspeed.train_batch(engine._feed(batches))
        mine: dict[str, float] = {"step": time.perf_counter() - begin, "stage": mesh.stage}
        mine |= {name: statistics.fmean(seconds) for name, seconds in passes.items()}
        found.append([None] * mesh.world)
        torch.distributed.all_gather_object(found[-1], mine)
    quickest = min(found, key=lambda ranks: max(one["step"] for one in ranks))
    return {"stages": sorted(quickest, key=lambda one: one["stage"])}


def _timed(engine: Any, name: str, seconds: list[float]) -> None:
    """Time the engine's instruction, without what it waits for."""
    method = f"_exec_{name}_pass"
    instruction = getattr(engine, method)

    def timed(*words: Any, **settings: Any) -> Any:
        begin = time.perf_counter()
        result = instruction(*words, **settings)
        seconds.append(time.perf_counter() - begin)
        return result

    setattr(engine, method, timed)
    table = dict(engine._INSTRUCTION_MAP)
    for kind, bound in table.items():
        if bound.__name__ == method:
            table[kind] = lambda _self, *words, **settings: timed(*words, **settings)
    engine._INSTRUCTION_MAP = table


def main() -> None:
    """Measure all cases, predict each, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="measured steps a case (default 5)")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".csv"))
    arguments = parser.parse_args()
    found = []
    for stages, count, name, sleeps in CASES:
        result = parity.in_ranks(stages, measure, stages, count, sleeps, arguments.steps)["stages"]
        found.append((stages, count, name, result))
        print(stages, count, name, [round(one["step"], 3) for one in result], flush=True)
    result = next(one[3] for one in found if one[:3] == CALIBRATION)
    send = calibrate(_times(result), CALIBRATION[1], _seconds(result))
    rows = [row(*one, send) for one in found]
    with arguments.output.open("w", encoding="utf-8", newline="") as file:
        file.write(
            f"# {platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}\n"
        )
        file.write("# python -m benchmarks.pipeline_simulation; the quickest of ")
        file.write(
            f"{arguments.steps} steps; a send costs {1e3 * send:.2f} ms ({CALIBRATION[0]} stages x {CALIBRATION[1]})\n"
        )
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(arguments.output.read_text(encoding="utf-8"))


def calibrate(times: Sequence[StageTimes], count: int, measured: float) -> float:
    """Seconds of a send that make the simulated step of `count` micro-batches the measured one."""
    low, high = 0.0, 0.1
    for _ in range(40):
        middle = (low + high) / 2
        simulated = simulate_step(times, count, send_seconds=middle).seconds
        low, high = (middle, high) if simulated < measured else (low, middle)
    return (low + high) / 2


def row(stages: int, count: int, name: str, result: list[dict[str, float]], send: float) -> dict[str, Any]:
    """One line of the table."""
    times = _times(result)
    simulated = simulate_step(times, count, send_seconds=send)
    busy = statistics.fmean(count * (one.forward + one.backward) for one in times)
    measured = _seconds(result)
    return {
        "stages": stages,
        "micro_batches": count,
        "work": name,
        "measured_step_s": f"{measured:.3f}",
        "simulated_step_s": f"{simulated.seconds:.3f}",
        "step_error_percent": f"{100 * (simulated.seconds / measured - 1):+.1f}",
        "measured_bubble": f"{1 - busy / measured:.3f}",
        "simulated_bubble": f"{simulated.bubble:.3f}",
        "closed_form_bubble": f"{(stages - 1) / (count + stages - 1):.3f}",
        "sets_the_send": "yes" if (stages, count, name) == CALIBRATION else "",
    }


def _times(result: list[dict[str, float]]) -> list[StageTimes]:
    return [StageTimes(one["forward"], one["backward"]) for one in result]


def _seconds(result: list[dict[str, float]]) -> float:
    return max(one["step"] for one in result)


if __name__ == "__main__":
    main()
