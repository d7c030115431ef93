"""The comparison's figure as a PNG: each variant's curve as the mean over its seeds, with their range behind it.

matplotlib draws it; it is an extra (`pip install -e '.[figures]'`) and imported here only.
"""

import io
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import Any

from data_prep.errors import ConfigError
from train.report import Run

Record = dict[str, Any]
MEAN_OF = 10
"""Steps whose mean is one point of a curve."""
STYLES = ("-", "--", ":", "-.")


def _max_logit(record: Record) -> float | None:
    logits = (record.get("telemetry") or {}).get("max_logit")
    # What is not finite is null in metrics.jsonl.
    return max(math.inf if logit is None else logit for logit in logits.values()) if logits else None


PANELS: dict[str, tuple[str, Callable[[Record], float | None]]] = {
    "loss": ("training loss", lambda record: record.get("loss")),
    "grad_norm": ("gradient norm", lambda record: record.get("grad_norm")),
    "embedding_grad_norm": ("gradient norm of the embedding", lambda record: record.get("embedding_grad_norm")),
    "max_logit": ("largest attention logit", _max_logit),
}
"""Heading of a panel, and what it shows of a line of metrics.jsonl; all but the loss on a logarithmic axis."""


def curve(run: Run, value: Callable[[Record], float | None]) -> dict[int, float]:
    """Means of `MEAN_OF` steps by the last of them; steps without a finite value are left out."""
    found: dict[int, list[float]] = {}
    for record in run.metrics:
        number = value(record)
        if number is not None and math.isfinite(number):
            found.setdefault(math.ceil(record["step"] / MEAN_OF) * MEAN_OF, []).append(number)
    return {step: statistics.fmean(numbers) for step, numbers in found.items()}


def over_seeds(curves: Sequence[Mapping[int, float]]) -> list[tuple[int, float, float, float]]:
    """(step, mean, lowest, highest) over the seeds that still have a value there."""
    steps = sorted({step for one in curves for step in one})
    points = []
    for step in steps:
        here = [one[step] for one in curves if step in one]
        points.append((step, statistics.fmean(here), min(here), max(here)))
    return points


def png(groups: Mapping[str, Sequence[Run]], panels: Sequence[str]) -> bytes:
    """The figure's file. groups: the runs of each variant. A cross marks where a variant's last run broke off early.

    Raises ConfigError where a panel is not known or matplotlib is missing.
    """
    for name in panels:
        if name not in PANELS:
            raise ConfigError(f"panels holds {name!r}; use any of {', '.join(PANELS)}")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("png needs matplotlib: pip install -e '.[figures]'") from error
    last = max((run.metrics[-1]["step"] for members in groups.values() for run in members if run.metrics), default=0)
    figure = Figure(figsize=(5.2 * len(panels), 4.4), dpi=90, layout="constrained")
    colours = [f"C{number}" for number in range(10)]
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        heading, value = PANELS[panel]
        for (name, members), colour, style in zip(
            groups.items(), cycle(colours), cycle([one for one in STYLES for _ in colours]), strict=False
        ):
            points = over_seeds([curve(run, value) for run in members])
            if not points:
                continue
            steps, means, low, high = zip(*points, strict=True)
            axes.plot(steps, means, style, color=colour, label=name, linewidth=1.3)
            axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
            if steps[-1] < last - MEAN_OF:
                axes.plot(steps[-1], means[-1], "x", color=colour, markersize=8)
        axes.set(title=heading, xlabel="step", yscale="linear" if panel == "loss" else "log")
        axes.grid(alpha=0.25)
    handles, names = figure.axes[0].get_legend_handles_labels()
    # About fourteen letters of the legend's size are an inch wide.
    columns = int(14 * 5.2 * len(panels) / (8 + max((len(name) for name in names), default=0)))
    figure.legend(handles, names, loc="outside lower center", ncols=max(1, columns), fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, metadata={"Software": ""})
    return file.getvalue()
