"""The stages of a preparation on one of datatrove's executors: this machine, a Slurm cluster, or a Ray cluster.

A finished rank leaves a marker in `.work/logs/<stage>/completions/`; a rerun does the ranks without one.
"""

import ctypes
import importlib.util
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import multiprocess
from datatrove.executor.base import PipelineExecutor
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.ray import RayPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from loguru import logger

from data_prep.config import DataConfig
from data_prep.errors import ConfigError
from data_prep.steps.clean import clean_steps
from data_prep.steps.decide import Decide
from data_prep.steps.finish import Finish
from data_prep.steps.match import Match, ranks_of
from data_prep.steps.tokenise import Learn, Tokenise
from data_prep.steps.work import Work

Progress = Callable[[str, int, int], None]
"""Called with the stage, the work done and the work in all."""
SMALL_BYTES = 32 * 2**20
"""Input under which another process costs more than it saves."""
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Stage:
    """Steps that each of `ranks` ranks runs; a stage starts when the one before is complete."""

    name: str
    title: str
    steps: list[PipelineStep]
    ranks: int


def stages_of(work: Work) -> list[Stage]:
    """All stages of a preparation; the number of ranks of each is known before anything has run."""
    tasks = len(work.tasks)
    found = [Stage("clean", "read and clean", clean_steps(work), tasks)]
    if ranks_of(work):
        found.append(Stage("match", "find duplicates", [Match(work)], ranks_of(work)))
    return [
        *found,
        Stage("decide", "decide", [Decide(work)], 1),
        Stage("learn", "train the tokenizer", [Learn(work)], 1),
        Stage("tokenise", "tokenise", [Tokenise(work)], tasks),
        Stage("finish", "finish", [Finish(work)], 1),
    ]


def check_machine(data: DataConfig) -> None:
    """Raise ConfigError where this machine lacks what the configured executor or cleaning needs."""
    config = data.pipeline
    if data.cleaning.simplify and importlib.util.find_spec("opencc") is None:
        raise ConfigError(
            "data.cleaning.simplify=true needs the package OpenCC, which is not installed: pip install opencc"
        )
    if config.executor == "slurm" and shutil.which("sbatch") is None:
        raise ConfigError(
            "data.pipeline.executor=slurm needs Slurm's sbatch, which is not on this machine's PATH; "
            "start it on a login node, or use data.pipeline.executor=local"
        )
    if config.executor == "slurm" and not config.partition:
        raise ConfigError("data.pipeline.executor=slurm needs data.pipeline.partition=NAME (sinfo lists them)")
    if config.executor == "ray" and importlib.util.find_spec("ray") is None:
        raise ConfigError(
            "data.pipeline.executor=ray needs the package ray, which is not installed; pip install ray, "
            "or use data.pipeline.executor=local"
        )


def run_stages(work: Work, progress: Progress) -> bool:
    """Run every stage, or under Slurm submit them as array jobs that wait for one another.

    Returns whether they are complete now. Raises what a step raised.
    """
    config = work.config.data.pipeline
    if config.executor == "slurm":
        executor: SlurmPipelineExecutor | None = None
        for stage in stages_of(work):
            executor = _slurm(work, stage, executor)
        assert executor is not None
        executor.run()
        return False
    for stage in stages_of(work):
        executor_ = _local(work, stage) if config.executor == "local" else _ray(work, stage)
        with _watched(work, stage, progress):
            executor_.run()
        missing = executor_.get_incomplete_ranks(skip_completed=True)
        if missing:
            raise ConfigError(
                f"data.pipeline.executor={config.executor}: {len(missing)} of {stage.ranks} pieces of stage "
                f"{stage.name} failed; {_logs(work, stage) / 'logs'} says why; the same command does what is missing"
            )
    return True


class _Quiet(LocalPipelineExecutor):
    """The local executor without its messages, whose ranks end with the process that started them."""

    def run(self) -> Any:
        """One worker runs in this process; datatrove would start a manager process for it."""
        logger.disable("datatrove")
        if self.workers > 1:
            return super().run()
        for rank in self.get_incomplete_ranks():
            # Each rank has steps of its own, and so statistics of its own.
            deepcopy(self)._run_for_rank(rank)
        return None

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        logger.disable("datatrove")
        if multiprocess.parent_process() is not None:
            # SIGKILL of the parent must not leave a worker that writes on; Ctrl-C is the parent's to handle.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            if sys.platform == "linux":
                ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        return super()._run_for_rank(rank, local_rank, node_rank)


def _logs(work: Work, stage: Stage) -> Path:
    return work.folder / ".work" / "logs" / stage.name


def _local(work: Work, stage: Stage) -> PipelineExecutor:
    workers = work.config.data.pipeline.workers
    if workers is None:
        size = sum(path.stat().st_size for source in work.tasks for path in source.files)
        unknown = any(source.hub is not None for source in work.tasks)
        workers = (os.cpu_count() or 1) if unknown or size >= SMALL_BYTES else 1
    return _Quiet(
        stage.steps, tasks=stage.ranks, workers=min(workers, stage.ranks), logging_dir=str(_logs(work, stage))
    )


def _slurm(work: Work, stage: Stage, before: SlurmPipelineExecutor | None) -> SlurmPipelineExecutor:
    config = work.config.data.pipeline
    here = Path(__file__).resolve().parent.parent
    return SlurmPipelineExecutor(
        stage.steps,
        tasks=stage.ranks,
        workers=config.workers or -1,
        time=config.time_limit,
        partition=config.partition,
        cpus_per_task=config.cpus_per_task,
        mem_per_cpu_gb=-(-config.memory_gb // config.cpus_per_task),
        job_name=f"data_prep-{stage.name}",
        qos=config.sbatch.get("qos", ""),
        sbatch_args={name: value for name, value in config.sbatch.items() if name != "qos"},
        # The jobs run with this command's interpreter and code, whatever their shell finds.
        env_command=f'export PATH="{Path(sys.executable).parent}:$PATH" PYTHONPATH="{here}:$PYTHONPATH"',
        logging_dir=str(_logs(work, stage)),
        depends=before,
    )


def _ray(work: Work, stage: Stage) -> PipelineExecutor:
    config = work.config.data.pipeline
    return RayPipelineExecutor(
        stage.steps,
        tasks=stage.ranks,
        workers=config.workers or -1,
        cpus_per_task=config.cpus_per_task,
        mem_per_cpu_gb=config.memory_gb / config.cpus_per_task,
        logging_dir=str(_logs(work, stage)),
    )


@contextmanager
def _watched(work: Work, stage: Stage, progress: Progress) -> Iterator[None]:
    """Reports how many ranks of a stage are complete while the block runs."""
    markers, done = _logs(work, stage) / "completions", threading.Event()

    def report() -> None:
        progress(stage.title, len(os.listdir(markers)) if markers.is_dir() else 0, stage.ranks)

    def watch() -> None:
        while not done.wait(_POLL_SECONDS):
            report()

    report()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        report()
