"""What the Triton kernels share: dropout bits, power-of-two pieces of a row, column sums, launch sizes."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton kernels and what torch.library calls back take no annotations

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

SHORT_ROWS = 64  # of a kernel that takes hardly longer than its launch


@triton.jit
def words_of(key, sample, block):
    """The four Philox words of each block: those of `kernels.random.philox`. block: int64, sample: int64 scalar."""
    low = (block & 0xFFFFFFFF).to(tl.uint32)
    high = (block >> 32).to(tl.uint32)
    zero = low * 0
    sample_low = zero + (sample & 0xFFFFFFFF).to(tl.uint32)
    sample_high = zero + ((sample >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(key, low, high, sample_low, sample_high)


@triton.jit
def keep_run(key, sample, first, THRESHOLD: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """Keep bits of elements [first, first + BLOCK) of a sample; ALIGNED: first a multiple of 4, a quarter the work."""
    if ALIGNED:
        w0, w1, w2, w3 = words_of(key, sample, first // 4 + tl.arange(0, BLOCK // 4).to(tl.int64))
        word = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    else:
        element = first + tl.arange(0, BLOCK).to(tl.int64)
        w0, w1, w2, w3 = words_of(key, sample, element >> 2)
        place = element & 3
        word = tl.where(place == 0, w0, tl.where(place == 1, w1, tl.where(place == 2, w2, w3)))
    return word.to(tl.int64) >= THRESHOLD


@triton.jit
def keep_tile(key, sample, first, THRESHOLD: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """Keep bits of a tile whose rows start at elements first [rows, 1] of samples [rows, 1]; see `keep_run`."""
    if ALIGNED:
        w0, w1, w2, w3 = words_of(key, sample, first // 4 + tl.arange(0, BLOCK // 4)[None, :])
        word = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    else:
        element = first + tl.arange(0, BLOCK)[None, :]
        w0, w1, w2, w3 = words_of(key, sample, element >> 2)
        place = element & 3
        word = tl.where(place == 0, w0, tl.where(place == 1, w1, tl.where(place == 2, w2, w3)))
    return word.to(tl.int64) >= THRESHOLD


@triton.jit
def _column_sum_kernel(
    part, out, rows, columns, out_row_stride, part_stride, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """out[group, column] = Σ_row part[row, group, column]; one program a block of columns of one group."""
    group = tl.program_id(1)
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(0, rows, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        at = row[:, None].to(tl.int64) * part_stride + group * columns + column[None, :]
        total += tl.load(part + at, mask=(row < rows)[:, None] & (column < columns)[None, :], other=0.0)
    tl.store(out + group * out_row_stride + column, tl.sum(total, 0), mask=column < columns)


def column_sums(part: Tensor) -> Tensor:
    """Σ over the first axis of a float32 [rows, groups, columns], in a fixed order: float32 [groups, columns]."""
    rows, groups, columns = part.shape
    out = torch.empty(groups, columns, dtype=torch.float32, device=part.device)
    block = 32
    _column_sum_kernel[(triton.cdiv(columns, block), groups)](
        part, out, rows, columns, out.stride(0), part.stride(0), BLOCK_R=64, BLOCK_C=block, num_warps=4
    )
    return out


def pieces(width: int) -> tuple[int, int]:
    """Powers of two (a, b), b maybe 0, with a + b ≥ width: two blocks waste less than one next power of two."""
    first = 1 << (width.bit_length() - 1)
    rest = width - first
    if rest == 0:
        return max(first, 4), 0
    second = triton.next_power_of_2(rest)
    return (2 * first, 0) if second == first else (max(first, 4), max(second, 4))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; 2 in the interpreter, so that programs loop there too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@functools.cache
def starts_early(device: torch.device, rows: int) -> bool:
    """Whether a kernel over so few rows may start while the one before it ends (Hopper and later): a step of decoding
    is hundreds of kernels that take hardly longer than their launch.

    Such a kernel is launched with `launch_pdl=True` (programmatic dependent launch) and calls `let_next_start`. It may
    then read what no kernel writes (weights), and has to `wait_for_last` before it touches anything else. (What it only
    asks the second-level cache for may be old: `decode_attention_triton`.)
    """
    if rows > SHORT_ROWS or device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def let_next_start(EARLY: tl.constexpr):
    """The next kernel may start once all programs of this one have; EARLY as `starts_early` says."""
    if EARLY:
        gdc_launch_dependents()


@triton.jit
def wait_for_last(EARLY: tl.constexpr):
    """Wait until the kernels before this one are done and what they wrote can be read."""
    if EARLY:
        gdc_wait()
