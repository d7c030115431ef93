"""Which tokens a sample hides: span lengths, places and order, sentences, and the exact expectations of these laws.

Legend: J segments, N spans over all of them. A MASK segment of b slots with n spans holds b − 2n tokens of text: each
span adds its [MASK] and its sop to the slots, its eop is a target only. Context + [MASK]s + sops + hidden = b.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import exp, lgamma, log

import numpy as np
from numpy.typing import NDArray

from data_prep.config import SamplingConfig

MILLION = 1_000_000
SMALLEST_SEGMENT = 16
"""Slots under which spans are not drawn: such a piece of a document is left out."""
_SHORTEST_CUT = 32
_PLACEMENTS = 20


@dataclass(frozen=True)
class Spans:
    """Spans of several segments, in the order of the text."""

    segment: NDArray[np.int64]  # [N]
    start: NDArray[np.int64]  # [N], in the segments' texts laid end to end
    length: NDArray[np.int64]  # [N]
    order: NDArray[np.int64]  # [N], spans in the order in which they are generated, segment by segment

    @staticmethod
    def join(parts: Sequence["Spans"], sizes: NDArray[np.int64]) -> "Spans":
        """Spans of single segments laid end to end; sizes: int64 [J], tokens of each segment's text."""
        counts = np.array([len(part.start) for part in parts], dtype=np.int64)
        text_from = (sizes.cumsum() - sizes).repeat(counts)
        first = (counts.cumsum() - counts).repeat(counts)
        return Spans(
            np.arange(len(parts)).repeat(counts),
            np.concatenate([part.start for part in parts]) + text_from,
            np.concatenate([part.length for part in parts]),
            np.concatenate([part.order for part in parts]) + first,
        )


class SpanLaw:
    """The law of GLM's MASK spans (facts: Poisson lengths up to a share of the text, spans that never touch)."""

    def __init__(self, config: SamplingConfig) -> None:
        self.config = config
        self.ratio = round(config.mask_ratio * MILLION)
        """Millionths of the text to hide; whole numbers keep the stopping rule exact."""
        self._laws: dict[int, NDArray[np.float64]] = {}
        self._parts: dict[int, NDArray[np.int64]] = {}

    def longest(self, slots: int) -> int:
        """Longest span in a segment: max_span_tokens, or a quarter of a small segment."""
        return min(self.config.max_span_tokens, slots // 4)

    def length_law(self, longest: int) -> NDArray[np.float64]:
        """Probability of the lengths 1 … longest: Poisson, limited and normalised."""
        mean = self.config.poisson_mean
        weights = np.array([exp(k * log(mean) - mean - lgamma(k + 1)) for k in range(1, longest + 1)])
        return weights / weights.sum()

    def budgets(self, generator: np.random.Generator, slots: int) -> NDArray[np.int64]:
        """Slots of each MASK segment of a sequence: equal parts that add up to `slots`, now and then one cut in two."""
        budgets = self._equal_parts(slots)
        cut = generator.random(len(budgets)) < self.config.short_text_probability
        if not cut.any():
            return budgets
        result: list[int] = []
        for budget, two in zip(budgets.tolist(), cut.tolist(), strict=True):
            if two and budget >= 2 * _SHORTEST_CUT:
                first = int(generator.integers(_SHORTEST_CUT, budget - _SHORTEST_CUT, endpoint=True))
                result += [first, budget - first]
            else:
                result.append(budget)
        return np.array(result)

    def _equal_parts(self, slots: int) -> NDArray[np.int64]:
        """Slots of each segment of a sequence that is not cut further; not to be written to."""
        if slots not in self._parts:
            parts = max(1, min(self.config.mask_segments, slots // SMALLEST_SEGMENT))
            self._parts[slots] = np.diff(np.arange(parts + 1) * slots // parts)
        return self._parts[slots]

    def draw_lengths(
        self, generator: np.random.Generator, slots: NDArray[np.int64], most_text: int | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Span lengths [J, K] and how many of each row count [J].

        Spans are drawn until they hide mask_ratio of the text, which is b − 2n tokens for n spans, or `most_text` where
        that is less. A draw that would leave no room to keep spans apart is given up (never for mask_ratio ≤ 0.18).
        """
        largest = int(slots.max())
        number = np.arange(1, self.ratio * largest // (MILLION + 2 * self.ratio) + 3)
        text = slots[:, None] - 2 * number
        if most_text is not None:
            text = np.minimum(text, most_text)
        uniform = generator.random(text.shape)
        lengths = np.empty(uniform.shape, dtype=np.int64)
        longest = [self.longest(min(budget, most_text or budget)) for budget in slots.tolist()]
        if min(longest) == max(longest):
            lengths = np.searchsorted(self._cumulative(longest[0]), uniform, side="right") + 1
        else:
            for row, most_tokens in enumerate(longest):
                lengths[row] = np.searchsorted(self._cumulative(most_tokens), uniform[row], side="right") + 1
        hidden = lengths.cumsum(axis=1)
        counts = (hidden * MILLION >= self.ratio * text).argmax(axis=1) + 1
        counts[generator.random(len(slots)) < self.config.single_span_probability] = 1
        fits = hidden + number - 1 <= text
        for row in np.flatnonzero(~fits[np.arange(len(slots)), counts - 1]).tolist():
            counts[row] = max(1, 1 + int(np.flatnonzero(fits[row, : counts[row]])[-1]))
        return lengths, counts

    def place(
        self,
        generator: np.random.Generator,
        lengths: NDArray[np.int64],
        counts: NDArray[np.int64],
        text: NDArray[np.int64],
    ) -> Spans:
        """Put spans into texts of text[j] tokens so that every arrangement in which no two touch is equally likely.

        An arrangement is an order of the lengths, and for each span its own gap between context tokens (both ends
        count): a context token always separates two spans. lengths, counts: from `draw_lengths`; text: int64 [J].
        """
        segments = len(counts)
        spans = int(counts.max())
        used = np.arange(spans) < counts[:, None]
        lengths = np.where(used, lengths[:, :spans], 0)
        hidden = lengths.sum(axis=1)
        keys = generator.random((2, segments, spans))
        keys[:, ~used] = 2.0
        shuffled = np.take_along_axis(lengths, keys[0].argsort(axis=1), axis=1)[used]
        gaps = text - hidden + 1
        chances = generator.random((segments, int(gaps.max())))
        chances[np.arange(chances.shape[1]) >= gaps[:, None]] = 2.0
        nearest = chances.argsort(axis=1)[:, :spans]
        chosen = np.zeros(chances.shape, dtype=np.bool_)
        segment = np.arange(segments).repeat(counts)
        chosen[segment, nearest[used]] = True
        gap = np.nonzero(chosen)[1]
        first = counts.cumsum() - counts
        before = shuffled.cumsum() - shuffled
        text_from = text.cumsum() - text
        start = gap + before - before[first].repeat(counts) + text_from.repeat(counts)
        order = keys[1].argsort(axis=1)[used] + first.repeat(counts)
        return Spans(segment, start, shuffled, order)

    def keep_inside_documents(
        self, generator: np.random.Generator, spans: Spans, text: NDArray[np.int64], ends: NDArray[np.bool_]
    ) -> Spans:
        """Place the spans of a segment anew where one of them runs over a document's end (ends: bool [all text]).

        New places are drawn until they fit, which keeps all fitting arrangements equally likely. After 20 draws, in a
        segment of very short documents, spans are set one by one, longest first, shortened where none fits.
        """
        over = np.concatenate([[0], np.cumsum(ends)])
        wrong = np.unique(spans.segment[over[spans.start + spans.length] > over[spans.start]])
        if not len(wrong):
            return spans
        start, length = spans.start.copy(), spans.length.copy()
        for segment in wrong:
            mine = np.flatnonzero(spans.segment == segment)
            offset = int(text[:segment].sum())
            size = int(text[segment])
            lengths, count = length[mine][None], np.array([len(mine)])
            for _ in range(_PLACEMENTS):
                again = self.place(generator, lengths, count, np.array([size]))
                begin = again.start + offset
                if not (over[begin + again.length] > over[begin]).any():
                    start[mine], length[mine] = begin, again.length
                    break
            else:
                places = _one_by_one(generator, length[mine], ends[offset : offset + size])
                if places is not None:
                    start[mine], length[mine] = places[0] + offset, places[1]
        return Spans(spans.segment, start, length, spans.order)

    def _cumulative(self, longest: int) -> NDArray[np.float64]:
        if longest not in self._laws:
            cumulative = self.length_law(longest).cumsum()
            cumulative[-1] = 1.0
            self._laws[longest] = cumulative
        return self._laws[longest]

    @cached_property
    def _expectations(self) -> dict[int, tuple[float, float]]:
        return {}

    def expected(self, slots: int) -> tuple[float, float]:
        """(spans, hidden tokens) expected in one MASK segment that is not cut.

        Drawing goes on past n spans exactly when their sum is under the share of the text, and that share falls with n,
        so E[spans] = Σₙ P(sum of n lengths < ratio · (b − 2n)); by Wald's identity E[hidden] = E[spans] · E[length].
        """
        if slots not in self._expectations:
            law = self.length_law(self.longest(slots))
            mean = float(law @ np.arange(1, len(law) + 1))
            spans, total, number = 0.0, np.ones(1), 0
            while (below := -(-self.ratio * (slots - 2 * number) // MILLION)) > 0:
                alive = float(total[:below].sum())
                if alive == 0.0:
                    break
                spans += alive
                total = np.convolve(total[:below], np.concatenate([[0.0], law]))
                number += 1
            single = self.config.single_span_probability
            spans = single + (1 - single) * spans
            self._expectations[slots] = (spans, spans * mean)
        return self._expectations[slots]

    def expected_segments(self, slots: int) -> float:
        """MASK segments expected in a whole sequence, cuts included."""
        budgets = self._equal_parts(slots)
        return len(budgets) + self.config.short_text_probability * int((budgets >= 2 * _SHORTEST_CUT).sum())

    def expected_sequence(self, slots: int, opening: int = 0) -> tuple[float, float]:
        """(spans, hidden tokens) expected in a whole sequence of MASK segments, cuts included.

        opening: slots of each segment that hold no text.
        """
        spans = hidden = 0.0
        for budget in self._equal_parts(slots).tolist():
            cut = self.config.short_text_probability if budget >= 2 * _SHORTEST_CUT else 0.0
            whole = self.expected(budget - opening)
            spans += (1 - cut) * whole[0]
            hidden += (1 - cut) * whole[1]
            if cut:
                firsts = range(_SHORTEST_CUT, budget - _SHORTEST_CUT + 1)
                pieces = [self.expected(first - opening) for first in firsts]
                # Both pieces of a cut have the same law, for the cut is uniform and symmetric.
                spans += cut * 2 * sum(piece[0] for piece in pieces) / len(pieces)
                hidden += cut * 2 * sum(piece[1] for piece in pieces) / len(pieces)
        return spans, hidden


def _one_by_one(
    generator: np.random.Generator, lengths: NDArray[np.int64], ends: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """Starts and lengths in the order of the text, or None where the documents leave no room at all."""
    free = ~ends
    apart = np.ones(len(ends), dtype=np.bool_)  # neither hidden nor beside something hidden
    placed: list[tuple[int, int]] = []
    for wanted in np.sort(lengths)[::-1].tolist():
        usable = np.concatenate([[0], np.cumsum(free & apart)])
        for length in range(wanted, 0, -1):
            fitting = np.flatnonzero(usable[length:] - usable[:-length] == length)
            if len(fitting):
                begin = int(generator.choice(fitting))
                apart[max(0, begin - 1) : begin + length + 1] = False
                placed.append((begin, length))
                break
        else:
            return None
    placed.sort()
    return np.array([begin for begin, _ in placed]), np.array([length for _, length in placed])


def sentences(
    row: NDArray[np.int64], marks: tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]], eod: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Starts and ends (one past the last token) of the whole sentences in a row, each of two tokens or more.

    marks: `Tokenizer.sentence_marks`. What stands before the row's first sentence end, or after its last, may be a part
    of a sentence only and is left out; a document's end belongs to no sentence.
    """
    always, spaced, white = marks
    last = always[row]
    last[:-1] |= spaced[row[:-1]] & white[row[1:]]
    edges = np.flatnonzero(last) + 1
    start, end = edges[:-1], edges[1:]
    end = end - (row[end - 1] == eod)
    long_enough = end - start >= 2
    return start[long_enough], end[long_enough]


def draw_sentences(
    generator: np.random.Generator,
    start: NDArray[np.int64],
    end: NDArray[np.int64],
    slots: int,
    most_text: int,
    ratio: int,
) -> list[tuple[int, int]]:
    """Sentences to hide in a segment whose text begins at 0: (start, length) in the order of the text.

    They are taken in random order while together they stay within `ratio` millionths of the text, none touching
    another; the text is slots − 2n tokens for n sentences, or `most_text` where that is less. Where even one is too
    much, the shortest is taken if it stays under half the text; else none.
    """
    chosen: list[tuple[int, int]] = []
    hidden = reach = 0
    inside = np.flatnonzero((start >= 0) & (end <= min(slots - 2, most_text)))
    for number in generator.permutation(inside).tolist():
        begin, stop = int(start[number]), int(end[number])
        text = min(slots - 2 * (len(chosen) + 1), most_text)
        if (hidden + stop - begin) * MILLION > ratio * text or max(reach, stop) > text:
            continue
        if any(begin <= other + size and other <= stop for other, size in chosen):
            continue
        chosen.append((begin, stop - begin))
        hidden += stop - begin
        reach = max(reach, stop)
    if not chosen and len(inside):
        number = int(inside[np.argmin(end[inside] - start[inside])])
        if 2 * int(end[number] - start[number]) < min(slots - 2, most_text):
            chosen = [(int(start[number]), int(end[number] - start[number]))]
    return sorted(chosen)
