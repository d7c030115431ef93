"""A job on hosts with addresses of their own: what only a network can show."""

import json
import subprocess
import sys
import time

import pytest

from tests.launch.hosts import Hosts
from tests.launch.test_supervisor import START

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif(not Hosts.available(), reason="needs root and the right to make network namespaces"),
]


@pytest.mark.skipif(not Hosts.cgroups(), reason="needs cgroups (v1) to slow a node down")
def test_the_preflight_leaves_out_a_slow_link_and_a_slow_node(tmp_path, tiny_dataset):
    run_dir = tmp_path / "run"
    words = ["model=tiny", f"run_dir={run_dir}", f"data.path={tiny_dataset}", "global_batch_size=12"]
    words += ["micro_batch_size=1", "cluster.processes=1", "cluster.ssh.code_dir=null", "cluster.preflight=true"]
    with Hosts(5) as hosts:
        hosts.throttle(3, 30)
        job = hosts.start("-c", START, *hosts.words(3), *words, stderr=subprocess.PIPE)
        # When all have connected and said what they are like, which alone would take such a host minutes.
        for there in (True, False):
            while job.poll() is None and bool(list(run_dir.glob(".seen-*"))) != there:
                time.sleep(0.02)
        hosts.slow(1, 0.02)
        _, err = job.communicate(timeout=400)
    assert job.returncode == 0, err
    good = [hosts.names[number] for number in (0, 2, 4)]
    assert json.loads((run_dir / "launch.json").read_text())["nodes"] == {name: [n] for n, name in enumerate(good)}
    assert f"node {hosts.names[1]} is left out: matmul " in err
    assert f"node {hosts.names[3]} is left out: 4 of its 4 links are slow" in err


def test_what_is_wrong_with_a_node_is_said_before_training_starts(tmp_path, tiny_dataset):
    """Another version, a port in use, an interface that is not there, a busy accelerator: all of them at once."""
    run_dir, tools = tmp_path / "run", tmp_path / "tools"
    (tools / "torch-9.9.dist-info").mkdir(parents=True)
    (tools / "torch-9.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9\n")
    card = 'case "$1" in *compute-apps*) echo GPU-1, 77, python;; *) echo GPU-1, H100, 580.1, 9000, 81559;; esac'
    (tools / "nvidia-smi").write_text(f"#!/bin/sh\n{card}\n")
    (tools / "nvidia-smi").chmod(0o755)
    words = ["model=tiny", f"run_dir={run_dir}", f"data.path={tiny_dataset}", "global_batch_size=12"]
    words += ["micro_batch_size=1", "cluster.processes=1", "cluster.ssh.code_dir=null"]
    words += ["cluster.rendezvous_port=29555", "cluster.network_interface=ib0"]
    listen = "import socket, time; s = socket.socket(); s.bind(('', 29555)); s.listen(); time.sleep(300)"
    with Hosts(3) as hosts:
        first, _, third = hosts.names
        hosts.prepare(2, f"export PYTHONPATH='{tools}' PATH='{tools}':$PATH")
        listener = subprocess.Popen(hosts.inside(first, sys.executable, "-c", listen))
        try:
            job = hosts.start("-c", START, *hosts.words(3), *words, stderr=subprocess.PIPE)
            _, err = job.communicate(timeout=200)
        finally:
            listener.kill()
    assert job.returncode == 2, err
    for said in (
        f"node {first}: cluster.rendezvous_port=29555 is in use by process ",
        *(f"node {name}: cluster.network_interface=ib0 is not up there; it has " for name in hosts.names),
        f"node {third}: torch 9.9 differs from ",
        f"node {third}: accelerator 0 is busy (9000 MiB, 77 (python)); end that first",
        f"node {third}: driver 580.1 differs from none on the others",
    ):
        assert said in err
    assert not (run_dir / "metrics.jsonl").exists()
