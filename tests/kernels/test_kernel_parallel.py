"""Vocabulary parallelism: two ranks with half the table each give the loss and gradients of one."""

from __future__ import annotations

import kernel_formulas as formulas
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from kernel_formulas import as64, error_ratio, leaf

from kernels.embedding import embedding
from kernels.linear_cross_entropy import linear_cross_entropy


def _rank(rank, store, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    hidden, table = leaf(9, 8, seed=1, dtype=torch.float32), leaf(20, 8, seed=2, dtype=torch.float32)
    shard = table.detach()[10 * rank : 10 * rank + 10].clone().requires_grad_()
    targets, weights = torch.arange(9) * 2, torch.rand(9, generator=torch.Generator().manual_seed(1))
    wide = [as64(hidden), as64(table)]
    for softcap, z_loss in ((0.0, 0.0), (4.0, 1e-2)):
        loss, z, sums = linear_cross_entropy(
            hidden, shard, targets, weights, tp_group=dist.group.WORLD, z_loss=z_loss, softcap=softcap
        )
        want, want_z, rows = formulas.linear_cross_entropy(
            *wide, targets, weights.double(), z_loss=z_loss, softcap=softcap
        )
        grads = torch.autograd.grad(loss + z, [hidden, shard])
        wants = torch.autograd.grad(want + want_z, wide)
        results[rank] = results[rank] and abs((loss + z) / (want + want_z) - 1).item() < 1e-6
        results[rank] = results[rank] and error_ratio(grads[0], wants[0]) < 1e-6
        results[rank] = results[rank] and error_ratio(grads[1], wants[1][10 * rank : 10 * rank + 10]) < 1e-6
        results[rank] = results[rank] and abs(sums[0, 0] - rows.sum()).item() < 1e-4 and sums[0, 1].item() == 9
    part = embedding(targets, shard, vocab_start=10 * rank)
    dist.all_reduce(part)
    results[rank] = results[rank] and torch.equal(part, table[targets])
    dist.destroy_process_group()


@pytest.mark.distributed
def test_two_ranks_equal_one(tmp_path):
    with mp.get_context("spawn").Manager() as manager:
        results = manager.list([True, True])
        mp.start_processes(_rank, args=(tmp_path / "store", results), nprocs=2, start_method="spawn")
        assert list(results) == [True, True]
