"""What an attempt tells its nodes, from what they tell it: a crew of one node, without processes."""

from types import SimpleNamespace
from typing import Any

import pytest

from launch.attempt import Attempt, Outcome
from train.cluster import ClusterConfig

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
