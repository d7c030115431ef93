"""One live run a folder: a lock that dies with its process.

The kernel's lock on the file is the proof on one machine. Across machines it is none: some shared file systems do not
pass it on, others keep the lock of a host that died until its lease runs out. So the holder also touches the file every
few seconds, and it is this that counts for another host's lock: one that is touched is refused, one that is not is
watched for a while, or until the file system gives it up, and taken over.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
from pathlib import Path

import psutil

from data_prep.errors import DataError
from data_prep.files import write_error

logger = logging.getLogger(__name__)

BEAT_SECONDS = 10.0
"""How often a holder touches its lock."""
WATCH_SECONDS = 25.0
"""How long another host's lock is watched for a sign of life, at least …"""
LEASE_SECONDS = 180.0
"""… and how long a file system may hold the lock of a host that is gone; NFSv4 and Lustre take about 90 s."""
ORPHAN_SECONDS = 15.0
"""How long the workers of a killed run may keep its lock: they inherit it, and notice their parent's end late."""


class RunLock:
    """The lock file of a run folder, held from `RunLock(path)` to `close()` or the end of the process."""

    def __init__(self, path: Path) -> None:
        """Take the lock. Raises DataError naming process and host when a live run holds it."""
        self._path = path
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise write_error(path, error) from error
        try:
            self._take()
        except BaseException:
            os.close(self._descriptor)
            raise
        self._stop = threading.Event()
        self._beat = threading.Thread(target=self._touch, name="run-lock", daemon=True)
        self._beat.start()

    def close(self) -> None:
        """Give the lock back; the empty file stays, so that no one locks a file that is being removed."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._beat.join()
        os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)

    def _take(self) -> None:
        began, touched = time.monotonic(), self._touched()
        said = False
        while True:
            # In this order: a holder that leaves empties the file, which is no sign of life.
            moved = self._touched() != touched
            locked, holder = self._try_kernel_lock(), self._read()
            waited = time.monotonic() - began
            # An empty file whose lock is held is another host's that comes or goes at this moment.
            foreign = holder.get("host") != socket.gethostname() and bool(holder or not locked)
            if foreign and holder and moved:
                raise self._refusal(holder)
            if locked and (not foreign or waited >= WATCH_SECONDS):
                break
            if not locked and waited >= (LEASE_SECONDS if foreign else ORPHAN_SECONDS):
                raise self._refusal(holder)
            if not foreign and _lives(holder):
                raise self._refusal(holder)
            if foreign and not said:
                logger.warning("%s: %s; waiting to see whether it lives", self._path, _who(holder))
                said = True
            time.sleep(min(0.2, WATCH_SECONDS))
        content = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": _started(os.getpid())})
        try:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, content.encode() + b"\n", 0)
            os.fsync(self._descriptor)
        except OSError as error:
            raise write_error(self._path, error) from error

    def _try_kernel_lock(self) -> bool:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK):
                raise write_error(self._path, error) from error
            # A file system without locks: what the file says has to do.
            holder = self._read()
            return not (holder.get("host") == socket.gethostname() and _lives(holder))
        return True

    def _read(self) -> dict[str, object]:
        try:
            holder = json.loads(os.pread(self._descriptor, 4096, 0) or b"{}")
        except ValueError:
            return {}
        return holder if isinstance(holder, dict) else {}

    def _touched(self) -> int:
        """When the file was last touched."""
        return self._path.stat().st_mtime_ns

    def _refusal(self, holder: dict[str, object]) -> DataError:
        return DataError(
            f"{self._path}: {_who(holder)} is running in this folder; stop it, or choose another run_dir for this run"
        )

    def _touch(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            try:
                os.utime(self._descriptor)
            except OSError:  # a full or vanished disk shows where something is written
                continue


def _who(holder: dict[str, object]) -> str:
    return f"process {holder.get('pid', 'unknown')} on {holder.get('host', 'an unknown host')}"


def _lives(holder: dict[str, object]) -> bool:
    """Whether the process still runs; its start time tells it from a later one with the same number."""
    pid = holder.get("pid")
    if not isinstance(pid, int):
        return False
    return _started(pid) is not None and _started(pid) == holder.get("started")


def _started(pid: int) -> float | None:
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else round(process.create_time(), 2)
    except psutil.Error:
        return None
