"""Peak memory of a pipeline's stages with the slot rule and without it: planned, and on a GPU measured.

    python -m benchmarks.slot_rule                    # GLM-130B's stages; writes benchmarks/slot_rule.csv
    python -m benchmarks.slot_rule --toy              # a small model on a CPU: does it run?

The slot rule counts the embedding and the head as a layer each: GLM-130B's 70 layers in 8 stages are 8, six times 9,
and 8. Without it the ends hold nine layers too, as with 72 layers (and of 70, two stages in the middle eight).

Each stage is built by itself as one tensor-parallel rank holds it, from the real layers and kernels, in a process group
of ranks that are not there (their messages hold nothing, so only sizes mean something). It then runs as 1F1B does: as
many forward passes as micro-batches are in flight, then a backward and a forward pass by turns. Its ZeRO share of
master weights and moments is held too. The buffers of reductions and of the pipeline's messages are not there, so the
plan is given without them. A stage that has the same layers either way is measured once.
"""

import argparse
import csv
import gc
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.step import device, versions
from benchmarks.step_worker import Shape, batch_of
from train import backend
from train.arithmetic import layers_per_stage
from train.cli import compose_train
from train.config import Config
from train.labels import Labels, inputs
from train.memory import memory_by_stage
from train.mesh import Mesh
from train.model import context
from train.model.build import DTYPES, Model
from train.model.parameters import Layout

GLM_130B = ["experiment=glm_130b", "data.path=unused"]
TOY = [
    *("data.path=unused", "model=tiny", "model.num_layers=14", "model.hidden_size=32", "model.ffn_hidden_size=64"),
    *("parallel.tensor_parallel=2", "parallel.pipeline_parallel=8", "parallel.activation_checkpointing=full"),
]
WITHOUT = {70: [9, 9, 9, 8, 8, 9, 9, 9], 14: [2, 2, 2, 1, 1, 2, 2, 2]}
"""Layers of the stages without the rule, by how many there are."""
REPLICAS = 24
TARGETS = 0.6
"""Targets a slot, as `batch_of` draws them."""
STEADY = 3
"""Backward and forward passes by turns, after the first forward passes."""


def main() -> None:
    """Plan and measure each stage that differs, one row a stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 7, 1], help="stages to measure (default 0 7 1)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/slot_rule.csv"))
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for rule, stage in [(rule, stage) for stage in options.stages for rule in ("on", "off")]:
        config = compose_train(TOY if options.toy else GLM_130B)
        layers, stages = config.model.num_layers, config.parallel.pipeline_parallel
        with_rule, without = layers_per_stage(layers, stages), WITHOUT[layers]
        if rule == "off" and with_rule[stage] == without[stage]:
            continue
        config.parallel.layers_per_stage = with_rule if rule == "on" else without
        rows.append({"rule": rule, "stage": stage} | row(config, stage))
        print(rows[-1], flush=True)
        write(options.output, rows)


def row(config: Config, stage: int) -> dict[str, Any]:
    """One stage: its layers, GiB planned and measured (the allocator's peak; empty on a CPU)."""
    stages, micro_batches = config.parallel.pipeline_parallel, config.global_batch_size // REPLICAS
    planned = memory_by_stage(
        config, data_parallel=REPLICAS, micro_batches=max(stages, micro_batches), target_share=TARGETS
    )[stage]
    peak = measured(config, stage)
    return {
        "layers": config.parallel.layers_per_stage[stage],
        "in_flight": stages - stage,
        "planned_gib": round((planned.total - planned.buffers) / 2**30, 3),
        "measured_gib": round(peak / 2**30, 3) if peak else None,
        "planned_with_buffers_gib": round(planned.total / 2**30, 3),
    }


def measured(config: Config, stage: int) -> int:
    """Peak bytes that the allocator gave out while the stage ran; 0 on a CPU."""
    ranks = config.parallel.tensor_parallel
    gc.collect()  # the stage before
    before = backend.memory().get("memory_held_bytes", 0)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        mesh = replace(
            Mesh.single(backend.device()),
            tensor=ranks,
            tensor_group=torch.distributed.group.WORLD,
            pipeline=config.parallel.pipeline_parallel,
            stage=stage,
        )
        dtype = DTYPES[config.precision.dtype]

        def zeros(layout: Layout, device: torch.device, **_: Any) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.zeros(layout.local_shape, dtype=dtype, device=device))

        with mock.patch.object(context, "make_parameter", zeros):  # to draw numbers takes longer than all the rest
            model = Model(config, mesh, dtype).train()
        backend.memory()
        run(model, config, mesh)
        return backend.memory().get("memory_peak_bytes", 0) - before
    finally:
        torch.distributed.destroy_process_group()


def run(model: Model, config: Config, mesh: Mesh) -> None:
    """1F1B's passes of this stage, beside its share of the optimizer's states."""
    elements = sum(parameter.numel() for parameter in model.parameters())
    states = torch.empty(3 * (elements // REPLICAS), device=mesh.device)  # master weights and both moments, fp32
    shape = Shape(0, 0, 0, 0, config.model.padded_vocab_size, config.sequence_length)
    share = mesh.tensor if config.parallel.sequence_parallel else 1
    hidden_shape = (config.micro_batch_size, config.sequence_length // share, config.model.hidden_size)
    in_flight: list[tuple[Tensor, Tensor]] = []

    def forward(number: int) -> None:
        batch = batch_of(shape, config.micro_batch_size, number)
        first, *rest = (tensor.to(mesh.device) for tensor in inputs(batch))
        if not mesh.first_stage:
            dtype = DTYPES[config.precision.dtype]
            first = torch.zeros(hidden_shape, dtype=dtype, device=mesh.device, requires_grad=True)
        labels = Labels.of(batch).to(mesh.device) if mesh.last_stage else None
        in_flight.append((first, model((first, *rest), labels)[0]))

    def backward() -> None:
        _, out = in_flight.pop(0)
        out.backward(torch.zeros_like(out))

    held = mesh.pipeline - mesh.stage
    for number in range(held + STEADY):
        if number >= held:
            backward()
        forward(number)
    while in_flight:
        backward()
    backend.synchronize()
    del states


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """The table so far."""
    with path.open("w", newline="") as file:
        command = f"python -m benchmarks.slot_rule {shlex.join(sys.argv[1:])}".rstrip()
        file.write(f"# {device()}, {versions()}; {command}\n")
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


if __name__ == "__main__":
    main()
