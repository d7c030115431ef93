"""One live run a folder: a lock that dies with its process.

The kernel's lock on the file is the proof on one machine. Across machines not every shared file system passes it on, so
the holder also touches the file every few seconds: a lock left behind by another host is watched for a while, and
taken over only when nothing touches it any more.
"""

import errno
import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path

import psutil

from data_prep.errors import DataError
from data_prep.files import write_error

BEAT_SECONDS = 10.0
"""How often a holder touches its lock."""
WATCH_SECONDS = 25.0
"""How long another host's lock is watched for a sign of life."""
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
        deadline = time.monotonic() + ORPHAN_SECONDS
        while not self._try_kernel_lock():
            holder = self._read()
            if holder.get("host") != socket.gethostname() or _lives(holder) or time.monotonic() > deadline:
                raise self._refusal(holder)
            time.sleep(0.2)
        holder = self._read()
        if holder and holder.get("host") != socket.gethostname() and self._is_touched():
            raise self._refusal(holder)
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

    def _is_touched(self) -> bool:
        before = os.fstat(self._descriptor).st_mtime_ns
        deadline = time.monotonic() + WATCH_SECONDS
        while time.monotonic() < deadline:
            time.sleep(min(0.5, WATCH_SECONDS))
            # Through the path: network file systems refresh a file's times when it is opened.
            if self._path.stat().st_mtime_ns != before:
                return True
        return False

    def _refusal(self, holder: dict[str, object]) -> DataError:
        who = f"process {holder.get('pid', 'unknown')} on {holder.get('host', 'an unknown host')}"
        return DataError(
            f"{self._path}: {who} is running in this folder; stop it, or choose another run_dir for this run"
        )

    def _touch(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            try:
                os.utime(self._descriptor)
            except OSError:  # a full or vanished disk shows where something is written
                continue


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
