"""torch's pipeline schedules run for real on this project's model: are they right, and what do they ask of the host?

    python -m benchmarks.schedules_run        # writes benchmarks/schedules_run.csv; two ranks over gloo, two minutes

A tiny model of 24 layers, cut in `train.model.build.Model`s as stages, goes through each schedule's own runtime. Losses
and gradients of a step are held to one process without a pipeline. Then `trained` runs the same stages under DeepSpeed
ZeRO 1 in bf16 and is held to the pipeline engine that training uses. Host time is CPU time of the main thread: the
tensors are so small that it is what launching costs, which a fast device would have to hide.

Products add their weight gradients to fp32 sums (`kernels.linear`); torch's way of splitting a backward pass, which
asks autograd for the weights' gradients afterwards, finds none there. `kernels.linear.Later` keeps what those products
need until the weights' pass, which torch lets a stage bring (`dw_builder`).
"""

import argparse
import csv
import dataclasses
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from benchmarks.schedules import SCHEDULES, rank_of
from kernels.linear import Later
from tests.train import parity
from train.cli import compose_train
from train.config import Config
from train.labels import Labels, inputs
from train.mesh import Mesh
from train.model.build import Model, named_layouts
from train.model.ends import EMBEDDING

RANKS, LAYERS, MICRO_BATCHES, SIZE, TRAINED_STEPS = 2, 24, 16, 2, 10
BATCH = MICRO_BATCHES * SIZE
TRAINED = ("zero bubble", "interleaved 1F1B", "interleaved zero bubble")
"""Schedules that also train; ZBV has both ends on one rank, where DeepSpeed's norm would count the tied table twice."""
WORDS = [
    *parity.OVERRIDES,
    f"model.num_layers={LAYERS}",
    f"global_batch_size={BATCH}",
    f"parallel.pipeline_parallel={RANKS}",
]


class _Stage(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, *state: Tensor) -> Any:
        return self.model(state)


class Pipeline:
    """This rank's stages under one of torch's schedules."""

    def __init__(self, name: str, config: Config, mesh: Mesh, dtype: torch.dtype = torch.float32) -> None:
        kind, held = SCHEDULES[name]
        count = mesh.pipeline * held
        mine = [stage for stage, rank in enumerate(rank_of(name, mesh.pipeline)) if rank == mesh.stage]
        with parity.noisy_vectors():
            self.models = {
                stage: Model(config, dataclasses.replace(mesh, stage=stage, pipeline=count), dtype) for stage in mine
            }
        for model in self.models.values():
            model.set_shrink(parity.SHRINK, 1.0)
        self.later = Later()
        self.first, self.last = self.models.get(0), self.models.get(count - 1)
        self._labels: list[Labels] = []
        stages = [
            PipelineStage(_Stage(model), stage, count, mesh.device, group=mesh.pipeline_group, dw_builder=self._put_off)
            for stage, model in self.models.items()
        ]
        micro_batches = config.global_batch_size // config.micro_batch_size // mesh.data
        self._schedule = kind(
            stages if held > 1 or "zero" in name else stages[0],  # type: ignore[arg-type]
            micro_batches,
            loss_fn=self._loss,
            scale_grads=False,
        )

    def _put_off(self) -> Callable[[], None]:
        return partial(self.later.run, self.later.take())

    def _loss(self, hidden: Tensor, number: Tensor) -> Tensor:
        assert self.last is not None
        assert self.last.head is not None
        loss: Tensor = self.last.head.loss(hidden, self._labels[int(number[0])])[0]
        return loss / len(self._labels)

    def step(self, batches: list[Any]) -> list[float]:
        """Forward and backward passes of a step; the losses of its micro-batches on the rank with the head."""
        self._labels = [Labels.of(batch) for batch in batches]
        state = tuple(torch.cat(parts) for parts in zip(*map(inputs, batches), strict=True))
        numbers = torch.arange(len(batches)).repeat_interleave(SIZE)
        losses: list[Tensor] = []
        for _, parameter in self.parameters():
            parameter.main_grad.later = self.later  # type: ignore[attr-defined]
        self._schedule.step(
            *(state if self.first is not None else ()),
            target=numbers if self.last is not None else None,
            losses=losses,
            return_outputs=False,
        )
        return [float(loss.detach()) for loss in losses]

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters; the tied table has a copy at each end."""
        for model in self.models.values():
            for layout, parameter in named_layouts(model.parameters()):
                yield layout.name, parameter


def checked(name: str, steps: int) -> dict[str, Any]:
    """One schedule in fp32: its error against one process, and the host's time a step on each rank."""
    from train import backend

    config = compose_train(WORDS)
    mesh = backend.make_mesh(config)
    pipeline = Pipeline(name, config, mesh)
    for _, parameter in pipeline.parameters():
        parameter.main_grad = torch.zeros_like(parameter)  # type: ignore[attr-defined]
    batches = [parity.batch_of(SIZE * number, SIZE) for number in range(MICRO_BATCHES)]
    # The first step learns the shapes by a backward pass over memory that nobody has written; its sums are not ours.
    pipeline.step(batches)
    seconds = []
    for _ in range(steps):
        for _, parameter in pipeline.parameters():
            parameter.grad = None
            parameter.main_grad.zero_()  # type: ignore[attr-defined]
        begun = time.thread_time()
        losses = pipeline.step(batches)
        seconds.append(time.thread_time() - begun)
    mine: dict[str, Tensor] = {}
    for key, parameter in pipeline.parameters():
        found = parameter.main_grad + (0 if parameter.grad is None else parameter.grad)  # type: ignore[attr-defined]
        mine[key] = mine[key] + found if key in mine else found
    gathered: list[Any] = [None] * RANKS
    dist.all_gather_object(gathered, (mine, losses, statistics.median(seconds)))
    total: dict[str, Tensor] = {}
    for found, *_ in gathered:
        for key, gradient in found.items():
            total[key] = total[key] + gradient if key in total else gradient
    losses = [loss for _, theirs, _ in gathered for loss in theirs]
    wanted, wanted_losses = _alone(config, batches)
    return {
        "loss_error": max(abs(a - b) / b for a, b in zip(losses, wanted_losses, strict=True)),
        "gradient_error": max(float((total[key] - wanted[key]).norm() / wanted[key].norm()) for key in wanted),
        "host_ms": [1e3 * seconds for *_, seconds in gathered],
    }


def _alone(config: Config, batches: list[Any]) -> tuple[dict[str, Tensor], list[float]]:
    with parity.noisy_vectors():
        model = Model(config, Mesh.single(), torch.float32)
    model.set_shrink(parity.SHRINK, 1.0)
    losses = []
    for batch in batches:
        loss = model(inputs(batch), Labels.of(batch))[0] / len(batches)
        loss.backward()
        losses.append(float(loss.detach()))
    return {layout.name: p.grad for layout, p in named_layouts(model.parameters()) if p.grad is not None}, losses


def today(steps: int) -> dict[str, Any]:
    """DeepSpeed's pipeline engine: the host's time a step, without the optimizer's."""
    engine = parity.start_engine([*WORDS, "parallel.zero_stage=0"])
    batches = [parity.batch_of(SIZE * number, SIZE) for number in range(MICRO_BATCHES)]
    seconds = []
    for _ in range(steps + 1):
        with _without_optimizer(engine.deepspeed):
            begun = time.thread_time()
            engine.deepspeed.train_batch(engine._feed(batches))
            seconds.append(time.thread_time() - begun)
    gathered: list[Any] = [None] * RANKS
    dist.all_gather_object(gathered, 1e3 * statistics.median(seconds[1:]))
    return {"host_ms": gathered}


@contextmanager
def _without_optimizer(engine: Any) -> Iterator[None]:
    table = engine._INSTRUCTION_MAP
    kinds = ("OptimizerStep", "ReduceGrads", "ReduceTiedGrads")
    engine._INSTRUCTION_MAP = {
        kind: (lambda *_, **__: None) if kind.__name__ in kinds else run for kind, run in table.items()
    }
    try:
        yield
    finally:
        engine._INSTRUCTION_MAP = table


def trained(name: str | None, steps: int) -> list[float]:
    """Losses of some steps in bf16 with ZeRO 1, PP 2 x DP 2, by torch's schedule or (None) by training's own engine."""
    words = [*WORDS, "precision=bf16", "parallel.zero_stage=1"]
    if name is None:
        engine = parity.start_engine(words)
        batches = [parity.my_batches(engine, step * BATCH, BATCH) for step in range(steps)]
        results = [engine.step(mine, parity.LR, parity.SHRINK) for mine in batches]
        return [numbers.loss for numbers in engine.read(results)]
    import deepspeed

    from train import backend
    from train.main_grads import attach
    from train.optimizer import make_optimizer

    config = compose_train(words)
    mesh = backend.make_mesh(config)
    pipeline = Pipeline(name, config, mesh, torch.bfloat16)
    held = nn.ModuleList(pipeline.models.values())
    optimizer = make_optimizer(held, config.optimizer, mesh, clips=False, skips=False, offloads=False)  # type: ignore[arg-type]
    settings = backend._settings(config, mesh, held)  # type: ignore[arg-type]
    with backend.quiet():
        engine, *_ = deepspeed.initialize(
            model=held, optimizer=optimizer, config=settings, mpu=mesh.grid, dist_init_required=False
        )
    attach(engine)
    ends = [weight for name, weight in pipeline.parameters() if name == EMBEDDING]
    if pipeline.last is not None:
        ends[-1].ds_pipe_replicated = True  # type: ignore[attr-defined]
    totals = []
    for step in range(steps):
        batches = parity.my_batches(SimpleNamespace(config=config, mesh=mesh), step * BATCH, BATCH)
        if step == 0:
            # Learns the shapes, and leaves sums of memory that nobody has written.
            pipeline.step(batches)
            # Sums that it was not told of it takes for empty.
            engine.optimizer.update_hp_grads()
            engine.optimizer.clear_hp_grads()
            engine.optimizer.clear_lp_grads()
        for group in engine.optimizer.param_groups:
            group["lr"] = parity.LR
        losses = pipeline.step(batches)
        engine.optimizer.update_hp_grads()
        for weight in ends:
            dist.all_reduce(weight._hp_grad, group=mesh.embedding_group)  # type: ignore[attr-defined]
        engine.buffered_allreduce_fallback(grads=None)
        engine._take_model_step({})
        total = torch.tensor(sum(losses), dtype=torch.float64)
        mesh.from_last_stage(mesh.sum_over_data(total))
        totals.append(float(total) / mesh.data)
    return totals


def main() -> None:
    """Run all schedules and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each schedule (default 10)")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".csv"))
    arguments = parser.parse_args()
    base = parity.in_ranks(RANKS, today, arguments.steps)["host_ms"]
    wanted = parity.in_ranks(2 * RANKS, trained, None, TRAINED_STEPS)
    table = [_row("1F1B, deepspeed", base, base)]
    for name in SCHEDULES:
        found = parity.in_ranks(RANKS, checked, name, arguments.steps)
        row = _row(name, found["host_ms"], base)
        row |= {key: f"{found[key]:.1e}" for key in ("loss_error", "gradient_error")}
        if name in TRAINED:
            losses = parity.in_ranks(2 * RANKS, trained, name, TRAINED_STEPS)
            apart = max(abs(a / b - 1) for a, b in zip(losses, wanted, strict=True))
            row["zero_1_bf16_loss_apart"] = f"{apart:.1e}"
        table.append(row)
        print(row, flush=True)
    with arguments.output.open("w", encoding="utf-8", newline="") as file:
        device = platform.processor() or platform.machine()
        file.write(
            f"# {device}, {os.cpu_count()} cores, torch {torch.__version__}, gloo; python -m benchmarks.schedules_run\n"
        )
        file.write(
            f"# {RANKS} ranks, {LAYERS} layers of 32, {MICRO_BATCHES} micro-batches, fp32: errors of a step against one"
        )
        file.write(
            f" process (tied table summed); zero_1: {TRAINED_STEPS} steps, PP 2 x DP 2, against the pipeline engine\n"
        )
        writer = csv.DictWriter(file, fieldnames=list(table[1]), restval="")
        writer.writeheader()
        writer.writerows(table)
    print(arguments.output.read_text(encoding="utf-8"))


def _row(name: str, host: list[float], base: list[float]) -> dict[str, Any]:
    row: dict[str, Any] = {"schedule": name}
    row |= {f"host_ms_rank_{rank}": f"{ms:.1f}" for rank, ms in enumerate(host)}
    return row | {
        "host_x_deepspeed": f"{max(host) / max(base):.2f}",
        "loss_error": "",
        "gradient_error": "",
        "zero_1_bf16_loss_apart": "",
    }


if __name__ == "__main__":
    main()
