"""The arithmetic of the parallel benchmark: what a trace is split into, and how far two curves are apart."""

import pytest

from benchmarks.parallel import compare, distance
from benchmarks.trace import gaps, merged, split

pytestmark = pytest.mark.unit


def test_communication_beside_computation_costs_nothing():
    compute = [(0.0, 4.0), (2.0, 6.0), (10.0, 12.0)]  # two streams: 8 covered
    collectives = [(5.0, 8.0), (10.5, 11.0)]  # 6 to 8 is exposed
    sends = [(7.0, 9.0), (12.0, 13.0)]  # 8 to 9 and 12 to 13
    assert split(15.0, compute, collectives, sends) == {
        "whole": 15.0,
        "compute": 8.0,
        "exposed_collectives": 2.0,
        "exposed_sends": 2.0,
        "idle": 3.0,
    }
    assert merged([(3.0, 4.0), (1.0, 2.0), (2.0, 2.5)]) == [(1.0, 2.5), (3.0, 4.0)]


def test_gaps_are_between_what_ended_last_and_what_began_next():
    named = [((10.0, 12.0), "first"), ((11.0, 11.5), "inside"), ((12.5, 13.0), "second"), ((15.0, 16.0), "third")]
    longest = ["2.0 ms at 3 ms between second and third", "0.5 ms at 2 ms between first and second"]
    assert gaps(7.0, named) == [*longest, "1.0 ms at both ends"]
    assert gaps(7.0, named, 1) == [longest[0], "1.0 ms at both ends"]
    assert gaps(7.0, []) == ["7.0 ms at both ends"]


def test_curves_are_compared_by_means_of_twenty_steps():
    base = [0.0] * 45
    # Noise that averages out, then a lasting shift; the tail that fills no window is left out.
    curve = [1.0, -1.0] * 10 + [0.25] * 20 + [9.0] * 5
    assert distance(curve, base) == 0.25
    assert distance([1.0, 2.0], [1.0, 1.0]) == 0.5


def test_rows_are_compared_with_their_own_one_gpu_row():
    table = [
        {"shape": "3b", "row": "fsdp2", "tokens_per_second": 30.0},
        {"shape": "3b", "row": "one_gpu", "tokens_per_second": 20.0},
        {"shape": "3b", "row": "tensor_2", "reason": "out of memory"},
        {"shape": "3b", "row": "pipeline_2_16", "tokens_per_second": 36.0},
        {"shape": "3b", "row": "fsdp2_one_gpu", "tokens_per_second": 15.0},
        {"shape": "7b", "row": "fsdp2", "tokens_per_second": 12.0},
    ]
    compare(table)
    assert [row.get("x_one_gpu") for row in table] == [2.0, 1.0, None, 1.8, 1.0, None]
