"""Saving while training goes on.

    start   a thread copies this rank's pieces to host memory and writes them to files; the next update of the weights
            waits for the copy, the forward and backward passes before it do not
    poll    after each step: have all ranks written? then rank 0's thread commits: manifest, name, `latest`
    finish  wait for both; before the run ends, and before the next save if the disk is slower than the training

Threads never talk to other ranks: their collectives would mix with the training step's. That all shards are whole is
agreed on by the main threads, in one small host message a step while a save is under way; the commit begins on rank 0
after each rank's main thread has handed over the sizes and checksums of its finished files. A rank that failed to write
hands over its error instead, and every rank raises it at that step.
"""

import logging
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Self

from data_prep.errors import DataError, RankFailed, RunFailed
from train.checkpoint import write
from train.checkpoint.select import step_folder
from train.checkpoint.staging import Pieces, Staging
from train.collective import any_rank, gather, on_rank_zero, together
from train.config import SavingConfig
from train.engine import Engine
from train.progress import waiting_for_a_thread

logger = logging.getLogger(__name__)


class Saver:
    """The checkpoints of one run; every rank makes one and calls its methods at the same steps."""

    def __init__(
        self,
        engine: Engine,
        run_dir: Path,
        config: SavingConfig,
        *,
        config_yaml: str,
        tokenizer: Path,
        before_commit: Callable[[], None],
    ) -> None:
        """before_commit: brings to the disk what a checkpoint counts on; called on rank 0, in the thread."""
        self.engine, self.run_dir, self.config = engine, run_dir, config
        self._config_yaml, self._tokenizer = config_yaml, tokenizer
        self._before_commit = before_commit
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._staging = Staging(engine)
        self._thread.submit(self._staging.prepare, self._staging.pieces())
        engine.before_change = self._wait_for_copy
        self._state: dict[str, Any] = {}
        self._copy: Future[Pieces] | None = None
        self._files: Future[Any] | None = None
        self._commit: Future[None] | None = None

    def __enter__(self) -> Self:
        """Inside, saves may be under way."""
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Wait for a save under way, at the end and after a failure that all ranks raise together."""
        if error is None or (isinstance(error, RunFailed) and not isinstance(error, RankFailed)):
            self.finish()

    def start(self, state: dict[str, Any]) -> None:
        """Begin to save the step in hand. state: what `trainer_state.json` keeps, with the step.

        Returns at once, or with saving.asynchronous=false when the checkpoint is whole. Raises DataError on every rank
        where this save's folder cannot be made or the save before it failed.
        """
        begun = time.perf_counter()
        waits = self.finish() and self.config.asynchronous
        waited = time.perf_counter() - begun
        if waits and waited > 0.5 and self.engine.mesh.rank == 0:
            logger.warning(
                "step %d waited %.1f s for the save before it: the disk is slower than saving.every_steps=%d wants",
                state["step"],
                waited,
                self.config.every_steps,
            )
        self._state = state
        on_rank_zero(self.engine.mesh, lambda: write.make_folders(self._partial))
        self._copy = self._thread.submit(self._staging.copy, self._staging.pieces())
        self._files = self._thread.submit(self._written, self._copy)
        if not self.config.asynchronous:
            self.finish()

    def poll(self) -> None:
        """Move a save that is under way along. Raises DataError, on every rank, where any rank could not write."""
        work = self._commit or self._files
        if work is not None and not any_rank(self.engine.mesh, not work.done()):
            self._advance()

    def finish(self) -> bool:
        """Wait until the save under way is whole; whether there was one. Raises as `poll` does."""
        waited = False
        while (work := self._commit or self._files) is not None:
            with waiting_for_a_thread():
                wait([work])
            self._advance()
            waited = True
        return waited

    def _wait_for_copy(self) -> None:
        """What the engine calls before it changes what a save may still be copying."""
        copy, self._copy = self._copy, None
        if copy is not None:
            with waiting_for_a_thread():
                wait([copy])
            self._staging.order()

    def _written(self, copy: Future[Pieces]) -> dict[str, dict[str, Any]]:
        staged = copy.result()
        self._staging.wait()
        return write.write_files(self._partial, self.engine.mesh.rank, staged)

    def _advance(self) -> None:
        """From written files to the commit, or from the commit to rest; the work is done on every rank."""
        mesh = self.engine.mesh
        files, self._files = self._files, None
        commit, self._commit = self._commit, None
        try:
            if commit is not None:
                together(mesh, commit.result)
                return
            assert files is not None
            entries = gather(mesh, together(mesh, files.result))
        except DataError:
            # `latest` still names the checkpoint before.
            if mesh.rank == 0:
                shutil.rmtree(self._partial, ignore_errors=True)
            raise
        every = {name: entry for part in entries for name, entry in part.items()}
        work: Callable[[], None] = (lambda: self._committed(every)) if mesh.rank == 0 else (lambda: None)
        self._commit = self._thread.submit(work)

    def _committed(self, files: dict[str, dict[str, Any]]) -> None:
        self._before_commit()
        write.commit(
            self.run_dir,
            self._state,
            files,
            layout={**self.engine.mesh.describe(), "zero_stage": self.engine.zero_stage},
            dtype=self.engine.config.precision.dtype,
            config_yaml=self._config_yaml,
            tokenizer=self._tokenizer,
        )
        write.prune(self.run_dir, self.config.every_steps, self.config.keep_last, self.config.keep_every)

    @property
    def _partial(self) -> Path:
        return write.partial_folder(step_folder(self.run_dir, self._state["step"]))
