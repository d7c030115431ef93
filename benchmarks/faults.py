"""Planted faults on several hosts: how soon they are noticed, when training goes on, how many steps are done again.

    python -m benchmarks.faults runs=3 hosts=2 output=benchmarks/faults.csv

The hosts are network namespaces of this machine with addresses of their own (root is needed), the job is a small model
under `python -m launch cluster=ssh`, and each run plants one fault at a step between two checkpoints:

    kill   SIGKILL to a rank          stop   SIGSTOP to a rank
    link   a host's cable is pulled   disk   the run folder's file system (a tmpfs) is full for some seconds

Detected: from the fault to the line in events.jsonl. Recovered: to the first step after the restart. After each run the
metrics are compared with those of a run without a fault, step by step: the same samples and the same losses, each once.
Rows are appended; `runs=0 output=FILE` prints the table of a file that is there.
"""

import csv
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.launch.hosts import Hosts
from train.heartbeat import read_beats
from train.run_folder import read_log

STEPS, SAVE_EVERY, FAULT_AT, BATCH = 40, 10, 23, 8
SILENT, WAIT = 6, 4
FILL_SECONDS = 8.0
JOB_SECONDS = 400
FAULTS = ("kill", "stop", "link", "disk")
JOB = [
    *("model=tiny", "model.num_layers=2", "model.hidden_size=64", "model.num_heads=4", "model.ffn_hidden_size=160"),
    *("data.path=data/sample", "data.workers=0", "micro_batch_size=1", f"global_batch_size={BATCH}"),
    *(f"max_steps={STEPS}", f"saving.every_steps={SAVE_EVERY}", "logging.every_steps=1", "evaluation.every_steps=0"),
    *("logging.report=false", "logging.progress=false", "cluster.processes=1", "cluster.min_nodes=1"),
    *("cluster.max_restarts=3", f"cluster.silent_seconds={SILENT}", f"cluster.wait_seconds={WAIT}"),
    "cluster.hang_seconds=180",
]
Record = dict[str, Any]


def run(hosts: Hosts, fault: str | None, run_dir: Path) -> Record | None:
    """One job with one fault; None without. Raises RuntimeError where the job does not end well."""
    log = run_dir.parent / "launch.log"
    with open(log, "w") as out:
        job = hosts.start("-m", "launch", *hosts.words(), *JOB, f"run_dir={run_dir}", stdout=out, stderr=out)
        try:
            planted = None if fault is None else plant(hosts, fault, run_dir, job)
            status = job.wait(timeout=JOB_SECONDS)
        finally:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)
                job.wait()
    if status != 0:
        raise RuntimeError(f"{fault}: the job ended with {status}: {log.read_text()[-2000:]}")
    if planted is None:
        return None
    events = [event for event in read_log(run_dir / "events.jsonl") if event["time"] >= planted]
    found = next(event for event in events if event["kind"] not in ("recovered", "straggler"))
    recovered = next(event for event in events if event["kind"] == "recovered")
    return {
        "fault": fault,
        "hosts": len(hosts.names),
        "detected_seconds": round(found["time"] - planted, 1),
        "recovered_seconds": round(recovered["time"] - planted, 1),
        "steps_redone": found["redone"],
        "kind": found["kind"],
        "load": round(os.getloadavg()[0], 1),
        "named": found["seen"].replace(hosts.prefix, ""),
    }


def plant(hosts: Hosts, fault: str, run_dir: Path, job: "subprocess.Popen[str]") -> float:
    """Wait for the step, break something, mend it later where that is needed; returns when it broke."""
    while job.poll() is None:
        records = read_log(run_dir / "metrics.jsonl")
        if records and records[-1]["step"] >= FAULT_AT:
            break
        time.sleep(0.05)
    last = len(hosts.names) - 1
    victim = read_beats(run_dir)[last].pid
    planted = time.time()
    if fault == "kill":
        os.kill(victim, signal.SIGKILL)
    elif fault == "stop":
        os.kill(victim, signal.SIGSTOP)
    elif fault == "link":
        hosts.cut(last)
    elif fault == "disk":
        filler = run_dir.parent / "filler"
        subprocess.run(["dd", "if=/dev/zero", f"of={filler}", "bs=64k"], capture_output=True, check=False)
        noticed = planted + 120
        while time.time() < noticed and job.poll() is None:
            if (run_dir.parent / "launch.log").read_text().find("waiting for") >= 0:
                break
            time.sleep(0.1)
        time.sleep(FILL_SECONDS)
        filler.unlink()
    return planted


def history(run_dir: Path) -> list[tuple[int, int, float]]:
    """Step, consumed samples and loss of each line of the accepted history."""
    return [(one["step"], one["consumed_samples"], one["loss"]) for one in read_log(run_dir / "metrics.jsonl")]


def check(found: list[tuple[int, int, float]], expected: list[tuple[int, int, float]]) -> None:
    """Raise RuntimeError where a step is lost, repeated or other than without the fault."""
    if [one[:2] for one in found] != [(step, BATCH * step) for step in range(1, STEPS + 1)]:
        raise RuntimeError(f"steps or samples are lost or repeated: {found}")
    worst = max(abs(one[2] - other[2]) for one, other in zip(found, expected, strict=True))
    if worst > 1e-5:
        raise RuntimeError(f"the losses differ by {worst}")


def main(words: list[str]) -> int:
    """runs=N hosts=N faults=a,b output=FILE"""
    options = {
        "runs": "1",
        "hosts": "2",
        "faults": ",".join(FAULTS),
        "output": "",
        **dict(w.split("=", 1) for w in words),
    }
    runs, failed = int(options["runs"]), 0
    if runs:
        failed = _measure(int(options["hosts"]), runs, options["faults"].split(","), options["output"])
    if options["output"]:
        with open(options["output"], newline="") as file:
            print(table(list(csv.DictReader(file))))
    return 1 if failed else 0


def _measure(count: int, runs: int, faults: list[str], output: str) -> int:
    """Returns the number of runs that did not end as they should; each is told and the rest goes on."""
    failed = 0
    scratch = Path(tempfile.mkdtemp(prefix="tiankong-faults-"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m", "none", str(scratch)], check=True)
    try:
        with Hosts(count) as hosts:
            run(hosts, None, scratch / "run")
            expected = history(scratch / "run")
            check(expected, expected)
            for fault in faults * runs:
                shutil.rmtree(scratch / "run")
                (scratch / "filler").unlink(missing_ok=True)
                try:
                    row = run(hosts, fault, scratch / "run")
                    assert row is not None
                    check(history(scratch / "run"), expected)
                except (OSError, RuntimeError, StopIteration, subprocess.TimeoutExpired) as error:
                    failed += 1
                    print(f"FAILED {fault}: {error!r}", flush=True)
                    continue
                finally:
                    hosts.mend(count - 1)
                print(row, flush=True)
                _append(output, row)
    finally:
        subprocess.run(["umount", "-l", str(scratch)], check=False)
        scratch.rmdir()
    return failed


def table(rows: list[dict[str, str]]) -> str:
    """Median (and largest) of each fault's times, in markdown."""
    lines = [
        "| fault | hosts | runs | detected after, s | first new step after, s | steps done again |",
        "|" + "---|" * 6,
    ]
    for fault, hosts in sorted({(row["fault"], row["hosts"]) for row in rows}):
        same = [row for row in rows if (row["fault"], row["hosts"]) == (fault, hosts)]
        cells = []
        for key in ("detected_seconds", "recovered_seconds", "steps_redone"):
            values = [float(row[key]) for row in same]
            cells.append(f"{statistics.median(values):.3g} ({max(values):.3g})")
        lines.append(f"| {fault} | {hosts} | {len(same)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _append(output: str, row: Record) -> None:
    """One line of the table, at once: a later run may be stopped."""
    if not output:
        return
    with open(output, "a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
