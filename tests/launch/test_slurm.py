"""The rendered batch script under a real Slurm: nodes with names and addresses of their own, and a real training."""

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.hosts import Hosts
from tests.launch.slurm_cluster import SlurmCluster
from train.run_folder import read_log

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif(bool(SlurmCluster.missing()), reason=f"not installed here: {', '.join(SlurmCluster.missing())}"),
    pytest.mark.skipif(not Hosts.available(), reason="needs root and the right to make network namespaces"),
]
STEPS, BATCH = 300, 64


def history(run_dir: Path) -> list[tuple[int, int]]:
    """Step and consumed samples of the accepted history."""
    return [(line["step"], line["consumed_samples"]) for line in read_log(run_dir / "metrics.jsonl")]


@pytest.fixture
def folder() -> Iterator[Path]:
    """Slurm's own folder, with a short name: a step's socket in it may have 107 characters."""
    with tempfile.TemporaryDirectory(prefix="slurm") as name:
        yield Path(name)


@pytest.mark.parametrize("count", [2, 4])
def test_a_job_is_stopped_by_its_time_limit_queued_again_and_finishes(tmp_path, folder, tiny_overrides, count):
    run_dir = tmp_path / "run"
    words = [*tiny_overrides, f"global_batch_size={BATCH}", f"max_steps={STEPS}", f"run_dir={run_dir}"]
    words += ["cluster=slurm", f"cluster.nodes={count}", "cluster.processes=1", "cluster.gpus_per_node=null"]
    words += ["cluster.slurm.time=01:00:00", "cluster.slurm.save_seconds=20"]
    with Hosts(count) as hosts, SlurmCluster(hosts, folder) as slurm:
        out = slurm.run(sys.executable, "-m", "launch", *words)
        assert out.startswith("Submitted batch job 1: ")
        slurm.until(lambda: len(history(run_dir)) > 5, 200, "nothing is trained")
        # From here on, so that a slow machine gets as far too. Slurm counts in minutes and signals up to one too early.
        minutes, seconds = map(int, slurm.run("squeue", "--noheader", "--format=%M").split(":"))
        slurm.run("scontrol", "update", "JobId=1", f"TimeLimit={minutes + 1 + (seconds > 30)}")
        slurm.until(lambda: "Restarts=1" in slurm.run("scontrol", "show", "job", "1"), 200, "it is not queued again")
        assert 5 < len(history(run_dir)) < STEPS
        slurm.run("scontrol", "update", "JobId=1", "TimeLimit=60")
        slurm.wait(1000)
        job = slurm.run("scontrol", "show", "job", "1")
    log = (run_dir / "slurm-1.log").read_text()
    assert "JobState=COMPLETED" in job, log[-3000:]
    assert log.count("saved before the time limit; queued again") == 1
    assert history(run_dir) == [(step, BATCH * step) for step in range(1, STEPS + 1)]
    nodes = json.loads((run_dir / "launch.json").read_text())["nodes"]
    assert nodes == {name: [rank] for rank, name in enumerate(hosts.names)}
