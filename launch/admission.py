"""Which nodes may train: what they said of themselves compared, each problem named with its node and the fix."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from data_prep.errors import ConfigError
from train.config import Config

CLOCK_SECONDS = 30.0
"""Clocks further apart than this make logs and file times of a job unreadable."""
BUSY_MIB = 2048
"""Memory in use on an accelerator, by others, from which it counts as busy."""

Facts = Mapping[str, Any]


def admit(config: Config, nodes: Mapping[str, Facts], skews: Mapping[str, float]) -> None:
    """Raise ConfigError with every problem of every node, one after another on one line each.

    nodes: `launch.facts.facts` of each, in the job's order. skews: seconds by which each clock is ahead of ours.
    """
    problems = [problem for name, facts in nodes.items() for problem in _problems(config, name, facts)]
    problems += _differences(nodes)
    problems += [
        f"node {name}: its clock is {skew:+.0f} s off; set it (chrony, ntpd)"
        for name, skew in skews.items()
        if abs(skew) > CLOCK_SECONDS
    ]
    if problems:
        raise ConfigError("; ".join(problems))


def _problems(config: Config, name: str, facts: Facts) -> list[str]:
    cluster, found = config.cluster, []
    interface = cluster.network_interface
    if interface is not None and interface not in facts["interfaces"]:
        there = ", ".join(f"{key} {' '.join(value)}".strip() for key, value in facts["interfaces"].items())
        found.append(f"node {name}: cluster.network_interface={interface} is not up there; it has {there}")
    if facts["port_taken_by"]:
        found.append(
            f"node {name}: cluster.rendezvous_port={cluster.rendezvous_port} is in use by {facts['port_taken_by']}; "
            "end it, choose another port, or set 0 for a free one"
        )
    if not facts["sees_run_dir"]:
        found.append(
            f"node {name}: run_dir={config.run_dir} is not the folder that the supervisor sees; "
            "put it on a file system that all nodes share"
        )
    if not facts["sees_data"]:
        found.append(f"node {name}: data.path={config.data.path} holds no dataset there; copy or mount it")
    cards = facts["accelerators"]
    if cluster.gpus_per_node is not None and cluster.processes is None and len(cards) < cluster.gpus_per_node:
        found.append(
            f"node {name}: {len(cards)} accelerators, but cluster.gpus_per_node={cluster.gpus_per_node}; "
            "mend the node or leave it out"
        )
    return found + busy(name, cards)


def busy(name: str, cards: Sequence[Facts]) -> list[str]:
    """Accelerators of a node that others use."""
    found = []
    for number, card in enumerate(cards):
        if card["processes"] or card["used_mib"] > BUSY_MIB:
            who = ", ".join(card["processes"]) or "a process that is not shown"
            found.append(
                f"node {name}: accelerator {number} is busy ({card['used_mib']:.0f} MiB, {who}); end that first"
            )
    return found


def _differences(nodes: Mapping[str, Facts]) -> list[str]:
    """What must be equal everywhere; the most common value is taken as the right one."""
    found = []
    for what, fix in (
        ("python", "use the same interpreter everywhere"),
        *((f"packages.{name}", "install the same version everywhere") for name in _package_names(nodes)),
        ("driver", "install the same driver everywhere"),
        ("code", "run from the same checkout, or let launcher=ssh ship it (cluster.ssh.code_dir)"),
        ("manifest", "data.path must be the same dataset everywhere"),
    ):
        values = {name: _value(facts, what) for name, facts in nodes.items()}
        common = Counter(values.values()).most_common(1)[0][0]
        found += [
            f"node {name}: {what.removeprefix('packages.')} {value} differs from {common} on the others; {fix}"
            for name, value in values.items()
            if value != common
        ]
    return found


def _package_names(nodes: Mapping[str, Facts]) -> list[str]:
    return sorted({name for facts in nodes.values() for name in facts["packages"]})


def _value(facts: Facts, what: str) -> str:
    if what == "driver":
        return ", ".join(sorted({card["driver"] for card in facts["accelerators"]})) or "none"
    if what.startswith("packages."):
        return str(facts["packages"].get(what.removeprefix("packages."), "missing"))
    return str(facts[what])
