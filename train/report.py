"""report.html of a run: one self-contained page from what the run folder holds, of a live or a killed run too.

    python -m train.report run_dir=RUN

The trainer writes it at the end. Nothing but the run folder is read and nothing outside the page is loaded.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf

from data_prep import cli
from data_prep.errors import DataError
from data_prep.files import write_bytes
from train.charts import Point, Series, line_chart, smoothed
from train.observers import duration, number, short, size
from train.page import chart_grid, header, section, table_card, tile_row, whole_page
from train.run_folder import holds_run, read_json, read_log
from train.stability.charts import telemetry_charts

LANGUAGE_NAMES = {"zh": "Chinese", "en": "English", "zh_hant": "Traditional Chinese", "code": "code", "other": "other"}
KIND_NAMES = {"gmask": "[gMASK]", "mask": "[MASK]", "smask": "[sMASK]", "causal": "causal"}

Record = dict[str, Any]


@dataclass
class ReportConfig:
    """What `python -m train.report` reads."""

    run_dir: str = MISSING
    """Run folder to report on; report.html is written there."""


@dataclass(frozen=True)
class Run:
    """What a run folder holds."""

    path: Path
    config: Record
    config_text: str
    environment: Record
    metrics: list[Record]
    validation: list[Record]
    events: list[Record]
    tasks: list[Record] = field(default_factory=list)
    fills: list[Record] = field(default_factory=list)
    evaluation: Record = field(default_factory=dict)
    memory: Record = field(default_factory=dict)

    @staticmethod
    def read(path: Path) -> "Run":
        """Raises DataError when the folder holds no run or one of its files is damaged."""
        if not holds_run(path):
            raise DataError(f"{path}: no run here; give the run_dir of a training run")
        configs = [path / "config.yaml", *sorted(path.glob("config.attempt-*.yaml"), key=_attempt)]
        text = configs[-1].read_text() if configs[-1].exists() else ""
        loaded = OmegaConf.to_container(OmegaConf.create(text)) if text else {}

        def optional(name: str, default: Any) -> Any:
            return read_json(path / name) if (path / name).exists() else default

        return Run(
            path=path,
            config=loaded if isinstance(loaded, dict) else {},  # type: ignore[arg-type]
            config_text=text,
            environment=optional("environment.json", {}),
            metrics=read_log(path / "metrics.jsonl"),
            validation=read_log(path / "validation.jsonl"),
            events=read_log(path / "events.jsonl"),
            tasks=read_log(path / "tasks.jsonl"),
            fills=optional("fills.json", []),
            evaluation=optional("eval.json", {}),
            memory=optional("memory.json", {}),
        )

    def setting(self, key: str, default: Any = None) -> Any:
        """A resolved config value by its dotted key."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return default if value is None else value


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` into a run folder; returns its path. Raises DataError naming what cannot be read."""
    run = Run.read(Path(run_dir))
    target = run.path / "report.html"
    write_bytes(target, page(run).encode())
    return target


def page(run: Run) -> str:
    """The whole page."""
    name = f"{run.path.resolve().name} · {run.setting('model.name', 'model')}"
    sections = [
        _header(run),
        _tiles(run),
        section(
            "Loss",
            chart_grid([*_loss_charts(run), _held_out_table(run)]),
            "Cross entropy in nats a target, by step: lines are training, dots held-out, dashes the unigram baseline.",
        ),
        section(
            "Filled blanks",
            _fills(run.fills),
            "Held-out text that training never saw. Beside each answer, the probability given to the true words; the "
            "unigram baseline always answers with the most frequent piece.",
        ),
        section(
            "Tasks",
            chart_grid(_task_charts(run)),
            "Accuracy on evaluation.tasks, scored at a [MASK] or as a continuation; dashes are what guessing gives.",
        ),
        section("How it ran", chart_grid([*_running_charts(run), _memory_table(run.memory)])),
        section("Stability", chart_grid(telemetry_charts(run.metrics)), "What the terms mean: docs/stability.md."),
        section("Events", _events(run.events)),
        section("Environment", _environment(run)),
        section("Commands", _commands(run)),
        section("Config", _config(run)),
    ]
    return whole_page(name, sections, "Written by Tiankong 填空 from the run folder alone.")


def _header(run: Run) -> str:
    setting = run.setting
    sizes = f"{setting('model.num_layers', '?')} layers × {setting('model.hidden_size', '?')}"
    parts = [f"{setting('model.name', 'model')}, {sizes}", f"sequence {setting('sequence_length', '?')}"]
    products = ", products in FP8" if setting("precision.fp8") else ""
    parts += [f"batch {setting('global_batch_size', '?')}", f"{setting('precision.dtype', '')}{products}"]
    environment = run.environment
    ranks = environment.get("world_size", 1)
    where = f"{ranks} rank{'s' if ranks != 1 else ''} on {environment.get('device', 'an unknown device')}"
    status, warn = _status(run)
    facts = " · ".join(part for part in parts if part)
    return header(run.path.resolve().name, facts, where, status, warn=warn)


def _status(run: Run) -> tuple[str, bool]:
    step = run.metrics[-1]["step"] if run.metrics else 0
    planned = run.setting("max_steps")
    if planned is not None:
        return (f"all {step} steps done", False) if step >= planned else (f"step {step} of {planned}", True)
    target = run.setting("max_samples") or run.setting("schedule.decay_samples")
    consumed = run.metrics[-1].get("consumed_samples", 0) if run.metrics else 0
    if target and consumed < target:
        return f"step {step}, {100 * consumed / target:.0f} % of the samples", True
    return f"all {step} steps done", False


def _tiles(run: Run) -> str:
    held_out = next((record for record in reversed(run.validation) if record.get("loss") is not None), {})
    last: Record = run.metrics[-1] if run.metrics else {}
    tiles: list[tuple[str, str, str]] = []
    if held_out:
        loss, unigram = held_out["loss"], held_out.get("unigram_loss")
        tiles.append(("Held-out loss", number(loss, ".3f"), f"nats a target, step {held_out.get('step')}"))
        if unigram is not None:
            side = "Under" if loss <= unigram else "Over"
            tiles.append((f"{side} the unigram baseline", f"{abs(unigram - loss):.3f}", f"nat; unigram {unigram:.3f}"))
        tiles.append(("Held-out perplexity", short(held_out.get("perplexity") or math.exp(min(loss, 700))), "a target"))
    elif last:
        tiles.append(("Training loss", number(last.get("loss"), ".3f"), "nats a target, last step"))
    rate = _median([record["tokens_per_second"] for record in run.metrics if record.get("tokens_per_second")])
    if rate is not None:
        tiles.append(("Throughput", short(rate), "tokens a second, median"))
    mfu = _median([record["mfu"] for record in run.metrics if record.get("mfu") is not None])
    if mfu is not None:
        tiles.append(("MFU", f"{100 * mfu:.1f} %", "of the device's peak, median"))
    if held_out.get("bits_per_byte") is not None:
        tiles.append(("Bits per byte", f"{held_out['bits_per_byte']:.3f}", "held-out"))
    if last:
        tiles.append(("Steps", f"{last['step']:,}", f"{last.get('consumed_samples', 0):,} samples"))
        if last.get("consumed_tokens"):
            tiles.append(("Tokens", short(last["consumed_tokens"]), f"{short(last.get('target_tokens') or 0)} targets"))
        seconds = sum(record.get("step_seconds") or 0.0 for record in run.metrics)
        attempts = run.environment.get("attempt", 1)
        again = f"in steps, {attempts} attempts" if attempts > 1 else "in steps, one attempt"
        tiles.append(("Training time", duration(seconds), again))
    return tile_row(tiles)


def _loss_charts(run: Run) -> list[str]:
    raw = _points(run.metrics, "loss")
    held_out = _points(run.validation, "loss")
    span = [point[0] for point in raw or held_out]
    series = [Series("training, each step", _thin(raw), 1, "faint", legend=False), Series("training", smoothed(raw), 1)]
    series.append(Series("held-out", held_out, 2, "dots"))
    unigram = next(
        (record["unigram_loss"] for record in run.validation if record.get("unigram_loss") is not None), None
    )
    if unigram is not None and span:
        series.append(Series("unigram baseline", [(min(span), unigram), (max(span), unigram)], 0, "dashed"))
    charts = [line_chart("All targets", series)]
    for title, part, key, names in (
        ("By kind of blank", 0, "by_kind", KIND_NAMES),
        ("By language", 1, "by_language", LANGUAGE_NAMES),
    ):
        charts.append(line_chart(title, _split_series(run, part, key, names, span)))
    return charts


def _split_series(run: Run, part: int, key: str, names: Mapping[str, str], span: Sequence[float]) -> list[Series]:
    """Training, held-out and baseline lines of each kind or language. part: its place in a group's name."""
    seen = {group.split("/")[part] for record in run.metrics for group in record.get("loss_by_group") or {}}
    seen |= {name for record in run.validation for name in record.get(key) or {}}
    series = []
    for color, name in enumerate([name for name in names if name in seen], start=1):
        points = [
            (record["step"], loss)
            for record in run.metrics
            if (loss := mean_over_groups(record, part, name)) is not None
        ]
        label = names[name]
        series.append(Series(label, smoothed(points, window=0.08, bins=100), color))
        parts = [(record["step"], _entry(record, key, name)) for record in run.validation]
        held_out: list[Point] = [(step, entry.get("loss")) for step, entry in parts]
        series.append(Series(f"{label}, held-out", held_out, color, "dots", legend=False))
        unigram = next((entry["unigram_loss"] for _, entry in parts if entry.get("unigram_loss") is not None), None)
        if unigram is not None and span:
            line: list[Point] = [(min(span), unigram), (max(span), unigram)]
            series.append(Series(f"{label}, unigram", line, color, "dashed", legend=False))
    return series


def mean_over_groups(record: Record, part: int, name: str) -> float | None:
    """One step's nats a target of a kind or a language; None where it had none.

    part: the place of the kind (0) or the language (1) in a group's name, `gmask/zh`.
    """
    losses, counts = record.get("loss_by_group") or {}, record.get("targets_by_group") or {}
    mine = [group for group, loss in losses.items() if group.split("/")[part] == name and loss is not None]
    total = sum(counts.get(group, 0) for group in mine)
    return sum(counts[group] * losses[group] for group in mine if group in counts) / total if total else None


def _entry(record: Record, key: str, name: str) -> Record:
    entry = (record.get(key) or {}).get(name)
    return entry if isinstance(entry, dict) else {"loss": entry}


def _task_charts(run: Run) -> list[str]:
    """Accuracy by step of each task, a line for each way to score it."""
    charts = []
    for name in sorted({name for record in run.tasks for name in record["tasks"]}):
        found = [(record["step"], record["tasks"][name]) for record in run.tasks if name in record["tasks"]]
        ways = sorted({way for _, task in found for way in task["by_way"]})
        series = []
        for color, way in enumerate(ways, start=1):
            points: list[Point] = [(step, task["by_way"].get(way, {}).get("accuracy")) for step, task in found]
            series.append(Series(KIND_NAMES.get(way, way), points, color, "dots"))
        if "chance" in found[-1][1]:
            series.append(Series("chance", [(step, task["chance"]) for step, task in found], 0, "dashed"))
        charts.append(line_chart(name, series, note=f"{found[-1][1]['items']:,} items"))
    return charts


def _running_charts(run: Run) -> list[str]:
    def raw_and_smooth(key: str, color: int) -> list[Series]:
        points = _points(run.metrics, key)
        each = Series("each step", _thin(points), color, "faint", legend=False)
        return [each, Series("mean of neighbours", smoothed(points), color, legend=False)]

    charts = [
        line_chart("Gradient norm", raw_and_smooth("grad_norm", 4), unit="before the clip", log=True),
        line_chart("Learning rate", [Series("lr", _thin(_points(run.metrics, "lr")), 3, legend=False)]),
        line_chart("Throughput", raw_and_smooth("tokens_per_second", 1), unit="tokens a second"),
        line_chart("Time a step", raw_and_smooth("step_seconds", 2), unit="seconds", log=True),
    ]
    if run.setting("precision.dtype") == "fp16":
        scale = Series("loss scale", _thin(_points(run.metrics, "loss_scale")), 2, legend=False)
        charts.append(line_chart("Loss scale", [scale], log=True))
    if timed := [record for record in run.metrics if "bubble" in record]:
        least = Series("1F1B at best", _thin(_points(timed, "bubble_least")), 0, "dashed")
        waits = Series("measured", _thin(_points(timed, "bubble")), 4)
        charts.append(line_chart("Pipeline bubble", [waits, least], unit="share of a step that the mean stage waits"))
    if any(record.get("z_loss") for record in run.metrics):
        charts.append(line_chart("z-loss", raw_and_smooth("z_loss", 5)))
    return charts


def _memory_table(memory: Record) -> str:
    """Bytes by kind on the fullest rank: measured, where the device could be, and by the config's arithmetic."""
    names = {"measured": "measured", "predicted": "by the config"}
    columns = {title: memory[key] for key, title in names.items() if memory.get(key)}
    kinds = list(dict.fromkeys(kind for column in columns.values() for kind in column))
    rows = [(kind, *(size(column[kind]) if kind in column else "–" for column in columns.values())) for kind in kinds]
    rows += [("all", *(size(sum(column.values())) for column in columns.values()))] if rows else []
    return table_card(("", *columns), rows, title="Memory of the fullest rank")


def _fills(fills: Sequence[Record]) -> str:
    return f'<div class="fills">{"".join(map(_fill, fills))}</div>' if fills else ""


def _fill(fill: Record) -> str:
    blank = escape(str(fill.get("blank", "[MASK]")))
    text = f"{escape(str(fill.get('before', '')))}<mark>{blank}</mark>{escape(str(fill.get('after', '')))}"
    truth, filled = str(fill.get("truth", "")), str(fill.get("filled", ""))
    right = filled.strip() == truth.strip() and bool(truth.strip())
    rows = [
        ("truth", truth, "its chance", ""),
        ("model", filled, _probability(fill.get("log_probability")), "right" if right else ""),
        ("unigram", str(fill.get("unigram", "")), _probability(fill.get("unigram_log_probability")), ""),
    ]
    cells = "".join(
        f'<div><dt>{name}</dt><dd class="{style if words.strip() else "nothing"}">'
        f"{escape(words.strip()) or 'nothing'}{' ✓' if style == 'right' else ''}</dd><dd>{chance}</dd></div>"
        for name, words, chance, style in rows
    )
    language = escape(str(fill.get("language", "")))
    quote = f'<blockquote lang="{language}">{text}</blockquote>'
    return f'<article class="fill">{quote}<dl class="answers">{cells}</dl></article>'


def _probability(nats: Any) -> str:
    """`12 %`, `0.03 %`, `1 in 33,000`."""
    if not isinstance(nats, (int, float)):
        return ""
    chance = math.exp(min(nats, 0.0))
    if chance >= 0.001:
        return f"{100 * chance:.2g} %" if chance < 0.0995 else f"{100 * chance:.0f} %"
    return f"1 in {short(math.exp(min(-nats, 60.0)))}"


def _held_out_table(run: Run) -> str:
    record = run.evaluation or next((record for record in reversed(run.validation) if record.get("loss")), {})
    if not record:
        return ""
    rows: list[tuple[str, Record]] = [("all", record)]
    for key, names in (("by_language", LANGUAGE_NAMES), ("by_kind", KIND_NAMES)):
        rows += [(names.get(name, name), _entry(record, key, name)) for name in record.get(key) or {}]
    body = []
    for name, entry in rows:
        loss, unigram = entry.get("loss"), entry.get("unigram_loss")
        gap = loss - unigram if isinstance(loss, (int, float)) and isinstance(unigram, (int, float)) else None
        numbers = [number(loss, ".3f"), number(unigram, ".3f"), number(gap, "+.3f")]
        numbers += [number(entry.get("bits_per_byte"), ".3f"), number(entry.get("targets"), ",")]
        body.append((name, *numbers))
    heads = ("", "loss", "unigram", "− unigram", "bits/byte", "targets")
    title = "Held out, eval.json" if run.evaluation else f"Held out, step {record.get('step')}"
    return table_card(heads, body, title=title)


def _events(events: Sequence[Record]) -> str:
    rows = [
        (str(event.get("step", "")), *(str(event.get(key) or "") for key in ("kind", "seen", "action")))
        for event in events
    ]
    return table_card(("step", "kind", "seen", "action"), rows, numbers=False)


def _environment(run: Run) -> str:
    environment = run.environment
    if not environment:
        return ""
    skipped = ("command", "earlier", "packages", "attempt")
    rows = [(key.replace("_", " "), str(value)) for key, value in environment.items() if key not in skipped and value]
    packages = environment.get("packages") or {}
    rows.append(("packages", ", ".join(f"{name} {version}" for name, version in packages.items())))
    body = "".join(f'<tr><td class="name">{escape(key)}</td><td>{escape(value)}</td></tr>' for key, value in rows)
    return f'<div class="card scroll"><table>{body}</table></div>'


def _commands(run: Run) -> str:
    attempts = [*(run.environment.get("earlier") or []), run.environment]
    cards = []
    for attempt in attempts:
        if not attempt.get("command"):
            continue
        verb = "started" if attempt.get("attempt", 1) == 1 else "resumed"
        title = f"attempt {attempt.get('attempt', 1)}, {verb} {attempt.get('time', '')}"
        cards.append(
            f'<div class="card"><p class="unit">{escape(title)}</p><pre>{escape(attempt["command"])}</pre></div>'
        )
    return "".join(cards)


def _config(run: Run) -> str:
    if not run.config_text:
        return ""
    return f'<details class="card"><summary>Every resolved key</summary><pre>{escape(run.config_text)}</pre></details>'


def _points(records: Sequence[Record], key: str) -> list[Point]:
    return [(record["step"], record.get(key)) for record in records]


def _thin(points: list[Point], limit: int = 700) -> list[Point]:
    """Every k-th point, gaps kept: a page of megabytes helps nobody."""
    return points[:: max(1, math.ceil(len(points) / limit))]


def _median(values: list[float]) -> float | None:
    """The middle, so that the first step's compilation does not count."""
    return sorted(values)[len(values) // 2] if values else None


def _attempt(file: Path) -> int:
    number = file.stem.removeprefix("config.attempt-")
    return int(number) if number.isdecimal() else 0


def main(config: ReportConfig) -> int:
    """Write the report and say where it is."""
    print(write_report(config.run_dir))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run("report", ReportConfig, main, program="train.report"))
