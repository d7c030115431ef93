"""Benchmark of parallel training on two GPUs of one host: does it train the same model, how fast, where time goes.

    python -m benchmarks.parallel                            # all rows within 9 minutes; writes benchmarks/parallel/
    python -m benchmarks.parallel --only 'parity/*' 7b/fsdp2   # some rows
    python -m benchmarks.parallel --toy                      # every row at a toy size on a CPU: does it run?

Parity first: a 100 M model on real text (the embedded corpus by characters), bf16, dropout on, fused kernels. One GPU
is the baseline; the same with another micro-batch and with the reference kernels, which only round differently, are the
yardstick: a layout's 20-step means must stay within twice their distance. parity.csv has the curves, parity_means.csv
the verdicts.

Then speed.csv, one row as soon as it is measured: 3 B and 7 B models on 2048 slots, each GPU with as much work as the
one-GPU row's; x_one_gpu is against that, a peer's against its own. split.csv has a traced step of each row and rank:
time under compute, under exposed collectives, under exposed sends (the bubble and the transfers), and idle; for
pipelines the bubble that 1F1B has at best, (p-1)/(m+p-1). A row that does not fit takes half the micro-batch; one that
fails says why and ends no other. The ranks of the next row import their modules while a row runs.
"""

import argparse
import contextlib
import csv
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "parallel"
TENSOR, PIPELINE = "parallel.tensor_parallel=2", "parallel.pipeline_parallel=2"
SEQUENCE, ZERO_3 = "parallel.sequence_parallel=true", "parallel.zero_stage=3"
OVERLAP = "parallel.overlap_tensor=true"
GRAPHS = "parallel.cuda_graphs=true"
ZERO_BUBBLE = "parallel.pipeline_schedule=zero_bubble"
CUT = "parallel.layers_per_stage=[13,11]"
"""Of 24 layers, since the head costs as much as a layer and more."""


@dataclass(frozen=True)
class Row:
    """One measurement: how many ranks, which layout, how much work."""

    name: str
    world: int = 2
    overrides: tuple[str, ...] = ()
    micro_batch: int = 4
    micro_batches: int = 8
    """Of a data-parallel rank a step."""
    peer: bool = False
    """Whether litgpt's model under PyTorch's FSDP2 runs in place of this project's."""
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def stages(self) -> int:
        return 2 if PIPELINE in self.overrides else 1

    @property
    def model_ranks(self) -> int:
        """Ranks that share one model."""
        return 2 if {TENSOR, PIPELINE} & set(self.overrides) else 1


PARITY = [
    Row("one_gpu", world=1, micro_batch=8),
    Row("one_gpu_again", world=1, micro_batch=8),
    Row("one_gpu_half_micro_batch", world=1, micro_batch=4),
    Row("one_gpu_references", world=1, overrides=("kernels=reference",), micro_batch=8),
    Row("tensor_2", overrides=(TENSOR,), micro_batch=8),
    Row("pipeline_2", overrides=(PIPELINE,), micro_batch=4),
    Row("data_2_zero_1"),
    Row("data_2_zero_3", overrides=(ZERO_3,)),
    Row("tensor_2_sequence", overrides=(TENSOR, SEQUENCE), micro_batch=8),
    Row("tensor_2_graphs", overrides=(TENSOR, GRAPHS), micro_batch=8),
]
"""The first four run two at a time, each on a GPU of its own."""
BASELINE, YARDSTICKS = "one_gpu", ("one_gpu_half_micro_batch", "one_gpu_references")
WINDOW = 20
ONE_CONNECTION = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
SPEED: dict[str, list[Row]] = {
    "3b": [
        Row("one_gpu", world=1),
        Row("tensor_2_graphs", overrides=(TENSOR, GRAPHS), micro_batches=16),
        Row("tensor_2_overlap_graphs", overrides=(TENSOR, OVERLAP, GRAPHS), micro_batches=16),
        Row("tensor_2_sequence_graphs", overrides=(TENSOR, SEQUENCE, GRAPHS), micro_batches=16),
        Row("tensor_2_sequence_overlap_graphs", overrides=(TENSOR, SEQUENCE, OVERLAP, GRAPHS), micro_batches=16),
        Row("fsdp2", peer=True),
        Row("fsdp2_one_gpu", world=1, peer=True),
        Row("pipeline_2_16_cut_by_cost", overrides=(PIPELINE, CUT), micro_batches=16),
        Row("pipeline_2_16_zero_bubble", overrides=(PIPELINE, ZERO_BUBBLE), micro_batches=16),
        Row("pipeline_2_64", overrides=(PIPELINE,), micro_batches=64),
        Row("data_2_zero_1"),
        Row("data_2_zero_3", overrides=(ZERO_3,)),
        Row("pipeline_2_16", overrides=(PIPELINE,), micro_batches=16),
        Row("tensor_2", overrides=(TENSOR,), micro_batches=16),
        Row("one_gpu_graphs", world=1, overrides=(GRAPHS,)),
        Row("tensor_2_sequence", overrides=(TENSOR, SEQUENCE), micro_batches=16),
    ],
    "7b": [
        Row("data_2_zero_1", micro_batch=2),
        Row("tensor_2_sequence_graphs", overrides=(TENSOR, SEQUENCE, GRAPHS), micro_batch=2, micro_batches=16),
        Row("pipeline_2_16", overrides=(PIPELINE,), micro_batch=2, micro_batches=16),
        Row("fsdp2", peer=True, micro_batch=2),
        Row("data_2_zero_3", overrides=(ZERO_3,), micro_batch=2),
        Row("tensor_2_graphs", overrides=(TENSOR, GRAPHS), micro_batch=2, micro_batches=16),
    ],
    "3b again": [
        Row("tensor_2_one_connection", overrides=(TENSOR,), micro_batches=16, environment=ONE_CONNECTION),
    ],
}
"""In the order of what is wanted most."""


class Ranks:
    """The processes of one row: they import, then wait for the task."""

    def __init__(self, row: Row, folder: Path) -> None:
        self.row = row
        self.folder = Path(tempfile.mkdtemp(dir=folder))
        words = [sys.executable, "-m", "benchmarks.parallel_worker"]
        self.processes = []
        for rank in range(row.world):
            with (self.folder / f"{rank}.log").open("w") as log:
                self.processes.append(
                    subprocess.Popen(
                        words,
                        stdin=subprocess.PIPE,
                        stdout=log,
                        stderr=log,
                        text=True,
                        env=os.environ | row.environment,
                    )
                )

    def begin(self, task: dict[str, Any], *, first_gpu: int = 0) -> None:
        """Give each rank the task; rank r takes GPU first_gpu + r."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank, process in enumerate(self.processes):
            environment = {"RANK": rank, "LOCAL_RANK": first_gpu + rank, "WORLD_SIZE": self.row.world}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            about = {"environment": environment, "result": str(self.folder / "result.json")}
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it died; `end` says why
                process.stdin.write(json.dumps(task | about) + "\n")
                process.stdin.close()

    def end(self, seconds: float) -> dict[str, Any]:
        """Wait for all ranks; rank 0's result, or {"reason": …} where one failed or the time is up."""
        deadline = time.monotonic() + seconds
        running = list(self.processes)
        while running and time.monotonic() < deadline:
            time.sleep(0.05)
            running = [process for process in running if process.poll() is None]
            if any(process.returncode for process in self.processes):
                # The others would wait for it; they may be about to say something themselves.
                deadline = min(deadline, time.monotonic() + 3)
        self.stop()
        file = self.folder / "result.json"
        if not any(process.returncode for process in self.processes) and file.exists():
            return dict(json.loads(file.read_text()))
        if all(process.returncode in (0, -9) for process in self.processes):
            return {"reason": f"took longer than {seconds:.0f} s"}
        return {"reason": self._reason()}

    def stop(self) -> None:
        """End what still runs."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    def _reason(self) -> str:
        """The last line of the rank that failed by itself: one whose peer died blames the connection."""
        found = []
        for rank in range(self.row.world):
            lines = (self.folder / f"{rank}.log").read_text(errors="replace").strip().splitlines()
            errors = [line for line in lines if "Error" in line or "error:" in line.lower()]
            found.append((errors or lines or ["it said nothing"])[-1])
        own = [text for text in found if "onnection" not in text and "NCCL" not in text]
        return (own or found)[0][:300]


class Bench:
    """Runs rows within a budget and writes the tables."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.deadline = time.monotonic() + options.budget
        self.ready: dict[str, Ranks] = {}
        self.heading = ""

    @property
    def left(self) -> float:
        """Seconds of the budget."""
        return self.deadline - time.monotonic()

    def prepare(self, row: Row) -> Ranks:
        """The ranks of a row, which go on importing."""
        key = repr(row)
        if key not in self.ready:
            self.ready[key] = Ranks(row, self.folder)
        return self.ready[key]

    def take(self, row: Row) -> Ranks:
        """The ranks of a row, for good."""
        ranks = self.prepare(row)
        del self.ready[repr(row)]
        return ranks

    def stop(self) -> None:
        """End the ranks that never got a task."""
        for ranks in self.ready.values():
            ranks.stop()

    def write(self, name: str, rows: Sequence[dict[str, Any]], fields: Sequence[str]) -> None:
        """A whole table anew."""
        self.options.output.mkdir(parents=True, exist_ok=True)
        with (self.options.output / name).open("w", newline="") as file:
            file.write(f"# {self.heading}; python -m benchmarks.parallel {' '.join(sys.argv[1:])}\n")
            table = csv.DictWriter(file, fields, extrasaction="ignore", lineterminator="\n")
            table.writeheader()
            table.writerows(rows)

    def note(self, result: dict[str, Any]) -> None:
        """Remember the device and versions of a result for the tables' headings."""
        if "device" in result:
            self.heading = f"{result.pop('device')}, {result.pop('versions')}"


def main() -> int:
    """Parity, then speed; 1 where a layout left the baseline or no row could be measured."""
    options = parse(sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        try:
            same = parity(bench)
            measured = speed(bench)
        finally:
            bench.stop()
    return 0 if same and measured else 1


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="*", default=["*"], help="rows such as parity/tensor_2, or patterns such as '7b/*'"
    )
    parser.add_argument("--toy", action="store_true", help="a toy model everywhere, for a machine without GPUs")
    parser.add_argument("--parity-steps", type=int, default=200)
    parser.add_argument("--steps", type=int, default=3, help="steps that count in a speed row (default 3)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them, compilation among them (default 2)")
    parser.add_argument("--budget", type=float, default=525, help="seconds for everything (default 525)")
    parser.add_argument("--timeout", type=float, default=110, help="seconds a row may take (default 110)")
    parser.add_argument("--output", type=Path, help="folder of the tables (default: the committed ones', unless --toy)")
    options = parser.parse_args(words)
    options.output = options.output or (Path("runs/parallel_toy") if options.toy else FOLDER)
    return options


# ---- parity ----


def parity(bench: Bench) -> bool:
    """Curves of every layout and the verdicts; whether all stayed with the baseline."""
    options = bench.options
    rows = [row for row in PARITY if wanted(f"parity/{row.name}", options)]
    pairs = [list(rows[first : first + 2]) for first in range(0, len(rows), 2)]
    turns = [
        turn for pair in pairs for turn in ([pair] if all(row.world == 1 for row in pair) else [[r] for r in pair])
    ]
    curves: dict[str, list[float]] = {}
    for number, turn in enumerate(turns):
        if bench.left < 30:
            say({"row": f"parity/{turn[0].name}", "reason": "no time left"})
            continue
        together = [bench.take(row) for row in turn]
        for row in turns[number + 1] if number + 1 < len(turns) else []:
            bench.prepare(row)
        for gpu, (row, ranks) in enumerate(zip(turn, together, strict=True)):
            task = {"task": "parity", "shape": "toy" if options.toy else "text", "steps": options.parity_steps}
            ranks.begin(task | about(row), first_gpu=gpu)
        for row, ranks in zip(turn, together, strict=True):
            found = ranks.end(min(options.timeout, bench.left))
            bench.note(found)
            if "losses" not in found:
                say({"row": f"parity/{row.name}", **found})
                continue
            curves[row.name] = found["losses"]
            say({"row": f"parity/{row.name}", "first": found["losses"][0], "last": found["losses"][-1]})
            table = [
                {"step": step + 1} | {name: curves[name][step] for name in curves}
                for step in range(len(found["losses"]))
            ]
            bench.write("parity.csv", table, ["step", *curves])
    return not rows or verdicts(bench, curves, [row.name for row in rows])


def verdicts(bench: Bench, curves: dict[str, list[float]], names: Sequence[str]) -> bool:
    """Largest difference of a 20-step mean from the baseline's, against twice the yardsticks'."""
    spread = [distance(curves[name], curves[BASELINE]) for name in YARDSTICKS if name in curves and BASELINE in curves]
    if not spread:
        say(
            {"row": "parity", "reason": f"{BASELINE} and one of {', '.join(YARDSTICKS)} are needed to judge the others"}
        )
        return False
    base, allowed = curves[BASELINE], 2 * max(spread)
    table = []
    for name in names:
        row: dict[str, Any] = {"layout": name, "allowed": f"{allowed:.3e}", "within": False}
        if name in curves:
            far = distance(curves[name], base)
            start = abs(curves[name][0] - base[0]) / base[0]
            row |= {"first_step": f"{start:.2e}", "largest_mean": f"{far:.3e}", "within": far <= allowed}
        table.append(row)
        say({"row": "parity", **row})
    bench.write("parity_means.csv", table, ["layout", "first_step", "largest_mean", "allowed", "within"])
    return all(row["within"] for row in table)


def distance(curve: Sequence[float], base: Sequence[float]) -> float:
    """Largest difference of two curves' means over consecutive windows of 20 steps, nats."""
    starts = range(0, len(base) - WINDOW + 1, WINDOW) if len(base) >= WINDOW else [0]
    means = [[sum(c[s : s + WINDOW]) / len(c[s : s + WINDOW]) for s in starts] for c in (curve, base)]
    return max(abs(mine - other) for mine, other in zip(*means, strict=True))


# ---- speed ----

FIELDS = [
    *("shape", "row", "world", "micro_batch", "micro_batches", "tokens_per_second", "x_one_gpu", "mfu", "model_tflops"),
    *("step_ms", "spread", "memory_gib", "allocated_gib", "parameters"),
    *("first_loss", "last_loss", "seconds", "reason"),
]
SPLIT = [
    *("shape", "row", "rank", "step_ms", "compute", "exposed_collectives", "exposed_sends", "idle"),
    "bubble_of_1f1b",
]


def speed(bench: Bench) -> bool:
    """Every row of every shape; whether any could be measured."""
    options = bench.options
    rows = [
        ("toy" if options.toy else group.split()[0], row)
        for group, members in SPEED.items()
        for row in members
        if wanted(f"{group.split()[0]}/{row.name}", options) and not (options.toy and CUT in row.overrides)
    ]
    table: list[dict[str, Any]] = []
    splits: list[dict[str, Any]] = []
    for number, (shape, row) in enumerate(rows):
        following = rows[number + 1][1] if number + 1 < len(rows) else None
        found = measure(bench, shape, row, following)
        parts, *more = (found.pop(key, []) for key in ("split", "gaps", "allocations"))
        table.append({"shape": shape, "row": row.name, "world": row.world} | found)
        compare(table)
        say(table[-1])
        bench.write("speed.csv", table, FIELDS)
        bubble = (row.stages - 1) / (found["micro_batches"] + row.stages - 1) if row.stages > 1 else None
        for rank, part in enumerate(parts):
            whole = part.pop("whole")
            shares = {name: round(value / whole, 4) for name, value in part.items()}
            splits.append(
                {"shape": shape, "row": row.name, "rank": rank, "step_ms": round(whole, 1), **shares}
                | ({"bubble_of_1f1b": round(bubble, 4)} if bubble else {})
            )
            say(splits[-1] | {"gaps": more[0][rank], "allocations_in_steps": more[1][rank]})
        if parts:
            bench.write("split.csv", splits, SPLIT)
    return not rows or any(row.get("tokens_per_second") for row in table)


def compare(table: Sequence[dict[str, Any]]) -> None:
    """Write each row's x_one_gpu where its one-GPU row is there."""
    rates = {(row["shape"], row["row"]): row.get("tokens_per_second") for row in table}
    for row in table:
        one = rates.get((row["shape"], "fsdp2_one_gpu" if row["row"].startswith("fsdp2") else BASELINE))
        if one and row.get("tokens_per_second"):
            row["x_one_gpu"] = round(row["tokens_per_second"] / one, 3)


def measure(bench: Bench, shape: str, row: Row, following: Row | None) -> dict[str, Any]:
    """One row, with half the micro-batch and twice as many of them where it does not fit."""
    options, found = bench.options, {}
    size, count = row.micro_batch, row.micro_batches
    while size:
        found = {"micro_batch": size, "micro_batches": count}
        if bench.left < 35:
            return found | {"reason": "no time left"}
        ranks = bench.take(row)
        if following is not None:
            bench.prepare(following)
        task = {"task": "speed", "shape": shape, "steps": options.steps, "warmup": options.warmup, "trace": True}
        ranks.begin(task | about(row) | found)
        result = ranks.end(min(options.timeout, bench.left))
        bench.note(result)
        found |= result
        if "out of memory" not in result.get("reason", "").lower():
            break
        size, count = size // 2, 2 * count
    return found


def about(row: Row) -> dict[str, Any]:
    """What a task says of its row."""
    return asdict(row) | {"stages": row.stages, "model_ranks": row.model_ranks}


def wanted(name: str, options: argparse.Namespace) -> bool:
    """Whether the command line asks for a row."""
    return any(fnmatch(name, pattern) for pattern in options.only)


def say(row: dict[str, Any]) -> None:
    """One line of progress."""
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
