"""The supervisor with real agents and processes: faults are named, the job goes on, history holds each sample once."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import ROOT
from train.heartbeat import read_beats

pytestmark = pytest.mark.distributed

START = "import sys; from launch.__main__ import main; sys.exit(main(sys.argv[1:], module='tests.launch.fake_train'))"
LAST, BATCH = 20, 8
SLOW = pytest.mark.slow


class Job:
    """A job on `nodes` agents of this machine, each reached by a stand-in for ssh."""

    def __init__(self, folder: Path, nodes: int, *words: str) -> None:
        self.patch = ""
        self.run_dir = folder / "我的 run"
        self.run_dir.mkdir(exist_ok=True)
        (folder / "data").mkdir(exist_ok=True)
        (folder / "data" / "manifest.json").write_text("{}")
        shell = folder / "shell"
        # `gone` cannot be reached, `once` only the first time.
        shell.write_text(
            f'#!/bin/sh\n[ "$1" = gone ] || [ -e {shlex.quote(str(folder))}/"$1" ] && '
            '{ echo "no route to host" >&2; exit 255; }\n'
            f'[ "$1" != once ] || : > {shlex.quote(str(folder))}/once\n'
            # What is different on a host that came back.
            f'[ ! -e {shlex.quote(str(folder))}/setup ] || . {shlex.quote(str(folder))}/setup\nexec sh -c "$2"\n'
        )
        shell.chmod(0o755)
        names = [word.removeprefix("hosts=") for word in words if word.startswith("hosts=")]
        hosts = names[0].split(",") if names else [f"n{number}" for number in range(nodes)]
        (folder / "hosts").write_text("# the cluster\n" + "".join(f"{host} slots=1\n" for host in hosts))
        self.words = [
            *(
                "cluster=ssh",
                f"cluster.nodes={nodes}",
                "cluster.processes=1",
                f"cluster.ssh.hostfile={folder / 'hosts'}",
            ),
            *(f"cluster.ssh.command={shlex.quote(str(shell))}", "cluster.supervisor_address=127.0.0.1"),
            *(f"cluster.ssh.code_dir={folder / 'code'}", "cluster.silent_seconds=5", "cluster.wait_seconds=4"),
            *("cluster.hang_seconds=9", "cluster.connect_seconds=60", "cluster.max_restarts=2"),
            *("model=tiny", f"run_dir={self.run_dir}", f"data.path={folder / 'data'}"),
            *(f"global_batch_size={BATCH}", "micro_batch_size=1"),
            *(word for word in words if not word.startswith("hosts=")),
        ]

    def fault(self, **fault: Any) -> "Job":
        (self.run_dir / "fault.json").write_text(json.dumps(fault))
        return self

    def start(self, **variables: str) -> "subprocess.Popen[str]":
        environment = {name: value for name, value in os.environ.items() if name != "RANK"}
        # The shipped code holds no tests.
        environment |= {"PYTHONPATH": str(ROOT), **variables}
        command = [sys.executable, "-c", self.patch + START, *self.words]
        return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stderr=subprocess.PIPE)

    def run(self) -> tuple[int, str]:
        process = self.start()
        try:
            _, err = process.communicate(timeout=80)
        finally:
            process.kill()
        return process.returncode, err

    def lines(self, name: str) -> list[dict[str, Any]]:
        file = self.run_dir / name
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def history_is_whole(self) -> bool:
        """Each step once, in order, with the samples that belong to it."""
        steps = [(line["step"], line["consumed_samples"]) for line in self.lines("metrics.jsonl")]
        return steps == [(step, BATCH * step) for step in range(1, LAST + 1)]

    def events(self) -> list[dict[str, Any]]:
        return [event for event in self.lines("events.jsonl") if event["kind"] != "recovered"]


@pytest.mark.parametrize(
    "fault, kind, seen",
    [
        pytest.param({"do": "kill"}, "rank_failed", "rank 1 on node n1 was ended by SIGKILL", id="killed"),
        pytest.param(
            {"do": "stop"}, "rank_frozen", "rank 1 on node n1 is frozen at step", id="stopped", marks=pytest.mark.slow
        ),
        pytest.param({"do": "sleep"}, "hang", "no rank went on for", id="hung", marks=SLOW),
    ],
)
def test_a_fault_is_named_and_the_job_goes_on(tmp_path, fault, kind, seen):
    job = Job(tmp_path, 2).fault(rank=1, step=7, **fault)
    status, err = job.run()
    assert status == 0, err
    assert job.history_is_whole()
    assert len({line["job"] for line in job.lines("metrics.jsonl")}) == 1, "a restart is known by its job"
    (event,) = job.events()
    assert event["kind"] == kind
    assert seen in event["seen"]
    assert seen in err
    assert event["action"].startswith("restarted from step 5, ")
    assert event["redone"] == 2
    recovered = [line for line in job.lines("events.jsonl") if line["kind"] == "recovered"]
    assert len(recovered) == 1
    assert (tmp_path / "code").is_dir(), "the code was not sent"
    if kind != "rank_failed":
        assert "wait_for_all" in (job.run_dir / "stacks" / "rank_0.txt").read_text()
    if kind == "hang":
        assert "stuck_in_the_loader" in (job.run_dir / "stacks" / "rank_1.txt").read_text()


@pytest.mark.parametrize(
    "hosts, left, words",
    [
        pytest.param(
            "n0,n1,gone",
            {"n0": [0], "n1": [1]},
            ["cluster.wait_seconds=40"],
            id="it comes back",
            marks=pytest.mark.slow,
        ),
        pytest.param("n0,once", {"n0": [0]}, ["cluster.min_nodes=1"], id="the job goes on with fewer"),
    ],
)
def test_a_lost_node(tmp_path, hosts, left, words):
    job = Job(tmp_path, 2, f"hosts={hosts}", *words).fault(rank=1, step=7, do="kill agent")
    status, err = job.run()
    assert status == 0, err
    assert job.history_is_whole()
    assert job.events()[0]["kind"] == "node_lost"
    assert "is lost: " in job.events()[0]["seen"]
    assert json.loads((job.run_dir / "launch.json").read_text())["nodes"] == left
    if "gone" in hosts:
        assert "node gone: starting its agent ended with status 255: no route to host; going on without" in err
    else:
        assert "1 of 2 nodes train, with the same global batch: n0" in err


@pytest.mark.slow
@pytest.mark.parametrize(
    "setup, left",
    [
        pytest.param("", {"n0": [0], "once": [1]}, id="it trains again"),
        pytest.param("export PYTHONPATH={folder}:$PYTHONPATH", {"n0": [0]}, id="with another torch it may not"),
    ],
)
def test_a_node_that_comes_back_later_is_called_and_looked_at_before_it_trains(tmp_path, setup, left):
    job = Job(tmp_path, 2, "hosts=n0,once", "cluster.min_nodes=1").fault(rank=1, step=7, do="kill agent")
    job.patch = "import launch.supervisor; launch.supervisor.CALL_SECONDS = (1.0, 1.0); "
    (tmp_path / "torch-9.9.dist-info").mkdir()
    (tmp_path / "torch-9.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9\n")
    process = job.start(FAKE_PACE="1.5")
    deadline = time.monotonic() + 60
    while not any(line["kind"] == "recovered" for line in job.lines("events.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.05)
    (tmp_path / "setup").write_text(setup.format(folder=shlex.quote(str(tmp_path))))
    (tmp_path / "once").unlink()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert job.history_is_whole()
    assert "more nodes are there: the job goes on with them" in err
    assert json.loads((job.run_dir / "launch.json").read_text())["nodes"] == left
    worlds = [line["world"] for line in job.lines("metrics.jsonl")]
    assert worlds[5:10] == [1] * 5
    assert worlds[-1] == len(left)
    left_out = [event["seen"] for event in job.events() if event["kind"] == "node_left_out"]
    assert len(left_out) == 2 - len(left)
    assert all(seen.startswith("node once: torch 9.9 differs from") for seen in left_out)


@pytest.mark.slow
def test_what_would_fail_again_is_not_tried_again(tmp_path):
    job = Job(tmp_path, 1, "cluster.max_restarts=1").fault(rank=0, step=3, do="exit:1", always=True)
    status, err = job.run()
    assert status == 1
    assert err.count("[rank 0] planted: rank 0 ends") == 2
    assert "1 restarts in a row brought no new checkpoint" in err
    status, err = job.fault(rank=0, step=3, do="exit:2", always=True).run()
    assert status == 2
    assert err.count("[rank 0] planted: rank 0 ends") == 1
    assert [event["action"].partition(":")[0] for event in job.events()][-2:] == ["gave up", "gave up"]


def test_a_signal_saves_and_stops_all_nodes_and_a_second_job_is_refused(tmp_path):
    job = Job(tmp_path, 2)
    process = job.start(FAKE_PACE="1.5")
    deadline = time.monotonic() + 60
    while len(job.lines("metrics.jsonl")) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    status, err = Job(tmp_path, 2).run()
    assert status == 3
    assert "is running in this folder; stop it, or choose another run_dir" in err
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "SIGUSR1: the ranks save and stop" in err
    assert len(job.lines("metrics.jsonl")) < LAST
    status, err = job.run()
    assert (status, job.history_is_whole()) == (0, True), err


def test_a_signal_that_comes_before_the_ranks_listen_loses_nothing(tmp_path):
    job = Job(tmp_path, 1)
    process = job.start()
    state = job.run_dir / "launch.json"
    deadline = time.monotonic() + 60
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert len(job.lines("metrics.jsonl")) < LAST
    assert job.events() == []


def test_an_agent_whose_launcher_was_killed_ends_with_its_ranks(tmp_path):
    agent = tmp_path / "python"
    patch = "import sys, launch.node as node; node.REFUSED_SECONDS = 0.5; sys.exit(node.main(sys.argv[3:]))"
    agent.write_text(f'#!/bin/sh\necho $$ > {tmp_path}/agent\nexec {sys.executable} -c "{patch}" "$@"\n')
    agent.chmod(0o755)
    job = Job(tmp_path, 1, f"cluster.ssh.python={agent}")
    launcher = job.start(FAKE_PACE="60")
    deadline = time.monotonic() + 60
    while not (beats := read_beats(job.run_dir)) and time.monotonic() < deadline:
        time.sleep(0.05)
    processes = [psutil.Process(int((tmp_path / "agent").read_text())), psutil.Process(beats[0].pid)]
    launcher.kill()
    launcher.communicate()
    _, left = psutil.wait_procs(processes, timeout=20)
    for process in left:
        process.kill()
    assert left == []


def test_unreachable_hosts_are_named_before_anything_starts(tmp_path):
    status, err = Job(tmp_path, 2, "hosts=n0,gone", "cluster.network_interface=nope").run()
    assert status == 2
    assert "launch: node gone: starting its agent ended with status 255: no route to host; 1 of 2 nodes" in err
    status, err = Job(tmp_path, 1, "cluster.network_interface=nope").run()
    assert status == 2
    assert "node n0: cluster.network_interface=nope is not up there; it has " in err
