"""One training step over the mesh: forward, backward, reduction, clip, update; and evaluation.

The loop calls `step` and `evaluate` and knows nothing of stages; this module owns the order of calls that DeepSpeed's
two engines want. Results stay on the device until `read` fetches many steps at once.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from data_prep.batch import NUM_GROUPS, Batch
from data_prep.errors import RunFailed
from train import backend
from train.bubble import StageClock
from train.collective import gather
from train.config import Config
from train.fragments import Fragment, inner_optimizer, local_fragments
from train.labels import Labels, inputs
from train.memory import whole_micro_batches
from train.mesh import Mesh
from train.model.build import DTYPES
from train.model.context import State
from train.optimizer import make_optimizer
from train.out_of_memory import out_of_memory
from train.progress import alive
from train.stability.guard import FIELDS, Guard, Measured
from train.zero_bubble import ZeroBubble


@dataclass(frozen=True)
class StepResult:
    """One step's numbers on this rank's device, not yet summed over ranks.

    loss, z_loss: float64 scalars, this rank's part of the step's mean. sums: float64 [NUM_GROUPS, 2] of cross entropy
    and targets. grad_norm: before the clip; a tensor or a number, infinite after an overflow. skipped: whether the
    update was left out. loss_scale: that the step was taken with.
    """

    loss: Tensor
    z_loss: Tensor
    sums: Tensor
    grad_norm: Tensor | float
    skipped: bool
    loss_scale: float
    batch_hash: int
    flags: Tensor
    """int32 [2, items of this stage], above 0 where an item's output, or the gradient of it, was not finite."""
    measured: Measured | None = None
    """What the guard saw; None without one."""


@dataclass(frozen=True)
class StepNumbers:
    """One step's numbers, whole and on the host. sums: [NUM_GROUPS][2] of cross entropy and targets."""

    loss: float
    z_loss: float
    grad_norm: float
    skipped: bool
    loss_scale: float
    sums: list[list[float]]
    seen: dict[str, float] = field(default_factory=dict)
    """`train.stability.guard.FIELDS`; empty without a guard."""
    telemetry: dict[str, Any] | None = None
    """Norms by group, in a measured step."""


class Engine:
    """DeepSpeed behind four verbs. `Engine.start(config, mesh)` makes the right one for the mesh."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        self.zero_stage = config.parallel.zero_stage
        self.dtype = DTYPES[config.precision.dtype]
        self._losses = [torch.zeros((), dtype=torch.float64, device=mesh.device) for _ in range(2)]
        self._sums = torch.zeros(NUM_GROUPS, 2, dtype=torch.float64, device=mesh.device)
        self.deepspeed, self.model = self._make()
        self.before_change: Callable[[], None] = lambda: None
        """Called before weights or optimizer states may change: a save may still be copying them."""
        inner_optimizer(self.deepspeed.optimizer).register_step_pre_hook(lambda *_: self.before_change())
        self.flags = self.model.watch()
        self.guard = Guard.of(config, mesh, self.model, self.deepspeed.optimizer, lambda: self.before_change())

    @staticmethod
    def start(config: Config, mesh: Mesh) -> "Engine":
        """The plain engine for one stage, the pipeline engine for more. Raises RankFailed where memory is out."""
        try:
            return (PipelineEngine if mesh.pipeline > 1 else PlainEngine)(config, mesh)
        except torch.OutOfMemoryError as error:
            raise out_of_memory(config, mesh, whole_micro_batches(config, mesh.data), error) from error

    def step(self, batches: Sequence[Batch | None], lr: float, shrink: float) -> StepResult:
        """Train on the micro-batches of one global batch.

        batches: this data-parallel rank's micro-batches, on the host; None on stages that hold neither end.
        lr: learning rate of this step. shrink: EGS alpha of this step.
        """
        samples = len(batches) * self.config.micro_batch_size * self.mesh.data
        if samples != self.deepspeed.train_batch_size():
            self.deepspeed.set_train_batch_size(samples)
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        self.model.set_shrink(shrink, shrink if self.config.stability.shrink_head else 1.0)
        scale, skipped_before = self.loss_scale, self.deepspeed.skipped_steps
        self._clear()
        if self.model.scatter is not None:
            self.model.scatter.begin(len(batches))
        if self.guard is not None:
            repetition = sum(batch.repetition() for batch in batches if batch is not None)
            self.guard.begin(len(batches), self._losses[0], scale, repetition)
        try:
            self._train(batches)
        except torch.OutOfMemoryError as error:
            raise out_of_memory(self.config, self.mesh, len(batches), error) from error
        except Exception as error:
            if "loss scale already at minimum" in str(error):
                raise RunFailed(
                    f"loss scale fell to its floor precision.loss_scale_minimum={scale:g} and gradients still "
                    "overflow; lower optimizer.lr, resume from an earlier checkpoint with resume.step, or use "
                    "precision=bf16"
                ) from error
            raise
        skipped = self.deepspeed.skipped_steps > skipped_before
        norm = math.inf if skipped else self.deepspeed.get_global_grad_norm()
        return StepResult(
            loss=self._losses[0] / len(batches),
            z_loss=self._losses[1] / len(batches),
            sums=self._sums.clone(),
            grad_norm=0.0 if norm is None else norm.detach().clone() if isinstance(norm, Tensor) else norm,
            skipped=skipped,
            loss_scale=scale,
            batch_hash=_hash(batches),
            flags=self.flags.clone(),
            measured=None if self.guard is None else self.guard.end(),
        )

    def evaluate(self, batches: Sequence[Batch | None]) -> list[list[float]]:
        """Sums of cross entropy and targets by group, [NUM_GROUPS][2], over all ranks' micro-batches; no dropout."""
        self._clear()
        self.deepspeed.eval()
        with torch.no_grad():
            self._evaluate(batches)
        self.deepspeed.train()
        sums = self._sums.clone()
        self.mesh.from_last_stage(self.mesh.sum_over_data(sums))
        return sums.tolist()

    def read(self, results: Sequence[StepResult]) -> list[StepNumbers]:
        """Sum the results of several steps over the ranks and fetch them; every rank gets the same.

        Raises RunFailed where the stages or tensor-parallel ranks of one replica saw different batches.
        """
        if not results:
            return []
        packed = torch.stack(
            [torch.cat([torch.stack((r.loss, r.z_loss)), r.sums.flatten()]) for r in results]
        )  # [steps, 2 + groups * 2]
        self.mesh.from_last_stage(self.mesh.sum_over_data(packed))
        norms = torch.stack([torch.as_tensor(r.grad_norm, dtype=torch.float64, device=packed.device) for r in results])
        rows, norm_values = packed.tolist(), norms.tolist()
        seen = self._seen(results)
        self._compare_hashes([r.batch_hash for r in results])
        return [
            StepNumbers(
                loss=row[0] / self.mesh.data,
                z_loss=row[1] / self.mesh.data,
                # Where the guard clips, the optimizer sees the norm after it.
                grad_norm=norm if self.config.optimizer.clip_kind == "global" or result.skipped else here["grad_norm"],
                skipped=result.skipped or here.get("left_out", 0.0) > 0,
                loss_scale=result.loss_scale,
                sums=[[row[2 + 2 * g], row[3 + 2 * g]] for g in range(NUM_GROUPS)],
                seen=here,
                telemetry=self._telemetry(result),
            )
            for row, norm, here, result in zip(rows, norm_values, seen, results, strict=True)
        ]

    def _seen(self, results: Sequence[StepResult]) -> list[dict[str, float]]:
        numbers = [r.measured.numbers for r in results if r.measured is not None]
        if not numbers:
            return [{} for _ in results]
        return [dict(zip(FIELDS, row, strict=True)) for row in torch.stack(numbers).tolist()]

    def _telemetry(self, result: StepResult) -> dict[str, Any] | None:
        snapshot = None if result.measured is None else result.measured.snapshot
        if snapshot is None or self.guard is None:
            return None
        return snapshot.read(self.mesh, self.guard.tensors, self.model.context.probe)

    def first_bad_layer(self, result: StepResult) -> str | None:
        """`rank R, NAME` of the first item, in the model's order, that gave a non-finite output in a step.

        Where all outputs were finite, the last item whose output had a non-finite gradient: the backward pass comes
        there first. Where those were finite too, the last parameter whose gradient was not, on the rank that holds its
        optimizer states; None without a guard. All ranks call it together.
        """
        outputs, gradients = (row.nonzero().flatten().tolist() for row in result.flags)
        found: list[tuple[int, int, int, str]] = []  # (sooner first, rank, …)
        if outputs:
            found.append((0, self.model.start + outputs[0], self.mesh.rank, self.model.item_name(outputs[0])))
        elif gradients:
            name = f"the gradient of {self.model.item_name(gradients[-1])}"
            found.append((1, -(self.model.start + gradients[-1]), self.mesh.rank, name))
        elif self.guard is not None and result.measured is not None and (bad := self.guard.infinite(result.measured)):
            summed = " as summed over the data-parallel ranks" if self.mesh.data > 1 else ""
            found.append((2, -self.model.stop, self.mesh.rank, f"the gradient of {bad[-1]}{summed}"))
        first = min((entry for entries in gather(self.mesh, found) for entry in entries), default=None)
        return None if first is None else f"rank {first[2]}, {first[3]}"

    @property
    def needs_batches(self) -> bool:
        """Whether this rank's stage reads batches at all."""
        return self.mesh.first_stage or self.mesh.last_stage

    @property
    def loss_scale(self) -> float:
        """The current fp16 loss scale, 1 in other precisions."""
        return float(getattr(self.deepspeed.optimizer, "cur_scale", 1.0)) if self.dtype == torch.float16 else 1.0

    def waiting(self) -> dict[str, float]:
        """Metrics of how long the stages waited in the last step, once it was read; empty with one stage."""
        return {}

    def fragments(self) -> Iterator[Fragment]:
        """The pieces of master weights and optimizer states that this rank owns, to read or to change.

        See `train.fragments`.
        """
        self.before_change()
        if self.config.parallel.offload_optimizer:
            self.synchronize()  # moments may be on their way to the host
        return local_fragments(self.deepspeed.optimizer, self.model, self.mesh, self.zero_stage)

    def synchronize(self) -> None:
        """Wait for the device."""
        backend.synchronize()

    def scaler_state(self) -> dict[str, Any]:
        """State of the dynamic loss scaler, plain numbers; empty without one."""
        if self.dtype != torch.float16:
            return {}
        scaler = self.deepspeed.optimizer.loss_scaler
        keys = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
        return {key: getattr(scaler, key) for key in keys if hasattr(scaler, key)}

    def load_scaler_state(self, state: dict[str, Any]) -> None:
        """Put back what `scaler_state` returned; a run that has no scale, or begins with one, keeps its own."""
        if self.dtype != torch.float16:
            return
        for key, value in state.items():
            setattr(self.deepspeed.optimizer.loss_scaler, key, value)

    def _make(self) -> tuple[Any, Any]:
        raise NotImplementedError("PlainEngine and PipelineEngine define it")

    def _train(self, batches: Sequence[Batch | None]) -> None:
        raise NotImplementedError("PlainEngine and PipelineEngine define it")

    def _evaluate(self, batches: Sequence[Batch | None]) -> None:
        raise NotImplementedError("PlainEngine and PipelineEngine define it")

    def _optimizer(self, model: Any) -> torch.optim.Optimizer:
        skips = "skip" in self.config.stability.reactions
        offloads = self.config.parallel.offload_optimizer
        clips = self.zero_stage == 0
        return make_optimizer(model, self.config.optimizer, self.mesh, clips=clips, skips=skips, offloads=offloads)

    def _clear(self) -> None:
        for tensor in (*self._losses, self._sums, self.flags):
            tensor.zero_()

    def _note(self, loss: Tensor, z_loss: Tensor, sums: Tensor) -> Tensor:
        """Add one micro-batch's numbers up on the device; returns what the backward pass starts from."""
        alive()
        self._losses[0] += loss.detach()
        self._losses[1] += z_loss.detach()
        self._sums += sums
        return loss + z_loss if self.config.loss.z_loss else loss

    def _compare_hashes(self, hashes: list[int]) -> None:
        """The ranks of one replica must have read the same batches; stages between the ends read none."""
        if self.mesh.tensor * self.mesh.pipeline == 1:
            return
        group = self.mesh.grid.get_model_parallel_group()
        low = torch.tensor(hashes, dtype=torch.int64, device=self.mesh.device)
        high = low.clone()
        if not self.needs_batches:
            low.fill_(torch.iinfo(torch.int64).max)
            high.fill_(torch.iinfo(torch.int64).min)
        torch.distributed.all_reduce(low, op=torch.distributed.ReduceOp.MIN, group=group)
        torch.distributed.all_reduce(high, op=torch.distributed.ReduceOp.MAX, group=group)
        replicas = gather(self.mesh, None if torch.equal(low, high) else self.mesh.data_rank)
        if differing := sorted({replica for replica in replicas if replica is not None}):
            raise RunFailed(
                f"data-parallel rank {differing[0]}: its stages or tensor-parallel ranks read different batches; "
                "check that all nodes see the same data.path and the same files"
            )


class PlainEngine(Engine):
    """One stage: DeepSpeed's plain engine, the accumulation is ours."""

    def _make(self) -> tuple[Any, Any]:
        return backend.make_plain_engine(self.config, self.mesh, self._optimizer)

    def _train(self, batches: Sequence[Batch | None]) -> None:
        # All before the first pass: such a copy waits for what the device was given before it, and the host with it.
        loaded = [self._load(batch) for batch in batches]
        for number, given in enumerate(loaded):
            # Said each time, since a ramped batch size would upset DeepSpeed's own counting.
            self.deepspeed.set_gradient_accumulation_boundary(number == len(batches) - 1)
            self.deepspeed.backward(self._loss(*given))
            self.deepspeed.step()

    def _evaluate(self, batches: Sequence[Batch | None]) -> None:
        for batch in batches:
            self._loss(*self._load(batch))

    def _load(self, batch: Batch | None) -> tuple[State, Labels]:
        assert batch is not None
        return inputs(batch, self.mesh.device), Labels.of(batch).to(self.mesh.device)

    def _loss(self, state: State, labels: Labels) -> Tensor:
        return self._note(*self.deepspeed(state, labels))


class PipelineEngine(Engine):
    """Several stages: DeepSpeed's pipeline engine, with its 1F1B schedule or `train.zero_bubble`."""

    def _make(self) -> tuple[Any, Any]:
        self._labels: deque[Labels] = deque()
        engine, model = backend.make_pipeline_engine(self.config, self.mesh, self._optimizer, self._loss)
        self.clock = StageClock(self.mesh, engine)
        self.zero_bubble: ZeroBubble | None = None
        if self.config.parallel.pipeline_schedule == "zero_bubble":
            groups = backend.message_groups(self.mesh)
            self.zero_bubble = ZeroBubble(engine, self.mesh, self.clock, groups, self.config)
        return engine, model

    def _train(self, batches: Sequence[Batch | None]) -> None:
        with self.clock.step(len(batches)):
            # All before the first pass, as in the plain engine.
            loaded = list(self._feed(batches) or ())
            if self.zero_bubble is None:
                self.deepspeed.train_batch(iter(loaded) if self.needs_batches else None)
            else:
                self.zero_bubble.step([state for state, _ in loaded] or [None] * len(batches))

    def waiting(self) -> dict[str, float]:
        return self.clock.read()

    def _evaluate(self, batches: Sequence[Batch | None]) -> None:
        self.deepspeed.eval_batch(
            self._feed(batches), reduce_output=None, bcast_loss=False, num_micro_batches=len(batches)
        )

    def _loss(self, hidden: Tensor) -> Tensor:
        return self._note(*self.model.head.loss(hidden, self._labels.popleft()))

    def _feed(self, batches: Sequence[Batch | None]) -> Iterator[tuple[State | None, tuple[()]]] | None:
        """What DeepSpeed loads, micro-batch by micro-batch; the last stage's labels wait in order of their loading."""
        if not self.needs_batches:
            return None

        def feed() -> Iterator[tuple[State | None, tuple[()]]]:
            for batch in batches:
                assert batch is not None
                if self.mesh.last_stage:
                    self._labels.append(Labels.of(batch).to(self.mesh.device))
                yield inputs(batch, self.mesh.device) if self.mesh.first_stage else None, ()

        return feed()


def _hash(batches: Sequence[Batch | None]) -> int:
    value = 0
    for batch in batches:
        if batch is not None:
            value = (value * 1_000_003 ^ batch.hash()) & ((1 << 62) - 1)
    return value
