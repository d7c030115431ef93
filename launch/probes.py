"""What a node measures of itself and of its link to another one, on orders of the preflight.

On an accelerator the same probes run there; without one they run on the CPU, with gloo in place of NCCL.
"""

import datetime
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launch.facts import smi

MATMUL = 1024
"""Rows and columns of the matrices on a CPU; four times as many on an accelerator."""
COPY_BYTES = 64 << 20
DISK_BYTES = 32 << 20
LINK_BYTES = 8 << 20
REPEATS = 5
LINK_SECONDS = 60
_HEALTH = (
    "ecc.errors.uncorrected.volatile.total",
    "clocks_throttle_reasons.hw_slowdown",
    "clocks_throttle_reasons.hw_thermal_slowdown",
    "temperature.gpu",
    "clocks.sm",
)


def probe(what: str, options: dict[str, Any]) -> dict[str, Any]:
    """Results of one probe: `node` {run_dir} or `pair` {address, port, rank, interface}. Errors come as `error`."""
    try:
        return _node(Path(options["run_dir"])) if what == "node" else _pair(**options)
    except (OSError, RuntimeError) as error:
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}


def _node(run_dir: Path) -> dict[str, Any]:
    device = _device()
    size = MATMUL * (1 if device.type == "cpu" else 4)
    square = torch.randn(size, size, device=device)
    block = torch.zeros(COPY_BYTES // 4, device=device)
    other = torch.empty_like(block)
    return {
        "matmul_gflops": 2 * size**3 / _best(lambda: square @ square, device) / 1e9,
        "copy_gb_per_second": 2 * COPY_BYTES / _best(lambda: other.copy_(block), device) / 1e9,
        "disk_mb_per_second": DISK_BYTES / _disk_seconds(run_dir) / 1e6,
        "free_gb": shutil.disk_usage(run_dir).free / 1e9,
        "health": _health(),
    }


def _pair(address: str, port: int, rank: int, interface: str | None) -> dict[str, Any]:
    """Bandwidth of all-reduce and all-to-all between two nodes, in Gbit/s of what one of them sends."""
    device = _device()
    if interface is not None:
        os.environ |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
    dist.init_process_group(
        dist.get_default_backend_for_device(device),
        init_method=f"tcp://{address}:{port}",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=LINK_SECONDS),
    )
    try:
        block = torch.ones(LINK_BYTES // 4, device=device)
        other = torch.empty_like(block)
        reduce = _best(lambda: dist.all_reduce(block), device)
        exchange = _best(lambda: dist.all_to_all_single(other, block), device)
        # A ring of two sends the whole block once; all-to-all sends one half of it.
        return {"all_reduce_gbit": 8e-9 * LINK_BYTES / reduce, "all_to_all_gbit": 4e-9 * LINK_BYTES / exchange}
    finally:
        dist.destroy_process_group()


def _best(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest of some repeats, after one that does not count."""
    seconds = []
    for _ in range(1 + REPEATS):
        began = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def _disk_seconds(folder: Path) -> float:
    """Time to write a file and bring it to the disk."""
    file = folder / f".probe-{os.uname().nodename}-{os.getpid()}"
    block = os.urandom(1 << 20)
    began = time.perf_counter()
    try:
        with open(file, "wb") as out:
            for _ in range(DISK_BYTES >> 20):
                out.write(block)
            out.flush()
            os.fsync(out.fileno())
        return time.perf_counter() - began
    finally:
        file.unlink(missing_ok=True)


def _health() -> list[str]:
    """What nvidia-smi holds against this node's accelerators; nothing without it."""
    found = []
    for number, card in enumerate(smi(f"--query-gpu={','.join(_HEALTH)}")):
        errors, slow, hot, degrees, _ = card if len(card) == len(_HEALTH) else ("0", "", "", "", "")
        if errors.isdecimal() and int(errors):
            found.append(f"accelerator {number}: {errors} uncorrected memory errors")
        if "Active" in (slow, hot):
            found.append(f"accelerator {number}: throttled by its hardware at {degrees} °C")
    return found


def _device() -> torch.device:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if found is None else found
