"""How long the stages of a pipeline wait: the arithmetic by hand, and the passes that a real engine has."""

import pytest

from tests.train.parity import BATCH, LR, SHRINK, in_ranks, my_batches, start_engine
from train.bubble import bubble


@pytest.mark.unit
def test_two_equal_stages_wait_as_long_as_1f1b_says() -> None:
    # Four micro-batches of forward 1 and backward 2 on two stages: 15 long, each computes 12, the last one ends at 14.
    assert bubble([12, 12], [15, 14]) == pytest.approx(1 / (4 + 2 - 1))


@pytest.mark.distributed
def test_a_pipeline_tells_its_bubble() -> None:
    passes, found = in_ranks(2, _waits)
    assert passes == [8, 8]  # four forward, four backward; evaluation is no part of a step
    assert found["bubble_least"] == pytest.approx(1 / 5)
    assert 0 < found["bubble"] < 1


def _waits() -> tuple[list[int], dict[str, float]]:
    engine = start_engine(["parallel.pipeline_parallel=2"])
    engine.step(my_batches(engine, 0, BATCH), LR, SHRINK)
    passes = [len(engine.clock._passes)]
    engine.evaluate(my_batches(engine, 0, BATCH))
    passes.append(len(engine.clock._passes))
    return passes, engine.waiting()
