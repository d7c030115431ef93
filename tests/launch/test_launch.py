"""The launcher with real processes: what one console shows, which rank is blamed, what exit status comes out."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from launch.__main__ import main
from launch.agent import module_command, run_ranks

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).resolve().parents[2]
START = "import sys; from launch.__main__ import main; sys.exit(main(sys.argv[1:], module='tests.launch.fake_rank'))"


def popen(run_dir: Path, behaviour: str, processes: int, *words: str) -> subprocess.Popen[str]:
    """The whole command line in a process of its own."""
    command = [sys.executable, "-c", START, "cluster=local", f"cluster.processes={processes}", "model=tiny"]
    command += [f"run_dir={run_dir}", "data.path=here", "global_batch_size=8", "micro_batch_size=1", *words]
    environment = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "RANK")}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment, "FAKE_RANK": behaviour},
    )


LOST = "RuntimeError: [pair.cc:553] Connection closed by peer [127.0.0.1]:12437."
TIMED_OUT = "terminate called after throwing an instance of 'Error'\n  what():  Watchdog caught collective timeout"
PLANTED = "Traceback (most recent call last):\nRuntimeError: planted"
OTHER = "Traceback (most recent call last):\nValueError: of another rank"


class Launched(NamedTuple):
    status: int
    out: str
    err: str
    logs: Path


@pytest.fixture
def launch(tmp_path, capfd, monkeypatch):
    """Runs ranks in this process's agent, without the seconds that composing a config takes."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def start(behaviour: str, processes: int = 2) -> Launched:
        monkeypatch.setenv("FAKE_RANK", behaviour)
        status = run_ranks(module_command("tests.launch.fake_rank", []), processes, tmp_path / "logs")
        out, err = capfd.readouterr()
        return Launched(status, out, err, tmp_path / "logs")

    return start


def signal_when_ready(logs: Path, *signums: signal.Signals) -> threading.Thread:
    """Send this process signals, half a second apart, once rank 0 has said that it is ready."""

    def send() -> None:
        deadline = time.monotonic() + 60
        log = logs / "rank_0.log"
        while time.monotonic() < deadline and not (log.exists() and "ready" in log.read_text()):
            time.sleep(0.02)
        for signum in signums:
            time.sleep(0.5)
            os.kill(os.getpid(), signum)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def test_one_console_and_a_log_a_rank(tmp_path):
    process = popen(tmp_path / "我的 run", "hello", 2, "seed=7")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert out.splitlines()[0] == f"rank 0 of 2 threads {threads}"
    assert "rank 1 of 2" not in out
    assert "warning of rank 0" in err.splitlines()
    assert "[rank 1] warning of rank 1" in err.splitlines()
    assert f"[rank 1] rank 1 of 2 threads {threads}" in err.splitlines()
    assert err.count("the same from all") == 1
    assert "python -m launch cluster=local" in out
    assert "'seed=7'" in out
    log = (tmp_path / "我的 run" / "logs" / "rank_1.log").read_text()
    assert "rank 1 of 2" in log
    assert "warning of rank 1" in log


def test_ranks_find_each_other(launch):
    done = launch("reduce", 3)
    assert (done.status, done.out) == (0, "sum 3.0\n"), done.err


@pytest.mark.parametrize("behaviour", ["raise0", "close_first1"])
def test_the_failing_ranks_traceback_comes_first_and_alone(launch, behaviour):
    done = launch(behaviour)
    assert done.status == 1
    rank = int(behaviour[-1])
    prefix = "" if rank == 0 else f"[rank {rank}] "
    lines = [line for line in done.err.splitlines() if line.strip()]
    assert lines[0] == prefix + "Traceback (most recent call last):", done.err
    assert any("planted" in line for line in lines)
    # The kernel says "reset" where the lost rank had words for this one unread.
    assert not re.search("onnection (closed|reset)", done.err)
    assert f"launch: rank {rank} failed with exit status 1; the other rank was ended" in done.err
    assert re.search("onnection (closed|reset)", (done.logs / f"rank_{1 - rank}.log").read_text())


@pytest.mark.parametrize(
    "steps, status, said",
    [
        pytest.param(
            [[("say", LOST), ("abort", "")], [("await", "closed"), ("sleep", "1"), ("say", PLANTED), ("exit", "1")]],
            1,
            "rank 1 failed with exit status 1; the other",
            id="a peer that aborts",
        ),
        pytest.param(
            [[("say", TIMED_OUT), ("abort", "")], [("await", "File"), ("sleep", "1"), ("say", PLANTED), ("exit", "1")]],
            1,
            "rank 1 failed with exit status 1; the other",
            id="a peer that torch's watchdog aborts",
        ),
        pytest.param(
            [[("say", PLANTED), ("abort", "closing")], [("await", "planted"), ("say", LOST), ("exit", "1")]],
            1,
            "rank 0 failed with exit status 1; the other",
            id="the culprit aborts while it closes",
        ),
        pytest.param(
            [[("await", "planted"), ("say", LOST), ("exit", "1")], [("say", PLANTED), ("sleep", "60")]],
            1,
            "rank 1 failed and did not end; the other",
            id="the culprit hangs while it closes",
        ),
        pytest.param(
            [
                [("await", "planted"), ("say", OTHER), ("exit", "1")],
                [("say", PLANTED), ("await", "another"), ("sleep", "1"), ("exit", "1")],
            ],
            1,
            "rank 1 failed with exit status 1; the other",
            id="the culprit ends later than another error",
        ),
        pytest.param(
            [
                [("say", LOST), ("exit", "1")],
                [("await", "closed"), ("say", "train: part 1: Connection reset by peer"), ("exit", "3")],
            ],
            3,
            "rank 1 failed with exit status 3; the other",
            id="a status of its own beats its words",
        ),
        pytest.param(
            [[("say", LOST), ("exit", "1")], [("await", "closed"), ("exit", "75")]],
            1,
            "rank 0 failed with exit status 1, though rank 1 ended with 75; the other",
            id="no own error anywhere",
        ),
    ],
)
def test_the_first_error_of_a_ranks_own_is_blamed(launch, monkeypatch, tmp_path, steps, status, said):
    monkeypatch.setenv("FAKE_STEPS", json.dumps(steps))
    monkeypatch.setenv("FAKE_LOGS", str(tmp_path / "logs"))
    if "did not end" in said:
        monkeypatch.setattr("launch.ranks.BLAME_SECONDS", 1.0)
    done = launch("play")
    assert done.status == status, done.err
    assert f"launch: {said}" in done.err
    assert ("onnection closed" in done.err) == ("though" in said)
    assert "of another rank" not in done.err


def test_the_exit_status_is_the_failing_ranks(launch):
    start = time.monotonic()
    done = launch("exit1:9")
    assert done.status == 9
    assert done.err.splitlines()[0] == "[rank 1] train: shard 1 is damaged"
    assert time.monotonic() - start < 10


def test_ranks_that_fail_alike_speak_once(launch):
    done = launch("all_alike", 3)
    assert done.status == 2
    assert done.err.splitlines()[0] == "train: parallel.tensor_parallel=3 does not divide"
    assert done.err.count("does not divide") == 1


def test_a_killed_rank_is_named(launch):
    done = launch("killed")
    assert done.status == 1
    assert "rank 1 was ended by SIGKILL" in done.err


def test_a_rank_that_ignores_sigterm_is_killed_within_seconds(launch, monkeypatch):
    monkeypatch.setattr("launch.ranks.TERMINATE_SECONDS", 1.0)
    start = time.monotonic()
    assert launch("stubborn").status == 3
    assert time.monotonic() - start < 15


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signals_let_the_ranks_save(launch, tmp_path, signum):
    sender = signal_when_ready(tmp_path / "logs", signum)
    done = launch("save")
    sender.join()
    assert done.status == 75, done.err
    assert "saved by rank 0 on SIGTERM" in done.out
    assert "[rank 1] saved by rank 1 on SIGTERM" in done.err
    assert f"launch: {signum.name}: the ranks save and stop" in done.err


def test_a_second_signal_ends_ranks_that_take_too_long(launch, monkeypatch, tmp_path):
    monkeypatch.setattr("launch.ranks.TERMINATE_SECONDS", 1.0)
    sender = signal_when_ready(tmp_path / "logs", signal.SIGTERM, signal.SIGTERM)
    done = launch("slow_save", 1)
    sender.join()
    assert done.status == 1
    assert "without saving" in done.err


def test_ranks_that_do_not_listen_end_on_the_signal(launch, tmp_path):
    sender = signal_when_ready(tmp_path / "logs", signal.SIGTERM)
    done = launch("wait")
    sender.join()
    assert done.status == 1
    assert "ended by SIGTERM without saving" in done.err


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_a_killed_launcher_leaves_no_rank_behind(tmp_path):
    process = popen(tmp_path, "wait", 2)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) == 2
    process.kill()
    process.communicate(timeout=60)
    _, alive = psutil.wait_procs(children, timeout=60)
    assert alive == []


def test_a_traceback_that_is_only_logged_is_shown_in_the_end(launch):
    done = launch("logged_traceback", 1)
    assert done.status == 0
    assert "ValueError: harmless" in done.err
    assert "went on" in done.err


@pytest.mark.parametrize(
    "word, said",
    [
        ("no_such_key=1", "no_such_key"),
        ("parallel.tensor_parallel=3", "parallel.tensor_parallel=3"),
        ("cluster.launcher=pigeon", "cluster.launcher"),
        ("cluster.processes=0", "cluster.processes=0"),
        ("global_batch_size=7", "global_batch_size=7"),
        ("--multirun", "--multirun"),
    ],
)
def test_a_wrong_setting_starts_nothing(tmp_path, capfd, word, said):
    words = ["cluster.processes=2", "model=tiny", f"run_dir={tmp_path}", "data.path=here", "micro_batch_size=1"]
    assert main([*words, word], module="tests.launch.fake_rank") == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith("launch: ")
    assert said in err
    assert not (tmp_path / "logs").exists()
