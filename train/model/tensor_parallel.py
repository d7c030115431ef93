"""The four tensor-parallel moves, after Megatron-LM (arXiv 1909.08053, section 3).

A column-parallel product takes a replicated input and gives each rank its share of the outputs; a row-parallel product
takes those shares and ends in a sum over the ranks. What crosses ranks is told by two conjugate functions:

    copy_to_ranks      forward: nothing            backward: sum over ranks
    sum_over_ranks     forward: sum over ranks     backward: nothing

Biases are not added here: the fused kernels after each product add them, once.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _CopyToRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # Autograd may share this buffer with another path, so the sum must not happen in it.
        grad = grad.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(grad, group=ctx.group)
        return grad, None


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def copy_to_ranks(x: Tensor, group: Any) -> Tensor:
    """x, whose gradient is summed over the group. group None: x itself."""
    return x if group is None else _CopyToRanks.apply(x, group)


def sum_over_ranks(x: Tensor, group: Any) -> Tensor:
    """The sum of x over the group, whose gradient passes through. group None: x itself."""
    return x if group is None else _SumOverRanks.apply(x, group)


def product(x: Tensor, weight: Tensor | nn.Module) -> Tensor:
    """x [..., in] times a weight [out, in], or what stands in for one (`train.model.quantised`): [..., out]."""
    result: Tensor = weight(x) if isinstance(weight, nn.Module) else F.linear(x, weight)
    return result


def column_parallel(x: Tensor, weight: Tensor, group: Any) -> Tensor:
    """x [..., in] times this rank's rows of the weight [out / ranks, in]: [..., out / ranks]."""
    return product(copy_to_ranks(x, group), weight)


def row_parallel(x: Tensor, weight: Tensor, group: Any) -> Tensor:
    """This rank's columns: x [..., in / ranks] times [out, in / ranks], summed over the ranks: [..., out]."""
    return sum_over_ranks(product(x, weight), group)
