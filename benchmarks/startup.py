"""What a start on this machine's accelerators costs by phase, and what a hang there leaves behind.

    python -m benchmarks.startup phases DATASET [--processes 2] [train overrides …]
    python -m benchmarks.startup hang DATASET [--processes 2] [train overrides …]

phases: two starts of `python -m launch cluster=local` with two steps each; the first compiles the kernels into an empty
cache, the second finds them there. hang: a run under the supervisor in which the last rank's loader hangs; the job is
found to hang and goes on. The events and the files in stacks/, those of NCCL's flight recorder too, are listed. JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from train.heartbeat import read_beats
from train.run_folder import read_log

MODULE = "tests.launch.hanging_train"
START = "import sys; from launch.__main__ import main; sys.exit(main(sys.argv[1:], module={!r}))"
ALWAYS = ["saving.every_steps=10", "logging.progress=false", "logging.report=false", "evaluation.every_steps=0"]


def run(program: list[str], environment: dict[str, str]) -> tuple[int, float, str]:
    """Status, seconds and the end of what it wrote."""
    began = time.monotonic()
    done = subprocess.run([sys.executable, *program], env=os.environ | environment, capture_output=True, text=True)
    return done.returncode, time.monotonic() - began, (done.stdout + done.stderr)[-1500:]


def start(name: str, words: list[str], folder: Path, processes: int) -> dict[str, Any]:
    """One start; seconds by phase, of the slower rank in each."""
    run_dir = folder / name
    wanted = ["cluster=local", f"cluster.processes={processes}", f"run_dir={run_dir}", "max_steps=2", *words]
    status, seconds, said = run(["-m", "launch", *wanted], {"TRITON_CACHE_DIR": str(folder / "triton")})
    if status:
        return {"start": name, "status": status, "said": said}
    phases: dict[str, float] = {}
    for beat in read_beats(run_dir).values():
        phases |= {phase: max(spent, phases.get(phase, 0.0)) for phase, spent in beat.startup.items()}
    usual = [line["step_seconds"] for line in read_log(run_dir / "metrics.jsonl")]
    return {"start": name, **phases, "second_step": usual[-1], "command": round(seconds, 1)}


def hang(words: list[str], folder: Path, processes: int) -> dict[str, Any]:
    """A hang on rank 1: what was said and written, and whether each step is there once."""
    run_dir, hosts, remote = folder / "hang", folder / "hosts", folder / "remote_shell"
    hosts.write_text("127.0.0.1\n")
    remote.write_text('#!/bin/sh\nshift\nexec sh -c "$*"\n')
    remote.chmod(0o755)
    wanted = ["cluster=ssh", "cluster.nodes=1", f"cluster.processes={processes}", f"run_dir={run_dir}"]
    wanted += [f"cluster.ssh.hostfile={hosts}", f"cluster.ssh.command={remote}", "cluster.ssh.code_dir=null"]
    wanted += ["cluster.network_interface=lo", "cluster.supervisor_address=127.0.0.1"]
    wanted += ["cluster.flight_recorder=2000", "cluster.hang_seconds=12", "cluster.max_restarts=2", "max_steps=40"]
    wanted += ["+cluster.environment.TIANKONG_HANG_AT=256", f"+cluster.environment.TIANKONG_HANG_RANK={processes - 1}"]
    wanted += words
    status, seconds, said = run(["-c", START.format(MODULE), *wanted], {"TRITON_CACHE_DIR": str(folder / "triton")})
    events = read_log(run_dir / "events.jsonl") if (run_dir / "events.jsonl").exists() else []
    steps = [line["step"] for line in read_log(run_dir / "metrics.jsonl")]
    return {
        "hang": status,
        "command": round(seconds, 1),
        "each_step_once": steps == list(range(1, 41)),
        "events": events,
        "stacks": {file.name: file.stat().st_size for file in sorted((run_dir / "stacks").glob("*"))},
        "said": said,
    }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("phases", "hang"))
    parser.add_argument("dataset")
    parser.add_argument("--processes", type=int, default=2)
    options, words = parser.parse_known_args()
    words = [f"data.path={options.dataset}", *ALWAYS, *words]
    with tempfile.TemporaryDirectory() as folder:
        if options.what == "hang":
            print(json.dumps(hang(words, Path(folder), options.processes)), flush=True)
        else:
            for name in ("kernels_compiled", "kernels_cached"):
                print(json.dumps(start(name, words, Path(folder), options.processes)), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
