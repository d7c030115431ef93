"""Runs beside each other: curves, spike score, steps to divergence, sensitivity to the learning rate, a verdict table.

    python -m train.stability.report run_dirs=[runs/a,runs/b] output=stability.html png=stability.png

Runs whose configs differ only in `seed` (and in what does not change the training) are one variant; a variant's numbers
are means over its seeds with a 95 % interval (Student's t). Nothing but the run folders is read.
"""

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep import cli
from data_prep.errors import ConfigError
from data_prep.files import write_bytes
from train.charts import Series, line_chart, smoothed
from train.checkpoint.inspect import flat
from train.observers import number
from train.page import chart_grid, header, section, table_card, whole_page
from train.report import Run
from train.resume import FREE
from train.stability.figure import png

SPIKE_WINDOW, SPIKE_SIGMA = 128, 6.0
T_95 = (math.nan, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
"""Student's t at 97.5 %, by degrees of freedom; 1.96 beyond."""


@dataclass
class StabilityReportConfig:
    """What `python -m train.stability.report` reads."""

    run_dirs: list[str] = field(default_factory=list)
    """Run folders to compare; a pattern such as runs/egs/* stands for all folders it matches."""
    output: str = "stability.html"
    """The page that is written."""
    png: str | None = None
    """A PNG of the curves, written too; needs the extra `figures` (matplotlib)."""
    panels: list[str] = field(default_factory=lambda: ["loss", "grad_norm", "embedding_grad_norm"])
    """What the PNG shows, any of loss, grad_norm, embedding_grad_norm, max_logit."""
    last_steps: int = 50
    """Steps at the end whose mean loss is a run's final loss."""


@dataclass(frozen=True)
class Outcome:
    """What one run came to."""

    final_loss: float | None
    """Mean training loss of the last steps; None after a divergence."""
    spike_score: float
    """Share of the steps whose loss or log gradient norm lies over 6 deviations above the 128 steps before."""
    diverged_at: int | None
    """First step after which the loss never came back under 1.2 times the lowest mean before; None if it did not."""
    step_seconds: float
    """Median time of a step."""
    events: int
    """Spikes that were reported."""


def spike_score(values: Sequence[float | None]) -> float:
    """Share of the values over `SPIKE_SIGMA` deviations above the mean of the `SPIKE_WINDOW` values before.

    Judged from the 65th value on; a missing (not finite) one counts as a spike.
    """
    spikes = judged = 0
    for place in range(SPIKE_WINDOW // 2, len(values)):
        before = [value for value in values[max(0, place - SPIKE_WINDOW) : place] if value is not None]
        value = values[place]
        judged += 1
        if value is None:
            spikes += 1
        elif len(before) > 1:
            deviation = max(statistics.pstdev(before), 1e-3)
            spikes += value > statistics.fmean(before) + SPIKE_SIGMA * deviation
    return spikes / judged if judged else 0.0


def steps_to_divergence(losses: Sequence[float | None], window: int = 20) -> int | None:
    """The step (from 1) after which the mean loss of every `window` steps stays above 1.2 times the lowest such mean
    before it, or the first one that is not finite and never followed by a finite one. None for a run that held."""
    known = [math.inf if value is None else value for value in losses]
    means = [statistics.fmean(known[end - window : end]) for end in range(window, len(known) + 1)]
    if not means or means[-1] <= 1.2 * min(means):
        return None
    lowest = means.index(min(means))
    last_good = max(place for place in range(lowest, len(means)) if means[place] <= 1.2 * means[lowest])
    return last_good + window


def outcome(run: Run, last_steps: int) -> Outcome:
    """A run's numbers from its metrics and events."""
    losses = [record.get("loss") for record in run.metrics]
    norms = [record.get("grad_norm") for record in run.metrics]
    logs = [math.log(norm) if norm else None for norm in norms]
    diverged = steps_to_divergence(losses)
    known = [loss for loss in losses[-last_steps:] if loss is not None]
    seconds = sorted(record["step_seconds"] for record in run.metrics if record.get("step_seconds"))
    return Outcome(
        final_loss=statistics.fmean(known) if known and diverged is None else None,
        spike_score=max(spike_score(losses), spike_score(logs)),
        diverged_at=diverged,
        step_seconds=seconds[len(seconds) // 2] if seconds else math.nan,
        events=sum(str(event.get("kind", "")).endswith("spike") for event in run.events),
    )


def mean_and_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half the width of its 95 % interval; None for one value."""
    if len(values) < 2:
        return values[0], None
    degrees = len(values) - 1
    t = T_95[degrees] if degrees < len(T_95) else 1.96
    return statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(len(values))


def variants(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by the keys in which they differ from each other, such as `optimizer.lr=0.01`; seeds together."""
    configs: list[dict[str, Any]] = [flat(run.config) for run in runs]
    keys = sorted({key for config in configs for key in config})
    # Kernels and telemetry change no numbers but do change what an experiment shows.
    quiet = tuple(key for key in FREE if key not in ("kernels.", "stability.telemetry"))
    differ = [
        key
        for key in keys
        if key != "seed" and not key.startswith(quiet) and len({repr(config.get(key)) for config in configs}) > 1
    ]
    if "stability.name" in differ:
        # What a preset sets goes without saying.
        names = [config["stability.name"] for config in configs]
        pairs = {
            key: {(name, repr(config.get(key))) for name, config in zip(names, configs, strict=True)} for key in differ
        }
        differ = [key for key in differ if key == "stability.name" or len(pairs[key]) > len(set(names))]
    found: dict[str, list[Run]] = {}
    for run, config in zip(runs, configs, strict=True):
        name = ", ".join(f"{key.partition('.')[2] or key}={config.get(key)}" for key in differ) or "all runs"
        found.setdefault(name, []).append(run)
    return found


def page(runs: Sequence[Run], last_steps: int) -> str:
    """The whole page."""
    groups = variants(runs)
    outcomes = {name: [outcome(run, last_steps) for run in members] for name, members in groups.items()}
    curves = [
        _curves("Loss", groups, "loss"),
        _curves("Gradient norm", groups, "grad_norm", log=True),
        _curves("Gradient norm of the embedding", groups, "embedding_grad_norm", log=True),
    ]
    seeds = max(len(members) for members in groups.values())
    title = f"{len(runs)} runs, {len(groups)} variants"
    sections = [
        header("Stability", title, f"up to {seeds} seeds a variant", "", warn=False),
        section("Verdict", _verdict(outcomes), "Final loss: mean over the last steps and seeds, ± 95 % interval."),
        section("Curves", chart_grid([chart for chart in curves if chart]), "First seed of each variant, smoothed."),
        section("Sensitivity to the learning rate", chart_grid(_sensitivity(groups, outcomes))),
        section("Runs", _each(groups, outcomes)),
    ]
    return whole_page(title, sections, "Written by Tiankong 填空 from the run folders alone.")


def _curves(title: str, groups: dict[str, list[Run]], key: str, *, log: bool = False) -> str:
    series = []
    for color, (name, members) in enumerate(groups.items()):
        points = [(record["step"], record.get(key)) for record in members[0].metrics]
        series.append(Series(name, smoothed(points), color % 6))
    return line_chart(title, series, log=log)


def _sensitivity(groups: dict[str, list[Run]], outcomes: dict[str, list[Outcome]]) -> list[str]:
    """Final loss by learning rate, one line for what else differs; and the sensitivity of arXiv 2309.14322."""
    rates: dict[str, dict[float, float]] = {}
    for name, members in groups.items():
        rest = ", ".join(part for part in name.split(", ") if not part.startswith("lr=")) or "all"
        losses = [one.final_loss for one in outcomes[name] if one.final_loss is not None]
        if losses:
            rates.setdefault(rest, {})[float(members[0].setting("optimizer.lr"))] = statistics.fmean(losses)
    lines = {name: found for name, found in rates.items() if len(found) > 1}
    series = []
    for color, (name, found) in enumerate(lines.items(), start=1):
        excess = statistics.fmean(found.values()) - min(found.values())
        points = [(math.log10(rate), loss) for rate, loss in sorted(found.items())]
        series.append(Series(f"{name} (sensitivity {excess:.3f})", points, color % 6, "dots"))
    note = "x: log10 of the peak rate; sensitivity: mean excess over the best rate's loss; diverged runs left out"
    return [line_chart("Final loss", series, note=note)] if series else []


def _verdict(outcomes: dict[str, list[Outcome]]) -> str:
    base = statistics.fmean([one.step_seconds for one in next(iter(outcomes.values()))])
    rows = []
    for name, found in outcomes.items():
        losses = [one.final_loss for one in found if one.final_loss is not None]
        mean, half = mean_and_interval(losses) if losses else (None, None)
        steps = [str(one.diverged_at) for one in found if one.diverged_at is not None]
        rows.append(
            (
                name,
                str(len(found)),
                number(mean, ".3f")
                + (f" ± {half:.3f}" if half is not None else "")
                + (f" ({len(losses)} of {len(found)} seeds)" if 0 < len(losses) < len(found) else ""),
                f"{100 * statistics.fmean(one.spike_score for one in found):.2f} %",
                f"{len(steps)} of {len(found)}" + (f" (step {', '.join(steps)})" if steps else ""),
                f"{statistics.fmean(one.step_seconds for one in found) / base:.2f}",
            )
        )
    return table_card(("variant", "seeds", "final loss", "spike score", "diverged", "step time"), rows)


def _each(groups: dict[str, list[Run]], outcomes: dict[str, list[Outcome]]) -> str:
    rows = [
        (
            str(run.path),
            str(run.setting("seed")),
            number(one.final_loss, ".3f"),
            f"{100 * one.spike_score:.2f} %",
            str(one.diverged_at or "–"),
            str(one.events),
        )
        for name, members in groups.items()
        for run, one in zip(members, outcomes[name], strict=True)
    ]
    return table_card(("run", "seed", "final loss", "spike score", "diverged at", "spikes"), rows)


def main(config: StabilityReportConfig) -> int:
    """Write the page and say where it is."""
    folders = [path for word in config.run_dirs for path in _matching(word)]
    if not folders:
        raise ConfigError("run_dirs names no run folder; give run_dirs=[runs/a,runs/b]")
    runs = [Run.read(path) for path in folders]
    picture = png(variants(runs), config.panels) if config.png is not None else None
    write_bytes(Path(config.output), page(runs, config.last_steps).encode())
    if config.png is not None and picture is not None:
        write_bytes(Path(config.png), picture)
    print(f"{config.output}: {len(folders)} runs")
    return 0


def _matching(word: str) -> list[Path]:
    path = Path(word)
    if "*" not in word:
        return [path]
    root = Path(path.anchor) if path.is_absolute() else Path()
    return sorted(found for found in root.glob(str(path.relative_to(root))) if found.is_dir())


if __name__ == "__main__":
    sys.exit(cli.run("stability_report", StabilityReportConfig, main, program="train.stability.report"))
