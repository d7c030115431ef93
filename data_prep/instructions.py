"""Instruction examples: pairs of a prompt and an answer, packed into sequences.

A source with a template (data_prep/templates.py) becomes a stream of examples; in its shards a document is two
sequences, prompt and answer, without an eod. As a sample, each example is a segment of its own:

    prompt [MASK] | sop answer        targets: answer eop; nothing else is a target

which is the multi-task instruction of GLM-130B (arXiv 2210.02414, section 2.2) and, with [gMASK], the format that
ChatGLM is tuned in.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_prep.manifest import StreamInfo
from data_prep.packing import pack
from data_prep.shards import Shard


class Example(NamedTuple):
    """One example, cut to fit a sequence."""

    prompt: NDArray[np.int64]  # [P]
    answer: NDArray[np.int64]  # [A]
    whole: bool
    """Whether there was room for the whole answer and its eop."""

    @property
    def slots(self) -> int:
        """Slots it fills: prompt, mask, sop and answer (the last token of a cut answer is a target only)."""
        return len(self.prompt) + len(self.answer) + 1 + self.whole


class Kept(NamedTuple):
    """What of many examples is kept."""

    prompts: NDArray[np.int64]  # [N], tokens
    answers: NDArray[np.int64]  # [N], tokens
    whole: NDArray[np.bool_]  # [N], as `Example.whole`

    @property
    def slots(self) -> NDArray[np.int64]:
        """As `Example.slots`, int64 [N]."""
        return self.prompts + self.answers + 1 + self.whole


def fit(prompts: NDArray[np.int64], answers: NDArray[np.int64], slots: int) -> Kept:
    """What is kept of prompts and answers (tokens, int64 [N] each) in a sequence of `slots`.

    The prompt is cut at its end so that the whole answer fits, but never under a quarter of the sequence; an answer
    that still does not fit is cut then (GLM-130B's rule: the head of the text is kept).
    """
    prompts = np.minimum(prompts, np.maximum(slots // 4, slots - 2 - answers))
    whole = prompts + answers + 2 <= slots
    return Kept(prompts, np.where(whole, answers, slots - 1 - prompts), whole)


@dataclass(frozen=True)
class Packing:
    """How well the examples of a stream fill its sequences."""

    examples: int
    packs: int
    fill: float
    """Part of the slots that hold something."""
    targets: int
    """Targets over all packs, eops included."""
    ends: int
    """Examples with a whole answer."""
    cut_prompts: int


class InstructionStream:
    """The examples of one source in one language and one split, packed for one sequence length.

    A row is a pack: an epoch goes through every example once.
    """

    def __init__(self, info: StreamInfo, shards: list[Shard], slots: int) -> None:
        """slots: sequence_length."""
        self.info = info
        self.shards = shards
        self.slots = slots
        self._documents = np.cumsum([shard.documents for shard in shards], dtype=np.int64)
        self.hash = xxhash.xxh3_64_intdigest(info.key.encode())
        """As `Stream.hash`."""

    @property
    def key(self) -> str:
        """`<source>.<lang>`."""
        return self.info.key

    @property
    def rows(self) -> int:
        """Packs."""
        return len(self._packs[1]) - 1

    @property
    def unused_tokens(self) -> int:
        """Tokens cut off because their example is longer than a sequence."""
        return int(self._tokens.sum() - self._kept.prompts.sum() - self._kept.answers.sum())

    @cached_property
    def packing(self) -> Packing:
        """How well the sequences are filled."""
        kept = self._kept
        return Packing(
            examples=len(kept.whole),
            packs=self.rows,
            fill=float(kept.slots.sum()) / max(1, self.rows * self.slots),
            targets=int((kept.answers + kept.whole).sum()),
            ends=int(kept.whole.sum()),
            cut_prompts=int((kept.prompts < self._tokens[:, 0]).sum()),
        )

    def examples(self, row: int) -> list[Example]:
        """The examples of a pack."""
        order, edges = self._packs
        return [self._example(int(number)) for number in order[edges[row] : edges[row + 1]]]

    def _example(self, number: int) -> Example:
        at = int(np.searchsorted(self._documents, number, side="right"))
        within = number - (int(self._documents[at - 1]) if at else 0)
        prompt, answer = self.shards[at].document(2 * within), self.shards[at].document(2 * within + 1)
        kept = self._kept
        return Example(prompt[: kept.prompts[number]], answer[: kept.answers[number]], bool(kept.whole[number]))

    @cached_property
    def _tokens(self) -> NDArray[np.int64]:
        """Tokens of prompt and answer, [N, 2]."""
        sizes = [np.asarray(shard.sizes(), dtype=np.int64).reshape(-1, 2) for shard in self.shards]
        return np.concatenate(sizes) if sizes else np.zeros((0, 2), dtype=np.int64)

    @cached_property
    def _kept(self) -> Kept:
        return fit(self._tokens[:, 0], self._tokens[:, 1], self.slots)

    @cached_property
    def _packs(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return pack(self._kept.slots, self.slots)
