"""Stopping and going on: killed, asked to stop, resumed by other ranks, with damaged files or a full disk.

Each run is a real command in a process of its own, as a user starts it; but for other layouts of two ranks, which take
turns in the same two processes.
"""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from data_prep.dataset import Dataset
from tests.conftest import ROOT, Command
from tests.train.parity import in_ranks
from train.checkpoint.inspect import flat
from train.checkpoint.pieces import PieceReader
from train.checkpoint.select import checkpoint_steps, damage, step_folder
from train.cli import compose_train
from train.heartbeat import Heartbeat

pytestmark = pytest.mark.e2e
STEPS = 24
TIMINGS = {"step_seconds", "tokens_per_second", "mfu", "attempt"}
"""Fields that may differ: timings, and the number of the attempt that wrote the line."""


@pytest.fixture(scope="module")
def overrides(tiny_overrides: list[str]) -> list[str]:
    return [
        *tiny_overrides,
        "model.hidden_dropout=0.1",
        "model.attention_dropout=0.1",
        f"max_steps={STEPS}",
        "checkpoint.every_steps=5",
        "saving.keep_last=3",
        "logging.every_steps=2",
    ]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory, overrides: list[str], command: Command) -> Path:
    """The uninterrupted run."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    command("train", *overrides, f"run_dir={run_dir}", "saving.keep_last=10")
    return run_dir


def lines(run_dir: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in found]


def job(word: str) -> dict[str, str]:
    """The environment of a launch's ranks; a restart has the same."""
    return {**os.environ, "TIANKONG_JOB": word}


def started(words: list[str], run_dir: Path, module: str = "train") -> "subprocess.Popen[str]":
    """The command in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *words, f"run_dir={run_dir}"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def steps_written(run_dir: Path) -> int:
    file = run_dir / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def test_a_killed_run_repeats_itself_bit_for_bit(
    whole_run: Path, overrides: list[str], tmp_path: Path, command: Command
) -> None:
    generator = random.Random()
    process = started(overrides, tmp_path / "run")
    wanted = generator.randrange(6, 16)
    wait_for(lambda: steps_written(tmp_path / "run") >= wanted, process)
    time.sleep(generator.random() * 0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert steps_written(tmp_path / "run") < STEPS
    command("train", *overrides, f"run_dir={tmp_path / 'run'}")
    assert lines(tmp_path / "run") == lines(whole_run)


def test_a_run_says_what_fills_its_memory(whole_run: Path) -> None:
    """A CPU does not tell, so it is the config's arithmetic: fp32 weights, their masters and both moments."""
    record = json.loads((whole_run / "memory.json").read_text())
    assert record["source"] == "config"
    assert record["predicted"]["optimizer"] == 3 * record["predicted"]["parameters"]
    assert record["predicted"]["activations"] > 0


@pytest.mark.distributed
@pytest.mark.parametrize(("kills", "steps"), [(2, 40), pytest.param(10, 120, marks=pytest.mark.slow)])
def test_kills_during_saves_lose_nothing(
    kills: int, steps: int, overrides: list[str], tmp_path: Path, command: Command
) -> None:
    """A save each step, so that every moment is one of a save; one rank is killed, or all with their launcher.

    Steps: many more than a fast machine takes between two looks at it, so that the last kill comes before the end.
    """
    generator, run_dir, whole = random.Random(), tmp_path / "run", tmp_path / "whole"
    overrides = [*overrides, f"max_steps={steps}", "stability.telemetry=false"]
    command("train", *overrides, f"run_dir={whole}", "saving.every_steps=0")
    words = [*overrides, "cluster.processes=2", "saving.every_steps=1", "logging.every_steps=1"]
    for kill in range(kills):
        before = checkpoint_steps(run_dir)
        process = started(words, run_dir, "launch")
        wanted = steps_written(run_dir) + generator.randrange(1, 3)
        launcher = psutil.Process(process.pid)
        # A line of the run before may still have come while its last write kept it from dying: wait for ranks too.
        wait_for(
            lambda wanted=wanted, launcher=launcher: steps_written(run_dir) >= wanted and launcher.children(),  # type: ignore[misc]
            process,
        )
        time.sleep(generator.random() * 0.1)
        if kill % 2:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            generator.choice(launcher.children()).kill()
        process.communicate()
        assert process.returncode != 0
        assert steps_written(run_dir) < steps
        # What has its name is whole; nothing that was whole is gone.
        assert all(damage(step_folder(run_dir, step)) is None for step in checkpoint_steps(run_dir))
        assert max(checkpoint_steps(run_dir), default=0) >= max(before, default=0)
    command("launch", *words, f"run_dir={run_dir}")
    for line, other in zip(lines(run_dir), lines(whole), strict=True):
        assert flat(line) == pytest.approx(flat(other), rel=1e-5)


def test_sigterm_saves_and_the_same_command_goes_on(
    whole_run: Path, overrides: list[str], tmp_path: Path, command: Command
) -> None:
    process = started([*overrides, "checkpoint.every_steps=0", "data.workers=2"], tmp_path / "run")
    wait_for(lambda: steps_written(tmp_path / "run") >= 4, process)
    # As a service manager or `timeout` does it: to the loader's workers too.
    os.killpg(process.pid, signal.SIGTERM)
    output = process.communicate()[0]
    assert process.returncode == 75, output
    stopped_at = steps_written(tmp_path / "run")
    assert checkpoint_steps(tmp_path / "run") == [stopped_at]
    assert "stopped by SIGTERM" in output
    assert "resume with:" in output
    command("train", *overrides, f"run_dir={tmp_path / 'run'}")
    assert lines(tmp_path / "run") == lines(whole_run)


@pytest.mark.distributed
def test_two_ranks_go_on_with_the_same_samples(
    whole_run: Path, overrides: list[str], tmp_path: Path, command: Command
) -> None:
    run_dir = until_step_10(whole_run, tmp_path / "run")
    command("launch", "cluster.processes=2", *overrides, f"run_dir={run_dir}")
    gone_on(run_dir, whole_run)


@pytest.mark.distributed
def test_two_ranks_of_another_layout_go_on_with_the_same_samples(
    whole_run: Path, overrides: list[str], tmp_path: Path
) -> None:
    layouts = ["tensor_parallel=2", "pipeline_parallel=2", "zero_stage=3"]
    folders = {layout: until_step_10(whole_run, tmp_path / layout) for layout in layouts}
    words = [
        [*overrides, f"parallel.{layout}", "resume.reshape=true", f"run_dir={folder}"]
        for layout, folder in folders.items()
    ]
    in_ranks(2, _train_each, words)
    for folder in folders.values():
        gone_on(folder, whole_run)


def _train_each(runs: list[list[str]]) -> None:
    """Train each run, as `python -m train` does once its process group is up."""
    from train import backend, rules
    from train.trainer import Trainer

    for words in runs:
        config = compose_train(words)
        rules.check(config, world_size=backend.world_size())
        with contextlib.closing(Heartbeat(config.run_dir, backend.global_rank())) as heart:
            Trainer(config, Dataset.open(config.data.path), backend.make_mesh(config), heart).run()


def until_step_10(whole_run: Path, run_dir: Path) -> Path:
    """A copy of the run whose newest checkpoint is of step 10."""
    shutil.copytree(whole_run, run_dir)
    for step in checkpoint_steps(run_dir):
        if step > 10:
            shutil.rmtree(step_folder(run_dir, step))
    return run_dir


def gone_on(run_dir: Path, whole_run: Path) -> None:
    """The run took the same samples as the whole one, to the same losses."""
    found, expected = lines(run_dir), lines(whole_run)
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    for line, other in zip(found, expected, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
        for key in ("consumed_samples", "consumed_tokens", "target_tokens", "lr"):
            assert line[key] == other[key]
    assert (run_dir / "discarded").is_dir()


def test_another_layout_needs_the_flag(overrides: list[str], whole_run: Path, tmp_path: Path, command: Command) -> None:
    shutil.copytree(whole_run, tmp_path / "run")
    words = [*overrides, f"run_dir={tmp_path / 'run'}", "max_steps=30", "parallel.zero_stage=0"]
    done = command("train", *words, check=False)
    assert done.returncode == 2
    assert "parallel.zero_stage=0" in done.stderr
    assert "resume.reshape=true" in done.stderr


def test_another_seed_is_refused_by_name(
    overrides: list[str], whole_run: Path, tmp_path: Path, command: Command
) -> None:
    shutil.copytree(whole_run, tmp_path / "run")
    done = command("train", *overrides, f"run_dir={tmp_path / 'run'}", "seed=2", check=False)
    assert done.returncode == 2
    assert "seed=2" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    whole_run: Path, overrides: list[str], tmp_path: Path, command: Command
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(whole_run, run_dir)
    newest, before = checkpoint_steps(run_dir)[-1], checkpoint_steps(run_dir)[-2]
    file = next((step_folder(run_dir, newest) / "optimizer").iterdir())
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    done = command("train", *overrides, f"run_dir={run_dir}")
    assert f"{file} is damaged" in done.stdout + done.stderr
    assert f"step_{before:08d}" in done.stdout + done.stderr
    assert lines(run_dir) == lines(whole_run)


def test_resuming_from_an_earlier_step_leaves_the_later_history(
    whole_run: Path, overrides: list[str], tmp_path: Path, command: Command
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(whole_run, run_dir)
    later = [step for step in checkpoint_steps(run_dir) if step > 10]
    kept = ["saving.every_steps=4", "saving.keep_last=1"]
    words, of_a_job = [*overrides, f"run_dir={run_dir}", "resume.step=10", *kept], job("a")
    command("train", *words, "max_steps=12", env=of_a_job)
    assert checkpoint_steps(run_dir) == [12]
    assert (run_dir / "checkpoints" / "latest").read_text().strip() == "step_00000012"
    assert lines(run_dir) == lines(whole_run)[:12]
    aside = {path.name for path in (run_dir / "discarded").glob("checkpoints.attempt-*/step_*")}
    assert aside == {step_folder(run_dir, step).name for step in later}
    # A restart has the same words: the job has gone back once, and the checkpoint of step 10 is no more.
    done = command("train", *words, "resume.enabled=false", "max_steps=13", env=of_a_job)
    assert "resume.step=10 was obeyed by an earlier attempt of this job" in done.stderr
    assert lines(run_dir) == lines(whole_run)[:13]
    done = command("train", *words, "max_steps=14", env=job("b"), check=False)
    assert done.returncode == 3
    assert "holds no checkpoint of step 10; there are [12, 13]" in done.stderr


def test_no_whole_checkpoint_is_an_error_and_nothing_is_lost(
    whole_run: Path, overrides: list[str], tmp_path: Path, command: Command
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(whole_run, run_dir)
    for step in checkpoint_steps(run_dir):
        next((step_folder(run_dir, step) / "model").iterdir()).unlink()
    steps = checkpoint_steps(run_dir)
    done = command("train", *overrides, f"run_dir={run_dir}", check=False)
    assert done.returncode == 3
    assert "is missing" in done.stderr
    assert checkpoint_steps(run_dir) == steps
    assert lines(run_dir) == lines(whole_run)


def test_a_full_disk_leaves_the_last_checkpoint_alone(overrides: list[str], tmp_path: Path) -> None:
    """A file-size limit stands in for the disk: writes beyond it fail in the same place."""
    run_dir = tmp_path / "run"
    words = [sys.executable, "-m", "train", *overrides, f"run_dir={run_dir}"]
    done = subprocess.run(
        words,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),
    )
    assert done.returncode == 3, done.stderr
    assert "step_00000005.partial" in done.stderr
    assert checkpoint_steps(run_dir) == []
    assert not list((run_dir / "checkpoints").glob("*.partial"))


@pytest.mark.parametrize(
    ("fault", "place"),
    [
        (["model.init=normal", "model.init_std=1e20"], "loss and grad_norm not finite, first in rank 0, embedding"),
        (["loss.z_loss=1e38"], "grad_norm not finite, first in rank 0, the gradient of final_norm.bias"),
    ],
    ids=["forward", "backward"],
)
def test_a_diverging_run_says_where(
    fault: list[str], place: str, overrides: list[str], tmp_path: Path, command: Command
) -> None:
    done = command("train", *overrides, f"run_dir={tmp_path / 'run'}", *fault, check=False)
    assert done.returncode == 1
    assert f"step 1: {place}" in done.stderr
    assert "Traceback" not in done.stderr
    events = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    assert json.loads(events[-1])["kind"] == "non_finite"
    assert checkpoint_steps(tmp_path / "run") == []


def test_another_dataset_is_refused_by_name(
    overrides: list[str], whole_run: Path, tiny_dataset: Path, tmp_path: Path, command: Command
) -> None:
    shutil.copytree(whole_run, tmp_path / "run")
    shutil.copytree(tiny_dataset, tmp_path / "data")
    manifest = tmp_path / "data" / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    words = [*overrides, f"run_dir={tmp_path / 'run'}", "max_steps=25", f"data.path={tmp_path / 'data'}"]
    done = command("train", *words, check=False)
    assert done.returncode == 2
    assert "holds other data" in done.stderr
    command("train", *words, "resume.allow=[data.path]")
    assert steps_written(tmp_path / "run") == 25


def test_a_bf16_run_goes_on_in_fp32_from_its_master_weights(
    overrides: list[str], tmp_path: Path, command: Command
) -> None:
    run_dir = tmp_path / "run"
    command("train", *overrides, f"run_dir={run_dir}", "precision=bf16", "max_steps=5")
    words = [*overrides, f"run_dir={run_dir}", "max_steps=6", "optimizer.lr=1e-9", "schedule.min_lr=0"]
    command("train", *words, "resume.allow=[precision.dtype,optimizer.lr,schedule.min_lr]", "checkpoint.every_steps=1")
    before, after = (PieceReader(step_folder(run_dir, step)) for step in (5, 6))
    for name in before.names("master"):
        master, weight = before.full("master", name), before.full("weight", name)
        assert torch.equal(master.to(torch.bfloat16), weight)
        # One step at this learning rate moves a value by far less than bf16 rounds it by.
        assert (after.full("weight", name) - master).abs().max() < 1e-7


def test_initialize_from_takes_the_weights_alone(
    whole_run: Path, overrides: list[str], tmp_path: Path, command: Command
) -> None:
    run_dir = tmp_path / "run"
    # A context twice as long, to which the positions are squeezed.
    longer = ["sequence_length=128", "model.max_positions=128", "model.rotary_scaling=yarn"]
    longer += ["model.rotary_scaling_factor=2", "model.rotary_original_positions=64"]
    command("train", *overrides, *longer, f"run_dir={run_dir}", f"initialize_from={whole_run}", "max_steps=2")
    fresh, before = lines(run_dir), lines(whole_run)
    assert fresh[0]["consumed_samples"] == before[0]["consumed_samples"]
    assert fresh[0]["loss"] < before[0]["loss"]
    source = tmp_path / "source"
    shutil.copytree(step_folder(whole_run, STEPS), source)
    file = next((source / "model").iterdir())
    content = bytearray(file.read_bytes())
    content[-9] ^= 4
    file.write_bytes(content)
    words = [*overrides, f"run_dir={tmp_path / 'other'}", f"initialize_from={source}"]
    done = command("train", *words, check=False)
    assert done.returncode == 3
    assert f"{file} is damaged" in done.stderr
