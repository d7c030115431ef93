"""A step's fp32 gradient sums on their way to their owners, each layer's while the last backward pass goes on.

DeepSpeed's bf16 optimizer lays the sums of a parameter group out one behind the other, in the model's order, and of n
data-parallel ranks rank r owns the r-th n-th of that. So what an item of the model (a layer, the head) has there lies
in one owner's part, or in two. In a step's last backward pass it is reduced to its owner as soon as it is whole, beside
the passes of the items before it. The embedding, what is small, and a pipeline's tied table, whose two copies are
summed first, go at the end; and so does everything in a step that was not announced.

The numbers are those of one reduce-scatter at the end, with two ranks to the last bit; with more a back end may add in
another order.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

LEAST = 1 << 20
"""Elements of a message worth sending by itself: 4 MB, which takes a fast link as long as starting it does."""
Span = tuple[int, int]
"""First element of a flat tensor and the one behind the last."""


def by_owner(span: Span, part: int) -> Iterator[tuple[Span, int]]:
    """The span cut where another rank's part begins, and whose each piece is; part: elements that a rank owns."""
    start, stop = span
    while start < stop:
        owner = start // part
        end = min(stop, (owner + 1) * part)
        yield (start, end), owner
        start = end


def joined(spans: Sequence[Span]) -> list[Span]:
    """The same elements in as few spans as there can be; spans: in order, disjoint."""
    found: list[Span] = []
    for start, stop in spans:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return found


def add_gradients(parameters: Sequence[Any]) -> None:
    """Add what autograd made of their gradients to their sums, and let go of it."""
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.main_grad.add_(parameter.grad)
            parameter.grad = None


class Scatter:
    """One stage's sums. A step: `begin`, in every backward pass `passed` item by item, then `summed`; at last `end`."""

    def __init__(self, optimizer: Any, items: Sequence[nn.Module], tied: Tensor | None) -> None:
        """optimizer: DeepSpeed's bf16 optimizer, whose parameters have a `main_grad`.

        items: the modules that a forward pass goes through, in that order; none where nothing tells of backward passes.
        tied: the weight that another stage has too.
        """
        self._wholes: list[Tensor] = optimizer.fp32_groups_gradients_flat
        self._parts: list[Tensor] = optimizer.fp32_groups_gradient_flat_partition
        self._groups: list[Any] = optimizer.real_dp_process_group
        self._items = len(items)
        self._early: list[list[tuple[int, Span]]] = [[] for _ in range(self._items)]
        """(parameter group, elements) of each item."""
        self._parameters: list[list[nn.Parameter]] = [[] for _ in range(self._items)]
        """Whose sums those elements are."""
        # What several items hold belongs to the first of them, which a backward pass comes to last.
        holder = {id(p): place for place in reversed(range(self._items)) for p in items[place].parameters()}
        for number, parameters in enumerate(optimizer.bf16_groups):
            if _ranks(self._groups[number]) > 1:
                self._lay_out(number, parameters, holder, tied)
        self._left = 0
        self._works: list[Any] = []
        self._first_sent = self._items
        """Items from this one on have been sent."""

    def _lay_out(self, number: int, parameters: Sequence[Any], holder: dict[int, int], tied: Tensor | None) -> None:
        spans: list[list[Span]] = [[] for _ in range(self._items)]
        members: list[list[nn.Parameter]] = [[] for _ in range(self._items)]
        for parameter in parameters:
            start = parameter.main_grad.storage_offset()
            item = holder.get(id(parameter))
            if item is not None and parameter is not tied:
                spans[item].append((start, start + parameter.numel()))
                members[item].append(parameter)
        for item in range(1, self._items):
            wholes = joined(spans[item])
            if wholes and min(stop - start for start, stop in wholes) >= LEAST:
                self._early[item] += [(number, whole) for whole in wholes]
                self._parameters[item] += members[item]

    def begin(self, micro_batches: int) -> None:
        """Announce a step of so many backward passes: its last one may send."""
        assert not self._works, "the step before was not ended"
        self._left = micro_batches

    def passed(self, item: int) -> None:
        """In a backward pass: all that come after this item have been passed, so their gradients are whole."""
        if self._left == 1:
            for later in range(self._first_sent - 1, item, -1):
                add_gradients(self._parameters[later])
                self._send(self._early[later])
            self._first_sent = min(self._first_sent, item + 1)

    def summed(self) -> None:
        """A backward pass is over."""
        assert self._left > 0 or self._first_sent == self._items, "a backward pass after the one that sent"
        self._left -= 1

    @torch.no_grad()
    def end(self) -> None:
        """Send the rest and wait: each rank has its part of the mean, and what it holds of the others' is void."""
        early = [piece for item in self._early[self._first_sent :] for piece in item]
        for number, (whole, group) in enumerate(zip(self._wholes, self._groups, strict=True)):
            sent = sorted(span for owner, span in early if owner == number)
            if not sent:
                if _ranks(group) > 1:
                    torch.distributed.reduce_scatter_tensor(self._parts[number], whole, op=_mean(group), group=group)
                continue
            borders = [0, *(border for span in sent for border in span), whole.numel()]
            rest = [(start, stop) for start, stop in zip(borders[::2], borders[1::2], strict=True) if start != stop]
            # Each element once: what has gone and what goes now are the whole.
            assert joined(sorted(sent + rest)) == [(0, whole.numel())], "pieces of the gradients overlap"
            self._send([(number, span) for span in rest])
        for work in self._works:
            work.wait()
        self._works, self._first_sent, self._left = [], self._items, 0
        for part, group in zip(self._parts, self._groups, strict=True):
            if _mean(group) == torch.distributed.ReduceOp.SUM and _ranks(group) > 1:
                part.mul_(1.0 / _ranks(group))

    def _send(self, pieces: Sequence[tuple[int, Span]]) -> None:
        for number, span in pieces:
            whole, group = self._wholes[number], self._groups[number]
            for (start, stop), owner in by_owner(span, self._parts[number].numel()):
                piece = whole[start:stop]
                work = torch.distributed.reduce(piece, group_dst=owner, op=_mean(group), group=group, async_op=True)
                self._works.append(work)


def _ranks(group: Any) -> int:
    return torch.distributed.get_world_size(group)


def _mean(group: Any) -> Any:
    """NCCL divides on the way; others give the sum, which is divided afterwards."""
    nccl = torch.distributed.get_backend(group) == "nccl"
    return torch.distributed.ReduceOp.AVG if nccl else torch.distributed.ReduceOp.SUM
