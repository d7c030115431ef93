"""The preflight's plan and verdict, from measured values."""

import shutil
from itertools import combinations

import pytest

from launch.preflight import judge, rounds
from launch.probes import inside, probe, read_cards

pytestmark = pytest.mark.unit

GOOD = {
    "matmul_gflops": 60.0,
    "copy_gb_per_second": 18.0,
    "disk_mb_per_second": 900.0,
    "free_gb": 70.0,
    "skew_seconds": 0.0,
    "health": [],
}


def links(names: str, slow: set[str]) -> dict[tuple[str, str], dict[str, float]]:
    """Links between one-letter nodes; `slow` holds pairs such as `ab`."""
    rates = {pair: 0.05 if "".join(pair) in slow else 5.0 for pair in combinations(names, 2)}
    return {pair: {"all_reduce_gbit": rate, "all_to_all_gbit": rate} for pair, rate in rates.items()}


@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_every_pair_meets_once_and_nobody_twice_a_round(count):
    names = [f"n{number}" for number in range(count)]
    plan = rounds(names)
    assert sorted(tuple(sorted(pair)) for pairs in plan for pair in pairs) == sorted(combinations(names, 2))
    for pairs in plan:
        met = [name for pair in pairs for name in pair]
        assert len(met) == len(set(met))


@pytest.mark.parametrize(
    "names, slow, bad, at_fault",
    [
        ("abcd", set(), [], 0),
        ("abc", {"ac", "bc"}, ["c"], 0),
        ("abcd", {"ad", "bd", "cd"}, ["d"], 0),
        ("abcd", {"ab"}, [], 1),
    ],
)
def test_a_slow_node_is_told_from_a_slow_link(names, slow, bad, at_fault):
    verdict = judge({name: dict(GOOD) for name in names}, links(names, slow))
    assert list(verdict.bad) == bad
    assert len(verdict.links_at_fault) == at_fault


def test_a_node_below_the_median_without_space_or_ill_is_bad():
    nodes = {name: dict(GOOD) for name in "abcdefgh"}
    nodes["b"]["matmul_gflops"] = 30.0
    nodes["c"]["free_gb"] = 0.2
    nodes["d"]["health"] = ["accelerator 3: 2 uncorrected memory errors"]
    nodes["e"] = {"error": "OSError: [Errno 30] Read-only file system"}
    nodes["f"]["skew_seconds"] = -42.0
    verdict = judge(nodes, {})
    assert verdict.bad == {
        "b": ["matmul 30 GFLOP/s, the fleet's median is 60"],
        "c": ["only 0.2 GB free under run_dir"],
        "d": ["accelerator 3: 2 uncorrected memory errors"],
        "e": ["OSError: [Errno 30] Read-only file system"],
        "f": ["its clock is -42.0 s from the fleet's; set it (chrony, ntpd)"],
    }


def test_a_node_says_its_speeds_and_which_shard_is_cut_off(tmp_path, tiny_dataset):
    data = tmp_path / "data"
    shutil.copytree(tiny_dataset, data)
    assert probe("data", {"data_path": str(data)}) == {"health": []}
    found = probe("node", {"run_dir": str(tmp_path)})
    assert found.pop("health") == []
    assert set(found) == {"matmul_gflops", "copy_gb_per_second", "disk_mb_per_second", "free_gb"}
    assert min(found.values()) > 0
    shard = next((data / "train").glob("*.bin"))
    shard.write_bytes(shard.read_bytes()[:-2])
    (told,) = probe("data", {"data_path": str(data)})["health"]
    assert told.startswith(f"{shard}: ")


def test_collectives_inside_a_node(monkeypatch):
    found = inside(2)
    assert set(found) == {"all_reduce_gb_per_second", "all_to_all_gb_per_second"}
    assert all(0 < speed < 1000 for speed in found.values())
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    with pytest.raises(RuntimeError, match=r"^collectives inside the node: .*no-such-interface"):
        inside(2)


def test_cards_that_are_hot_or_have_memory_errors_are_named():
    # As nvidia-smi answers: errors, degrees, MHz, slowed down, slowed down for heat.
    rows = [["0", "41", "1980", "Not Active", "Not Active"], ["2", "40", "1980", "Not Active", "Not Active"]]
    hot = ["[N/A]", "91", "345", "Active", "Active"]
    assert read_cards([*rows, hot]) == {
        "health": [
            "accelerator 1: 2 uncorrected memory errors",
            "accelerator 2: throttled by its hardware at 91 °C",
        ],
        "clock_mhz": 345.0,
    }
    assert read_cards([["No devices were found"]]) == {"health": ["nvidia-smi does not tell the accelerators' health"]}
