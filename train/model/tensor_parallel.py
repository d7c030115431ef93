"""The tensor-parallel moves, after Megatron-LM (arXiv 1909.08053, section 3; sequence parallelism arXiv 2205.05198).

A column-parallel product takes an input that all ranks share and gives each rank its share of the outputs; a
row-parallel product takes those shares and ends in a sum over the ranks. Between them, where norms, dropout and
residuals stand, every rank holds the whole sequence; with sequence parallelism each holds S / ranks slots of it:

                            whole sequence                      shares of the sequence
    column-parallel input   forward nothing, backward sum       forward gather, backward sum and scatter
    row-parallel output     forward sum, backward nothing       forward sum and scatter, backward gather

Both cost the same traffic, since a sum is a scatter and a gather; the shares save memory and work in between. What
ranks hold alike (norms, biases) then sees a share of the sequence only, so its gradient is summed over the ranks.

In a column-parallel product's backward pass the traffic runs beside the products that do not wait for it; by option it
does elsewhere too (`train.model.tensor_overlap`).
Biases are not added here: the fused kernels after each product add them, once.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.linear import (
    Multiply,
    forward_product,
    input_gradient,
    linear,
    linear_and_input,
    main_grad,
    weight_gradient,
)
from train.model.tensor_overlap import RowParallel, RowParallelWhole, gather_products

Weight = Tensor | nn.Module
"""A matrix, or what stands in for one when no gradient is wanted."""


class _ColumnParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        group: Any,
        sequence: bool,
        beside: bool,
        hands_on: bool,
        multiply: Multiply | None,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.group, ctx.sequence, ctx.hands_on, ctx.multiply = group, sequence, hands_on, multiply
        ctx.totals = [main_grad(weight) for weight in weights]
        # The share is kept, not what was gathered.
        ctx.save_for_backward(x, *weights)
        if beside and sequence:
            return tuple(gather_products(x, [weight.t() for weight in weights], group)[0])
        whole = gather(x, group) if sequence else x
        results = tuple(forward_product(whole, weight, multiply) for weight in weights)
        return (*results, x.view_as(x)) if hands_on else results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        gathering = _start_gather(x, ctx.group) if ctx.sequence else None
        grad_x = None
        if ctx.hands_on:
            *grads, passed = grads  # type: ignore[assignment]
            # All ranks have the same, and it counts once in the sum.
            grad_x = passed if torch.distributed.get_rank(ctx.group) == 0 else None
        for grad, weight in zip(grads, weights, strict=True):
            grad_x = input_gradient(grad, weight, ctx.multiply, grad_x)
        assert grad_x is not None
        whole = _end_gather(*gathering) if gathering is not None else x
        if ctx.sequence:
            total, work = _start_scatter(grad_x, ctx.group)
        else:
            total = grad_x.contiguous()
            work = torch.distributed.all_reduce(total, group=ctx.group, async_op=True)
        # Frozen matrices ask for none.
        wanted = zip(grads, ctx.totals, ctx.needs_input_grad[6:], strict=True)
        grad_weights = [weight_gradient(whole, grad, into) if needed else None for grad, into, needed in wanted]
        work.wait()
        return total, None, None, None, None, None, *grad_weights


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, in_place: bool) -> Tensor:
        if in_place and x.is_contiguous():
            ctx.mark_dirty(x)
        else:
            x = x.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


class _SumAndScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        share, work = _start_scatter(x, group)
        work.wait()
        return share

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return gather(grad, ctx.group), None


class _GatherForAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return gather(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ranks, rank = torch.distributed.get_world_size(ctx.group), torch.distributed.get_rank(ctx.group)
        return grad.chunk(ranks, 1)[rank].contiguous(), None


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # In fp32 and in one message.
        packed = torch.cat([grad.flatten().float() for grad in grads])
        torch.distributed.all_reduce(packed, group=ctx.group)
        parts = packed.split([grad.numel() for grad in grads])
        return None, *(part.view_as(grad).to(grad.dtype) for part, grad in zip(parts, grads, strict=True))


class LowRank(nn.Module):
    """Stands in for a frozen weight W [out, in]: x -> x (W + scale * up down)^T. See `train.model.lora`.

    down: [rank, in], up: [out, rank]; the one that the ranks do not divide has a part of its gradient on each of them,
    and where they divide neither, both do.
    """

    def __init__(self, weight: nn.Parameter, down: nn.Parameter, up: nn.Parameter, scale: float, group: Any) -> None:
        """Every parameter carries its layout."""
        super().__init__()
        self.weight, self.down, self.up, self.scale, self._group = weight, down, up, scale, group
        self._cut: int | None = weight.placement.dim  # type: ignore[attr-defined]

    def pair(self) -> tuple[Tensor, Tensor]:
        """down and up, with their gradients summed over the ranks as they must be."""
        down: Tensor = self.down if self._cut == 1 else sum_gradients(self._group, self.down)[0]
        up: Tensor = self.up if self._cut == 0 else sum_gradients(self._group, self.up)[0]
        return down, up

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]; under column parallelism `column_parallel` does it instead, for x's gradient."""
        down, up = self.pair()
        return F.linear(x, self.weight) + self.scale * F.linear(F.linear(x, down), up)


def product(x: Tensor, weight: Weight, multiply: Multiply | None = None) -> Tensor:
    """x [..., in] times a weight [out, in], or what stands in for one (`train.model.quantised`): [..., out].

    multiply: see `kernels.linear`; what stands in for a weight has a product of its own.
    """
    result: Tensor = weight(x) if isinstance(weight, nn.Module) else linear(x, weight, multiply)
    return result


def column_parallel(
    x: Tensor,
    *weights: Weight,
    group: Any,
    sequence: bool = False,
    beside: bool = False,
    handing_on: bool = False,
    multiply: Multiply | None = None,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """x times this rank's rows of each weight [out / ranks, in]: a [B,S,out / ranks] for each; and x again.

    x: [B,S,in], or with `sequence` this rank's share [B,S / ranks,in]; gathered once for all weights, with
    `beside` while this rank's rows are multiplied. handing_on: whether the products may add their gradients of x in
    place to that of who reads it next (`kernels.linear.linear_and_input`); not done on shares. multiply: see
    `kernels.linear`.
    """
    if group is not None and all(isinstance(weight, Tensor | LowRank) for weight in weights):
        hands_on = handing_on and not sequence and torch.is_grad_enabled()
        multiply = multiply if torch.is_grad_enabled() else None
        return _with_ranks(x, weights, group, sequence, beside, hands_on, multiply)
    whole = gather(x, group) if sequence else x
    results = []
    for weight in weights:
        if handing_on and group is None and isinstance(weight, Tensor):
            result, whole = linear_and_input(whole, weight, multiply)
        else:
            result = product(whole, weight, multiply)
        results.append(result)
    return tuple(results), whole if group is None else x


def _with_ranks(
    x: Tensor,
    weights: tuple[Any, ...],
    group: Any,
    sequence: bool,
    beside: bool,
    hands_on: bool,
    multiply: Multiply | None,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """`column_parallel` with a gradient. Into a low rank all ranks go together with x, out of it each goes alone."""
    pairs = [weight.pair() if isinstance(weight, LowRank) else None for weight in weights]
    tensors: list[Tensor] = []
    for weight, pair in zip(weights, pairs, strict=True):
        tensors += [weight] if pair is None else [weight.weight, pair[0]]
    found = iter(_ColumnParallel.apply(x, group, sequence, beside, hands_on, multiply, *tensors))
    results = []
    for weight, pair in zip(weights, pairs, strict=True):
        result = next(found)
        results.append(result if pair is None else result + weight.scale * F.linear(next(found), pair[1]))
    return tuple(results), next(found, x)


def row_parallel(
    x: Tensor,
    weight: Weight,
    *,
    group: Any,
    sequence: bool = False,
    beside: bool = False,
    multiply: Multiply | None = None,
) -> Tensor:
    """This rank's columns: x [B,S,in / ranks] times [out, in / ranks], summed over the ranks.

    Returns [B,S,out], or with `sequence` this rank's share [B,S / ranks,out]; with `beside` summed while the next rows
    are multiplied. multiply: see `kernels.linear`.
    """
    if beside and group is not None and isinstance(weight, Tensor):
        result: Tensor = (RowParallel if sequence else RowParallelWhole).apply(x, weight, group)
        return result
    return sum_over_ranks(product(x, weight, multiply), group, sequence=sequence, in_place=True)


def sum_over_ranks(x: Tensor, group: Any, *, sequence: bool = False, in_place: bool = False) -> Tensor:
    """The sum of x [B,S,…] over the group, or with `sequence` this rank's share of it. group None: x itself.

    in_place: whether nobody else reads x, not even the backward pass of what made it.
    """
    if group is None:
        return x
    return _SumAndScatter.apply(x, group) if sequence else _SumOverRanks.apply(x, group, in_place)


def gather_for_all(x: Tensor, group: Any) -> Tensor:
    """The whole sequence [B,S,…] of x [B,S / ranks,…], for work that all ranks share.

    Each rank's gradient of the result must be whole already, as `linear_cross_entropy`'s is; its own share is kept.
    """
    return _GatherForAll.apply(x, group)


def sum_gradients(group: Any, *tensors: Any) -> tuple[Any, ...]:
    """The tensors themselves, whose gradients are summed over the group in one message.

    None, and what stands in for a weight, stay what they are.
    """
    present = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
    if group is None or not present:
        return tensors
    passed = iter(_SumGradients.apply(group, *present))
    return tuple(next(passed) if isinstance(tensor, Tensor) else tensor for tensor in tensors)


def gather(x: Tensor, group: Any) -> Tensor:
    """[B,S / ranks,…] of every rank put together in rank order: [B,S,…]. No gradient."""
    return _end_gather(*_start_gather(x, group))


def _start_gather(x: Tensor, group: Any) -> tuple[Tensor, Any]:
    ranks = torch.distributed.get_world_size(group)
    parts = x.new_empty((ranks * x.shape[0], *x.shape[1:]))
    work = torch.distributed.all_gather_into_tensor(parts, x.contiguous(), group=group, async_op=True)
    return parts.unflatten(0, (ranks, -1)), work


def _end_gather(parts: Tensor, work: Any) -> Tensor:
    work.wait()
    return parts.movedim(0, 1).flatten(1, 2)


def _start_scatter(x: Tensor, group: Any) -> tuple[Tensor, Any]:
    """This rank's share [B,S / ranks,…] of the sum of x [B,S,…], once the work is done."""
    ranks = torch.distributed.get_world_size(group)
    # Each rank's share in one piece; a copy where a batch holds more than one sequence.
    shares = x.unflatten(1, (ranks, -1)).movedim(1, 0).contiguous()
    share = torch.empty_like(shares[0])
    return share, torch.distributed.reduce_scatter_tensor(share, shares.flatten(0, 1), group=group, async_op=True)
