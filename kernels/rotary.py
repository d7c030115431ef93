"""Bias + rotary positions on the heads of a packed query-key-value projection.

    θ_i = base^(−2i/R), angle = position · θ'_i, (a, b) → (a·cos − b·sin, b·cos + a·sin)    (Su et al. 2021)
    θ'_i = θ_i (1 − r_i) + θ_i r_i / scale, r_i = (i − ramp_from) / (ramp_to − ramp_from) within [0, 1]

r_i is 1 for all pairs unless a ramp is given (YaRN, arXiv 2309.00071: fast pairs keep their θ, slow ones are divided).

Pairs (a, b) are dims (i, i + R/2) of the R rotated dims (rotate-half, GLM-130B), or (2i, 2i + 1) when interleaved
(ChatGLM2). Mode `2d` splits the rotated dims in two: the first half turns by positions[:, 0], the second by
positions[:, 1], each with its own θ over R/2 dims (ChatGLM-6B). Dims from `rotary_dim` on keep their value.

Head n is rotated unless n % period ≥ period − passthrough: with the packed layout [group, (q…, k, v)], period is
queries a group + 2 and passthrough 1, so that values only get their bias.

Angles are float32. `fp16_angles` reproduces GLM-130B's released code (θ, position and angle in float16, up to 0.63 rad
off at position 2047), for loading that model. Least bytes, n elements of e bytes: 2·n·e forward and backward each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.checks import (
    accumulation_dtype,
    require_choice,
    require_device,
    require_dtype,
    require_float,
    require_shape,
)

MODES = ("none", "1d", "2d")


def check(
    x: Tensor, bias: Tensor | None, positions: Tensor, period: int, passthrough: int, rotary_dim: int, mode: str
) -> None:
    """Raise a ValueError on a wrong shape, dtype, device or option; see `rotary`."""
    op = "rotary"
    require_choice(op, "mode", mode, MODES)
    require_float(op, x=x, bias=bias)
    require_device(op, x.device, bias=bias, positions=positions)
    if x.dim() != 4:
        raise ValueError(f"{op}: x has shape {list(x.shape)}; expected [batch, positions, heads, head_dim]")
    batch, length, heads, head_dim = x.shape
    require_dtype(op, "positions", positions, torch.int32)
    require_shape(op, "positions", positions, (batch, 2, length))
    if bias is not None:
        require_shape(op, "bias", bias, (heads * head_dim,))
    if period < 1 or heads % period or not 0 <= passthrough <= period:
        raise ValueError(f"{op}: period={period}, passthrough={passthrough} do not fit {heads} heads")
    step = 4 if mode == "2d" else 2
    if mode != "none" and (not 0 < rotary_dim <= head_dim or rotary_dim % step):
        raise ValueError(f"{op}: rotary_dim={rotary_dim}; use a multiple of {step} up to head_dim={head_dim}")


def rotary_frequencies(
    dims: int, base: float, scale: float, ramp_from: float, ramp_to: float, device: torch.device
) -> Tensor:
    """θ' of the pairs of one axis that rotates `dims` dims, float32 [dims / 2]."""
    exponent = torch.arange(0, dims, 2, dtype=torch.float32, device=device) / dims
    theta = 1.0 / torch.pow(torch.full_like(exponent, base), exponent)
    pair = torch.arange(dims // 2, dtype=torch.float32, device=device)
    share = ((pair - ramp_from) / (ramp_to - ramp_from)).clamp(0, 1)
    return theta * (1 - share) + theta / scale * share


def rotary_angles(
    positions: Tensor,
    *,
    rotary_dim: int,
    mode: str,
    base: float = 10000.0,
    scale: float = 1.0,
    ramp_from: float = -1.0,
    ramp_to: float = 0.0,
    fp16_angles: bool = False,
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every pair's angle.

    positions: int32 [batch, 2, length]. Returns two float32 tensors [batch, length, rotary_dim / 2]; for `2d` the first
    half of the pairs belongs to positions[:, 0].
    """
    axes = 2 if mode == "2d" else 1
    inverse = rotary_frequencies(rotary_dim // axes, base, scale, ramp_from, ramp_to, positions.device)
    place = positions[:, :axes].transpose(1, 2)[..., None]  # [batch, length, axes, 1]
    if fp16_angles:
        angle = (place.half() * inverse.half()).flatten(2)
        return angle.cos().float(), angle.sin().float()
    angle = (place.float() * inverse).flatten(2)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, mode: str, interleaved: bool) -> Tensor:
    """Turn x [batch, length, ..., rotary_dim] by the angles of `rotary_angles`, broadcast over the middle dims."""
    axes = 2 if mode == "2d" else 1
    inner = (1,) * (x.dim() - 3)
    # [batch, length, ..., axes, pairs an axis]
    cos = cos.unflatten(-1, (axes, -1)).view(*cos.shape[:2], *inner, axes, -1).to(x.dtype)
    sin = sin.unflatten(-1, (axes, -1)).view_as(cos).to(x.dtype)
    if interleaved:
        pairs = x.unflatten(-1, (axes, -1, 2))
        a, b = pairs[..., 0], pairs[..., 1]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-3)
    a, b = x.unflatten(-1, (axes, 2, -1)).unbind(-2)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-2).flatten(-3)


def rotary(
    x: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    *,
    period: int,
    passthrough: int,
    rotary_dim: int,
    mode: str = "1d",
    interleaved: bool = False,
    base: float = 10000.0,
    scale: float = 1.0,
    ramp_from: float = -1.0,
    ramp_to: float = 0.0,
    fp16_angles: bool = False,
) -> Tensor:
    """Bias and rotary positions, the PyTorch reference.

    x: [batch, length, heads, head_dim], heads in the packed order. bias: [heads · head_dim] or None.
    positions: int32 [batch, 2, length]. `none` adds the bias only. Returns the shape and dtype of x; positions get no
    gradient. Raises ValueError on a wrong shape, dtype, device or option.
    """
    check(x, bias, positions, period, passthrough, rotary_dim, mode)
    inner = accumulation_dtype(x.dtype)
    y = x.to(inner)
    if bias is not None:
        y = y + bias.to(inner).view(x.shape[2:])
    if mode == "none" or passthrough == period:
        return y.to(x.dtype)
    cos, sin = rotary_angles(
        positions,
        rotary_dim=rotary_dim,
        mode=mode,
        base=base,
        scale=scale,
        ramp_from=ramp_from,
        ramp_to=ramp_to,
        fp16_angles=fp16_angles,
    )
    packed = y.unflatten(2, (-1, period))  # [batch, length, groups, period, head_dim]
    turned, still = packed.split((period - passthrough, passthrough), dim=3)
    out = rotate(turned[..., :rotary_dim], cos, sin, mode=mode, interleaved=interleaved)
    if rotary_dim < x.shape[-1]:
        out = torch.cat((out, turned[..., rotary_dim:]), dim=-1)
    if passthrough:
        out = torch.cat((out, still), dim=3)
    return out.flatten(2, 3).to(x.dtype)
