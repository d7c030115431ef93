"""The preflight's measurements on this machine alone, for one with accelerators: nothing but torch is needed.

    python -m benchmarks.preflight output=preflight.json

Prints the table and the verdict of `python -m launch.preflight` (matrix product and copies of every accelerator, copies
from the host and between neighbours, clocks and health under load, disk), what nvidia-smi answered to each question,
whether an accelerator in use is named as busy, and the seconds that each took.
"""

import json
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from launch import facts, probes
from launch.admission import busy
from launch.preflight import judge, show

HELD_BYTES = 4 << 30


def main(words: Sequence[str]) -> int:
    """output=FILE"""
    options = dict(word.split("=", 1) for word in words)
    began = time.perf_counter()

    def lap(what: str) -> None:
        print(f"[{time.perf_counter() - began:.1f} s] {what}", flush=True)

    cards = facts.accelerators()
    lap(f"accelerators as the launcher sees them: {cards}; busy: {busy('here', cards) or 'none'}")
    for reasons in probes.REASONS:
        lap(f"nvidia-smi {probes.health_query(reasons)}: {facts.smi(probes.health_query(reasons))}")
    with tempfile.TemporaryDirectory() as folder:
        found = probes.probe("node", {"run_dir": folder})
    found["skew_seconds"] = 0.0
    lap(f"torch {torch.__version__}, {len(cards)} accelerators: {found}")
    show(judge({socket.gethostname(): found}, {}))
    if cards:
        held = torch.zeros(HELD_BYTES, dtype=torch.uint8, device=torch.accelerator.current_accelerator())
        lap(f"with {held.nbytes >> 30} GiB held by this process: {busy('here', facts.accelerators())}")
    if "output" in options:
        record = {"torch": torch.__version__, "cards": cards, "found": found}
        Path(options["output"]).write_text(json.dumps(record, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
