"""Weights & Biases beside the run, never in its way.

All calls to wandb happen in a thread of their own behind a bounded queue: a slow network, a missing key or a bug there
costs at most the curves on the web site. The run folder holds the same numbers.
"""

import logging
import queue
import secrets
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from train.run_folder import finite

log = logging.getLogger(__name__)

QUEUE_RECORDS = 10_000
"""Records that may wait; more are dropped, with a warning."""
CLOSE_SECONDS = 30.0
"""How long the end of a run waits for the upload."""


class WandbObserver:
    """Sends records to wandb. Use `start`: it gives None for logging.wandb=disabled."""

    def __init__(
        self,
        mode: str,
        *,
        project: str,
        run_dir: Path,
        config: dict[str, Any],
        make_run: Callable[..., Any] | None = None,
    ) -> None:
        """mode: online or offline. config: shown beside the run. make_run: stands in for wandb in tests."""
        self._make_run = partial(make_run or _make_run, mode, project=project, run_dir=Path(run_dir), config=config)
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(QUEUE_RECORDS)
        self._failed = False
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    @classmethod
    def start(cls, mode: str, *, project: str, run_dir: Path, config: dict[str, Any]) -> "WandbObserver | None":
        """The observer for logging.wandb, or None when it is disabled."""
        return None if mode == "disabled" else cls(mode, project=project, run_dir=run_dir, config=config)

    def on_steps(self, records: list[dict[str, Any]]) -> None:
        """Curves under `train/`, loss by group under `train/loss_by_group/`."""
        for record in records:
            self._put("log", flat(record, "train/"))

    def on_validation(self, record: dict[str, Any]) -> None:
        """Curves under `validation/`."""
        self._put("log", flat(record, "validation/"))

    def on_tasks(self, record: dict[str, Any]) -> None:
        """Curves under `tasks/`."""
        self._put("log", flat(record, "tasks/"))

    def on_event(self, record: dict[str, Any]) -> None:
        """An alert with the event's kind."""
        self._put("event", record)

    def close(self, status: str) -> None:
        """Finish the upload, waiting no longer than `CLOSE_SECONDS`."""
        self._put("close", status)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._fail("it did not finish in time")

    def _put(self, word: str, content: Any) -> None:
        if self._failed:
            return
        try:
            self._queue.put_nowait((word, content))
        except queue.Full:
            self._fail("it does not keep up")

    def _fail(self, reason: object) -> None:
        if not self._failed:
            self._failed = True
            log.warning("wandb is off for the rest of this run: %s; metrics.jsonl has everything", reason)

    def _work(self) -> None:
        try:
            run = self._make_run()
            while not self._failed:
                word, content = self._queue.get()
                if word == "log":
                    run.log(content)
                elif word == "event":
                    run.alert(title=str(content.get("kind")), text=str(content))
                else:
                    run.finish(exit_code=0 if content in ("done", "stopped") else 1)
                    return
        except BaseException as error:
            # wandb raises its own errors, the network's, and SystemExit; none of them may reach the run.
            self._fail(f"{type(error).__name__}: {error}".splitlines()[0])


def flat(record: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Nested numbers under joined names, without nulls; `step` keeps its name, it is every curve's axis."""
    result: dict[str, Any] = {}
    for key, value in finite(record).items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{key}/")
        elif value is not None:
            result["step" if key == "step" else prefix + key] = value
    return result


def _make_run(mode: str, *, project: str, run_dir: Path, config: dict[str, Any]) -> Any:
    import wandb  # 0.8 s, and only some runs use it

    if mode == "online" and not wandb.login(prompt=False, verify=False):
        raise RuntimeError("no API key; run `wandb login`, or set logging.wandb=offline")
    name_file = run_dir / "wandb" / "id.txt"
    # One id a run folder: a resumed run goes on in the same curves.
    if name_file.exists():
        run_id = name_file.read_text().strip()
    else:
        run_id = secrets.token_hex(4)
        name_file.parent.mkdir(parents=True, exist_ok=True)
        name_file.write_text(run_id)
    run = wandb.init(
        project=project,
        name=run_dir.name,
        dir=str(run_dir),
        id=run_id,
        resume="allow",
        mode="online" if mode == "online" else "offline",
        config=config,
        # Its capture of the console and its own messages would disturb the live line.
        settings=wandb.Settings(console="off", silent=True, init_timeout=60, finish_timeout=CLOSE_SECONDS),
    )
    # The step is a value, not wandb's counter: after a roll-back steps come again.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    log.info("wandb: %s", run.url if mode == "online" else f"{run.dir} (offline; `wandb sync` uploads it)")
    return run
