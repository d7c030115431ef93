"""What a node measures of itself and of its link to another one, on orders of the preflight.

On an accelerator the same probes run there; without one they run on the CPU, with gloo in place of NCCL.
"""

import contextlib
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_prep.errors import DataError
from launch.facts import free_port, smi

MATMUL = 1024
"""Rows and columns of the matrices on a CPU; eight times as many, in bfloat16, on an accelerator."""
COPY_BYTES = 64 << 20
"""On a CPU; four times as many on an accelerator, whose cache must not hold them."""
DISK_BYTES = 32 << 20
LINK_BYTES = 8 << 20
"""Of a collective between nodes; inside one with accelerators it is COPY_BYTES."""
REPEATS = 5
LINK_SECONDS = 60
LOAD_SECONDS = 5.0
"""How long the accelerators are kept busy at most, while nvidia-smi looks at clocks and throttling."""
ACCELERATOR_SHARE = 0.8
"""Share of its node's median below which an accelerator is named."""
_HEALTH = "ecc.errors.uncorrected.volatile.total,temperature.gpu,clocks.sm,{0}.hw_slowdown,{0}.hw_thermal_slowdown"
REASONS = ("clocks_event_reasons", "clocks_throttle_reasons")
"""The name of the same fields in newer drivers and in older ones."""


def probe(what: str, options: dict[str, Any]) -> dict[str, Any]:
    """Results of one probe; errors come as `error`.

    what: `node` {run_dir}, `data` {data_path}, `clock` {} or `pair` {address, port, rank, interface}.
    """
    if what == "clock":
        return {"time": time.time()}
    try:
        if what == "data":
            return {"health": unreadable(Path(options["data_path"]))}
        return _node(Path(options["run_dir"])) if what == "node" else _pair(**options)
    except (ImportError, OSError, RuntimeError) as error:
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}


def _node(run_dir: Path) -> dict[str, Any]:
    devices = _devices()
    speeds = [_device_speeds(device) for device in devices]
    found: dict[str, Any] = {key: min(speed[key] for speed in speeds) for key in speeds[0]}
    found["health"] = _slow_accelerators(speeds)
    if devices[0].type != "cpu":
        found |= _between_accelerators(devices)
        if len(devices) > 1:
            found |= inside(len(devices))
        card = _cards_under_load(devices)
        found["health"] += card.pop("health")
        found |= card
    found["disk_mb_per_second"] = DISK_BYTES / _disk_seconds(run_dir) / 1e6
    found["free_gb"] = shutil.disk_usage(run_dir).free / 1e9
    return found


def _device_speeds(device: torch.device) -> dict[str, float]:
    cpu = device.type == "cpu"
    size, count = (MATMUL, COPY_BYTES // 4) if cpu else (8 * MATMUL, COPY_BYTES)
    square = torch.randn(size, size, device=device, dtype=torch.float32 if cpu else torch.bfloat16)
    block = torch.zeros(count, device=device)
    other = torch.empty_like(block)
    return {
        "matmul_gflops": 2 * size**3 / _best(lambda: square @ square, device) / 1e9,
        "copy_gb_per_second": 8 * count / _best(lambda: other.copy_(block), device) / 1e9,
    }


def _slow_accelerators(speeds: list[dict[str, float]]) -> list[str]:
    """Accelerators that are slower than the others of their node."""
    found = []
    for key in speeds[0]:
        median = statistics.median(speed[key] for speed in speeds)
        found += [
            f"accelerator {number}: {key.partition('_')[0]} {speed[key]:.4g}, its node's median is {median:.4g}"
            for number, speed in enumerate(speeds)
            if speed[key] < ACCELERATOR_SHARE * median
        ]
    return found


def _between_accelerators(devices: list[torch.device]) -> dict[str, float]:
    """GB/s one way: from page-locked host memory to each (PCIe), and from each to the next one (NVLink or PCIe)."""
    host = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    blocks = [torch.empty(COPY_BYTES, dtype=torch.uint8, device=device) for device in devices]
    found = {"host_gb_per_second": COPY_BYTES / max(_copy_seconds(block, host) for block in blocks) / 1e9}
    if len(blocks) > 1:
        slowest = max(_copy_seconds(block, blocks[number - 1]) for number, block in enumerate(blocks))
        found["peer_gb_per_second"] = COPY_BYTES / slowest / 1e9
    return found


def inside(ranks: int) -> dict[str, float]:
    """Bus bandwidth, GB/s, of collectives over the node's accelerators, or over so many processes on a CPU.

    A process each, since a collective wants that. Raises RuntimeError with the last words of one that failed.
    """
    command = [sys.executable, "-m", "launch.probes", str(ranks), str(free_port())]
    processes = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]
    try:
        said = [process.communicate(timeout=LINK_SECONDS) for process in processes]
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"collectives inside the node took over {LINK_SECONDS} s") from None
    finally:
        for process in processes:
            process.kill()
    for process, (_, error) in zip(processes, said, strict=True):
        if process.returncode:
            raise RuntimeError(
                f"collectives inside the node: {(error.strip().splitlines() or ['it said nothing'])[-1]}"
            )
    speeds: dict[str, float] = json.loads(said[0][0].strip().splitlines()[-1])
    return {f"{name}_gb_per_second": speed / 1e9 for name, speed in speeds.items()}


def _inside_rank(ranks: int, port: int, rank: int) -> None:
    """One process of `inside`; prints what it measured."""
    devices = _devices()
    cpu = devices[0].type == "cpu"
    with _group(devices[0] if cpu else devices[rank], f"tcp://127.0.0.1:{port}", rank, ranks) as device:
        print(json.dumps(_collectives(device, LINK_BYTES if cpu else COPY_BYTES)))


def _copy_seconds(to: torch.Tensor, source: torch.Tensor) -> float:
    return _best(lambda: to.copy_(source, non_blocking=True), to.device)


def _cards_under_load(devices: list[torch.device]) -> dict[str, Any]:
    """What nvidia-smi holds against the accelerators while they work, and the slowest one's clock (MHz)."""
    if shutil.which("nvidia-smi") is None:
        return {"health": []}
    squares = [torch.randn(8 * MATMUL, 8 * MATMUL, device=device, dtype=torch.bfloat16) for device in devices]
    began = time.perf_counter()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(lambda: next((rows for name in REASONS if (rows := smi(health_query(name)))), []))
        while time.perf_counter() - began < LOAD_SECONDS and not asked.done():
            for square in squares:
                torch.matmul(square, square)
            for device in devices:
                torch.accelerator.synchronize(device)
        return read_cards(asked.result())


def health_query(reasons: str) -> str:
    """The question to nvidia-smi whose rows `read_cards` takes; reasons: this driver's name of them."""
    return f"--query-gpu={_HEALTH.format(reasons)}"


def read_cards(rows: list[list[str]]) -> dict[str, Any]:
    """`health` and `clock_mhz` from nvidia-smi's rows; what a card does not tell is left out."""
    cards = [row for row in rows if len(row) == 1 + _HEALTH.count(",")]
    if not cards:
        return {"health": ["nvidia-smi does not tell the accelerators' health"]}
    health, clocks = [], []
    for number, (errors, degrees, clock, slow, hot) in enumerate(cards):
        if errors.isdecimal() and int(errors):
            health.append(f"accelerator {number}: {errors} uncorrected memory errors")
        if "Active" in (slow, hot):
            health.append(f"accelerator {number}: throttled by its hardware at {degrees} °C")
        if clock.isdecimal():
            clocks.append(float(clock))
    return {"health": health, **({"clock_mhz": min(clocks)} if clocks else {})}


def unreadable(data_path: Path) -> list[str]:
    """What keeps the dataset from being opened here: a shard that is missing, cut off or not the manifest's."""
    # Asks for the tokenizer's packages, which a look at the accelerators does not need.
    from data_prep.dataset import Dataset

    try:
        Dataset.open(data_path)
    except DataError as error:
        return [str(error)]
    return []


def _pair(address: str, port: int, rank: int, interface: str | None) -> dict[str, Any]:
    """Bandwidth of all-reduce and all-to-all between two nodes, in Gbit/s of what one of them sends."""
    if interface is not None:
        os.environ |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
    with _group(_devices()[0], f"tcp://{address}:{port}", rank, 2) as device:
        return {f"{name}_gbit": 8e-9 * speed for name, speed in _collectives(device, LINK_BYTES).items()}


@contextlib.contextmanager
def _group(device: torch.device, address: str, rank: int, ranks: int) -> Iterator[torch.device]:
    """The default process group over `ranks` processes, each on its device."""
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)
    backend, patience = dist.get_default_backend_for_device(device), datetime.timedelta(seconds=LINK_SECONDS)
    dist.init_process_group(backend, init_method=address, rank=rank, world_size=ranks, timeout=patience)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def _collectives(device: torch.device, size: int) -> dict[str, float]:
    """Bytes a second that each rank must send, as a ring sends them: nccl-tests' bus bandwidth. size: bytes a rank."""
    ranks = dist.get_world_size()
    block = torch.ones(size // 4 // ranks * ranks, device=device)
    other = torch.empty_like(block)
    share = 4 * block.numel() * (ranks - 1) / ranks
    reduce = _best(lambda: dist.all_reduce(block), device)
    exchange = _best(lambda: dist.all_to_all_single(other, block), device)
    return {"all_reduce": 2 * share / reduce, "all_to_all": share / exchange}


def _best(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest of some repeats, after one that does not count."""
    seconds = []
    for _ in range(1 + REPEATS):
        began = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
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


def _devices() -> list[torch.device]:
    """This node's accelerators, or the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is None:
        return [torch.device("cpu")]
    return [torch.device(found.type, number) for number in range(torch.accelerator.device_count())]


if __name__ == "__main__":
    _inside_rank(*(int(word) for word in sys.argv[1:]))
