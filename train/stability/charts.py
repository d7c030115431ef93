"""The report's charts of a run's telemetry: gradients, updates, activations and logits by group."""

from collections.abc import Sequence
from typing import Any

from train.charts import Point, Series, line_chart

Record = dict[str, Any]


def telemetry_charts(metrics: Sequence[Record]) -> list[str]:
    """Figures of what `train.stability` measured; empty where it was off."""
    share = [(record["step"], _share(record)) for record in metrics]
    charts = [
        line_chart(
            "Embedding's share of the gradient norm",
            [Series("embedding", share[:: max(1, len(share) // 700)], 1, legend=False)],
            note="2-norm of the embedding's gradient over that of all gradients, before the clip",
        )
    ]
    measured = [record for record in metrics if record.get("telemetry")]
    if not measured:
        return [chart for chart in charts if chart]
    groups = chosen(list(measured[-1]["telemetry"]["gradient"]))
    charts.append(_by_group("Gradient norm by group", measured, groups, "gradient"))
    update = [
        Series(name, [(one["step"], _ratio(one["telemetry"], name)) for one in measured], color)
        for color, name in enumerate(groups, start=1)
    ]
    charts.append(
        line_chart("Update to weight", update, note="2-norm of Adam's step over that of the weights", log=True)
    )
    places = chosen(list(measured[-1]["telemetry"]["activation"]))
    charts.append(_by_group("Activations", measured, places, "activation", unit="root mean square"))
    if "max_logit" in measured[-1]["telemetry"]:
        layers = chosen(list(measured[-1]["telemetry"]["max_logit"]))
        charts.append(_by_group("Largest attention logit", measured, layers, "max_logit"))
    if any("fp16" in record["telemetry"] for record in measured):
        names = ("overflow", "underflow")
        charts.append(_by_group("fp16 gradients", measured, names, "fp16", unit="share of elements"))
    return [chart for chart in charts if chart]


def chosen(names: list[str], count: int = 5) -> list[str]:
    """At most `count` of the names: the ends, and an even choice of what is between."""
    if len(names) <= count:
        return names
    return [names[round(place * (len(names) - 1) / (count - 1))] for place in range(count)]


def _by_group(title: str, measured: Sequence[Record], names: Sequence[str], kind: str, unit: str = "") -> str:
    series = []
    for color, name in enumerate(names, start=1):
        points: list[Point] = [(one["step"], (one["telemetry"].get(kind) or {}).get(name)) for one in measured]
        series.append(Series(name, points, color))
    return line_chart(title, series, unit=unit, log=kind != "fp16")


def _share(record: Record) -> float | None:
    embedding, whole = record.get("embedding_grad_norm"), record.get("grad_norm")
    return embedding / whole if embedding is not None and whole else None


def _ratio(telemetry: Record, name: str) -> float | None:
    update, weight = telemetry["update"].get(name), telemetry["weight"].get(name)
    return update / weight if update is not None and weight else None
