"""Which row and kind a sample index means: permutations that are computed, quota tables, and the data plan.

Nothing here is stored or random at run time: all of it is a pure function of the seed, the shares and the index.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import gcd, isqrt, lcm
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import ConfigError

_MASK64 = (1 << 64) - 1
_ROUNDS = 6


def mix(*values: int) -> int:
    """64-bit hash of integers: a chain of SplitMix64 finalisers (Steele, Lea, Flood 2014)."""
    state = 0
    for value in values:
        state = (state + 0x9E3779B97F4A7C15 + value) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return state


class Draws:
    """Random numbers by address: a Philox generator that is set to the start of the stream of any key.

    A new one for each sample would first ask the system for entropy that its key makes needless, which takes as long as
    a quarter of the sample.
    """

    def __init__(self) -> None:
        self._bits = np.random.Philox(key=0)
        self._start = self._bits.state
        self._generator = np.random.Generator(self._bits)

    def at(self, high: int, low: int) -> np.random.Generator:
        """The generator of a key of two 64-bit halves, until the next call."""
        self._start["state"]["key"][:] = low, high
        self._bits.state = self._start
        return self._generator


class Permutation:
    """A bijection of 0 … size − 1, computed by a Feistel network over a grid that is hardly larger than `size`.

    Rounds alternate over the two coordinates of an a × b grid with a·b ≥ size (generalised Feistel, Black and Rogaway
    2002); a result beyond `size` is walked on along its cycle until it falls inside.
    """

    def __init__(self, size: int, key: int) -> None:
        """key: 64 bits; every key gives another order."""
        self.size = size
        self._high = max(1, isqrt(size))
        self._low = -(-size // self._high)
        self._keys = [mix(key, number) for number in range(_ROUNDS)]

    def __call__(self, index: int) -> int:
        """Place of `index`. Raises IndexError outside 0 … size − 1."""
        if not 0 <= index < self.size:
            raise IndexError(f"{index} is outside 0 … {self.size - 1}")
        while True:
            high, low = divmod(index, self._low)
            for number, key in enumerate(self._keys):
                if number % 2:
                    low = (low + mix(key, high)) % self._low
                else:
                    high = (high + mix(key, low)) % self._high
            index = high * self._low + low
            if index < self.size:
                return index


def quotas(shares: Sequence[float], period: int) -> tuple[int, ...]:
    """Whole numbers in proportion to `shares` that add up to a period of at most `period` samples.

    Largest remainders; every positive share gets at least one; a common divisor is taken out, so 0.7 and 0.3 become 7
    and 3 of 10. Raises ConfigError when the period cannot hold all shares.
    """
    positive = sum(share > 0 for share in shares)
    if not positive or min(shares) < 0:
        raise ConfigError(f"mixture shares {list(shares)} must be numbers ≥ 0, not all 0")
    if positive > period:
        raise ConfigError(f"data.sampling.mixture_period={period} is less than the {positive} sources; raise it")
    exact = [Fraction(share) for share in shares]
    unit = lcm(*(share.denominator for share in exact))
    parts = [int(share * unit) for share in exact]
    total = sum(parts)
    counts = [max(part * period // total, 1 if part else 0) for part in parts]
    while (given := sum(counts)) != period:
        step = 1 if given < period else -1
        open_to = [n for n, part in enumerate(parts) if part and (step > 0 or counts[n] > 1)]
        counts[max(open_to, key=lambda n: (parts[n] * period - counts[n] * total) * step)] += step
    divisor = gcd(*counts)
    return tuple(count // divisor for count in counts)


@lru_cache(maxsize=512)
def _table(counts: tuple[int, ...], key: int, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """One period: the choice at each place, and how often it was made before in this period."""
    generator = np.random.Generator(np.random.Philox(key=mix(key, number)))
    choices = generator.permutation(np.repeat(np.arange(len(counts)), counts))
    before = np.empty(len(choices), dtype=np.int64)
    for choice, count in enumerate(counts):
        before[choices == choice] = np.arange(count)
    return choices, before


class Schedule:
    """Assigns each place of an endless sequence one of several choices, keeping their shares exactly every period."""

    def __init__(self, shares: Sequence[float], period: int, key: int) -> None:
        """shares: one number ≥ 0 a choice; key: 64 bits that decide the order inside each period."""
        self.counts = quotas(shares, period)
        """Places of each choice in one period."""
        self.period = sum(self.counts)
        self._key = key
        chosen = [choice for choice, count in enumerate(self.counts) if count]
        self._only = chosen[0] if len(chosen) == 1 else None

    def at(self, place: int) -> tuple[int, int]:
        """(choice at `place`, how often it was made at earlier places)."""
        if self._only is not None:
            return self._only, place
        number, offset = divmod(place, self.period)
        choices, before = _table(self.counts, self._key, number)
        choice = int(choices[offset])
        return choice, number * self.counts[choice] + int(before[offset])

    def place_of(self, choice: int, made: int) -> int:
        """Where `choice` is made with `made` of it before."""
        if self._only is not None:
            return made
        number, within = divmod(made, self.counts[choice])
        choices, _ = _table(self.counts, self._key, number)
        return number * self.period + int(np.flatnonzero(choices == choice)[within])

    def earliest(self, choice: int, made: int) -> int:
        """The start of `place_of`'s period, at no cost."""
        return made // self.counts[choice] * self.period

    def made_before(self, place: int) -> list[int]:
        """How often each choice was made at places before `place`."""
        number, offset = divmod(place, self.period)
        choices, _ = _table(self.counts, self._key, number)
        head = np.bincount(choices[:offset], minlength=len(self.counts))
        return [number * count + int(extra) for count, extra in zip(self.counts, head, strict=True)]


class Mixture:
    """A schedule over text streams whose last choice stands for all instruction streams, shared out among them.

    Two levels, so that dozens of small tasks need no place each in every period of the whole.
    """

    def __init__(self, outer: Schedule, inner: Schedule | None = None) -> None:
        """inner: among the instruction streams; None where there are none, and `outer` has no choice for them."""
        self._outer, self._inner = outer, inner
        self._last = len(outer.counts) - 1

    def at(self, place: int) -> tuple[int, int]:
        """(stream at `place`, how often it was drawn at earlier places)."""
        choice, made = self._outer.at(place)
        if self._inner is None or choice < self._last:
            return choice, made
        task, made = self._inner.at(made)
        return self._last + task, made

    def place_of(self, stream: int, made: int) -> int:
        """Where `stream` is drawn with `made` draws of it before."""
        if self._inner is None or stream < self._last:
            return self._outer.place_of(stream, made)
        return self._outer.place_of(self._last, self._inner.place_of(stream - self._last, made))

    def earliest(self, stream: int, made: int) -> int:
        """A place not behind `place_of`'s, at no cost."""
        if self._inner is None or stream < self._last:
            return self._outer.earliest(stream, made)
        return self._outer.earliest(self._last, self._inner.earliest(stream - self._last, made))

    def made_before(self, place: int) -> list[int]:
        """How often each stream was drawn at places before `place`."""
        made = self._outer.made_before(place)
        return made if self._inner is None else made[:-1] + self._inner.made_before(made[-1])


@dataclass(frozen=True)
class PlanEntry:
    """One change of course: from sample `from_sample` on, other weights; or indices that are never trained on."""

    from_sample: int
    weights: Mapping[str, float] | None = None
    """Share by stream (`<source>.<lang>`) or by source; streams that are not named get none."""
    skip: tuple[int, int] | None = None
    """First index skipped, and the first one that is not."""


class DataPlan:
    """The append-only list of changes a run made to its data; empty for most runs. Stored in every checkpoint."""

    def __init__(self, entries: Sequence[PlanEntry | Mapping[str, Any]] = ()) -> None:
        """entries: `{from_sample, weights}` or `{from_sample, skip: [a, b)}`. Raises ConfigError for another form."""
        self.entries = [entry if isinstance(entry, PlanEntry) else _entry(entry) for entry in entries]
        starts = [entry.from_sample for entry in self.entries]
        if starts != sorted(starts) or (starts and starts[0] < 0):
            raise ConfigError(f"data plan: from_sample must be ≥ 0 and never fall, but they are {starts}")
        skips = sorted(entry.skip for entry in self.entries if entry.skip is not None)
        self._skips: list[tuple[int, int]] = []
        for first, end in skips:
            if self._skips and first <= self._skips[-1][1]:
                self._skips[-1] = (self._skips[-1][0], max(end, self._skips[-1][1]))
            else:
                self._skips.append((first, end))

    def with_mixture(self, mixture: Sequence[Mapping[str, Any]], consumed_samples: int) -> "DataPlan":
        """The plan of a run that goes on at `consumed_samples` with the mixture its config has now.

        What came before stays as it was, and so does every skipped range; from here on `mixture` (`data.mixture`)
        decides. An empty one keeps the whole plan. Raises ConfigError for an entry without weights.
        """
        wanted = mixture_plan(mixture)
        if not wanted.entries:
            return self
        kept = [e for e in self.entries if e.weights is None or e.from_sample < consumed_samples]
        then = [weights for first, weights in self.mixtures if first < consumed_samples]
        now = [weights for first, weights in wanted.mixtures if first <= consumed_samples]
        coming = [entry for entry in wanted.entries if entry.from_sample > consumed_samples]
        if now and now[-1:] != then[-1:]:
            coming.insert(0, PlanEntry(consumed_samples, now[-1]))
        every: list[PlanEntry] = [*kept, *coming]
        every.sort(key=lambda entry: entry.from_sample)
        return DataPlan(every)

    def without(self, from_sample: int, ranges: Sequence[Sequence[int]]) -> "DataPlan":
        """The plan of a run that never trains on `ranges` of indices from sample `from_sample` on."""
        every = [*self.entries, *(PlanEntry(from_sample, skip=(first, end)) for first, end in ranges)]
        # Behind what was planned at or before this sample, before what is planned for later.
        every.sort(key=lambda entry: entry.from_sample)
        return DataPlan(every)

    def to_list(self) -> list[dict[str, Any]]:
        """The plan as JSON can hold it."""
        return [
            {"from_sample": entry.from_sample}
            | ({"weights": dict(entry.weights)} if entry.weights is not None else {})
            | ({"skip": list(entry.skip)} if entry.skip is not None else {})
            for entry in self.entries
        ]

    @property
    def mixtures(self) -> list[tuple[int, Mapping[str, float]]]:
        """(from_sample, weights) of the entries that change the mixture."""
        return [(entry.from_sample, entry.weights) for entry in self.entries if entry.weights is not None]

    def indices(self, cursor: int, count: int) -> NDArray[np.int64]:
        """The next `count` indices from `cursor` on that are not skipped, int64 [count]."""
        pieces = []
        for first, end in self._skips:
            if count == 0 or end <= cursor:
                continue
            take = min(count, max(0, first - cursor))
            pieces.append(np.arange(cursor, cursor + take, dtype=np.int64))
            count -= take
            cursor = cursor + take if count == 0 else end
        return np.concatenate([*pieces, np.arange(cursor, cursor + count, dtype=np.int64)])

    def advance(self, cursor: int, count: int) -> int:
        """`consumed_samples` after training on the next `count` samples from `cursor`."""
        return int(self.indices(cursor, count)[-1]) + 1 if count else cursor


def mixture_plan(mixture: Sequence[Mapping[str, Any]]) -> DataPlan:
    """The plan of a new run with `data.mixture`. Raises ConfigError for an entry without weights."""
    plan = DataPlan(mixture)
    if any(entry.weights is None for entry in plan.entries):
        raise ConfigError(f"data.mixture={list(mixture)} must be a list of {{from_sample, weights}}")
    return plan


def _entry(fields: Mapping[str, Any]) -> PlanEntry:
    known = {"from_sample", "weights", "skip"}
    weights, skip = fields.get("weights"), fields.get("skip")
    if set(fields) - known or "from_sample" not in fields or (weights is None) == (skip is None):
        raise ConfigError(f"data plan: {dict(fields)} must hold from_sample and either weights or skip")
    if skip is not None and not (len(skip) == 2 and 0 <= skip[0] < skip[1]):
        raise ConfigError(f"data plan: skip={list(skip)} must be [a, b) with 0 ≤ a < b")
    return PlanEntry(
        int(fields["from_sample"]),
        None if weights is None else {str(name): float(share) for name, share in weights.items()},
        None if skip is None else (int(skip[0]), int(skip[1])),
    )
