"""The loader: one order, whatever the workers, ranks and restarts; and mixtures that change on the way."""

from collections import Counter
from functools import partial
from itertools import islice, pairwise

import numpy as np
import pytest
import torch

from data_prep.batch import Batch
from data_prep.config import SamplingConfig
from data_prep.dataset import Dataset
from data_prep.errors import ConfigError
from data_prep.loader import SampleStream, make_loader
from data_prep.order import DataPlan
from data_prep.samples import Sampler

pytestmark = pytest.mark.unit
SLOTS = 64


def ramp(consumed_samples: int, size: int = 8) -> int:
    """Global batch size that doubles after 16 samples."""
    return size if consumed_samples < 16 else 2 * size


def sampler_of(dataset: Dataset, plan: DataPlan | None = None) -> Sampler:
    return Sampler(dataset, SamplingConfig(), SLOTS, seed=1, plan=plan)


def indices_of(
    sampler: Sampler, ranks: int, micro_batch: int, steps: int, *, start: int = 0, workers: int = 0
) -> list[list[int]]:
    """Sample indices of each step, put together from all ranks in the order micro-batch, rank."""
    sizes, cursor = [], start
    for _ in range(steps):
        sizes.append(ramp(cursor))
        cursor = sampler.plan.advance(cursor, sizes[-1])
    by_rank = []
    for rank in range(ranks):
        stream = SampleStream(
            sampler,
            consumed_samples=start,
            micro_batch_size=micro_batch,
            batch_size_at=ramp,
            data_parallel_rank=rank,
            data_parallel_size=ranks,
        )
        loader = make_loader(stream, workers=workers)
        count = sum(sizes) // ranks // micro_batch
        by_rank.append([batch.sample_index.tolist() for batch in islice(loader, count)])
    flat = [index for group in zip(*by_rank, strict=True) for batch in group for index in batch]
    edges = np.cumsum([0, *sizes])
    return [flat[a:b] for a, b in pairwise(edges)]


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 1), (1, 4), (2, 2), (4, 2), (8, 1)])
def test_every_layout_gives_the_same_steps(dataset: Dataset, ranks: int, micro_batch: int) -> None:
    sampler = sampler_of(dataset)
    steps = indices_of(sampler, ranks, micro_batch, 4)
    assert steps == indices_of(sampler, 1, 8, 4)
    assert steps[0] == list(range(8))
    assert [len(step) for step in steps] == [8, 8, 16, 16]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_the_order(dataset: Dataset, workers: int) -> None:
    stream = SampleStream(sampler_of(dataset), consumed_samples=5, micro_batch_size=2, batch_size_at=ramp)
    alone = [batch.hash() for batch in islice(make_loader(stream), 10)]
    assert [batch.hash() for batch in islice(make_loader(stream, workers=workers), 10)] == alone


def test_resuming_from_the_cursor_continues_exactly(dataset: Dataset) -> None:
    sampler = sampler_of(dataset, DataPlan([{"from_sample": 0, "skip": [10, 21]}]))
    whole = indices_of(sampler, 2, 2, 5)
    assert not set(range(10, 21)) & {index for step in whole for index in step}
    cursor = sampler.plan.advance(sampler.plan.advance(0, ramp(0)), len(whole[1]))
    assert indices_of(sampler, 4, 1, 3, start=cursor) == whole[2:]


def test_a_changed_mixture_keeps_what_is_consumed(dataset: Dataset) -> None:
    """Shares change at the sample that the plan says; no row is drawn twice in an epoch across the change."""
    weights = {"zh": 3.0, "en": 1.0}
    change = 137
    sampler = sampler_of(dataset, DataPlan([{"from_sample": change, "weights": weights}]))
    plain = sampler_of(dataset)
    for index in range(change):
        assert sampler.address(index) == _same(plain.address(index), sampler)
    after = [sampler.address(index).stream.key for index in range(change, change + 400)]
    for start in range(0, 400, 4):
        assert Counter(after[start : start + 4]) == {"zh.zh": 3, "en.en": 1}
    drawn: dict[tuple[str, int], list[int]] = {}
    for index in range(2 * sampler.rows):
        address = sampler.address(index)
        drawn.setdefault((address.stream.key, address.epoch), []).append(address.row)
    for stream in sampler.streams:
        assert sorted(drawn[stream.key, 0]) == list(range(stream.rows))
    with pytest.raises(ConfigError, match="unknown source fr"):
        sampler_of(dataset, DataPlan([{"from_sample": 0, "weights": {"fr": 1.0}}]))


def _same(address: object, sampler: Sampler) -> object:
    """The address with the other sampler's stream of the same name."""
    stream = next(stream for stream in sampler.streams if stream.key == address.stream.key)  # type: ignore[attr-defined]
    return type(address)(stream, address.epoch, address.row, address.kind)  # type: ignore[attr-defined,call-arg]


def test_a_batch_size_that_does_not_divide_is_named(dataset: Dataset) -> None:
    with pytest.raises(ConfigError, match="global_batch_size=8"):
        SampleStream(sampler_of(dataset), consumed_samples=0, micro_batch_size=3, batch_size_at=ramp)
    with pytest.raises(ConfigError, match="data_parallel_rank=2"):
        SampleStream(
            sampler_of(dataset),
            consumed_samples=0,
            micro_batch_size=1,
            batch_size_at=partial(ramp, size=4),
            data_parallel_rank=2,
            data_parallel_size=2,
        )


def test_batch_fields_shapes_and_hash(dataset: Dataset) -> None:
    batch = sampler_of(dataset).batch(range(3))
    assert batch.size == 3
    assert batch.sequence_length == SLOTS
    for name, dtype, shape in [
        ("tokens", torch.int64, (3, SLOTS)),
        ("targets", torch.int64, (3, SLOTS)),
        ("loss_weight", torch.float32, (3, SLOTS)),
        ("positions", torch.int32, (3, 2, SLOTS)),
        ("attend_from", torch.int32, (3, SLOTS)),
        ("attend_to", torch.int32, (3, SLOTS)),
        ("group", torch.uint8, (3,)),
        ("sample_index", torch.int64, (3,)),
    ]:
        tensor = getattr(batch, name)
        assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape)
        changed = tensor.clone()
        changed.view(-1)[-1] += 1
        assert Batch(**{**batch.__dict__, name: changed}).hash() != batch.hash(), name
    assert batch.to("cpu").hash() == batch.hash()
    assert batch.select(slice(0, 2)).hash() == sampler_of(dataset).batch(range(2)).hash()
    meta = batch.meta()
    assert meta.shape == (3, 4, SLOTS)
    assert (meta[:, 3] == batch.attend_to).all()
