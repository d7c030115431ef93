"""One decoding step of attention: store a token's key and value, then attend over the slots of the cache.

    K[row, place] = key,  V[row, place] = value
    P = softmax(scale · q Kᵀ) over the slots [attend_from, attend_to),  out = P V

One query a row reads the whole cache of its row, so the step is bound by memory: least bytes 2·A·D·e for A visible
(slot, kv head) pairs of e-byte values. Two things differ from the training kernel: rows are few and keys many, so the
keys of one row are shared out among several programs (flash decoding: Dao et al. 2023, "Flash-Decoding for long-context
inference"), and the query heads of a group share one pass over their keys.

This file: the reference. Softmax and sums are float32.

Shapes: q [rows, 1, heads, dim] · key, value [rows, 1, kv_heads, dim] · keys, values [rows, slots, kv_heads, dim].
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.checks import require_device, require_dtype, require_float, require_shape
from kernels.interval_attention import interval_attention


def check(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    place: Tensor,
    attend_from: Tensor,
    attend_to: Tensor,
) -> None:
    """Raise a ValueError on a wrong shape, dtype or device; see `decode_attention`."""
    op = "decode_attention"
    require_float(op, q=q)
    if q.dim() != 4 or q.shape[1] != 1 or keys.dim() != 4:
        raise ValueError(
            f"{op}: q has shape {list(q.shape)}, keys {list(keys.shape)}; expected [rows, 1, heads, head_dim] and "
            "[rows, slots, kv_heads, head_dim]"
        )
    rows, _, heads, dim = q.shape
    slots, kv_heads = keys.shape[1], keys.shape[2]
    for name, tensor, shape in (
        ("key", key, (rows, 1, kv_heads, dim)),
        ("value", value, (rows, 1, kv_heads, dim)),
        ("keys", keys, (rows, slots, kv_heads, dim)),
        ("values", values, (rows, slots, kv_heads, dim)),
    ):
        require_dtype(op, name, tensor, q.dtype)
        require_shape(op, name, tensor, shape)
        require_device(op, q.device, **{name: tensor})
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"{op}: {heads} query heads do not divide over {kv_heads} key-value heads")
    for name, vector in (("place", place), ("attend_from", attend_from), ("attend_to", attend_to)):
        require_dtype(op, name, vector, torch.int32)
        require_shape(op, name, vector, (rows, 1))
        require_device(op, q.device, **{name: vector})


def decode_attention(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    place: Tensor,
    attend_from: Tensor,
    attend_to: Tensor,
    *,
    scale: float,
) -> Tensor:
    """Attention of one new token a row, the PyTorch reference.

    q, key, value: the token's. keys, values: the cache, written at `place`. place, attend_from, attend_to: int32
    [rows, 1]; place lies in [0, slots), and what the interval reaches beyond the slots is ignored. Returns
    [rows, 1, heads, dim] in q's dtype, 0 for an empty interval. No gradient. Raises ValueError on a wrong shape, dtype
    or device.
    """
    check(q, key, value, keys, values, place, attend_from, attend_to)
    row = torch.arange(q.shape[0], device=q.device)[:, None]
    keys[row, place] = key
    values[row, place] = value
    return interval_attention(q, keys, values, attend_from, attend_to, scale=scale)[0]
