"""Bias + activation of the feed-forward layer, gated or not.

    geglu      y = x + bias, [linear; gate] = y:  out = linear ⊙ GELU(gate)   (Shazeer 2020; exact erf)
    swiglu     the same halves:                   out = linear ⊙ SiLU(gate)
    gelu       out = GELU(x + bias), exact erf
    gelu_tanh  out = GELU(x + bias), tanh approximation (ChatGLM-6B)

The first half is linear and the second the gate, for both gated kinds (GLM-130B's order). Checkpoints that put the
gate first, as ChatGLM2's SwiGLU does, are swapped when they are read. In a tensor-parallel shard each rank holds its
own [linear; gate].

The activation is computed in float32. Least bytes, n output elements of e bytes: gated forward 3·n·e, backward 5·n·e
(x again, dout, dx); not gated 2·n·e and 3·n·e.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kernels.checks import accumulation_dtype, require_choice, require_device, require_float, require_shape

GATED = ("geglu", "swiglu")
KINDS = (*GATED, "gelu", "gelu_tanh")


def check(x: Tensor, bias: Tensor | None, kind: str) -> None:
    """Raise a ValueError on a wrong shape, dtype or device; see `bias_activation`."""
    op = "bias_activation"
    require_choice(op, "kind", kind, KINDS)
    require_float(op, x=x, bias=bias)
    require_device(op, x.device, bias=bias)
    if kind in GATED and x.shape[-1] % 2:
        raise ValueError(f"{op}: x has shape {list(x.shape)}; kind={kind!r} needs an even last dimension")
    if bias is not None:
        require_shape(op, "bias", bias, (x.shape[-1],))


def bias_activation(x: Tensor, bias: Tensor | None, *, kind: str) -> Tensor:
    """activation(x + bias), the PyTorch reference.

    x: [..., features] ([..., 2·features] for a gated kind). bias: [the same last dimension], any float dtype, or None.
    Returns [..., features] in x's dtype. Raises ValueError on a wrong shape, dtype or device.
    """
    check(x, bias, kind)
    inner = accumulation_dtype(x.dtype)
    y = x.to(inner)
    if bias is not None:
        y = y + bias.to(inner)
    if kind == "gelu":
        out = F.gelu(y)
    elif kind == "gelu_tanh":
        out = F.gelu(y, approximate="tanh")
    else:
        linear, gate = y.chunk(2, dim=-1)
        out = linear * (F.gelu(gate) if kind == "geglu" else F.silu(gate))
    return out.to(x.dtype)
