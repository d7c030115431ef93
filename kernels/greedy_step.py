"""One step of texts written greedily side by side: pick each one's likeliest token, look up what it feeds next.

A text stands at a place of a table, which says what may end it there and where it goes on:

    token  = argmax of the logits over the ids that are text and the place's stops
    leaves = token is one of the stops, or the place is settled
    place, fed = (next place, next token) of the place where it leaves, (place + 1, token) elsewhere

In PyTorch that is some fifteen kernels on a few numbers, each of which takes hardly longer than its launch.

Shapes: logits [rows, vocabulary] · text bool [vocabulary] · table int64 [places, COLUMNS] · here int64 [rows, COLUMNS],
the table's rows at `place` · place, picked, fed int64 [rows].
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.checks import require_device, require_dtype, require_float, require_shape

COLUMNS = 8
POSITIONS, STOPS = slice(0, 2), slice(2, 4)
SETTLED, NEXT_PLACE, NEXT_TOKEN, GROWS = range(4, COLUMNS)
"""Columns of the table: positions of what is fed there; what may end the text, −1 for nothing; whether it goes on at
NEXT_PLACE whatever is picked; and whether what is fed takes a slot."""


def check(
    logits: Tensor, text: Tensor, table: Tensor, place: Tensor, here: Tensor, picked: Tensor, fed: Tensor
) -> None:
    """Raise a ValueError on a wrong shape, dtype or device; see `greedy_step`."""
    op = "greedy_step"
    require_float(op, logits=logits)
    rows, vocabulary = logits.shape
    require_dtype(op, "text", text, torch.bool)
    require_shape(op, "text", text, (vocabulary,))
    require_shape(op, "table", table, (table.shape[0], COLUMNS))
    require_shape(op, "here", here, (rows, COLUMNS))
    for name, tensor in (("table", table), ("here", here), ("place", place), ("picked", picked), ("fed", fed)):
        require_dtype(op, name, tensor, torch.int64)
        require_device(op, logits.device, **{name: tensor})
        if name not in ("table", "here"):
            require_shape(op, name, tensor, (rows,))


def go_on(token: Tensor, table: Tensor, place: Tensor, here: Tensor, picked: Tensor, fed: Tensor) -> None:
    """Take each row on from its place with the token picked there, int64 [rows]; writes what `greedy_step` writes."""
    picked.copy_(token)
    leaves = (token[:, None] == here[:, STOPS]).any(1).logical_or_(here[:, SETTLED])
    torch.where(leaves, here[:, NEXT_TOKEN], token, out=fed)
    place += 1
    torch.where(leaves, here[:, NEXT_PLACE], place, out=place)
    torch.index_select(table, 0, place, out=here)


def greedy_step(
    logits: Tensor, text: Tensor, table: Tensor, place: Tensor, here: Tensor, picked: Tensor, fed: Tensor
) -> None:
    """One greedy step of every row, the PyTorch reference; of equal logits the first wins.

    logits: any float dtype. text: the ids that may be picked at any place. table: leads nowhere but to its own rows.
    Writes `picked`, `fed`, and the new `place` and `here`. Raises ValueError on a wrong shape, dtype or device.
    """
    check(logits, text, table, place, here, picked, fed)
    column = torch.arange(len(text), device=text.device)
    allowed = text | (column == here[:, STOPS, None]).any(1)
    token = torch.where(allowed, logits, -torch.inf).argmax(-1)
    go_on(token, table, place, here, picked, fed)
