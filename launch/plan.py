"""python -m launch.plan: memory, time and cost of a training run before it starts, and the layouts that suit it.

    python -m launch.plan model=glm_130b cluster=a100_96x8 tokens=300e9 output=plan.json

takes every key of `python -m train`, `tokens`, `output`, and the assumptions under `planner.*` (docs/planning.md).
Writes the plan as JSON and, beside it, a page with plots; prints the table.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data_prep import cli
from data_prep.errors import ConfigError
from data_prep.files import write_bytes, write_json
from launch.hardware import TABLE, changed, find
from launch.plan_config import PlanConfig
from launch.plan_cost import CostModel, Shares
from launch.plan_data import mixture_shares
from launch.plan_failures import Failures, daly_interval, goodput, young_interval
from launch.plan_search import (
    Candidate,
    Cluster,
    Search,
    evaluate,
    follows_slides,
    nothing_fits,
    search,
)
from train.arithmetic import flops_per_token, hardware_flops_per_token, parameters
from train.cli import ALIASES
from train.config import CHOICES, ParallelConfig
from train.memory import layer_saved_bytes
from train.rules import check_shape, check_world

DAY = 86400.0
PETAFLOP_DAY = 1e15 * DAY
CHECKPOINT_BYTES = 14
"""A parameter in a checkpoint: the half-precision weight, fp32 master and both moments."""


@dataclass(frozen=True)
class Budget:
    """What a whole run takes. Utilisations are shares of the peak, 0 to 1; None where a figure is not known."""

    step_seconds: float
    tokens_per_second: float
    mfu: float
    hfu: float
    mfu_attended: float
    days: float
    """Without failures."""
    petaflop_days: float
    """Useful FLOPs (6 N + 12 L h S a token), in units of 8.64e19."""
    device_hours: float
    dollars: float | None
    megawatt_hours: float | None


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return cli.run("plan", PlanConfig, run, program="launch.plan", aliases=ALIASES, argv=argv)


def run(config: PlanConfig) -> int:
    """Plan, write the files, print the summary."""
    # The page's drawings are not needed by who imports the planner.
    from launch.plan_page import page
    from launch.plan_text import summary

    plan = make_plan(config)
    target = Path(config.output)
    if target.suffix != ".json":
        raise ConfigError(f"output={config.output} must end in .json; the page stands beside it as .html")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_json(target, plan)
    write_bytes(target.with_suffix(".html"), page(plan).encode())
    print(summary(plan))
    print(f"wrote {target} and {target.with_suffix('.html')}")
    return 0


def make_plan(config: PlanConfig) -> dict[str, Any]:
    """The whole plan as plain data. Raises ConfigError where a figure is missing or nothing fits."""
    check_plan(config)
    cluster = cluster_of(config)
    shares = shares_of(config)
    plan: dict[str, Any] = {
        "model": {"name": config.model.name, "parameters": parameters(config.model).total},
        "cluster": {
            "nodes": cluster.nodes,
            "gpus_per_node": cluster.gpus_per_node,
            "world": cluster.world,
            **asdict(cluster.hardware),
            "peak_tflops": cluster.hardware.peak(config.precision.dtype) / 1e12,
        },
        "run": {
            "tokens": tokens_of(config),
            "sequence_length": config.sequence_length,
            "global_batch_size": config.global_batch_size,
            "dtype": config.precision.dtype,
            "steps": tokens_of(config) / (config.global_batch_size * config.sequence_length),
        },
        "shares": asdict(shares),
    }
    if config.planner.utilization is not None:
        return plan | _from_utilization(config, cluster, shares)
    cluster.hardware.needs("memory_gib", "memory_gb_per_second", "link_gb_per_second", "network_gb_per_second")
    if config.planner.search:
        found = search(config, cluster, shares)
        if not found.best:
            raise nothing_fits(found, cluster)
        chosen = found.best[0]
        plan["search"] = _search_record(found, config, cluster)
    else:
        check_world(config, cluster.world)
        chosen = evaluate(config, cluster, shares)
        if not chosen.fits:
            raise nothing_fits(Search([], [], 1, chosen), cluster)
    plan |= {"chosen": _record(chosen, config, cluster), "step": asdict(chosen.step)}  # type: ignore[arg-type]
    plan["volumes"] = asdict(_cost(chosen, cluster, shares).volumes())
    modes = CHOICES["parallel.activation_checkpointing"]
    plan["activations_a_layer"] = {mode: layer_saved_bytes(chosen.config, mode) for mode in modes}
    plan["failures"] = failures_record(config, cluster)
    plan["what_if"] = what_ifs(config, chosen, cluster, shares)
    return plan


def budget(
    config: PlanConfig, cluster: Cluster, shares: Shares, step_seconds: float, parallel: ParallelConfig
) -> Budget:
    """Days, cost and utilisation of a run whose step takes so long."""
    model, slots = config.model, config.sequence_length
    rate = config.global_batch_size * slots / step_seconds
    peak = cluster.hardware.peak(config.precision.dtype) * cluster.world
    useful = flops_per_token(model, slots)
    days = tokens_of(config) / rate / DAY
    hours = days * 24 * cluster.world
    hardware, planner = cluster.hardware, config.planner
    watts = None
    if hardware.node_watts is not None:
        watts = hardware.node_watts / hardware.gpus_per_node * planner.power_usage_effectiveness
    return Budget(
        step_seconds=step_seconds,
        tokens_per_second=rate,
        mfu=useful * rate / peak,
        hfu=hardware_flops_per_token(model, slots, parallel) * rate / peak,
        mfu_attended=flops_per_token(model, slots * shares.attended) * rate / peak,
        days=days,
        petaflop_days=useful * tokens_of(config) / PETAFLOP_DAY,
        device_hours=hours,
        dollars=None if hardware.dollars_per_hour is None else hours * hardware.dollars_per_hour,
        megawatt_hours=None if watts is None else hours * watts / 1e6,
    )


def failures_of(config: PlanConfig, nodes: int) -> Failures:
    """How a job on so many nodes loses time."""
    planner = config.planner
    size = parameters(config.model).total * CHECKPOINT_BYTES
    return Failures(
        mtbf=planner.node_mtbf_days * DAY / nodes,
        checkpoint=size / (planner.storage_gb_per_second * 1e9),
        restart=planner.detection_seconds + planner.restart_seconds,
    )


def failures_record(config: PlanConfig, cluster: Cluster) -> dict[str, float]:
    """Failures, the best interval between checkpoints and the goodput it gives."""
    failures = failures_of(config, cluster.nodes)
    interval = daly_interval(failures)
    return {
        "job_mtbf_hours": failures.mtbf / 3600,
        "checkpoint_seconds": failures.checkpoint,
        "restart_seconds": failures.restart,
        "young_interval_seconds": young_interval(failures),
        "daly_interval_seconds": interval,
        "goodput": goodput(failures, interval),
    }


def what_ifs(config: PlanConfig, chosen: Candidate, cluster: Cluster, shares: Shares) -> list[dict[str, Any]]:
    """The chosen layout with other links and failure rates, and the best layout on other accelerators."""
    rows: list[dict[str, Any]] = []

    def row(what: str, other: Cluster, candidate: Candidate, failing: PlanConfig = config) -> None:
        spent = budget(config, other, shares, candidate.seconds, candidate.config.parallel)
        good = failures_record(failing, other)
        days = spent.days / good["goodput"]
        layout = candidate.describe()
        rows.append({"what": what, "layout": layout, **asdict(spent), **good, "days_with_failures": days})

    row("as planned", cluster, chosen)
    for field, words in (("network_gb_per_second", "network"), ("link_gb_per_second", "links in the node")):
        for factor in (0.5, 2.0):
            hardware = changed(cluster.hardware, **{field: getattr(cluster.hardware, field) * factor})
            other = replace(cluster, hardware=hardware)
            row(f"{words} x {factor:g}", other, evaluate(chosen.config, other, shares))
    for name, hardware in TABLE.items():
        if name == cluster.hardware.name or hardware.memory_gib is None:
            continue
        other = replace(cluster, hardware=hardware)
        found = search(config, other, shares) if config.planner.search else None
        best = found.best if found is not None else [evaluate(chosen.config, other, shares)]
        if best and best[0].fits:
            row(f"on {name}", other, best[0])
    for factor in (0.25, 4.0):
        planner = replace(config.planner, node_mtbf_days=config.planner.node_mtbf_days * factor)
        row(f"a node fails each {planner.node_mtbf_days:g} days", cluster, chosen, replace(config, planner=planner))
    return rows


def cluster_of(config: PlanConfig) -> Cluster:
    """The machines, with the figures that the command line replaces."""
    planner, nodes = config.planner, config.cluster.nodes
    hardware = changed(
        find(config.cluster.hardware),
        memory_gib=planner.memory_gib,
        memory_gb_per_second=planner.memory_gb_per_second,
        link_gb_per_second=planner.link_gb_per_second,
        network_gb_per_second=planner.network_gb_per_second,
        node_watts=planner.node_watts,
        dollars_per_hour=planner.dollars_per_hour,
        implied_tflops=planner.peak_tflops,
    )
    return Cluster(hardware, nodes, config.cluster.gpus_per_node or hardware.gpus_per_node)


def shares_of(config: PlanConfig) -> Shares:
    """Attended pairs and targets: given, or of the data mixture."""
    shares = mixture_shares(config.data.sampling)
    planner = config.planner
    return Shares(
        attended=shares.attended if planner.attended_share is None else planner.attended_share,
        targets=shares.targets if planner.target_share is None else planner.target_share,
    )


def tokens_of(config: PlanConfig) -> float:
    """Tokens (slots) of the run."""
    return config.tokens or float((config.max_samples or config.schedule.decay_samples) * config.sequence_length)


def check_plan(config: PlanConfig) -> None:
    """Raise ConfigError for a shape that the trainer refuses, or an assumption that makes no sense."""
    check_shape(config)
    planner = config.planner
    positive = {f"planner.{name}": value for name, value in vars(planner).items() if not isinstance(value, bool)}
    for key, value in {"tokens": config.tokens, "cluster.nodes": config.cluster.nodes, **positive}.items():
        if value is not None and not value > 0:
            raise ConfigError(f"{key}={value:g} must be more than 0")
    for name in ("utilization", "attended_share", "target_share"):
        share = getattr(planner, name)
        if share is not None and share > 1:
            raise ConfigError(f"planner.{name}={share:g} is a share; use a number between 0 and 1")


def _from_utilization(config: PlanConfig, cluster: Cluster, shares: Shares) -> dict[str, Any]:
    """Days from a measured HFU; recomputation as `parallel.activation_checkpointing` says."""
    parallel = config.parallel
    assert config.planner.utilization is not None
    peak = cluster.hardware.peak(config.precision.dtype) * cluster.world
    done = hardware_flops_per_token(config.model, config.sequence_length, parallel)
    rate = config.planner.utilization * peak / done
    seconds = config.global_batch_size * config.sequence_length / rate
    candidate = evaluate(config, cluster, shares, timed=False)
    micro_batches = config.global_batch_size / (config.micro_batch_size * candidate.data_parallel)
    stages = parallel.pipeline_parallel
    chosen = _layout_record(candidate) | asdict(budget(config, cluster, shares, seconds, parallel))
    chosen |= {"micro_batches": micro_batches, "bubble": (stages - 1) / (micro_batches + stages - 1)}
    if cluster.hardware.memory_gib is not None:
        chosen["fits"] = candidate.fits
    return {"chosen": chosen, "failures": failures_record(config, cluster)}


def _record(candidate: Candidate, config: PlanConfig, cluster: Cluster) -> dict[str, Any]:
    shares = shares_of(config)
    assert candidate.step is not None
    spent = budget(config, cluster, shares, candidate.seconds, candidate.config.parallel)
    micro_batches = _cost(candidate, cluster, shares).micro_batches
    return {
        **_layout_record(candidate),
        **asdict(spent),
        "micro_batches": micro_batches,
        "bubble": candidate.step.bubble / candidate.seconds,
        "fits": candidate.fits,
        "follows_slides": follows_slides(candidate, cluster),
    }


def _layout_record(candidate: Candidate) -> dict[str, Any]:
    parallel = candidate.config.parallel
    return {
        "layout": candidate.describe(),
        "tensor_parallel": parallel.tensor_parallel,
        "pipeline_parallel": parallel.pipeline_parallel,
        "data_parallel": candidate.data_parallel,
        "zero_stage": parallel.zero_stage,
        "sequence_parallel": parallel.sequence_parallel,
        "activation_checkpointing": parallel.activation_checkpointing,
        "activation_checkpointing_every_layers": parallel.activation_checkpointing_every_layers,
        "offload_optimizer": parallel.offload_optimizer,
        "micro_batch_size": candidate.config.micro_batch_size,
        "memory_gib": candidate.memory.total / 2**30,
        "memory": candidate.memory.kinds(),
        "fullest_stage": candidate.memory.stage,
    }


def _search_record(found: Search, config: PlanConfig, cluster: Cluster) -> dict[str, Any]:
    by_slides = next((one for one in found.best if follows_slides(one, cluster)), None)
    return {
        "tried": found.tried,
        "fitting": len(found.best),
        "best": [_record(candidate, config, cluster) for candidate in found.best[:10]],
        "best_by_slides": None if by_slides is None else _record(by_slides, config, cluster),
        "lost": _lost_record(found),
    }


def _lost_record(found: Search) -> list[dict[str, Any]]:
    """One entry for neighbours in pipeline size that lose for the same reason."""
    rows: list[dict[str, Any]] = []
    for (tensor, pipeline), why in found.lost:
        if rows and rows[-1]["tensor_parallel"] == tensor and rows[-1]["why"] == why:
            rows[-1]["pipeline_parallel"].append(pipeline)
        else:
            rows.append({"tensor_parallel": tensor, "pipeline_parallel": [pipeline], "why": why})
    return rows


def _cost(candidate: Candidate, cluster: Cluster, shares: Shares) -> CostModel:
    return CostModel(candidate.config, cluster.hardware, cluster.gpus_per_node, candidate.data_parallel, shares)


if __name__ == "__main__":
    sys.exit(main())
