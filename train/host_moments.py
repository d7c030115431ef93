"""AdamW whose moments stay in host memory and pass through the device piece by piece (`parallel.offload_optimizer`).

The moments are 8 of the 12 bytes a parameter that ZeRO's optimizer states take. While one piece of them is updated on
the device, the next comes in and the last goes back, on two streams of their own: the update is torch's, so the numbers
are those of the plain AdamW, in any precision and ZeRO stage. (DeepSpeed's own offload updates on the host instead, by
a compiled operation, and adds gradients up in the compute dtype.)
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from train.memory import MOMENTS_PIECE as PIECE

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class _Piece:
    """Elements of one flattened parameter; `moments` lie on the host."""

    group: dict[str, Any]
    parameter: Tensor
    gradient: Tensor
    moments: list[Tensor]
    step: Tensor
    last: bool


class HostMomentsAdamW(torch.optim.AdamW):
    """Takes what AdamW takes. Moments are made on the host, page-locked where the parameters are on an accelerator.

    The device's default stream waits for all of a step, but the host does not: wait for the device before the host
    reads or writes a moment.
    """

    def __init__(self, groups: list[dict[str, Any]], **settings: Any) -> None:
        super().__init__(groups, **settings)
        self._streams: tuple[Any, Any] | None = None
        self._slots: list[list[Tensor]] = []

    def new_moment(self, parameter: Tensor) -> Tensor:
        """Zeros of a parameter's shape, on the host."""
        return torch.zeros(parameter.shape, dtype=parameter.dtype, pin_memory=parameter.device.type != "cpu")

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One AdamW step."""
        assert closure is None
        pieces = list(self._pieces())
        if not pieces:
            return None
        device = pieces[0].parameter.device
        streams = torch.get_device_module(device)
        if self._streams is None:
            self._streams = streams.Stream(), streams.Stream()
        largest = max(piece.parameter.numel() for piece in pieces)
        if not self._slots or self._slots[0][0].numel() < largest:
            self._slots = [[torch.empty(largest, device=device) for _ in MOMENTS] for _ in range(2)]
        inward, outward = self._streams
        here = streams.current_stream()

        def bring(number: int) -> list[Tensor]:
            # The slot is free, and the host's values are the newest, when all that was on its way out has arrived.
            inward.wait_stream(outward)
            piece = pieces[number]
            into = [slot[: piece.parameter.numel()] for slot in self._slots[number % 2]]
            with streams.stream(inward):
                for slot, moment in zip(into, piece.moments, strict=True):
                    slot.copy_(moment, non_blocking=True)
            return into

        inward.wait_stream(here)
        coming = bring(0)
        for number, piece in enumerate(pieces):
            moments = coming
            here.wait_stream(inward)
            if number + 1 < len(pieces):
                coming = bring(number + 1)
            self._update(piece, moments)
            outward.wait_stream(here)
            with streams.stream(outward):
                for slot, moment in zip(moments, piece.moments, strict=True):
                    moment.copy_(slot, non_blocking=True)
        here.wait_stream(outward)
        return None

    def _pieces(self) -> Iterator[_Piece]:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    on = parameter.device if group["fused"] else "cpu"
                    state["step"] = torch.zeros((), dtype=torch.float32, device=on)
                    state |= {key: self.new_moment(parameter) for key in MOMENTS}
                flat = [parameter.detach(), parameter.grad, *(state[key] for key in MOMENTS)]
                cut = list(zip(*(tensor.view(-1).split(PIECE) for tensor in flat), strict=True))
                for number, (values, gradient, *moments) in enumerate(cut):
                    yield _Piece(group, values, gradient, moments, state["step"], last=number == len(cut) - 1)

    def _update(self, piece: _Piece, moments: list[Tensor]) -> None:
        group = piece.group
        # Every piece of a parameter is in the same step, which is counted with the last.
        step = piece.step if piece.last else piece.step.clone()
        adamw(
            [piece.parameter],
            [piece.gradient],
            [moments[0]],
            [moments[1]],
            [],
            [step],
            foreach=False if group["fused"] is None else group["foreach"],
            fused=group["fused"],
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
