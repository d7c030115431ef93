"""A pipeline step whose stages wait less: zero bubble, ZB-H1 of arXiv 2401.10241, with one stage a rank.

Only the gradient of a stage's input is awaited by the stage before it; that of its weights can be computed later, where
the stage would wait. So a backward pass leaves the operands of each weight's product behind (`kernels.linear.Later`)
and stage s computes them s micro-batches later: the last stages, which are done first, then have work until the first
one is. With F, I and W for the three passes of a micro-batch, p stages wait (p-1)(F+I-W) where 1F1B's wait
(p-1)(F+I+W). Every sum is added up in 1F1B's order, so the numbers are 1F1B's, bit by bit.

Stages, parameters, optimizer and checkpoints are those of DeepSpeed's pipeline engine, and so is the end of the step;
this module only runs the passes in another order, and waits for a message no sooner than the pass that needs it.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.linear import Later
from train.bubble import StageClock
from train.config import Config
from train.mesh import Mesh
from train.model.build import DTYPES
from train.model.context import State

Pass = tuple[str, int]
"""What to do (`forward`, `backward`: the gradient of the input, `weights`: that of the weights), and for which
micro-batch."""


def order(stage: int, stages: int, micro_batches: int, put_off: int) -> list[Pass]:
    """A stage's passes: 1F1B's, its weights' gradients `put_off` micro-batches behind. ZB-H1: put_off = stage."""
    ahead = min(stages - 1 - stage, micro_batches)
    passes: list[Pass] = [("forward", number) for number in range(ahead)]
    for number in range(micro_batches):
        if number + ahead < micro_batches:
            passes.append(("forward", number + ahead))
        passes.append(("backward", number))
        if number >= put_off:
            passes.append(("weights", number - put_off))
    return passes + [("weights", number) for number in range(max(0, micro_batches - put_off), micro_batches)]


class ZeroBubble:
    """One stage's passes over a global batch."""

    def __init__(self, engine: Any, mesh: Mesh, clock: StageClock, groups: tuple[Any, Any], config: Config) -> None:
        """engine: DeepSpeed's pipeline engine, in bf16 under ZeRO 1. groups: for states and for gradients on their way.

        Each group is this rank's pipeline in the order of its stages.
        """
        self.mesh, self._engine, self._clock = mesh, engine, clock
        self._forwards, self._backwards = groups
        sequences, slots = config.micro_batch_size, config.sequence_length
        share = slots // mesh.tensor if config.parallel.sequence_parallel else slots
        self._shapes = [
            ((sequences, share, config.model.hidden_size), DTYPES[config.precision.dtype]),
            ((sequences, 4, slots), torch.int64),
            ((sequences,), torch.int64),
        ]
        self.put_off = mesh.stage
        self._later = Later()
        self.active(True)
        self._sent: dict[int, list[tuple[Any, Tensor]]] = {}
        """The messages last sent to a stage."""

    def active(self, wanted: bool) -> None:
        """Whether products of weight gradients are put off at all."""
        for group in self._engine.optimizer.bf16_groups:
            for parameter in group:
                parameter.main_grad.later = self._later if wanted else None

    def step(self, states: Sequence[State | None]) -> None:
        """All passes of a step, then DeepSpeed's own reduction and update.

        states: of its micro-batches on this device, None each on stages behind the first.
        """
        self.passes(states)
        self._engine._exec_reduce_tied_grads()
        self._engine._exec_reduce_grads()
        self._engine._exec_optimizer_step()

    def passes(self, states: Sequence[State | None]) -> None:
        """Forward and backward passes; the gradients are in their fp32 sums afterwards."""
        self._engine.module.train()
        self._states = states
        self._live: dict[int, tuple[Tensor, Tensor]] = {}
        self._put_off: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
        self._arriving: list[tuple[Any, Tensor]] = []
        self._leaving: list[tuple[Any, int, Tensor]] = []
        self._share = 1.0 / len(states)
        todo = order(self.mesh.stage, self.mesh.pipeline, len(states), self.put_off)
        needy = [one for one in todo if one[0] != "weights"]
        following = dict(itertools.pairwise(needy))
        self._exchange(needy[0])
        run = {"forward": self._forward, "backward": self._backward, "weights": self._weights}
        for one in todo:
            kind, number = one
            run[kind](number)
            if kind != "weights":
                self._exchange(following.get(one))
        for stage in list(self._sent):
            self._let_go(stage)

    def _forward(self, number: int) -> None:
        state = self._states[number] if self.mesh.first_stage else self._arrived()
        assert state is not None
        if not self.mesh.first_stage:
            state[0].requires_grad_()
        with self._clock.busy():
            out = self._engine.module(tuple(state))
        self._live[number] = state[0], out if self.mesh.last_stage else out[0]
        if not self.mesh.last_stage:
            self._leaving = [(self._forwards, self.mesh.stage + 1, tensor.detach().contiguous()) for tensor in out]

    def _backward(self, number: int) -> None:
        entered, left = self._live.pop(number)
        gradient = None if self.mesh.last_stage else self._arrived()[0]
        optimizer = self._engine.optimizer
        with self._clock.busy():
            optimizer.clear_lp_grads()
            if gradient is None:
                (left * self._share).backward()
            else:
                left.backward(gradient)
            optimizer.update_hp_grads()
        if not self.mesh.first_stage:
            assert entered.grad is not None
            self._leaving = [(self._backwards, self.mesh.stage - 1, entered.grad.contiguous())]
        self._put_off[number] = self._later.take()

    def _weights(self, number: int) -> None:
        with self._clock.busy():
            self._later.run(self._put_off.pop(number))

    def _exchange(self, following: Pass | None) -> None:
        """Begin to send what the pass just run leaves and to take in what the following one needs.

        Both at once and never sooner, as 1F1B pairs them: on a GPU a message that waits for its other end holds up
        whoever then waits for the whole device, as memory that is asked for and a kernel that is loaded do. With this
        order every message finds its other end all the same; a receive begun one pass earlier ran into a deadlock.
        """
        kind, here = following[0] if following else None, self.mesh
        group, source, shapes = self._forwards, here.stage - 1, self._shapes
        if kind == "backward":
            group, source, shapes = self._backwards, here.stage + 1, self._shapes[:1]
        if kind is None or not 0 <= source < here.pipeline:
            shapes = []
        # Nothing is asked for between the first send and the last receive.
        buffers = [torch.empty(shape, dtype=dtype, device=here.device) for shape, dtype in shapes]
        if self._leaving:
            self._let_go(self._leaving[0][1])
        for way, stage, tensor in self._leaving:
            work = torch.distributed.isend(tensor, group=way, group_dst=stage)
            self._sent.setdefault(stage, []).append((work, tensor))
        self._arriving = [(torch.distributed.irecv(one, group=group, group_src=source), one) for one in buffers]
        self._leaving = []

    def _let_go(self, stage: int) -> None:
        """Give up what was sent to a stage; a pass and more ago, so it has arrived.

        In every step at the same place: whether it has arrived yet depends on how far the host is ahead, and memory
        that is free in one step and not in the next is asked for anew.
        """
        for work, _ in self._sent.pop(stage, []):
            work.wait()

    def _arrived(self) -> list[Tensor]:
        for work, _ in self._arriving:
            work.wait()  # on a GPU it is the device's queue that waits
        return [buffer for _, buffer in self._arriving]
