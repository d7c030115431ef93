"""The nodes of a job as the supervisor knows them: who is connected, who has gone silent, orders and their answers."""

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from launch.starters import Starter
from launch.wire import Link, Message, Switchboard

PING_SECONDS = 1.0


@dataclass
class Member:
    """One node."""

    name: str
    link: Link | None = None
    heard: float = -math.inf
    """When it last said something, by the monotonic clock."""
    greeted: float = -math.inf
    """When it last connected."""
    idle: bool = True
    """Whether no rank of ours ran there when it connected."""
    bad: str = ""
    """Why the preflight leaves it out."""
    admitted: float = -math.inf
    """When it was last found fit to train."""
    unfit: str = ""
    """What is wrong with it since it came back."""
    strikes: int = 0
    """Faults that began on it."""
    lost: str = ""
    """Why it is not connected."""
    facts: Message = field(default_factory=dict)
    """What it was like when it was last admitted."""

    def admit(self, facts: Message) -> None:
        """It may train."""
        self.facts, self.admitted = facts, time.monotonic()

    @property
    def connected(self) -> bool:
        """Whether it can be given orders."""
        return self.link is not None and not self.link.closed


class Crew:
    """All nodes, spares too, in the job's order."""

    def __init__(self, board: Switchboard, starter: Starter, silent_seconds: float) -> None:
        self.members = {name: Member(name) for name in starter.names}
        self._board, self._starter = board, starter
        self._silent_seconds = silent_seconds
        self._numbers = itertools.count(1)
        self._pinged = 0.0

    def start(self, names: Sequence[str]) -> None:
        """Start the agents of these nodes, by ssh or the like."""
        self._starter.start(names)

    def connected(self) -> list[str]:
        """Names of the nodes that can be given orders."""
        return [name for name, member in self.members.items() if member.connected and not (member.bad or member.unfit)]

    def address(self, name: str) -> str:
        """A node's address, as it is seen from here."""
        link = self.members[name].link
        return link.peer if link is not None else name

    def why_lost(self, name: str) -> str:
        """What is known about a node that is not connected."""
        member = self.members[name]
        return member.bad or member.unfit or member.lost or self._starter.last_words(name) or "it has not answered"

    def send(self, name: str, message: Message) -> int:
        """Send an order, if the node is connected; returns the number that its answer will bear."""
        number = next(self._numbers)
        link = self.members[name].link
        if link is not None:
            link.send({"order": number, **message})
        return number

    def poll(self, seconds: float) -> list[tuple[str, Message]]:
        """Keep the nodes' leases alive, and return what they said within so many seconds."""
        if time.monotonic() - self._pinged > PING_SECONDS:
            self._pinged = time.monotonic()
            for name in self.members:
                self.send(name, {"kind": "ping"})
        said = []
        for link, message in self._board.poll(seconds):
            if message is not None and message.get("kind") == "hello":
                self._greet(link, message)
                continue
            member = next((member for member in self.members.values() if member.link is link), None)
            if member is None:
                continue
            if message is None:
                member.link, member.lost = None, "its agent ended or its connection broke"
                continue
            member.heard = time.monotonic()
            said.append((member.name, message))
        for member in self.members.values():
            silent = time.monotonic() - member.heard
            if member.connected and silent > self._silent_seconds:
                member.lost = f"no word from it for {silent:.0f} s (its machine, its network or its agent is down)"
                assert member.link is not None
                member.link.close()
                member.link = None
        return said

    def ask(self, names: Sequence[str], message: Message, seconds: float) -> dict[str, Message]:
        """Give the same order to several nodes; returns the answers that came in time, in the order of names."""
        return self.ask_each(dict.fromkeys(names, message), seconds)

    def ask_each(self, messages: Mapping[str, Message], seconds: float) -> dict[str, Message]:
        """Give each node its own order; returns the answers that came in time, each with `arrived` by our clock."""
        names = list(messages)
        numbers = {name: self.send(name, message) for name, message in messages.items()}
        answers: dict[str, Message] = {}
        deadline = time.monotonic() + seconds
        while len(answers) < len(names) and time.monotonic() < deadline:
            said = self.poll(0.1)
            answers |= {
                name: {**message, "arrived": time.time()}
                for name, message in said
                if message["kind"] == "answer" and message["order"] == numbers.get(name)
            }
            names = [name for name in names if self.members[name].connected or name in answers]
        return {name: answers[name] for name in numbers if name in answers}

    def farewell(self) -> None:
        """Let every agent go."""
        for name in self.members:
            self.send(name, {"kind": "farewell"})
        self._board.close()
        self._starter.close()

    def _greet(self, link: Link, message: Message) -> None:
        member = self.members.get(str(message.get("name")))
        if member is None or member.connected:
            # Not one of ours, or started again though the first agent had come back.
            link.send({"order": 0, "kind": "farewell"})
            link.close()
            return
        member.link, member.lost, member.unfit, member.idle = link, "", "", bool(message.get("idle", True))
        member.heard = member.greeted = time.monotonic()
