"""Which stream a sample index draws from: exact shares, changes of course at given samples, and streams that end.

A course is a list of phases. A phase begins at sample 0, where the data plan changes the weights, or where a stream
has been read as often as its source's `epochs` allows; its shares then go to the others. What was drawn before a phase
is counted, never drawn again: every stream's rows come without replacement within an epoch, whatever the phases.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from data_prep.config import SamplingConfig
from data_prep.dataset import AnyStream
from data_prep.errors import ConfigError, DataError
from data_prep.order import DataPlan, Mixture, Schedule, mix


@dataclass(frozen=True)
class _Phase:
    """Samples from `first` on under one mixture; `mixture` is None where every stream has ended."""

    first: int
    mixture: Mixture | None
    drawn: list[int]
    """Samples of each stream before this phase."""


class Course:
    """The phases of a train split. Immutable."""

    def __init__(self, streams: Sequence[AnyStream], config: SamplingConfig, seed: int, plan: DataPlan) -> None:
        """streams: text before instructions. Raises ConfigError for a plan that names an unknown stream."""
        self._streams = streams
        self._config = config
        self._seed = seed
        self._limits = [None if s.info.epochs is None else round(s.info.epochs * s.rows) for s in streams]
        self._phases: list[_Phase] = []
        changes: list[tuple[int, Mapping[str, float] | None]] = [(0, None), *plan.mixtures]
        ends = [*(first for first, _ in changes[1:]), None]
        for (first, weights), end in zip(changes, ends, strict=True):
            self._add(first, self._shares(dict(weights) if weights is not None else None), end)

    def at(self, index: int) -> tuple[int, int]:
        """(stream's number, samples drawn from it before) of a sample. Raises DataError when every source has ended."""
        phase = next(phase for phase in reversed(self._phases) if phase.first <= index)
        if phase.mixture is None:
            raise DataError(
                f"sample {index}: every source was read as often as its epochs allow after {phase.first} samples; "
                "raise epochs in data.sources, add text, or train for fewer samples"
            )
        number, made = phase.mixture.at(index - phase.first)
        return number, phase.drawn[number] + made

    @property
    def samples(self) -> int | None:
        """Samples until every source has ended; None where that never happens."""
        last = self._phases[-1]
        return last.first if last.mixture is None else None

    def _add(self, first: int, shares: list[float], end: int | None) -> None:
        """Phases from `first` to `end`: one, and another wherever a stream ends."""
        drawn = [0] * len(self._streams)
        if self._phases:
            last = self._phases[-1]
            made = last.mixture.made_before(first - last.first) if last.mixture else drawn
            drawn = [before + now for before, now in zip(last.drawn, made, strict=True)]
        while True:
            left = [
                share if limit is None or done < limit else 0.0
                for share, limit, done in zip(shares, self._limits, drawn, strict=True)
            ]
            mixture = self._mixture(left, first)
            self._phases.append(_Phase(first, mixture, drawn))
            if mixture is None:
                return
            ended = self._first_end(mixture, left, drawn)
            if ended is None or (end is not None and first + ended >= end):
                return
            drawn = [before + now for before, now in zip(drawn, mixture.made_before(ended), strict=True)]
            first += ended

    def _first_end(self, mixture: Mixture, shares: list[float], drawn: list[int]) -> int | None:
        """Samples of a phase until the first of its streams has ended."""
        last_draws = [
            (number, limit - drawn[number] - 1)
            for number, limit in enumerate(self._limits)
            if limit is not None and shares[number]
        ]
        end: int | None = None
        for number, made in sorted(last_draws, key=lambda one: mixture.earliest(*one)):
            if end is not None and mixture.earliest(number, made) >= end:
                break
            place = mixture.place_of(number, made) + 1
            end = place if end is None else min(end, place)
        return end

    def _mixture(self, shares: list[float], first: int) -> Mixture | None:
        """Text by `shares`; instructions take `instruction_share` beside text, and all where there is no text left."""
        period, key = self._config.mixture_period, mix(self._seed, 3, first)
        texts = sum(stream.info.content == "text" for stream in self._streams)
        text, tasks = shares[:texts], shares[texts:]
        if not any(shares):
            return None
        if not any(tasks) or (any(text) and not self._config.instruction_share):
            # A choice for the instructions that is never made keeps the streams' numbers.
            outer = Schedule([*text, 0.0] if tasks else text, period, key)
            return Mixture(outer, Schedule([1.0] * len(tasks), period, key) if tasks else None)
        share = self._config.instruction_share if any(text) else 1.0
        total = sum(text) or 1.0
        outer = Schedule([weight / total * (1 - share) for weight in text] + [share], period, key)
        return Mixture(outer, Schedule(tasks, period, mix(key, 7)))

    def _shares(self, weights: dict[str, float] | None) -> list[float]:
        """Weight of each stream among text or among instructions; a source's is divided among its languages by rows."""
        names: dict[str, list[AnyStream]] = {}
        for stream in self._streams:
            names.setdefault(stream.info.name, []).append(stream)
        if weights is None:
            weights = {}
            for content in ("text", "instructions"):
                chosen = [stream for stream in self._streams if stream.info.content == content]
                if any(stream.info.weight is None for stream in chosen):
                    weights |= {stream.key: float(stream.rows) for stream in chosen}
                else:
                    weights |= {stream.info.name: stream.info.weight or 0.0 for stream in chosen}
        unknown = sorted(set(weights) - set(names) - {stream.key for stream in self._streams})
        if unknown:
            raise ConfigError(f"data plan: unknown source {unknown[0]}; there are {', '.join(sorted(names))}")
        return [
            weights[stream.key]
            if stream.key in weights
            else weights.get(stream.info.name, 0.0)
            * stream.rows
            / sum(other.rows for other in names[stream.info.name] if other.key not in weights)
            for stream in self._streams
        ]
