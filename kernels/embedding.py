"""Token embedding with gradient shrink (EGS), of one vocabulary shard.

    out = E·α + stop_gradient(E)·(1 − α)      (GLM-130B, arXiv 2210.02414, section 3.3)

that is, the lookup as ever and α times its gradient. Written as the formula it would pass over the whole table twice;
here α multiplies the gradient rows of the looked-up tokens before they are added into the table's gradient.
α may change every step (a schedule): it is an argument, not state. A table with `main_grad` (`kernels.linear`) has only
those rows of it touched; no gradient of the whole table is made.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.checks import require_dtype, require_float
from kernels.linear import main_grad


class _ShrinkGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by α."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: float) -> Tensor:
        ctx.alpha = alpha
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.alpha, None


class _Lookup(torch.autograd.Function):
    """Rows of a table; their gradients go to its `main_grad`, in an order that repeats."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.total = main_grad(weight)
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[None, None]:
        (tokens,) = ctx.saved_tensors
        index, rows = tokens.flatten(), dout.flatten(0, -2).to(ctx.total.dtype)
        # Of the two, the one whose order of additions is fixed: on a CPU index_put_ adds by many threads at once, on a
        # GPU index_add_ does.
        if ctx.total.device.type == "cpu":
            ctx.total.index_add_(0, index, rows)
        else:
            ctx.total.index_put_((index,), rows, accumulate=True)
        return None, None


def embedding(tokens: Tensor, weight: Tensor, *, shrink: float = 1.0, vocab_start: int | None = None) -> Tensor:
    """Rows of a table, or of one shard of it.

    tokens: int64 [...], global ids. weight: [vocab_local, hidden]. shrink: the α of EGS, 1 for none.
    vocab_start: the first id of this shard; ids outside the shard give zeros (and no gradient), and the caller adds
    the shards up over the tensor-parallel group. None: the table is whole, and an id outside it is an IndexError (CPU).
    Returns [..., hidden] in weight's dtype. Raises ValueError on a wrong dtype or shape.
    """
    require_dtype("embedding", "tokens", tokens, torch.int64)
    require_float("embedding", weight=weight)
    if weight.dim() != 2:
        raise ValueError(f"embedding: weight has shape {list(weight.shape)}; expected [vocab, hidden]")
    if tokens.device != weight.device:
        raise ValueError(f"embedding: tokens is on {tokens.device} but weight on {weight.device}")
    outside = None
    if vocab_start is not None:
        tokens = tokens - vocab_start
        outside = (tokens < 0) | (tokens >= weight.shape[0])
        tokens = tokens.masked_fill(outside, 0)
    summed = main_grad(weight) is not None and torch.is_grad_enabled()
    out = _Lookup.apply(tokens, weight) if summed else F.embedding(tokens, weight)
    if outside is not None:
        out = out.masked_fill(outside[..., None], 0.0)
    if shrink != 1.0:
        out = _ShrinkGradient.apply(out, shrink)
    return out
