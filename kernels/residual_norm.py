"""Residual + norm: sum = α·x + drop(f + bias), out = norm(sum).

DeepNorm's residual with shifted norms (Wang et al. 2022, "DeepNet"; GLM-130B, arXiv 2210.02414, section 2.2): the
residual x is itself the previous norm's output, so one pass reads x and f and writes the next layer's input.
Pre-norm models ask for the sum too and carry it on. Without f it is a plain norm.

    LayerNorm  out = (sum − mean) / √(var + ε) · weight + norm_bias
    RMSNorm    out = sum / √(mean(sum²) + ε) · weight            (Zhang & Sennrich 2019)

Statistics and the sum are float32 whatever the inputs (float64 for float64).
Least bytes, n elements of e bytes: forward 3·n·e (x, f, out), backward 5·n·e (x, f, dout, dx, df).
"""

from __future__ import annotations

from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.checks import accumulation_dtype, require_choice, require_device, require_float, require_shape
from kernels.random import Dropout, active, drop_hidden

KINDS = ("layernorm", "rmsnorm")


def check(
    x: Tensor,
    f: Tensor | None,
    bias: Tensor | None,
    weight: Tensor,
    norm_bias: Tensor | None,
    kind: str,
    dropout: Dropout | None,
) -> None:
    """Raise a ValueError on a wrong shape, dtype or device; see `residual_norm`."""
    op = "residual_norm"
    hidden = x.shape[-1]
    require_choice(op, "kind", kind, KINDS)
    require_float(op, x=x, f=f, bias=bias, weight=weight, norm_bias=norm_bias)
    require_device(op, x.device, f=f, bias=bias, weight=weight, norm_bias=norm_bias)
    require_shape(op, "weight", weight, (hidden,))
    if f is not None:
        require_shape(op, "f", f, tuple(x.shape))
        if f.dtype != x.dtype:
            raise ValueError(f"{op}: f is {f.dtype} but x is {x.dtype}; use one dtype for both")
    elif bias is not None or active(dropout) is not None:
        raise ValueError(f"{op}: bias and dropout belong to f, and f is None")
    if bias is not None:
        require_shape(op, "bias", bias, (hidden,))
    if norm_bias is not None:
        if kind == "rmsnorm":
            raise ValueError(f"{op}: norm_bias is given but kind='rmsnorm' has none")
        require_shape(op, "norm_bias", norm_bias, (hidden,))
    if (dropout := active(dropout)) is not None:
        if x.dim() != 3:
            raise ValueError(f"{op}: x has shape {list(x.shape)}; dropout needs [batch, positions, hidden]")
        require_shape(op, "dropout.sample_index", dropout.sample_index, (x.shape[0],))
        require_device(op, x.device, **{"dropout.sample_index": dropout.sample_index})


@overload
def residual_norm(
    x: Tensor,
    f: Tensor | None,
    bias: Tensor | None,
    weight: Tensor,
    norm_bias: Tensor | None,
    *,
    alpha: float = ...,
    eps: float = ...,
    kind: str = ...,
    dropout: Dropout | None = ...,
    return_sum: Literal[False] = ...,
) -> Tensor: ...


@overload
def residual_norm(
    x: Tensor,
    f: Tensor | None,
    bias: Tensor | None,
    weight: Tensor,
    norm_bias: Tensor | None,
    *,
    alpha: float = ...,
    eps: float = ...,
    kind: str = ...,
    dropout: Dropout | None = ...,
    return_sum: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def residual_norm(
    x: Tensor,
    f: Tensor | None,
    bias: Tensor | None,
    weight: Tensor,
    norm_bias: Tensor | None,
    *,
    alpha: float = 1.0,
    eps: float = 1e-5,
    kind: str = "layernorm",
    dropout: Dropout | None = None,
    return_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """norm(α·x + drop(f + bias)), the PyTorch reference.

    x, f: [..., hidden] of one dtype ([batch, positions, hidden] with dropout). bias, weight, norm_bias: [hidden], any
    float dtype. f None: a plain norm of α·x. Returns out in x's dtype, or (out, sum) with `return_sum`; gradients
    flow through both. Raises ValueError on a wrong shape, dtype or device.
    """
    check(x, f, bias, weight, norm_bias, kind, dropout)
    inner = accumulation_dtype(x.dtype)
    total = x.to(inner)
    if f is not None:
        branch = f.to(inner)
        if bias is not None:
            branch = branch + bias.to(inner)
        total = torch.add(drop_hidden(branch, dropout), total, alpha=alpha)
    elif alpha != 1.0:
        total = total * alpha
    if kind == "layernorm":
        shift = None if norm_bias is None else norm_bias.to(inner)
        out = F.layer_norm(total, total.shape[-1:], weight.to(inner), shift, eps)
    else:
        out = F.rms_norm(total, total.shape[-1:], weight.to(inner), eps)
    out = out.to(x.dtype)
    return (out, total.to(x.dtype)) if return_sum else out
