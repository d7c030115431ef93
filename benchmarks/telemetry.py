"""Cost of full telemetry: one engine, its guard off, on in a step that is not measured, and on in one that is.

    python -m benchmarks.telemetry [model=1b precision=bf16 …] [seconds=45] [output=benchmarks/telemetry.csv]

The three kinds of step take turns, so that a slower moment of the machine hits all of them; the ratio is the median of
the turns' own ratios to the step that was off. A run measures every logging.every_steps-th step (10): the last row is
nine steps of the second kind and one of the third. CPU seconds on a CPU (process time, so that other work on the
machine does not count), wall time with a synchronised device elsewhere; reading the step's numbers counts. Checked
first: the norm that the guard sees is the one DeepSpeed clips by.
"""

import csv
import math
import statistics
import sys
import time
from pathlib import Path

import torch

from data_prep.batch import Batch
from data_prep.dataset import Dataset
from train import backend
from train.cli import compose_train
from train.engine import Engine, StepNumbers
from train.loading import sampler
from train.run_folder import cpu_name
from train.stability.guard import Guard

TARGET = Path(__file__).with_suffix(".csv")
EVERY = 10
OFF, BETWEEN, MEASURED = "off", "on, not measured", "on, measured"
MIX = f"on, every {EVERY}th step measured"
COLUMNS = ["device", "torch", "model", "overrides", "tokens_a_step", "telemetry", "steps", "seconds_a_step", "ratio"]


def main(words: list[str]) -> int:
    """Measure until the time is up, print as it goes, append to the table."""
    settings = dict(word.split("=", 1) for word in words)
    seconds, target = float(settings.pop("seconds", 45)), Path(settings.pop("output", TARGET))
    settings = {"data.path": "data/sample", "logging.every_steps": str(EVERY)} | settings
    base = [f"{key}={value}" for key, value in settings.items()]
    config = compose_train(base)
    backend.start()
    mesh = backend.make_mesh(config)
    if mesh.device.type == "cpu":
        torch.set_num_threads(1)
    source = sampler(config, Dataset.open(config.data.path))
    micro = config.micro_batch_size
    batches = [source.batch(range(k, k + micro)) for k in range(0, config.global_batch_size, micro)]
    timed = Timed(Engine.start(config, mesh), batches)
    print(f"{config.model.name}: engine ready", flush=True)
    for kind in (MEASURED, BETWEEN, OFF):  # compiles what is compiled
        took, numbers = timed.step(kind)
        print(f"first step, {kind}: {took:.3f} s, loss {numbers.loss:.3f}", flush=True)
        seen = numbers.seen.get("grad_norm", numbers.grad_norm)
        assert math.isclose(seen, numbers.grad_norm, rel_tol=1e-3), (seen, numbers.grad_norm)
    taken: dict[str, list[float]] = {OFF: [], BETWEEN: [], MEASURED: []}
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline or len(taken[OFF]) < 3:
        for kind, found in taken.items():
            found.append(timed.step(kind)[0])
        print(", ".join(f"{kind} {found[-1]:.4f} s" for kind, found in taken.items()), flush=True)
    taken[MIX] = [((EVERY - 1) * a + b) / EVERY for a, b in zip(taken[BETWEEN], taken[MEASURED], strict=True)]
    device = cpu_name() if mesh.device.type == "cpu" else backend.device_name()
    about = [device, torch.__version__, config.model.name, " ".join(base)]
    about.append(str(config.global_batch_size * config.sequence_length))
    fresh = not target.exists()
    with target.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if fresh:
            writer.writerow(COLUMNS)
        for kind, found in taken.items():
            value = statistics.median(found)
            ratio = statistics.median(mine / off for mine, off in zip(found, taken[OFF], strict=True))
            print(f"telemetry {kind}: {value:.4f} s a step, {ratio:.4f} of off", flush=True)
            writer.writerow([*about, kind, len(found), f"{value:.5f}", f"{ratio:.4f}"])
    backend.stop()
    return 0


class Timed:
    """An engine whose guard can be taken off and put back."""

    def __init__(self, engine: Engine, batches: list[Batch]) -> None:
        assert engine.guard is not None
        self.engine, self.batches = engine, batches
        self.guard: Guard = engine.guard
        self.device = engine.mesh.device
        self.clock = time.process_time if self.device.type == "cpu" else time.perf_counter

    def step(self, kind: str) -> tuple[float, StepNumbers]:
        """Seconds of one step of that kind, and its numbers."""
        off = kind == OFF
        self.engine.guard = None if off else self.guard
        self.engine.deepspeed.optimizer.step = self.guard.update if off else self.guard.step
        self.guard.coming(EVERY if kind == MEASURED else 1)
        backend.synchronize()
        start = self.clock()
        numbers = self.engine.read([self.engine.step(self.batches, 1e-4, 1.0)])[0]
        backend.synchronize()
        return self.clock() - start, numbers


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
