"""Learning rate, batch size and gradient shrink against values computed by hand."""

from dataclasses import replace

import pytest

from train.cli import compose_train
from train.config import Config, ScheduleConfig
from train.schedule import BatchSize, embedding_shrink, learning_rate

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def demo() -> Config:
    return compose_train(["experiment=demo"])


@pytest.fixture(scope="module")
def glm_130b() -> Config:
    return compose_train(["experiment=glm_130b"])


def test_learning_rate_warms_up_and_decays_as_computed_by_hand():
    cosine = ScheduleConfig(kind="cosine", warmup_samples=100, decay_samples=1100, min_lr=0.1)
    wanted = {1: 0.01, 50: 0.5, 99: 0.99, 100: 1.0, 350: 0.868198, 600: 0.55, 850: 0.231802, 1100: 0.1, 9999: 0.1}
    for samples, rate in wanted.items():
        assert learning_rate(cosine, 1.0, samples) == pytest.approx(rate, abs=1e-6), samples
    linear = replace(cosine, kind="linear")
    assert [learning_rate(linear, 1.0, n) for n in (100, 350, 600, 1100, 2000)] == pytest.approx(
        [1.0, 0.775, 0.55, 0.1, 0.1]
    )
    constant = replace(cosine, kind="constant")
    assert [learning_rate(constant, 1.0, n) for n in (50, 100, 5000)] == [0.5, 1.0, 1.0]


def test_glm_130bs_rate_and_batch_size(glm_130b):
    schedule, peak = glm_130b.schedule, glm_130b.optimizer.lr
    assert learning_rate(schedule, peak, 192) == pytest.approx(8e-5 * 192 / 1_098_632)
    assert learning_rate(schedule, peak, 1_098_632) == pytest.approx(8e-5)
    half_way = (1_098_632 + 197_753_905) // 2
    assert learning_rate(schedule, peak, half_way) == pytest.approx(4.4e-5, rel=1e-6)
    assert learning_rate(schedule, peak, 219_726_562) == pytest.approx(8e-6)
    size = BatchSize.of(glm_130b)
    # 168 increments of 24, each held for 5,493,164 / 168 = 32,697.4 samples.
    wanted = {0: 192, 32_697: 192, 32_698: 216, 65_394: 216, 65_395: 240, 5_493_163: 4200, 5_493_164: 4224}
    assert {samples: size(samples) for samples in wanted} == wanted


def test_a_batch_size_without_ramp_is_constant(demo):
    assert {BatchSize.of(demo)(samples) for samples in (0, 1, 10**9)} == {demo.global_batch_size}


def test_gradient_shrink_follows_its_schedule(demo):
    shrink = replace(
        demo.stability, embedding_gradient_shrink=0.1, embedding_gradient_shrink_schedule=[[200, 0.5], [100, 1]]
    )
    config = replace(demo, stability=shrink)
    assert [embedding_shrink(config, samples) for samples in (0, 99, 100, 199, 200, 10**9)] == [
        0.1,
        0.1,
        1,
        1,
        0.5,
        0.5,
    ]
    assert embedding_shrink(demo, 5) == 1.0
    words = ["data.path=D", "stability.embedding_gradient_shrink_schedule=[[100,1],[200,0.5]]"]
    assert embedding_shrink(compose_train(words), 150) == 1
