"""One node's side of a supervised job: python -m launch.node SUPERVISOR:PORT [NAME]

The launcher starts it on every node. It connects to the supervisor, tells what the node is like, runs the ranks of each
attempt under torch's elastic agent (`launch.agent`), passes on their beats each second, and has them end at once when
the supervisor has not been heard for a while: by then it may have started others in their place.
"""

import contextlib
import os
import queue
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from data_prep.errors import EXIT_CONFIG, EXIT_CRASH, EXIT_DONE
from launch import flight_recorder
from launch.agent import Place, Steering, module_command, run_ranks, thread_count
from launch.facts import facts, free_port, interface_of
from launch.wire import Link, Message, connect, read_token
from train.heartbeat import read_beat, stack_file
from train.run_folder import COMMAND_VARIABLE, JOB_VARIABLE

VOICE_SECONDS = 0.2
"""How often the supervisor's words are looked for."""
BEAT_SECONDS = 1.0
LEASE_SHARE = 0.6
"""Share of cluster.silent_seconds without a word of the supervisor after which the ranks are ended."""
RETURN_SECONDS = 600.0
"""How long a node that lost its supervisor tries to find it again …"""
REFUSED_SECONDS = 30.0
"""… and how long where its machine answers that nobody listens there."""
STACK_SECONDS = 1.5
"""How long the ranks may take to write their stacks."""
STACK_BYTES = 20_000


class Node:
    """The connection, what runs, and the orders that wait."""

    def __init__(self, address: str, port: int, name: str, token: str) -> None:
        self._address, self._port, self._name, self._token = address, port, name, token
        self._link: Link | None = None
        self._lock = threading.Lock()
        self._orders: queue.Queue[Message] = queue.Queue()
        self._heard = time.monotonic()
        self._lease = float("inf")
        self._complained = False
        self._reached = False
        self._running: _Attempt | None = None

    def run(self) -> int:
        """Serve until the supervisor says farewell, or is gone for RETURN_SECONDS; returns the exit status."""
        threading.Thread(target=self._listen, name="supervisor", daemon=True).start()
        while True:
            order = self._orders.get()
            kind = order["kind"]
            if kind == "farewell":
                return EXIT_DONE
            if kind == "gone":
                _say(f"node {self._name}: no supervisor at {self._address}:{self._port}")
                return EXIT_CRASH
            answer = self._answer(kind, order)
            self.send({"kind": "answer", "order": order["order"], **answer})

    def send(self, message: Message) -> None:
        """Tell the supervisor, if it can be reached."""
        with self._lock:
            if self._link is not None:
                self._link.send(message)

    def _answer(self, kind: str, order: Message) -> Message:
        if kind == "look":
            return {"facts": facts(**order["at"])}
        if kind == "probe":
            from launch.probes import probe

            return {"results": probe(order["what"], order["options"])}
        if kind == "port":
            return {"port": free_port()}
        assert kind == "start", kind
        attempt = self._running
        if attempt is None or attempt.order is not order:
            attempt = self._begin(order)
        try:
            return attempt.run()
        finally:
            self._running = None

    def _begin(self, order: Message) -> "_Attempt":
        self._lease = LEASE_SHARE * order["silent_seconds"]
        self._running = _Attempt(order, self._own_address())
        return self._running

    def _own_address(self) -> str:
        return str(self._link.connection.getsockname()[0]) if self._link and not self._link.closed else ""

    def _listen(self) -> None:
        """The other thread: reads, beats, keeps the lease, connects again."""
        lost_at = time.monotonic()
        beat_at = 0.0
        while True:
            link = self._link
            if link is None or link.closed:
                self._lease_over()
                patience = REFUSED_SECONDS if self._connect() else RETURN_SECONDS
                if time.monotonic() - lost_at > patience:
                    self._orders.put({"kind": "gone"})
                    return
                continue
            lost_at = time.monotonic()
            with self._lock:
                messages = list(link.receive())
                link.flush()
            for message in messages:
                self._heard = time.monotonic()
                self._hear(message)
            running = self._running
            if running is not None and time.monotonic() - self._heard > self._lease:
                link.close()
            elif time.monotonic() >= beat_at:
                beat_at = time.monotonic() + BEAT_SECONDS
                # A node in reserve beats as well, or it would count as lost.
                self.send({"kind": "beats", "ranks": [] if running is None else running.beats()})
                if running is not None and running.stacks_due():
                    self.send({"kind": "stacks", "ranks": running.stacks()})
            time.sleep(VOICE_SECONDS)

    def _hear(self, message: Message) -> None:
        kind, running = message["kind"], self._running
        if kind == "ping":
            return
        if kind == "stop" and running is not None:
            running.steering.signals.append(signal.SIGTERM)
        elif kind == "abort" and running is not None:
            running.steering.abort = True
        elif kind == "dump" and running is not None:
            running.ask_for_stacks()
        elif kind not in ("stop", "abort", "dump"):
            if kind == "start" and running is None:
                # Here, for a stop may follow before the other thread has taken the order.
                self._begin(message)
            self._orders.put(message)

    def _lease_over(self) -> None:
        if self._running is not None:
            self._running.steering.abort = True

    def _connect(self) -> bool:
        """Try to reach the supervisor; whether its machine answered that nobody listens there."""
        try:
            link = connect(self._address, self._port)
        except OSError as error:
            if not self._complained:
                fix = "cluster.supervisor_address must be an address of its machine that the nodes can reach"
                _say(
                    f"node {self._name}: cannot reach the supervisor at {self._address}:{self._port} ({error})"
                    + ("" if self._reached else f"; {fix}")
                )
            self._complained = True
            time.sleep(1.0)
            return isinstance(error, ConnectionRefusedError)
        self._complained, self._reached = False, True
        idle = self._running is None
        link.send({"kind": "hello", "token": self._token, "name": self._name, "idle": idle})
        with self._lock:
            self._link = link
        self._heard = time.monotonic()
        return False


class _Attempt:
    """The ranks of one attempt on this node."""

    def __init__(self, order: Message, own_address: str) -> None:
        self.steering = Steering()
        self.order = order
        self._own_address = own_address
        self._run_dir = Path(order["run_dir"])
        self._stack_sizes: dict[int, int] = {}
        self._stacks_at = float("inf")

    def run(self) -> Message:
        """Run to the end; returns what to report."""
        order = self.order
        os.environ.update(self._environment(order["environment"]))
        os.environ[COMMAND_VARIABLE] = order["command"]
        os.environ[JOB_VARIABLE] = order["job"]
        os.environ.setdefault("OMP_NUM_THREADS", thread_count(order["processes"]))
        place = Place(**order["place"]) if order["place"]["nodes"] > 1 else None
        command = module_command(order["module"], order["words"])
        try:
            status = run_ranks(command, order["processes"], self._run_dir / "logs", place=place, steering=self.steering)
        except Exception as error:
            # torch has many errors for an agent that cannot join; all mean that this attempt is over.
            return {"status": EXIT_CRASH, "failure": _no_rendezvous(order, error), "seconds_ago": 0.0}
        failure = self.steering.failure
        if failure is None:
            return {"status": status, "failure": None, "seconds_ago": 0.0}
        told = {"rank": failure.rank, "how": failure.how, "words": failure.words, "blames": failure.blames_a_peer}
        return {"status": status, "failure": told, "seconds_ago": time.monotonic() - failure.at}

    def beats(self) -> list[Message]:
        """What each rank does, times as ages by this host's clock."""
        told = []
        for rank, pid in list(self.steering.pids.items()):
            beat = read_beat(self._run_dir, rank)
            state = _state(pid)
            if beat is None or beat.pid != pid:
                told.append({"rank": rank, "state": state, "age": None})
                continue
            now = time.time()
            said = {"step": beat.step, "phase": beat.phase, "collective": beat.collective}
            said |= {"own_seconds": beat.own_seconds, "gpu_speed": beat.gpu_speed}
            told.append({"rank": rank, "state": state, "age": now - beat.time, "still": now - beat.since, **said})
        return told

    def ask_for_stacks(self) -> None:
        """Ask the ranks that beat; the others have not set up to be asked."""
        beating = [beat["rank"] for beat in self.beats() if beat["age"] is not None]
        files = {rank: stack_file(self._run_dir, rank) for rank in beating}
        self._stack_sizes = {rank: file.stat().st_size if file.exists() else 0 for rank, file in files.items()}
        self.steering.dump = beating
        for rank in beating:
            flight_recorder.ask(self._run_dir, rank)
        self._stacks_at = time.monotonic() + STACK_SECONDS

    def stacks_due(self) -> bool:
        """Whether the stacks that were asked for should be there."""
        return time.monotonic() >= self._stacks_at

    def stacks(self) -> dict[str, str]:
        """What the ranks have written since they were asked."""
        self._stacks_at = float("inf")
        told = {}
        for rank, size in self._stack_sizes.items():
            with open(stack_file(self._run_dir, rank), "rb") as file:
                file.seek(size)
                told[str(rank)] = file.read(STACK_BYTES).decode(errors="replace")
        return told

    def _environment(self, chosen: Mapping[str, str]) -> dict[str, str]:
        """The job's variables; several nodes talk over the interface that reaches the supervisor, unless told."""
        found = interface_of(self._own_address) if self.order["place"]["nodes"] > 1 else None
        default = {"GLOO_SOCKET_IFNAME": found, "NCCL_SOCKET_IFNAME": found} if found else {}
        default |= flight_recorder.variables(self._run_dir, self.order["flight_recorder"])
        return {**{name: value for name, value in default.items() if name not in os.environ}, **chosen}


def _say(line: str) -> None:
    # Where the launcher is gone, so is the reader of this; the agent must still come to its end.
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def _state(pid: int) -> str:
    """The kernel's word for a process: running, sleeping, stopped, disk-sleep, zombie; gone where it has ended."""
    try:
        return str(psutil.Process(pid).status())
    except psutil.Error:
        return "gone"


def _no_rendezvous(order: Message, error: Exception) -> Message:
    place = order["place"]
    words = f"{type(error).__name__}: {error}"
    how = f"could not meet the other nodes at {place['address']}:{place['port']}"
    return {"rank": None, "how": how, "words": words, "blames": True}


def main(argv: Sequence[str] | None = None) -> int:
    """SUPERVISOR:PORT and the node's name, Slurm's or the host's by default.

    The token comes from the environment or standard input.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    address, colon, port = words[0].rpartition(":") if words else ("", "", "")
    if not colon or not port.isdecimal() or len(words) > 2:
        print(f"usage: python -m launch.node SUPERVISOR:PORT [NAME], not {shlex.join(words)}", file=sys.stderr)
        return EXIT_CONFIG
    name = words[1] if len(words) == 2 else os.environ.get("SLURMD_NODENAME", socket.gethostname())
    return Node(address, int(port), name, read_token()).run()


if __name__ == "__main__":
    sys.exit(main())
