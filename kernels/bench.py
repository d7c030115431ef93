"""`python -m kernels.bench [operation …] [--output FOLDER]`: check every operation, then time it beside its peers.

First each implementation against float64 on small odd shapes, by RMS error ratio: out and every gradient, at most 1.1 ×
the error of PyTorch in bf16 (twice on tensors under 10⁴ elements): the reference's; for attention the unfused one's, as
its products take bf16 probabilities, like every flash kernel's. Then times at full size: medians, but
for the head from CUDA graphs (no launch gaps, every implementation alike), bytes as a share of the copy measured in the
same run, products in TFLOP/s. One CSV an operation, written shape by shape, with device, versions, command. A failed
check ends with status 1.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.bench_cases import CASES, Case, Run


def error_ratio(actual: Tensor, expected: Tensor) -> float:
    """RMS error over RMS of the expected value; NaN never passes."""
    expected = expected.double()
    scale = expected.square().mean().sqrt()
    return ((actual.double() - expected).square().mean().sqrt() / scale.clamp(min=1e-300)).item()


def first(result: Any) -> Tensor:
    """The differentiable output."""
    return result[0] if isinstance(result, tuple) else result


def outputs(run: Run, inputs: Sequence[Tensor], dout: Tensor | None) -> tuple[list[Tensor], Tensor]:
    """[out, gradient of every input] and the output gradient used."""
    out = first(run(inputs))
    if dout is None:
        generator = torch.Generator(out.device).manual_seed(9)
        dout = torch.randn(out.shape, device=out.device, generator=generator, dtype=torch.float32).to(torch.bfloat16)
    grads = torch.autograd.grad(out, list(inputs), dout.to(out.dtype).view(out.shape))
    return [out.detach(), *grads], dout


def check(case: Case) -> list[dict[str, Any]]:
    """Error of every implementation against float64, beside the reference's in the same dtype."""
    wide = [tensor.detach().double().requires_grad_() for tensor in case.inputs]
    expected, dout = outputs(case.runs["reference"], wide, None)
    own = [
        error_ratio(a, e) for a, e in zip(outputs(case.runs[case.peer], case.inputs, dout)[0], expected, strict=True)
    ]
    rows = []
    for name, run in case.runs.items():
        actual = outputs(run, case.inputs, dout)[0]
        for index, (got, want, allowed) in enumerate(zip(actual, expected, own, strict=True)):
            error, factor = error_ratio(got, want), 2.0 if want.numel() < 10_000 else 1.1
            # a scalar loss is exact to float32 in the reference by luck of the draw: float32's own grain is the floor
            ok = error <= factor * max(allowed, 2e-7)
            what = "out" if index == 0 else f"gradient {index}"
            rows.append(
                {"op": case.op, "shape": case.shape, "implementation": name, "tensor": what, "error": f"{error:.3e}"}
                | {f"error of {case.peer}": f"{allowed:.3e}", "passes": ok}
            )
    return rows


def captured(function: Callable[[], object], inner: int = 2) -> Callable[[], object]:
    """A CUDA graph of `inner` calls, to be replayed: no launch gaps, for every implementation alike."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(inner):
            function()
    return graph.replay


def event_times(function: Callable[[], object], repeats: int, warmup: int = 1) -> list[float]:
    """Milliseconds of each of `repeats` calls, between device events, after `warmup` that are not counted."""
    for _ in range(warmup):
        function()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return times


def event_time(function: Callable[[], object], repeats: int = 31) -> float:
    """Median milliseconds of a call."""
    return statistics.median(event_times(function, repeats))


def copy_ceiling() -> float:
    """Bytes a second of a large device-to-device copy, read + written."""
    source = torch.randn(2**29, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    return 2.0 * 2**30 / (event_time(lambda: target.copy_(source)) * 1e-3)


def matmul_ceiling() -> float:
    """Operations a second of an 8192³ bf16 product."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2.0 * 8192**3 / (event_time(lambda: a @ b) * 1e-3)


ROUNDS, REPEATS, INNER = 5, 5, 2


def measure(case: Case, ceiling: float) -> list[dict[str, Any]]:
    """Times of every implementation and peer, forward alone and with the backward.

    The runs take turns, ROUNDS times, so that a card that slows down as it warms up slows all of them.
    """
    timed = {name: (case.inputs, run, case.work) for name, run in case.runs.items()} | case.extra
    inner = INNER if case.graphed else 1
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[tuple[str, str], tuple[Callable[[], object], float]] = {}
    alive: list[Tensor] = []  # what the graphs read must outlive them
    for name, (inputs, run, work) in timed.items():
        row = rows[name] = {"op": case.op, "shape": case.shape, "implementation": name}

        def forward(run: Run = run, inputs: list[Tensor] = inputs) -> None:
            with torch.no_grad():
                run(inputs)

        try:
            dout = torch.randn_like(first(run(inputs)))
            alive.append(dout)

            def both(run: Run = run, inputs: list[Tensor] = inputs, dout: Tensor = dout) -> None:
                torch.autograd.grad(first(run(inputs)), inputs, dout)

            both()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            both()
            torch.cuda.synchronize()
            row["peak GiB"] = round((torch.cuda.max_memory_allocated() - before) / 2**30, 3)
            for label, function, amount in (("forward", forward, work[0]), ("forward + backward", both, work[1])):
                calls[name, label] = (captured(function, inner) if case.graphed else function, amount)
        except (RuntimeError, ValueError) as error:  # a peer may not run here; ours are checked before
            row["error"] = str(error).splitlines()[0][:120]
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for _ in range(ROUNDS):
        for key, (call, _) in calls.items():
            times[key] += event_times(call, REPEATS)
    for (name, label), (_, amount) in calls.items():
        seconds = statistics.median(times[name, label]) * 1e-3 / inner
        rows[name][f"{label} us"] = round(seconds * 1e6, 1)
        if case.unit == "bytes":
            rows[name][f"{label} % of copy"] = round(100 * amount / seconds / ceiling, 1)
        else:
            rows[name][f"{label} TFLOP/s"] = round(amount / seconds / 1e12, 1)
    for row in rows.values():
        print(" | ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return list(rows.values())


def write(path: Path, rows: list[dict[str, Any]], header: list[str]) -> None:
    """A CSV with `# ` lines about the run before it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="") as file:
        file.writelines(f"# {line}\n" for line in header)
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def fresh(cases: Iterable[Case]) -> Iterator[Case]:
    """The cases, each with nothing compiled yet: a peer is compiled for its shape, and never counts as recompiled."""
    for case in cases:
        torch._dynamo.reset()
        yield case


def about(words: list[str]) -> list[str]:
    """The run in two lines: device and versions, command."""
    import triton

    versions = f"torch {torch.__version__}, triton {triton.__version__}, cuDNN {torch.backends.cudnn.version()}"
    command = " ".join(["python -m kernels.bench", *words])
    return [f"{torch.cuda.get_device_name()}, {versions}", f"python {platform.python_version()}, command: {command}"]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("operations", nargs="*", default=[], help=f"any of {', '.join(CASES)}; all without")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/kernels"), help="folder of the CSV files")
    parser.add_argument("--check-only", action="store_true", help="correctness alone")
    parser.add_argument("--no-graphs", action="store_true", help="time plain calls, launch gaps included")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.operations) - set(CASES))
    if unknown:
        parser.error(f"no such operation: {', '.join(unknown)}; use {', '.join(CASES)}")
    if not torch.cuda.is_available():
        print("kernels.bench needs a CUDA device", file=sys.stderr)
        return 2
    operations = arguments.operations or list(CASES)
    header = about(arguments.operations + ["--no-graphs"] * arguments.no_graphs)
    copy = 0.0
    if not arguments.check_only:
        copy, matmul = copy_ceiling(), matmul_ceiling()
        header.append(f"ceilings here: copy {copy / 1e9:.0f} GB/s, 8192^3 bf16 product {matmul / 1e12:.0f} TFLOP/s")
        print(header[-1], flush=True)
    failed = 0
    for op in operations:
        checked = [row for case in fresh(CASES[op](True)) for row in check(case)]
        write(arguments.output / f"{op}_errors.csv", checked, header[:2])
        wrong = [row for row in checked if not row["passes"]]
        failed += len(wrong)
        print(f"{op}: {len(checked)} tensors checked against float64, {len(wrong)} beyond the bound", flush=True)
        for row in wrong:
            print("   ", row, flush=True)
        rows: list[dict[str, Any]] = []
        for case in fresh(CASES[op](False)) if not arguments.check_only else ():
            case.graphed = case.graphed and not arguments.no_graphs
            rows += measure(case, copy)
            write(arguments.output / f"{op}.csv", rows, header)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
