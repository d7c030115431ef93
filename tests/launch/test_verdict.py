"""Who is blamed, from what is known: each case once, without processes."""

import pytest

from launch.verdict import (
    Failure,
    RankView,
    innermost,
    lost_node,
    of_failures,
    of_hang,
    of_silence,
    stragglers,
)

pytestmark = pytest.mark.unit

REDUCE = "all_reduce from train/collective.py:33"
DUMP = """Thread 0x00007f (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 324 in wait
  File "/x/train/heartbeat.py", line 10 in _run

Thread 0x00007e (most recent call first):
  File "/v/lib/python3.11/site-packages/torch/utils/data/_utils/worker.py", line 3 in get
  File "/home/me/data_prep/loader.py", line 71 in __next__
  File "/home/me/train/trainer.py", line 120 in _loop
"""


def view(node: str = "a", **changes: object) -> RankView:
    values = {"node": node, "state": "sleeping", "age": 0.5, "still": 20.0, "step": 9, "phase": "step"}
    return RankView(**{**values, "collective": REDUCE, **changes})  # type: ignore[arg-type]


def failure(node: str, rank: int | None, at: float, *, blames: bool = False) -> Failure:
    return Failure(node, rank, "failed with exit status 1", f"words of {node}", blames, at, 1)


def test_an_error_of_its_own_beats_an_earlier_one_that_blames_a_peer():
    fault = of_failures([failure("a", 0, 1.0, blames=True), failure("b", 5, 2.0), failure("c", 9, 3.0)])
    assert (fault.kind, fault.node, fault.rank, fault.words) == ("rank_failed", "b", 5, "words of b")
    assert fault.seen == "rank 5 on node b failed with exit status 1: words of b"
    fault = of_failures([failure("a", None, 1.0, blames=True)])
    assert fault.seen.startswith("node a failed with exit status 1 (it lost another rank, and no other")


def test_a_lost_node_takes_its_ranks_with_it():
    fault = lost_node("b", "no word", {0: view("a"), 4: view("b"), 5: view("b")})
    assert (fault.seen, fault.rank) == ("node b is lost: no word, and with it ranks 4, 5", None)


def test_a_stopped_rank_is_frozen_and_its_peers_are_not():
    ranks = {0: view(), 1: view("b", state="stopped", age=31.0, collective=None), 2: view()}
    fault = of_silence(ranks, 30.0)
    assert fault is not None
    assert (fault.kind, fault.node, fault.rank) == ("rank_frozen", "b", 1)
    assert fault.seen == (
        "rank 1 on node b is frozen at step 9 in phase step: its process is stopped (SIGSTOP, or a debugger); "
        f"2 other ranks wait in {REDUCE}"
    )
    assert of_silence({0: view(), 1: view(age=29.0)}, 30.0) is None
    assert of_silence({0: view(state="gone", age=99.0)}, 30.0) is None, "its node reports its end"
    assert of_silence({0: view(age=None, still=99.0)}, 30.0) is None, "it may still import"


@pytest.mark.parametrize(
    "other, said",
    [
        ({"collective": None, "phase": "data"}, "it is in phase data at step 9, __next__ at data_prep/loader.py:71"),
        ({"step": 8}, f"it is in {REDUCE} at step 8"),
        ({"collective": "broadcast from train/mesh.py:76"}, "it is in broadcast from train/mesh.py:76 at step 9"),
    ],
)
def test_the_rank_that_is_missing_where_the_others_wait(other, said):
    ranks = {0: view(), 1: view(), 2: view("b", **other), 3: view()}
    fault = of_hang(ranks, 20.0, {2: DUMP})
    assert (fault.kind, fault.node, fault.rank) == ("hang", "b", 2)
    assert fault.seen.startswith(f"rank 2 on node b is missing for 20 s: {said}")
    assert fault.seen.endswith(f"; 3 other ranks wait in {REDUCE}")


def test_no_one_is_blamed_where_all_wait_alike():
    fault = of_hang({rank: view() for rank in range(4)}, 20.0, {})
    assert (fault.node, fault.rank) == (None, None)
    assert fault.seen == f"no rank went on for 20 s and no single rank is missing: 4 in {REDUCE}"
    two_of_one_node = {0: view(), 1: view(), 2: view(), 3: view("b", collective=None), 4: view("b", collective=None)}
    assert of_hang(two_of_one_node, 20.0, {}).node == "b"
    assert "none has begun to beat" in of_hang({}, 20.0, {}).seen


def test_the_rank_that_is_behind_where_hosts_wait_for_their_accelerators():
    ranks = {0: view(collective=None), 1: view("b", collective=None, phase="data"), 2: view(collective=None)}
    fault = of_hang(ranks, 20.0, {1: DUMP})
    assert (fault.node, fault.rank) == ("b", 1)
    assert fault.seen == (
        "rank 1 on node b is missing for 20 s: it is in phase data at step 9, __next__ at data_prep/loader.py:71; "
        "2 other ranks wait in phase step of step 10"
    )
    assert of_hang(dict(list(ranks.items())[:2]), 20.0, {}).rank == 1
    assert of_hang({0: ranks[1]}, 20.0, {}).rank == 0
    assert of_hang({0: ranks[0], 1: ranks[2]}, 20.0, {}).rank is None
    ahead = {0: view(collective=None, step=10, phase="data"), 1: ranks[0], 2: ranks[2]}
    assert of_hang(ahead, 20.0, {}).rank is None


def test_stragglers_are_ranks_with_much_more_time_of_their_own():
    ranks = {rank: view(own_seconds=1.0) for rank in range(7)} | {7: view(own_seconds=1.8)}
    (rank, found), *others = stragglers(ranks).items()
    assert (rank, found.cause, others) == (7, None, [])
    assert found.seen == "rank 7 on node a needs 1.80 s a step of its own, the others 1.00 s"
    assert stragglers({0: view(own_seconds=0.001), 1: view(own_seconds=0.001), 2: view(own_seconds=0.02)}) == {}
    assert stragglers({0: view(own_seconds=1.0), 1: view(own_seconds=9.0)}) == {}, "two cannot be compared"


def test_a_slow_gpu_is_told_from_a_slow_host_by_its_kernels():
    ranks = {rank: view(own_seconds=0.1, gpu_speed=0.97) for rank in range(4)}
    ranks |= {1: view("b", own_seconds=0.1, gpu_speed=0.62), 2: view("c", own_seconds=0.25, gpu_speed=1.0)}
    found = stragglers(ranks)
    assert {rank: one.cause for rank, one in found.items()} == {1: "gpu", 2: "host"}
    assert found[1].seen == "rank 1 on node b: its GPU is slow: its kernels run at 0.62 of the fastest GPU's speed"
    assert found[2].seen == (
        "rank 2 on node c: its host is slow: it needs 0.25 s a step of its own, the others 0.10 s; "
        "its GPU runs at 1.00 of the fastest one's speed"
    )
    assert stragglers({0: view(gpu_speed=1.0), 1: view(gpu_speed=0.76)}) == {}
    two = {0: view(own_seconds=0.3, gpu_speed=1.0), 1: view(own_seconds=0.0, gpu_speed=0.98)}
    assert {rank: one.cause for rank, one in stragglers(two).items()} == {0: "host"}
    both = {0: two[1], 1: view(own_seconds=0.3, gpu_speed=0.5)}
    assert stragglers(both)[1].cause == "gpu"


def test_the_innermost_line_of_ours_in_a_dump():
    assert innermost(DUMP) == "__next__ at data_prep/loader.py:71"
    assert innermost("") == ""
