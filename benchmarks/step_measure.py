"""How `benchmarks.step` and its relatives measure: what the card reaches, a call's time, and where the time goes."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.bench import copy_ceiling, event_times, matmul_ceiling

PARTS = {
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "aten::matmul", "aten::_scaled_mm"),
    "rounding to FP8": ("tiankong::fp8", "_Linear"),
    "attention": ("tiankong::interval_attention",),
    "norm": ("tiankong::residual_norm",),
    "activation": ("tiankong::bias_activation",),
    "rotary": ("tiankong::rotary",),
    "head": ("LinearCrossEntropy",),
    "embedding": ("aten::embedding", "Embedding"),
    "optimizer": ("_fused_adamw", "_foreach"),
    "copies and casts": ("aten::copy_", "aten::to", "aten::clone", "aten::contiguous", "aten::zero_", "aten::fill_"),
    "sums": ("aten::add", "aten::sum", "aten::mul", "aten::div"),
}


def timed(function: Callable[[], Tensor], gpu: bool) -> tuple[float, Tensor]:
    """Seconds of one call on the device, or by the clock without one."""
    results: list[Tensor] = []
    if gpu:
        return event_times(lambda: results.append(function()), 1, 0)[0] / 1e3, results[0]
    clock = time.perf_counter()
    results.append(function())
    return time.perf_counter() - clock, results[0]


def measure_ceilings() -> dict[str, float]:
    """What this card reaches now."""
    found = {
        "matmul_tflops": round(matmul_ceiling() / 1e12, 1),
        "copy_gb_per_s": round(copy_ceiling() / 1e9, 1),
    }
    torch.cuda.empty_cache()
    return found


def profile(function: Callable[[], Tensor]) -> list[dict[str, Any]]:
    """Milliseconds of one step by part, by the innermost operation that launched each kernel; idle is what is left."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    gpu = torch.cuda.is_available()
    with torch_profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as recorded:
        seconds, _ = timed(function, gpu)
    spent: dict[str, tuple[int, float]] = {}
    for entry in recorded.key_averages():
        if entry.device_type != torch.autograd.DeviceType.CPU:
            continue
        micro = entry.self_device_time_total if gpu else entry.self_cpu_time_total
        if micro <= 0:
            continue
        part = next((part for part, names in PARTS.items() if any(name in entry.key for name in names)), entry.key)
        count, total = spent.get(part, (0, 0.0))
        spent[part] = (count + entry.count, total + micro / 1e3)
    whole = 1e3 * seconds
    idle = whole - math.fsum(total for _, total in spent.values())
    rows = sorted(((part, *found) for part, found in spent.items()), key=lambda row: -row[2])
    rows.append(("idle", 0, idle))
    return [
        {"part": part, "calls": count, "ms": round(total, 3), "share": round(total / whole, 4)}
        for part, count, total in rows
        if part == "idle" or total > 1e-3 * whole
    ]
