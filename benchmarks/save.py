"""How long a save holds the training up, beside a plain copy of the same bytes from the device to page-locked memory.

    python -m benchmarks.save                                      # one GPU, 1.42 B parameters, bf16, ZeRO 1
    python -m benchmarks.save --shape toy --micro-batches 4 1      # a few seconds on a CPU: does it run?

For each step size in --micro-batches a save, while steps go on and are timed one by one until the checkpoint is
committed. `held_s` is the call that begins the save, `next_step_extra_s` what the next step took longer than the median
step without a save: the two together are `exposed_s`. `meanwhile_step_s` is the median of the later steps, while files
are written, `total_s` the time from the call to the commit. A save removes the one before it (keep_last=1). Said once:
how long page-locking took at the start of the run, and the steps meanwhile.

The first checkpoint must verify, and each tensor of it (of a large model, of every eighth of them) must have the digest
that the engine's had when the save began, though a step was taken right after: else no row is written. The table goes
to benchmarks/save.csv.
"""

import argparse
import csv
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.step import device, versions
from benchmarks.step_worker import LR, SHAPES, Shape, batch_of, glm
from data_prep.batch import Batch
from data_prep.cli import as_yaml
from train import backend
from train.checkpoint.pieces import Piece, PieceReader
from train.checkpoint.saver import Saver
from train.checkpoint.select import checkpoint_steps, damages, find
from train.checkpoint.staging import Pieces, Staging
from train.config import SavingConfig
from train.engine import Engine

WARM_UP, STEPS = 1, 3
"""Steps before anything is timed; steps whose median is the step without a save."""
BLOCK = 1 << 30
"""Bytes of page-locked memory that the plain copy goes through."""


class Bench:
    """One engine with its saver and batches."""

    def __init__(self, sizes: Shape, micro_batch: int, folder: Path) -> None:
        config = glm(sizes, micro_batch, 1)
        self.micro_batch, self.sizes = micro_batch, sizes
        self.engine = Engine.start(config, backend.make_mesh(config))
        self.step(1)  # Adam's moments are there from now on
        tokenizer = folder / "tokenizer"
        tokenizer.mkdir(parents=True)
        self.folder = folder
        self.saver = Saver(
            self.engine,
            folder,
            SavingConfig(keep_last=1),
            config_yaml=as_yaml(config),
            tokenizer=tokenizer,
            before_commit=lambda: None,
        )

    def step(self, micro_batches: int) -> float:
        """Seconds of one training step, the device's part included."""
        batches: list[Batch] = [batch_of(self.sizes, self.micro_batch, seed) for seed in range(micro_batches)]
        clock = time.perf_counter()
        self.engine.step(batches, LR, 1.0)
        self.engine.synchronize()
        return time.perf_counter() - clock

    def save(self, number: int) -> float:
        """Begin the save with this number, which is its step too; seconds of the call."""
        clock = time.perf_counter()
        self.saver.start({"step": number, "optimizer_steps": number, "loss_scaler": {}})
        return time.perf_counter() - clock


def main() -> int:
    """Measure, check the first checkpoint, write one row a save; 1 where the check failed."""
    options = parse(sys.argv[1:])
    deadline = time.monotonic() + options.budget
    backend.start()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        sizes = SHAPES[options.shape]
        sizes = replace(sizes, layers=options.layers or sizes.layers)
        bench = Bench(sizes, options.micro_batch, Path(folder))
        prepare(bench, options.micro_batches[0])
        pieces = Staging(bench.engine).pieces()
        plain = min(plain_copy(pieces, bench.engine) for _ in range(2))
        print(f"plain copy: {plain:.3f} s", flush=True)
        rows: list[dict[str, Any]] = []
        for number, micro_batches in enumerate(options.micro_batches, 1):
            if time.monotonic() + max((row["total_s"] for row in rows), default=0.0) > deadline:
                print(f"save {number}: no time left", flush=True)
                break
            row, before = measured(bench, number, micro_batches, pieces)
            rows.append(row | {"plain_copy_s": round(plain, 4)})
            rows[-1]["exposed_of_copy"] = round(rows[-1]["exposed_s"] / plain, 3)
            print(rows[-1], flush=True)
            if number == 1:
                wrong = check(bench, pieces, before)
                print(wrong or "the checkpoint is that of the moment it was begun", flush=True)
                if wrong:
                    return 1
            write(options.output, rows)
    backend.stop()
    return 0


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="anchor")
    parser.add_argument("--layers", type=int, help="in place of the shape's own number")
    parser.add_argument("--micro-batch", type=int, default=8, help="sequences of a micro-batch (default 8)")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[4, 4, 1], help="of the steps round each save")
    parser.add_argument("--budget", type=float, default=60, help="seconds after which no save is begun (default 60)")
    parser.add_argument("--folder", type=Path, help="where the checkpoints go (default: the system's temporary folder)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/save.csv"))
    return parser.parse_args(words)


def digests(pieces: Pieces) -> dict[str, int]:
    """A digest of every piece as it is now."""
    return {piece.key: digest(tensor) for piece, tensor in flat(pieces)}


def digest(tensor: Tensor) -> int:
    """Of all its values."""
    return int(torch.hash_tensor(tensor.detach()).view(torch.int64))


def check(bench: Bench, pieces: Pieces, before: dict[str, int]) -> str | None:
    """What is wrong with the checkpoint whose save began with these digests; None where nothing is."""
    if digests(pieces) == before:
        return "the steps after the save changed nothing, so that this check shows nothing"
    for message in damages(find(bench.folder)):
        return message
    reader, held = PieceReader(find(bench.folder)), flat(pieces)
    for piece, _ in held[:: 8 if len(held) > 500 else 1]:
        saved = reader.full(piece.kind, piece.layout.name).reshape(-1).to(bench.engine.mesh.device)
        if digest(saved) != before[piece.key]:
            return f"{piece.key} was saved otherwise than it was when the save began"
    return None


def flat(pieces: Pieces) -> list[tuple[Piece, Tensor]]:
    """The pieces of all parts."""
    return [pair for held in pieces.values() for pair in held]


def plain_copy(pieces: Pieces, engine: Engine) -> float:
    """Seconds for the same bytes to go through one block of page-locked memory, one copy after the other."""
    pinned = engine.mesh.device.type != "cpu"
    tensors = [tensor.detach().reshape(-1) for _, tensor in flat(pieces)]
    largest = max(tensor.nbytes for tensor in tensors)
    block = torch.empty(max(BLOCK if pinned else 0, largest), dtype=torch.uint8, pin_memory=pinned)
    block.zero_()  # on a CPU its pages come now

    def copies() -> None:
        for tensor in tensors:
            block[: tensor.nbytes].view(tensor.dtype).copy_(tensor, non_blocking=pinned)
        engine.synchronize()

    engine.synchronize()
    return seconds_of(copies)


def prepare(bench: Bench, micro_batches: int) -> None:
    """Wait for the saver's memory while steps go on."""
    clock, steps = time.perf_counter(), []
    ready = bench.saver._thread.submit(time.perf_counter)
    while not ready.done() or not steps:
        steps.append(bench.step(micro_batches))
    first = ", ".join(f"{seconds:.3f}" for seconds in steps[:8])
    print(f"host memory ready {ready.result() - clock:.2f} s after the start; first steps: {first} s", flush=True)


def measured(bench: Bench, number: int, micro_batches: int, pieces: Pieces) -> tuple[dict[str, Any], dict[str, int]]:
    """One save among steps of so many micro-batches; and the digests of what is saved, just before it begins."""
    for _ in range(WARM_UP):
        bench.step(micro_batches)
    alone = statistics.median(bench.step(micro_batches) for _ in range(STEPS))
    before = digests(pieces)
    begun = time.perf_counter()
    held, steps = bench.save(number), []
    while checkpoint_steps(bench.folder) != [number]:
        steps.append(bench.step(micro_batches))
        bench.saver.poll()
    total = time.perf_counter() - begun
    size = sum(tensor.nbytes for _, tensor in flat(pieces))
    extra = steps[0] - alone
    row = {
        "save": number,
        "shape": f"{bench.sizes.layers}x{bench.sizes.hidden}",
        "micro_batches": micro_batches,
        "bytes": size,
        "step_s": round(alone, 4),
        "held_s": round(held, 4),
        "next_step_extra_s": round(extra, 4),
        "exposed_s": round(held + max(0.0, extra), 4),
        "meanwhile_step_s": round(statistics.median(steps[1:] or steps), 4),
        "steps_meanwhile": len(steps),
        "total_s": round(total, 3),
        "written_mb_per_s": round(size / total / 1e6, 1),
    }
    return row, before


def seconds_of(work: Callable[[], Any]) -> float:
    """Seconds of a call."""
    clock = time.perf_counter()
    work()
    return time.perf_counter() - clock


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """The table so far."""
    with path.open("w", newline="") as file:
        file.write(f"# {device()}, {versions()}; python -m benchmarks.save {shlex.join(sys.argv[1:])}".rstrip() + "\n")
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


if __name__ == "__main__":
    raise SystemExit(main())
