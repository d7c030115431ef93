"""A greedy step in Triton; arguments and the reference are in `greedy_step.py`.

A program takes a strip of one row's logits and keeps its largest; one a row puts the strips together and does the rest.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton kernels and what torch.library calls back take no annotations

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.greedy_step import COLUMNS, NEXT_PLACE, NEXT_TOKEN, SETTLED, STOPS, check
from kernels.operation import operation
from kernels.shared_triton import let_next_start, starts_early, wait_for_last

STRIP = 1024  # logits a program


@triton.jit
def _strip_kernel(
    logits, text, here, top_of, column_of, vocabulary,
    COLUMNS: tl.constexpr, STOP: tl.constexpr, STRIP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """top_of float32 and column_of int32, [rows, strips]: the largest allowed logit, and the first column of it."""
    let_next_start(EARLY)
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * STRIP + tl.arange(0, STRIP)
    inside = column < vocabulary
    allowed = tl.load(text + column, mask=inside, other=0) != 0
    wait_for_last(EARLY)
    first_stop = tl.load(here + row * COLUMNS + STOP)
    second_stop = tl.load(here + row * COLUMNS + STOP + 1)
    value = tl.load(logits + row * vocabulary + column, mask=inside, other=0.0).to(tl.float32)
    value = tl.where(value == value, value, float("inf"))  # NaN is the largest, as in PyTorch
    value = tl.where(allowed | (column == first_stop) | (column == second_stop), value, float("-inf"))
    top = tl.max(value, 0)
    at = row * tl.num_programs(0) + tl.program_id(0)
    tl.store(top_of + at, top)
    tl.store(column_of + at, tl.min(tl.where(inside & (value == top), column, vocabulary - 1), 0))


@triton.jit
def _join_kernel(
    top_of, column_of, table, place, here, picked, fed, strips, vocabulary,
    COLUMNS: tl.constexpr, STOP: tl.constexpr, SETTLED: tl.constexpr, NEXT_PLACE: tl.constexpr,
    NEXT_TOKEN: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    let_next_start(EARLY)
    wait_for_last(EARLY)
    row = tl.program_id(0).to(tl.int64)
    strip = tl.arange(0, BLOCK)
    top = tl.load(top_of + row * strips + strip, mask=strip < strips, other=float("-inf"))
    column = tl.load(column_of + row * strips + strip, mask=strip < strips, other=vocabulary)
    token = tl.min(tl.where(top == tl.max(top, 0), column, vocabulary - 1), 0).to(tl.int64)
    mine = here + row * COLUMNS
    leaves = (token == tl.load(mine + STOP)) | (token == tl.load(mine + STOP + 1)) | (tl.load(mine + SETTLED) != 0)
    next_place = tl.where(leaves, tl.load(mine + NEXT_PLACE), tl.load(place + row) + 1)
    tl.store(picked + row, token)
    tl.store(fed + row, tl.where(leaves, tl.load(mine + NEXT_TOKEN), token))
    tl.store(place + row, next_place)
    each = tl.arange(0, COLUMNS)
    tl.store(mine + each, tl.load(table + next_place * COLUMNS + each))  # by one warp, which has read `here` before


@operation("tiankong::greedy_step", mutates=("place", "here", "picked", "fed"))
def _step(
    logits: Tensor, text: Tensor, table: Tensor, place: Tensor, here: Tensor, picked: Tensor, fed: Tensor
) -> None:
    rows, vocabulary = logits.shape
    strips = triton.cdiv(vocabulary, STRIP)
    top_of = torch.empty(rows, strips, dtype=torch.float32, device=logits.device)
    column_of = torch.empty(rows, strips, dtype=torch.int32, device=logits.device)
    early = starts_early(logits.device, rows)
    _strip_kernel[(strips, rows)](
        logits, text, here, top_of, column_of, vocabulary,
        COLUMNS=COLUMNS, STOP=STOPS.start, STRIP=STRIP, EARLY=early, num_warps=4, launch_pdl=early,
    )  # fmt: skip
    _join_kernel[(rows,)](
        top_of, column_of, table, place, here, picked, fed, strips, vocabulary,
        COLUMNS=COLUMNS, STOP=STOPS.start, SETTLED=SETTLED, NEXT_PLACE=NEXT_PLACE, NEXT_TOKEN=NEXT_TOKEN,
        BLOCK=triton.next_power_of_2(strips), EARLY=early, num_warps=1, launch_pdl=early,
    )  # fmt: skip


@_step.fake
def _(logits, text, table, place, here, picked, fed):
    return None


def greedy_step(
    logits: Tensor, text: Tensor, table: Tensor, place: Tensor, here: Tensor, picked: Tensor, fed: Tensor
) -> None:
    """See the reference of the same name; all arguments are contiguous."""
    check(logits, text, table, place, here, picked, fed)
    for name, tensor in (("table", table), ("place", place), ("here", here), ("picked", picked), ("fed", fed)):
        if not tensor.is_contiguous():
            raise ValueError(f"greedy_step: {name} is not contiguous")
    _step(logits.contiguous(), text.contiguous(), table, place, here, picked, fed)
