"""What `parallel.offload_optimizer` costs and saves: an optimizer step with the moments on the host, and on the device.

    python -m benchmarks.offload [--elements 1e9] [--output benchmarks/offload.csv]

First the two must give the same bits, pieces and streams included; then both are timed, medians of 10 steps each.
On a CPU the moments have nowhere to go, so only the check says something there.
"""

import argparse
import csv
import statistics
import time
from pathlib import Path

import torch

from train import backend
from train.host_moments import MOMENTS, HostMomentsAdamW

STEPS = 10
KINDS = {"device": torch.optim.AdamW, "host": HostMomentsAdamW}


def made(kind: str, elements: int, seed: int = 0) -> torch.optim.Optimizer:
    """An optimizer over two fp32 tensors of as many elements together, with gradients."""
    generator = torch.Generator(backend.device()).manual_seed(seed)
    parameters = []
    for count in (elements - elements // 16, elements // 16):
        parameter = torch.nn.Parameter(torch.randn(count, device=backend.device(), generator=generator))
        parameter.grad = torch.randn(count, device=backend.device(), generator=generator)
        parameters.append(parameter)
    return KINDS[kind](parameters, lr=1e-3, fused=True)


def check(elements: int) -> None:
    """Raise AssertionError where a bit differs after a few steps."""
    pair = [made(kind, elements) for kind in KINDS]
    for _ in range(5):
        for optimizer in pair:
            optimizer.step()
    backend.synchronize()
    for one, other in zip(*(optimizer.param_groups[0]["params"] for optimizer in pair), strict=True):
        assert torch.equal(one, other)
        for key in MOMENTS:
            assert torch.equal(pair[0].state[one][key].cpu(), pair[1].state[other][key].cpu()), key


def timed(kind: str, elements: int) -> dict[str, float]:
    """Milliseconds of a step, and bytes of device memory that optimizer states and slots take."""
    optimizer = made(kind, elements)
    held = backend.memory().get("memory_held_bytes", 0)
    seconds = []
    for _ in range(STEPS + 2):
        backend.synchronize()
        begun = time.perf_counter()
        optimizer.step()
        backend.synchronize()
        seconds.append(time.perf_counter() - begun)
    taken = backend.memory().get("memory_held_bytes", 0) - held
    return {"step_ms": 1e3 * statistics.median(seconds[2:]), "state_bytes": taken}


def main() -> None:
    """Check, time, and write one row a kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=float, default=1e9)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/offload.csv"))
    options = parser.parse_args()
    check(int(min(options.elements, 1e8)))
    print("same bits", flush=True)
    rows = []
    for kind in KINDS:
        row = {"moments": kind, "elements": int(options.elements), **timed(kind, int(options.elements))}
        print(row, flush=True)
        rows.append({**row, "device": backend.device_name(), "torch": torch.__version__})
        with options.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
