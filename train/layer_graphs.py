"""The layers' forward and backward pass of a micro-batch, launched as one CUDA graph each.

A layer launches some thirty kernels each way, from Python. Where the device is done with them sooner than the host has
launched the next ones (a small model, few sequences, a layer cut over tensor-parallel ranks) the host sets the pace. A
graph is launched whole. The embedding and the head stay outside: what they do depends on the batch and the step.

The layers run as they are for the first micro-batch, which compiles their kernels and starts their communicators, and
are captured in the second; measured steps, which do more, are captured apart. All graphs share one pool of memory,
since one pass is always over before the next begins; with several stages it would not be.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from train.model.context import State
from train.model.probe import Probe

Run = Callable[[State], State]
Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""Makes a function of fixed device work one graph; what it gives runs the work again, into the same tensors."""


class LayerGraphs:
    """Runs layers through graphs of theirs: one pair for steps that are measured, one for those that are not.

    parameters: those of the layers that are trained; their gradients are summed in `main_grad` (`train.main_grads`).
    probe: what the layers show themselves to in measured steps.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], probe: Probe, capture: Capture) -> None:
        self._parameters, self._probe, self._capture = list(parameters), probe, capture
        self._seen = False
        self._captured: dict[bool, _Captured] = {}
        self._anchor = torch.zeros((), requires_grad=True)
        """Has the backward pass come here even where the embedding is frozen."""

    def __call__(self, run: Run, state: State) -> State:
        """run(state)."""
        if not self._seen:
            self._seen = True
            return run(state)
        measured = self._probe.active
        if measured not in self._captured:
            with torch.no_grad(), self._probe.unseen():
                # What this kind of pass adds to the first one's kernels is compiled here.
                run(state)
            self._captured[measured] = _Captured(run, state, self._parameters, self._capture)
        hidden, meta, sample_index = state
        out = _Replay.apply(hidden, self._anchor, meta, sample_index, self._captured[measured])
        return out, meta, sample_index


class _Captured:
    """One pair of graphs and the tensors that they read and write."""

    def __init__(self, run: Run, state: State, parameters: Sequence[nn.Parameter], capture: Capture) -> None:
        hidden, meta, sample_index = (tensor.detach().clone() for tensor in state)
        self._state: State = (hidden.requires_grad_(), meta, sample_index)
        self._gradient = torch.empty_like(hidden)
        self._run, self._parameters = run, parameters
        self._forward = capture(self._forward_pass)
        self._backward = capture(self._backward_pass)

    def forward(self, state: State) -> Tensor:
        """Hidden states after the layers, in a tensor that the next pass overwrites."""
        with torch.no_grad():
            for mine, given in zip(self._state, state, strict=True):
                mine.copy_(given)
        return self._forward().detach()

    def backward(self, gradient: Tensor) -> Tensor:
        """Gradient of the hidden states before the layers, likewise; the parameters' go to their sums."""
        self._gradient.copy_(gradient)
        return self._backward()

    def _forward_pass(self) -> Tensor:
        with torch.enable_grad():
            self._out = self._run(self._state)[0]
        return self._out

    def _backward_pass(self) -> Tensor:
        # Not `backward`: nodes that add into a parameter's gradient may belong to the stream of an earlier pass.
        wanted = (self._state[0], *self._parameters)
        gradient, *others = torch.autograd.grad(self._out, wanted, self._gradient, allow_unused=True)
        for parameter, other in zip(self._parameters, others, strict=True):
            if other is not None:
                parameter.main_grad.add_(other)  # type: ignore[attr-defined]
        assert gradient is not None
        return gradient


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, anchor: Tensor, meta: Tensor, sample_index: Tensor, captured: _Captured
    ) -> Tensor:
        ctx.captured = captured
        return captured.forward((hidden, meta, sample_index))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        return ctx.captured.backward(gradient), None, None, None, None
