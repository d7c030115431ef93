"""python -m launch.status run_dir=RUN: a live table of a run; with port=N a small read-only web page of the same.

Everything is read from the run folder, so it works from any machine that sees it, also when the run has ended, and
needs neither the supervisor nor a service. Ages come from the ranks' own clocks: where those are wrong, so are they.
"""

import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from data_prep import cli
from data_prep.errors import EXIT_DONE, ConfigError, DataError
from launch.records import STATE_FILE, newest_checkpoint
from launch.verdict import RankView, Straggler, stragglers
from train.heartbeat import Beat, read_beats
from train.observers import duration, number, short
from train.run_folder import holds_run, read_json, read_log

SILENT_SECONDS = 30.0
"""Age of a beat from which a rank counts as silent, where the job does not say its own."""
EVENTS = 8
"""Newest events that are shown."""
RANKS = 32
"""Ranks that the terminal shows; those in trouble first."""

Record = dict[str, Any]


@dataclass
class StatusConfig:
    """What to show."""

    run_dir: str = MISSING
    """Run folder."""
    every_seconds: float = 2.0
    """Time between two looks; 0 shows the state once and ends."""
    port: int | None = None
    """Serve a web page on this port in place of the terminal; 0 takes a free one."""
    host: str = "127.0.0.1"
    """Address of the web page. Another than loopback's is served with a token in its link only."""


@dataclass
class Status:
    """How a run stands at one moment."""

    run_dir: Path
    metrics: list[Record]
    events: list[Record]
    beats: dict[int, Beat]
    job: Record
    checkpoint: int
    now: float = field(default_factory=time.time)

    @classmethod
    def read(cls, run_dir: Path) -> "Status":
        """Raises DataError where there is no run, or its files are damaged."""
        if not holds_run(run_dir) and not (run_dir / STATE_FILE).exists():
            raise DataError(f"{run_dir} holds no run; give the run_dir of one")
        return cls(
            run_dir=run_dir,
            metrics=read_log(run_dir / "metrics.jsonl"),
            events=read_log(run_dir / "events.jsonl"),
            beats=read_beats(run_dir),
            job=read_json(run_dir / STATE_FILE) if (run_dir / STATE_FILE).exists() else {},
            checkpoint=newest_checkpoint(run_dir),
        )

    def ranks(self) -> list[tuple[int, Beat]]:
        """The ranks of the present attempt; files of ranks that an earlier, larger one had are left out."""
        held = {rank for ranks in self.job.get("nodes", {}).values() for rank in ranks}
        return [(rank, beat) for rank, beat in self.beats.items() if not held or rank in held]

    def node(self, rank: int, beat: Beat) -> str:
        """The node that holds a rank, as the job names it."""
        nodes: Mapping[str, Sequence[int]] = self.job.get("nodes", {})
        return next((name for name, ranks in nodes.items() if rank in ranks), beat.host)

    def health(self) -> dict[int, str]:
        """`ok`, or what is wrong, of each rank."""
        limit = float(self.job.get("silent_seconds", SILENT_SECONDS))
        slow = stragglers(
            {
                rank: RankView(beat.host, "", 0.0, 0.0, own_seconds=beat.own_seconds, gpu_speed=beat.gpu_speed)
                for rank, beat in self.ranks()
            }
        )
        told = {}
        for rank, beat in self.ranks():
            age = self.now - beat.time
            if beat.phase == "ended":
                told[rank] = "ended"
            elif age > limit:
                told[rank] = f"silent for {duration(age)}"
            else:
                told[rank] = _slowness(slow[rank]) if rank in slow else "ok"
        return told

    def summary(self) -> list[tuple[str, str]]:
        """The run in a few names and values."""
        last = self.metrics[-1] if self.metrics else {}
        state = str(self.job.get("state", "")) or ("ended" if self._ended() else "running")
        recent = [record["step_seconds"] for record in self.metrics[-20:] if record.get("step_seconds")]
        values = [
            ("state", f"{state}, attempt {self.job.get('attempt', last.get('attempt', 1))}"),
            ("step", str(last.get("step", "–"))),
            ("loss", number(last.get("loss"), ".4f")),
            ("tokens/s", short(last["tokens_per_second"]) if last.get("tokens_per_second") else "–"),
            ("step time", f"{statistics.median(recent):.3g} s" if recent else "–"),
            ("last checkpoint", f"step {self.checkpoint}" if self.checkpoint else "none yet"),
            ("samples", short(last.get("consumed_samples", 0))),
        ]
        if self.job.get("spares"):
            values.append(("spare or lost nodes", ", ".join(self.job["spares"])))
        return values

    def startup(self) -> dict[str, float]:
        """Seconds of each phase up to the end of the first step: the slowest rank's, phase by phase."""
        phases: dict[str, float] = {}
        for _, beat in self.ranks():
            for name, seconds in beat.startup.items():
                phases[name] = max(seconds, phases.get(name, 0.0))
        return phases

    def _ended(self) -> bool:
        return bool(self.beats) and all(beat.phase == "ended" for _, beat in self.ranks())


def _slowness(straggler: Straggler) -> str:
    cause = {"gpu": " GPU", "host": " host", None: ""}[straggler.cause]
    return f"slow{cause}: {straggler.how}"


def rank_rows(status: Status) -> list[list[str]]:
    """Rank, node, health, step, phase, collective, own seconds a step, age; ranks in trouble first."""
    health = status.health()
    rows = [
        [
            str(rank),
            status.node(rank, beat),
            health[rank],
            str(beat.step),
            beat.phase,
            beat.collective or "",
            number(beat.own_seconds, ".3f"),
            f"{status.now - beat.time:.0f} s",
        ]
        for rank, beat in status.ranks()
    ]
    return sorted(rows, key=lambda row: row[2] in ("ok", "ended"))


RANK_HEADS = ("rank", "node", "health", "step", "phase", "collective", "own s/step", "age")


def event_lines(status: Status) -> list[str]:
    """The newest events, newest first."""
    lines = []
    for event in reversed(status.events[-EVENTS:]):
        when = time.strftime("%m-%d %H:%M:%S ", time.localtime(event["time"])) if "time" in event else ""
        parts = [str(event[key]) for key in ("seen", "action") if event.get(key)]
        lines.append(f"{when}step {event.get('step')} {event.get('kind')}: {'; '.join(parts)}")
    return lines


def terminal(status: Status) -> Group:
    """The table for a terminal."""
    head = Table.grid(padding=(0, 2))
    for name, value in status.summary():
        head.add_row(Text(name, style="dim"), Text(value))
    startup = status.startup()
    if startup:
        head.add_row(
            Text("start-up", style="dim"), ", ".join(f"{name} {value:.1f} s" for name, value in startup.items())
        )
    ranks = Table(*RANK_HEADS, title=None)
    rows = rank_rows(status)
    for row in rows[:RANKS]:
        ranks.add_row(*row, style=None if row[2] in ("ok", "ended") else "bold red")
    more = [Text(f"… and {len(rows) - RANKS} more ranks")] if len(rows) > RANKS else []
    return Group(head, ranks, *more, *(Text(line) for line in event_lines(status)))


def main(config: StatusConfig) -> int:
    """Show until the user has seen enough, or once."""
    run_dir = Path(config.run_dir)
    if config.every_seconds < 0:
        raise ConfigError(f"every_seconds={config.every_seconds} must not be negative; 0 shows the state once")
    first = Status.read(run_dir)
    if config.port is not None:
        from launch.status_page import serve

        return serve(run_dir, config.host, config.port)
    if not config.every_seconds:
        Console().print(terminal(first))
        return EXIT_DONE
    with Live(terminal(first), auto_refresh=False) as live:
        try:
            while True:
                time.sleep(config.every_seconds)
                live.update(terminal(Status.read(run_dir)), refresh=True)
        except KeyboardInterrupt:
            return EXIT_DONE


if __name__ == "__main__":
    sys.exit(cli.run("status", StatusConfig, main, program="launch.status"))
