"""Chunked linear cross entropy; maths, arguments and the reference are in `linear_cross_entropy.py`.

The three matrix products are the vendor's; between them two Triton kernels: one reads a chunk of float32 logits for the
rows' maximum, Σexp and target logit, the other turns the same memory into half-precision d logits in place. The
gradients of hidden and weight are made in the forward, while a chunk's logits exist, for an output gradient of 1, and
scaled by the real one in the backward: three products instead of four, and one chunk of logits instead of all.
Largest extra memory: CHUNK_BYTES of logits beside weight's float32 gradient.

In float16 the d logits are multiplied by 1024 / max loss_weight, which the scaling in the backward takes out again:
softmax times a weight of 1/targets would be subnormal there.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton kernels and what torch.library calls back take no annotations

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from kernels.linear import main_grad, product32
from kernels.linear_cross_entropy import check, sums_by_group

CHUNK_BYTES = 1200 * 2**20
BLOCK = 4096
WARPS = 8


@triton.jit
def _capped(logits, softcap, SOFTCAP: tl.constexpr):
    if SOFTCAP:
        return softcap * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * logits / softcap)))
    return logits


@triton.jit
def _statistics_kernel(
    logits, local, top, sums, vocab, row_stride, rows_total, softcap, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr
):
    """A row's maximum, Σ exp(z − maximum) and target logit (0 for local < 0: another rank's). One program a row."""
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * row_stride
    column = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        z = tl.load(base + start + column, mask=start + column < vocab, other=float("-inf"))
        z = tl.where(start + column < vocab, _capped(z, softcap, SOFTCAP), float("-inf"))
        new = tl.maximum(best, z)
        safe = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(best - safe) + tl.exp(z - safe)
        best = new
    peak = tl.max(best, 0)
    tl.store(top + row, peak)
    tl.store(sums + row, tl.sum(total * tl.exp(best - peak), 0))
    target = tl.load(local + row)
    z = tl.load(base + tl.maximum(target, 0)).to(tl.float32)
    tl.store(sums + rows_total + row, tl.where(target >= 0, _capped(z, softcap, SOFTCAP), 0.0))


@triton.jit
def _gradient_kernel(
    logits, out, local, lse, weights, boost, z_factor, vocab, row_stride, out_stride, softcap,
    SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """d loss / d logits of a row, written in the output dtype over the row's own memory, front to back.

    Block b writes bytes before those that block b + 1 reads; within the first block reads and writes overlap, hence the
    barrier.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    row_lse = tl.load(lse + row)
    weight = tl.load(weights + row) * tl.load(boost)
    target = tl.load(local + row)
    on_softmax = weight * (1.0 + z_factor * row_lse)
    for start in range(0, vocab, BLOCK):
        mask = start + column < vocab
        z = _capped(tl.load(logits + row * row_stride + start + column, mask=mask, other=0.0), softcap, SOFTCAP)
        grad = on_softmax * tl.exp(z - row_lse) - tl.where(start + column == target, weight, 0.0)
        if SOFTCAP:
            grad *= 1.0 - (z / softcap) * (z / softcap)
        grad = tl.where(weight > 0.0, grad, 0.0)
        tl.debug_barrier()
        tl.store(out + row * out_stride + start + column, grad.to(out.dtype.element_ty), mask=mask)


class _LinearCrossEntropy(torch.autograd.Function):
    """(hidden, weight) → (loss, z_loss, row losses), the gradients made on the way."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        loss_weight: Tensor,
        tp_group: dist.ProcessGroup | None,
        z_loss: float,
        softcap: float,
        weight_shrink: float,
        wants_gradients: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens, vocab = hidden.shape[0], weight.shape[0]
        start = 0 if tp_group is None else dist.get_rank(tp_group) * vocab
        local = targets - start
        local = local.masked_fill((local < 0) | (local >= vocab), -1)
        weights = loss_weight.float().contiguous()
        boost = weights.new_ones(())
        if hidden.dtype == torch.float16 and tokens:
            boost = 1024.0 / weights.max().clamp(min=torch.finfo(torch.float32).tiny * 2048)
        needs_hidden, needs_weight = (wants_gradients and need for need in ctx.needs_input_grad[:2])
        lse, row_loss = (torch.empty(tokens, dtype=torch.float32, device=hidden.device) for _ in range(2))
        d_hidden = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device) if needs_hidden else None
        d_weight: Tensor | None = None
        step = max(1, min(tokens, CHUNK_BYTES // (4 * vocab)))
        step = max(step // 128 * 128, min(step, 128))
        softcapped = {"SOFTCAP": softcap != 0.0, "BLOCK": BLOCK, "num_warps": WARPS}
        for rows in (slice(first, min(first + step, tokens)) for first in range(0, tokens, step)):
            part = hidden[rows]
            logits = product32(part, weight.t())
            count = part.shape[0]
            top, sums = weights.new_empty(count), weights.new_empty(2, count)
            _statistics_kernel[(count,)](
                logits, local[rows], top, sums, vocab, logits.stride(0), count, softcap or 1.0, **softcapped
            )
            if tp_group is not None:
                local_top = top.clone()
                dist.all_reduce(top, dist.ReduceOp.MAX, group=tp_group)
                sums[0].mul_((local_top - top).exp_())
                dist.all_reduce(sums, group=tp_group)
            torch.add(top, sums[0].log(), out=lse[rows])
            torch.sub(lse[rows], sums[1], out=row_loss[rows])
            if not (needs_hidden or needs_weight):
                continue
            d_logits = logits.view(hidden.dtype)[:, :vocab]
            _gradient_kernel[(count,)](
                logits, d_logits, local[rows], lse[rows], weights[rows], boost, 2.0 * z_loss, vocab,
                logits.stride(0), d_logits.stride(0), softcap or 1.0, **softcapped,
            )  # fmt: skip
            if d_hidden is not None:
                d_hidden[rows] = product32(d_logits, weight)
            if needs_weight:
                d_weight = product32(d_logits.t(), part, d_weight)
            del logits, d_logits
        loss = (row_loss.double() * weights.double()).masked_fill_(weights <= 0, 0.0).sum().float()
        z = loss.new_zeros(())
        if z_loss:
            z = (lse.double().square() * weights.double()).masked_fill_(weights <= 0, 0.0).sum().mul_(z_loss).float()
        if needs_weight and d_weight is None:
            d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        ctx.save_for_backward(d_hidden, d_weight, boost)
        ctx.options = (tp_group, z_loss, weight_shrink, hidden.dtype, weight.dtype)
        ctx.total = main_grad(weight)
        ctx.mark_non_differentiable(row_loss)
        return loss, z, row_loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, grad_z: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight, boost = ctx.saved_tensors
        tp_group, z_loss, weight_shrink, hidden_dtype, weight_dtype = ctx.options
        if z_loss:
            torch._assert_async((grad_z == grad_loss).all(), "linear_cross_entropy: add z_loss to loss with factor 1")
        factor = grad_loss / boost
        if d_hidden is not None:
            d_hidden = d_hidden * factor
            if tp_group is not None:
                dist.all_reduce(d_hidden, group=tp_group)
            d_hidden = d_hidden.to(hidden_dtype)
        if d_weight is not None and ctx.total is not None:
            torch.addcmul(ctx.total, d_weight, factor * weight_shrink, out=ctx.total)
            d_weight = None
        elif d_weight is not None:
            out = torch.empty(d_weight.shape, dtype=weight_dtype, device=d_weight.device)
            d_weight = torch.mul(d_weight, factor * weight_shrink, out=out)
        return d_hidden, d_weight, None, None, None, None, None, None, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss_weight: Tensor,
    *,
    groups: Tensor | None = None,
    num_groups: int = 64,
    tp_group: dist.ProcessGroup | None = None,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    weight_shrink: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted cross entropy of a linear head in chunks; see `kernels.linear_cross_entropy.linear_cross_entropy`.

    Where z_loss is set, its output must be added to the loss with factor 1 (asserted on the device): both gradients are
    made in one pass. A second backward through the same graph is possible, a double backward is not.
    """
    check(hidden, weight, targets, loss_weight, groups, z_loss, softcap)
    grads = torch.is_grad_enabled()  # inside an autograd function it is always off
    loss, z, row_loss = _LinearCrossEntropy.apply(
        hidden.contiguous(), weight, targets, loss_weight, tp_group, z_loss, softcap, weight_shrink, grads
    )
    return loss, z, sums_by_group(row_loss, loss_weight, groups, num_groups)
