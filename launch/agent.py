"""torch's elastic agent with this project's ranks: rendezvous, ranks and restarts are torchelastic's, processes ours.

Its own process manager ends all ranks as soon as it sees one of them end badly, keeps no one's words apart, and loses
exit statuses on a signal; `launch.ranks` does these three differently.
"""

import logging
import os
import signal
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
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
from launch.ranks import Failure, Ranks

POLL_SECONDS = 0.05
RENDEZVOUS_SECONDS = 60
"""How long the agents of a job wait for each other."""
PARTING_SECONDS = 10.0
"""How long an agent whose ranks are done keeps the rendezvous' store for the others."""
GRACE_SECONDS = 0.5
"""How much longer the first agent keeps it, so that the others read there that all are done."""
_TORCH_LOG = logging.getLogger("torch.distributed.elastic")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class Place:
    """This machine among those of a job."""

    nodes: int
    node_rank: int
    address: str
    """Of the first machine, as all see it."""
    port: int
    """Free on the first machine."""
    run_id: str


@dataclass
class Steering:
    """What a supervisor asks of running ranks, from another thread; and what it may know of them."""

    signals: list[signal.Signals] = field(default_factory=list)
    """To be passed on to the ranks; signal handlers add to it too."""
    dump: list[int] = field(default_factory=list)
    """Ranks whose stacks are wanted."""
    abort: bool = False
    """End the ranks at once."""
    pids: dict[int, int] = field(default_factory=dict)
    """Process of each rank, while they run."""
    failure: Failure | None = None
    """Which rank failed first, when one did."""


class Agent(SimpleElasticAgent):
    """One machine's agent; `status` holds the run's exit status when `run` has returned."""

    def __init__(
        self, spec: WorkerSpec, command: Sequence[str], ranks: Ranks, steering: Steering, *, keeps_store: bool
    ) -> None:
        """keeps_store: whether other machines' agents use the store of this one."""
        super().__init__(spec, exit_barrier_timeout=PARTING_SECONDS)
        self._keeps_store = keeps_store
        self.status: int | None = None
        self._steering = steering
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
        self._steering.pids = self._ranks.start(self._command, environments)
        return {worker.local_rank: self._steering.pids[worker.global_rank] for worker in worker_group.workers}

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        steering = self._steering
        while steering.signals:
            self._ranks.forward(steering.signals.pop(0))
        if steering.dump:
            wanted, steering.dump = steering.dump, []
            self._ranks.dump_stacks(wanted)
        if steering.abort:
            self._ranks.abort()
        self.status = self._ranks.poll()
        if self.status is None:
            return RunResult(state=WorkerState.HEALTHY)
        if self.status in (EXIT_DONE, EXIT_STOPPED):
            ranks = [worker.global_rank for worker in worker_group.workers]
            return RunResult(state=WorkerState.SUCCEEDED, return_values=dict.fromkeys(ranks))
        return RunResult(state=WorkerState.FAILED)

    def _stop_workers(self, worker_group: WorkerGroup, *_: Any, **__: Any) -> None:
        self._ranks.end()

    def _exit_barrier(self) -> None:
        # An agent that misses the first one's word at the end has lost nothing; torch's account of it is pages long.
        _TORCH_LOG.setLevel(logging.CRITICAL)
        super()._exit_barrier()
        if self._keeps_store:
            time.sleep(GRACE_SECONDS)

    def _shutdown(self, *_: Any, **__: Any) -> None:
        # torch calls it at the end of every run, with arguments that differ between its versions.
        if self.status is None:
            self._ranks.end()


def run_ranks(
    command: Sequence[str], processes: int, logs: Path, *, place: Place | None = None, steering: Steering | None = None
) -> int:
    """Run `command` as so many ranks on this machine; returns the exit status.

    0 when all are done, 75 when they saved and stopped on a signal, else the status of the rank that failed first
    (1 when a signal ended it). Signals that this process gets are passed on. logs: folder of rank_N.log. place: this
    machine's among several; None for a job of its own. steering: a supervisor's hand, who then also prints the
    culprit's words; only the first machine's ranks write on the console.
    """
    # Its warnings speak of its own process manager's options.
    _TORCH_LOG.setLevel(logging.ERROR)
    supervised = steering is not None
    steering = steering or Steering()
    first = place is None or place.node_rank == 0
    with open(os.devnull, "wb") as nowhere:
        console = Console(logs) if first else Console(logs, out=nowhere, err=nowhere)
        ranks = Ranks(console, supervised=supervised)
        spec = WorkerSpec(
            role="train",
            local_world_size=processes,
            rdzv_handler=rendezvous_registry.get_rendezvous_handler(_rendezvous(place)),
            entrypoint=command[0],
            args=tuple(command[1:]),
            max_restarts=0,
            monitor_interval=POLL_SECONDS,
            local_addr="127.0.0.1" if place is None else None,
        )
        agent = Agent(spec, command, ranks, steering, keeps_store=place is not None and first)

        def handle(signum: int, frame: FrameType | None) -> None:
            steering.signals.append(signal.Signals(signum))

        before = {signum: signal.signal(signum, handle) for signum in SIGNALS}
        try:
            agent.run()
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)
            steering.pids = {}
            console.close()
            spec.rdzv_handler.shutdown()
    steering.failure = ranks.failure
    assert agent.status is not None
    return agent.status


def _rendezvous(place: Place | None) -> RendezvousParameters:
    """torchrun's `--standalone` for one machine, its `--node-rank` with a static address for several."""
    if place is None:
        return RendezvousParameters(
            backend="c10d",
            endpoint="127.0.0.1:0",
            run_id=uuid.uuid4().hex,
            min_nodes=1,
            max_nodes=1,
            local_addr="127.0.0.1",
            is_host=True,
            timeout=RENDEZVOUS_SECONDS,
        )
    return RendezvousParameters(
        backend="static",
        endpoint=f"{place.address}:{place.port}",
        run_id=place.run_id,
        min_nodes=place.nodes,
        max_nodes=place.nodes,
        rank=place.node_rank,
        timeout=RENDEZVOUS_SECONDS,
    )


def thread_count(processes: int) -> str:
    """OMP_NUM_THREADS of each of so many ranks here: an equal share of the cores, or what is set already."""
    if "OMP_NUM_THREADS" in os.environ:
        return os.environ["OMP_NUM_THREADS"]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return str(max(1, cores // processes))


def module_command(module: str, words: Sequence[str]) -> list[str]:
    """The command of a rank: this interpreter, the module, the user's words."""
    return [sys.executable, "-m", module, *words]
