"""Laying out a sample: tokens, targets, positions and intervals of one sequence, from a text and what it hides.

A segment is a context (with its mask tokens) that sees all of itself, then a generation that sees the context and what
was generated before it. So each query's keys are one interval: [segment's first slot, end of the context) in the
context, [segment's first slot, own slot + 1) in the generation.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from data_prep.spans import Spans
from data_prep.tokenizer import Tokenizer


@dataclass
class Layout:
    """One sequence under construction; every slot is padding that sees itself until it is filled."""

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]
    is_target: NDArray[np.bool_]
    positions: NDArray[np.int32]
    attend_from: NDArray[np.int32]
    attend_to: NDArray[np.int32]
    used: int = 0
    """Slots filled so far."""

    @staticmethod
    def empty(slots: int, padding: int) -> "Layout":
        """A sequence of padding."""
        slot = np.arange(slots, dtype=np.int32)
        return Layout(
            tokens=np.full(slots, padding, dtype=np.int64),
            targets=np.zeros(slots, dtype=np.int64),
            is_target=np.zeros(slots, dtype=np.bool_),
            positions=np.zeros((2, slots), dtype=np.int32),
            attend_from=slot,
            attend_to=slot + 1,
        )


class Assembler:
    """Fills layouts with the special tokens of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, two_dimensional: bool, starts_with_enc: bool = False) -> None:
        """two_dimensional: whether positions are the place of the mask and the place inside the span.

        starts_with_enc: whether a segment begins with ENC, a token of its context that takes one slot more.
        """
        self.opening = np.array([tokenizer.special_ids["ENC"]] * starts_with_enc, dtype=np.int64)
        self.sop = tokenizer.sop
        self.eop = tokenizer.eop
        self.gmask = tokenizer.gmask
        self.two_dimensional = two_dimensional

    def prefix(self, layout: Layout, text: NDArray[np.int64], generated: int) -> None:
        """Hide the last `generated` tokens of a text behind one [gMASK]; fills len(opening) + len(text) + 1 slots."""
        context = len(text) - generated
        self.prompt(layout, np.concatenate([self.opening, text[:context]]), self.gmask, text[context:])

    def prompt(self, layout: Layout, context: NDArray[np.int64], mask: int, generation: NDArray[np.int64]) -> None:
        """Generate a text behind a context that ends in a mask token; fills len(context) + len(generation) + 1 slots.

        generation: the targets, so with an eop where one is to be learnt. Positions in one dimension run on behind a
        [gMASK]; behind another mask they all are the mask's, as a span's.
        """
        first = layout.used
        begin = first + len(context) + 1  # slot of sop
        end = begin + len(generation)
        layout.tokens[first : begin - 1] = context
        layout.tokens[begin - 1] = mask
        layout.tokens[begin] = self.sop
        layout.tokens[begin + 1 : end] = generation[:-1]
        layout.targets[begin:end] = generation
        layout.is_target[begin:end] = True
        layout.positions[0, first:end] = np.arange(end - first)
        if self.two_dimensional or mask != self.gmask:
            layout.positions[0, begin:end] = len(context)
        if self.two_dimensional:
            layout.positions[1, begin:end] = np.arange(1, len(generation) + 1)
        layout.attend_from[first:end] = first
        layout.attend_to[first:begin] = begin
        layout.used = end

    def causal(self, layout: Layout, text: NDArray[np.int64]) -> None:
        """Predict a text from its start on; fills len(text) slots."""
        first, end = layout.used, layout.used + len(text)
        layout.tokens[first] = self.sop
        layout.tokens[first + 1 : end] = text[:-1]
        layout.targets[first:end] = text
        layout.is_target[first:end] = True
        layout.positions[0, first:end] = np.arange(len(text))
        layout.attend_from[first:end] = first
        layout.used = end

    def blanks(
        self,
        layout: Layout,
        text: NDArray[np.int64],
        sizes: NDArray[np.int64],
        spans: Spans,
        masks: NDArray[np.int64],
    ) -> None:
        """Hide spans of several texts, a segment each; fills J · len(opening) + len(text) + 2 · spans slots.

        text: int64 [T], the segments' texts end to end; sizes: int64 [J], tokens of each; masks: int64 [J], the token
        that stands for a span in each segment.
        """
        if len(self.opening):
            # A token of the text that no span hides.
            text = np.insert(text, sizes.cumsum() - sizes, self.opening[0])
            spans = replace(spans, start=spans.start + spans.segment + 1)
            sizes = sizes + 1
        count = np.bincount(spans.segment, minlength=len(sizes))
        hidden = np.bincount(spans.segment, weights=spans.length, minlength=len(sizes)).astype(np.int64)
        slots = sizes + 2 * count
        context = sizes - hidden + count
        first = layout.used + slots.cumsum() - slots
        end = layout.used + int(slots.sum())

        # Part A: the text with each span replaced by one mask token.
        change = np.zeros(len(text) + 1, dtype=np.int8)
        # Added, not set: the last span of a segment may end where the first of the next segment starts.
        change[spans.start] += 1
        change[spans.start + spans.length] -= 1
        keep = change[:-1].cumsum(dtype=np.int8) == 0
        corrupted = text.copy()
        corrupted[spans.start] = masks[spans.segment]
        keep[spans.start] = True
        kept_from = context.cumsum() - context
        place = np.arange(int(context.sum())) - kept_from.repeat(context)
        slot_a = place + first.repeat(context)
        layout.tokens[slot_a] = corrupted[keep]
        layout.positions[0, slot_a] = place
        layout.attend_from[layout.used : end] = first.repeat(slots)
        layout.attend_to[slot_a] = (first + context).repeat(context)

        # Part B: the spans in their shuffled order, sop in front of the input, eop behind the target.
        start, length, segment = (values[spans.order] for values in (spans.start, spans.length, spans.segment))
        blocks = length + 1
        total = int(blocks.sum())
        block_from = blocks.cumsum() - blocks
        inside = np.arange(total) - block_from.repeat(blocks)
        generated_from = (hidden + count).cumsum() - (hidden + count)
        slot_b = np.arange(total) + (first + context - generated_from)[segment].repeat(blocks)
        source = start.repeat(blocks) + inside
        inputs = text[source - 1]  # the first of each block is overwritten
        inputs[block_from] = self.sop
        targets = text[np.minimum(source, len(text) - 1)]
        targets[block_from + length] = self.eop
        layout.tokens[slot_b] = inputs
        layout.targets[slot_b] = targets
        layout.is_target[slot_b] = True
        mask_place = keep.cumsum()[start] - 1 - kept_from[segment]
        layout.positions[0, slot_b] = mask_place.repeat(blocks)
        if self.two_dimensional:
            layout.positions[1, slot_b] = inside + 1
        layout.used = end
