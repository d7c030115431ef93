"""The simulated schedules against the closed forms of the papers that introduced them; one of them run for real."""

import pytest

from benchmarks import schedules_run
from benchmarks.schedules import SCHEDULES, PassTimes, cut, held, messages, orders, play, rank_of, read_measured
from launch.simulate_step import StageTimes, simulate_step
from tests.train import parity

EQUAL = PassTimes(1.0, 1.0, 1.0)


def seconds(name, ranks, count, times=EQUAL, send=0.0):
    """Of one step, a rank's layers taking `times` a micro-batch."""
    stages = SCHEDULES[name][1]
    even = [times * (1 / stages)] * ranks * stages
    return play(orders(name, ranks, count), even, rank_of(name, ranks), send).seconds


@pytest.mark.parametrize(("ranks", "count"), [(2, 8), (4, 8), (4, 16), (8, 16)])
@pytest.mark.unit
def test_closed_forms(ranks, count):
    waits = ranks - 1
    assert seconds("1F1B", ranks, count) == pytest.approx(3 * (count + waits))
    # Narayanan et al. 2021 (arXiv 2104.04473), section 2.2: v stages a rank divide the bubble by v.
    assert seconds("interleaved 1F1B", ranks, count) == pytest.approx(3 * count + 3 * waits / 2)
    # Qi et al. 2023 (arXiv 2401.10241), table 1, ZB-H1: (p - 1)(F + B - W).
    assert seconds("zero bubble", ranks, count) == pytest.approx(3 * count + waits)
    uneven = PassTimes(1.0, 1.5, 0.75)
    assert seconds("zero bubble", ranks, count, uneven) == pytest.approx(3.25 * count + 1.75 * waits)
    assert seconds("interleaved zero bubble", ranks, count) == pytest.approx(3 * count + waits / 2)
    assert seconds("ZBV zero bubble", ranks, count) == pytest.approx(3 * count + waits / 2)


@pytest.mark.unit
def test_torchs_order_agrees_with_deepspeeds():
    times = [PassTimes(1.0, 1.5, 0.5), PassTimes(1.25, 1.5, 0.5), PassTimes(0.5, 1.0, 0.75)]
    whole = [StageTimes(one.forward, one.backward_input + one.backward_weight) for one in times]
    found = play(orders("1F1B", 3, 12), times, [0, 1, 2], 0.0)
    assert found.seconds == pytest.approx(simulate_step(whole, 12).seconds)
    assert found.bubble == pytest.approx(simulate_step(whole, 12).bubble)


@pytest.mark.unit
def test_a_message_that_something_waits_for_takes_its_time():
    # Of two micro-batches the first one's activation and the last one's gradient have nothing beside them.
    assert seconds("1F1B", 2, 2, send=0.25) == pytest.approx(3 * 3 + 2 * 0.25)


@pytest.mark.unit
def test_memory_and_messages():
    lists = {name: orders(name, 4, 16) for name in SCHEDULES}
    most = {name: held(lists[name], SCHEDULES[name][1]) for name in SCHEDULES}
    # 1F1B holds p micro-batches; the interleaved one (p - 1) / (p v) more; zero bubble and ZBV hold no more than 1F1B.
    assert most == {
        "1F1B": 4,
        "interleaved 1F1B": 4 * (1 + 3 / 8),
        "zero bubble": 4,
        "interleaved zero bubble": 4,
        "ZBV zero bubble": 4,
    }
    assert {name: messages(lists[name], 16) for name in SCHEDULES} == {
        "1F1B": 2,
        "interleaved 1F1B": 4,
        "zero bubble": 2,
        "interleaved zero bubble": 4,
        "ZBV zero bubble": 4,
    }


@pytest.mark.unit
def test_layers_leave_the_rank_with_the_head():
    measured = read_measured()
    assert cut(measured, [0, 1]) == [13, 11]
    in_a_v = cut(measured, rank_of("ZBV zero bubble", 2))
    assert sum(in_a_v) == 24
    assert in_a_v[0] + in_a_v[3] == 11


@pytest.mark.distributed
def test_weight_gradients_may_wait_for_their_pass():
    found = parity.in_ranks(schedules_run.RANKS, schedules_run.checked, "zero bubble", 1)
    assert found["loss_error"] <= 1e-6
    assert found["gradient_error"] <= 1e-6
