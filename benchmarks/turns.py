"""What benchmarks that exchange contenders on all ranks share: the clock, the lines they print, and their table."""

import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.step import device, versions
from train import backend


def in_time(deadline: float) -> bool:
    """Whether there is time for more, by the first rank's clock."""
    left = torch.tensor(deadline - monotonic(), device=backend.device())
    dist.broadcast(left, 0)
    return float(left) > 0


def say(row: dict[str, Any]) -> None:
    """One line of progress, from the first rank."""
    if backend.global_rank() == 0:
        print(row, flush=True)


def write(target: Path, module: str, rows: Sequence[dict[str, Any]], note: str = "") -> None:
    """The table anew, from the first rank: device, versions and the command of `module`, a note, the rows."""
    if backend.global_rank():
        return
    fields = list(dict.fromkeys(key for row in rows for key in row))
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w", newline="", encoding="utf-8") as file:
        words = " ".join(word for word in sys.argv[1:] if "/" not in word and word != "--output")
        world = dist.get_world_size()
        file.write(f"# {world} x {device()}, {versions()}; torchrun --nproc-per-node {world} -m {module} {words}\n")
        file.write(f"# {note}\n" if note else "")
        table = csv.DictWriter(file, fields, restval="", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
