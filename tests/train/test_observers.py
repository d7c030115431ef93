"""What each observer does with a run's records, and that none of them stands in its way."""

import io
import json
import logging
import os
import subprocess
import sys
import threading
import time

import pytest

from train.observers import MetricsObserver, Pace, ProgressObserver, duration, short
from train.run_folder import RunFolder
from train.wandb_observer import WandbObserver, flat

pytestmark = pytest.mark.unit


def record(step: int, **more: object) -> dict[str, object]:
    return {
        "loss": 7.0 - step / 100,
        "grad_norm": 1.25,
        "lr": 3e-4,
        "tokens_per_second": 12_345.0,
        "step_seconds": 0.1,
        "loss_by_group": {"gmask/zh": 6.5, "mask/en": None},
        "step": step,
        **more,
    }


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_metrics_carry_the_attempt_and_say_overflow(tmp_path):
    folder = RunFolder.open(tmp_path, resume=True)
    observer = MetricsObserver(folder)
    observer.on_steps([record(1), record(2, loss=float("nan")), record(3, grad_norm=float("inf"))])
    observer.on_validation({"step": 3, "loss": 6.9})
    observer.on_event({"id": 1, "step": 3, "kind": "spike"})
    observer.close("done")
    lines = folder.read("metrics")
    assert [line["attempt"] for line in lines] == [1, 1, 1]
    assert [line.get("overflow") for line in lines] == [None, True, True]
    assert lines[1]["loss"] is None
    assert next(iter(lines[0])) == "step"
    assert folder.read("validation") == [{"attempt": 1, "step": 3, "loss": 6.9}]
    assert folder.read("events")[0]["kind"] == "spike"
    folder.close()


def test_plain_progress_prints_now_and_then_and_at_the_end():
    stream, clock = io.StringIO(), Clock()
    progress = ProgressObserver(100, stream=stream, plain_seconds=1.0, clock=clock)
    for step in range(10, 60, 10):
        clock.now += 0.5
        progress.on_steps([record(step - 1), record(step, mfu=0.412)])
    progress.on_validation({"step": 50, "loss": 6.5, "unigram_loss": 7.25})
    progress.on_event({"step": 50, "kind": "spike", "action": "rolled back"})
    progress.close("done")
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines if line.startswith("step") and "/100" in line] == [
        "10/100",
        "30/100",
        "50/100",
    ]
    assert "loss 6.9000  grad 1.25  lr 3.00e-04  12.3k tokens/s  MFU 41.2 %" in lines[0]
    assert "ETA 0:18" in lines[1]
    assert "validation at step 50: loss 6.5000, 0.750 nat under the unigram baseline's 7.250" in lines
    assert lines[-1] == "step 50: spike; rolled back"


def test_the_last_step_is_always_printed():
    stream = io.StringIO()
    progress = ProgressObserver(None, stream=stream, plain_seconds=1e9)
    progress.on_steps([record(1)])
    progress.on_steps([record(2, loss=None)])
    progress.close("stopped")
    assert "step 2  loss overflow" in stream.getvalue().splitlines()[-1]


def test_a_terminal_gets_one_live_line(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    progress = ProgressObserver(20, stream=stream)
    progress.on_steps([record(10)])
    progress.on_event({"step": 10, "kind": "saved"})
    progress.on_steps([record(20)])
    progress.close("done")
    assert "step 20/20" in stream.getvalue()
    assert "\x1b[" in stream.getvalue()


def test_pace_leaves_out_the_first_call():
    clock = Clock()
    pace = Pace(clock)
    clock.now = 100.0
    pace.steps(10)
    assert pace.seconds_for(10) is None
    clock.now = 120.0
    pace.steps(10)
    assert pace.seconds_for(5) == 10.0


@pytest.mark.parametrize("seconds, text", [(42, "0:42"), (725, "12:05"), (11220, "3:07:00"), (187_300, "2 d 4 h")])
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize("value, text", [(950, "950"), (12_345, "12.3k"), (1.24e6, "1.24M"), (128.7e9, "128.7B")])
def test_short_numbers(value, text):
    assert short(value) == text


def test_flat_names_leave_nulls_out():
    assert flat(record(4), "train/") == {
        "step": 4,
        "train/loss": 6.96,
        "train/grad_norm": 1.25,
        "train/lr": 3e-4,
        "train/tokens_per_second": 12_345.0,
        "train/step_seconds": 0.1,
        "train/loss_by_group/gmask/zh": 6.5,
    }


class FakeRun:
    def __init__(self, fail_at: int = -1) -> None:
        self.logged: list[dict[str, object]] = []
        self.fail_at = fail_at
        self.exit_code: int | None = None

    def log(self, content: dict[str, object]) -> None:
        if len(self.logged) == self.fail_at:
            raise SystemExit("the network is gone")
        self.logged.append(content)

    def alert(self, title: str, text: str) -> None:
        self.logged.append({"alert": title})

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


def observe(tmp_path, make_run):
    return WandbObserver("online", project="p", run_dir=tmp_path, config={}, make_run=make_run)


def test_wandb_gets_everything_and_the_status(tmp_path):
    run = FakeRun()
    observer = observe(tmp_path, lambda mode, **settings: run)
    observer.on_steps([record(1), record(2)])
    observer.on_validation({"step": 2, "loss": 6.9})
    observer.on_event({"kind": "spike"})
    observer.close("failed")
    assert [entry.get("step") for entry in run.logged] == [1, 2, 2, None]
    assert run.exit_code == 1


def test_a_failing_wandb_warns_once_and_the_run_goes_on(tmp_path, caplog):
    run = FakeRun(fail_at=1)
    observer = observe(tmp_path, lambda mode, **settings: run)
    with caplog.at_level(logging.WARNING):
        for step in range(1, 50):
            observer.on_steps([record(step)])
        observer.close("done")
    assert len(caplog.records) == 1
    assert "the network is gone" in caplog.text
    assert len(run.logged) == 1


def test_a_hanging_wandb_neither_slows_nor_stops_the_run(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("train.wandb_observer.QUEUE_RECORDS", 100)
    monkeypatch.setattr("train.wandb_observer.CLOSE_SECONDS", 0.2)
    never = threading.Event()
    observer = observe(tmp_path, lambda mode, **settings: never.wait(20))
    start = time.perf_counter()
    with caplog.at_level(logging.WARNING):
        for step in range(1000):
            observer.on_steps([record(step)])
        observer.close("done")
    assert time.perf_counter() - start < 2
    assert len(caplog.records) == 1
    never.set()


def test_disabled_means_no_observer(tmp_path):
    assert WandbObserver.start("disabled", project="p", run_dir=tmp_path, config={}) is None


RUN = """
import logging, sys
from pathlib import Path
from train.wandb_observer import WandbObserver
logging.basicConfig(level=logging.INFO, format="%(message)s")
observer = WandbObserver.start(sys.argv[1], project="p", run_dir=Path(sys.argv[2]), config={"seed": 1})
for step in range(5):
    observer.on_steps([{"step": step, "loss": 1.0}])
observer.close("done")
print("the run is done")
"""


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_the_real_wandb_without_a_key(tmp_path, mode):
    keep = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    done = subprocess.run(
        [sys.executable, "-c", RUN, mode, tmp_path],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={**keep, "HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")},
    )
    assert done.returncode == 0, done.stderr
    assert "the run is done" in done.stdout
    if mode == "offline":
        assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb")), done.stderr
        assert "off for the rest" not in done.stderr
    else:
        assert "wandb is off for the rest of this run: RuntimeError: no API key" in done.stderr


def test_records_are_json_lines(tmp_path):
    folder = RunFolder.open(tmp_path, resume=True)
    MetricsObserver(folder).on_steps([record(1)])
    folder.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == 1
