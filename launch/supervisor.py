"""Keeps a job alive: chooses nodes, starts attempts, names the culprit of each fault, and goes on from the checkpoint.

Each attempt is a whole run of `python -m train` on some nodes (`launch.attempt`), which resumes by itself. What the
supervisor adds is to see that one has ended, or hangs, why, and whether it is worth another try.
"""

import os
import secrets
import shutil
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from data_prep.errors import EXIT_CONFIG, EXIT_CRASH, EXIT_DATA, EXIT_STOPPED, ConfigError, RunFailed
from launch.admission import admit
from launch.attempt import Attempt, Outcome
from launch.crew import Crew
from launch.facts import nonce_name
from launch.preflight import Verdict, measure
from launch.records import Records, checkpoint_bytes, last_step, newest_checkpoint
from launch.verdict import Fault, RankView, stragglers
from launch.wire import Message
from train.config import Config
from train.rules import check_world
from train.run_folder import JOB_VARIABLE, command_line, is_restart, resume_command
from train.run_lock import RunLock

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""All of them let the ranks save and stop; Slurm's srun passes SIGUSR1 on where SIGTERM would kill."""
LOOK_SECONDS = 120.0
"""How long the nodes may take to say what they are like."""
BACK_OFF_SECONDS = (0.0, 1.0, 5.0, 30.0, 60.0)
"""Wait before the first, second … restart without progress."""
CALL_SECONDS = (15.0, 600.0)
"""A job that lacks a node starts its agent again after so long, then at doubling intervals up to the second figure."""
STEADY_SECONDS = 10.0
"""A rank is named as a straggler when it has been one for so long."""
SPARE_BYTES = 64 << 20
"""Free space beyond a checkpoint's size after which a full disk counts as freed."""
FULL_DISK = "the disk is full"
_OUTCOMES = {EXIT_CONFIG: "a setting is wrong", EXIT_DATA: "a file is missing or damaged"}

_Slow = tuple[str, int, str | None]
"""A straggler's node, rank and cause."""


class Supervisor:
    """One job from its first attempt to its end."""

    def __init__(self, config: Config, words: Sequence[str], module: str, crew: Crew) -> None:
        """words: the user's, for the ranks. crew: nodes that are started, or start by themselves."""
        self._config, self._cluster, self._crew = config, config.cluster, crew
        self._run_dir = Path(config.run_dir).absolute()
        # Ranks may run from another folder than this process.
        self._words = [*words, f"run_dir={self._run_dir}", f"data.path={Path(config.data.path).absolute()}"]
        if config.initialize_from is not None:
            self._words.append(f"initialize_from={Path(config.initialize_from).absolute()}")
        self._module = module
        # Slurm's and Kubernetes' jobs bring their own, which outlives this process.
        self._job = os.environ.get(JOB_VARIABLE) or secrets.token_hex(8)
        self._records = Records(self._run_dir)
        self._attempt = 0
        self._stops = 0
        self._processes = 1
        self._began = self._call_at = time.monotonic()
        self._slow: set[_Slow] = set()
        self._slow_since: dict[_Slow, float] = {}
        self._restart: tuple[float, int] | None = None

    def run(self) -> int:
        """Everything from the first connection on; returns the exit status."""
        self._run_dir.mkdir(parents=True, exist_ok=True)
        lock = RunLock(self._run_dir / "launch.lock")
        before = {signum: signal.signal(signum, self._note) for signum in SIGNALS}
        status = EXIT_CRASH
        try:
            self._crew.start(list(self._crew.members))
            self._gather()
            self._admit()
            if self._cluster.preflight:
                self._leave_out_bad_nodes()
            status = self._keep_going()
            return status
        finally:
            self._records.state(state="ended", status=status)
            self._crew.farewell()
            for signum, handler in before.items():
                signal.signal(signum, handler)
            lock.close()

    def inspect(self) -> Verdict:
        """Measure all nodes and start nothing."""
        self._run_dir.mkdir(parents=True, exist_ok=True)
        try:
            self._crew.start(list(self._crew.members))
            self._gather()
            self._admit()
            return measure(self._crew, self._config)
        finally:
            self._crew.farewell()

    def _leave_out_bad_nodes(self) -> None:
        verdict = measure(self._crew, self._config)
        for line in verdict.links_at_fault:
            say(line)
        for name, reasons in verdict.bad.items():
            self._crew.members[name].bad = "; ".join(reasons)
            say(f"node {name} is left out: {self._crew.members[name].bad}")
            self._records.event("node_left_out", f"node {name}: {'; '.join(reasons)}", "left out", node=name)

    def _keep_going(self) -> int:
        restarts, checkpoint, wait = 0, newest_checkpoint(self._run_dir), self._cluster.wait_seconds
        while True:
            nodes = self._choose(wait)
            outcome = self._try(nodes)
            wait = 0.0 if outcome.grows else self._cluster.wait_seconds
            if outcome.grows:
                say("more nodes are there: the job goes on with them")
                continue
            fault = outcome.fault
            if fault is None:
                return outcome.status
            self._tell(fault)
            if fault.node is not None:
                self._crew.members[fault.node].strikes += 1
            newest = newest_checkpoint(self._run_dir)
            restarts = 1 if newest > checkpoint else restarts + 1
            checkpoint = newest
            redone = max(0, outcome.last_step - newest, last_step(self._run_dir)[0] - newest)
            if self._stops and not redone and fault.status not in _OUTCOMES:
                say(f"stopped before the first new step; go on with: {self._again()}")
                return EXIT_STOPPED
            reason = self._no_retry(fault, restarts)
            if reason is not None:
                self._records.event(fault.kind, fault.seen, f"gave up: {reason}", node=fault.node, rank=fault.rank)
                say(f"{reason}; start again with: {self._again()}")
                return fault.status
            action = f"restarted from step {newest}, {redone} steps are done again"
            self._records.event(fault.kind, fault.seen, action, node=fault.node, rank=fault.rank, redone=redone)
            say(action)
            self._restart = (time.monotonic(), newest)
            self._wait_for_disk(fault)
            time.sleep(BACK_OFF_SECONDS[min(restarts, len(BACK_OFF_SECONDS)) - 1])

    def _gather(self) -> None:
        """Wait for the nodes. Raises ConfigError that names those which do not come."""
        wanted, everyone = self._cluster.nodes, list(self._crew.members)
        if len(everyone) < wanted:
            raise ConfigError(f"cluster.nodes={wanted}, but only {len(everyone)} are named: {', '.join(everyone)}")
        deadline = time.monotonic() + self._cluster.connect_seconds
        while len(self._crew.connected()) < len(everyone) and time.monotonic() < deadline and not self._stops:
            self._crew.poll(0.1)
            missing = [name for name in everyone if name not in self._crew.connected()]
            if missing and all("ended with status" in self._crew.why_lost(name) for name in missing):
                break
        missing = [name for name in everyone if name not in self._crew.connected()]
        told = "; ".join(f"node {name}: {self._crew.why_lost(name)}" for name in missing)
        least = self._cluster.min_nodes or wanted
        if len(everyone) - len(missing) < least:
            raise ConfigError(
                f"{told}; {len(everyone) - len(missing)} of {least} nodes can be reached: "
                "mend them, or leave them out of the hostfile and lower cluster.nodes"
            )
        if missing:
            say(f"{told}; going on without")

    def _admit(self) -> None:
        """Look at every connected node. Raises ConfigError for what would make the run fail or go wrong."""
        names = self._crew.connected()
        found, skews = self._look(names)
        if len(found) < (self._cluster.min_nodes or self._cluster.nodes):
            silent = [name for name in names if name not in found]
            raise ConfigError(f"node {', '.join(silent)}: does not answer within {LOOK_SECONDS:.0f} s; leave it out")
        admit(self._config, found, skews)
        for name, facts in found.items():
            self._crew.members[name].admit(facts)
        self._processes = (
            self._cluster.processes
            or self._cluster.gpus_per_node
            or min(max(1, len(facts["accelerators"])) for facts in found.values())
        )

    def _look(self, names: Sequence[str]) -> tuple[dict[str, Message], dict[str, float]]:
        """Ask nodes what they are like; returns the facts of those that answer, and how far their clocks are ahead."""
        nonce = secrets.token_hex(16)
        mark = self._run_dir / nonce_name(nonce)
        mark.write_text(nonce)
        try:
            at: Message = {"run_dir": str(self._run_dir), "data_path": str(Path(self._config.data.path).absolute())}
            at |= {"nonce": nonce, "port": self._cluster.rendezvous_port}
            answers = self._crew.ask(names, {"kind": "look", "at": at}, LOOK_SECONDS)
        finally:
            mark.unlink(missing_ok=True)
        found = {name: answer["facts"] for name, answer in answers.items()}
        return found, {name: found[name]["time"] - answers[name]["arrived"] for name in found}

    def _wait_for_nodes(self, seconds: float) -> None:
        """Call lost nodes, wait so long for enough that may train, and leave out those that still may not."""
        members, wanted = self._crew.members, self._cluster.nodes
        for member in members.values():
            member.unfit = ""
        self._crew.start(self._lost())
        deadline = time.monotonic() + seconds
        unfit: dict[str, str] = {}
        while True:
            over = time.monotonic() >= deadline or self._stops > 0
            if over or len(self._crew.connected()) >= wanted:
                unfit = self._unfit_newcomers()
                # Ranks that were killed with their agent may hold an accelerator for some seconds more.
                if over or len(self._crew.connected()) - len(unfit) >= wanted:
                    break
            self._crew.poll(0.1)
        for name, why in unfit.items():
            members[name].unfit = why
            say(f"node {name}: {why}; left out until the next restart")
            self._records.event("node_left_out", f"node {name}: {why}", "left out", node=name)

    def _unfit_newcomers(self) -> dict[str, str]:
        """What is wrong with nodes that came back: after a reboot one may lack its mounts, or have other versions."""
        members, connected = self._crew.members, self._crew.connected()
        new = [name for name in connected if members[name].greeted > members[name].admitted]
        if not new:
            return {}
        found, skews = self._look(new)
        known = {name: member.facts for name, member in members.items() if member.facts and name not in new}
        unfit = {}
        for name in [name for name in new if members[name].connected]:
            try:
                if name not in found:
                    raise ConfigError(f"does not answer within {LOOK_SECONDS:.0f} s")
                admit(self._config, {**known, name: found[name]}, {name: skews[name]})
                members[name].admit(found[name])
                known[name] = found[name]
            except ConfigError as error:
                unfit[name] = str(error).replace(f"node {name}: ", "")
        return unfit

    def _call_missing(self) -> None:
        """Start the agents of lost nodes again, now and then: a machine that was rebooted does not call by itself."""
        now = time.monotonic()
        if now >= self._call_at:
            self._call_at = now + min(max(now - self._began, CALL_SECONDS[0]), CALL_SECONDS[1])
            self._crew.start(self._lost())

    def _lost(self) -> list[str]:
        return [name for name, member in self._crew.members.items() if not (member.connected or member.bad)]

    def _choose(self, wait_seconds: float) -> list[str]:
        """The nodes of the next attempt, after a wait for lost ones. Raises RunFailed when too few are left."""
        wanted, least = self._cluster.nodes, self._cluster.min_nodes or self._cluster.nodes
        if self._attempt:
            self._wait_for_nodes(wait_seconds)
        ready = self._crew.connected()
        count = self._largest(len(ready), wanted, least)
        if count == 0:
            lost = [name for name in self._crew.members if name not in ready]
            told = "; ".join(f"node {name}: {self._crew.why_lost(name)}" for name in lost)
            raise RunFailed(
                f"{len(ready)} of {wanted} nodes are left, and cluster.min_nodes={least} allows no layout of so few"
                f" ({told}); mend them and start again with: {self._again()}"
            )
        # Nodes that failed before come last; the order of the rest stays.
        chosen = sorted(ready, key=lambda name: self._crew.members[name].strikes)[:count]
        return [name for name in ready if name in chosen]

    def _largest(self, ready: int, wanted: int, least: int) -> int:
        """The most nodes whose ranks divide the global batch, 0 where none do."""
        for count in range(min(ready, wanted), least - 1, -1):
            try:
                check_world(self._config, count * self._processes)
            except ConfigError:
                if count == wanted:
                    raise
                continue
            return count
        return 0

    def _try(self, nodes: Sequence[str]) -> Outcome:
        self._attempt += 1
        orders = self._orders(nodes)
        spares = [name for name in self._crew.members if name not in nodes]
        ranks = {
            name: list(range(index * self._processes, (index + 1) * self._processes))
            for index, name in enumerate(nodes)
        }
        if len(nodes) < self._cluster.nodes:
            say(f"{len(nodes)} of {self._cluster.nodes} nodes train, with the same global batch: {', '.join(nodes)}")
        self._records.state(
            state="running",
            attempt=self._attempt,
            supervisor={"host": socket.gethostname(), "pid": os.getpid()},
            nodes=ranks,
            spares=spares,
            silent_seconds=self._cluster.silent_seconds,
            command=command_line(),
        )
        saved, wanted = newest_checkpoint(self._run_dir), self._cluster.nodes
        self._began = time.monotonic()
        self._call_at = self._began + CALL_SECONDS[0]

        def may_grow() -> bool:
            if len(nodes) == wanted:
                return False
            self._call_missing()
            more = self._largest(len(self._crew.connected()), wanted, len(nodes))
            return more > len(nodes) and newest_checkpoint(self._run_dir) > saved

        attempt = Attempt(self._crew, self._cluster, nodes, lambda: self._stops, may_grow, self._progress)
        return attempt.run(orders)

    def _orders(self, nodes: Sequence[str]) -> dict[str, Message]:
        """What each node is told to start."""
        first = nodes[0]
        port = self._cluster.rendezvous_port
        if not port and len(nodes) > 1:
            answer = self._crew.ask([first], {"kind": "port"}, LOOK_SECONDS)
            port = answer[first]["port"] if first in answer else 0
        interface = self._cluster.network_interface
        sockets = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface} if interface else {}
        place = {"nodes": len(nodes), "address": self._crew.address(first), "port": port}
        shared = {
            "kind": "start",
            "module": self._module,
            "words": self._words,
            "processes": self._processes,
            "run_dir": str(self._run_dir),
            "command": command_line(),
            "job": self._job,
            "flight_recorder": self._cluster.flight_recorder,
            "environment": {**sockets, **self._cluster.environment},
            "silent_seconds": self._cluster.silent_seconds,
        }
        run_id = f"attempt-{self._attempt}"
        return {
            name: {**shared, "place": {**place, "node_rank": number, "run_id": run_id}}
            for number, name in enumerate(nodes)
        }

    def _progress(self, ranks: dict[int, RankView]) -> None:
        """Note the first new step after a restart, and stragglers, once each."""
        if self._restart is not None:
            at, step = self._restart
            if any(view.step > step for view in ranks.values()):
                self._restart = None
                seconds = time.monotonic() - at
                self._records.event("recovered", f"the first step after {seconds:.1f} s", "goes on", seconds=seconds)
        now = time.monotonic()
        slow = {(ranks[rank].node, rank, one.cause): one for rank, one in stragglers(ranks).items()}
        self._slow_since = {which: self._slow_since.get(which, now) for which in slow}
        for which, one in slow.items():
            if which not in self._slow and now - self._slow_since[which] > STEADY_SECONDS:
                self._slow.add(which)
                node, rank, cause = which
                say(one.seen)
                self._records.event("straggler", one.seen, "noted", node=node, rank=rank, cause=cause)

    def _tell(self, fault: Fault) -> None:
        say(fault.seen)
        prefix = "" if fault.rank is None else f"[rank {fault.rank}] "
        for line in fault.words.rstrip("\n").splitlines():
            print(prefix + line, file=sys.stderr)
        if fault.kind in ("hang", "rank_frozen"):
            say(f"the stacks of all ranks are in {self._run_dir / 'stacks'}")
        elif fault.rank is not None and fault.kind == "rank_failed":
            say(f"its log is {self._run_dir / 'logs' / f'rank_{fault.rank}.log'}")

    def _no_retry(self, fault: Fault, restarts: int) -> str | None:
        """Why a fault is not worth another try; None where it is."""
        if self._stops:
            return "the job was asked to stop"
        if fault.kind == "rank_failed" and fault.status in _OUTCOMES and FULL_DISK not in fault.words:
            return f"{_OUTCOMES[fault.status]}, and would be again"
        if restarts > self._cluster.max_restarts:
            return f"{self._cluster.max_restarts} restarts in a row brought no new checkpoint (cluster.max_restarts)"
        return None

    def _wait_for_disk(self, fault: Fault) -> None:
        """After a full disk: until there is room for a checkpoint under run_dir, or the user stops the job."""
        if FULL_DISK not in fault.words:
            return
        needed = checkpoint_bytes(self._run_dir) + min(SPARE_BYTES, shutil.disk_usage(self._run_dir).total // 8)
        said = False
        while not self._stops and shutil.disk_usage(self._run_dir).free < needed:
            if not said:
                say(f"waiting for {needed / 2**20:.0f} MiB of free space in {self._run_dir}")
                self._records.state(state="waiting for disk space")
                said = True
            self._crew.poll(0.5)
        self._records.flush()

    def _again(self) -> str:
        """The command that goes on where this job ends."""
        return resume_command() if is_restart(self._run_dir, self._job) else command_line()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._stops += 1
        word = "the ranks save and stop; a second signal ends them at once" if self._stops == 1 else "ended"
        say(f"{signal.Signals(signum).name}: {word}")


def say(message: str) -> None:
    """A line of the launcher's own."""
    print(f"launch: {message}", file=sys.stderr, flush=True)
