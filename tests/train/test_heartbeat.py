"""What a rank says of itself: phases, start-up, the collective it stands in, stacks on a signal, a full disk."""

import os
import subprocess
import sys
import time
from unittest import mock

import pytest
import triton
import triton.language as tl

from tests.conftest import ROOT
from train import heartbeat
from train.heartbeat import Heartbeat, read_beat, read_beats, stack_file

IN_COLLECTIVE = """
import os, sys, threading, time
import torch.distributed as dist
from train.heartbeat import Heartbeat
heart = Heartbeat(sys.argv[1], 0)
heart.start()
heart.now("step", 7)
store = dist.TCPStore("127.0.0.1", 0, 1, True, wait_for_workers=False)
dist.init_process_group("gloo", rank=0, world_size=1, store=store)
print("ready", flush=True)
def waits_in_torch():
    dist.distributed_c10d.recv(__import__("torch").ones(1), src=0)
dist.distributed_c10d._check_single_tensor = lambda *a: time.sleep(60)
waits_in_torch()
"""


def until(condition, seconds: float = 60.0):
    deadline = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert found
    return found


@pytest.mark.unit
def test_phases_steps_and_start_up(tmp_path):
    heart = Heartbeat(tmp_path, 3)
    for phase in ("rendezvous", "collectives", "engine", "data", "step"):
        heart.now(phase)
    assert heart.startup == {}
    heart.now("data", 1)
    assert list(heart.startup) == ["imports", "rendezvous", "collectives", "engine", "data", "step"]
    assert heart.startup["imports"] > 0
    assert not (tmp_path / "heartbeat").exists()
    heart.start()
    beat = read_beat(tmp_path, 3)
    assert beat is not None
    assert (beat.step, beat.phase, beat.collective, beat.pid) == (1, "data", None, os.getpid())
    assert beat.startup == heart.startup
    heart.close()
    assert read_beats(tmp_path)[3].phase == "ended"


@pytest.mark.unit
def test_a_full_disk_neither_stops_the_rank_nor_silences_it(tmp_path):
    heart = Heartbeat(tmp_path, 0)
    heart.start()
    size = heartbeat.beat_file(tmp_path, 0).stat().st_size
    with mock.patch("os.pwrite", side_effect=OSError(28, "No space left on device")):
        heart._beat()
    heart.now("save", 10**9)
    heart._beat()
    assert heartbeat.beat_file(tmp_path, 0).stat().st_size == size, "written in place, it needs no space"
    heart.close()
    (tmp_path / "a file").write_text("")
    Heartbeat(tmp_path / "a file", 0).start()


@pytest.mark.distributed
def test_the_collective_and_the_stacks_of_a_rank_that_waits(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", IN_COLLECTIVE, str(tmp_path)], cwd=ROOT)
    try:
        beat = until(lambda: (found := read_beat(tmp_path, 0)) and found.collective and found)
        assert (beat.step, beat.phase, beat.pid) == (7, "step", process.pid)
        assert beat.collective.startswith("recv")
        os.kill(process.pid, heartbeat.STACK_SIGNAL)
        # Written piece by piece.
        until(lambda: "in waits_in_torch" in stack_file(tmp_path, 0).read_text())
        assert "in recv" in stack_file(tmp_path, 0).read_text()
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


COMPILES = """
import sys, time
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tests.train.test_heartbeat import kernel
from train.heartbeat import Heartbeat

heart = Heartbeat(sys.argv[1], 0)
heart.start()
triton.compile(ASTSource(kernel, {"x": "*fp32"}), target=GPUTarget("cuda", 90, 32))
heart.now("step", 1)
heart._beat()
time.sleep(600)
"""


@triton.jit
def kernel(x):
    tl.store(x, 1.0)


@pytest.mark.unit
def test_the_stacks_are_told_after_triton_has_compiled(tmp_path):
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    process = subprocess.Popen([sys.executable, "-c", COMPILES, str(tmp_path)], cwd=ROOT, env=environment)
    try:
        until(lambda: (beat := read_beat(tmp_path, 0)) and beat.step == 1)
        os.kill(process.pid, heartbeat.STACK_SIGNAL)
        until(lambda: '"<string>", line ' in stack_file(tmp_path, 0).read_text())
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


@pytest.mark.unit
def test_time_outside_collectives_is_a_rank_s_own(tmp_path):
    heart = Heartbeat(tmp_path, 0)
    heart._window.extend([(10, 5.0), (20, 9.0)])
    assert heart._own_seconds() is None, "two looks may both have fallen on a wait"
    heart._window.extend([(20, 9.0)] * heartbeat.FEWEST_BEATS)
    assert heart._own_seconds() == pytest.approx(0.4)


@pytest.mark.unit
@pytest.mark.parametrize("accelerated, own", [(False, True), (True, False)])
def test_a_step_on_an_accelerator_is_not_the_host_s_own_time(tmp_path, monkeypatch, accelerated, own):
    monkeypatch.setattr(heartbeat, "SAMPLE_SECONDS", 0.01)
    heart = Heartbeat(tmp_path, 0, accelerated=accelerated)
    heart.now("step")
    heart.start()
    time.sleep(0.3)
    assert (heart._own > 0) == own
    heart.now("data", 1)
    until(lambda: heart._own > 0.01)
    heart.close()


DUMP = """Thread 0x00007f0000000003 (most recent call first):
  File "/env/lib/python3.11/site-packages/torch/distributed/distributed_c10d.py", line 9 in barrier
  File "/code/train/checkpoint/saver.py", line 5 in wait

Thread 0x00007f0000000001 (most recent call first):
  File "/env/lib/python3.11/site-packages/torch/distributed/distributed_c10d.py", line 3012 in all_reduce
  File "/env/lib/python3.11/site-packages/torch/distributed/c10d_logger.py", line 83 in wrapper
  File "/env/lib/python3.11/site-packages/deepspeed/comm/comm.py", line 513 in all_reduce
  File "/code/train/engine.py", line 120 in step
"""


@pytest.mark.unit
def test_the_main_thread_s_collective_counts_first():
    assert heartbeat.collective_in(DUMP, "0x00007f0000000001") == "all_reduce from train/engine.py:120"
    assert heartbeat.collective_in(DUMP, "0x00007f0000000003") == "barrier from checkpoint/saver.py:5"
    assert (
        heartbeat.collective_in("Current thread 0x01 (most recent call first):\n  <no Python frame>\n", "0x01") is None
    )
