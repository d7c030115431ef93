"""One attempt of a job: start the ranks on the chosen nodes, watch, and say how it ended and who is to blame."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from data_prep.errors import EXIT_DONE, EXIT_STOPPED
from launch.crew import Crew
from launch.verdict import Failure, Fault, RankView, lost_node, of_failures, of_hang, of_silence
from launch.wire import Message
from train.cluster import ClusterConfig

POLL_SECONDS = 0.2
SETTLE_SECONDS = 0.5
"""After a rank's own error, how long another node may report an earlier one."""
STACKS_SECONDS = 4.0
"""How long the nodes may take to send the stacks of their ranks."""
END_SECONDS = 15.0
"""How long the nodes may take to end their ranks, beyond the time after which they count as lost."""


@dataclass
class Outcome:
    """How an attempt ended. fault is None for 0 and 75."""

    status: int
    fault: Fault | None
    last_step: int
    """The last step that any rank had done."""
    grows: bool = False
    """It was stopped only to go on with more nodes."""


@dataclass
class Attempt:
    """Ranks running on some nodes."""

    crew: Crew
    cluster: ClusterConfig
    nodes: Sequence[str]
    stop_requests: Callable[[], int]
    """How often the user has asked the job to stop."""
    may_grow: Callable[[], bool]
    """Whether the job should save and start again on more nodes."""
    on_progress: Callable[[dict[int, RankView]], None]
    """Told each round what the ranks do."""
    _views: dict[int, tuple[RankView, float]] = field(default_factory=dict)
    _ended: dict[str, int] = field(default_factory=dict)
    _failures: list[Failure] = field(default_factory=list)
    _stacks: dict[int, str] = field(default_factory=dict)
    _orders: dict[str, int] = field(default_factory=dict)
    _stops: int = 0
    _growing: bool = False

    def run(self, orders: dict[str, Message]) -> Outcome:
        """orders: what each node is to start. Returns when no rank runs any more."""
        self._began = time.monotonic()
        self._orders = {name: self.crew.send(name, orders[name]) for name in self.nodes}
        while True:
            self._listen(POLL_SECONDS)
            self.on_progress(self.ranks())
            self._pass_on_stops()
            fault = self._fault()
            if fault is not None:
                self._abort()
                return Outcome(fault.status, fault, self._last_step())
            if len(self._ended) == len(self.nodes) and not self._failures:
                status = max(self._ended.values())
                grows = self._growing and not self._stops and status == EXIT_STOPPED
                return Outcome(status, None, self._last_step(), grows)

    def ranks(self) -> dict[int, RankView]:
        """What each rank does, its ages counted up to now."""
        now = time.monotonic()
        aged = {}
        for rank, (view, told) in sorted(self._views.items()):
            passed = now - told
            age = None if view.age is None else view.age + passed
            aged[rank] = replace(view, age=age, still=view.still + passed)
        return aged

    def _listen(self, seconds: float) -> None:
        for name, message in self.crew.poll(seconds):
            if message["kind"] == "beats":
                for beat in message["ranks"]:
                    self._views[beat["rank"]] = (self._view(name, beat), time.monotonic())
            elif message["kind"] == "stacks":
                self._stacks |= {int(rank): text for rank, text in message["ranks"].items()}
            elif message["kind"] == "answer" and message["order"] == self._orders.get(name):
                self._ended[name] = message["status"]
                if message["failure"] is not None:
                    self._failures.append(self._failure(name, message))

    def _view(self, node: str, beat: Message) -> RankView:
        if beat["age"] is None:
            return RankView(node, beat["state"], None, time.monotonic() - self._began)
        told: dict[str, Any] = {key: value for key, value in beat.items() if key != "rank"}
        return RankView(node=node, **told)

    @staticmethod
    def _failure(node: str, message: Message) -> Failure:
        said = message["failure"]
        at = time.monotonic() - message["seconds_ago"]
        return Failure(node, said["rank"], said["how"], said["words"], said["blames"], at, message["status"])

    def _pass_on_stops(self) -> None:
        asked = self.stop_requests()
        if not asked and not self._growing and self.may_grow():
            self._growing = True
            self._tell("stop")
        while self._stops < asked:
            self._stops += 1
            if self._stops > 1:
                self._tell("abort")
            elif not self._growing:
                # To grow they save already: the ranks would take another word for a second signal, and end.
                self._tell("stop")

    def _tell(self, kind: str) -> None:
        for name in self.nodes:
            if name not in self._ended:
                self.crew.send(name, {"kind": kind})

    def _fault(self) -> Fault | None:
        if self._stops > 1:
            return None
        lost = [name for name in self.nodes if name not in self._ended and not self.crew.members[name].connected]
        own = [failure for failure in self._failures if not failure.blames_a_peer]
        if own and (lost or time.monotonic() - own[0].at > SETTLE_SECONDS):
            return of_failures(self._failures)
        if lost:
            return lost_node(lost[0], self.crew.why_lost(lost[0]), self.ranks())
        gone = [name for name, status in self._ended.items() if status not in (EXIT_DONE, EXIT_STOPPED)]
        if gone and not self._failures and self._stops:
            return Fault("not_saved", f"the ranks on node {gone[0]} were ended before they listened for signals")
        if gone and not self._failures:
            why = "its agent lost touch with the supervisor and ended its ranks"
            return lost_node(gone[0], why, self.ranks())
        # Ages as the node told them: a node that is silent itself says nothing about its ranks.
        silence = of_silence({rank: view for rank, (view, _) in self._views.items()}, self.cluster.silent_seconds)
        if silence is not None:
            self._ask_for_stacks()
            return silence
        if self._failures:
            # All blame a peer: the one that is to blame may be about to be found lost, or to report.
            waited = time.monotonic() - self._failures[0].at
            if len(self._ended) == len(self.nodes) or waited > self.cluster.silent_seconds + SETTLE_SECONDS:
                return of_failures(self._failures)
            return None
        beating = [view.still for view in self.ranks().values() if view.age is not None]
        # Until the first beat, imports and rendezvous may take as long as the nodes may take to connect.
        still = min(beating, default=time.monotonic() - self._began - self.cluster.connect_seconds)
        if still > self.cluster.hang_seconds:
            self._ask_for_stacks()
            return of_hang(self.ranks(), still, self._stacks)
        return None

    def _ask_for_stacks(self) -> None:
        self._tell("dump")
        deadline = time.monotonic() + STACKS_SECONDS
        live = {rank for rank, view in self.ranks().items() if view.age is not None}
        while time.monotonic() < deadline and live - set(self._stacks):
            self._listen(POLL_SECONDS)

    def _abort(self) -> None:
        """End all ranks; returns when every node has said that its own are gone, or its lease has run out."""
        self._tell("abort")
        deadline = time.monotonic() + self.cluster.silent_seconds + END_SECONDS
        while time.monotonic() < deadline and any(self._may_run(name) for name in self.nodes):
            self._listen(POLL_SECONDS)

    def _may_run(self, name: str) -> bool:
        if name in self._ended:
            return False
        member = self.crew.members[name]
        if member.connected and member.idle and member.greeted > self._began:
            return False
        # Its agent ends the ranks when it has not heard from us, well before this time is over.
        return member.connected or time.monotonic() - member.heard < self.cluster.silent_seconds

    def _last_step(self) -> int:
        return max((view.step for view, _ in self._views.values()), default=0)
