"""The training loop: it keeps the books and knows no model maths.

    for each step: take the micro-batches, step the engine, count the samples; now and then read the numbers, validate,
    save; stop when the last step is done or someone asks.

`run` is the whole of it. The engine owns forward, backward and update; observers show and store what happened.
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_prep.batch import Batch
from data_prep.cli import as_yaml
from data_prep.dataset import Dataset
from data_prep.errors import ConfigError, DataError, RankFailed, RunFailed, Stopped
from data_prep.order import DataPlan, mixture_plan
from data_prep.samples import Sampler
from train import backend, rules
from train.checkpoint import read, write
from train.checkpoint.pieces import PieceReader
from train.checkpoint.saver import Saver
from train.checkpoint.select import find
from train.collective import any_rank, from_rank_zero, on_rank_zero, together
from train.config import Config
from train.engine import Engine, StepNumbers, StepResult
from train.fragments import adam_steps
from train.generation.fills import fill_blanks
from train.heartbeat import Heartbeat
from train.kernel_times import KernelTimes
from train.loading import open_loader, sampler
from train.memory_use import MemoryUse
from train.mesh import Mesh
from train.model.build import DTYPES, operations
from train.observers import MetricsObserver, Observer, ProgressObserver
from train.records import Records
from train.replicas import differing_replicas
from train.resume import starting_point
from train.run_folder import RunFolder, resume_command
from train.schedule import BatchSize, RunLength, embedding_shrink, learning_rate
from train.scores import targets
from train.signals import StopRequest
from train.stability.reactions import Event, Reactions, target_of
from train.stability.roll_back import checkpoint_before
from train.task_evaluation import TaskEvaluation
from train.validation import Validation
from train.wandb_observer import WandbObserver

logger = logging.getLogger(__name__)


def main(config: Config) -> int:
    """Train as the config says; the exit status is 0 only when the last step was reached.

    Raises ConfigError, DataError, RunFailed, and Stopped after a save that a signal asked for.
    """
    heart = Heartbeat(config.run_dir, backend.global_rank(), accelerated=backend.device().type != "cpu")
    rules.check(config, world_size=backend.world_size())
    dataset = Dataset.open(config.data.path)
    rules.check_vocabulary(config, dataset.tokenizer.vocab_size)
    backend.check_precision(config.precision)
    logging.basicConfig(level=logging.INFO if backend.global_rank() == 0 else logging.ERROR, format="%(message)s")
    # A kernel that cannot run here is a setting like another: found before a run folder is made.
    operations(config, backend.device(), DTYPES[config.precision.dtype])
    heart.now("rendezvous")
    backend.start()
    heart.now("collectives")
    try:
        Trainer(config, dataset, backend.make_mesh(config), heart).run()
    finally:
        heart.close()
        backend.stop()
    return 0


class Trainer:
    """One attempt of one run."""

    def __init__(self, config: Config, dataset: Dataset, mesh: Mesh, heart: Heartbeat) -> None:
        self.config, self.dataset, self.mesh, self.heart = config, dataset, mesh, heart
        self.kernel_times = KernelTimes(config, mesh.device, heart)
        self.run_dir = Path(config.run_dir)
        self.yaml = as_yaml(config)
        self.step = 0
        self.consumed_samples = 0
        self.trained_samples = 0
        self.target_tokens = 0
        self.plan = mixture_plan(config.data.mixture)
        self.batch_size_at = BatchSize.of(config)
        self.length = RunLength.of(config)
        self.stop = StopRequest()
        self._pending: list[tuple[dict[str, Any], StepResult]] = []
        self._saved_step = -1
        self._evaluated: dict[str, int] = {}
        """The last step in validation.jsonl and tasks.jsonl."""
        self._rolls_back: Event | None = None

    def run(self) -> None:
        """Everything from start-up to the report."""
        self.folder = on_rank_zero(self.mesh, lambda: RunFolder.open(self.run_dir, resume=self.config.resume.enabled))
        self.heart.start()
        self.observers: list[Observer] = []
        status = "failed"
        try:
            self._start()
            with self.stop, self.saver:
                self._loop()
                self._read_pending()
                if self.step != self._saved_step:
                    self._save()
            # Decided by the step, which all ranks share: a signal after the last one stops nothing.
            if not self.length.reached(self.step, self.consumed_samples):
                status = "stopped"
                reason = self.stop.name or "a signal to another rank"
                raise Stopped(f"stopped by {reason} after step {self.step}; resume with: {resume_command()}")
            status = "done"
        finally:
            for observer in self.observers:
                observer.close(status)
            if status == "done":
                self._finish()
            if self.folder is not None:
                self.folder.close()

    def _loop(self) -> None:
        clock = time.perf_counter()
        for global_batch in self._micro_batches():
            step, consumed = self.step + 1, self._place_after(len(global_batch))
            for event in self.reactions.before(step, self.consumed_samples):
                self._tell(event)
            lr = learning_rate(self.config.schedule, self.config.optimizer.lr, consumed)
            lr = self.reactions.learning_rate(step, consumed, lr)
            shrink = self.reactions.shrink(step, embedding_shrink(self.config, self.consumed_samples))
            self.heart.now("step")
            try:
                with self.kernel_times.of(step):
                    result = self.engine.step(global_batch, lr, shrink)
            except RankFailed:
                raise
            except RunFailed as error:
                self._read_pending()
                self._event(self.step + 1, "loss_scale_floor", str(error))
                raise
            samples = len(global_batch) * self._samples_a_round
            self.step, self.consumed_samples = step, consumed
            self.trained_samples += samples
            record = self.records.begun(
                step,
                lr=lr,
                consumed_samples=consumed,
                trained_samples=self.trained_samples,
                samples=samples,
                seconds=time.perf_counter() - clock,
            )
            self._pending.append((record, result))
            if self.reactions.wait or self._due(self.config.logging.every_steps):
                self._read_pending()
            if self._rolls_back:
                self._roll_back()
                clock = time.perf_counter()
                continue
            if self._due(self.config.evaluation.every_steps):
                self._validate()
            if self._due(self.config.evaluation.tasks_every_steps):
                self._run_tasks()
            if self._due(self.config.parallel.compare_replicas_every_steps):
                self._compare_replicas()
            if self._due(self.config.saving.every_steps):
                self._save()
            self.saver.poll()
            # The next step's time starts here: validation and saving are not part of it.
            clock = time.perf_counter()
            self.heart.now("data", self.step)
            if any_rank(self.mesh, self.stop.name is not None) and not self.length.reached(
                self.step, self.consumed_samples
            ):
                return
        self._validate()
        self._run_tasks()

    def _start(self) -> None:
        config = self.config
        self.heart.now("checkpoint")
        found = starting_point(config, self.mesh, self.dataset, self.yaml)
        self.heart.now("engine")
        self.engine = Engine.start(config, self.mesh)
        self.reactions = Reactions(config, self.engine)
        self.memory = MemoryUse(self.engine, self.folder)
        self.heart.now("checkpoint")
        events = from_rank_zero(self.mesh, lambda: self.folder.read("events") if self.folder is not None else [])
        self._told = {event["id"] for event in events}
        self.reactions.remember(events)
        self._resume(found)
        self.saver = Saver(
            self.engine,
            self.run_dir,
            config.saving,
            config_yaml=self.yaml,
            tokenizer=self.dataset.folder / "tokenizer",
            before_commit=lambda: self.folder.flush() if self.folder is not None else None,
        )
        self.heart.now("data", self.step)
        sampler(config, self.dataset, self.plan)  # what is wrong with the data is said before anything is written
        if config.evaluation.every_steps:
            self.held_out = together(self.mesh, lambda: _held_out(config, self.dataset))
            self.validation = Validation(self.held_out, config.evaluation.samples, self.engine)
        self.tasks = TaskEvaluation(config, self.engine, self.dataset.tokenizer) if config.evaluation.tasks else None
        self.records = Records(config, self.mesh)
        on_rank_zero(self.mesh, self._start_observers)

    def _start_observers(self) -> None:
        """What rank 0 writes and shows."""
        assert self.folder is not None
        config = self.config
        device = self.records.device_name
        if self.records.utilization(1.0) is None:
            logger.warning("MFU is not shown: the peak of %s is not known", device)
        facts = {"world_size": self.mesh.world, **self.mesh.describe(), "zero_stage": config.parallel.zero_stage}
        self.folder.write_environment(None if device == "cpu" else device, **facts)
        self.folder.write_config(self.yaml)
        self.observers.append(MetricsObserver(self.folder))
        if config.logging.progress:
            self.observers.append(ProgressObserver(self.length.last_step(self.step, self.consumed_samples)))
        mode, project = config.logging.wandb, config.logging.wandb_project
        wandb = WandbObserver.start(mode, project=project, run_dir=self.run_dir, config=asdict(config))
        self.observers += [wandb] if wandb is not None else []

    def _resume(self, found: Path | None) -> None:
        """Continue from a checkpoint, or start from other weights, or from scratch."""
        if found is not None:
            state = together(self.mesh, lambda: read.load(self.engine, found))
            self.step = self._saved_step = state["step"]
            self.consumed_samples = state["consumed_samples"]
            self.trained_samples = state["trained_samples"]
            self.target_tokens = state["target_tokens"]
            self.plan = DataPlan(state["data_plan"]).with_mixture(self.config.data.mixture, self.consumed_samples)
            self.reactions.load_state(state.get("stability", {}))
            if self.mesh.rank == 0:
                logger.info("resuming from %s", found)
        elif self.config.initialize_from is not None:
            reader = PieceReader(find(self.config.initialize_from), ("model",))
            together(self.mesh, lambda: read.load_weights(self.engine, reader))
        self._skip(self.reactions.go_on_from(self.step))
        self._evaluated = from_rank_zero(self.mesh, self._rewind)

    def _roll_back(self) -> None:
        """Go back to the checkpoint that a reaction chose, and go on past what it skips."""
        assert self._rolls_back is not None
        target, self._rolls_back = target_of(self._rolls_back), None
        self.heart.now("checkpoint")
        self._resume(read.choose(self.mesh, self.run_dir, target))
        self.heart.now("data", self.step)

    def _checkpoint_before(self, step: int) -> tuple[int, int] | None:
        """Where a roll-back from `step` goes."""
        self.saver.finish()
        return checkpoint_before(self.mesh, self.run_dir, step, self.config.saving.every_steps)

    def _rewind(self) -> dict[str, int]:
        """Move what lies beyond the checkpoint out of the way: metrics, evaluations, later checkpoints.

        Returns the last step in the logs of evaluations.
        """
        assert self.folder is not None
        # In this order: a checkpoint must never be left without the lines up to it.
        write.set_aside(self.run_dir, self.step, self.folder.attempt)
        self.folder.rewind(self.step)
        logs = {name: self.folder.read(name) for name in ("validation", "tasks")}
        return {name: records[-1]["step"] for name, records in logs.items() if records}

    @property
    def _samples_a_round(self) -> int:
        """Samples of one micro-batch over all data-parallel ranks."""
        return self.config.micro_batch_size * self.mesh.data

    def _micro_batches(self) -> Iterator[list[Batch | None]]:
        """The micro-batches of each step that is left, this data-parallel rank's."""
        loader: Iterator[Batch] | None = None
        place: tuple[int, DataPlan] | None = None
        while not self.length.reached(self.step, self.consumed_samples):
            self._skip(self.reactions.skipped(self.step + 1))
            if self.engine.needs_batches and place != (self.consumed_samples, self.plan):
                # At the start, and where a roll-back or a skipped range changed what comes next.
                loader = open_loader(self.config, self.mesh, self.dataset, self.plan, self.consumed_samples)
            rounds = self.batch_size_at(self.consumed_samples) // self._samples_a_round
            place = (self._place_after(rounds), self.plan)
            yield [None if loader is None else next(loader) for _ in range(rounds)]

    def _place_after(self, rounds: int) -> int:
        """The cursor in the sample index after so many more rounds of micro-batches."""
        return self.plan.advance(self.consumed_samples, rounds * self._samples_a_round)

    def _skip(self, ranges: list[list[int]]) -> None:
        """Leave ranges of samples out from here on; the plan is a new object wherever it changed."""
        if ranges:
            self.plan = self.plan.without(self.consumed_samples, ranges)

    def _due(self, every: int) -> bool:
        return bool(every) and self.step % every == 0

    def _read_pending(self) -> None:
        """Fetch the numbers of the steps since the last time, and hand them on. Raises RunFailed at a NaN."""
        self.heart.now("read", self.step)
        pending, self._pending = self._pending, []
        clock = time.perf_counter()
        numbers = self.engine.read([result for _, result in pending])
        waited = (time.perf_counter() - clock) / max(1, len(pending))
        records = []
        for (record, _), number in zip(pending, numbers, strict=True):
            self.target_tokens += targets(number.sums)
            records.append(self.records.done(record, number, waited=waited, target_tokens=self.target_tokens))
        if records:
            records[-1] |= self.memory.read() | self.engine.waiting()
        for observer in self.observers:
            observer.on_steps(records)
        for record, number, (_, result) in zip(records, numbers, pending, strict=True):
            step, consumed = record["step"], record["consumed_samples"]
            event = self.reactions.see(step, consumed, number, self._checkpoint_before)
            if event is not None:
                self._tell(event)
                self._rolls_back = event if target_of(event) is not None else None
            if self._rolls_back is None:
                self._check_finite(step, number, result)

    def _check_finite(self, step: int, number: StepNumbers, result: StepResult) -> None:
        """All ranks see the same numbers, so all of them raise."""
        infinite = [name for name in ("loss", "grad_norm") if not abs(getattr(number, name)) < float("inf")]
        dynamic = self.config.precision.dtype == "fp16" and self.config.precision.loss_scale == 0
        if not infinite or (number.skipped and dynamic) or number.seen.get("left_out"):
            # With a dynamic loss scale an overflow is how the scale finds its place; elsewhere, unless the update was
            # left out, it is the end.
            return
        where = self.engine.first_bad_layer(result) or "the backward pass"
        seen = f"{' and '.join(infinite)} not finite, first in {where}"
        self._event(step, "non_finite", seen)
        raise RunFailed(
            f"step {step}: {seen}. The checkpoints before it are whole: resume from one with resume.step, "
            "and lower optimizer.lr or change precision"
        )

    def _compare_replicas(self) -> None:
        """All ranks hear of a difference anywhere, so all of them raise."""
        if (seen := differing_replicas(self.engine)) is not None:
            self._event(self.step, "replicas_differ", seen)
            raise RunFailed(
                f"step {self.step}: {seen}: one of them computed or stored it wrongly. Resume from a checkpoint before "
                "it with resume.step, and on other machines if it comes again"
            )

    def _event(self, step: int, kind: str, seen: str) -> None:
        """Note why the run stops here."""
        record = {"id": f"{kind}-{step}", "step": step, "from_sample": self.consumed_samples, "kind": kind}
        for observer in self.observers:
            observer.on_event({**record, "seen": seen, "action": "stopped"})

    def _tell(self, event: Event) -> None:
        """Hand an event on; what a resumed run sees again, once, but for roll-backs."""
        if event["id"] not in self._told or target_of(event) is not None:
            self._told.add(event["id"])
            for observer in self.observers:
                observer.on_event(event)

    def _validate(self) -> None:
        if not self.config.evaluation.every_steps or self._evaluated.get("validation") == self.step:
            return
        self.heart.now("validate")
        record = {"step": self.step, "consumed_samples": self.consumed_samples, **self.validation.run()}
        self._evaluated["validation"] = self.step
        for observer in self.observers:
            observer.on_validation(record)

    def _run_tasks(self) -> None:
        if self.tasks is None or self._evaluated.get("tasks") == self.step:
            return
        self.heart.now("validate")
        record = self.tasks.run(self.step)
        self._evaluated["tasks"] = self.step
        for observer in self.observers:
            observer.on_tasks(record)

    def _save(self) -> None:
        self._read_pending()
        self.heart.now("save")
        state = {
            "step": self.step,
            "consumed_samples": self.consumed_samples,
            "trained_samples": self.trained_samples,
            "target_tokens": self.target_tokens,
            "data_plan": self.plan.to_list(),
            "dataset": self.dataset.digest,
            "schedule": asdict(self.config.schedule),
            "optimizer_steps": adam_steps(self.engine.deepspeed.optimizer),
            "loss_scaler": self.engine.scaler_state(),
            "stability": self.reactions.state(),
        }
        self.saver.start(state)
        self._saved_step = self.step

    def _finish(self) -> None:
        """Blanks filled from the last checkpoint, and the report; on rank 0."""
        if self.folder is None:
            return
        masked = self.config.data.sampling.objective == "blank_infilling"
        if self.config.evaluation.every_steps and self.config.evaluation.blanks and masked:
            fills = fill_blanks(self.run_dir, self.held_out, self.config.evaluation.blanks, self.mesh.device)
            self.folder.write_json("fills.json", fills)
        if self.config.logging.report:
            from train.report import write_report

            print(f"report: {write_report(self.run_dir)}", flush=True)


def _held_out(config: Config, dataset: Dataset) -> Sampler:
    """The validation split's sampler."""
    try:
        return sampler(config, dataset, split="valid")
    except DataError as error:
        raise ConfigError(f"{error}; or set evaluation.every_steps=0") from error
