"""`python -m benchmarks.attention_routes [--output FILE]`: a prefix mask on the vendor's kernels, beside our own.

The vendor's kernels know full and causal masks. Two cuts of a sequence with a context of P slots give those: the
rectangle (all queries, keys [0, P)) and the triangle (queries and keys [P, S), causal), forward merged by their
log-sum-exp, backward of both with the merged output and log-sum-exp, dq added; or the square (queries and keys [0, P))
and the trapezoid (queries [P, S), all keys, causal from the bottom right), which need no merging, and dk, dv added.
P lies on the device: lengths and offsets go to cuDNN as tensors (package nvidia-cudnn-frontend), to FlashAttention 2 as
cumulative sums with empty pieces in the gaps. FlashAttention 4 takes the mask as it is.

Each is held to float64 on a small odd shape first, then timed, forward and backward alone, taking turns; medians. q, k
and v are views of one packed tensor, as in the model. A route that cannot run here says why and is left out.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.attention_cudnn import CudnnHalves, merge
from kernels.bench import about, error_ratio, event_times, write
from kernels.interval_attention import interval_attention as reference
from kernels.resolve import resolve

Forward = Callable[[], tuple[Tensor, Tensor | None]]
Backward = Callable[[], tuple[Tensor, ...]]
ROUNDS, CALLS = 5, 4


@dataclass
class Case:
    """Inputs under gMASK's masks: generations uniform in [0.2, 1] of the row, as GLM-130B draws them."""

    qkv: Tensor  # [B, S, H, 3, D]
    dout: Tensor  # [B, S, H, D]
    context: Tensor  # int32 [B]

    @staticmethod
    def of(batch: int, slots: int, heads: int, dim: int) -> "Case":
        """Random inputs of a shape."""
        generator = torch.Generator().manual_seed(0)
        share = 0.2 + 0.8 * torch.rand(batch, generator=generator)
        draw = lambda *shape: torch.randn(*shape, generator=generator).bfloat16().cuda()  # noqa: E731
        return Case(
            draw(batch, slots, heads, 3, dim),
            draw(batch, slots, heads, dim),
            (((1 - share) * (slots - 1)).int() + 1).cuda(),
        )

    @property
    def heads(self) -> tuple[Tensor, ...]:
        """q, k, v [B, S, H, D]."""
        return self.qkv.unbind(3)

    @property
    def intervals(self) -> tuple[Tensor, Tensor]:
        """attend_from, attend_to."""
        place = torch.arange(self.qkv.shape[1], dtype=torch.int32, device="cuda").expand(len(self.context), -1)
        edge = self.context[:, None]
        return torch.zeros_like(place), torch.where(place >= edge, place + 1, edge).contiguous()

    @property
    def scale(self) -> float:
        """Of the scores."""
        return self.qkv.shape[-1] ** -0.5

    @property
    def name(self) -> str:
        """The shape."""
        batch, slots, heads, _, dim = self.qkv.shape
        return f"B{batch} S{slots} H{heads} D{dim}"


def ours(name: str) -> Callable[[Case], tuple[Forward, Backward]]:
    """An implementation of `kernels.interval_attention`, through autograd as a model calls it."""

    def route(case: Case) -> tuple[Forward, Backward]:
        function = resolve("interval_attention", name, "cuda", torch.bfloat16)
        start, stop = case.intervals
        leaves = [tensor.detach().requires_grad_() for tensor in case.heads]
        out = function(*leaves, start, stop, scale=case.scale)[0]

        def forward() -> tuple[Tensor, Tensor | None]:
            with torch.no_grad():
                return function(*leaves, start, stop, scale=case.scale)[:2]

        return forward, lambda: torch.autograd.grad(out, leaves, case.dout, retain_graph=True)

    return route


def cudnn(cut: str, deterministic: bool) -> Callable[[Case], tuple[Forward, Backward]]:
    """The two halves of a cut on cuDNN."""

    def route(case: Case) -> tuple[Forward, Backward]:
        halves = CudnnHalves(case.qkv, case.context, case.scale, cut, deterministic)
        halves.forward()
        return halves.forward, lambda: halves.backward(case.dout)

    return route


def pieces(context: Tensor, slots: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Cumulative queries and keys of the rectangle's pieces, and of the triangle's: int32 [pieces + 1] each.

    All sequences lie end to end. Rectangle: (all queries, P keys), (none, the rest). Triangle: (P queries, none),
    (none, P keys), (the rest, the rest).
    """
    first = torch.arange(len(context), device=context.device, dtype=torch.int32) * slots
    edge = first + context
    end = first[:1] + len(context) * slots

    def cumulative(*columns: Tensor) -> Tensor:
        return torch.cat([torch.stack(columns, 1).flatten(), end])

    rectangle = cumulative(first, first + slots), cumulative(first, edge)
    return rectangle, (cumulative(first, edge, edge), cumulative(first, first, edge))


def flash2(case: Case) -> tuple[Forward, Backward]:
    """Rectangle and triangle on FlashAttention 2 as torch has it."""
    batch, slots, heads = case.qkv.shape[:3]
    rectangle, triangle = pieces(case.context, slots)
    parts = [(*rectangle, slots, slots, 0.0, False), (*triangle, slots, slots, 0.0, True)]
    flat = [tensor.flatten(0, 1) for tensor in case.heads]
    kept: dict[str, Any] = {}

    def forward() -> tuple[Tensor, Tensor]:
        one, two = (torch.ops.aten._flash_attention_forward(*flat, *part, False, scale=case.scale) for part in parts)
        sums = [half[1].view(heads, batch, slots).transpose(0, 1).contiguous() for half in (one, two)]
        out, lse = merge(one[0].view_as(case.dout), sums[0], two[0].view_as(case.dout), sums[1], case.context, False)
        kept.update(out=out.flatten(0, 1), lse=lse.transpose(0, 1).reshape(heads, -1).contiguous(), random=one[2:4])
        return out, lse

    forward()

    def backward() -> tuple[Tensor, ...]:
        one, two = (
            torch.ops.aten._flash_attention_backward(
                case.dout.flatten(0, 1), *flat, kept["out"], kept["lse"], *part, *kept["random"], scale=case.scale
            )
            for part in parts
        )
        return tuple((a + b).view_as(case.dout) for a, b in zip(one, two, strict=True))

    return forward, backward


ROUTES: dict[str, Callable[[Case], tuple[Forward, Backward]]] = {
    "triton": ours("triton"),
    "flash4": ours("flash4"),
    "cudnn rectangle + triangle": cudnn("rectangle + triangle", False),
    "cudnn square + trapezoid": cudnn("square + trapezoid", False),
    "cudnn square + trapezoid, deterministic": cudnn("square + trapezoid", True),
    "flash2 rectangle + triangle": flash2,
}


def errors(case: Case, forward: Forward, backward: Backward) -> list[float]:
    """RMS error ratios of out, dq, dk, dv against float64."""
    wide = [tensor.double().requires_grad_() for tensor in case.heads]
    out = reference(*wide, *case.intervals, scale=case.scale)[0]
    wanted = [out.detach(), *torch.autograd.grad(out, wide, case.dout.double())]
    return [error_ratio(got, want) for got, want in zip((forward()[0], *backward()), wanted, strict=True)]


def measure(case: Case, names: list[str]) -> list[dict[str, Any]]:
    """A row for each route; operations of visible pairs only."""
    calls = {name: ROUTES[name](case) for name in names}
    times: dict[tuple[str, int], list[float]] = {(name, way): [] for name in names for way in (0, 1)}
    for _ in range(ROUNDS):
        for (name, way), found in times.items():
            found += event_times(lambda function=calls[name][way]: [function() for _ in range(CALLS)], 1)
    start, stop = case.intervals
    work = 4.0 * case.qkv.shape[2] * case.qkv.shape[4] * (stop - start).double().sum().item()
    rows = []
    for name in names:
        row: dict[str, Any] = {"shape": case.name, "route": name}
        for way, label, factor in ((0, "forward", 1.0), (1, "backward", 2.5)):
            milliseconds = statistics.median(times[name, way]) / CALLS
            row[f"{label} us"] = round(1e3 * milliseconds, 1)
            row[f"{label} TFLOP/s"] = round(factor * work / milliseconds / 1e9, 1)
        rows.append(row)
        print(" | ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return rows


def main() -> int:
    """1 where a route differs from float64."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention_routes")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/kernels/attention_routes.csv"))
    parser.add_argument("--shapes", nargs="+", default=["16x2048x16x128", "4x8192x16x128"], help="B x S x H x D")
    arguments = parser.parse_args()
    small, good, failed = Case.of(3, 777, 4, 128), [], False
    for name, route in ROUTES.items():
        try:
            worst = max(errors(small, *route(small)))
        except Exception as error:  # a package that is not here, a card that cannot: the others go on
            print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:200]}", flush=True)
            continue
        print(f"{name}: largest error against float64 {worst:.2e}", flush=True)
        failed |= worst > 5e-3
        good += [name] if worst <= 5e-3 else []
    rows: list[dict[str, Any]] = []
    header = [about([])[0], f"command: python -m benchmarks.attention_routes {' '.join(sys.argv[1:])}".rstrip()]
    for shape in arguments.shapes:
        rows += measure(Case.of(*(int(size) for size in shape.split("x"))), good)
        write(arguments.output, rows, header)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
