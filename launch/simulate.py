"""python -m launch.simulate: a step and a month of a planned run on more and more nodes.

    python -m launch.simulate model=glm_130b cluster=a100_96x8 precision=fp16 output=benchmarks/scale.csv

takes every key of `python -m launch.plan` and `simulation.*`. The layout (tensor, pipeline, ZeRO, recomputation,
micro-batch) is the best one of a search on the first size, or the config's own with `planner.search=false`; more nodes
add replicas. Two ways to use them: the same batch over more replicas, and a batch that grows with them. Writes a CSV
and, beside it, a page with plots.
"""

import csv
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data_prep import cli
from data_prep.errors import ConfigError
from data_prep.files import write_bytes
from launch.plan import check_plan, cluster_of, failures_of, shares_of
from launch.plan_config import PlanConfig
from launch.plan_cost import PASS_SECONDS, CostModel, Shares
from launch.plan_failures import daly_interval, goodput
from launch.plan_search import Cluster, evaluate, nothing_fits, search
from launch.simulate_month import DAY, Job, simulate_month
from launch.simulate_step import Noise, StageTimes, simulate_step
from train.arithmetic import flops_per_token
from train.charts import Series, line_chart
from train.cli import ALIASES
from train.config import Config
from train.page import chart_grid, header, section, table_card, whole_page
from train.rules import check_world

Row = dict[str, Any]
MONTHS = 5
"""Simulated months a row; the table holds their mean."""
MAX_REPLICAS = 256
"""Replicas that are simulated; the slowest of more is a little slower still."""


@dataclass
class SimulationConfig:
    """What the simulation assumes beyond the plan."""

    nodes: list[int] = field(default_factory=lambda: [96, 192, 384, 768, 1536, 3072, 6144, 9984])
    """Sizes of the cluster, in nodes."""
    operation_noise: float = 0.02
    """Standard deviation of the logarithm of a pass's time, from one pass to the next."""
    node_noise: float = 0.01
    """The same from one machine to another, all through the step."""
    spare_share: float = 0.02
    """Spare machines, as a share of the nodes."""
    repair_days: float = 2.0
    """From a failure until the machine is back among the spares."""
    seed: int = 0
    """Of noise and failures."""


@dataclass
class SimulatedPlan(PlanConfig):
    """A planned run and how it is simulated."""

    output: str = "simulation.csv"
    """The table; a page of the same name with .html stands beside it."""
    simulation: SimulationConfig = field(default_factory=SimulationConfig)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return cli.run("simulate", SimulatedPlan, run, program="launch.simulate", aliases=ALIASES, argv=argv)


def run(config: SimulatedPlan) -> int:
    """Simulate all sizes, write table and page."""
    target = Path(config.output)
    if target.suffix != ".csv":
        raise ConfigError(f"output={config.output} must end in .csv; the page stands beside it as .html")
    layout, rows = simulate(config)
    text = io.StringIO()
    text.write(f"# {config.model.name} on {config.cluster.hardware}: {layout}, first size; more nodes add replicas\n")
    text.write(f"# simulated: a node fails each {config.planner.node_mtbf_days:g} days; noise {config.simulation}\n")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows({key: _shown(value) for key, value in row.items()} for row in rows)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(target, text.getvalue().encode())
    write_bytes(target.with_suffix(".html"), page(config, layout, rows).encode())
    print(text.getvalue(), end="")
    print(f"wrote {target} and {target.with_suffix('.html')}")
    return 0


def simulate(config: SimulatedPlan) -> tuple[str, list[Row]]:
    """The layout in words, and one row for each size and way to use it. Raises ConfigError."""
    check_plan(config)
    sizes = config.simulation.nodes
    if not sizes or min(sizes) < 1:
        raise ConfigError(f"simulation.nodes={sizes} must be a list of positive numbers")
    cluster = replace(cluster_of(config), nodes=sizes[0])
    cluster.hardware.needs("memory_gib", "memory_gb_per_second", "link_gb_per_second", "network_gb_per_second")
    shares = shares_of(config)
    chosen = _layout(config, cluster, shares)
    shard = chosen.parallel.tensor_parallel * chosen.parallel.pipeline_parallel
    unit = chosen.global_batch_size * shard // cluster.world
    rows = []
    for nodes in sizes:
        grown = replace(cluster, nodes=nodes)
        if grown.world % shard:
            raise ConfigError(
                f"simulation.nodes={nodes} x {grown.gpus_per_node} ranks do not divide by tensor x pipeline = {shard}"
            )
        data = grown.world // shard
        samples = chosen.micro_batch_size * data
        same = -(-chosen.global_batch_size // samples) * samples
        for way, batch in (("same batch", same), ("batch grows", unit * data)):
            if nodes > sizes[0] or way == "same batch":
                rows.append(_row(config, replace(chosen, global_batch_size=batch), grown, shares, way))
    described = evaluate(chosen, cluster, shares, timed=False).describe()
    return described, rows


def _layout(config: SimulatedPlan, cluster: Cluster, shares: Shares) -> Config:
    if not config.planner.search:
        check_world(config, cluster.world)
        return config
    found = search(config, cluster, shares)
    if not found.best:
        raise nothing_fits(found, cluster)
    return found.best[0].config


def _row(config: SimulatedPlan, chosen: Config, cluster: Cluster, shares: Shares, way: str) -> Row:
    data = cluster.world // (chosen.parallel.tensor_parallel * chosen.parallel.pipeline_parallel)
    model = CostModel(chosen, cluster.hardware, cluster.gpus_per_node, data, shares)
    closed = model.step()
    stages = model.stages()
    send = stages[0].send / 2 - PASS_SECONDS if len(stages) > 1 else 0.0
    times = [StageTimes(stage.forward - send, stage.backward - send) for stage in stages]
    simulation = config.simulation
    noise = Noise(simulation.operation_noise, simulation.node_noise)
    count = round(model.micro_batches)
    pipeline = simulate_step(
        times, count, send_seconds=send, replicas=min(data, MAX_REPLICAS), noise=noise, seed=simulation.seed
    )
    step = pipeline.seconds + closed.reduce + closed.optimizer
    tokens = chosen.global_batch_size * chosen.sequence_length / step
    peak = cluster.hardware.peak(chosen.precision.dtype) * cluster.world
    good, formula, interval = _month(config, cluster, chosen)
    mfu = flops_per_token(chosen.model, chosen.sequence_length) * tokens / peak
    return {
        "nodes": cluster.nodes,
        "way": way,
        "data_parallel": data,
        "micro_batches": count,
        "global_batch_size": chosen.global_batch_size,
        "closed_form_step_s": closed.total,
        "simulated_step_s": step,
        "bubble": pipeline.bubble,
        "mfu": mfu,
        "job_mtbf_hours": config.planner.node_mtbf_days * 24 / cluster.nodes,
        "interval_minutes": interval / 60,
        "formula_goodput": formula,
        "simulated_goodput": good,
        "tokens_per_second": tokens * good,
        "mfu_with_failures": mfu * good,
    }


def _month(config: SimulatedPlan, cluster: Cluster, chosen: Config) -> tuple[float, float, float]:
    """Simulated goodput, the formula's, and the interval between saves in seconds."""
    failures = failures_of(config, cluster.nodes)
    interval = daly_interval(failures)
    shard = chosen.parallel.tensor_parallel * chosen.parallel.pipeline_parallel
    group = max(1, -(-shard // cluster.gpus_per_node))
    job = Job(
        nodes=cluster.nodes,
        failures=failures,
        interval=interval,
        spares=round(config.simulation.spare_share * cluster.nodes),
        repair=config.simulation.repair_days * DAY,
        minimum_nodes=group,
        granularity=group,
    )
    seed = config.simulation.seed
    ledgers = [simulate_month(job, seed=seed + month) for month in range(MONTHS)]
    good = sum(ledger.goodput(30 * DAY) for ledger in ledgers) / MONTHS
    return good, goodput(failures, interval), interval


def page(config: SimulatedPlan, layout: str, rows: Sequence[Row]) -> str:
    """The table with plots."""
    title = f"{config.model.name} on {rows[0]['nodes']} to {rows[-1]['nodes']} nodes"
    ways = ("same batch", "batch grows")

    def series(key: str, factor: float = 1.0) -> list[Series]:
        first = [row for row in rows if row["nodes"] == rows[0]["nodes"]]
        found = []
        for color, way in enumerate(ways, start=1):
            mine = [*first, *(row for row in rows if row["way"] == way and row not in first)]
            found.append(Series(way, [(row["nodes"], factor * row[key]) for row in mine], color, "dots"))
        return found

    first = {(row["nodes"]): row for row in rows}
    formula = Series("formula", [(nodes, 100 * row["formula_goodput"]) for nodes, row in first.items()], 0, "dashed")
    good = Series("simulated", [(nodes, 100 * row["simulated_goodput"]) for nodes, row in first.items()], 1, "dots")
    charts = [
        line_chart("Tokens a second, failures included", series("tokens_per_second"), log=True, **_NODES),
        line_chart("MFU, failures included", series("mfu_with_failures", 100), unit="%", **_NODES),
        line_chart("Goodput of a month", [formula, good], unit="%", **_NODES),
        line_chart("Bubble", series("bubble", 100), unit="%", **_NODES),
    ]
    heads = tuple(key.replace("_", " ") for key in rows[0])
    cells = [tuple(_shown(value) for value in row.values()) for row in rows]
    sections = [
        header(title, layout, str(config.cluster.hardware), "simulated"),
        section("Scale", chart_grid(charts), "Across: nodes, logarithmic."),
        section("Table", table_card(heads, cells)),
    ]
    return whole_page(title, sections, "Written by Tiankong 填空's simulation: figures are predictions.")


_NODES: dict[str, Any] = {"x_name": "nodes", "log_x": True}


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
