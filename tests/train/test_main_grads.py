"""The end of a step under DeepSpeed's bf16 optimizer: each rank's part of the mean gradient, and the norm of all."""

import math

import pytest
import torch
from torch import Tensor

from tests.train.parity import in_ranks, start_engine
from train.model.build import named_layouts

LAYOUTS = {
    2: [[]],
    4: [
        ["parallel.pipeline_parallel=2"],
        ["parallel.tensor_parallel=2"],
        ["parallel.tensor_parallel=2", "parallel.sequence_parallel=true", "model.num_kv_heads=1"],
    ],
}


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_get_their_part_of_the_mean_and_the_norm_of_all(world: int) -> None:
    for layout in LAYOUTS[world]:
        parts, norm, wanted = in_ranks(world, _reduced, layout)
        assert parts == 0.0, layout
        assert norm == pytest.approx(wanted, rel=1e-6), layout


def _reduced(layout: list[str]) -> tuple[float, float, float]:
    """(largest difference of this rank's parts from the mean of what the ranks had, the norm found, that norm by hand).

    The sums are random on each rank, and alike where tensor-parallel ranks or both ends of a pipeline hold the same.
    """
    engine = start_engine([*layout, "precision=bf16", "parallel.zero_stage=1", "optimizer.clip=0.5"])
    mesh, optimizer = engine.mesh, engine.deepspeed.optimizer
    square = 0.0
    for layout_of, parameter in named_layouts(engine.model.parameters()):
        seed = sum(map(ord, layout_of.name)) + 1000 * mesh.data_rank
        seed += 0 if layout_of.dim is None else 100_000 * mesh.tensor_rank
        parameter.main_grad.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
        total = parameter.main_grad.clone()
        torch.distributed.all_reduce(total, group=mesh.data_group)
        if (layout_of.dim is not None or mesh.tensor_rank == 0) and not getattr(parameter, "ds_pipe_replicated", False):
            square += float((total.double() / mesh.data).square().sum())
    whole = [flat.clone() for flat in optimizer.fp32_groups_gradients_flat]
    for flat in whole:
        torch.distributed.all_reduce(flat, group=mesh.data_group)
    wanted = [flat.chunk(mesh.data)[mesh.data_rank] / mesh.data for flat in whole]
    optimizer.fp32_groups_has_gradients = [[True] * len(group) for group in optimizer.bf16_groups]
    engine.deepspeed.buffered_allreduce_fallback()
    parts = optimizer.fp32_groups_gradient_flat_partition
    apart = torch.stack([(part - mean).abs().max() for part, mean in zip(parts, wanted, strict=True)]).max()
    squares = torch.tensor(square, dtype=torch.float64)
    torch.distributed.all_reduce(apart, op=torch.distributed.ReduceOp.MAX)
    if mesh.tensor * mesh.pipeline > 1:
        torch.distributed.all_reduce(squares, group=mesh.grid.get_model_parallel_group())
    taken: list[Tensor] = []
    optimizer.optimizer.register_step_pre_hook(
        lambda *_: taken.extend(group["params"][0].grad.clone() for group in optimizer.param_groups)
    )
    optimizer.step()
    norm = math.sqrt(float(squares))
    for mean, clipped in zip(wanted, taken, strict=True):
        torch.testing.assert_close(clipped, mean * (0.5 / norm), rtol=1e-5, atol=1e-9)
    return float(apart), float(optimizer._global_grad_norm), norm
