"""The files of a run folder: who may write there, what stays when a run is killed, what a resume moves aside.

    config.yaml, config.attempt-K.yaml   resolved config of the first and of each later attempt
    environment.json                     versions, device, git revision and command of the newest attempt
    lock                                 held while a run lives (`train.run_lock`)
    metrics.jsonl, validation.jsonl      one object a step
    tasks.jsonl                          the same, for evaluation.tasks
    events.jsonl                         what happened, append-only
    discarded/                           lines that a resume or a roll-back took out, and torn ends of files

Only rank 0 opens it. Every line is written whole in one call, so that a killed process leaves at most one torn line;
it is moved aside by the next attempt.
"""

import json
import math
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_prep.errors import ConfigError, DataError
from data_prep.files import sync_folder, write_bytes, write_error, write_json
from data_prep.versions import installed
from train.run_lock import RunLock

LOGS = ("metrics", "validation", "tasks", "events")
"""Names that `append` and `read` take."""
REWOUND = ("metrics", "validation", "tasks")
"""Logs whose lines beyond a step are moved aside by `rewind`; events are never taken back."""

COMMAND_VARIABLE = "TIANKONG_COMMAND"
"""Set by the launcher to the command the user typed, for its ranks to quote."""
JOB_VARIABLE = "TIANKONG_JOB"
"""Set by the launcher to a word that all attempts of a job share, restarts by Slurm and Kubernetes among them."""
_ONCE = ("resume.step=", "resume.enabled=")
"""What a user says about a run folder as it is when the job is launched: obeyed by the job's first attempt alone."""

_PACKAGES = ("tiankong", "torch", "deepspeed", "triton", "numpy", "hydra-core", "sentencepiece", "wandb")


class RunFolder:
    """A run folder that this process owns; made by `open`."""

    def __init__(self, path: Path, lock: RunLock, attempt: int) -> None:
        self.path = path
        self.attempt = attempt
        """1 for a new run, one more each time it is resumed."""
        self._lock = lock
        self._logs: dict[str, int] = {}
        self._closed = False

    @classmethod
    def open(cls, path: str | Path, *, resume: bool) -> "RunFolder":
        """Take the folder for this process, making it if it is missing, and repair the torn end of a killed run.

        resume: whether an existing run may be continued; a restart continues its own in any case. Raises ConfigError
        when it may not and there is one, DataError when another live process runs there or nothing can be written.
        """
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise ConfigError(f"run_dir={path} is a file; give a folder")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(path, error) from error
        lock = RunLock(path / "lock")
        try:
            attempt = _next_attempt(path)
            if not resume and holds_run(path) and not is_restart(path):
                raise ConfigError(
                    f"run_dir={path} already holds a run and resume.enabled=false; "
                    "set resume.enabled=true to continue it, or give another run_dir"
                )
            folder = cls(path, lock, attempt)
            for name in LOGS:
                folder._open_log(name)
        except BaseException:
            lock.close()
            raise
        return folder

    def write_config(self, yaml_text: str) -> Path:
        """Store this attempt's resolved config; returns its file."""
        name = "config.yaml" if self.attempt == 1 else f"config.attempt-{self.attempt}.yaml"
        write_bytes(self.path / name, yaml_text.encode())
        return self.path / name

    def write_environment(self, device: str | None = None, **facts: Any) -> None:
        """Store what this attempt runs on; earlier attempts stay under `earlier`.

        device: the accelerator's name; None means the CPU's. facts: anything else worth keeping, such as world_size.
        """
        file = self.path / "environment.json"
        earlier: list[Any] = []
        if file.exists():
            before = read_json(file)
            earlier = [*before.pop("earlier", []), before]
        environment = {
            "attempt": self.attempt,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": command_line(),
            "job": os.environ.get(JOB_VARIABLE) or None,
            "host": socket.gethostname(),
            "device": device or cpu_name(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            **facts,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "packages": installed(_PACKAGES),
            "git": git_revision(),
            "earlier": earlier,
        }
        write_json(file, finite(environment))

    def write_json(self, name: str, content: Any) -> None:
        """Atomically store `content` as the JSON file `name`; non-finite numbers become null."""
        write_json(self.path / name, finite(content))

    def append(self, name: str, records: list[dict[str, Any]]) -> None:
        """Add one line a record to the log `name` (one of LOGS). Non-finite numbers become null.

        The lines reach the operating system at once, the disk with `flush`. Raises DataError when the disk is full;
        then no part of these lines stays in the file.
        """
        if not records:
            return
        lines = "".join(json.dumps(finite(record), ensure_ascii=False) + "\n" for record in records).encode()
        descriptor = self._logs[name]
        before = os.fstat(descriptor).st_size
        try:
            written = 0
            while written < len(lines):
                written += os.write(descriptor, lines[written:])
        except OSError as error:
            os.ftruncate(descriptor, before)
            raise write_error(self._file(name), error) from error

    def flush(self) -> None:
        """Bring every appended line to the disk; called before a checkpoint that counts on them is committed."""
        for name, descriptor in self._logs.items():
            try:
                os.fsync(descriptor)
            except OSError as error:
                raise write_error(self._file(name), error) from error

    def rewind(self, step: int) -> int:
        """Move lines of metrics, validation and tasks beyond `step` to discarded/; returns how many were moved.

        They land in `discarded/<name>.attempt-K.jsonl`, K being the attempt that moves them.
        """
        return sum(self._rewind(name, step) for name in REWOUND)

    def read(self, name: str) -> list[dict[str, Any]]:
        """Every record of the log `name`."""
        return read_log(self._file(name))

    def close(self) -> None:
        """Flush, and let others have the folder. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        try:
            self.flush()
        finally:
            for descriptor in self._logs.values():
                os.close(descriptor)
            self._lock.close()

    def _file(self, name: str) -> Path:
        return self.path / f"{name}.jsonl"

    def _open_log(self, name: str) -> None:
        file = self._file(name)
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise write_error(file, error) from error
        self._logs[name] = descriptor
        whole = _end_of_last_whole_line(descriptor)
        if whole < os.fstat(descriptor).st_size:
            self._cut(name, whole, f"{name}.attempt-{self.attempt}.torn")

    def _rewind(self, name: str, step: int) -> int:
        descriptor = self._logs[name]
        cut, moved = os.fstat(descriptor).st_size, 0
        for start, line in _lines_backwards(descriptor):
            if json.loads(line).get("step", 0) <= step:
                break
            cut, moved = start, moved + 1
        if moved:
            self._cut(name, cut, f"{name}.attempt-{self.attempt}.jsonl")
        return moved

    def _cut(self, name: str, offset: int, aside: str) -> None:
        """Move everything from `offset` on to discarded/; killed in between, the lines are in both places."""
        descriptor, folder = self._logs[name], self.path / "discarded"
        try:
            folder.mkdir(exist_ok=True)
            with open(folder / aside, "ab", buffering=0) as file:
                before, position = os.fstat(file.fileno()).st_size, offset
                try:
                    while chunk := os.pread(descriptor, 1 << 20, position):
                        # A nearly full disk may take a part of it; the next round then meets the error.
                        position += file.write(chunk)
                    os.fsync(file.fileno())
                except OSError:
                    os.ftruncate(file.fileno(), before)
                    raise
            sync_folder(folder)
        except OSError as error:
            raise write_error(folder / aside, error) from error
        os.ftruncate(descriptor, offset)
        os.fsync(descriptor)


def holds_run(path: str | Path) -> bool:
    """Whether a folder already holds a run: a config, a metric or a checkpoint."""
    path = Path(path)
    metrics, checkpoints = path / "metrics.jsonl", path / "checkpoints"
    return (
        (path / "config.yaml").exists()
        or (metrics.exists() and metrics.stat().st_size > 0)
        or (checkpoints.is_dir() and any(checkpoints.iterdir()))
    )


def is_restart(path: str | Path, job: str | None = None) -> bool:
    """Whether an attempt of the same job has begun to train in this folder, and so has obeyed resume.step.

    job: its word; by default the one that this process got from its launcher. Without a launcher nothing is a restart.
    """
    job, file = job or os.environ.get(JOB_VARIABLE), Path(path) / "environment.json"
    if not job or not file.exists():
        return False
    newest = read_json(file)
    return any(attempt.get("job") == job for attempt in (newest, *newest.get("earlier", [])))


def read_log(file: Path) -> list[dict[str, Any]]:
    """Records of a log, of a live run too: a last line that is still being written is left out.

    A missing file reads as empty. Raises DataError naming file and line for any other line that is not an object.
    """
    if not file.exists():
        return []
    records = []
    lines = file.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            if number == len(lines) - 1:
                break
            raise DataError(f"{file}: line {number} is not a JSON object; remove it or restore the file")
        records.append(record)
    return records


def read_json(file: Path) -> Any:
    """Content of a JSON file. Raises DataError naming it when it is missing or damaged."""
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read as JSON ({error})") from error


def finite(value: Any) -> Any:
    """`value` with non-finite floats as None, numbers of numpy and torch as Python's, all the way down."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item"):
        return finite(value.item())
    raise TypeError(f"a record holds {value!r}, which is not JSON")


def command_line() -> str:
    """The command the user typed, as a line for a shell; the launcher's, where it started this process."""
    if COMMAND_VARIABLE in os.environ:
        return os.environ[COMMAND_VARIABLE]
    # Hydra's entry point rewrites sys.argv.
    words = list(sys.orig_argv)
    return shlex.join([Path(words[0]).name, *words[1:]])


def resume_command() -> str:
    """`command_line` for going on with a run that has obeyed resume.step and resume.enabled: without these words."""
    command = command_line()
    words = shlex.split(command)
    kept = [word for word in words if not word.lstrip("+").startswith(_ONCE)]
    return command if kept == words else shlex.join(kept)


def git_revision() -> str | None:
    """Commit of the checkout this code runs from, `+changes` where files differ; None outside a checkout."""
    here = Path(__file__).resolve().parent.parent
    try:
        commit = _git(here, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def cpu_name() -> str:
    """Model name of this machine's processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.strip()


def _next_attempt(path: Path) -> int:
    numbers = [1] if (path / "config.yaml").exists() else []
    for file in path.glob("config.attempt-*.yaml"):
        number = file.stem.removeprefix("config.attempt-")
        numbers += [int(number)] if number.isdecimal() else []
    return max(numbers, default=0) + 1


def _end_of_last_whole_line(descriptor: int) -> int:
    """Bytes up to the end of the last line that is a JSON object. A power cut may leave zeros behind it."""
    for start, line in _lines_backwards(descriptor):
        try:
            if line.endswith(b"\n") and isinstance(json.loads(line), dict):
                return start + len(line)
        except ValueError:
            continue
    return 0


def _lines_backwards(descriptor: int, block: int = 1 << 16) -> Iterator[tuple[int, bytes]]:
    """(offset, line with its newline) from the last line of a file to the first, without reading all of it."""
    position = os.fstat(descriptor).st_size
    tail = b""
    while position > 0:
        start = max(0, position - block)
        tail = os.pread(descriptor, position - start, start) + tail
        position = start
        while (newline := tail.rfind(b"\n", 0, len(tail) - 1)) >= 0:
            yield position + newline + 1, tail[newline + 1 :]
            tail = tail[: newline + 1]
    if tail:
        yield 0, tail
