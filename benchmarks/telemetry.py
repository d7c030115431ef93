"""Cost of full telemetry: a step measured in every step, in every tenth, and with telemetry and detection off.

    python -m benchmarks.telemetry [model=tiny] [rounds=4] [steps=10] [any other override of python -m train]

Correctness first: all three train to the same losses. Then blocks of steps of the three in turn, and the medians: CPU
seconds on a CPU (process time, so that other work on the machine does not count), wall time with a synchronised device
elsewhere. Appends to benchmarks/telemetry.csv with device and versions.
"""

import csv
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from data_prep.dataset import Dataset
from train import backend
from train.cli import compose_train
from train.engine import Engine
from train.loading import sampler
from train.run_folder import cpu_name

TARGET = Path(__file__).with_suffix(".csv")
OFF = ["stability.telemetry=false", "stability.reactions=[]"]
WAYS = {"every step": ["logging.every_steps=1"], "every 10th step": ["logging.every_steps=10"], "off": OFF}


def main(words: list[str]) -> int:
    """Measure and append."""
    settings = dict(word.split("=", 1) for word in words)
    rounds, steps = int(settings.pop("rounds", 4)), int(settings.pop("steps", 10))
    settings.setdefault("data.path", "data/sample")
    base = [f"{key}={value}" for key, value in settings.items()]
    backend.start()
    config = compose_train(base)
    mesh = backend.make_mesh(config)
    accelerated = mesh.device.type != "cpu"
    if not accelerated:
        torch.set_num_threads(1)
    source = sampler(config, Dataset.open(config.data.path))
    micro = config.micro_batch_size
    count = config.global_batch_size // micro
    batches = [source.batch(range(k * micro, (k + 1) * micro)) for k in range(count)]
    engines = {way: Engine.start(compose_train([*base, *more]), mesh) for way, more in WAYS.items()}
    clock = time.perf_counter if accelerated else time.process_time

    def block(engine: Engine) -> tuple[float, float]:
        """CPU or wall seconds a step, and the last step's loss."""
        results: list[Any] = []
        wait(mesh.device)
        start = clock()
        for step in range(1, steps + 1):
            if engine.guard is not None:
                engine.guard.coming(step)
            results.append(engine.step(batches, 1e-4, 1.0))
        loss = engine.read(results)[-1].loss
        wait(mesh.device)
        return (clock() - start) / steps, loss

    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(rounds + 1):
        losses = {}
        for way, engine in engines.items():
            seconds, losses[way] = block(engine)
            if number:  # the first block warms up
                taken[way].append(seconds)
        assert len(set(losses.values())) == 1, losses
    seconds = {way: statistics.median(found) for way, found in taken.items()}
    device = backend.device_name() if accelerated else cpu_name()
    fresh = not TARGET.exists()
    with TARGET.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if fresh:
            writer.writerow(["device", "torch", "model", "overrides", "telemetry", "seconds_a_step", "ratio_to_off"])
        for way, value in seconds.items():
            ratio = value / seconds["off"]
            print(f"telemetry {way}: {value:.4f} s a step, {ratio:.3f} of off")
            row = [device, torch.__version__, config.model.name, " ".join(base), way, f"{value:.4f}", f"{ratio:.3f}"]
            writer.writerow(row)
    backend.stop()
    return 0


def wait(device: torch.device) -> None:
    """Until the device is done."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
