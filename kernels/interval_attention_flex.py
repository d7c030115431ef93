"""Interval attention by FlexAttention, with a block mask made from the same two vectors (CUDA; no backward on the CPU).

The block mask belongs to the vectors, not to a layer: it is made once for a batch and found again by identity.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.interval_attention import check, empty_queries
from kernels.random import Dropout, active

_last: tuple[Any, ...] | None = None  # (weak references to the vectors, their versions, keys, block mask)


@functools.cache
def _compiled() -> tuple[Callable[..., Any], Callable[..., Any]]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return torch.compile(flex_attention, dynamic=False), torch.compile(create_block_mask, dynamic=False)


def _block_mask(attend_from: Tensor, attend_to: Tensor, keys: int) -> Any:
    """The block mask of these vectors, kept for the next layer of the same batch."""
    global _last
    version = (attend_from._version, attend_to._version, keys)
    if _last and _last[0]() is attend_from and _last[1]() is attend_to and _last[2] == version:
        return _last[3]

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= attend_from[batch, query]) & (key < attend_to[batch, query])

    size, queries = attend_from.shape
    mask = _compiled()[1](visible, size, None, queries, keys, device=attend_from.device)
    _last = (weakref.ref(attend_from), weakref.ref(attend_to), version, mask)
    return mask


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
) -> tuple[Tensor, Tensor, None]:
    """Interval attention by FlexAttention; see `kernels.interval_attention.interval_attention`.

    No dropout and no max_logit: a ValueError. alpha changes nothing, scores are float32.
    """
    check(q, k, v, attend_from, attend_to, softcap, dropout)
    if active(dropout) is not None or want_max_logit:
        raise ValueError("interval_attention: flex has no dropout or max_logit; set kernels.interval_attention")

    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    out, lse = _compiled()[0](
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        score_mod=capped if softcap else None,
        block_mask=_block_mask(attend_from, attend_to, k.shape[1]),
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
        return_lse=True,
    )
    empty = empty_queries(attend_from, attend_to, k.shape[1])
    out = out.transpose(1, 2).masked_fill(empty[..., None, None], 0.0)
    return out, lse.detach().masked_fill(empty[:, None], -torch.inf), None
