"""Held-out loss on the same samples each time, whatever the layout."""

from dataclasses import replace
from typing import Any

from data_prep.batch import Batch
from data_prep.samples import Sampler
from train.engine import Engine
from train.scores import Baseline, summary


class Validation:
    """The first `samples` held-out samples, cut into micro-batches over the data-parallel ranks."""

    def __init__(self, sampler: Sampler, samples: int, engine: Engine) -> None:
        """What does not fill the last micro-batches is padded with sequences that count nothing."""
        self._engine = engine
        size, ranks, mine = engine.config.micro_batch_size, engine.mesh.data, engine.mesh.data_rank
        rounds = -(-samples // (size * ranks))
        self._batches: list[Batch | None] = [None] * rounds
        if engine.needs_batches:
            for number in range(rounds):
                first = (number * ranks + mine) * size
                self._batches[number] = _muted(sampler.batch(range(first, first + size)), samples - first)
        self._baseline = Baseline(sampler)
        if engine.mesh.rank == 0:
            for first in range(0, samples, 16):
                self._baseline.add(sampler.batch(range(first, min(samples, first + 16))))

    def run(self) -> dict[str, Any]:
        """Evaluate; the record is whole on rank 0."""
        return summary(self._engine.evaluate(self._batches), self._baseline)


def _muted(batch: Batch, count: int) -> Batch:
    """The batch with loss weight on its first `count` sequences only."""
    if count >= batch.size:
        return batch
    weight = batch.loss_weight.clone()
    weight[max(0, count) :] = 0.0
    return replace(batch, loss_weight=weight)
