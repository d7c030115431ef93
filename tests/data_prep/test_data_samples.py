"""The sampler against what it promises: nothing lost, nothing cut, and the laws it states."""

import math
import pickle
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from sample_checks import take_apart

from data_prep.batch import GMASK, KINDS, MASK, SMASK, group_language
from data_prep.config import SamplingConfig
from data_prep.dataset import Dataset
from data_prep.errors import ConfigError, DataError
from data_prep.order import mix
from data_prep.samples import Sampler
from data_prep.spans import SpanLaw

pytestmark = pytest.mark.unit
SLOTS = 256
TRIALS = 10_000


def make(
    dataset: Dataset, slots: int = SLOTS, *, weighting: str = "sequence", seed: int = 7, **settings: object
) -> Sampler:
    return Sampler(dataset, SamplingConfig(**settings), slots, seed=seed, weighting=weighting)  # type: ignore[arg-type]


def generator(number: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=number))


def close(measured: float, expected: float, tolerance: float = 0.01) -> bool:
    return abs(measured - expected) <= tolerance * abs(expected)


@pytest.mark.parametrize("kind", [GMASK, MASK, SMASK], ids=lambda kind: KINDS[kind])
def test_no_target_is_lost_and_every_slot_is_used(dataset: Dataset, kind: int) -> None:
    """10,000 samples a kind, taken apart: filling the blanks gives the row back, and nothing crosses a document."""
    sampler = make(dataset, sentence_share=0.5, positions="2d")
    tokenizer = dataset.tokenizer
    rows = [(stream, row) for stream in sampler.streams for row in range(stream.rows)]
    for number in range(TRIALS):
        stream, row_number = rows[number % len(rows)]
        row = stream.read_row(row_number)
        sample = sampler.build(row, kind, "zh", generator(number), number)
        segments = take_apart(sample, tokenizer, two_dimensional=True)
        assert sum(segment.slots for segment in segments) == SLOTS
        text = np.concatenate([segment.text for segment in segments])
        assert np.array_equal(text, row[: len(text)])
        if kind == GMASK:
            assert len(text) == len(row)
            continue
        assert len(text) == SLOTS - 2 * sum(len(segment.spans) for segment in segments)
        for segment in segments:
            for start, length in segment.spans:
                assert tokenizer.eod not in segment.text[start : start + length]
        assert abs(float(sample.loss_weight.sum()) - 1) < 1e-5


@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize("slots", [32, 61, 255, 1024])
def test_odd_lengths_and_isolated_documents(dataset: Dataset, slots: int, isolate: bool) -> None:
    """Every kind at odd lengths; with isolated documents no segment holds a document's end but at its own end."""
    sampler = make(dataset, slots, sentence_share=0.5, isolate_documents=isolate)
    eod = dataset.tokenizer.eod
    for number in range(300):
        stream = sampler.streams[number % len(sampler.streams)]
        row = stream.read_row(number % stream.rows)
        sample = sampler.build(row, number % 3, "en", generator(number))
        segments = take_apart(sample, dataset.tokenizer)
        for segment in segments:
            assert np.array_equal(segment.text, row[_find(row, segment.text) :][: len(segment.text)])
            if isolate:
                assert eod not in segment.text[:-1]
        if not isolate:
            assert sum(segment.slots for segment in segments) == slots


def _find(row: np.ndarray, text: np.ndarray) -> int:
    windows = np.lib.stride_tricks.sliding_window_view(row, len(text))
    found = np.flatnonzero((windows == text).all(axis=1))
    assert len(found), "the segment's text is not in the row"
    return int(found[0])


def test_causal_predicts_each_token_of_the_row_once(dataset: Dataset) -> None:
    for isolate in (False, True):
        sampler = make(dataset, objective="causal", isolate_documents=isolate)
        for number in range(50):
            sample = sampler.sample(number)
            address = sampler.address(number)
            row = address.stream.read_row(address.row)
            assert np.array_equal(sample.targets[:-1], row)
            assert sample.loss_weight[-1] == 0
            starts = np.flatnonzero(sample.tokens[:-1] == dataset.tokenizer.sop)
            ends = np.flatnonzero(row[:-1] == dataset.tokenizer.eod) + 1
            assert np.array_equal(starts, [0, *ends] if isolate else [0])
            assert np.array_equal(sample.attend_to, np.arange(SLOTS) + 1)
            assert np.array_equal(np.unique(sample.attend_from[:-1]), starts)


def test_hidden_spans_may_cross_documents_when_asked(dataset: Dataset) -> None:
    sampler = make(dataset, 64, spans_cross_documents=True)
    row = np.full(63, 300)
    row[::7] = dataset.tokenizer.eod
    crossed = 0
    for number in range(200):
        segments = take_apart(sampler.build(row, MASK, "zh", generator(number)), dataset.tokenizer)
        crossed += any(dataset.tokenizer.eod in s.text[a : a + n] for s in segments for a, n in s.spans)
    assert crossed > 100


def test_spans_stay_inside_even_the_shortest_documents(dataset: Dataset) -> None:
    """Documents of three tokens defeat redrawing; spans are then set one by one, shortened, and still inside."""
    sampler = make(dataset, 512, mask_segments=1, short_text_probability=0.0)
    row = np.arange(300, 811)
    row[3::4] = dataset.tokenizer.eod
    for number in range(100):
        (segment,) = take_apart(sampler.build(row, MASK, "zh", generator(number)), dataset.tokenizer)
        assert segment.slots == 512
        for start, length in segment.spans:
            assert dataset.tokenizer.eod not in segment.text[start : start + length]


def test_sentence_blanks_hold_whole_sentences(dataset: Dataset) -> None:
    """Each [sMASK] hides tokens from just behind one sentence end up to the next, at most 15 % of the segment."""
    sampler = make(dataset, 1024, sentence_share=1.0, gmask_share=0.0, mask_share=1.0)
    tokenizer = dataset.tokenizer
    hidden_sentences = 0
    for number in range(300):
        stream = sampler.streams[number % 2]
        row = stream.read_row(number % stream.rows)
        sample = sampler.build(row, SMASK, "zh", generator(number))
        at = 0
        for segment in take_apart(sample, tokenizer):
            context = sample.tokens[at : int(sample.attend_to[at])]
            at += segment.slots
            if tokenizer.smask not in context:
                continue  # no sentence was short enough: ordinary spans
            assert tokenizer.mask not in context
            for start, length in segment.spans:
                hidden_sentences += 1
                last = tokenizer.piece(int(segment.text[start + length - 1]))
                follower = segment.text[start + length] if start + length < len(segment.text) else None
                assert last.endswith(tuple("。！？；：….?!;:\n")) or follower == tokenizer.eod, last
            hidden = sum(length for _, length in segment.spans)
            assert hidden <= 0.15 * len(segment.text) or len(segment.spans) == 1
    assert hidden_sentences > 1000


# --- the laws, each against an expectation derived here and nowhere else ----------------------------------------------


def poisson_law(mean: float, longest: int) -> list[float]:
    weights = [mean**k * math.exp(-mean) / math.factorial(k) for k in range(1, longest + 1)]
    return [weight / sum(weights) for weight in weights]


def exact_segment(slots: int, config: SamplingConfig) -> tuple[float, float, float]:
    """E[spans], E[hidden], E[hidden / text] of one segment by walking through every state (spans, hidden)."""
    law = poisson_law(config.poisson_mean, min(config.max_span_tokens, slots // 4))
    single = config.single_span_probability
    spans = hidden = ratio = 0.0
    alive = {0: 1.0}
    number = 0
    while alive:
        number += 1
        text = slots - 2 * number
        after: dict[int, float] = {}
        for before, chance in alive.items():
            for length, weight in enumerate(law, start=1):
                total = before + length
                # A single-span segment stops after its first draw whatever that reached.
                stops = 1.0 if total * 100 >= 15 * text else single if number == 1 else 0.0
                spans += chance * weight * stops * number
                hidden += chance * weight * stops * total
                ratio += chance * weight * stops * total / text
                if stops < 1:
                    after[total] = after.get(total, 0.0) + chance * weight * (1 - stops)
        alive = after
    return spans, hidden, ratio


def exact_sequence(slots: int, config: SamplingConfig) -> tuple[float, float]:
    """E[spans], E[hidden] of four equal segments, each now and then cut in two."""
    budget = slots // 4
    whole = exact_segment(budget, config)
    cuts = range(32, budget - 32 + 1) if config.short_text_probability else range(0)
    cut = [0.0, 0.0]
    for first in cuts:
        for size in (first, budget - first):
            for place in range(2):
                cut[place] += exact_segment(size, config)[place] / len(cuts)
    chance = config.short_text_probability if len(cuts) else 0.0
    return tuple(4 * ((1 - chance) * whole[place] + chance * cut[place]) for place in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize("slots", [256, 2048])
def test_expected_targets_are_exact(dataset: Dataset, slots: int) -> None:
    """The constant that token weighting divides by, against enumeration."""
    config = SamplingConfig(short_text_probability=0.02 if slots == 256 else 0.0)
    law = SpanLaw(config)
    assert np.allclose(law.expected_sequence(slots), exact_sequence(slots, config), rtol=1e-12)
    sampler = Sampler(dataset, config, slots, seed=1)
    row = slots - 1
    lengths = range(math.ceil(0.2 * row), row + 1)
    assert sampler.expected_targets_by_kind["gmask"] == sum(lengths) / len(lengths)
    spans, hidden = exact_sequence(slots, config)
    assert math.isclose(sampler.expected_targets, 0.7 * sum(lengths) / len(lengths) + 0.3 * (spans + hidden))


def test_expected_cuts_are_exact() -> None:
    config = SamplingConfig(short_text_probability=0.3)
    assert np.allclose(SpanLaw(config).expected_sequence(400), exact_sequence(400, config), rtol=1e-12)


def test_measured_spans_follow_the_stated_law() -> None:
    """Lengths, counts and mask ratio of 10,000 sequences within 1 % of enumeration; each length's share too."""
    config = SamplingConfig(short_text_probability=0.0)
    law = SpanLaw(config)
    budgets = np.full(4, 512)
    drawn: Counter[int] = Counter()
    spans = hidden = ratio = 0.0
    source = generator(3)
    for _ in range(TRIALS):
        lengths, counts = law.draw_lengths(source, budgets)
        used = np.where(np.arange(lengths.shape[1]) < counts[:, None], lengths, 0)
        spans += counts.sum()
        hidden += used.sum()
        ratio += (used.sum(axis=1) / (512 - 2 * counts)).sum()
        drawn.update(used[used > 0].tolist())
    expected = exact_segment(512, config)
    assert close(spans / TRIALS / 4, expected[0])
    assert close(hidden / TRIALS / 4, expected[1])
    assert close(ratio / TRIALS / 4, expected[2])
    for length, share in enumerate(poisson_law(3.0, 39)[:7], start=1):
        # Wald: a stopping rule does not change how often each length is drawn.
        assert close(drawn[length] / drawn.total(), share), length
    assert max(drawn) <= 39


def test_measured_sequences_follow_the_stated_law(dataset: Dataset) -> None:
    """Whole samples as `sample(i)` makes them: targets a kind, and gMASK's uniform length."""
    counts: dict[int, list[int]] = {GMASK: [], MASK: []}
    for kind, trials in ((GMASK, 2 * TRIALS), (MASK, TRIALS)):
        sampler = make(dataset, 256, gmask_share=float(kind == GMASK), mask_share=float(kind == MASK))
        for number in range(trials):
            sample = sampler.sample(number)
            counts[sample.group // 8].append(int((sample.loss_weight > 0).sum()))
    assert len(counts[GMASK]) == 2 * TRIALS
    assert close(float(np.mean(counts[GMASK])), (51 + 255) / 2)
    assert close(float(np.mean(counts[MASK])), sum(exact_sequence(256, SamplingConfig())))
    edges = np.histogram(counts[GMASK], bins=5, range=(51, 256))[0] / len(counts[GMASK])
    assert np.abs(edges - 0.2).max() < 0.02


def test_short_and_single_shares() -> None:
    config = SamplingConfig(short_text_probability=0.25, single_span_probability=0.25)
    law = SpanLaw(config)
    source = generator(9)
    cuts, first, singles = 0, [], 0
    for _ in range(TRIALS):
        budgets = law.budgets(source, 1024)
        assert budgets.sum() == 1024
        cuts += len(budgets) - 4
        first += [int(size) for size in budgets if size != 256]
        singles += int((law.draw_lengths(source, np.full(4, 256))[1] == 1).sum())
    assert close(cuts / TRIALS / 4, 0.25)
    assert min(first) == 32
    assert max(first) == 224
    assert close(float(np.mean(first)), 128)
    assert close(singles / TRIALS / 4, 0.25)


def test_every_arrangement_is_equally_likely() -> None:
    """Spans of 1, 2 and 2 tokens in 9: all arrangements enumerated, chi-square against a flat law."""
    law = SpanLaw(SamplingConfig())
    possible = set()
    for sizes in set(permutations((1, 2, 2))):
        for gaps in permutations(range(5), 3):
            if list(gaps) == sorted(gaps):
                at, places = 0, []
                for gap, size in zip(gaps, sizes, strict=True):
                    places.append((gap + at, size))
                    at += size
                possible.add(tuple(places))
    assert len(possible) == 30
    source, seen, orders = generator(1), Counter(), Counter()
    trials = 6000
    for _ in range(trials):
        spans = law.place(source, np.array([[1, 2, 2]]), np.array([3]), np.array([9]))
        seen[tuple(zip(spans.start.tolist(), spans.length.tolist(), strict=True))] += 1
        orders[tuple(spans.order.tolist())] += 1
    assert set(seen) == possible
    assert set(orders) == set(permutations(range(3)))
    assert (
        sum((count - trials / 30) ** 2 / (trials / 30) for count in seen.values()) < 58.3
    )  # 0.999 quantile, 29 degrees
    assert (
        sum((count - trials / 6) ** 2 / (trials / 6) for count in orders.values()) < 20.5
    )  # 0.999 quantile, 5 degrees


# --- which sample -----------------------------------------------------------------------------------------------------


def test_a_sample_depends_on_its_index_alone(dataset: Dataset) -> None:
    forward, backward = make(dataset), make(dataset)
    first = [forward.batch([index]).hash() for index in range(60)]
    second = [backward.batch([index]).hash() for index in reversed(range(60))]
    assert first == second[::-1]
    assert len(set(first)) == 60
    assert make(dataset, seed=8).batch([0]).hash() != first[0]


def test_an_epoch_draws_each_row_once_and_masks_afresh(dataset: Dataset) -> None:
    sampler = make(dataset)
    drawn: dict[tuple[str, int], list[int]] = {}
    seen: dict[tuple[str, int], list[bytes]] = {}
    for index in range(3 * sampler.rows):
        address = sampler.address(index)
        drawn.setdefault((address.stream.key, address.epoch), []).append(address.row)
        if address.kind == MASK:
            seen.setdefault((address.stream.key, address.row), []).append(sampler.sample(index).tokens.tobytes())
    assert max(map(len, seen.values())) > 1
    assert all(len(set(masks)) == len(masks) for masks in seen.values())
    for stream in sampler.streams:
        orders = [drawn[stream.key, epoch] for epoch in range(2)]
        for order in orders:
            assert sorted(order) == list(range(stream.rows))
        assert orders[0] != orders[1]


def test_kind_shares_are_exact_in_every_period_of_a_source(dataset: Dataset) -> None:
    sampler = make(dataset, sentence_share=1 / 3)
    kinds: dict[str, list[int]] = {}
    for index in range(600):
        address = sampler.address(index)
        kinds.setdefault(address.stream.key, []).append(address.kind)
    for order in kinds.values():
        for start in range(0, len(order) - 1000, 1000):
            assert Counter(order[start : start + 1000]) == {GMASK: 700, MASK: 200, SMASK: 100}
    plain = make(dataset)
    kinds = {}
    for index in range(400):
        kinds.setdefault(plain.address(index).stream.key, []).append(plain.address(index).kind)
    for order in kinds.values():
        for start in range(0, len(order) - 10, 10):
            assert order[start : start + 10].count(GMASK) == 7


def test_held_out_rows_are_each_visited_once_with_fixed_masks(dataset: Dataset) -> None:
    for split in ("valid", "test"):
        sampler = Sampler(dataset, SamplingConfig(), 128, seed=5, split=split)
        places = [(address.stream.key, address.row) for address in map(sampler.address, range(sampler.rows))]
        assert sorted(places) == [(stream.key, row) for stream in sampler.streams for row in range(stream.rows)]
        again = Sampler(dataset, SamplingConfig(), 128, seed=5, split=split)
        assert sampler.batch(range(8)).hash() == again.batch(range(8)).hash()


def test_groups_name_kind_and_language(dataset: Dataset) -> None:
    sampler = make(dataset)
    languages = {group_language(int(sampler.sample(index).group)) for index in range(40)}
    assert languages == {"zh", "en"}


def test_token_weighting_is_one_constant(dataset: Dataset) -> None:
    batch = make(dataset, weighting="token").batch(range(50))
    weights = batch.loss_weight[batch.loss_weight > 0].unique()
    assert len(weights) == 1
    assert math.isclose(float(weights), 1 / make(dataset).expected_targets, rel_tol=1e-6)
    assert abs(float(batch.loss_weight.sum()) / 50 - 1) < 0.2


def test_unigram_baseline_counts_eop_fairly(dataset: Dataset) -> None:
    sampler = make(dataset, sentence_share=0.3)
    batch = sampler.batch(range(200))
    nats = sampler.unigram_loss(batch)
    target = batch.loss_weight > 0
    assert nats.shape == batch.targets.shape
    assert (nats[~target] == 0).all()
    for kind in (GMASK, MASK, SMASK):
        table = np.exp(-sampler._unigram_tables[kind].astype(np.float64))
        assert abs(table.sum() - 1) < 1e-3, "a distribution"
    ends = nats[target & (batch.targets == dataset.tokenizer.eop)]
    assert float(ends.max()) < 4
    assert float(nats[target].mean()) < math.log(dataset.tokenizer.vocab_size)
    assert np.allclose(
        dataset.unigram_loss(np.array([5])),
        -np.log((dataset.unigram_counts[5] + 1) / (dataset.unigram_counts + 1).sum()),
    )


def test_wrong_settings_are_named(dataset: Dataset) -> None:
    with pytest.raises(ConfigError, match="sequence_length=8"):
        make(dataset, 8)
    with pytest.raises(ConfigError, match=r"loss\.weighting=mean"):
        make(dataset, weighting="mean")
    with pytest.raises(ConfigError, match=r"gmask_share=0\.5"):
        SamplingConfig(gmask_share=0.5)
    with pytest.raises(ConfigError, match=r"sampling\.positions=3d"):
        SamplingConfig(positions="3d")
    with pytest.raises(DataError, match="sequence_length"):
        make(dataset, 10_000_000)


def test_a_summary_for_the_log(dataset: Dataset) -> None:
    sampler = make(dataset)
    summary = sampler.summary()
    assert summary["kind_shares"] == {"gmask": 0.7, "mask": 0.3}
    for stream in sampler.streams:
        total = stream.rows * (SLOTS - 1) + summary["tokens_in_no_row"][stream.key]
        assert total == stream.info.counts["train"].tokens
    samples = [sampler.build(sampler.streams[0].read_row(0), MASK, "zh", generator(n)) for n in range(400)]
    unused = [SLOTS - 1 - sum(len(s.text) for s in take_apart(sample, dataset.tokenizer)) for sample in samples]
    assert close(float(np.mean(unused)), summary["expected_unused_tokens_a_mask_sample"], 0.05)


def test_a_sampler_survives_pickling(dataset: Dataset) -> None:
    """Workers that are spawned, not forked, get it that way."""
    sampler = make(dataset)
    assert pickle.loads(pickle.dumps(sampler)).batch(range(5)).hash() == sampler.batch(range(5)).hash()
    assert len(pickle.dumps(sampler)) < 1_000_000


def test_mix_is_stable() -> None:
    """A changed hash would silently change every run's data."""
    assert mix(0) == 16294208416658607535
    assert [mix(1, 2), mix(2, 1)] == [mix(1, 2), mix(2, 1)]
    assert mix(1, 2) != mix(2, 1)
