"""The processes of one machine's ranks: started together, ended together, and which of them failed first.

A rank that ends with 0 is done and one that ends with 75 has saved itself; any other end is a failure. The first
end by the clock is not always the cause: a rank whose peer went away may end long before the peer does, whose threads
may abort what is left of its process after its traceback. So all get a moment to end, and then the evidence decides: an
error of a rank's own beats one that blames a peer, and of equals the one that was said first is the culprit's.
"""

import contextlib
import ctypes
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from data_prep.errors import EXIT_CRASH, EXIT_DONE, EXIT_STOPPED
from launch.console import Console
from train.heartbeat import STACK_SIGNAL

SETTLE_SECONDS = 0.5
"""After a failure, how long other ranks may show that they failed earlier."""
BLAME_SECONDS = 10.0
"""The same, when all that failed so far blame a peer, or another rank has shown an error and not ended yet."""
TERMINATE_SECONDS = 3.0
"""How long the ranks that are left may take to end on SIGTERM, before SIGKILL."""


@dataclass
class _Rank:
    process: subprocess.Popen[bytes]
    status: int | None = None
    ended: float = math.inf
    ended_before_signal: bool = True

    @property
    def failed(self) -> bool:
        return self.status not in (None, EXIT_DONE, EXIT_STOPPED)


@dataclass
class Failure:
    """Which of a machine's ranks failed first, and what it said."""

    rank: int
    status: int
    """Its exit status, negative for a signal, as the launcher passes it on."""
    how: str
    """`failed with exit status 1`, `was ended by SIGKILL`."""
    words: str
    """Its last traceback, or its last lines."""
    blames_a_peer: bool
    """Whether it only lost another rank."""
    at: float
    """When, by the monotonic clock."""


@dataclass
class Ranks:
    """One machine's ranks. `start`, then `poll` until it gives an exit status; `forward` passes a signal on."""

    console: Console
    supervised: bool = False
    """Whether a supervisor prints the culprit's words, and the ranks must not outlive the agent."""
    failure: Failure | None = None
    """Set when `poll` has given the status of a failure."""
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
                preexec_fn=(_killed_with_parent if self.supervised else _end_with_parent) if _LIBC else None,
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

    def dump_stacks(self, ranks: Iterable[int]) -> None:
        """Ask these ranks for their stacks."""
        for rank in ranks:
            if self._ranks[rank].status is None:
                self._ranks[rank].process.send_signal(STACK_SIGNAL)

    def abort(self) -> None:
        """Kill every rank at once; `poll` then gives EXIT_CRASH, and no rank is blamed."""
        self._ended = True
        for entry in self._ranks.values():
            _signal_group(entry.process, signal.SIGKILL)
            entry.process.wait()
        self._reap(after_signal=True)
        if self._outcome is None:
            self._outcome = EXIT_CRASH

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
        drained: set[int] = set()
        while True:
            self._reap()
            failed = {rank for rank, entry in self._ranks.items() if entry.failed}
            # The last words of a rank may be read after its end is seen.
            for rank in failed - drained:
                self.console.drain(rank)
            drained |= failed
            waited = time.monotonic() - began
            running = any(entry.status is None for entry in self._ranks.values())
            undecided = self._failing() or all(self._blames_a_peer(rank) for rank in failed)
            if not running or waited > (BLAME_SECONDS if undecided else SETTLE_SECONDS):
                break
            time.sleep(0.05)
        culprit = self._culprit()
        # Its words before anything that the others say while they are ended.
        status = self._report(culprit)
        self.end()
        self.console.only(culprit, show=not self.supervised)
        return status

    def _failing(self) -> list[int]:
        """Ranks that have shown an error of their own and not ended: torch may take long to close, or hang in it."""
        errors = {rank: self.console.last_error(rank) for rank, entry in self._ranks.items() if entry.status is None}
        return [rank for rank, error in errors.items() if error.raised and not error.blames_a_peer]

    def _died_of_exception(self, rank: int) -> bool:
        # An exception ends Python with 1, and one in a thread of torch's (NCCL's watchdog) aborts. A rank with another
        # exit status chose it, and one that another signal ended had no say: neither can be a peer's doing.
        return self._ranks[rank].status in (None, EXIT_CRASH, -signal.SIGABRT)

    def _blames_a_peer(self, rank: int) -> bool:
        return self._died_of_exception(rank) and self.console.last_error(rank).blames_a_peer

    def _failed_at(self, rank: int) -> float:
        error = self.console.last_error(rank)
        return error.time if error.raised and self._died_of_exception(rank) else self._ranks[rank].ended

    def _culprit(self) -> int:
        failed = [rank for rank, entry in self._ranks.items() if entry.failed and entry.ended_before_signal]
        # One that has not ended may only have logged its traceback: it is the last to be suspected but for peers.
        first = min(
            failed + self._failing(),
            key=lambda rank: (self._blames_a_peer(rank), not self._ranks[rank].failed, self._failed_at(rank)),
        )
        # Ranks often fail alike (a wrong setting): then the lowest speaks for all.
        alike = (self._ranks[first].status, self.console.last_error(first).text)
        same = [rank for rank in failed if (self._ranks[rank].status, self.console.last_error(rank).text) == alike]
        return min(same, default=first)

    def _report(self, rank: int) -> int:
        status = self._ranks[rank].status
        if status == -signal.SIGABRT and self.console.last_error(rank).closing:
            # Python was ending with 1 when a thread of torch's aborted it.
            status = EXIT_CRASH
        blames = self._blames_a_peer(rank)
        self.console.only(rank, show=not self.supervised)
        if status is None:
            how = "failed and did not end"
        else:
            how = f"failed with exit status {status}" if status > 0 else f"was ended by {_signal_name(-status)}"
        if status == -signal.SIGKILL:
            how += " (often the kernel's, for want of memory)"
        exit_status = status if status is not None and status > 0 else EXIT_CRASH
        self.failure = Failure(rank, exit_status, how, self.console.last_words(rank), blames, self._failed_at(rank))
        if self.supervised:
            return exit_status
        if blames:
            left = {other: entry for other, entry in self._ranks.items() if entry.status in (EXIT_DONE, EXIT_STOPPED)}
            if left:
                earliest = min(left, key=lambda other: left[other].ended)
                how += f", though rank {earliest} ended with {left[earliest].status}"
        others = len(self._ranks) - 1
        rest = f"; the other {'rank was' if others == 1 else f'{others} ranks were'} ended" if others else ""
        self.console.say(f"rank {rank} {how}{rest}; its log is {self.console.log_file(rank)}")
        return exit_status

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


def _killed_with_parent() -> None:
    """In a rank before it starts: end with its agent, for another machine's may soon run in its place."""
    assert _LIBC is not None
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _end_with_parent() -> None:
    """In a rank before it starts: get SIGTERM when the launcher is killed, so that no rank is left behind."""
    assert _LIBC is not None
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
