"""What each rank does now, for whoever watches over the job: heartbeat/rank_N.json, and its stacks when asked.

    {"time", "step", "phase", "collective", "since", "own_seconds", "gpu_speed", "pid", "host", "startup"}

A thread writes the file each second over itself, so that a full disk does not make a rank look dead. The training step
pays for nothing but an assignment: the thread looks at the other threads' Python stacks from outside and finds the
collective that the rank stands in, and the share of time it spends outside of any. SIGURG appends the stacks of all
threads to stacks/rank_N.txt, also while Python waits inside a library.

Free of torch: the launcher reads these files too.
"""

import faulthandler
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections import deque
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import psutil

from train.progress import last_alive

BEAT_SECONDS = 1.0
"""How often the file is written."""
SAMPLE_SECONDS = 0.5
"""How often the stacks are looked at; a look takes one or two milliseconds."""
WINDOW_BEATS = 60
"""Beats over which `own_seconds` is an average …"""
FEWEST_BEATS = 20
"""… and the fewest that make one: two looks a second, each at a rank that computes or waits, count little at first."""
_BYTES = 1024
"""Length of the file: written in place, it never needs another block of the disk."""
PHASES = ("imports", "rendezvous", "collectives", "checkpoint", "engine", "data", "step", "read", "validate", "save")
"""What a rank does, in the order of a start and of a step."""
STACK_SIGNAL = signal.SIGURG
"""Has a rank write its stacks. Not SIGUSR1: LLVM takes that one over when Triton compiles its first kernel. A process
that has not set up to be asked ignores it."""
_COLLECTIVES = os.path.join("torch", "distributed", "distributed_c10d.py")
_FRAME = re.compile(r'\s+File "(.*)", line (\d+) in (.*)')
_LIBRARIES = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}", "<frozen", sys.prefix + "/lib")


@dataclass
class Beat:
    """One rank's last sign of life, times by its own host's clock in seconds since 1970."""

    time: float
    step: int
    """Steps done."""
    phase: str
    """One of `PHASES`, or ended."""
    collective: str | None
    """The collective that the rank is in, and the line that called it."""
    since: float
    """When the phase or the step last changed, or a piece of the phase's work was done (`train.progress`)."""
    own_seconds: float | None
    """Seconds a step of the host's own, outside of collectives and of waits for an accelerator, over the last minute;
    None before a third of one."""
    gpu_speed: float | None
    """Speed of this rank's kernels, of the fastest rank's: the better of the last two measurements; None before, and
    where nothing is measured (`train.kernel_times`)."""
    pid: int
    host: str
    startup: dict[str, float] = field(default_factory=dict)
    """Seconds of each phase up to the end of the first step, once it is known."""


class Heartbeat:
    """This rank's beat. `now` says what it does; `start` begins to write; `close` ends it."""

    def __init__(self, run_dir: str | Path, rank: int, *, accelerated: bool = False) -> None:
        """Notes the time; nothing is written before `start`, when the run folder is known to be ours.

        accelerated: an accelerator computes the steps. The host then waits in them for the device, which waits for
        other ranks, so that all need the slowest one's time: only what comes before a step is its own.
        """
        self._own_phases = ("data",) if accelerated else ("data", "step")
        self._folder, self._rank = Path(run_dir), rank
        self._phase, self._step, self._since = "imports", 0, psutil.Process().create_time()
        self._spent: dict[str, float] = {}
        self.startup: dict[str, float] = {}
        """Seconds of each phase up to the end of the first step; empty until then."""
        self.gpu_speed: float | None = None
        """Set by whoever measures it."""
        self._own = 0.0
        self._window: deque[tuple[int, float]] = deque(maxlen=WINDOW_BEATS)
        self._collective: str | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._file: int | None = None

    def now(self, phase: str, step: int | None = None) -> None:
        """The rank begins a phase. step: steps done so far, where that is known."""
        moment = time.time()
        if not self.startup:
            self._spent[self._phase] = self._spent.get(self._phase, 0.0) + moment - self._since
            if self._phase == "step":
                self.startup = {name: round(seconds, 2) for name, seconds in self._spent.items()}
        self._phase, self._since = phase, moment
        self._step = self._step if step is None else step

    def start(self) -> None:
        """Write the first beat and keep on; a folder that cannot be written leaves the rank without a beat."""
        try:
            for name in ("heartbeat", "stacks"):
                (self._folder / name).mkdir(exist_ok=True)
            path = beat_file(self._folder, self._rank)
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            self._stacks = open(stack_file(self._folder, self._rank), "a")  # noqa: SIM115 - as long as the process
            self._beat()
        except OSError:
            return
        faulthandler.register(STACK_SIGNAL, file=self._stacks, all_threads=True, chain=False)
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Write the last beat. A second call does nothing."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self.now("ended")
            self._beat()

    def _run(self) -> None:
        due = time.monotonic() + BEAT_SECONDS
        last = time.monotonic()
        stacks = _Stacks()
        while not self._stop.wait(SAMPLE_SECONDS):
            self._collective = stacks.collective()
            moment = time.monotonic()
            if self._collective is None and self._phase in self._own_phases:
                self._own += moment - last
            last = moment
            if moment >= due:
                due = moment + BEAT_SECONDS
                if self.startup:  # the first step loads and compiles, each rank as long as it takes
                    self._window.append((self._step, self._own))
                self._beat()

    def _beat(self) -> None:
        assert self._file is not None
        beat = Beat(
            time=time.time(),
            step=self._step,
            phase=self._phase,
            collective=self._collective,
            since=max(self._since, last_alive()),
            own_seconds=self._own_seconds(),
            gpu_speed=self.gpu_speed,
            pid=os.getpid(),
            host=socket.gethostname(),
            startup=self.startup,
        )
        text = json.dumps(asdict(beat)).encode()
        try:
            os.pwrite(self._file, text.ljust(_BYTES - 1) + b"\n", 0)
        except OSError:  # a vanished disk shows where something is written for good
            return

    def _own_seconds(self) -> float | None:
        if len(self._window) < FEWEST_BEATS:
            return None
        (first, before), (last, after) = self._window[0], self._window[-1]
        return None if last == first else round((after - before) / (last - first), 4)


def beat_file(run_dir: Path, rank: int) -> Path:
    """Where a rank writes its beat."""
    return run_dir / "heartbeat" / f"rank_{rank}.json"


def stack_file(run_dir: Path, rank: int) -> Path:
    """Where a rank's stacks go on SIGURG."""
    return run_dir / "stacks" / f"rank_{rank}.txt"


def read_beat(run_dir: Path, rank: int) -> Beat | None:
    """A rank's last beat; None where there is none that can be read."""
    for _ in range(3):
        try:
            content = json.loads(beat_file(run_dir, rank).read_bytes())
            return Beat(**{item.name: content[item.name] for item in fields(Beat)})
        except ValueError:  # read while it was written
            continue
        except (OSError, KeyError, TypeError):
            return None
    return None


def read_beats(run_dir: Path) -> dict[int, Beat]:
    """The last beats of all ranks that have one, by rank."""
    names = [path.stem.removeprefix("rank_") for path in (run_dir / "heartbeat").glob("rank_*.json")]
    beats = {rank: read_beat(run_dir, rank) for rank in sorted(int(name) for name in names if name.isdecimal())}
    return {rank: beat for rank, beat in beats.items() if beat is not None}


class _Stacks:
    """The Python stacks of all threads, as text from faulthandler.

    `sys._current_frames` would be shorter, but walking a running thread's frame objects from another thread has crashed
    the interpreter (3.11). faulthandler reads them without making or touching any object.
    """

    def __init__(self) -> None:
        # In memory: a full disk must not blind it.
        self._file = open(os.memfd_create("stacks"), "w+b", buffering=0)  # noqa: SIM115 - as long as the process
        self._main = f"0x{threading.main_thread().ident:016x}"

    def collective(self) -> str | None:
        """The outermost function of torch.distributed on a thread's stack, the main thread's first, and its caller."""
        self._file.seek(0)
        faulthandler.dump_traceback(self._file, all_threads=True)
        length = self._file.tell()
        self._file.seek(0)
        return collective_in(self._file.read(length).decode("utf-8", "replace"), self._main)


def collective_in(text: str, main: str) -> str | None:
    """The collective in a dump of faulthandler, such as `all_reduce from train/engine.py:120`; None without one.

    main: the main thread's identifier as the dump writes it; the others count where the main thread is in none.
    """
    stacks = [part.splitlines() for part in text.split("\n\n")]
    for lines in sorted(stacks, key=lambda lines: main not in lines[0] if lines else True):
        found = _in_collective(lines[1:])
        if found is not None:
            return found
    return None


def _in_collective(frames: list[str]) -> str | None:
    """frames: lines `  File "PATH", line N in FUNCTION`, innermost first."""
    name: str | None = None
    for line in frames:
        match = _FRAME.match(line)
        if match is None:
            continue
        file, number, function = match.groups()
        if file.endswith(_COLLECTIVES):
            name = function
        elif name is not None and not file.startswith("<") and not any(part in file for part in _LIBRARIES):
            return f"{name} from {'/'.join(Path(file).parts[-2:])}:{number}"[:200]
    return name
