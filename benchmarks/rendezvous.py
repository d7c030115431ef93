"""What starting a job costs with many agents: real agents and a real supervisor here, ranks that do nothing.

    python -m benchmarks.rendezvous agents=8,32,64,128,256 output=benchmarks/rendezvous.csv

The agents are `launch.node` as on a cluster, forked from one process that has imported torch, for 256 interpreters of
their own would not fit on one machine. Their own work (facts, rendezvous, a Python process as the rank) shares this
machine's cores, where a cluster's nodes do it side by side; what one machine has to do for all is the supervisor's CPU
time.

    connect      from the first fork until all agents are known
    look         every agent says what its node is like
    rendezvous   from the order to start until the last rank's process runs: torch's static rendezvous of all agents
    run          CPU time of the supervisor for a second of a running job, with a beat a second from each agent
"""

import contextlib
import csv
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from launch.node import Node
from launch.starters import Starter
from launch.supervise import muster
from launch.supervisor import Supervisor
from train.cli import compose_train

BEATING_SECONDS = 8.0
RANK = "benchmarks.rendezvous_rank"


class Forked:
    """A starter whose agents are children of this process."""

    def __init__(self, count: int, port: int, token: str) -> None:
        self.names = [f"n{number}" for number in range(count)]
        self._port, self._token = port, token
        self._children: list[int] = []

    def start(self, names: Sequence[str]) -> None:
        """Fork an agent for each."""
        for name in names:
            child = os.fork()
            if child == 0:
                os._exit(Node("127.0.0.1", self._port, name, self._token).run())
            self._children.append(child)

    def last_words(self, name: str) -> str:
        """Not kept."""
        return ""

    def close(self) -> None:
        """Wait for all of them."""
        for child in self._children:
            os.waitpid(child, 0)


def measure(count: int, folder: Path) -> dict[str, Any]:
    """One job of so many agents with one rank each."""
    run_dir = folder / f"run-{count}"
    words = [f"data.path={folder}", f"run_dir={run_dir}", f"cluster.nodes={count}", "cluster.processes=1", "model=tiny"]
    words += ["cluster=ssh", f"global_batch_size={count}", "micro_batch_size=1", "cluster.silent_seconds=120"]

    def starter(port: int, token: str) -> Starter:
        return Forked(count, port, token)

    supervisor = muster(compose_train(words), words, RANK, starter)
    # Of each phase: when it began, its seconds, its CPU seconds in this process.
    spent: dict[str, tuple[float, float, float]] = {}
    for name in ("_gather", "_admit", "_try"):
        _time(supervisor, name, spent)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        began = time.time()
        status = supervisor.run()
    assert status == 0, f"the job of {count} agents ended with {status}"
    started = [float(file.read_text()) for file in (run_dir / "started").iterdir()]
    assert len(started) == count
    gathered = spent["_gather"][0] + spent["_gather"][1] - began
    return {
        "agents": count,
        "connect_seconds": round(gathered, 2),
        "look_seconds": round(spent["_admit"][1], 2),
        "rendezvous_seconds": round(max(started) - spent["_try"][0], 2),
        "supervisor_cpu_seconds_to_start": round(spent["_gather"][2] + spent["_admit"][2], 2),
        "supervisor_cpu_share_while_running": round(spent["_try"][2] / spent["_try"][1], 4),
        "load": round(os.getloadavg()[0], 1),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _time(supervisor: Supervisor, name: str, spent: dict[str, tuple[float, float, float]]) -> None:
    work = getattr(supervisor, name)

    def timed(*words: Any) -> Any:
        began, cpu = time.time(), time.process_time()
        result = work(*words)
        spent[name] = began, time.time() - began, time.process_time() - cpu
        return result

    setattr(supervisor, name, timed)


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="tiankong-rendezvous-"))
    (folder / "manifest.json").write_text("{}")
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def main(words: Sequence[str]) -> int:
    """agents=N,N,… output=FILE"""
    options = {"agents": "8,32,64,128,256", "output": "", **dict(word.split("=", 1) for word in words)}
    os.environ["BEATING_SECONDS"] = str(BEATING_SECONDS)
    os.environ["OMP_NUM_THREADS"] = "1"
    with _scratch() as folder:
        for count in map(int, options["agents"].split(",")):
            row = measure(count, folder)
            print(row, flush=True)
            if options["output"]:
                with open(options["output"], "a", newline="") as file:
                    writer = csv.DictWriter(file, list(row))
                    if file.tell() == 0:
                        writer.writeheader()
                    writer.writerow(row)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
