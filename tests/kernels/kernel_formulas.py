"""The operations again in float64, written from the formulas with loops where loops are plainer; no kernel code."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def leaf(*shape: int, seed: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()


def as64(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().double().requires_grad_(tensor.requires_grad)


def error_ratio(actual: Tensor, expected: Tensor) -> float:
    """RMS error over RMS of the expected value."""
    actual, expected = actual.detach().double(), expected.detach().double()
    assert torch.isfinite(actual).all()
    scale = expected.square().mean().sqrt().item()
    return (actual - expected).square().mean().sqrt().item() / (scale or 1.0)


def philox_scalar(key: int, counter: tuple[int, int, int, int]) -> list[int]:
    """Philox-4x32-10 in Python integers."""
    c, k = list(counter), [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def keep_scalar(key: int, probability: float, sample: int, element: int) -> bool:
    block = element >> 2
    words = philox_scalar(key, (block & 0xFFFFFFFF, block >> 32, sample & 0xFFFFFFFF, (sample >> 32) & 0xFFFFFFFF))
    return words[element & 3] >= round(probability * 2**32)


def residual_norm(x, f, bias, weight, norm_bias, *, alpha, eps, kind, keep=None, probability=0.0):
    total = alpha * x
    if f is not None:
        branch = f if bias is None else f + bias
        total = total + (branch if keep is None else branch * keep / (1 - probability))
    if kind == "layernorm":
        centred = total - total.mean(-1, keepdim=True)
        out = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight
        return (out if norm_bias is None else out + norm_bias), total
    return total / (total.square().mean(-1, keepdim=True) + eps).sqrt() * weight, total


def bias_activation(x, bias, kind):
    y = x if bias is None else x + bias
    half = y.shape[-1] // 2

    def gelu(z):
        return 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))

    if kind == "geglu":
        return y[..., :half] * gelu(y[..., half:])
    if kind == "swiglu":
        gate = y[..., half:]
        return y[..., :half] * gate / (1 + torch.exp(-gate))
    if kind == "gelu":
        return gelu(y)
    return 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))


def rotary(
    x, bias, positions, *, period, passthrough, rotary_dim, mode, interleaved, base, scale, ramp_from=-1, ramp_to=0
):
    heads, dim = x.shape[2:]
    y = x if bias is None else x + bias.view(heads, dim)
    if mode == "none":
        return y
    axes = 2 if mode == "2d" else 1
    width = rotary_dim // axes
    out = [[None] * dim for _ in range(heads)]
    for head in range(heads):
        for d in range(dim):
            out[head][d] = y[:, :, head, d]
        if head % period >= period - passthrough:
            continue
        for axis in range(axes):
            place = positions[:, axis].double()
            for i in range(width // 2):
                first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + width // 2)
                first, second = axis * width + first, axis * width + second
                turn = base ** (-2 * i / width)
                divided = min(max((i - ramp_from) / (ramp_to - ramp_from), 0), 1)
                angle = place * ((1 - divided) * turn + divided * turn / scale)
                a, b = y[:, :, head, first], y[:, :, head, second]
                out[head][first] = a * angle.cos() - b * angle.sin()
                out[head][second] = b * angle.cos() + a * angle.sin()
    return torch.stack([torch.stack(row, -1) for row in out], 2)


def interval_attention(q, k, v, attend_from, attend_to, *, scale, softcap=0.0, keep=None, probability=0.0):
    """One query at a time; returns out and lse [batch, heads, queries]."""
    batch, queries, heads, dim = q.shape
    repeat = heads // k.shape[2]
    rows, sums = [], []
    for b in range(batch):
        for h in range(heads):
            for s in range(queries):
                low, high = max(0, int(attend_from[b, s])), min(k.shape[1], int(attend_to[b, s]))
                if low >= high:
                    rows.append(q.new_zeros(dim))
                    sums.append(-math.inf)
                    continue
                logits = scale * k[b, low:high, h // repeat] @ q[b, s, h]
                if softcap:
                    logits = softcap * torch.tanh(logits / softcap)
                probabilities = torch.exp(logits - logits.max())
                sums.append(math.log(probabilities.sum().item()) + logits.max().item())
                probabilities = probabilities / probabilities.sum()
                if keep is not None:
                    probabilities = probabilities * keep[b, h, s, low:high] / (1 - probability)
                rows.append(probabilities @ v[b, low:high, h // repeat])
    out = torch.stack(rows).view(batch, heads, queries, dim).transpose(1, 2)
    return out, torch.tensor(sums, dtype=torch.float64).view(batch, heads, queries)


def linear_cross_entropy(hidden, weight, targets, loss_weight, *, z_loss=0.0, softcap=0.0):
    logits = hidden @ weight.t()
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    lse = torch.log(torch.exp(logits - logits.max()).sum(-1)) + logits.max()
    rows = loss_weight > 0
    row_loss = lse - logits[torch.arange(len(targets)), targets]
    loss = (loss_weight * row_loss)[rows].sum()
    return loss, z_loss * (loss_weight * lse**2)[rows].sum(), row_loss
