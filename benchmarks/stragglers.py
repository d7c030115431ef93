"""Whether a slow GPU is told from a slow host, and what that costs: real training on two GPUs, each slowed for real.

    python -m benchmarks.stragglers DATASET OUTPUT.json [train overrides …]

One supervised run of two ranks with `cluster.kernel_times_every_steps=10`. `benchmarks.straggler_worker` is what runs
and says which faults come when. Checked: the supervisor named rank 0's host and rank 1's GPU, and nothing else.
OUTPUT.json holds the events, what the reports said in each stage, and the cost of timing kernels, with device and
versions.

    python -m benchmarks.stragglers DATASET OUTPUT.json graphs [train overrides …]

In place of that, a run of 60 steps with `parallel.cuda_graphs=true`: what the reports say then.
"""

import argparse
import itertools
import json
import platform
import statistics
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.startup import ALWAYS, START, run
from train.heartbeat import read_beats
from train.run_folder import read_log

WORKER = "benchmarks.straggler_worker"
EVERY = 10


def words(dataset: str, run_dir: Path, processes: int = 2) -> list[str]:
    """Overrides of each run."""
    return [
        "cluster=local",
        f"cluster.processes={processes}",
        f"data.path={dataset}",
        f"run_dir={run_dir}",
        *ALWAYS,
        "saving.every_steps=0",
        "parallel.compare_replicas_every_steps=0",
        "precision=bf16",
        f"cluster.kernel_times_every_steps={EVERY}",
    ]


def scores(reports: dict[int, list[dict[str, Any]]], stage: str, statistic: int) -> dict[int, float]:
    """Each rank's score in a stage, of its last report there: by the median (0) or the mean (1) of each kernel."""
    last = {rank: [one for one in told if one["stage"] == stage][-1]["kernels"] for rank, told in reports.items()}
    common = [name for name in set.intersection(*map(set, last.values())) if "ncclDev" not in name]
    found = {}
    for rank, kernels in last.items():
        best = {name: min(other[name][statistic] for other in last.values()) for name in common}
        weights = {name: kernels[name][1] * kernels[name][2] for name in common}
        score = sum(best[name] / kernels[name][statistic] * weights[name] for name in common)
        found[rank] = round(score / sum(weights.values()), 3)
    return found


def faults(folder: Path, dataset: str, overrides: list[str]) -> dict[str, Any]:
    """The supervised run."""
    run_dir = folder / "faults"
    program = ["-c", START.format(WORKER), *words(dataset, run_dir), "cluster.max_restarts=1"]
    status, seconds, said = run([*program, "max_steps=100000", "max_samples=1000000000", *overrides], {})
    result: dict[str, Any] = {"status": status, "command_seconds": round(seconds, 1)}
    print(json.dumps(result), flush=True)
    files = {rank: run_dir / f"straggler_rank_{rank}.jsonl" for rank in range(2)}
    if not all(file.exists() for file in files.values()):
        return result | {"said": said}
    lines = {rank: [json.loads(line) for line in file.read_text().splitlines()] for rank, file in files.items()}
    events = read_log(run_dir / "events.jsonl") if (run_dir / "events.jsonl").exists() else []
    named = [(event.get("rank"), event.get("cause")) for event in events if event["kind"] == "straggler"]
    result |= {"as_expected": sorted(named, key=str) == [(0, "host"), (1, "gpu")], "events": events}
    blocks = [line for line in lines[0] if "block" in line]
    result["seconds_a_step"] = {
        kind: [round(line["seconds"], 5) for line in blocks if line["block"] == kind] for kind in ("off", "idle", "on")
    }
    result["loading_seconds"] = [line["loading"] for line in lines[0] if "loading" in line]
    reports = {rank: [line for line in told if "score" in line] for rank, told in lines.items()}
    result["report_seconds"] = [round(line["report"], 4) for line in reports[0]]
    for stage in ("cost", "host", "gpu", "process"):
        steps = [line for line in lines[0] if line.get("stage") == stage and "step" in line]
        gaps = [later["at"] - sooner["at"] for sooner, later in itertools.pairwise(steps)]
        told = {rank: [line["score"] for line in each if line["stage"] == stage] for rank, each in reports.items()}
        if len(gaps) < 2 or not all(told.values()):
            continue
        result[stage] = {
            "median_step_seconds": round(statistics.median(gaps), 4),
            "scores": {rank: [round(score, 3) for score in each] for rank, each in told.items()},
            "last_by_median": scores(reports, stage, 0),
            "last_by_mean": scores(reports, stage, 1),
            "kernels": len(reports[0][-1]["kernels"]),
        }
        print(json.dumps({stage: result[stage]}), flush=True)
    beats = read_beats(run_dir)
    result["own_seconds"] = {rank: beat.own_seconds for rank, beat in beats.items()}
    return result | {"said": said}


def graphs(folder: Path, dataset: str, overrides: list[str]) -> dict[str, Any]:
    """A plain run with CUDA graphs."""
    run_dir = folder / "graphs"
    more = [*words(dataset, run_dir), "max_steps=60", "parallel.cuda_graphs=true", *overrides]
    status, seconds, said = run(["-m", "launch", *more], {})
    result = {
        "status": status,
        "command_seconds": round(seconds, 1),
        "gpu_speed": {rank: beat.gpu_speed for rank, beat in read_beats(run_dir).items()},
        "said": said,
    }
    print(json.dumps(result), flush=True)
    return result


def versions() -> dict[str, Any]:
    """Device and versions."""
    import torch

    names = ("torch", "triton", "deepspeed", "nvidia-resiliency-ext")
    found: dict[str, Any] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    if torch.cuda.is_available():
        found["device"] = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return found


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("output", type=Path)
    options, overrides = parser.parse_known_args()
    result = {
        "command": " ".join(["python -m benchmarks.stragglers", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        **versions(),
    }
    with tempfile.TemporaryDirectory() as folder:
        if overrides[:1] == ["graphs"]:
            result |= graphs(Path(folder), options.dataset, overrides[1:])
        else:
            result |= faults(Path(folder), options.dataset, overrides)
            file = Path(folder) / "kernels_seen.json"
            status, _, said = run(["-m", WORKER, "graphs", str(file)], {})
            result["kernels_seen"] = said if status else json.loads(file.read_text())
            print(json.dumps({"kernels_seen": result["kernels_seen"]}), flush=True)
    finite = json.loads(json.dumps(result), parse_constant=lambda _: None)  # JSON has neither infinity nor NaN
    options.output.write_text(json.dumps(finite, indent=1) + "\n")
    shown = ("as_expected", "seconds_a_step", "loading_seconds", "report_seconds", "own_seconds", "events")
    print(json.dumps({key: result.get(key) for key in shown}), flush=True)
    if not result.get("as_expected", True):
        print(result.get("said"), flush=True)
    return 0 if result.get("as_expected", True) else 1


if __name__ == "__main__":
    raise SystemExit(main())
