"""python -m launch.preflight WORDS: measure every node and every pair of nodes before a job takes them.

takes the words of `python -m launch`. Each node opens the dataset's shards and asks its accelerators for their health;
its matrix product, memory copy, disk, clock and the speeds between host and accelerators are held against the fleet's
median. Then all pairs measure their link, as many at a time as there are disjoint ones. Prints a table and a verdict;
status 0 when every node is good, 1 otherwise. `cluster.preflight=true` does the same at launch and leaves the bad nodes
out.
"""

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data_prep import cli
from data_prep.errors import EXIT_CRASH, EXIT_DONE
from launch.crew import Crew
from train.cli import ALIASES
from train.config import Config

NODE_SHARE = 0.6
"""Share of the fleet's median under which a node's speed is bad."""
LINK_SHARE = 0.5
"""The same for a link."""
FREE_GB = 1.0
"""Free space under run_dir below which no checkpoint is to be hoped for."""
ANSWER_SECONDS = 180.0
CLOCK_SECONDS = 5.0
"""A clock further from the fleet's median is bad: logs and heartbeats could not be put in order."""
WIDTH = 160
"""Columns of what is printed into a file."""
SPEEDS = {
    "matmul_gflops": ("matmul", "GFLOP/s"),
    "copy_gb_per_second": ("copy", "GB/s"),
    "host_gb_per_second": ("host", "GB/s"),
    "peer_gb_per_second": ("peer", "GB/s"),
    "all_reduce_gb_per_second": ("all-reduce inside", "GB/s"),
    "all_to_all_gb_per_second": ("all-to-all inside", "GB/s"),
    "clock_mhz": ("clock", "MHz"),
    "disk_mb_per_second": ("disk", "MB/s"),
}
"""What is held against the median, what it is called, and its unit; host and clock only where there are accelerators,
peer and what goes on inside only where there are several."""


@dataclass
class Verdict:
    """What was measured, and what is wrong with whom."""

    nodes: dict[str, dict[str, Any]]
    links: dict[tuple[str, str], dict[str, Any]]
    bad: dict[str, list[str]] = field(default_factory=dict)
    """Reasons by node."""
    links_at_fault: list[str] = field(default_factory=list)
    """Slow links between nodes that are both good elsewhere."""


def measure(crew: Crew, config: Config) -> Verdict:
    """Run the plan on all connected nodes."""
    names = crew.connected()
    nodes: dict[str, dict[str, Any]] = {name: {"health": []} for name in names}
    plan = {
        "node": {"run_dir": str(Path(config.run_dir).absolute())},
        "data": {"data_path": str(Path(config.data.path).absolute())},
        "clock": {},
    }
    for what, options in plan.items():
        answers = crew.ask(names, {"kind": "probe", "what": what, "options": options}, ANSWER_SECONDS)
        for name, found in nodes.items():
            results = answers[name]["results"] if name in answers else {"error": "no answer"}
            found |= {**results, "health": [*found["health"], *results.get("health", [])]}
            if "time" in results:
                found["skew_seconds"] = results["time"] - answers[name]["arrived"]
    links: dict[tuple[str, str], dict[str, Any]] = {}
    for pairs in rounds(names):
        links |= _measure_pairs(crew, config, pairs)
    return judge(nodes, links)


def _measure_pairs(
    crew: Crew, config: Config, pairs: Sequence[tuple[str, str]]
) -> dict[tuple[str, str], dict[str, Any]]:
    """Disjoint pairs at once."""
    ports = crew.ask([first for first, _ in pairs], {"kind": "port"}, ANSWER_SECONDS)
    orders = {}
    for first, second in pairs:
        for rank, name in enumerate((first, second)):
            place = {"address": crew.address(first), "port": ports[first]["port"] if first in ports else 0}
            facts = crew.members[name].facts
            # The interface that its agent uses, unless the user has chosen one for all.
            own = [key for key, found in facts.get("interfaces", {}).items() if crew.address(name) in found]
            interface = config.cluster.network_interface or next(iter(own), None)
            orders[name] = {
                "kind": "probe",
                "what": "pair",
                "options": {**place, "rank": rank, "interface": interface},
            }
    answers = crew.ask_each(orders, ANSWER_SECONDS)
    return {pair: answers.get(pair[0], {"results": {"error": "no answer"}})["results"] for pair in pairs}


def rounds(names: Sequence[str]) -> list[list[tuple[str, str]]]:
    """All pairs in rounds in which every node has one partner at most (the circle method of a tournament)."""
    ring: list[str | None] = [*names, *([None] if len(names) % 2 else [])]
    found = []
    for _ in range(max(0, len(ring) - 1)):
        half = len(ring) // 2
        pairs = zip(ring[:half], reversed(ring[half:]), strict=True)
        found.append([(a, b) for a, b in pairs if a is not None and b is not None])
        ring = [ring[0], ring[-1], *ring[1:-1]]
    return found


def judge(nodes: dict[str, dict[str, Any]], links: dict[tuple[str, str], dict[str, Any]]) -> Verdict:
    """Hold each node and link against the fleet's median."""
    verdict = Verdict(nodes, links)
    for name, found in nodes.items():
        reasons = [found["error"]] if "error" in found else list(found["health"])
        if "error" not in found:
            if found["free_gb"] < FREE_GB:
                reasons.append(f"only {found['free_gb']:.1f} GB free under run_dir")
            skew = found["skew_seconds"] - _median(nodes, "skew_seconds")
            if abs(skew) > CLOCK_SECONDS:
                reasons.append(f"its clock is {skew:+.1f} s from the fleet's; set it (chrony, ntpd)")
            reasons += [
                f"{label} {found[key]:.3g} {unit}, the fleet's median is {_median(nodes, key):.3g}"
                for key, (label, unit) in SPEEDS.items()
                if key in found and found[key] < NODE_SHARE * _median(nodes, key)
            ]
        if reasons:
            verdict.bad[name] = reasons
    slow = [pair for pair, found in links.items() if "error" in found or _speed(found) < LINK_SHARE * _typical(links)]
    for name in nodes:
        own = [pair for pair in links if name in pair]
        slow_here = [pair for pair in slow if name in pair]
        # A node whose links are mostly slow is to blame for them; with one link nobody can say which end it is.
        if len(own) > 1 and 2 * len(slow_here) > len(own):
            verdict.bad.setdefault(name, []).append(f"{len(slow_here)} of its {len(own)} links are slow")
    for pair in slow:
        if not set(pair) & set(verdict.bad):
            found = links[pair]
            told = found.get("error") or f"{_speed(found):.3g} Gbit/s, the median is {_typical(links):.3g}"
            verdict.links_at_fault.append(f"link {pair[0]} – {pair[1]}: {told}")
    return verdict


def show(verdict: Verdict) -> None:
    """The tables and the verdict, on standard output."""
    console = Console()
    if not console.is_terminal:  # a log takes the whole table
        console = Console(width=WIDTH)
    shown = {key: " ".join(told) for key, told in SPEEDS.items() if any(key in one for one in verdict.nodes.values())}
    table = Table("node", *shown.values(), "free GB", "verdict")
    for name, found in verdict.nodes.items():
        values = [f"{found[key]:.4g}" if key in found else "–" for key in (*shown, "free_gb")]
        table.add_row(name, *values, "; ".join(verdict.bad.get(name, ["good"])))
    console.print(table)
    if verdict.links:
        table = Table("link", "all-reduce Gbit/s", "all-to-all Gbit/s")
        for (first, second), found in verdict.links.items():
            values = [f"{found[key]:.3g}" if key in found else "–" for key in ("all_reduce_gbit", "all_to_all_gbit")]
            table.add_row(f"{first} – {second}", *values)
        console.print(table)
    for line in verdict.links_at_fault:
        console.print(line)
    bad = ", ".join(verdict.bad)
    count = len(verdict.nodes)
    console.print(f"leave out: {bad}" if bad else f"all {count} nodes are good" if count > 1 else "the node is good")


def _speed(found: Mapping[str, Any]) -> float:
    return float(min(found["all_reduce_gbit"], found["all_to_all_gbit"]))


def _typical(links: Mapping[tuple[str, str], Mapping[str, Any]]) -> float:
    """The median over nodes of each one's best link: in a small fleet one bad node slows most of all links."""
    best: dict[str, float] = {}
    for pair, found in links.items():
        for name in pair if "error" not in found else ():
            best[name] = max(_speed(found), best.get(name, 0.0))
    return statistics.median(best.values() or [0.0])


def _median(nodes: Mapping[str, Mapping[str, Any]], key: str) -> float:
    return statistics.median(found[key] for found in nodes.values() if key in found)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the nodes that the words name; returns the exit status."""
    from launch.__main__ import starter_of
    from launch.supervise import muster

    words = list(sys.argv[1:] if argv is None else argv)

    def task(config: Config) -> int:
        supervisor = muster(config, words, "train", starter_of(config))
        verdict = supervisor.inspect()
        show(verdict)
        return EXIT_CRASH if verdict.bad or verdict.links_at_fault else EXIT_DONE

    return cli.run("train", Config, task, program="preflight", aliases=ALIASES, argv=words)


if __name__ == "__main__":
    sys.exit(main())
