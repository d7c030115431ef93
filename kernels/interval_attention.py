"""Attention under interval masks: query q sees the keys [attend_from[q], attend_to[q]).

    P = softmax(softcap(scale · Q Kᵀ)) over the visible keys,  out = dropout(P) V,  lse = log Σ exp

Causal, bidirectional, prefix, blank-infilling and packed masks are all intervals (docs of the batch), so two int32
vectors replace every S×S mask. Softmax in float32; GLM-130B's form of it, softmax(fp32(QKᵀ·scale/α)·α)
(arXiv 2210.02414, section 3.3), keeps half-precision scores small and is the same value where scores are float32.

This file: the references. `reference` (float32 scores, any feature), `unfused` (the scale-mask-softmax that FP32
softmax was the cure for: scores in the compute dtype, softmax in it or in float32, PB-Relax), `sdpa` (torch's own
under a bool mask). The first three build S×S; the Triton kernel beside this file and FlexAttention do not.

Shapes: q [batch, queries, heads, dim] · k, v [batch, keys, kv_heads, dim], head h reads kv head h // (heads/kv_heads).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.checks import accumulation_dtype, require_device, require_dtype, require_float, require_shape
from kernels.random import Dropout, active, keep_attention

Result = tuple[Tensor, Tensor | None, Tensor | None]


def check(
    q: Tensor, k: Tensor, v: Tensor, attend_from: Tensor, attend_to: Tensor, softcap: float, dropout: Dropout | None
) -> None:
    """Raise a ValueError on a wrong shape, dtype, device or option; see `interval_attention`."""
    op = "interval_attention"
    require_float(op, q=q, k=k, v=v)
    require_device(op, q.device, k=k, v=v, attend_from=attend_from, attend_to=attend_to)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(
                f"{op}: {name} has shape {list(tensor.shape)}; expected [batch, positions, heads, head_dim]"
            )
    batch, queries, heads, head_dim = q.shape
    keys, kv_heads = k.shape[1], k.shape[2]
    require_dtype(op, "k", k, q.dtype)
    require_dtype(op, "v", v, q.dtype)
    require_shape(op, "k", k, (batch, keys, kv_heads, head_dim))
    require_shape(op, "v", v, (batch, keys, kv_heads, head_dim))
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"{op}: {heads} query heads do not divide over {kv_heads} key-value heads")
    for name, vector in (("attend_from", attend_from), ("attend_to", attend_to)):
        require_dtype(op, name, vector, torch.int32)
        require_shape(op, name, vector, (batch, queries))
    if softcap < 0.0:
        raise ValueError(f"{op}: softcap={softcap}; use a positive cap, or 0 for none")
    if (dropout := active(dropout)) is not None:
        require_shape(op, "dropout.sample_index", dropout.sample_index, (batch,))
        require_device(op, q.device, **{"dropout.sample_index": dropout.sample_index})


class _UnpackHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor) -> tuple[Tensor, ...]:
        ctx.shape = packed.shape
        return packed.unbind(3)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        whole = grads[0]._base
        if whole is not None and whole.shape == ctx.shape and whole.is_contiguous():
            parts = whole.unbind(3)
            if all(
                grad.data_ptr() == part.data_ptr() and grad.stride() == part.stride()
                for grad, part in zip(grads, parts, strict=True)
            ):
                return whole
        return torch.stack(grads, 3)


def unpack_heads(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views q, k, v [batch, positions, heads, dim] of packed [batch, positions, heads, 3, dim].

    Gradients that lie together in one such tensor, as the Triton kernel's do, are that tensor: nothing is copied.
    """
    query, key, value = _UnpackHeads.apply(packed)
    return query, key, value


def interval_mask(attend_from: Tensor, attend_to: Tensor, num_keys: int) -> Tensor:
    """Boolean mask of the keys each query may attend to.

    attend_from, attend_to: int32 [batch, queries]; query q sees keys in [attend_from[q], attend_to[q]).
    Returns bool [batch, queries, num_keys]. Only tests and the reference paths build it; kernels skip blocks by the
    vectors.
    """
    keys = torch.arange(num_keys, device=attend_from.device, dtype=torch.int32)
    return (keys >= attend_from[..., None]) & (keys < attend_to[..., None])


def visible_keys(attend_from: Tensor, attend_to: Tensor, num_keys: int, prefix: int) -> Tensor:
    """`interval_mask`, and the first `prefix` keys for every query whose interval is not empty."""
    inside = interval_mask(attend_from, attend_to, num_keys)
    if not prefix:
        return inside
    first = torch.arange(num_keys, device=attend_from.device) < prefix
    return inside | (first & ~empty_queries(attend_from, attend_to, num_keys)[..., None])


def empty_queries(attend_from: Tensor, attend_to: Tensor, num_keys: int) -> Tensor:
    """Queries that see no key at all: bool [batch, queries]."""
    return attend_to.clamp(max=num_keys) <= attend_from.clamp(min=0)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """Q Kᵀ without repeating grouped keys: [batch, heads, queries, keys]."""
    batch, queries, heads, head_dim = q.shape
    groups = k.shape[2]
    folded = q.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).reshape(batch, groups, -1, head_dim)
    return torch.matmul(folded, k.permute(0, 2, 3, 1)).view(batch, heads, queries, k.shape[1])


def _mix(probabilities: Tensor, v: Tensor) -> Tensor:
    """P V without repeating grouped values: [batch, queries, heads, dim]."""
    batch, heads, queries, keys = probabilities.shape
    folded = probabilities.view(batch, v.shape[2], -1, keys)
    return torch.matmul(folded, v.transpose(1, 2)).view(batch, heads, queries, -1).transpose(1, 2)


def _max_logit(logits: Tensor, hidden: Tensor) -> Tensor:
    """Largest visible logit of each head before softcap: float32 [heads], detached; −inf where none is visible."""
    return logits.detach().masked_fill(hidden, -torch.inf).amax(dim=(0, 2, 3)).float()


def interval_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attend_from: Tensor,
    attend_to: Tensor,
    *,
    scale: float,
    alpha: float = 1.0,
    softcap: float = 0.0,
    dropout: Dropout | None = None,
    want_max_logit: bool = False,
    prefix: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Interval attention, the PyTorch reference: scores, softmax and sums in float32.

    q, k, v: see the file's head; one dtype. attend_from, attend_to: int32 [batch, queries]; what they reach beyond
    [0, keys) is ignored. scale: factor of Q Kᵀ, usually head_dim^-½. alpha: scores are kept divided by it (see the
    file's head). softcap: c · tanh(score / c), 0 for none. dropout: on the probabilities, `offset` the first head.
    prefix: so many first keys are seen by every query beside its interval (`train.model.prefix`).
    Returns out [batch, queries, heads, dim] in q's dtype; lse [batch, heads, queries] float32; the largest visible
    scaled logit of each head, float32 [heads], or None. lse and max_logit carry no gradient. A query with an empty
    interval gets out 0, lse −inf and gives no gradient. Raises ValueError on a wrong shape, dtype or device.
    """
    check(q, k, v, attend_from, attend_to, softcap, dropout)
    inner = accumulation_dtype(q.dtype)
    logits = _scores(q.to(inner) * (scale / alpha), k.to(inner))
    if alpha != 1.0:
        logits = logits * alpha
    hidden = ~visible_keys(attend_from, attend_to, k.shape[1], prefix)[:, None]
    max_logit = _max_logit(logits, hidden) if want_max_logit else None
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    # a finite fill keeps empty rows free of NaN; they are zeroed at the end, and their gradient with them
    logits = logits.masked_fill(hidden, torch.finfo(inner).min)
    probabilities = torch.softmax(logits, dim=-1)
    empty = empty_queries(attend_from, attend_to, k.shape[1])
    with torch.no_grad():
        # p_max = exp(logit_max − lse): two cheap reductions instead of a second pass of exponentials
        lse = logits.amax(dim=-1) - probabilities.amax(dim=-1).log()
        lse = lse.masked_fill_(empty[:, None], -torch.inf).float()
    if (dropout := active(dropout)) is not None:
        keep = keep_attention(dropout, q.shape[2], q.shape[1], k.shape[1])
        probabilities = probabilities * (keep.to(inner) * dropout.scale)
    out = _mix(probabilities, v.to(inner)).masked_fill(empty[..., None, None], 0.0)
    return out.to(q.dtype), lse, max_logit


def unfused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attend_from: Tensor,
    attend_to: Tensor,
    *,
    scale: float,
    alpha: float = 1.0,
    softcap: float = 0.0,
    dropout: Dropout | None = None,
    want_max_logit: bool = False,
    half_softmax: bool = False,
    pb_relax: bool = False,
    prefix: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The classic scale-mask-softmax, for experiments with its numerics.

    Scores S' = Q·(scale/α) Kᵀ in the compute dtype. The softmax of S'·α runs in float32, or in the compute dtype with
    `half_softmax`: the setting whose failures GLM-130B's FP32 softmax cured. `pb_relax` subtracts each head's largest
    |S'| before multiplying by α (CogView, arXiv 2105.13290, section 2.4), which needs α > 1 to matter.
    Arguments and results else as `interval_attention`. In float16, S' beyond 65504 overflows, and that is the point.
    """
    check(q, k, v, attend_from, attend_to, softcap, dropout)
    scores = _scores(q * (scale / alpha), k)  # S', compute dtype
    hidden = ~visible_keys(attend_from, attend_to, k.shape[1], prefix)[:, None]
    logits = scores if half_softmax else scores.to(accumulation_dtype(q.dtype))
    max_logit = _max_logit(logits * alpha, hidden) if want_max_logit else None
    shift = torch.zeros((), dtype=logits.dtype, device=q.device)
    if pb_relax:
        shift = logits.detach().abs().amax(dim=(2, 3), keepdim=True)
        logits = logits - shift
    if alpha != 1.0:
        logits = logits * alpha
    if softcap:
        logits = softcap * torch.tanh((logits + shift * alpha) / softcap)
        shift = torch.zeros_like(shift)
    logits = logits.masked_fill(hidden, torch.finfo(logits.dtype).min)
    probabilities = torch.softmax(logits, dim=-1)
    empty = empty_queries(attend_from, attend_to, k.shape[1])
    with torch.no_grad():
        lse = logits.amax(dim=-1).float() - probabilities.amax(dim=-1).float().log()
        lse = (lse + (shift * alpha).float().squeeze(-1)).masked_fill_(empty[:, None], -torch.inf)
    probabilities = probabilities.to(q.dtype)
    if (dropout := active(dropout)) is not None:
        keep = keep_attention(dropout, q.shape[2], q.shape[1], k.shape[1])
        probabilities = probabilities * (keep.to(q.dtype) * dropout.scale)
    out = _mix(probabilities, v).masked_fill(empty[..., None, None], 0.0)
    return out, lse, max_logit


def sdpa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attend_from: Tensor,
    attend_to: Tensor,
    *,
    scale: float,
    alpha: float = 1.0,
    softcap: float = 0.0,
    dropout: Dropout | None = None,
    want_max_logit: bool = False,
    prefix: int = 0,
) -> tuple[Tensor, None, None]:
    """torch's scaled_dot_product_attention under the bool mask of the intervals.

    Scores are float32 inside, so alpha changes nothing. No softcap, dropout (torch's has no address), lse or max_logit:
    asking for one is a ValueError. Arguments else as `interval_attention`; lse comes back as None.
    """
    check(q, k, v, attend_from, attend_to, softcap, dropout)
    if softcap or active(dropout) is not None or want_max_logit:
        raise ValueError(
            "interval_attention: sdpa has no softcap, dropout or max_logit; set kernels.interval_attention"
        )
    empty = empty_queries(attend_from, attend_to, k.shape[1])
    # an empty row is given every key, which is finite, and zeroed afterwards together with its gradient
    mask = visible_keys(attend_from, attend_to, k.shape[1], prefix) | empty[..., None]
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask[:, None],
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2).masked_fill(empty[..., None, None], 0.0), None, None
