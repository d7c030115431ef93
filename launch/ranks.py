"""The processes of one machine's ranks: started together, ended together, and which of them failed first.

A rank that ends with 0 is done and one that ends with 75 has saved itself; any other end is a failure. The first
failure by the clock is not always the cause: a rank whose peer went away may be seen to end before it. So the peers get
a moment to end too, and the one whose own error does not blame a peer is the culprit.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from data_prep.errors import EXIT_CRASH, EXIT_DONE, EXIT_STOPPED
from launch.console import Console

SETTLE_SECONDS = 0.5
"""After a failure, how long other ranks may show that they failed earlier."""
BLAME_SECONDS = 6.0
"""The same, when all that failed so far blame a peer."""
TERMINATE_SECONDS = 3.0
"""How long the ranks that are left may take to end on SIGTERM, before SIGKILL."""


@dataclass
class _Rank:
    process: subprocess.Popen[bytes]
    status: int | None = None
    ended: float = 0.0
    ended_before_signal: bool = True

    @property
    def failed(self) -> bool:
        return self.status not in (None, EXIT_DONE, EXIT_STOPPED)


@dataclass
class Ranks:
    """One machine's ranks. `start`, then `poll` until it gives an exit status; `forward` passes a signal on."""

    console: Console
    _ranks: dict[int, _Rank] = field(default_factory=dict)
    _signalled: signal.Signals | None = None
    _kill_at: float | None = None
    _outcome: int | None = None
    _ended: bool = False

    def start(self, command: Sequence[str], environments: Mapping[int, Mapping[str, str]]) -> dict[int, int]:
        """Start a process a rank; environments: what each one's environment has more than ours. Returns their pids."""
        for rank, environment in environments.items():
            process = subprocess.Popen(
                list(command),
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                # Ctrl-C on the terminal must reach the ranks once, through `forward`.
                start_new_session=True,
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
            assert process.stdout is not None
            assert process.stderr is not None
            self._ranks[rank] = _Rank(process)
            self.console.attach(rank, process.stdout, process.stderr)
        return {rank: entry.process.pid for rank, entry in self._ranks.items()}

    def forward(self, signum: signal.Signals) -> None:
        """Ask every rank to save and stop. Asked a second time, end them within `TERMINATE_SECONDS`."""
        if self._signalled is None:
            self.console.say(f"{signum.name}: the ranks save and stop; a second signal ends them at once")
        elif self._kill_at is None:
            self._kill_at = time.monotonic() + TERMINATE_SECONDS
        self._signalled = signum
        self._send(signal.SIGTERM)

    def poll(self) -> int | None:
        """None while the run goes on; else its exit status, with all ranks ended and the culprit's words printed."""
        if self._outcome is not None:
            return self._outcome
        self._reap()
        self.console.release()
        if self._kill_at is not None and time.monotonic() > self._kill_at:
            self._send(signal.SIGKILL)
        failed = [entry for entry in self._ranks.values() if entry.failed]
        if failed and self._signalled is None:
            self._outcome = self._fail()
        elif all(entry.status is not None for entry in self._ranks.values()):
            self._outcome = self._finish()
        return self._outcome

    def end(self) -> None:
        """End every rank that still runs, within `TERMINATE_SECONDS`. A second call does nothing."""
        if self._ended:
            return
        self._ended = True
        self._send(signal.SIGTERM)
        deadline = time.monotonic() + TERMINATE_SECONDS
        while time.monotonic() < deadline and any(entry.status is None for entry in self._ranks.values()):
            self._reap(after_signal=True)
            time.sleep(0.02)
        # The whole session: data loaders and other children of a rank too, of ended ranks as well.
        for entry in self._ranks.values():
            _signal_group(entry.process, signal.SIGKILL)
            entry.process.wait()
        self._reap(after_signal=True)

    def _finish(self) -> int:
        for rank in self._ranks:
            self.console.drain(rank)
        failed = [entry.status for entry in self._ranks.values() if entry.failed]
        if self._signalled is not None and failed and set(failed) <= {-signal.SIGTERM, -signal.SIGKILL}:
            # Hit before they listened for signals, or by the second signal.
            self.console.release(everything=True)
            self.console.say(f"ended by {self._signalled.name} without saving")
            return EXIT_CRASH
        if failed:
            return self._report(self._culprit())
        self.console.release(everything=True)
        return max(entry.status or 0 for entry in self._ranks.values())

    def _fail(self) -> int:
        """Find the culprit, end the others, print its words alone."""
        began = time.monotonic()
        while time.monotonic() - began < BLAME_SECONDS:
            self._reap()
            running = [entry for entry in self._ranks.values() if entry.status is None]
            if not running or (time.monotonic() - began > SETTLE_SECONDS and not self._all_blame_a_peer()):
                break
            time.sleep(0.02)
        for rank, entry in self._ranks.items():
            if entry.failed:
                self.console.drain(rank)
        culprit = self._culprit()
        # Its words before anything that the others say while they are ended.
        status = self._report(culprit)
        self.end()
        self.console.only(culprit)
        return status

    def _all_blame_a_peer(self) -> bool:
        return all(
            self._died_of_error(rank) and self.console.blames_a_peer(rank)
            for rank, entry in self._ranks.items()
            if entry.failed
        )

    def _culprit(self) -> int:
        failed = [rank for rank, entry in self._ranks.items() if entry.failed and entry.ended_before_signal]
        first = min(
            failed,
            key=lambda rank: (
                self._died_of_error(rank) and self.console.blames_a_peer(rank),
                self._ranks[rank].ended,
            ),
        )
        # Ranks often fail alike (a wrong setting): then the lowest speaks for all.
        alike = (self._ranks[first].status, self.console.last_error(first))
        return min(rank for rank in failed if (self._ranks[rank].status, self.console.last_error(rank)) == alike)

    def _died_of_error(self, rank: int) -> bool:
        return (self._ranks[rank].status or 0) > 0

    def _report(self, rank: int) -> int:
        status = self._ranks[rank].status
        assert status is not None
        self.console.only(rank)
        how = f"failed with exit status {status}" if status > 0 else f"was ended by {_signal_name(-status)}"
        if status == -signal.SIGKILL:
            how += " (often the kernel's, for want of memory)"
        others = len(self._ranks) - 1
        rest = f"; the other {'rank was' if others == 1 else f'{others} ranks were'} ended" if others else ""
        self.console.say(f"rank {rank} {how}{rest}; its log is {self.console.log_file(rank)}")
        return status if status > 0 else EXIT_CRASH

    def _reap(self, *, after_signal: bool = False) -> None:
        for entry in self._ranks.values():
            if entry.status is None and entry.process.poll() is not None:
                entry.status = entry.process.returncode
                entry.ended = time.monotonic()
                entry.ended_before_signal = not after_signal

    def _send(self, signum: signal.Signals) -> None:
        for entry in self._ranks.values():
            if entry.status is None:
                if signum == signal.SIGKILL:
                    _signal_group(entry.process, signum)
                else:
                    entry.process.send_signal(signum)


def _signal_group(process: subprocess.Popen[bytes], signum: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signum)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


def _end_with_parent() -> None:
    """In a rank before it starts: get SIGTERM when the launcher is killed, so that no rank is left behind."""
    assert _LIBC is not None
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
