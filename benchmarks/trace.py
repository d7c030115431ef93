"""Where the time of one step went on this rank, from a profiler's trace: a sweep over intervals, no names of ours.

Kernels are told apart by what NCCL calls its own: collectives, and sends between stages. A communication kernel that
runs beside a compute kernel costs nothing; what is left uncovered is exposed. A receive waits inside its kernel, so a
pipeline's bubble lies in the exposed sends, together with what the transfers take.
"""

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Interval = tuple[float, float]
"""Start and end, in any one unit."""


def split_step(step: Callable[[], object]) -> tuple[dict[str, float], list[str]]:
    """Milliseconds of one call of `step`: whole, compute, exposed collectives, exposed sends, neither (host, waiting).

    And the longest gaps in it, see `gaps`. On a CPU compute is PyTorch's operations, whose threads also wait in them; a
    GPU's kernels say what they are.
    """
    gpu = torch.cuda.is_available()
    activity = ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as recorded:
        clock = time.perf_counter()
        step()
        if gpu:
            torch.cuda.synchronize()
        whole = 1e3 * (time.perf_counter() - clock)
    kinds: dict[str, list[Interval]] = {"compute": [], "collective": [], "send": []}
    named: list[tuple[Interval, str]] = []
    for event in recorded.profiler.kineto_results.events():  # type: ignore[union-attr]
        kind = kind_of(event, gpu)
        if kind is not None:
            interval = event.start_ns() / 1e6, (event.start_ns() + event.duration_ns()) / 1e6
            kinds[kind].append(interval)
            named.append((interval, event.name()))
    return split(whole, kinds["compute"], kinds["collective"], kinds["send"]), gaps(whole, named)


def gaps(whole: float, named: Iterable[tuple[Interval, str]], most: int = 6) -> list[str]:
    """The longest times in which nothing ran, each between what had ended last and what began next, longest first.

    And what lies before the first and behind the last.
    """
    found: list[tuple[float, str]] = []
    ordered = sorted(named)
    (begin, end), last = ordered[0] if ordered else ((0.0, 0.0), "")
    for (start, stop), name in ordered:
        if start > end:
            found.append((start - end, f"at {end - begin:.0f} ms between {last[:48]} and {name[:48]}"))
        if stop > end:
            end, last = stop, name
    longest = [f"{length:.1f} ms {where}" for length, where in sorted(found, reverse=True)[:most]]
    return [*longest, f"{whole - (end - begin):.1f} ms at both ends"]


def kind_of(event: Any, gpu: bool) -> str | None:
    """compute, collective or send; None where the event is no work of the device."""
    name = event.name()
    if gpu:
        if event.device_type() != torch.autograd.DeviceType.CUDA or event.is_user_annotation():
            return None
        if not name.startswith("nccl"):
            return "compute"
        return "send" if "SendRecv" in name else "collective"
    if name.startswith("gloo:"):
        return "send" if "send" in name or "recv" in name else "collective"
    return "compute" if name.startswith("aten::") else None


def split(
    whole: float, compute: Iterable[Interval], collectives: Iterable[Interval], sends: Iterable[Interval]
) -> dict[str, float]:
    """The parts of `whole`, which add up to it: time under compute, then under collectives, then under sends alone."""
    covered = merged(compute)
    parts = {"compute": length(covered)}
    for name, intervals in (("exposed_collectives", collectives), ("exposed_sends", sends)):
        before = length(covered)
        covered = merged([*covered, *intervals])
        parts[name] = length(covered) - before
    parts["idle"] = whole - length(covered)
    return {"whole": whole} | parts


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """The union as disjoint intervals in order."""
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def length(disjoint: Iterable[Interval]) -> float:
    """Sum of the lengths of disjoint intervals."""
    return sum(end - start for start, end in disjoint)
