"""A plan as a page with plots, in the style of run reports."""

from collections.abc import Sequence
from typing import Any

from launch.plan_failures import Failures, goodput
from launch.plan_text import sizes
from train.charts import Series, bar_chart, line_chart
from train.observers import duration, short
from train.page import chart_grid, header, section, table_card, tile_row, whole_page

Record = dict[str, Any]
INTERVAL_FACTORS = tuple(2.0 ** (power / 4) for power in range(-12, 13))


def page(plan: Record) -> str:
    """The whole page."""
    chosen, cluster, run = plan["chosen"], plan["cluster"], plan["run"]
    machines = f"{cluster['nodes']} × {cluster['gpus_per_node']} {cluster['name']}, {cluster['peak_tflops']:g} TFLOP/s"
    facts = (
        f"{short(plan['model']['parameters'])} parameters · {short(run['tokens'])} tokens · sequence "
        f"{run['sequence_length']} · batch {run['global_batch_size']} · {run['dtype']}"
    )
    title = f"A plan for {plan['model']['name']}"
    sections = [
        header(title, facts, machines, chosen["layout"]),
        _tiles(chosen, plan["failures"]),
        section("Memory and time", chart_grid(_resource_charts(plan)), "The fullest rank, and a step of its stage."),
        section("Failures", chart_grid(_failure_charts(plan)), _failure_hint(plan["failures"])),
    ]
    if "search" in plan:
        sections.append(section("Best layouts", _best(plan["search"]), "All keep the trainer's own rules."))
        sections.append(section("Why others lose", _lost(plan["search"]["lost"])))
    if "what_if" in plan:
        sections.append(section("What if", _what_ifs(plan["what_if"])))
    return whole_page(title, sections, "Written by Tiankong 填空's planner: figures are predictions, not measurements.")


def _tiles(chosen: Record, failures: Record) -> str:
    tiles = [
        ("Days", f"{chosen['days']:.1f}", f"{chosen['days'] / failures['goodput']:.1f} with failures"),
        ("Step", f"{chosen['step_seconds']:.2f} s", f"bubble {100 * chosen['bubble']:.1f} %"),
        ("MFU", f"{100 * chosen['mfu']:.1f} %", f"HFU {100 * chosen['hfu']:.1f} %"),
        ("Memory", f"{chosen['memory_gib']:.1f} GiB", f"stage {chosen['fullest_stage']}"),
        ("Throughput", short(chosen["tokens_per_second"]), "tokens a second"),
        ("Compute", f"{chosen['petaflop_days']:,.0f}", "PF-days"),
    ]
    if chosen["dollars"] is not None:
        tiles.append(("Cost", short(chosen["dollars"]), "dollars"))
    if chosen["megawatt_hours"] is not None:
        tiles.append(("Energy", f"{chosen['megawatt_hours']:,.0f}", "MWh, building included"))
    return tile_row(tiles)


def _resource_charts(plan: Record) -> list[str]:
    memory = [(name, value / 2**30) for name, value in plan["chosen"]["memory"].items()]
    charts = [bar_chart("Memory by kind", memory, unit="GiB")]
    if "step" in plan:
        charts.append(bar_chart("Time of a step", list(plan["step"].items()), unit="seconds"))
        sent = [(name, value / 1e9) for name, value in plan["volumes"].items()]
        charts.append(bar_chart("Sent by a rank in a step", sent, unit="GB"))
        fitting = (
            [(_short_layout(one), one["step_seconds"]) for one in plan["search"]["best"]] if "search" in plan else []
        )
        charts.append(bar_chart("Step of the best layouts", fitting, unit="seconds"))
    return charts


def _failure_charts(plan: Record) -> list[str]:
    record = plan["failures"]
    failures = _failures(record)
    best = record["daly_interval_seconds"]
    by_interval = [(best * factor / 60, 100 * goodput(failures, best * factor)) for factor in INTERVAL_FACTORS]
    return [
        line_chart(
            "Goodput by interval between saves",
            [
                Series("goodput", by_interval, 1),
                Series("best interval", [(best / 60, 100 * record["goodput"])], 2, "dots"),
            ],
            unit="%",
            note="x: minutes of work between two saves",
            x_name="minutes",
        )
    ]


def _failures(record: Record) -> Failures:
    return Failures(
        mtbf=record["job_mtbf_hours"] * 3600, checkpoint=record["checkpoint_seconds"], restart=record["restart_seconds"]
    )


def _failure_hint(record: Record) -> str:
    return (
        f"A node of the job fails each {record['job_mtbf_hours']:.1f} hours; a save takes "
        f"{record['checkpoint_seconds']:.0f} s, a restart {record['restart_seconds']:.0f} s. Best interval "
        f"{duration(record['daly_interval_seconds'])} (Young: {duration(record['young_interval_seconds'])})."
    )


def _best(found: Record) -> str:
    rows = [
        (
            one["layout"],
            f"{one['step_seconds']:.2f}",
            f"{one['memory_gib']:.1f}",
            f"{100 * one['bubble']:.1f}",
            f"{100 * one['mfu']:.1f}",
            f"{one['days']:.1f}",
        )
        for one in found["best"]
    ]
    title = f"{found['fitting']} of {found['tried']} layouts fit"
    return table_card(("layout", "step s", "GiB", "bubble %", "MFU %", "days"), rows, title=title)


def _lost(lost: Sequence[Record]) -> str:
    rows = [(f"{one['tensor_parallel']} × {sizes(one)}", one["why"]) for one in lost]
    return table_card(("TP × PP", "why its best variant is not chosen"), rows, numbers=False)


def _what_ifs(rows: Sequence[Record]) -> str:
    cells = [
        (
            row["what"],
            f"{row['step_seconds']:.2f}",
            f"{100 * row['mfu']:.1f}",
            f"{100 * row['goodput']:.1f}",
            f"{row['days_with_failures']:.1f}",
            row["layout"],
        )
        for row in rows
    ]
    return table_card(("what", "step s", "MFU %", "goodput %", "days", "layout"), cells)


def _short_layout(one: Record) -> str:
    recompute = {"none": "", "full": " R"}.get(one["activation_checkpointing"], f" {one['activation_checkpointing']}")
    every = one["activation_checkpointing_every_layers"]
    recompute += (f"/{every}" if every > 1 else "") + (" host" if one["offload_optimizer"] else "")
    return (
        f"{one['tensor_parallel']}×{one['pipeline_parallel']}×{one['data_parallel']:g} Z{one['zero_stage']}{recompute} "
        f"b{one['micro_batch_size']}"
    )
