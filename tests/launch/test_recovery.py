"""Real training on several hosts: nodes that go and come back, a rank that never comes, a rank that is slow.

After each the accepted history is that of one process on one machine: the same samples and losses, each step once.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.launch.hosts import Hosts
from train.run_folder import read_log

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif(not Hosts.available(), reason="needs root and the right to make network namespaces"),
]
STEPS, BATCH = 150, 4
START = "import sys; from launch.__main__ import main; sys.exit(main(sys.argv[1:], module={!r}))"
Command = Callable[..., Any]


class Job:
    """A launch on hosts, and its run folder."""

    def __init__(self, process: "subprocess.Popen[str]", run_dir: Path, log: Path) -> None:
        self._process, self._run_dir, self._log = process, run_dir, log

    def wait_for(self, what: Callable[[], Any]) -> None:
        """Until it is so; fails where the job ends before."""
        deadline = time.monotonic() + 200
        while not what():
            assert self._process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.05)

    def wait_for_step(self, step: int) -> None:
        """Until so many steps are done."""
        self.wait_for(lambda: self.history() and self.history()[-1][0] >= step)

    def ends_well(self) -> None:
        """Wait for status 0."""
        assert self._process.wait(timeout=400) == 0, self.said()

    def said(self) -> str:
        """All it has written so far."""
        return self._log.read_text()

    def nodes(self) -> list[str]:
        """Where the ranks of the newest attempt are."""
        return list(json.loads((self._run_dir / "launch.json").read_text())["nodes"])

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Those of one kind."""
        return [event for event in read_log(self._run_dir / "events.jsonl") if event["kind"] == kind]

    def history(self) -> list[tuple[int, int, float]]:
        """Step, consumed samples and loss of each line of the accepted history."""
        lines = read_log(self._run_dir / "metrics.jsonl")
        return [(line["step"], line["consumed_samples"], line["loss"]) for line in lines]

    def agrees_with(self, expected: list[tuple[int, int, float]]) -> None:
        """Each step once, with its samples, and the losses of one process."""
        assert [one[:2] for one in self.history()] == [(step, BATCH * step) for step in range(1, STEPS + 1)]
        assert [one[2] for one in self.history()] == pytest.approx([one[2] for one in expected], abs=1e-5)


@pytest.fixture(scope="module")
def words(tiny_overrides: list[str]) -> list[str]:
    return [*tiny_overrides, f"max_steps={STEPS}", f"global_batch_size={BATCH}", "saving.every_steps=10"]


@pytest.fixture(scope="module")
def expected(words: list[str], command: Command, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    command("train", *words, f"run_dir={run_dir}")
    lines = read_log(run_dir / "metrics.jsonl")
    return [(line["step"], line["consumed_samples"], line["loss"]) for line in lines]


@contextmanager
def job(hosts: Hosts, folder: Path, *words: str, module: str = "train", nodes: int | None = None) -> Iterator[Job]:
    """A job on these hosts, ended with the block."""
    run_dir, log = folder / "run", folder / "launch.log"
    given = [*hosts.words(nodes), f"run_dir={run_dir}", "cluster.processes=1", "cluster.ssh.code_dir=null"]
    given += ["cluster.max_restarts=5", "cluster.hang_seconds=180", *words]
    with open(log, "w") as out:
        process = hosts.start("-c", START.format(module), *given, stdout=out, stderr=out)
    try:
        yield Job(process, run_dir, log)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_a_spare_comes_in_then_fewer_train_and_a_node_that_is_back_is_taken(tmp_path, words, expected):
    quick = ["cluster.silent_seconds=6", "cluster.wait_seconds=2", "cluster.min_nodes=1"]
    with Hosts(3) as hosts, job(hosts, tmp_path, *words, *quick, nodes=2) as running:
        first, second, spare = hosts.names
        running.wait_for_step(13)
        assert running.nodes() == [first, second]
        hosts.cut(1)
        running.wait_for(lambda: running.nodes() == [first, spare])
        running.wait_for(lambda: len(running.events("recovered")) == 1)
        hosts.cut(2)
        running.wait_for(lambda: running.nodes() == [first])
        hosts.mend(1)
        running.wait_for(lambda: running.nodes() == [first, second])
        running.ends_well()
    running.agrees_with(expected)
    assert [event["node"] for event in running.events("node_lost")] == [second, spare]
    assert f"1 of 2 nodes train, with the same global batch: {first}" in running.said()
    assert running.said().count("more nodes are there: the job goes on with them") == 1


def test_a_rank_that_never_comes_to_a_collective_is_named_with_all_stacks(tmp_path, words, expected):
    hang = ["cluster.hang_seconds=25", "+cluster.environment.TIANKONG_HANG_AT=60"]
    module = "tests.launch.hanging_train"
    with Hosts(2) as hosts, job(hosts, tmp_path, *words, *hang, module=module) as running:
        running.ends_well()
    running.agrees_with(expected)
    (event,) = running.events("hang")
    assert (event["rank"], event["node"]) == (1, hosts.names[1])
    assert f"rank 1 on node {hosts.names[1]} is missing for 2" in event["seen"]
    assert "in phase data at step 15, wait_for_a_shard_that_never_comes at launch/hanging_train.py:" in event["seen"]
    assert "; 1 other rank waits in all_reduce from train/" in event["seen"]
    assert event["action"].startswith("restarted from step 10, ")
    stacks = [(tmp_path / "run" / "stacks" / f"rank_{rank}.txt").read_text() for rank in range(2)]
    assert "all_reduce" in stacks[0]
    assert "wait_for_a_shard_that_never_comes" in stacks[1]


@pytest.mark.skipif(not Hosts.cgroups(), reason="needs cgroups (v1) to slow a node down")
def test_a_slow_node_is_named_and_the_job_goes_on(tmp_path, words, expected):
    with Hosts(4) as hosts, job(hosts, tmp_path, *words) as running:
        running.wait_for_step(20)
        hosts.slow(2, 0.03)
        running.wait_for(lambda: running.events("straggler"))
        hosts.slow(2, 4.0)
        running.ends_well()
    running.agrees_with(expected)
    (event,) = running.events("straggler")
    assert (event["rank"], event["node"]) == (2, hosts.names[2])
    assert f"rank 2 on node {hosts.names[2]} needs " in event["seen"]
    assert running.events("recovered") == []
