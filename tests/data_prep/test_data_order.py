"""Permutations, quota tables and the data plan."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import ConfigError
from data_prep.order import DataPlan, Draws, Mixture, Permutation, Schedule, mixture_plan, quotas

pytestmark = pytest.mark.unit


@given(st.integers(1, 600), st.integers(0, 2**64 - 1))
@settings(max_examples=60)
def test_permutation_is_a_bijection(size: int, key: int) -> None:
    permutation = Permutation(size, key)
    assert sorted(permutation(index) for index in range(size)) == list(range(size))


def test_permutation_of_a_huge_source_needs_no_memory_and_mixes() -> None:
    permutation = Permutation(10**15, 3)
    places = np.array([permutation(index) for index in range(2000)])
    assert len(set(places.tolist())) == 2000
    assert abs(places.mean() / 10**15 - 0.5) < 0.03
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.08
    with pytest.raises(IndexError):
        permutation(10**15)


def test_every_place_is_equally_likely() -> None:
    """Where index 0 of 7 goes over 7,000 keys: chi-square, 0.999 quantile of 6 degrees."""
    counts = Counter(Permutation(7, key)(0) for key in range(7000))
    assert sum((counts[place] - 1000) ** 2 / 1000 for place in range(7)) < 22.5


@given(st.lists(st.floats(0, 100), min_size=1, max_size=8).filter(any), st.integers(8, 2000))
@settings(max_examples=200)
def test_quotas_are_within_one_of_the_exact_share(shares: list[float], period: int) -> None:
    counts = quotas(shares, period)
    scale = period / sum(counts)
    assert scale == int(scale), "the period is a divisor of the one asked for"
    for share, count in zip(shares, counts, strict=True):
        assert (count == 0) == (share == 0)
        exact = share / sum(shares) * period
        assert count * scale > exact - len(shares)
        assert count * scale < exact + len(shares)


def test_quotas_take_out_common_divisors() -> None:
    assert quotas([0.7, 0.3], 1000) == (7, 3)
    assert quotas([0.7, 0.3 * (1 - 1 / 3), 0.3 * 1 / 3, 0.0], 1000) == (7, 2, 1, 0)
    with pytest.raises(ConfigError, match="mixture_period=2"):
        quotas([1, 1, 1], 2)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any), st.integers(0, 2**64 - 1))
@settings(max_examples=50)
def test_schedule_keeps_shares_in_every_period_and_counts_its_choices(shares: list[int], key: int) -> None:
    schedule = Schedule([float(share) for share in shares], 100, key)
    made = [0] * len(shares)
    for place in range(3 * schedule.period + 5):
        assert schedule.made_before(place) == made
        choice, before = schedule.at(place)
        assert before == made[choice]
        assert schedule.place_of(choice, before) == place
        assert schedule.earliest(choice, before) <= place
        made[choice] += 1
        if (place + 1) % schedule.period == 0:
            assert made == [count * (place + 1) // schedule.period for count in schedule.counts]


def test_a_mixture_finds_where_a_stream_is_drawn() -> None:
    """Two streams of text, two of instructions."""
    mixture = Mixture(Schedule([0.5, 0.3, 0.2], 10, 7), Schedule([3.0, 1.0], 10, 8))
    for place in range(300):
        stream, made = mixture.at(place)
        assert mixture.place_of(stream, made) == place
        assert mixture.earliest(stream, made) <= place


@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(1, 60)), max_size=5),
    st.integers(0, 300),
    st.integers(0, 200),
    st.integers(0, 200),
)
@settings(max_examples=200)
def test_skipped_ranges_are_never_trained_on(
    ranges: list[tuple[int, int]], cursor: int, first: int, second: int
) -> None:
    plan = DataPlan([{"from_sample": 0, "skip": [a, a + n]} for a, n in ranges])
    skipped = {index for a, n in ranges for index in range(a, a + n)}
    expected = [index for index in range(cursor, 2000) if index not in skipped][: first + second]
    indices = plan.indices(cursor, first + second)
    assert indices.tolist() == expected
    # Two steps in a row give the same as one: the cursor is all there is to keep.
    middle = plan.advance(cursor, first)
    assert [*plan.indices(cursor, first), *plan.indices(middle, second)] == expected
    assert DataPlan(plan.to_list()).indices(cursor, 50).tolist() == plan.indices(cursor, 50).tolist()
    changed = DataPlan([{"from_sample": 0, "weights": {"a": 1}}, {"from_sample": 90, "weights": {"b": 1}}])
    skipping = changed.without(40, [[a, a + n] for a, n in ranges])
    assert skipping.mixtures == changed.mixtures
    assert skipping.indices(cursor, first + second).tolist() == expected


@pytest.mark.parametrize(
    "entry",
    [{"from_sample": 1}, {"skip": [1, 2]}, {"from_sample": 0, "skip": [5, 5]}, {"from_sample": -1, "skip": [1, 2]}],
)
def test_a_malformed_plan_is_refused(entry: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="data plan"):
        DataPlan([entry])


def test_a_mixture_changed_on_resume_holds_from_there_on() -> None:
    """What was planned before the resumed sample stays, skips too; later entries come from the config."""
    first = [{"from_sample": 0, "weights": {"a": 1.0}}, {"from_sample": 50, "weights": {"a": 1.0, "b": 1.0}}]
    plan = mixture_plan(first)
    assert plan.with_mixture([], 30) is plan
    assert plan.with_mixture(first, 30).to_list() == first
    assert plan.with_mixture(first, 70).to_list() == first
    changed = [{"from_sample": 0, "weights": {"b": 1.0}}, {"from_sample": 90, "weights": {"a": 2.0}}]
    skipping = DataPlan([*first, {"from_sample": 60, "skip": [61, 65]}])
    assert skipping.with_mixture(changed, 70).to_list() == [
        *first,
        {"from_sample": 60, "skip": [61, 65]},
        {"from_sample": 70, "weights": {"b": 1.0}},
        {"from_sample": 90, "weights": {"a": 2.0}},
    ]
    assert skipping.with_mixture(changed, 95).to_list()[-1] == {"from_sample": 95, "weights": {"a": 2.0}}
    with pytest.raises(ConfigError, match=r"data\.mixture=.* must be a list"):
        mixture_plan([{"from_sample": 0, "skip": [1, 2]}])


def test_draws_are_those_of_a_new_generator_and_begin_anew() -> None:
    draws = Draws()
    for high, low in ((3, 4), (2**64 - 1, 7), (3, 4)):
        expected = np.random.Generator(np.random.Philox(key=high << 64 | low))
        generator = draws.at(high, low)
        assert (generator.random(5) == expected.random(5)).all()
        # Half a word is left over, which the next stream must not begin with.
        assert generator.integers(100, dtype=np.uint32) == expected.integers(100, dtype=np.uint32)
