"""What the launcher reads and writes in the run folder: faults in events.jsonl, the job's state in launch.json."""

import json
import os
import time
from pathlib import Path
from typing import Any

from data_prep.errors import DataError
from data_prep.files import write_json
from train.run_folder import read_log

STATE_FILE = "launch.json"


class Records:
    """One job's records. A full disk only delays them: what could not be written is tried again with the next."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._unwritten: list[str] = []
        self._state: dict[str, Any] = {}

    def event(self, kind: str, seen: str, action: str, **more: Any) -> None:
        """Append to events.jsonl, as the trainer does; only between attempts, or for what no rank writes about."""
        step, samples = last_step(self._run_dir)
        now = time.time()
        record = {"id": f"{kind}-{now:.0f}", "time": round(now, 3), "step": step, "from_sample": samples}
        self._unwritten.append(
            json.dumps({**record, "kind": kind, "seen": seen, "action": action, **more}, ensure_ascii=False) + "\n"
        )
        self.flush()

    def state(self, **values: Any) -> None:
        """Set parts of launch.json."""
        self._state |= values
        self.flush()

    def flush(self) -> None:
        """Write what waits, where the disk lets us."""
        try:
            write_json(self._run_dir / STATE_FILE, {"time": time.time(), **self._state})
            while self._unwritten:
                line = self._unwritten[0].encode()
                descriptor = os.open(self._run_dir / "events.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
                try:
                    before = os.fstat(descriptor).st_size
                    if os.write(descriptor, line) < len(line):
                        os.ftruncate(descriptor, before)
                        return
                finally:
                    os.close(descriptor)
                self._unwritten.pop(0)
        except (DataError, OSError):
            return


def last_step(run_dir: Path) -> tuple[int, int]:
    """Step and consumed samples of the last line of metrics.jsonl; zeros without one."""
    try:
        records = read_log(run_dir / "metrics.jsonl")
    except DataError:
        return 0, 0
    return (int(records[-1]["step"]), int(records[-1]["consumed_samples"])) if records else (0, 0)


def newest_checkpoint(run_dir: Path) -> int:
    """Step of the newest committed checkpoint, 0 without one."""
    names = [path.name.removeprefix("step_") for path in (run_dir / "checkpoints").glob("step_*")]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def checkpoint_bytes(run_dir: Path) -> int:
    """Size of the newest checkpoint, 0 without one."""
    step = newest_checkpoint(run_dir)
    folders = [path for path in (run_dir / "checkpoints").glob("step_*") if path.name.endswith(f"{step:08d}")]
    return sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())
