"""Messages between nodes and supervisor, and which nodes may train."""

import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from data_prep.errors import ConfigError
from launch import flight_recorder, node
from launch.admission import admit
from launch.crew import Crew
from launch.facts import facts, port_taken_by
from launch.starters import PresentStarter, SshStarter, read_hostfile
from launch.wire import Link, Switchboard, connect
from train.cli import compose_train

pytestmark = pytest.mark.unit


def polled(board: Switchboard, count: int) -> list[tuple[Link, dict[str, Any] | None]]:
    events: list[Any] = []
    deadline = time.monotonic() + 60
    while len(events) < count and time.monotonic() < deadline:
        events += board.poll(0.05)
    return events


def test_messages_arrive_whole_and_only_with_the_token():
    board = Switchboard(0, "secret")
    stranger, node = connect("127.0.0.1", board.port), connect("127.0.0.1", board.port)
    stranger.send({"kind": "hello", "token": "guess"})
    node.send({"kind": "hello", "token": "secret", "name": "甲"})
    ((link, message),) = polled(board, 1)
    assert message == {"kind": "hello", "name": "甲"}
    big = {"kind": "stacks", "text": "x" * 3_000_000}
    node.send(big)
    while node._unsent:
        board.poll(0.0)
        node.flush()
        if events := board.poll(0.01):
            break
    else:
        events = polled(board, 1)
    assert events == [(link, big)] or polled(board, 1) == [(link, big)]
    node.connection.sendall(b"not json\n")
    assert polled(board, 1) == [(link, None)]
    assert board.links == []
    board.close()


def test_a_node_in_reserve_is_not_taken_for_lost(monkeypatch):
    monkeypatch.setattr(node, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(node, "VOICE_SECONDS", 0.05)
    board = Switchboard(0, "secret")
    crew = Crew(board, PresentStarter(["spare"]), silent_seconds=0.5)
    agent = threading.Thread(target=node.Node("127.0.0.1", board.port, "spare", "secret").run, daemon=True)
    agent.start()
    deadline = time.monotonic() + 5
    while not crew.connected() and time.monotonic() < deadline:
        crew.poll(0.05)
    greeted = crew.members["spare"].greeted
    for _ in range(20):
        crew.poll(0.05)
        assert crew.connected() == ["spare"]
    assert crew.members["spare"].greeted == greeted
    crew.farewell()
    agent.join(5)
    assert not agent.is_alive()


def test_a_port_in_use_is_named(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cluster.supervisor_port={port} cannot be used on .* set 0"):
            Switchboard(port, "secret")
        assert str(port_taken_by(port)).startswith("process ")
    assert port_taken_by(port) is None


@pytest.fixture
def told(tmp_path) -> dict[str, Any]:
    (tmp_path / ".seen-12345678").write_text("1234567890")
    (tmp_path / "manifest.json").write_text("{}")
    return facts(run_dir=str(tmp_path), data_path=str(tmp_path), nonce="1234567890", port=0)


CARD = {"name": "H100", "driver": "580.1", "used_mib": 10.0, "total_mib": 81559.0, "processes": []}


@pytest.mark.parametrize(
    "changes, words, said",
    [
        ({"packages": {"torch": "2.11.0"}}, [], "node c: torch 2.11.0 differs from .* on the others; install"),
        ({"python": "3.9.1"}, [], "node c: python 3.9.1 differs from"),
        ({"code": "0"}, [], "node c: code 0 differs from .* ship it"),
        ({"manifest": "0"}, [], "node c: manifest 0 differs from .* same dataset"),
        ({"accelerators": [{**CARD, "driver": "550.2"}]}, [], "node c: driver 550.2 differs from 580.1"),
        ({"sees_run_dir": False}, [], "node c: run_dir=.* is not the folder that the supervisor sees"),
        ({"sees_data": False}, [], "node c: data.path=here holds no dataset there"),
        ({"interfaces": {"lo": ["127.0.0.1"]}}, ["cluster.network_interface=ib0"], "node c: .*ib0 is not up there; it"),
        ({"port_taken_by": "process 7 (nc)"}, ["cluster.rendezvous_port=29500"], "node c: .*29500 is in use by proc"),
        ({"accelerators": []}, ["cluster.gpus_per_node=1"], "node c: 0 accelerators, but cluster.gpus_per_node=1"),
        ({"accelerators": [{**CARD, "processes": ["9 (python)"]}]}, [], r"accelerator 0 is busy \(10 MiB, 9 \(python"),
        ({"accelerators": [{**CARD, "used_mib": 9e3}]}, [], r"accelerator 0 is busy \(9000 MiB, a process that is"),
    ],
)
def test_a_node_that_cannot_train_is_named_with_the_fix(told, changes, words, said):
    config = compose_train(["data.path=here", "cluster.nodes=3", "cluster.launcher=ssh", *words])
    good = {**told, "interfaces": {"ib0": ["10.0.0.1"]}, "accelerators": [CARD]}
    packages = {**good["packages"], **changes.get("packages", {})}
    bad = {**good, **changes, "packages": packages}
    admit(config, {"a": good, "b": good}, {"a": 0.1, "b": -2.0})
    with pytest.raises(ConfigError, match=said):
        admit(config, {"a": good, "b": good, "c": bad}, {})


def test_a_clock_that_is_off_is_named(told):
    with pytest.raises(ConfigError, match=r"node b: its clock is \+3600 s off; set it"):
        admit(compose_train(["data.path=here"]), {"a": told, "b": told}, {"a": 0.0, "b": 3600.0})


@pytest.mark.parametrize("patience, started", [(300.0, 1), (0.0, 2)])
def test_an_ssh_that_brought_no_agent_is_replaced(tmp_path, patience, started):
    """As to a machine that lost its power: the connection stands, and nothing comes over it."""
    shell, log = tmp_path / "shell", tmp_path / "started"
    shell.write_text(f"#!/bin/sh\necho $$ >> '{log}'\nexec sleep 60\n")
    shell.chmod(0o755)
    words = [f"cluster.ssh.command='{shell}'", "cluster.ssh.code_dir=null", f"cluster.connect_seconds={patience}"]
    starter = SshStarter(compose_train(["cluster=ssh", "data.path=here", *words]).cluster, ["a"], 1, "secret")

    def pids() -> list[int]:
        return [int(line) for line in log.read_text().split()] if log.exists() else []

    deadline = time.monotonic() + 5
    for count in (1, started):
        starter.start(["a"])
        while len(pids()) < count and time.monotonic() < deadline:
            time.sleep(0.01)
    assert [psutil.pid_exists(pid) for pid in pids()] == [False] * (started - 1) + [True]
    os.kill(pids()[-1], signal.SIGKILL)
    starter.close()


@pytest.mark.parametrize(
    "text, said",
    [(None, "cannot be read"), ("# nobody\n", "names no host"), ("a\nb slots=8\na\n", "names a twice")],
)
def test_a_wrong_hostfile_is_named(tmp_path, text, said):
    file = tmp_path / "hosts"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=f"cluster.ssh.hostfile={file} .*{said}"):
        read_hostfile(str(file))


def test_a_hostfile_keeps_its_order(tmp_path):
    (tmp_path / "hosts").write_text("# two racks\nb slots=8\na # the other\n\n")
    assert read_hostfile(str(tmp_path / "hosts")) == ["b", "a"]


def test_a_rank_is_asked_for_its_collectives_where_one_listens(tmp_path):
    assert flight_recorder.variables(tmp_path, 0) == {}
    told = flight_recorder.variables(tmp_path, 2000)
    assert Path(told["TORCH_FR_DUMP_TEMP_FILE"]).parent == tmp_path / "stacks"
    # As torch makes it.
    pipe = Path(told["TORCH_NCCL_DEBUG_INFO_PIPE_FILE"] + "3.pipe")
    flight_recorder.ask(tmp_path, 3)
    os.mkfifo(pipe)
    try:
        flight_recorder.ask(tmp_path, 3)
        listening = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        flight_recorder.ask(tmp_path, 3)
        assert os.read(listening, 10)
        os.close(listening)
    finally:
        pipe.unlink()
