"""Bare torchrun and DeepSpeed's own launcher on two hosts, by the commands of docs/launching.md."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from shutil import which
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.launch.hosts import Hosts
from tests.launch.test_ssh import reachable
from train.heartbeat import read_beats
from train.run_folder import read_log

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif(not Hosts.available(), reason="needs root and the right to make network namespaces"),
]
STEPS = 20
TORCHRUN, DEEPSPEED = (str(Path(sys.executable).with_name(name)) for name in ("torchrun", "deepspeed"))


@pytest.fixture(scope="module")
def words(tiny_overrides: list[str]) -> list[str]:
    return [*tiny_overrides, f"max_steps={STEPS}"]


@pytest.fixture(scope="module")
def losses(words: list[str], command: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Of one process on one machine."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    command("train", *words, f"run_dir={run_dir}")
    return [line["loss"] for line in read_log(run_dir / "metrics.jsonl")]


def check(run_dir: Path, losses: list[float], hosts: list[str]) -> None:
    """The same losses, and one rank on each host."""
    lines = read_log(run_dir / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in lines] == pytest.approx(losses, abs=1e-5)
    assert [beat.host for _, beat in sorted(read_beats(run_dir).items())] == hosts


def test_torchrun_on_each_of_two_hosts(tmp_path, words, losses):
    run_dir = tmp_path / "run"
    given = ["--nnodes", "2", "--master-addr", Hosts.address(0), "--nproc-per-node", "1"]
    with Hosts(2) as hosts:
        agents = [
            subprocess.Popen(
                hosts.inside(
                    name, TORCHRUN, *given, "--node-rank", str(number), "-m", "train", *words, f"run_dir={run_dir}"
                ),
                cwd=ROOT,
                stderr=subprocess.PIPE,
                text=True,
            )
            for number, name in enumerate(hosts.names)
        ]
        said = [agent.communicate(timeout=200)[1] for agent in agents]
        names = hosts.names
    assert [agent.returncode for agent in agents] == [0, 0], said
    check(run_dir, losses, names)


@pytest.mark.skipif(which("pdsh") is None or which("sshd") is None, reason="needs pdsh and openssh-server")
def test_deepspeed_with_a_hostfile(tmp_path, words, losses):
    run_dir, tools = tmp_path / "run", tmp_path / "tools"
    with Hosts(2) as hosts, reachable(hosts, hosts.names, tmp_path, with_code=True) as ssh:
        (tmp_path / "hosts").write_text("".join(f"{name} slots=1\n" for name in hosts.names))
        # The launcher and pdsh call plain ssh, which here must find the test's keys.
        tools.mkdir()
        (tools / "ssh").write_text(f'#!/bin/sh\nexec {which("ssh")}{ssh.removeprefix("ssh")} "$@"\n')
        (tools / "ssh").chmod(0o755)
        given = ["--hostfile", str(tmp_path / "hosts"), "--no_local_rank", "--module", "train"]
        job = subprocess.Popen(
            hosts.inside(hosts.hub, DEEPSPEED, *given, *words, f"run_dir={run_dir}"),
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"},
        )
        _, said = job.communicate(timeout=200)
        names = hosts.names
    assert job.returncode == 0, said
    check(run_dir, losses, names)
