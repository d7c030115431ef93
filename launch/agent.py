"""torch's elastic agent with this project's ranks: rendezvous, ranks and restarts are torchelastic's, processes ours.

Its own process manager ends all ranks as soon as it sees one of them end badly, keeps no one's words apart, and loses
exit statuses on a signal; `launch.ranks` does these three differently.
"""

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed.elastic.rendezvous.registry as rendezvous_registry
from torch.distributed.elastic.agent.server.api import (
    RunResult,
    SimpleElasticAgent,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.rendezvous import RendezvousParameters

from data_prep.errors import EXIT_DONE, EXIT_STOPPED
from launch.console import Console
from launch.ranks import Ranks

POLL_SECONDS = 0.05
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Agent(SimpleElasticAgent):
    """One machine's agent; `status` holds the run's exit status when `run` has returned."""

    def __init__(self, spec: WorkerSpec, command: Sequence[str], ranks: Ranks) -> None:
        super().__init__(spec)
        self.status: int | None = None
        self.signals: list[signal.Signals] = []
        """Signals that this process got and has not passed on; handlers only add to it."""
        self._command = list(command)
        self._ranks = ranks

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        spec = worker_group.spec
        environments = {
            worker.global_rank: {
                "RANK": str(worker.global_rank),
                "LOCAL_RANK": str(worker.local_rank),
                "WORLD_SIZE": str(worker.world_size),
                "LOCAL_WORLD_SIZE": str(spec.local_world_size),
                "GROUP_RANK": str(worker_group.group_rank),
                "GROUP_WORLD_SIZE": str(worker_group.group_world_size),
                "ROLE_NAME": spec.role,
                "ROLE_RANK": str(worker.role_rank),
                "ROLE_WORLD_SIZE": str(worker.role_world_size),
                "MASTER_ADDR": str(worker_group.master_addr),
                "MASTER_PORT": str(worker_group.master_port),
                "TORCHELASTIC_RESTART_COUNT": str(spec.max_restarts - self._remaining_restarts),
                "TORCHELASTIC_MAX_RESTARTS": str(spec.max_restarts),
                "TORCHELASTIC_RUN_ID": spec.rdzv_handler.get_run_id(),
                # The agent's own store serves the ranks: no second port that another program could take in between.
                "TORCHELASTIC_USE_AGENT_STORE": str(spec.rdzv_handler.use_agent_store),
                "PYTHONUNBUFFERED": "1",
                "PYTHONFAULTHANDLER": "1",
            }
            for worker in worker_group.workers
        }
        return dict(self._ranks.start(self._command, environments))

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        while self.signals:
            self._ranks.forward(self.signals.pop(0))
        self.status = self._ranks.poll()
        if self.status is None:
            return RunResult(state=WorkerState.HEALTHY)
        if self.status in (EXIT_DONE, EXIT_STOPPED):
            ranks = [worker.global_rank for worker in worker_group.workers]
            return RunResult(state=WorkerState.SUCCEEDED, return_values=dict.fromkeys(ranks))
        return RunResult(state=WorkerState.FAILED)

    def _stop_workers(self, worker_group: WorkerGroup, *_: Any, **__: Any) -> None:
        self._ranks.end()

    def _shutdown(self, *_: Any, **__: Any) -> None:
        # torch calls it at the end of every run, with arguments that differ between its versions.
        if self.status is None:
            self._ranks.end()


def run_ranks(command: Sequence[str], processes: int, logs: Path) -> int:
    """Run `command` as so many ranks on this machine; returns the exit status.

    0 when all are done, 75 when they saved and stopped on a signal, else the status of the rank that failed first
    (1 when a signal ended it). Signals that this process gets are passed on. logs: folder of rank_N.log.
    """
    # Its warnings speak of its own process manager's options.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)
    parameters = RendezvousParameters(
        backend="c10d",
        endpoint="127.0.0.1:0",
        run_id=uuid.uuid4().hex,
        min_nodes=1,
        max_nodes=1,
        local_addr="127.0.0.1",
        is_host=True,
        timeout=60,
    )
    console = Console(logs)
    ranks = Ranks(console)
    spec = WorkerSpec(
        role="train",
        local_world_size=processes,
        rdzv_handler=rendezvous_registry.get_rendezvous_handler(parameters),
        entrypoint=command[0],
        args=tuple(command[1:]),
        max_restarts=0,
        monitor_interval=POLL_SECONDS,
        local_addr="127.0.0.1",
    )
    agent = Agent(spec, command, ranks)

    def handle(signum: int, frame: FrameType | None) -> None:
        agent.signals.append(signal.Signals(signum))

    before = {signum: signal.signal(signum, handle) for signum in SIGNALS}
    try:
        agent.run()
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        console.close()
        spec.rdzv_handler.shutdown()
    assert agent.status is not None
    return agent.status


def thread_count(processes: int) -> str:
    """OMP_NUM_THREADS of each of so many ranks here: an equal share of the cores, or what is set already."""
    if "OMP_NUM_THREADS" in os.environ:
        return os.environ["OMP_NUM_THREADS"]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return str(max(1, cores // processes))


def module_command(module: str, words: Sequence[str]) -> list[str]:
    """The command of a rank: this interpreter, the module, the user's words."""
    return [sys.executable, "-m", module, *words]
