"""Who is to blame: from what nodes and ranks said, the one that the others only waited for or lost.

Pure functions over the supervisor's view, so that every case can be tested without a cluster.
"""

import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from train.heartbeat import PHASES

SLOW_RATIO = 1.5
"""A rank is a straggler when its own time a step is so many times the median's …"""
SLOW_SECONDS = 0.05
"""… and so much longer."""
SLOW_GPU = 0.75
"""A GPU is slow when its kernels run at less than this share of the fastest one's speed (NVIDIA's package's limit)."""
LONGEST_REASON = 300
"""Characters of a rank's own words that go into the one sentence."""
_FRAME = re.compile(r'File "([^"]+)", line (\d+) in (\S+)')
_ORDER = {phase: number for number, phase in enumerate(PHASES)}
"""How far a rank is within a step, and before the first one."""
_STATES = {
    "stopped": "its process is stopped (SIGSTOP, or a debugger)",
    "tracing-stop": "its process is held by a debugger",
    "disk-sleep": "its process waits for a disk or a file system",
    "zombie": "its process is a zombie",
    "gone": "its process is gone",
}


@dataclass(frozen=True)
class RankView:
    """What is known of a rank; ages in seconds by its own host's clock, plus the time since its node told them."""

    node: str
    state: str
    age: float | None
    """Since its last beat; None before the first."""
    still: float
    """Since its phase or step changed."""
    step: int = 0
    phase: str = ""
    collective: str | None = None
    own_seconds: float | None = None
    gpu_speed: float | None = None
    """Of the fastest rank's kernels, where they are timed."""


@dataclass(frozen=True)
class Failure:
    """A node's report of the rank that failed first there."""

    node: str
    rank: int | None
    how: str
    words: str
    blames_a_peer: bool
    at: float
    """By the supervisor's clock."""
    status: int


@dataclass(frozen=True)
class Fault:
    """Why an attempt ended: one kind, one culprit, one sentence."""

    kind: str
    """node_lost, rank_failed, rank_frozen, hang, or not_saved where a stop came too early for the ranks."""
    seen: str
    node: str | None = None
    rank: int | None = None
    words: str = ""
    status: int = 1


def of_failures(failures: Sequence[Failure]) -> Fault:
    """The rank that failed first of those that do not blame a peer; the first of all where every one does."""
    first = min(failures, key=lambda failure: (failure.blames_a_peer, failure.at))
    who = f"node {first.node}" if first.rank is None else f"rank {first.rank} on node {first.node}"
    lost = " (it lost another rank, and no other rank or node has said why)" if first.blames_a_peer else ""
    said = [line.strip() for line in first.words.splitlines() if line.strip()]
    # A traceback ends with its error, a refusal of ours is one line.
    own = said and "exit status" in first.how and not first.blames_a_peer
    why = f": {said[-1][:LONGEST_REASON]}" if own else ""
    return Fault("rank_failed", f"{who} {first.how}{why}{lost}", first.node, first.rank, first.words, first.status)


def lost_node(node: str, why: str, ranks: Mapping[int, RankView]) -> Fault:
    """A node that went away, with the ranks it held."""
    held = [rank for rank, view in ranks.items() if view.node == node]
    which = f", and with it {_ranks(held)}" if held else ""
    return Fault("node_lost", f"node {node} is lost: {why}{which}", node, held[0] if len(held) == 1 else None)


def of_silence(ranks: Mapping[int, RankView], silent_seconds: float) -> Fault | None:
    """The rank whose process gives no sign of life though its node does."""
    silent = {rank: view for rank, view in ranks.items() if _silent(view, silent_seconds)}
    if not silent:
        return None
    # The one that fell silent first; a peer that waits for it in a library may follow.
    rank = max(silent, key=lambda rank: (silent[rank].state == "stopped", silent[rank].age or silent[rank].still))
    view = silent[rank]
    why = _STATES.get(view.state, f"its process is {view.state} and does not answer")
    seen = f"rank {rank} on node {view.node} is frozen at step {view.step} in phase {view.phase or 'start'}: {why}"
    return Fault("rank_frozen", seen + _waiting(ranks, {rank}), view.node, rank)


def of_hang(ranks: Mapping[int, RankView], seconds: float, stacks: Mapping[int, str]) -> Fault:
    """All ranks live and none goes on: the missing one is not where the others wait.

    seconds: how long nothing moved. stacks: faulthandler's text of the ranks that could be asked.
    """
    missing = _missing(ranks)
    if len(missing) != 1:
        where = Counter(view.collective or f"phase {view.phase or 'start'}" for view in ranks.values())
        told = ", ".join(f"{count} in {name}" for name, count in where.most_common(4)) or "none has begun to beat"
        who = f"{_ranks(missing)} are missing" if missing else "no single rank is missing"
        nodes = {ranks[rank].node for rank in missing}
        node = nodes.pop() if len(nodes) == 1 else None
        return Fault("hang", f"no rank went on for {seconds:.0f} s and {who}: {told}", node)
    rank = missing[0]
    view = ranks[rank]
    at = view.collective or f"phase {view.phase or 'start'}"
    line = innermost(stacks.get(rank, ""))
    doing = f"{at} at step {view.step}" + (f", {line}" if line else "")
    seen = f"rank {rank} on node {view.node} is missing for {seconds:.0f} s: it is in {doing}"
    return Fault("hang", seen + _waiting(ranks, {rank}), view.node, rank, stacks.get(rank, ""))


@dataclass(frozen=True)
class Straggler:
    """A rank that holds the others up. cause: gpu or host; none where no kernels are timed. how: in a few words."""

    cause: str | None
    how: str
    seen: str


def stragglers(ranks: Mapping[int, RankView]) -> dict[int, Straggler]:
    """Ranks whose kernels are slow, and those that need much longer than the median for their own part of a step."""
    found = {}
    slow, usual = _slow_hosts(ranks)
    for rank, view in ranks.items():
        speed, who = view.gpu_speed, f"rank {rank} on node {view.node}"
        if speed is not None and speed < SLOW_GPU:
            seen = f"{who}: its GPU is slow: its kernels run at {speed:.2f} of the fastest GPU's speed"
            found[rank] = Straggler("gpu", f"{speed:.2f} of the fastest GPU", seen)
        elif rank in slow:
            how = f"{slow[rank]:.2f} s a step of its own, the others {usual:.2f} s"
            if speed is None:
                found[rank] = Straggler(None, how, f"{who} needs {how}")
            else:
                host = f"{who}: its host is slow: it needs {how}"
                seen = f"{host}; its GPU runs at {speed:.2f} of the fastest one's speed"
                found[rank] = Straggler("host", how, seen)
    return found


def _slow_hosts(ranks: Mapping[int, RankView]) -> tuple[dict[int, float], float]:
    """Own seconds a step of the ranks that need much longer than usual, and the usual ones.

    Two ranks have no usual one where the host computes: the parts of a model differ. On GPUs whose kernels are timed
    what is left is the host's data alone, and the longer time sets the pace.
    """
    own = {rank: view.own_seconds for rank, view in ranks.items() if view.own_seconds is not None}
    timed = all(ranks[rank].gpu_speed is not None for rank in own)
    if len(own) < (2 if timed else 3):
        return {}, 0.0
    usual = statistics.median(own.values()) if len(own) > 2 else min(own.values())
    return {rank: time for rank, time in own.items() if time > max(SLOW_RATIO * usual, usual + SLOW_SECONDS)}, usual


def innermost(stacks: str) -> str:
    """Where the main thread stands, of a dump of all threads: its innermost line outside of libraries."""
    main = stacks.rpartition("(most recent call first)")[2]
    frames = _FRAME.findall(main)
    ours = [frame for frame in frames if "/site-packages/" not in frame[0] and "/lib/python" not in frame[0]]
    if not (ours or frames):
        return ""
    file, line, function = (ours or frames)[0]
    return f"{function} at {'/'.join(file.split('/')[-2:])}:{line}"


def _silent(view: RankView, seconds: float) -> bool:
    if view.state in ("zombie", "gone"):
        return False  # the node is about to report its end
    age = view.still if view.age is None else view.age
    return age > seconds and (view.age is not None or view.state in ("stopped", "tracing-stop"))


def _missing(ranks: Mapping[int, RankView]) -> list[int]:
    """Ranks outside of the collective that most others stand in; of those inside, the ones at an earlier step.

    Where none stands in a collective, as on accelerators whose hosts wait for the device, those that are furthest
    behind, if they are not the most.
    """
    outside = [rank for rank, view in ranks.items() if view.collective is None]
    if outside and (len(outside) < len(ranks) or len(ranks) == 1):
        return outside
    if outside:
        progress = {rank: (view.step, _ORDER.get(view.phase, -1)) for rank, view in ranks.items()}
        behind = [rank for rank, place in progress.items() if place == min(progress.values())]
        return behind if 2 * len(behind) <= len(ranks) else []
    places = Counter((view.step, view.collective) for view in ranks.values())
    if len(places) < 2:
        return []
    common, count = places.most_common(1)[0]
    if 2 * count <= len(ranks):
        return []
    return [rank for rank, view in ranks.items() if (view.step, view.collective) != common]


def _waiting(ranks: Mapping[int, RankView], without: set[int]) -> str:
    """Where the others wait, as the end of a sentence."""
    views = [view for rank, view in ranks.items() if rank not in without]
    inside = Counter(view.collective for view in views if view.collective is not None)
    others = inside or Counter(f"phase {view.phase} of step {view.step + 1}" for view in views if view.phase)
    if not others:
        return ""
    place, count = others.most_common(1)[0]
    return f"; {count} other {'rank waits' if count == 1 else 'ranks wait'} in {place}"


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:8]) + (" …" if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"
