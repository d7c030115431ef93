"""Stands round the optimizer's step, whichever of DeepSpeed's optimizers it is.

Before the step: one norm a tensor, summed over all ranks in one small message together with the loss; from them the
clip factors of AdaGC or ZClip, the detector's score, and whether this update is left out. After it: how far it moved
the weights, and in measured steps norms of weights and updates. Nothing here waits for the device.

An update is left out by the fused AdamW's own switch (`found_inf`), which changes neither weights nor moments nor the
number of steps: the same in fp32, bf16 and fp16, and under every ZeRO stage.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from train.config import Config
from train.fragments import Fragment, inner_optimizer, local_fragments
from train.mesh import Mesh
from train.model.build import Model, named_layouts
from train.stability.clipping import Clipping
from train.stability.detector import SIGNALS, Detector
from train.stability.gradients import fragment_gradients
from train.stability.groups import Tensors, group_of
from train.stability.stress import flip
from train.stability.telemetry import Snapshot, fp16_shares, squares, update_squares
from train.stability.update_size import UpdateSize
from train.stability.weight_size import WeightSize


@dataclass(frozen=True)
class Measured:
    """What the guard saw in one step, on the device.

    numbers: float64 [14], `FIELDS`, the same on all ranks. snapshot: telemetry of a measured step, None in the others.
    infinite: bool [this rank's fragments], where a gradient's norm was not finite (summed over data-parallel ranks).
    """

    numbers: Tensor
    snapshot: Snapshot | None
    infinite: Tensor


FIELDS = (
    *("grad_norm", "embedding_grad_norm", "repetition"),
    *(f"{name}_{of}" for of in ("score", "lasting") for name in SIGNALS),
    *("left_out", "update_size", "update_times", "weight_times", "weight_number"),
)
"""Norms before the clip; the batch's repetition; the detector's scores of the step and of the last three; left_out: 1
where it was skipped; how far norms and biases moved, and that over the median of the steps before; how many times its
norm of the step before the tensor has that grew most, and its number."""


class Guard:
    """One run's guard; `Guard.of` gives None where nothing asks for one."""

    def __init__(
        self, config: Config, mesh: Mesh, model: Model, optimizer: Any, before_change: Callable[[], None]
    ) -> None:
        stability = config.stability
        self.config, self.mesh, self.model, self.optimizer = config, mesh, model, optimizer
        self._before_change = before_change
        self.tensors = Tensors(mesh, (layout.name for layout, _ in named_layouts(model.parameters())))
        tables = [name for name in self.tensors.names if group_of(name) == "embedding"]
        self._embedding = self.tensors.numbers(tables, mesh.device)
        self.clipping = Clipping.of(config.optimizer, len(self.tensors), mesh.device)
        self.detector = Detector(stability.spike_window, stability.spike_sigma, mesh.device)
        tuned = bool(config.lora.rank or config.prefix.length)
        self.update_size = UpdateSize(mesh, tuned=tuned)
        self.weight_size = WeightSize(mesh, self.tensors)
        self.skips = "skip" in stability.reactions
        self.step_number, self.measures = 0, False
        self._fragments: list[Fragment] = []
        self._rounds, self._loss, self._scale, self._repetition = 1, torch.zeros(()), 1.0, 0.0
        self._seen: Measured | None = None
        self.update = optimizer.step
        """The optimizer's own step."""
        optimizer.step = self.step

    @staticmethod
    def of(
        config: Config, mesh: Mesh, model: Model, optimizer: Any, before_change: Callable[[], None]
    ) -> "Guard | None":
        """A guard round `optimizer` (the one that DeepSpeed's engine steps), or None.

        before_change: called before weights are changed otherwise than by its step.
        """
        stability = config.stability
        wanted = stability.telemetry or stability.reactions or stability.stress.flip_step is not None
        if not wanted and config.optimizer.clip_kind == "global":
            return None
        return Guard(config, mesh, model, optimizer, before_change)

    def coming(self, step: int) -> None:
        """Which step is next, counted from 1: whether it is measured, and whether a fault is planted in it."""
        self.step_number = step
        self.measures = self.config.stability.telemetry and step % self.config.logging.every_steps == 0

    def begin(self, rounds: int, loss: Tensor, scale: float, repetition: float) -> None:
        """Before the forward pass. rounds: micro-batches. loss: where the engine adds up their losses on this rank.
        scale: the loss scale of the step. repetition: sum over the micro-batches that this rank has."""
        self._rounds, self._loss, self._scale, self._repetition = rounds, loss, scale, repetition
        self._seen = None
        if self.measures:
            self.model.context.probe.start()

    def end(self) -> Measured:
        """After the step: what was seen in it."""
        self.model.context.probe.active = False
        assert self._seen is not None
        return self._seen

    @torch.no_grad()
    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Take the place of the optimizer's step."""
        mesh, inner = self.mesh, inner_optimizer(self.optimizer)
        if not self._fragments:
            self._fragments = list(local_fragments(self.optimizer, self.model, mesh, self.config.parallel.zero_stage))
            names = [one.layout.name for one in self._fragments]
            self._numbers = self.tensors.numbers(names, mesh.device)
            self._owned = torch.tensor([float(one.owner) for one in self._fragments], device=mesh.device).double()
            self.update_size.watch(self._fragments)
            self.weight_size.watch(self._fragments)
        fragments = self._fragments
        gradients = fragment_gradients(self.optimizer, fragments, self.config.parallel.zero_stage)
        judged = bool(self.config.stability.reactions)
        if judged:
            self.weight_size.begin()
        stress = self.config.stability.stress
        if stress.flip_step == self.step_number:
            self._before_change()
            flip(stress, fragments, gradients)
        mine = squares(gradients) / self._scale**2
        found, loss, repetition = self._whole(mine)
        fp16 = fp16_shares(fragments, gradients) if self.measures else None
        if self.clipping is not None:
            factors = self.clipping.factors(found.sqrt()).to(torch.float32)[self._numbers]
            torch._foreach_mul_(gradients, list(factors.unbind()))
        total = found.sum().sqrt()
        left_out = self._detect(loss, total, repetition, inner)
        self.update_size.begin()
        done = self.update(*args, **kwargs)
        embedding = found[self._embedding].sum().sqrt()
        grown = self.weight_size.end() if judged else torch.zeros(2, dtype=torch.float64, device=mesh.device)
        moved = (*self.update_size.end(), *grown)
        numbers = torch.stack((total, embedding, repetition, *self._score, left_out, *moved))
        snapshot = None if fp16 is None else self._snapshot(found, fp16, inner, 1.0 - left_out)
        self._seen = Measured(numbers, snapshot, ~mine.isfinite())
        return done

    def infinite(self, measured: Measured) -> list[str]:
        """Names of this rank's parameters whose gradient was not finite, in the model's order; waits for the device."""
        return [self._fragments[number].layout.name for number in measured.infinite.nonzero().flatten().tolist()]

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; waits for the device."""
        state = {**self.detector.state(), "update_sizes": self.update_size.state()}
        return state | ({} if self.clipping is None else {"clipping": self.clipping.state.tolist()})

    def load_state(self, state: dict[str, Any]) -> None:
        """Put back what `state` gave; what a run did not keep starts anew."""
        if "window" in state:
            self.detector.load(state)
        self.update_size.load(state.get("update_sizes", []))
        self.weight_size.forget()
        saved = state.get("clipping")
        if self.clipping is not None and saved is not None and len(saved) == len(self.clipping.state):
            self.clipping.state.copy_(torch.tensor(saved, dtype=torch.float64))

    def _whole(self, mine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Squared norms [tensors] of the whole model's gradients, the step's loss and its text's repetition; mine: by
        fragment."""
        mesh = self.mesh
        told = torch.zeros(2, dtype=torch.float64, device=self._loss.device)
        if mesh.last_stage and mesh.tensor_rank == 0:
            told[0] = self._loss
            told[1] = self._repetition
        # A product with 0 would let another rank's overflow through.
        owned = torch.where(self._owned > 0, mine, 0.0)
        packed = torch.cat((self.tensors.scatter(self._numbers, owned), told / (self._rounds * mesh.data)))
        if mesh.world > 1:
            torch.distributed.all_reduce(packed)
        return packed[:-2], packed[-2], packed[-1]

    def _detect(self, loss: Tensor, norm: Tensor, repetition: Tensor, inner: Any) -> Tensor:
        """Score the step; float64 scalar, 1 where its update is left out."""
        zero = torch.zeros_like(norm)
        self._score = zero.expand(2 * len(SIGNALS))
        if not self.config.stability.reactions:
            return zero
        score = self.detector.see(loss, norm, repetition)
        if self.config.precision.dtype == "fp16" and self.config.precision.loss_scale == 0:
            # With a dynamic loss scale an overflow is how the scale finds its place.
            score = torch.where(norm.isfinite(), score, 0.0)
        self._score = score.flatten()
        if not self.skips:
            return zero
        spike = (score > self.config.stability.spike_sigma).any()
        inner.grad_scale, inner.found_inf = None, spike.float()
        return spike.double()

    def _snapshot(self, gradients: Tensor, fp16: Tensor, inner: torch.optim.Optimizer, taken: Tensor) -> Snapshot:
        fragments, probe = self._fragments, self.model.context.probe
        updates = update_squares(fragments, inner) * taken
        if getattr(self.optimizer, "overflow", False):
            updates = torch.zeros_like(updates)
        weights = squares([one.master for one in fragments])
        return Snapshot(
            gradients=gradients,
            weights=self.tensors.scatter(self._numbers, weights * self._owned),
            updates=self.tensors.scatter(self._numbers, updates * self._owned),
            activations=probe.sums.clone(),
            max_logits=probe.max_logits.clone(),
            fp16=fp16,
        )
