"""What a node says of itself before it may train: versions, code, interfaces, accelerators, folders, its clock."""

import hashlib
import platform
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil

from data_prep.versions import installed

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("configs", "data_prep", "kernels", "launch", "train")
PACKAGES = ("torch", "deepspeed", "numpy", "triton", "hydra-core", "omegaconf", "sentencepiece", "safetensors")
_SMI_SECONDS = 20.0


def facts(*, run_dir: str, data_path: str, nonce: str, port: int) -> dict[str, Any]:
    """What the supervisor compares between nodes.

    run_dir, data_path: as the ranks will open them. nonce: content of the file that the supervisor has put into
    run_dir. port: the rendezvous', 0 for any.
    """
    return {
        "host": socket.gethostname(),
        "time": time.time(),
        "python": platform.python_version(),
        "packages": versions(),
        "code": code_digest(),
        "interfaces": interfaces(),
        "accelerators": accelerators(),
        "cores": psutil.cpu_count() or 1,
        "memory_bytes": psutil.virtual_memory().total,
        "sees_run_dir": _content(Path(run_dir) / nonce_name(nonce)) == nonce,
        "sees_data": (Path(data_path) / "manifest.json").is_file(),
        "manifest": _sha256(Path(data_path) / "manifest.json"),
        "port_taken_by": port_taken_by(port) if port else None,
    }


def nonce_name(nonce: str) -> str:
    """Name of the file by which the nodes know the run folder."""
    return f".seen-{nonce[:8]}"


def versions() -> dict[str, str]:
    """Installed versions of the packages that all nodes must share."""
    return dict.fromkeys(PACKAGES, "missing") | installed(PACKAGES)


def code_digest() -> str:
    """Twelve digits that differ when any source or config file of this checkout does."""
    digest = hashlib.sha256()
    for path in code_files():
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def code_files() -> list[Path]:
    """The files that a node needs to train: sources and configs, no tests, no corpus."""
    found = [path for room in ROOMS for path in (ROOT / room).rglob("*") if path.suffix in (".py", ".yaml")]
    return sorted(path for path in found if "__pycache__" not in path.parts)


def interfaces() -> dict[str, list[str]]:
    """Network interfaces that are up, with their IPv4 addresses."""
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    return {
        name: [entry.address for entry in entries if entry.family == socket.AF_INET]
        for name, entries in psutil.net_if_addrs().items()
        if name in up
    }


def interface_of(address: str) -> str | None:
    """The interface that holds an address."""
    return next((name for name, addresses in interfaces().items() if address in addresses), None)


def accelerators() -> list[dict[str, Any]]:
    """NVIDIA's accelerators with driver, memory in use (MiB) and other processes on them; empty without nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return []
    cards = smi("--query-gpu=uuid,name,driver_version,memory.used,memory.total")
    apps = smi("--query-compute-apps=gpu_uuid,pid,process_name")
    return [
        {
            "name": name,
            "driver": driver,
            "used_mib": _number(used),
            "total_mib": _number(total),
            "processes": [f"{app[1]} ({app[2]})" for app in apps if len(app) == 3 and app[0] == uuid],
        }
        for uuid, name, driver, used, total in (card for card in cards if len(card) == 5)
    ]


def smi(query: str) -> list[list[str]]:
    """Rows of one question to nvidia-smi; empty where it fails."""
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [[part.strip() for part in line.split(",")] for line in done.stdout.splitlines() if line.strip()]


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def port_taken_by(port: int) -> str | None:
    """Who keeps a port from being listened on; None when it is free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            for connection in psutil.net_connections("tcp"):
                if connection.laddr and connection.laddr.port == port and connection.pid:
                    return f"process {connection.pid} ({psutil.Process(connection.pid).name()})"
            return "another process"
    return None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def _content(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def _sha256(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    except OSError:
        return None
