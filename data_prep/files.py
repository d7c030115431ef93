"""Files that are whole or absent: atomic writes, checksums, and a lock on a folder.

A crash, a full disk or a second process must never leave something that could be taken for a finished file.
"""

import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import xxhash

from data_prep.errors import ConfigError, DataError

_CHUNK = 1 << 20


@contextmanager
def atomic_write(path: str | Path) -> Iterator[IO[bytes]]:
    """Binary file that appears under `path` only when the block ends without an error.

    It is written beside its final place, flushed to the disk, then renamed. Raises DataError naming the path where
    the disk is full or refuses.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Atomically write `content`."""
    with atomic_write(path) as file:
        file.write(content)


def write_json(path: str | Path, content: Any) -> None:
    """Atomically write `content` as indented JSON, Chinese left readable."""
    write_bytes(path, (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode())


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_error(path: str | Path, error: OSError) -> DataError:
    """The DataError for a failed write: says what to do about a full disk."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DataError(f"{path}: the disk is full ({error.strerror}); free some space and run the same command again")
    return DataError(f"{path}: cannot be written ({error.strerror or error})")


def checksum(path: str | Path, after_chunk: Callable[[], None] = lambda: None) -> str:
    """xxh3-128 of a file's content, as hexadecimal digits. after_chunk: called each MiB."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            after_chunk()
    return digest.hexdigest()


def fingerprint(path: str | Path) -> str:
    """xxh3-128 of a file's size and of its first and last MiB: tells two inputs apart without reading terabytes."""
    size = os.path.getsize(path)
    digest = xxhash.xxh3_128(str(size).encode())
    with open(path, "rb") as file:
        digest.update(file.read(_CHUNK))
        file.seek(max(0, size - _CHUNK))
        digest.update(file.read(_CHUNK))
    return digest.hexdigest()


@contextmanager
def folder_lock(folder: str | Path) -> Iterator[None]:
    """Keep a second process out of `folder` while the block runs; the lock dies with its process.

    Raises ConfigError (key data.path) when another process holds it.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "lock", "a+")  # noqa: SIM115 - held open while the block runs
    except OSError as error:
        raise write_error(folder, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ConfigError(
                f"data.path={folder} is being written by another process ({file.read().strip() or 'unknown'}); "
                "wait for it or use another folder"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        file.flush()
        yield
        file.truncate(0)
