"""The run folder under kills, full disks, second runs and resumes."""

import errno
import fcntl
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import train.run_lock
from data_prep.errors import ConfigError, DataError
from train.run_folder import RunFolder, finite, is_restart, read_log, resume_command

pytestmark = pytest.mark.unit


def records(*steps: int) -> list[dict[str, float]]:
    return [{"step": step, "loss": 10.0 / step} for step in steps]


@pytest.fixture
def folder(tmp_path):
    opened = RunFolder.open(tmp_path / "run", resume=True)
    yield opened
    opened.close()


def reopen(folder: RunFolder) -> RunFolder:
    folder.close()
    return RunFolder.open(folder.path, resume=True)


def test_records_come_back_as_they_went_in(folder):
    folder.append("metrics", records(1, 2))
    folder.append("metrics", records(3))
    folder.append("events", [{"id": 1, "kind": "spike", "seen": "损失"}])
    folder.flush()
    assert folder.read("metrics") == records(1, 2, 3)
    assert folder.read("events")[0]["seen"] == "损失"
    assert folder.read("validation") == []


def test_numbers_that_are_not_finite_become_null(folder):
    folder.append("metrics", [{"step": 1, "loss": float("nan"), "by": {"zh": float("inf"), "en": np.float32(0.5)}}])
    assert folder.read("metrics") == [{"step": 1, "loss": None, "by": {"zh": None, "en": 0.5}}]


def test_a_record_that_is_not_json_is_refused_whole(folder):
    with pytest.raises(TypeError, match="not JSON"):
        folder.append("metrics", [*records(1), {"step": object()}])
    assert folder.read("metrics") == []


def test_attempts_are_counted_and_keep_their_configs(folder):
    for attempt in (1, 2, 3):
        assert folder.attempt == attempt
        folder.write_config(f"seed: {attempt}\n")
        folder = reopen(folder)
    folder.close()
    names = ["config.yaml", "config.attempt-2.yaml", "config.attempt-3.yaml"]
    assert [(folder.path / name).read_text() for name in names] == [f"seed: {attempt}\n" for attempt in (1, 2, 3)]


def test_an_existing_run_is_not_touched_without_resume(folder):
    folder.write_config("seed: 1\n")
    folder.close()
    with pytest.raises(ConfigError, match=r"run_dir=.*resume\.enabled"):
        RunFolder.open(folder.path, resume=False)
    # The refusal leaves no lock behind.
    RunFolder.open(folder.path, resume=True).close()


def test_a_restart_of_the_same_job_continues_its_own_run(folder, monkeypatch):
    path = folder.path
    monkeypatch.setenv("TIANKONG_JOB", "a")
    folder.write_environment()
    folder.write_config("seed: 1\n")
    folder.close()
    for job, restarts in {"a": True, "b": False, "": False}.items():
        monkeypatch.setenv("TIANKONG_JOB", job)
        assert is_restart(path) == is_restart(path, job) == restarts
        if restarts:
            RunFolder.open(path, resume=False).close()
        else:
            with pytest.raises(ConfigError, match=r"resume\.enabled"):
                RunFolder.open(path, resume=False)
    monkeypatch.setenv("TIANKONG_JOB", "c")
    folder = reopen(folder)
    folder.write_environment()
    folder.close()
    assert is_restart(path, "a"), "another command came between"


@pytest.mark.parametrize(
    "typed, quoted",
    [
        ("python -m launch resume.step=10 seed=1", "python -m launch seed=1"),
        ("python -m launch ++resume.step=10 'run_dir=a b' resume.enabled=false", "python -m launch 'run_dir=a b'"),
        ('sbatch "runs/a b/job.sbatch"', 'sbatch "runs/a b/job.sbatch"'),
    ],
)
def test_the_command_that_goes_on_leaves_out_what_was_obeyed(monkeypatch, typed, quoted):
    monkeypatch.setenv("TIANKONG_COMMAND", typed)
    assert resume_command() == quoted


def test_an_empty_folder_needs_no_resume(tmp_path):
    opened = RunFolder.open(tmp_path, resume=False)
    assert opened.attempt == 1
    opened.close()


def test_a_file_in_place_of_the_folder_is_a_config_error(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match="run_dir"):
        RunFolder.open(tmp_path / "run", resume=True)


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b'{"step": 3, "loss": 1}', b"\0" * 5000, b'{"step": 3\n'])
def test_a_torn_last_line_is_moved_aside(folder, torn):
    folder.append("metrics", records(1, 2))
    folder.close()
    with open(folder.path / "metrics.jsonl", "ab") as file:
        file.write(torn)
    folder = reopen(folder)
    assert folder.read("metrics") == records(1, 2)
    assert (folder.path / "discarded" / "metrics.attempt-1.torn").read_bytes() == torn
    folder.append("metrics", records(3))
    assert folder.read("metrics") == records(1, 2, 3)
    folder.close()


def test_rewind_moves_later_lines_and_appends_to_what_is_there(folder):
    folder.write_config("")
    folder = reopen(folder)
    folder.append("metrics", records(*range(1, 2001)))
    folder.append("validation", records(1000, 2000))
    folder.append("events", records(1500))
    assert folder.rewind(1200) == 801
    assert folder.read("metrics") == records(*range(1, 1201))
    assert folder.read("validation") == records(1000)
    assert folder.read("events") == records(1500)
    aside = folder.path / "discarded" / "metrics.attempt-2.jsonl"
    assert read_log(aside) == records(*range(1201, 2001))
    folder.append("metrics", records(1201))
    assert folder.rewind(1200) == 1
    assert folder.rewind(1200) == 0
    assert read_log(aside) == records(*range(1201, 2001), 1201)
    assert folder.rewind(0) == 1201
    assert folder.read("metrics") == []
    folder.close()


def test_a_damaged_line_in_the_middle_is_named(folder):
    folder.close()
    (folder.path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    folder = reopen(folder)
    with pytest.raises(DataError, match=r"metrics\.jsonl: line 2"):
        folder.read("metrics")
    folder.close()


def test_a_full_disk_leaves_no_half_line(folder, monkeypatch):
    folder.append("metrics", records(1))
    write = os.write
    calls = []

    def full(descriptor, content):
        calls.append(content)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, content[:7])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(DataError, match=r"metrics\.jsonl: the disk is full"):
        folder.append("metrics", records(2))
    monkeypatch.undo()
    assert (folder.path / "metrics.jsonl").read_bytes().endswith(b"}\n")
    folder.append("metrics", records(2))
    assert folder.read("metrics") == records(1, 2)


def test_a_second_run_in_the_same_folder_is_named(folder):
    with pytest.raises(DataError, match=f"process {os.getpid()} on {socket.gethostname()}"):
        RunFolder.open(folder.path, resume=True)


HOLD = "import sys, time; from train.run_folder import RunFolder; f = RunFolder.open(sys.argv[1], resume=True); "
HOLD += "f.append('metrics', [{'step': 1}]); print('held', flush=True); time.sleep(60)"


def test_the_lock_of_a_killed_run_is_taken_over(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    with holder, holder.stdout:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(DataError, match=f"process {holder.pid} on"):
            RunFolder.open(tmp_path, resume=True)
        holder.send_signal(signal.SIGKILL)
    opened = RunFolder.open(tmp_path, resume=True)
    assert opened.read("metrics") == [{"step": 1}]
    opened.close()


def test_workers_that_outlive_a_killed_run_hold_its_lock_only_for_a_while(tmp_path):
    # What torch's loader workers do: forked, so they keep the descriptor until they notice that their parent is gone.
    fork = "import os, sys, time\nfrom train.run_folder import RunFolder\nRunFolder.open(sys.argv[1], resume=True)\n"
    fork += "if os.fork(): os.kill(os.getpid(), 9)\ntime.sleep(2)"
    subprocess.run([sys.executable, "-W", "ignore", "-c", fork, tmp_path], check=False)
    RunFolder.open(tmp_path, resume=True).close()


def test_another_hosts_lock_is_taken_over_when_nothing_touches_it(tmp_path, monkeypatch):
    monkeypatch.setattr(train.run_lock, "WATCH_SECONDS", 0.6)
    monkeypatch.setattr(train.run_lock, "BEAT_SECONDS", 0.1)
    lock = tmp_path / "lock"
    lock.write_text(json.dumps({"pid": 1, "host": "node-17", "started": 1.0}))
    toucher = subprocess.Popen(
        [sys.executable, "-c", f"import os, time\nwhile True: os.utime({str(lock)!r}); time.sleep(0.1)"]
    )
    with toucher:
        time.sleep(0.3)
        with pytest.raises(DataError, match="process 1 on node-17"):
            RunFolder.open(tmp_path, resume=True)
        toucher.kill()
    RunFolder.open(tmp_path, resume=True).close()
    assert lock.read_text() == ""


@pytest.mark.parametrize("lease, taken", [(20.0, True), (0.5, False)])
def test_a_dead_hosts_lock_may_live_on_in_the_file_system_for_its_lease(tmp_path, monkeypatch, lease, taken):
    monkeypatch.setattr(train.run_lock, "WATCH_SECONDS", 0.3)
    monkeypatch.setattr(train.run_lock, "LEASE_SECONDS", lease)
    lock = tmp_path / "lock"
    lock.write_text(json.dumps({"pid": 1, "host": "node-17", "started": 1.0}))
    # As a server of NFSv4 holds it for a client that is gone: locked, and touched by nobody.
    with open(lock) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        gives_up = threading.Timer(1.0, lambda: fcntl.flock(held, fcntl.LOCK_UN))
        gives_up.start()
        if taken:
            RunFolder.open(tmp_path, resume=True).close()
        else:
            with pytest.raises(DataError, match="process 1 on node-17 is running in this folder"):
                RunFolder.open(tmp_path, resume=True)
        gives_up.join()


def test_closing_twice_is_fine_and_frees_the_folder(folder):
    folder.close()
    folder.close()
    RunFolder.open(folder.path, resume=True).close()


def test_environment_tells_versions_command_and_earlier_attempts(folder, monkeypatch):
    folder.write_environment("NVIDIA H200", world_size=4)
    folder.write_config("")
    folder = reopen(folder)
    monkeypatch.setenv("TIANKONG_COMMAND", "python -m launch model=tiny")
    folder.write_environment()
    folder.close()
    environment = json.loads((folder.path / "environment.json").read_text())
    assert environment["attempt"] == 2
    assert environment["command"] == "python -m launch model=tiny"
    assert environment["device"]
    assert "torch" in environment["packages"]
    assert [past["device"] for past in environment["earlier"]] == ["NVIDIA H200"]
    assert environment["earlier"][0]["world_size"] == 4


def test_the_command_line_is_the_one_that_was_typed():
    code = "import sys; sys.argv = ['x']; from train.run_folder import command_line; print(command_line())"
    environment = {name: value for name, value in os.environ.items() if name != "TIANKONG_COMMAND"}
    done = subprocess.run(
        [sys.executable, "-c", code, "text=a b"], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == shlex.join([Path(sys.executable).name, "-c", code, "text=a b"])


def test_finite_goes_all_the_way_down():
    assert finite({"a": [float("-inf"), (1, True, None)], 3: Path("x")}) == {"a": [None, [1, True, None]], "3": "x"}


def test_metrics_survive_a_kill_without_a_flush(tmp_path):
    code = HOLD.replace("time.sleep(60)", "import os; os.kill(os.getpid(), 9)")
    subprocess.run([sys.executable, "-c", code, tmp_path], check=False, capture_output=True)
    assert read_log(tmp_path / "metrics.jsonl") == [{"step": 1}]
