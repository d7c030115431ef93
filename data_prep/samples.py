"""`sample(i)`: the i-th training sample as a pure function of the dataset, the seed, the data plan and i.

The index decides the source (by quota tables), the row (by a computed permutation of the source, a new one each epoch)
and the kind (by a quota table of the source); a counter-based generator keyed by seed and index decides what is hidden.
Nothing depends on earlier calls, on workers or on ranks.
"""

import logging
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_prep.assemble import Assembler, Layout
from data_prep.batch import CAUSAL, GMASK, INSTRUCTION, KINDS, MASK, SMASK, Batch, Sample, group_of
from data_prep.config import SamplingConfig
from data_prep.dataset import AnyStream, Dataset
from data_prep.errors import ConfigError, DataError
from data_prep.instructions import Example, InstructionStream
from data_prep.mixture import Course
from data_prep.order import DataPlan, Draws, Permutation, Schedule, mix
from data_prep.packing import PackedStream, PackPlan
from data_prep.spans import MILLION, SMALLEST_SEGMENT, SpanLaw, Spans, draw_sentences, sentences

WEIGHTINGS = ("sequence", "token")
_SMALLEST_SEQUENCE = 32
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Address:
    """Where a sample comes from."""

    stream: AnyStream
    epoch: int
    """How often all rows of the stream were drawn before."""
    row: int
    kind: int


@dataclass(frozen=True)
class _Segment:
    """One drawn segment: tokens of its text, what is hidden of it, and the mask token that stands for it."""

    size: int
    spans: Spans
    mask: int


class Sampler:
    """Samples of one split, the same whatever was asked before; safe to fork and to pickle, not for several threads."""

    def __init__(
        self,
        dataset: Dataset,
        config: SamplingConfig,
        sequence_length: int,
        *,
        seed: int,
        weighting: str = "sequence",
        split: str = "train",
        plan: DataPlan | None = None,
    ) -> None:
        """sequence_length: slots a sequence. weighting: `loss.weighting`, see `Sampler.sample`.

        split: `train` mixes its sources by weight, endlessly; `valid` and `test` go through every row once an epoch,
        with masks that depend on the seed and the index alone. plan: changes of mixture and skipped ranges.
        Raises ConfigError for settings that do not fit, DataError when no source fills a row.
        """
        if sequence_length < _SMALLEST_SEQUENCE:
            raise ConfigError(f"sequence_length={sequence_length} must be at least {_SMALLEST_SEQUENCE}")
        if weighting not in WEIGHTINGS:
            raise ConfigError(f"loss.weighting={weighting} must be one of {', '.join(WEIGHTINGS)}")
        self.dataset = dataset
        self.config = config
        self.sequence_length = sequence_length
        self.seed = seed
        self.weighting = weighting
        self.split = split
        self.plan = plan or DataPlan()
        self.law = SpanLaw(config)
        packs = PackPlan.read(dataset, sequence_length, int(config.starts_with_enc)) if config.pack_documents else None
        every = dataset.streams(split, sequence_length, packs)
        self.streams = [stream for stream in every if stream.rows]
        self.too_small = [stream.key for stream in every if not stream.rows]
        """Streams that fill no row, and so are never sampled."""
        if not self.streams:
            raise DataError(
                f"{dataset.folder}/{split}: no source has the {sequence_length - 1} tokens of one row; "
                "use a smaller sequence_length, more text, or another data.split_shares"
            )
        if self.too_small:
            _log.warning("%s: too few tokens for one row, left out: %s", split, ", ".join(self.too_small))
        self.rows = sum(stream.rows for stream in self.streams)
        """Rows in the split: samples in one epoch of a mixture in proportion to size."""
        self._last_rows = np.cumsum([stream.rows for stream in self.streams])
        self._assembler = Assembler(dataset.tokenizer, config.positions == "2d", config.starts_with_enc)
        self._opening = len(self._assembler.opening)
        if self._opening and self._examples:
            raise ConfigError(
                f"data.sampling.starts_with_enc=true is for text alone, but {self._examples[0].key} holds "
                "instructions; leave one of them out"
            )
        self._kinds = [
            Schedule(self.kind_shares, config.mixture_period, mix(seed, 2, stream.hash)) for stream in self.streams
        ]
        self.course = Course(self.streams, config, seed, self.plan) if split == "train" else None
        self._row_order: dict[tuple[int, int], Permutation] = {}
        self._draws, self._key = Draws(), mix(seed, 1)
        self._targets_a_sample = self.expected_targets if weighting == "token" else 0.0

    @property
    def kind_shares(self) -> list[float]:
        """Share of each kind among the samples of text, in `KINDS`' order."""
        config = self.config
        if config.objective == "causal":
            return [0.0, 0.0, 0.0, 1.0, 0.0]
        return [
            config.gmask_share,
            config.mask_share * (1 - config.sentence_share),
            config.mask_share * config.sentence_share,
            0.0,
            0.0,
        ]

    def address(self, index: int) -> Address:
        """Stream, epoch, row and kind of a sample."""
        if index < 0:
            raise IndexError(f"sample {index} is negative")
        if self.course is None:
            epoch, place = divmod(index, self.rows)
            row = self._permuted(len(self.streams), epoch, place, self.rows, 0)
            number = int(np.searchsorted(self._last_rows, row, side="right"))
            stream = self.streams[number]
            kind = self._kind(stream, 0, index)
            return Address(stream, epoch, row - int(self._last_rows[number]) + stream.rows, kind)
        number, draw = self.course.at(index)
        stream = self.streams[number]
        epoch, place = divmod(draw, stream.rows)
        row = self._permuted(number, epoch, place, stream.rows, stream.hash)
        return Address(stream, epoch, row, self._kind(stream, number, draw))

    def sample(self, index: int) -> Sample:
        """The sample of a global index.

        With weighting `sequence` a target weighs 1 / targets of its sample; with `token` 1 / `expected_targets`, the
        same for every target of every sample.
        """
        address = self.address(index)
        if isinstance(address.stream, InstructionStream):
            return self.instructions(address.stream.examples(address.row), address.stream.info.lang, index)
        generator = self._draws.at(self._key, mix(index))
        lang = address.stream.info.lang
        if isinstance(address.stream, PackedStream):
            pieces = address.stream.read_pieces(address.row)
            # Spans take more slots than one mask does, and what is left out then is the end: each time another's.
            shuffled = [pieces[number] for number in generator.permutation(len(pieces))]
            return self._build(shuffled, address.kind, lang, generator, index)
        return self.build(address.stream.read_row(address.row), address.kind, lang, generator, index)

    def build(
        self, row: NDArray[np.int64], kind: int, lang: str, generator: np.random.Generator, index: int = 0
    ) -> Sample:
        """A sample of one kind from a row, int64 [sequence_length − 1]."""
        return self._build(self._pieces(row), kind, lang, generator, index)

    def _build(
        self, pieces: list[NDArray[np.int64]], kind: int, lang: str, generator: np.random.Generator, index: int
    ) -> Sample:
        """A sample of one kind from texts that do not see one another: documents, or one whole row."""
        layout = Layout.empty(self.sequence_length, self.dataset.tokenizer.eod)
        if kind == GMASK:
            self._prefix(layout, pieces, generator)
        elif kind == CAUSAL:
            for piece in pieces:
                self._assembler.causal(layout, piece)
        elif self.config.isolate_documents:
            for piece in pieces:
                self._blanks_of_document(layout, piece, kind, generator)
        elif kind == MASK:
            self._blanks(layout, pieces[0], generator)
        else:
            self._sentence_blanks(layout, pieces[0], generator)
        return self._finished(layout, kind, lang, index)

    def instructions(self, examples: list[Example], lang: str, index: int = 0) -> Sample:
        """A sample of prompts with their answers, each a segment of its own; together they must fit the sequence."""
        tokenizer = self.dataset.tokenizer
        mask = tokenizer.special_ids[self.config.instruction_mask]
        layout = Layout.empty(self.sequence_length, tokenizer.eod)
        for example in examples:
            generation = np.append(example.answer, tokenizer.eop) if example.whole else example.answer
            self._assembler.prompt(layout, example.prompt, mask, generation)
        return self._finished(layout, INSTRUCTION, lang, index)

    def _finished(self, layout: Layout, kind: int, lang: str, index: int) -> Sample:
        targets = int(layout.is_target.sum())
        each = 1.0 / self._targets_a_sample if self.weighting == "token" else 1.0 / max(1, targets)
        return Sample(
            tokens=layout.tokens,
            targets=layout.targets,
            loss_weight=layout.is_target * np.float32(each),
            positions=layout.positions,
            attend_from=layout.attend_from,
            attend_to=layout.attend_to,
            group=group_of(kind, lang),
            sample_index=index,
        )

    def batch(self, indices: NDArray[np.int64] | list[int] | range) -> Batch:
        """Samples of several indices, in their order."""
        return Batch.from_samples([self.sample(int(index)) for index in indices])

    @cached_property
    def expected_targets_by_kind(self) -> dict[str, float]:
        """Targets a sample of each kind is expected to hold, for joined documents.

        Exact for gmask, mask and causal, and for instructions the mean of the packs; smask's depends on the text, and
        mask's stands in for it. Isolating documents changes the numbers with the text; these are then a fixed scale,
        which is all that a loss weight needs.
        """
        row = self.sequence_length - 1
        spans, hidden = self._expected_blanks
        most = row - self._opening
        gmask = (self._shortest_generation(most) + most) / 2
        examples = self._examples
        packed = sum(one.packing.targets for one in examples) / max(1, sum(one.rows for one in examples))
        return dict(zip(KINDS, (gmask, spans + hidden, spans + hidden, float(row), packed), strict=True))

    @property
    def expected_targets(self) -> float:
        """Targets a sample is expected to hold, over all kinds."""
        shares = np.array(self.kind_shares)
        if self._examples:
            instructed = self.config.instruction_share if len(self._examples) < len(self.streams) else 1.0
            shares = shares / shares.sum() * (1 - instructed)
            shares[INSTRUCTION] = instructed
        return float(shares @ np.array(list(self.expected_targets_by_kind.values())) / shares.sum())

    @property
    def expected_unused_tokens(self) -> float:
        """Tokens a MASK sample leaves unused at its row's end, expected; they turn up under other kinds and epochs."""
        openings = self._opening * self.law.expected_segments(self.sequence_length)
        return 2 * self._expected_blanks[0] + openings - 1

    def summary(self) -> dict[str, Any]:
        """What a run's log should say about its samples: rows and unused tokens by stream, targets by kind."""
        shares = dict(zip(KINDS, self.kind_shares, strict=True))
        return {
            "split": self.split,
            "rows": {stream.key: stream.rows for stream in self.streams},
            "tokens_in_no_row": {stream.key: stream.unused_tokens for stream in self.streams},
            "left_out": list(self.too_small),
            "kind_shares": {kind: share for kind, share in shares.items() if share},
            "expected_targets": {kind: self.expected_targets_by_kind[kind] for kind in shares if shares[kind]},
            "expected_unused_tokens_a_mask_sample": self.expected_unused_tokens,
            "instructions": {stream.key: asdict(stream.packing) for stream in self._examples},
            "packs": {stream.key: asdict(stream.fill) for stream in self.streams if isinstance(stream, PackedStream)},
        }

    def unigram_loss(self, batch: Batch) -> Tensor:
        """Nats of a unigram model on a batch's targets, float32 [B, S], 0 where there is no target.

        The fair baseline: token counts of the train split with one added, and for eop the share it has among the
        targets of the sample's kind, so that a model gains nothing by knowing how often a span ends.
        """
        tables = torch.from_numpy(self._unigram_tables)
        kind = (batch.group.cpu().long() // 8)[:, None].expand_as(batch.targets)
        nats = tables[kind, batch.targets.cpu()]
        return (nats * (batch.loss_weight.cpu() > 0)).to(batch.targets.device)

    @cached_property
    def _expected_blanks(self) -> tuple[float, float]:
        """(spans, hidden tokens) expected in a MASK sample."""
        return self.law.expected_sequence(self.sequence_length, self._opening)

    @property
    def _examples(self) -> list[InstructionStream]:
        return [stream for stream in self.streams if isinstance(stream, InstructionStream)]

    def _kind(self, stream: AnyStream, number: int, place: int) -> int:
        """Kind of the sample at a place of the quota table of stream `number`."""
        return INSTRUCTION if isinstance(stream, InstructionStream) else self._kinds[number].at(place)[0]

    def _permuted(self, number: int, epoch: int, place: int, size: int, name: int) -> int:
        """Row at a place of an epoch. Only the last permutation of each stream is kept."""
        key = (number, epoch)
        if key not in self._row_order:
            self._row_order = {kept: order for kept, order in self._row_order.items() if kept[0] != number}
            self._row_order[key] = Permutation(size, mix(self.seed, 4, name, epoch))
        return self._row_order[key](place)

    def _pieces(self, row: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """The row, or its documents (each with its eod) where they are isolated."""
        if not self.config.isolate_documents:
            return [row]
        edges = np.flatnonzero(row == self.dataset.tokenizer.eod) + 1
        return [piece for piece in np.split(row, edges) if len(piece)]

    def _shortest_generation(self, tokens: int) -> int:
        return max(1, -(-round(self.config.min_gmask_ratio * MILLION) * tokens // MILLION))

    def _prefix(self, layout: Layout, pieces: list[NDArray[np.int64]], generator: np.random.Generator) -> None:
        for piece in pieces:
            fitting = piece[: max(0, self.sequence_length - layout.used - 1 - self._opening)]
            if len(fitting):
                shortest = self._shortest_generation(len(fitting))
                self._assembler.prefix(layout, fitting, int(generator.integers(shortest, len(fitting), endpoint=True)))

    def _blanks(self, layout: Layout, row: NDArray[np.int64], generator: np.random.Generator) -> None:
        """All [MASK] segments of a sequence at once."""
        slots = self.law.budgets(generator, self.sequence_length) - self._opening
        lengths, counts = self.law.draw_lengths(generator, slots)
        sizes = slots - 2 * counts
        text = row[: int(sizes.sum())]
        spans = self._inside(generator, self.law.place(generator, lengths, counts, sizes), sizes, text)
        self._assembler.blanks(layout, text, sizes, spans, np.full(len(sizes), self.dataset.tokenizer.mask))

    def _sentence_blanks(self, layout: Layout, row: NDArray[np.int64], generator: np.random.Generator) -> None:
        segments: list[_Segment] = []
        at = 0
        found = self._sentences(row)
        for budget in (self.law.budgets(generator, self.sequence_length) - self._opening).tolist():
            segments.append(self._sentence_segment(row, at, found, budget, generator))
            at += segments[-1].size
        self._lay_out(layout, row[:at], segments)

    def _blanks_of_document(
        self, layout: Layout, piece: NDArray[np.int64], kind: int, generator: np.random.Generator
    ) -> None:
        """Segments of one isolated document; a rest too short for spans stays unused."""
        part = max(SMALLEST_SEGMENT, self.sequence_length // self.config.mask_segments)
        segments: list[_Segment] = []
        at = 0
        left = self.sequence_length - layout.used - self._opening
        found = self._sentences(piece) if kind == SMASK else None
        while len(piece) - at >= SMALLEST_SEGMENT and left >= SMALLEST_SEGMENT:
            slots = min(part, left)
            if left - slots < SMALLEST_SEGMENT:
                slots = left
            if found is not None:
                segments.append(self._sentence_segment(piece, at, found, slots, generator))
            else:
                segments.append(self._span_segment(piece, at, slots, generator))
            at += segments[-1].size
            left -= segments[-1].size + 2 * len(segments[-1].spans.start) + self._opening
        if segments:
            self._lay_out(layout, piece[:at], segments)

    def _lay_out(self, layout: Layout, text: NDArray[np.int64], segments: list[_Segment]) -> None:
        sizes = np.array([segment.size for segment in segments])
        masks = np.array([segment.mask for segment in segments])
        self._assembler.blanks(layout, text, sizes, Spans.join([segment.spans for segment in segments], sizes), masks)

    def _sentences(self, text: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return sentences(text, self.dataset.tokenizer.sentence_marks, self.dataset.tokenizer.eod)

    def _sentence_segment(
        self,
        text: NDArray[np.int64],
        at: int,
        found: tuple[NDArray[np.int64], NDArray[np.int64]],
        slots: int,
        generator: np.random.Generator,
    ) -> _Segment:
        """A segment that begins at `at` with whole sentences hidden, or, where none is short enough, spans."""
        start, end = found
        left = len(text) - at
        chosen = draw_sentences(generator, start - at, end - at, slots, left, self.law.ratio)
        if not chosen:
            return self._span_segment(text, at, slots, generator)
        starts, lengths = np.array(chosen).T
        spans = Spans(np.zeros(len(chosen), dtype=np.int64), starts, lengths, generator.permutation(len(chosen)))
        return _Segment(min(slots - 2 * len(chosen), left), spans, self.dataset.tokenizer.smask)

    def _span_segment(self, text: NDArray[np.int64], at: int, slots: int, generator: np.random.Generator) -> _Segment:
        """A segment that begins at `at` with spans hidden."""
        left = len(text) - at
        lengths, counts = self.law.draw_lengths(generator, np.array([slots]), left)
        sizes = np.minimum(slots - 2 * counts, left)
        placed = self.law.place(generator, lengths, counts, sizes)
        spans = self._inside(generator, placed, sizes, text[at : at + int(sizes[0])])
        return _Segment(int(sizes[0]), spans, self.dataset.tokenizer.mask)

    def _inside(
        self, generator: np.random.Generator, spans: Spans, sizes: NDArray[np.int64], text: NDArray[np.int64]
    ) -> Spans:
        if self.config.spans_cross_documents:
            return spans
        ends = text == self.dataset.tokenizer.eod
        return self.law.keep_inside_documents(generator, spans, sizes, ends) if ends.any() else spans

    @cached_property
    def _unigram_tables(self) -> NDArray[np.float32]:
        """−ln p of each token under each kind, float32 [kinds, vocab_size]."""
        spans, hidden = self._expected_blanks
        answers = sum(stream.packing.ends for stream in self._examples)
        answer_ends = answers / max(1, sum(stream.packing.targets for stream in self._examples))
        ends = [0.0, spans / (spans + hidden), self._measured_sentence_ends(), 0.0, answer_ends]
        tables = np.empty((len(KINDS), self.dataset.tokenizer.vocab_size), dtype=np.float32)
        for kind, share in enumerate(ends):
            tables[kind] = self.dataset.unigram_nats - np.log(1 - share)
            if share:
                tables[kind, self.dataset.tokenizer.eop] = -np.log(share)
        return tables

    def _measured_sentence_ends(self) -> float:
        """Share of eop among smask targets, from 32 rows: it depends on the text, so there is nothing to derive."""
        texts = [stream for stream in self.streams if not isinstance(stream, InstructionStream)]
        if not self.kind_shares[SMASK] or not texts:
            return 0.0
        ends = targets = 0
        for number in range(32):
            stream = texts[number % len(texts)]
            generator = np.random.Generator(np.random.Philox(key=mix(self.seed, 5, number)))
            row = mix(self.seed, 6, number) % stream.rows
            pieces = stream.read_pieces(row) if isinstance(stream, PackedStream) else self._pieces(stream.read_row(row))
            sample = self._build(pieces, SMASK, stream.info.lang, generator, 0)
            ends += int((sample.targets[sample.loss_weight > 0] == self.dataset.tokenizer.eop).sum())
            targets += int((sample.loss_weight > 0).sum())
        return ends / targets
