"""One console for many ranks, and a log file for each.

Rank 0's standard output passes through as it is; every other line goes to standard error, other ranks' with a
`[rank N]` prefix. Standard error is held back for a second, a traceback for some more: when a rank fails, its peers
fail a moment later with "Connection closed by peer", and only the first one's traceback is worth a reader's time. A
line that rank 0 says too is shown once. Everything is in the logs.
"""

import contextlib
import re
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import IO, BinaryIO, NamedTuple

HOLD_SECONDS = 1.0
"""How long a line of standard error waits for the news that its rank failed because of another one."""
HOLD_TRACEBACK_SECONDS = 10.0
"""The same from a traceback on: a rank may take a while to end after it."""
KEPT_LINES = 400
"""Newest lines of a rank's standard error that are kept to judge a failure."""
LAST_WORDS_SECONDS = 5.0
"""How long after the exception that ends a process its last words may come; a rank that writes on later went on."""

_TORCH_PREFIX = re.compile(rb"^\[rank\d+\]: ")
_EXCEPTION = re.compile(r"^(\[rank\d+\]: )?[A-Za-z_][\w.]*(Error|Exception|Interrupt|Exit)\b")
_CPP_EXCEPTION = "terminate called after throwing"
_FRAME = '  File "'
_PEER = re.compile(
    r"connection (was )?(closed|reset|aborted)|broken pipe|socket closed|remote process exited|ncclRemoteError"
    r"|Timed out waiting .*(recv|send)|watchdog caught collective|application timeout caused pair closure",
    re.IGNORECASE,
)


class _Line(NamedTuple):
    time: float
    rank: int
    text: bytes
    due: float = 0.0


class LastError(NamedTuple):
    """How a rank's standard error ends: its last exception with what follows it, or the last line without any."""

    text: str = ""
    time: float = 0.0
    """When the first line of it was read."""
    raised: bool = False
    """Whether it is an exception, and nothing was written long after it."""

    @property
    def blames_a_peer(self) -> bool:
        """Whether it only says that another rank went away."""
        return bool(_PEER.search(self.text))

    @property
    def closing(self) -> bool:
        """Whether Python was ending of it already when the last line came: a dump of a crash shows no running code."""
        return self.raised and _FRAME not in self.text


class Console:
    """Readers of all ranks' pipes, the held lines, and the log files under `logs`."""

    def __init__(self, logs: Path, *, out: BinaryIO | None = None, err: BinaryIO | None = None) -> None:
        """logs: folder of rank_N.log. out, err: where lines go; default this process's standard streams."""
        self._logs = logs
        self._out = out or sys.stdout.buffer
        self._err = err or sys.stderr.buffer
        self._lock = threading.Lock()
        self._held: dict[int, deque[_Line]] = {}
        self._failing: set[int] = set()
        self._said_by_zero: deque[bytes] = deque(maxlen=KEPT_LINES)
        self._tails: dict[int, deque[_Line]] = {}
        self._files: dict[int, BinaryIO] = {}
        self._readers: dict[int, list[threading.Thread]] = {}

    def log_file(self, rank: int) -> Path:
        """Where a rank's lines are kept."""
        return self._logs / f"rank_{rank}.log"

    def attach(self, rank: int, out: IO[bytes], err: IO[bytes]) -> None:
        """Read a rank's pipes until they close. Its log is appended to: an earlier attempt's lines stay."""
        self._logs.mkdir(parents=True, exist_ok=True)
        self._files[rank] = open(self.log_file(rank), "ab", buffering=0)  # noqa: SIM115 - open as long as the rank
        self._held[rank] = deque()
        self._tails[rank] = deque(maxlen=KEPT_LINES)
        self._log(rank, time.strftime("--- started %Y-%m-%d %H:%M:%S\n").encode())
        self._readers[rank] = [
            threading.Thread(target=self._read, args=(rank, pipe, is_error), name=f"rank-{rank}", daemon=True)
            for pipe, is_error in ((out, False), (err, True))
        ]
        for reader in self._readers[rank]:
            reader.start()

    def drain(self, rank: int, seconds: float = 1.0) -> None:
        """Wait until an ended rank's last lines are read; not for ever, for its own children may hold the pipes."""
        deadline = time.monotonic() + seconds
        for reader in self._readers.get(rank, []):
            reader.join(max(0.0, deadline - time.monotonic()))

    def release(self, *, everything: bool = False) -> None:
        """Print held lines that have waited long enough, or all of them."""
        now = time.monotonic()
        with self._lock:
            due = []
            for rank, lines in self._held.items():
                while lines and (everything or lines[0].due <= now):
                    due.append(lines.popleft())
                    # It outlived its traceback, which was somebody's way to log a warning.
                    if not lines:
                        self._failing.discard(rank)
            for line in sorted(due, key=lambda line: line.time):
                if line.rank == 0 or line.text not in self._said_by_zero:
                    self._print(line)

    def only(self, rank: int, *, show: bool = True) -> None:
        """Print the held lines of the rank that failed first, unless a supervisor does; drop the others'."""
        with self._lock:
            for line in self._held[rank] if show else ():
                self._print(line)
            for lines in self._held.values():
                lines.clear()

    def say(self, message: str) -> None:
        """A line of the launcher's own."""
        with self._lock:
            self._write(self._err, f"launch: {message}\n".encode())

    def last_words(self, rank: int) -> str:
        """A rank's last traceback with what follows it, or its last lines of standard error."""
        with self._lock:
            lines = [_TORCH_PREFIX.sub(b"", line.text, count=1) for line in self._tails.get(rank, ())]
        began = [number for number, line in enumerate(lines) if line.startswith(b"Traceback (most recent call last)")]
        return b"".join(lines[began[-1] :] if began else lines[-10:]).decode(errors="replace")

    def last_error(self, rank: int) -> LastError:
        """What a rank said last on standard error; its text is empty without any."""
        with self._lock:
            lines = [line for line in self._tails.get(rank, ()) if line.text.strip()]
        texts = [line.text.decode(errors="replace").rstrip("\n") for line in lines]
        dumped = False
        for index in range(len(texts) - 1, -1, -1):
            dumped = dumped or texts[index].startswith(_FRAME)
            # One of C++ with no Python code running is a thread that ended badly after the exception that matters.
            if _EXCEPTION.match(texts[index]) or (dumped and texts[index].startswith(_CPP_EXCEPTION)):
                last_words = lines[-1].time - lines[index].time < LAST_WORDS_SECONDS
                return LastError("\n".join(texts[index:]), lines[index].time, raised=last_words)
        return LastError(texts[-1], lines[-1].time) if lines else LastError()

    def close(self) -> None:
        """Print what is held and close the logs."""
        self.release(everything=True)
        with self._lock:
            for file in self._files.values():
                file.close()
            self._files.clear()

    def _read(self, rank: int, pipe: IO[bytes], is_error: bool) -> None:
        with pipe:
            for text in pipe:
                with self._lock:
                    self._log(rank, text)
                    line = _Line(time.monotonic(), rank, text)
                    if is_error:
                        self._hold(line)
                    elif rank == 0:
                        self._write(self._out, text)
                    else:
                        self._print(line)

    def _hold(self, line: _Line) -> None:
        self._tails[line.rank].append(line)
        if b"Traceback (most recent call last)" in line.text:
            self._failing.add(line.rank)
        if line.rank == 0:
            self._said_by_zero.append(line.text)
        seconds = HOLD_TRACEBACK_SECONDS if line.rank in self._failing else HOLD_SECONDS
        self._held[line.rank].append(line._replace(due=line.time + seconds))

    def _print(self, line: _Line) -> None:
        # torch marks tracebacks with the rank itself once a process group is up.
        text = _TORCH_PREFIX.sub(b"", line.text, count=1)
        text = text if text.endswith(b"\n") else text + b"\n"
        self._write(self._err, text if line.rank == 0 else f"[rank {line.rank}] ".encode() + text)

    def _write(self, stream: BinaryIO, text: bytes) -> None:
        # Where the terminal is gone (a closed ssh session) the run goes on; its logs are files.
        with contextlib.suppress(OSError):
            stream.write(text)
            stream.flush()

    def _log(self, rank: int, text: bytes) -> None:
        # A full disk must not stop the ranks from here; they meet it themselves and say so.
        with contextlib.suppress(OSError):
            if rank in self._files:
                self._files[rank].write(text)
