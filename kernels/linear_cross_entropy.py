"""Output head and cross entropy in one, never holding all logits.

    z = softcap(hidden · Wᵀ),  lse = log Σ_v exp z_v,  CE = lse − z_target
    loss = Σ_t loss_weight_t · CE_t         z_loss = coefficient · Σ_t loss_weight_t · lse_t²   (PaLM, section 5)

    d loss / d z = loss_weight · (softmax(z) − onehot)
    d z_loss / d z = 2 · coefficient · loss_weight · lse · softmax(z)

Vocabulary-parallel: rank r of the tensor-parallel group owns rows [r·V_local, (r+1)·V_local) of the table. Each rank
takes maximum, Σexp and target logit over its own rows, and two all-reduces of [tokens] floats join them (Shoeybi et al.
2019, Megatron-LM, section 3). Logits, softmax and sums are float32; row losses are added up in float64, so that the
loss does not depend on how tokens are split over micro-batches by more than its last rounding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.checks import accumulation_dtype, require_device, require_dtype, require_float, require_shape

# probabilities of a chunk are kept for the backward up to this many elements in all (64 MiB of float32), and chunks are
# made no larger than this; beyond it the backward computes a chunk's logits again
KEPT_ELEMENTS = 1 << 24


def check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss_weight: Tensor,
    groups: Tensor | None,
    z_loss: float,
    softcap: float,
) -> None:
    """Raise a ValueError on a wrong shape, dtype, device or option; see `linear_cross_entropy`."""
    op = "linear_cross_entropy"
    require_float(op, hidden=hidden, weight=weight, loss_weight=loss_weight)
    require_dtype(op, "targets", targets, torch.int64)
    require_device(op, hidden.device, weight=weight, targets=targets, loss_weight=loss_weight, groups=groups)
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{op}: hidden has shape {list(hidden.shape)}, weight {list(weight.shape)}; "
            "expected [tokens, hidden] and [vocab, hidden]"
        )
    if hidden.dtype != weight.dtype:
        raise ValueError(f"{op}: hidden is {hidden.dtype} but weight {weight.dtype}; use one dtype for both")
    require_shape(op, "targets", targets, (hidden.shape[0],))
    require_shape(op, "loss_weight", loss_weight, (hidden.shape[0],))
    if groups is not None:
        require_dtype(op, "groups", groups, torch.uint8)
        require_shape(op, "groups", groups, (hidden.shape[0],))
    if z_loss < 0.0 or softcap < 0.0:
        raise ValueError(f"{op}: z_loss={z_loss}, softcap={softcap}; use positive values, or 0 for none")


def _logits(hidden: Tensor, weight: Tensor, softcap: float) -> Tensor:
    """float32 logits of some rows. [rows, vocab_local]"""
    inner = accumulation_dtype(hidden.dtype)
    if hidden.is_cuda and hidden.dtype in (torch.float16, torch.bfloat16):
        logits = torch.mm(hidden, weight.t(), out_dtype=torch.float32)  # exact products, float32 sums
    else:
        logits = torch.mm(hidden.to(inner), weight.to(inner).t())
    return torch.tanh(logits.div_(softcap)).mul_(softcap) if softcap else logits


class _LinearCrossEntropy(torch.autograd.Function):
    """Row losses and log-sum-exps: (hidden, weight) → (loss, z_loss, CE of each row detached)."""

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
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens, vocab = hidden.shape[0], weight.shape[0]
        start = 0 if tp_group is None else dist.get_rank(tp_group) * vocab
        local = targets - start
        owned = (local >= 0) & (local < vocab)
        local = local.masked_fill(~owned, 0)
        inner = accumulation_dtype(hidden.dtype)
        step = max(1, KEPT_ELEMENTS // max(1, vocab))
        keep = tokens <= step and softcap == 0.0  # one chunk: the backward needs no logits again
        top = torch.empty(tokens, dtype=inner, device=hidden.device)
        sums = torch.empty(2, tokens, dtype=inner, device=hidden.device)  # Σexp, target logit
        exponentials = None
        for rows in (slice(first, first + step) for first in range(0, tokens, step)):
            logits = _logits(hidden[rows], weight, softcap)
            sums[1, rows] = logits.gather(1, local[rows, None]).squeeze(1)
            torch.amax(logits, dim=1, out=top[rows])
            exponentials = logits.sub_(top[rows, None]).exp_()
            torch.sum(exponentials, dim=1, out=sums[0, rows])
        local_top = top
        sums[1].masked_fill_(~owned, 0.0)
        if tp_group is not None:
            top = top.clone()
            dist.all_reduce(top, dist.ReduceOp.MAX, group=tp_group)
            sums[0].mul_((local_top - top).exp())
            dist.all_reduce(sums, group=tp_group)
        lse = top + sums[0].log()
        row_loss = lse - sums[1]
        weights = loss_weight.to(inner)
        loss = (row_loss.double() * weights.double()).sum().to(inner)
        z = (lse.double().square() * weights.double()).sum().mul_(z_loss).to(inner) if z_loss else loss.new_zeros(())
        ctx.save_for_backward(hidden, weight, local, owned, weights, lse, local_top, exponentials if keep else None)
        ctx.options = (tp_group, z_loss, softcap, weight_shrink, step)
        ctx.mark_non_differentiable(row_loss)
        return loss, z, row_loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, grad_z: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, local, owned, weights, lse, local_top, kept = ctx.saved_tensors
        tp_group, z_loss, softcap, weight_shrink, step = ctx.options
        tokens = hidden.shape[0]
        inner = accumulation_dtype(hidden.dtype)
        on_target = weights * grad_loss  # what d z_target loses
        on_softmax = on_target + weights * lse * (2.0 * z_loss * grad_z) if z_loss else on_target
        grad_hidden = torch.empty(hidden.shape, dtype=inner, device=hidden.device) if ctx.needs_input_grad[0] else None
        grad_weight = None
        table = weight.to(inner)
        for rows in (slice(first, first + step) for first in range(0, tokens, step)):
            if kept is not None:
                # kept holds exp(z − local max); a second backward would need it again, so it is not overwritten
                grad_logits = kept * (on_softmax * (local_top - lse).exp())[:, None]
            else:
                logits = _logits(hidden[rows], weight, softcap)
                slope = 1.0 - (logits / softcap).square() if softcap else None
                grad_logits = logits.sub_(lse[rows, None]).exp_().mul_(on_softmax[rows, None])
            target_share = (on_target[rows] * owned[rows]).neg_()
            grad_logits.scatter_add_(1, local[rows, None], target_share[:, None])
            if kept is None and slope is not None:
                grad_logits.mul_(slope)
            if grad_hidden is not None:
                torch.mm(grad_logits, table, out=grad_hidden[rows])
            if ctx.needs_input_grad[1]:
                part = torch.mm(grad_logits.t(), hidden[rows].to(inner))
                grad_weight = part if grad_weight is None else grad_weight.add_(part)
        if grad_hidden is not None:
            if tp_group is not None:
                dist.all_reduce(grad_hidden, group=tp_group)
            grad_hidden = grad_hidden.to(hidden.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight) if grad_weight is None else grad_weight
            grad_weight = (grad_weight.mul_(weight_shrink) if weight_shrink != 1.0 else grad_weight).to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None, None


def sums_by_group(row_loss: Tensor, loss_weight: Tensor, groups: Tensor | None, num_groups: int) -> Tensor:
    """Σ CE and the number of targets of every group: float64 [num_groups, 2], detached.

    A one-hot product rather than a scatter: the order of additions is fixed on every device.
    """
    counted = loss_weight > 0
    pair = torch.stack((row_loss.detach().double().masked_fill(~counted, 0.0), counted.double()), dim=1)
    if groups is None:
        result = pair.new_zeros(num_groups, 2)
        result[0] = pair.sum(0)
        return result
    names = torch.arange(num_groups, device=groups.device, dtype=torch.uint8)
    return (groups[None, :] == names[:, None]).double() @ pair


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
    """Weighted cross entropy of a linear head, the PyTorch reference.

    hidden: [tokens, hidden]; pass only target rows where you can, rows with loss_weight 0 contribute nothing (their
    targets may be anything). weight: [vocab_local, hidden], hidden's dtype. targets: int64 [tokens], global ids.
    loss_weight: float [tokens], ≥ 0, no gradient. groups: uint8 [tokens] < num_groups, or None (all in group 0).
    tp_group: the tensor-parallel group, None for a whole table. **hidden's gradient is all-reduced over tp_group
    inside this operation's backward**: do not reduce it again. softcap: c · tanh(z / c), 0 for none.
    z_loss: coefficient, 0 for none. weight_shrink: EGS's α for a tied table, multiplies weight's gradient.

    Returns loss and z_loss, float32 scalars: add them up yourself (loss is logged alone); and group_sums
    float64 [num_groups, 2], (Σ CE, number of targets with loss_weight > 0), detached. With tp_group every rank gets the
    same three. Raises ValueError on a wrong shape, dtype or device.
    """
    check(hidden, weight, targets, loss_weight, groups, z_loss, softcap)
    if hidden.device.type == "cpu":  # where counting rows costs no synchronisation, idle ones are left out
        rows = (loss_weight > 0).nonzero().squeeze(1)
        if rows.numel() < hidden.shape[0]:
            hidden, targets, loss_weight = hidden[rows], targets[rows], loss_weight[rows]
            groups = None if groups is None else groups[rows]
    loss, z, row_loss = _LinearCrossEntropy.apply(
        hidden, weight, targets, loss_weight, tp_group, z_loss, softcap, weight_shrink
    )
    return loss, z, sums_by_group(row_loss, loss_weight, groups, num_groups)
