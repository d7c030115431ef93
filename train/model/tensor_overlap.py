"""Tensor-parallel products with the traffic beside them (parallel.overlap_tensor).

On shares of the sequence a product of the whole is as many products of a share as there are ranks, and of those only
the other ranks' need traffic. A gather comes in while this rank multiplies its own rows; of a sum each rank computes
the others' parts first and sends them while it computes its own. No row is cut and no sum gets another term: the
numbers are those of `train.model.tensor_parallel`, with two ranks in the same order.

Without shares a row-parallel product is made in two halves of its rows: the first is summed over the ranks while the
second is multiplied. (In the backward pass the column-parallel products' sum always runs beside their weights'.)
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.linear import main_grad, weight_gradient


def gather_products(share: Tensor, matrices: Sequence[Tensor], group: Any) -> tuple[list[Tensor], Tensor]:
    """What all ranks' shares [B,S / ranks,in] make with each matrix [in,out], a [B,S,out] for each; and their shares.

    The shares are [ranks,B,S / ranks,in], as they came in.
    """
    ranks, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    sequences, slots, width = share.shape
    share = share.contiguous()
    shares = share.new_empty(ranks, sequences, slots, width)
    work = torch.distributed.all_gather_into_tensor(shares.flatten(0, 1), share, group=group, async_op=True)
    results = [share.new_empty(sequences, ranks * slots, matrix.shape[1]) for matrix in matrices]
    for place in (rank, *(other for other in range(ranks) if other != rank)):
        if place != rank and work is not None:
            work.wait()
            work = None
        rows = slice(place * slots, (place + 1) * slots)
        for matrix, result in zip(matrices, results, strict=True):
            own = share if place == rank else shares[place]
            torch.bmm(own, matrix.expand(sequences, -1, -1), out=result[:, rows])
    return results, shares


def scatter_product(x: Tensor, matrix: Tensor, group: Any) -> Tensor:
    """This rank's share [B,S / ranks,out] of the sum over the ranks of x [B,S,in] times matrix [in,out]."""
    ranks, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    parts = x.chunk(ranks, 1)
    matrices = matrix.expand(x.shape[0], -1, -1)
    coming: list[tuple[list[Any], Tensor, Tensor]] = []
    for far in range(1, ranks):
        to, source = (rank + far) % ranks, (rank - far) % ranks
        theirs = torch.bmm(parts[to], matrices)
        mine = torch.empty_like(theirs)
        messages = [
            torch.distributed.P2POp(torch.distributed.isend, theirs, group=group, group_peer=to),
            torch.distributed.P2POp(torch.distributed.irecv, mine, group=group, group_peer=source),
        ]
        coming.append((torch.distributed.batch_isend_irecv(messages), theirs, mine))
    total = torch.bmm(parts[rank], matrices)
    for works, _, mine in coming:
        for work in works:
            work.wait()
        total += mine
    return total


class RowParallelWhole(torch.autograd.Function):
    """`tensor_parallel.row_parallel` without sequence parallelism, half of the sum beside the product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, group: Any) -> Tensor:
        """x [B,S,in / ranks], weight [out,in / ranks]: [B,S,out]."""
        ctx.save_for_backward(x, weight)
        ctx.total = main_grad(weight)
        out = x.new_empty(*x.shape[:-1], weight.shape[0])
        works = []
        for rows, results in zip(x.flatten(0, -2).chunk(2), out.flatten(0, -2).chunk(2), strict=True):
            torch.mm(rows, weight.t(), out=results)
            works.append(torch.distributed.all_reduce(results, group=group, async_op=True))
        for work in works:
            work.wait()
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """grad [B,S,out], whole on every rank."""
        x, weight = ctx.saved_tensors
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        return grad_x, weight_gradient(x, grad, ctx.total) if ctx.needs_input_grad[1] else None, None


class RowParallel(torch.autograd.Function):
    """`tensor_parallel.row_parallel` with sequence parallelism, the traffic beside the products both ways."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, group: Any) -> Tensor:
        """x [B,S,in / ranks], weight [out,in / ranks]: [B,S / ranks,out]."""
        ctx.save_for_backward(x, weight)
        ctx.group, ctx.total = group, main_grad(weight)
        return scatter_product(x, weight.t(), group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """grad [B,S / ranks,out]."""
        x, weight = ctx.saved_tensors
        (grad_x,), shares = gather_products(grad, [weight], ctx.group)
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None
        whole = shares.movedim(0, 1).flatten(1, 2)
        return grad_x, weight_gradient(x, whole, ctx.total), None
