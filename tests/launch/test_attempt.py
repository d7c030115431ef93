"""What an attempt tells its nodes, from what they tell it: a crew of one node, without processes."""

import json
import os
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from launch import node, supervisor
from launch.attempt import Attempt, Outcome
from launch.records import Records
from launch.supervisor import Supervisor
from launch.verdict import RankView
from train.cluster import ClusterConfig
from train.heartbeat import Heartbeat

pytestmark = pytest.mark.unit


class Crew:
    """One node that ends with 75 some polls after the last word that it got."""

    def __init__(self) -> None:
        self.members = {"a": SimpleNamespace(connected=True)}
        self.told: list[str] = []
        self._polls = 0

    def send(self, name: str, message: dict[str, Any]) -> int:
        self.told.append(message["kind"])
        return 1

    def poll(self, seconds: float) -> list[tuple[str, dict[str, Any]]]:
        self._polls += 1
        return [("a", {"kind": "answer", "order": 1, "status": 75, "failure": None})] if self._polls == 6 else []

    def run(self, *, stops_at: list[int], grows_at: int) -> Outcome:
        """An attempt whose user asks to stop at these polls, and that may grow from one poll on."""
        attempt = Attempt(
            self,  # type: ignore[arg-type]
            ClusterConfig(),
            ["a"],
            lambda: sum(self._polls >= at for at in stops_at),
            lambda: self._polls >= grows_at,
            lambda ranks: None,
        )
        return attempt.run({"a": {"kind": "start"}})


@pytest.mark.parametrize(
    "stops_at, grows_at, told, grows",
    [
        pytest.param([], 2, ["stop"], True, id="it grows"),
        pytest.param([2], 99, ["stop"], False, id="the user stops it"),
        pytest.param([2, 4], 99, ["stop", "abort"], False, id="the user stops it twice"),
        # The ranks take a second stop for the user's second signal, which ends them in the middle of their save.
        pytest.param([4], 2, ["stop"], False, id="the user stops it while it saves to grow"),
        pytest.param([4, 5], 2, ["stop", "abort"], False, id="and then again"),
        pytest.param([2], 4, ["stop"], False, id="it does not grow once it stops"),
    ],
)
def test_the_ranks_are_told_to_stop_once(stops_at, grows_at, told, grows):
    crew = Crew()
    outcome = crew.run(stops_at=stops_at, grows_at=grows_at)
    assert crew.told == ["start", *told]
    assert (outcome.status, outcome.fault, outcome.grows) == (75, None, grows)


def test_a_rank_says_how_fast_its_gpu_is_and_the_supervisor_notes_it_once(tmp_path, monkeypatch):
    heart = Heartbeat(tmp_path, 0)
    heart.gpu_speed = 0.61
    heart.start()
    told = node._Attempt({"run_dir": str(tmp_path)}, "127.0.0.1")
    told.steering.pids = {0: os.getpid()}
    (beat,) = json.loads(json.dumps(told.beats()))  # as over the wire
    heart.close()
    attempt = Attempt(mock.Mock(), ClusterConfig(), ["a"], mock.Mock(), mock.Mock(), mock.Mock())
    slow = attempt._view("a", beat)
    assert (slow.node, slow.gpu_speed) == ("a", 0.61)

    monkeypatch.setattr(supervisor, "STEADY_SECONDS", -1.0)
    watching = object.__new__(Supervisor)
    watching._slow, watching._slow_since, watching._restart = set(), {}, None
    watching._records = Records(tmp_path)
    others = {rank: RankView("b", "", 0.0, 0.0, own_seconds=0.1, gpu_speed=1.0) for rank in (1, 2)}
    hosts = {3: RankView("b", "", 0.0, 0.0, own_seconds=0.4, gpu_speed=0.99)}
    for _ in range(3):
        watching._progress({0: slow, **others, **hosts})
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(event["kind"], event["node"], event["rank"], event["cause"]) for event in events] == [
        ("straggler", "a", 0, "gpu"),
        ("straggler", "b", 3, "host"),
    ]
    assert events[0]["seen"] == "rank 0 on node a: its GPU is slow: its kernels run at 0.61 of the fastest GPU's speed"
