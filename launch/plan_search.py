"""Every layout of a model on a cluster: which ones the trainer takes, which fit, how long a step of each takes.

The trainer's own rules decide what may be tried (`train/rules.py`); the rest is memory (`train/memory.py`) and time
(`launch/plan_cost.py`).
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from data_prep.errors import ConfigError
from launch.hardware import Hardware
from launch.plan_cost import CostModel, Shares, StepSeconds
from train.config import CHOICES, Config
from train.memory import Memory, peak_memory, whole_micro_batches
from train.rules import check_shape, check_world, divisors

MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)
EVERY_LAYERS = (1, 2, 4)
"""Of which layers one is recomputed."""
FRAGMENTATION = 0.05
"""Share of what comes and goes in a step that the allocator cannot use again."""
RUNTIME_BYTES = 1.5 * 2**30
"""Device context, compiled kernels and communication buffers of one rank."""

Layout = tuple[int, int]
"""Tensor- and pipeline-parallel size."""


@dataclass(frozen=True)
class Cluster:
    """The machines of a plan."""

    hardware: Hardware
    nodes: int
    gpus_per_node: int

    @property
    def world(self) -> int:
        """All accelerators."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Candidate:
    """One layout with what it costs."""

    config: Config
    data_parallel: float
    memory: Memory
    step: StepSeconds | None
    """None where the memory alone was asked for, or does not do."""
    fits: bool

    @property
    def layout(self) -> Layout:
        """Tensor- and pipeline-parallel size."""
        return self.config.parallel.tensor_parallel, self.config.parallel.pipeline_parallel

    @property
    def seconds(self) -> float:
        """A step's."""
        assert self.step is not None
        return self.step.total

    def describe(self) -> str:
        """`TP 4 x PP 8 x DP 24, ZeRO 1, full recompute, micro-batch 1`."""
        parallel = self.config.parallel
        shares = ", sequence shares" if parallel.sequence_parallel else ""
        return (
            f"TP {parallel.tensor_parallel} x PP {parallel.pipeline_parallel} x DP {self.data_parallel:g}, "
            f"ZeRO {parallel.zero_stage}{shares}, {self.savings()}, micro-batch {self.config.micro_batch_size}"
        )

    def savings(self) -> str:
        """What it does to save memory: `full recompute (1 layer of 2), moments on the host`."""
        parallel = self.config.parallel
        every = parallel.activation_checkpointing_every_layers
        some = f" (1 layer of {every})" if every > 1 else ""
        host = ", moments on the host" if parallel.offload_optimizer else ""
        return f"{parallel.activation_checkpointing} recompute{some}{host}"


@dataclass(frozen=True)
class Search:
    """All that a search found."""

    best: list[Candidate]
    """Layouts that fit, fastest first."""
    lost: list[tuple[Layout, str]]
    """Each tensor- and pipeline-parallel size that is not the best one's, and why."""
    tried: int
    """Trials, without those that cannot be the fastest."""
    smallest: Candidate | None
    """The one that needs least memory, whether it fits or not; None where the rules take none."""


def evaluate(config: Config, cluster: Cluster, shares: Shares, *, timed: bool = True) -> Candidate:
    """Memory and time of one layout; the data-parallel size need not be whole."""
    candidate = _sized(config, cluster, shares)
    return _timed(candidate, cluster, shares) if timed else candidate


def _sized(config: Config, cluster: Cluster, shares: Shares) -> Candidate:
    parallel = config.parallel
    data = cluster.world / (parallel.tensor_parallel * parallel.pipeline_parallel)
    memory = peak_memory(
        config,
        data_parallel=data,
        micro_batches=whole_micro_batches(config, data),
        target_share=shares.targets,
        fragmentation=FRAGMENTATION,
        runtime_bytes=RUNTIME_BYTES,
    )
    limit = cluster.hardware.memory_gib
    return Candidate(config, data, memory, None, fits=limit is not None and memory.total <= limit * 2**30)


def _timed(candidate: Candidate, cluster: Cluster, shares: Shares) -> Candidate:
    cost = CostModel(candidate.config, cluster.hardware, cluster.gpus_per_node, candidate.data_parallel, shares)
    return replace(candidate, step=cost.step())


def search(config: Config, cluster: Cluster, shares: Shares) -> Search:
    """All layouts of `config` on `cluster`, whatever its own layout is."""
    found: dict[Layout, Candidate] = {}
    refused: dict[Layout, str] = {}
    best: list[Candidate] = []
    smallest: Candidate | None = None
    tried = 0
    for layout in _layouts(config, cluster):

        def sized(trial: Config, layout: Layout = layout) -> Candidate | None:
            try:
                check_shape(trial)
                check_world(trial, cluster.world)
            except ConfigError as error:
                refused.setdefault(layout, str(error))
                return None
            return _sized(trial, cluster, shares)

        for one in _variants(config, layout, sized):
            tried += 1
            candidate = _timed(one, cluster, shares) if one.fits else one
            if smallest is None or candidate.memory.total < smallest.memory.total:
                smallest = candidate
            if candidate.fits:
                best.append(candidate)
            known = found.get(layout)
            if known is None or _rank(candidate) < _rank(known):
                found[layout] = candidate
    best.sort(key=lambda candidate: candidate.seconds)
    winner = best[0] if best else None
    lost = [(layout, _why(found[layout], winner, cluster)) for layout in found if found[layout] is not winner]
    lost += [(layout, reason) for layout, reason in refused.items() if layout not in found]
    return Search(best, sorted(lost), tried, smallest)


def follows_slides(candidate: Candidate, cluster: Cluster) -> bool:
    """The published rule of thumb: tensor parallelism inside a node, the rest of the model over a pipeline."""
    tensor, pipeline = candidate.layout
    return (
        tensor <= cluster.gpus_per_node and candidate.config.parallel.zero_stage <= 1 and (tensor > 1 or pipeline == 1)
    )


def _layouts(config: Config, cluster: Cluster) -> Iterator[Layout]:
    """Sizes that divide the ranks; tensor parallelism up to two nodes, to show what leaving the node costs."""
    for tensor in divisors(cluster.world, 2 * cluster.gpus_per_node):
        for pipeline in divisors(cluster.world // tensor, config.model.num_layers + 2):
            yield tensor, pipeline


def _variants(config: Config, layout: Layout, sized: Callable[[Config], Candidate | None]) -> Iterator[Candidate]:
    """What might be fastest in a layout, by size: what only saves memory is not tried where there is enough.

    sized: a trial's memory, None where the rules refuse it.
    """
    tensor, pipeline = layout
    cut = config.parallel.layers_per_stage if pipeline == config.parallel.pipeline_parallel else []
    zero_stages = (1, 2, 3) if pipeline == 1 else (1,)
    sequence_shares = (False, True) if tensor > 1 else (False,)
    for zero, sequence in itertools.product(zero_stages, sequence_shares):
        parallel = replace(
            config.parallel,
            tensor_parallel=tensor,
            pipeline_parallel=pipeline,
            layers_per_stage=cut,
            zero_stage=zero,
            sequence_parallel=sequence,
            overlap_tensor=config.parallel.overlap_tensor and tensor > 1,
            pipeline_schedule=config.parallel.pipeline_schedule if pipeline > 1 else "1f1b",
            overlap_communication=zero > 1,
        )
        for micro in MICRO_BATCHES:
            trial = replace(config, parallel=parallel, micro_batch_size=micro)
            found = [one for one in _saving(trial, sized) if one is not None]
            yield from found
            if found and not any(one.fits for one in found):
                break  # larger ones need more


def _saving(trial: Config, sized: Callable[[Config], Candidate | None]) -> Iterator[Candidate | None]:
    """A trial as it is, and, while it does not fit, with ever more of what saves memory and costs time."""

    def tried(mode: str, every: int) -> Iterator[Candidate | None]:
        for offload in (False, True):
            parallel = replace(
                trial.parallel,
                activation_checkpointing=mode,
                activation_checkpointing_every_layers=every,
                offload_optimizer=offload,
            )
            candidate = sized(replace(trial, parallel=parallel))
            yield candidate
            if candidate is None or candidate.fits:
                return

    plain, *saved = tried("none", 1)
    yield from (plain, *saved)
    if plain is None or plain.fits:
        return
    for mode in CHOICES["parallel.activation_checkpointing"]:
        if mode == "none":
            continue
        for every in EVERY_LAYERS:
            found = list(tried(mode, every))
            yield from found
            if not any(one is not None and one.fits for one in found):
                break  # fewer recomputed layers need more


def _rank(candidate: Candidate) -> tuple[bool, float]:
    """Fitting ones by time, then the others by memory."""
    return not candidate.fits, candidate.seconds if candidate.fits else candidate.memory.total


def _why(candidate: Candidate, winner: Candidate | None, cluster: Cluster) -> str:
    if not candidate.fits:
        kinds = candidate.memory.kinds()
        largest = max(kinds, key=lambda kind: kinds[kind])
        return (
            f"does not fit: {candidate.memory.total / 2**30:.1f} GiB of {cluster.hardware.memory_gib:g} at best "
            f"({candidate.savings()}), {kinds[largest] / 2**30:.1f} of them {largest}"
        )
    assert winner is not None
    assert candidate.step is not None
    assert winner.step is not None
    mine, theirs = vars(candidate.step), vars(winner.step)
    worst = max(mine, key=lambda part: mine[part] - theirs[part])
    names = {"tensor": "tensor-parallel communication", "send": "pipeline sends", "gather": "ZeRO's gathers"}
    names |= {"reduce": "gradient reduction", "compute": "computation", "optimizer": "the optimizer"}
    return (
        f"{candidate.seconds / winner.seconds:.2f} x the time ({candidate.savings()}): "
        f"{mine[worst] - theirs[worst]:+.2f} s of {names.get(worst, worst)}"
    )


def nothing_fits(search_result: Search, cluster: Cluster) -> ConfigError:
    """The error of a model that fits nowhere: what the smallest layout needs."""
    smallest = search_result.smallest
    if smallest is None:
        reason = search_result.lost[0][1] if search_result.lost else "no layout divides the ranks"
        return ConfigError(f"no layout of {cluster.world} ranks can train this model: {reason}")
    kinds = smallest.memory.kinds()
    top: Sequence[str] = sorted(kinds, key=lambda kind: -kinds[kind])[:3]
    parts = ", ".join(f"{kind} {kinds[kind] / 2**30:.1f}" for kind in top)
    return ConfigError(
        f"model={smallest.config.model.name} fits no layout of {cluster.world} x {cluster.hardware.name} "
        f"({cluster.hardware.memory_gib:g} GiB): the smallest, {smallest.describe()}, needs "
        f"{smallest.memory.total / 2**30:.1f} GiB ({parts}); take more nodes or more memory"
    )
