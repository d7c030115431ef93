"""Random numbers with an address: Philox-4x32-10 counters instead of generator state.

A draw depends on a key (64-bit mix of what it is for) and on where its element lies in the unsharded problem, on
nothing else: not on rank, layout, recompute or the order of calls. So the backward replays dropout without storing a
mask, every parallel layout draws the same values, and a checkpoint holds no generator state.

Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), 10 rounds; the words equal Triton's
`tl.philox(key, c0, c1, c2, c3)`, so that kernels and references agree bit for bit.

Addresses:
  dropout   block = element >> 2, word = element & 3, counter = (block low, block high, sample low, sample high),
            element = position · hidden + column               for hidden sites,
                      (head · queries + query) · keys + key    for attention, the head counted before sharding
  normals   block = index >> 2, word = index & 3, counter = (block low, block high, 0, 0), index in the full tensor
  uniforms  first word, counter = (index low, index high, sample low, sample high)
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.checks import require_dtype, require_shape

MASK32 = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
_CHUNK = 1 << 20  # blocks a pass of addressed_normal: bounds its float64 temporaries to some 100 MB


def mix_key(seed: int, *parts: int | str) -> int:
    """A key from a seed and the names of what is drawn, e.g. `mix_key(seed, "weight", name)`.

    Returns an int in [2^62, 2^63): it fits torch's int64 arguments, and Triton types it int64 every time.
    """
    text = "\x1f".join([str(int(seed)), *(f"{type(part).__name__}:{part}" for part in parts)])
    digest = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
    return (digest & ((1 << 62) - 1)) | (1 << 62)


def dropout_key(seed: int, layer: int, site: str) -> int:
    """The key of one dropout site (`"embedding"`, `"attention"`, `"attention_output"`, `"ffn"`) of one layer."""
    return mix_key(seed, "dropout", layer, site)


@dataclass(frozen=True)
class Dropout:
    """Dropout with addressed randomness: inverse scaling, keep bits recomputed in the backward.

    probability: chance that an element is dropped, in [0, 1). key: see `dropout_key`.
    sample_index: int64 [batch], the global index of each sequence's sample.
    offset: first position of this shard (hidden sites, sequence-parallel) or first global head (attention).
    """

    probability: float
    key: int
    sample_index: Tensor
    offset: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.probability < 1.0:
            raise ValueError(f"Dropout: probability={self.probability}; use a value in [0, 1)")
        require_dtype("Dropout", "sample_index", self.sample_index, torch.int64)

    @property
    def threshold(self) -> int:
        """Words under this are dropped; uint32."""
        return min(round(self.probability * 2**32), MASK32)

    @property
    def scale(self) -> float:
        """What kept elements are multiplied by."""
        return 1.0 / (1.0 - self.probability)


def active(dropout: Dropout | None) -> Dropout | None:
    """`dropout`, or None where it does nothing."""
    return None if dropout is None or dropout.probability == 0.0 else dropout


def philox(key: int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-10: four words for each counter.

    key: 64 bits. c0…c3: int64 holding uint32 values, broadcast together. Returns four int64 tensors of uint32 values.
    A product of two uint32 values fits 64 bits; int64 wraps it, and shift and mask read both halves right.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(c0, c1, c2, c3)
    k0, k1 = key & MASK32, (key >> 32) & MASK32
    for _ in range(ROUNDS):
        product_a, product_b = c0 * _ROUND_A, c2 * _ROUND_B
        c0 = (product_b >> 32).bitwise_and_(MASK32).bitwise_xor_(c1).bitwise_xor_(k0)
        c2 = (product_a >> 32).bitwise_and_(MASK32).bitwise_xor_(c3).bitwise_xor_(k1)
        c1, c3 = product_b.bitwise_and_(MASK32), product_a.bitwise_and_(MASK32)
        k0, k1 = (k0 + _KEY_A) & MASK32, (k1 + _KEY_B) & MASK32
    return c0, c1, c2, c3


def _keep(dropout: Dropout, start: int, count: int) -> Tensor:
    """Keep bits of elements [start, start + count) of every sample: bool [batch, count]."""
    first, last = start >> 2, (start + count + 3) >> 2
    samples = dropout.sample_index[:, None]
    block = torch.arange(first, last, device=samples.device, dtype=torch.int64)[None, :].expand(len(samples), -1)
    words = philox(dropout.key, block & MASK32, block >> 32, samples & MASK32, (samples >> 32) & MASK32)
    flat = torch.stack([word >= dropout.threshold for word in words], dim=-1).flatten(1)
    return flat[:, start - 4 * first : start - 4 * first + count]


def keep_hidden(dropout: Dropout, positions: int, hidden: int) -> Tensor:
    """Keep bits of a hidden site: bool [batch, positions, hidden]."""
    return _keep(dropout, dropout.offset * hidden, positions * hidden).unflatten(1, (positions, hidden))


def keep_attention(dropout: Dropout, heads: int, queries: int, keys: int) -> Tensor:
    """Keep bits of attention probabilities: bool [batch, heads, queries, keys]."""
    flat = _keep(dropout, dropout.offset * queries * keys, heads * queries * keys)
    return flat.unflatten(1, (heads, queries, keys))


def drop_hidden(x: Tensor, dropout: Dropout | None) -> Tensor:
    """Dropout of x [batch, positions, hidden], differentiable; x itself where there is nothing to drop."""
    dropout = active(dropout)
    if dropout is None:
        return x
    if x.dim() != 3:
        raise ValueError(f"dropout: x has shape {list(x.shape)}; expected [batch, positions, hidden]")
    require_shape("dropout", "sample_index", dropout.sample_index, (x.shape[0],))
    return x * (keep_hidden(dropout, x.shape[1], x.shape[2]).to(x.dtype) * dropout.scale)


def addressed_uniform(key: int, indices: Tensor, samples: Tensor) -> Tensor:
    """One uniform deviate in (0, 1) for each (index, sample), float64; both int64 and ≥ 0, broadcast together."""
    words = philox(key, indices & MASK32, indices >> 32, samples & MASK32, samples >> 32)
    return (words[0].to(torch.float64) + 0.5) * 2.0**-32


def _normal_block(key: int, block: Tensor) -> Tensor:
    """Four standard normal deviates a Philox block: float64 [..., 4] (Box–Muller on 32-bit uniforms, |z| < 6.8)."""
    zero = torch.zeros_like(block)
    words = philox(key, block & MASK32, (block >> 32) & MASK32, zero, zero)
    uniform = [(word.to(torch.float64) + 0.5) * 2.0**-32 for word in words]
    result = torch.empty(*block.shape, 4, dtype=torch.float64, device=block.device)
    for pair in (0, 2):
        radius = uniform[pair].log_().mul_(-2.0).sqrt_()
        angle = uniform[pair + 1].mul_(2.0 * math.pi)
        torch.mul(radius, angle.cos(), out=result[..., pair])
        torch.mul(radius, angle.sin_(), out=result[..., pair + 1])
    return result


def addressed_normal(key: int, indices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal deviates by index in the full tensor: any slice draws the values the whole would.

    indices: int64, any shape, ≥ 0. Returns dtype, the shape of indices, on its device. Where runs of four aligned
    neighbours are asked for (a row-major slice whose last axis starts and ends on multiples of 4) one Philox block
    serves four values; see `normal_slice` for the usual case.
    """
    require_dtype("addressed_normal", "indices", indices, torch.int64)
    flat = indices.reshape(-1)
    result = torch.empty(flat.shape, dtype=dtype, device=flat.device)
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK]
        values = _normal_block(key, part >> 2).gather(1, (part & 3)[:, None]).squeeze(1)
        result[start : start + _CHUNK] = values.to(dtype)
    return result.view(indices.shape)


def normal_slice(
    key: int,
    rows: tuple[int, int],
    columns: tuple[int, int],
    num_columns: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The block [rows[0]:rows[1], columns[0]:columns[1]] of the full standard normal matrix [any, num_columns].

    Equals `addressed_normal(key, row · num_columns + column)`, four values a Philox block where the columns allow it.
    """
    height, width = rows[1] - rows[0], columns[1] - columns[0]
    if not (0 <= columns[0] <= columns[1] <= num_columns and 0 <= rows[0] <= rows[1]):
        raise ValueError(f"normal_slice: rows={rows}, columns={columns} do not lie in [any, {num_columns}]")
    result = torch.empty(height, width, dtype=dtype, device=device)
    aligned = num_columns % 4 == 0 and columns[0] % 4 == 0 and width % 4 == 0
    step = max(1, _CHUNK // max(1, width // 4 if aligned else width))
    for top in range(0, height, step):
        row = torch.arange(rows[0] + top, min(rows[0] + top + step, rows[1]), dtype=torch.int64, device=device)
        if aligned:
            across = torch.arange(columns[0] // 4, columns[1] // 4, dtype=torch.int64, device=device)
            block = row[:, None] * (num_columns // 4) + across
            result[top : top + step] = _normal_block(key, block).flatten(1).to(dtype)
        else:
            index = row[:, None] * num_columns + torch.arange(*columns, dtype=torch.int64, device=device)
            result[top : top + step] = addressed_normal(key, index, dtype)
    return result
