"""Small objects that a run tells what happens; each does one thing with it.

    on_steps(records)      every logging.every_steps steps: one record a step, as metrics.jsonl holds them
    on_validation(record)  after a validation
    on_tasks(record)       after evaluation.tasks were run
    on_event(record)       a spike, a skipped range, a roll-back, a save on a signal
    close(status)          once, at the end: "done", "stopped" or "failed"

Only rank 0 has observers. They see plain numbers that were read from the device already; none of them may raise for
anything but a full disk.
"""

import sys
import time
from collections.abc import Callable
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from train.run_folder import RunFolder, finite

Record = dict[str, Any]


class Observer(Protocol):
    """What the trainer calls."""

    def on_steps(self, records: list[Record]) -> None:
        """Steps since the last call, oldest first."""

    def on_validation(self, record: Record) -> None:
        """A validation's result: step, loss, unigram_loss, by_language, by_kind."""

    def on_tasks(self, record: Record) -> None:
        """Results of evaluation.tasks: step, tasks (see `train.tasks.results`)."""

    def on_event(self, record: Record) -> None:
        """An event: id, step, from_sample, kind, seen, action."""

    def close(self, status: str) -> None:
        """The run ends: done, stopped or failed."""


class MetricsObserver:
    """Writes everything to the run folder."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def on_steps(self, records: list[Record]) -> None:
        """Append to metrics.jsonl, with this attempt's number and `overflow` where loss or gradient is not finite."""
        self._folder.append("metrics", [self._complete(record) for record in records])

    def on_validation(self, record: Record) -> None:
        """Append to validation.jsonl."""
        self._folder.append("validation", [{"attempt": self._folder.attempt, **record}])

    def on_tasks(self, record: Record) -> None:
        """Append to tasks.jsonl."""
        self._folder.append("tasks", [{"attempt": self._folder.attempt, **record}])

    def on_event(self, record: Record) -> None:
        """Append to events.jsonl and bring it to the disk: what went wrong must outlive what follows."""
        self._folder.append("events", [{"attempt": self._folder.attempt, **record}])
        self._folder.flush()

    def close(self, status: str) -> None:
        """Bring all lines to the disk; the folder itself is its owner's to close."""
        self._folder.flush()

    def _complete(self, record: Record) -> Record:
        clean: Record = {"attempt": self._folder.attempt, **finite(record)}
        if clean.get("loss") is None or ("grad_norm" in clean and clean["grad_norm"] is None):
            clean["overflow"] = True
        # The step leads the line: people read this file.
        return {"step": clean.pop("step"), **clean}


class ProgressObserver:
    """The live line on a terminal; elsewhere a plain line now and then."""

    def __init__(
        self,
        total_steps: int | None,
        *,
        stream: TextIO | None = None,
        plain_seconds: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """total_steps: the run's last step, None when not known. plain_seconds: least time between plain lines."""
        self._total = total_steps
        self._stream = stream or sys.stdout
        self._plain_seconds = plain_seconds
        self._clock = clock
        self._pace = Pace(clock)
        self._last_print = float("-inf")
        self._last: Record | None = None
        self._printed_step = -1
        self._live: Live | None = None
        console = Console(file=self._stream)
        if console.is_terminal and not console.is_dumb_terminal:
            self._live = Live(Text("starting"), console=console, refresh_per_second=4, transient=False)
            self._live.start()

    def on_steps(self, records: list[Record]) -> None:
        """Show the newest step."""
        if not records:
            return
        self._last = records[-1]
        self._pace.steps(len(records))
        if self._live is not None:
            self._live.update(Text(self._line(self._last)))
        elif self._clock() - self._last_print >= self._plain_seconds:
            self._print_last()

    def on_validation(self, record: Record) -> None:
        """One line that stays."""
        unigram = record.get("unigram_loss")
        against = ""
        if isinstance(unigram, (int, float)) and isinstance(record.get("loss"), (int, float)):
            gap = unigram - record["loss"]
            against = f", {abs(gap):.3f} nat {'under' if gap >= 0 else 'over'} the unigram baseline's {unigram:.3f}"
        self._say(f"validation at step {record.get('step')}: loss {number(record.get('loss'), '.4f')}{against}")

    def on_tasks(self, record: Record) -> None:
        """One line that stays."""
        accuracies = [
            f"{name} by {way} {found['accuracy']:.3f}"
            for name, task in record["tasks"].items()
            for way, found in task["by_way"].items()
        ]
        self._say(f"tasks at step {record['step']}: {', '.join(accuracies)}")

    def on_event(self, record: Record) -> None:
        """One line that stays."""
        parts = [f"step {record.get('step')}: {record.get('kind')}"]
        parts += [str(record[key]) for key in ("seen", "action") if record.get(key)]
        self._say("; ".join(parts))

    def close(self, status: str) -> None:
        """Leave the last line on the screen."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        elif self._last is not None and self._last["step"] != self._printed_step:
            self._print_last()

    def _print_last(self) -> None:
        assert self._last is not None
        self._say(self._line(self._last))
        self._last_print = self._clock()
        self._printed_step = self._last["step"]

    def _say(self, line: str) -> None:
        if self._live is not None:
            self._live.console.print(Text(line))
        else:
            print(line, file=self._stream, flush=True)

    def _line(self, record: Record) -> str:
        step = record["step"]
        total = f"/{self._total}" if self._total else ""
        parts = [f"step {step}{total}", f"loss {number(record.get('loss'), '.4f', 'overflow')}"]
        if "grad_norm" in record:
            parts.append(f"grad {number(record['grad_norm'], '.3g', 'overflow')}")
        if record.get("lr") is not None:
            parts.append(f"lr {record['lr']:.2e}")
        if record.get("tokens_per_second"):
            parts.append(f"{short(record['tokens_per_second'])} tokens/s")
        if record.get("mfu") is not None:
            parts.append(f"MFU {100 * record['mfu']:.1f} %")
        remaining = self._pace.seconds_for(self._total - step) if self._total else None
        if remaining is not None and self._total and step < self._total:
            parts.append(f"ETA {duration(remaining)}")
        return "  ".join(parts)


class Pace:
    """Steps a second by the clock on the wall, so that validation and saving count into the time that remains."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last: float | None = None
        self._seconds_per_step: float | None = None

    def steps(self, count: int) -> None:
        """So many steps have ended now. The first call only starts the clock: its steps hold the compilation."""
        now = self._clock()
        if self._last is not None and count > 0:
            measured = (now - self._last) / count
            # Steps of the last calls weigh most, and one slow call (a save) does not throw the estimate about.
            before = self._seconds_per_step
            self._seconds_per_step = measured if before is None else 0.9 * before + 0.1 * measured
        self._last = now

    def seconds_for(self, count: int) -> float | None:
        """Time that `count` steps will take, None before there is an estimate."""
        return None if self._seconds_per_step is None else self._seconds_per_step * max(0, count)


def duration(seconds: float) -> str:
    """`0:42`, `12:05`, `3:07:00`, `2 d 4 h`."""
    whole = round(seconds)
    if whole >= 2 * 86400:
        return f"{whole // 86400} d {whole % 86400 // 3600} h"
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def short(value: float) -> str:
    """`950`, `12.3k`, `1.24M`, `128.7B`."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}" if abs(value) < 100 * limit else f"{value / limit:.4g}{unit}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def size(count: float) -> str:
    """Bytes as `512 B`, `48.2 MiB`, `17.3 GiB`."""
    for limit, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(count) >= limit:
            return f"{count / limit:.3g} {unit}" if abs(count) < 100 * limit else f"{count / limit:.0f} {unit}"
    return f"{count:.0f} B"


def number(value: Any, form: str, missing: str = "–") -> str:
    """A number in the given format, or `missing` for null and non-finite ones."""
    clean = finite(value)
    return missing if not isinstance(clean, (int, float)) else format(clean, form)
