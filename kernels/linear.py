"""Linear products whose weight gradient is summed in float32 by the product that makes it.

    y = x Wᵀ        dx = dy W        dW = dyᵀ x

A weight may carry `main_grad`, a float32 tensor of its shape. Operations that find one add dW into it in their backward
and return no gradient of W: over the micro-batches of a step nothing is written in half precision, cast and added, and
nothing is rounded before the sum (Megatron-LM calls it gradient accumulation fusion). Who sets `main_grad` empties it
between steps. Without it W gets its gradient as ever.

`main_grad` may carry a `later`, a `Later`: dW is then left there, for a pipeline whose other stages do not wait for it.

Where x is read by a residual too, two gradients of x meet. `linear_and_input` hands x on, so that the gradient that
comes back by it is there when dy W is made, and the product adds it: x's gradient is rounded once, and written once.
(What `multiply` makes is added afterwards, and rounded twice.)

`multiply` computes y and dx in place of PyTorch's product (`kernels.fp8_product`): called with x and W, and with dy and
Wᵀ. dW is made from x and dy as they are. What has no gradient does without it: evaluation and generation see the
product of the weights as they are stored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Multiply = Callable[[Tensor, Tensor], Tensor]
"""x [..., in] and weight [out, in] to x Wᵀ [..., out], without a gradient."""


class Later:
    """Products of weight gradients that wait for their turn; the one who takes them runs them."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, x: Tensor, dout: Tensor, total: Tensor) -> None:
        """Put doutᵀ x off, which is to be added to `total`."""
        self._waiting.append((x, dout, total))

    def take(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """What was put off since the last call, in order."""
        waiting, self._waiting = self._waiting, []
        return waiting

    @staticmethod
    @torch.no_grad()
    def run(waiting: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Do what was taken."""
        for x, dout, total in waiting:
            product32(dout.t(), x, total)


def main_grad(weight: Tensor) -> Tensor | None:
    """The float32 sum that this weight's gradients go to, None where autograd keeps them."""
    return getattr(weight, "main_grad", None)


def product32(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a [m,k] @ b [k,n] in float32, added to `out` where given (in place)."""
    if a.is_cuda and a.dtype in (torch.float16, torch.bfloat16):
        if out is None:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, out=out)
    result = a.float() @ b.float()
    return result if out is None else out.add_(result)


def weight_gradient(x: Tensor, dout: Tensor, total: Tensor | None) -> Tensor | None:
    """doutᵀ x of x [..., in] and dout [..., out], in their dtype; with `total`, added to it now or later, and None."""
    rows, drows = x.flatten(0, -2), dout.flatten(0, -2)
    if total is None:
        return drows.t() @ rows
    later: Later | None = getattr(total, "later", None)
    if later is None:
        product32(drows.t(), rows, total)
    else:
        later.add(rows, drows, total)
    return None


def forward_product(x: Tensor, weight: Tensor, multiply: Multiply | None) -> Tensor:
    """x [..., in] times weight [out, in], where autograd does not look: [..., out]."""
    return F.linear(x, weight) if multiply is None else multiply(x, weight)


def input_gradient(dout: Tensor, weight: Tensor, multiply: Multiply | None, onto: Tensor | None = None) -> Tensor:
    """dout [..., out] times weight [out, in]: [..., in]; added to `onto` where given (in place if contiguous)."""
    if onto is None:
        return dout @ weight if multiply is None else multiply(dout, weight.t())
    onto = onto.contiguous()
    if multiply is None:
        onto.view(-1, onto.shape[-1]).addmm_(dout.flatten(0, -2), weight)
    else:
        onto += multiply(dout, weight.t())
    return onto


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, multiply: Multiply | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.total, ctx.multiply = main_grad(weight), multiply
        return forward_product(x, weight, multiply)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        dx = input_gradient(dout, weight, ctx.multiply) if ctx.needs_input_grad[0] else None
        return dx, weight_gradient(x, dout, ctx.total) if ctx.needs_input_grad[1] else None, None


class _LinearAndInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, multiply: Multiply | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.total, ctx.multiply = main_grad(weight), multiply
        ctx.set_materialize_grads(False)
        return forward_product(x, weight, multiply), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dpassed: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        dx = input_gradient(dout, weight, ctx.multiply, dpassed) if ctx.needs_input_grad[0] else None
        return dx, weight_gradient(x, dout, ctx.total) if ctx.needs_input_grad[1] else None, None


def linear_and_input(x: Tensor, weight: Tensor, multiply: Multiply | None = None) -> tuple[Tensor, Tensor]:
    """`linear(x, weight)`, and x [..., in] for who reads it next: the product adds its gradient of x to that reader's.

    It adds in place: the reader must make its gradient of x anew, as `residual_norm` does for every alpha but 1, and
    nothing may keep it. A weight without `main_grad` gets a product as ever, and x is handed back itself.
    """
    if main_grad(weight) is None or not torch.is_grad_enabled():
        return linear(x, weight, multiply), x
    result: tuple[Tensor, Tensor] = _LinearAndInput.apply(x, weight, multiply)
    return result


def linear(x: Tensor, weight: Tensor, multiply: Multiply | None = None) -> Tensor:
    """x [..., in] times weight [out, in]: [..., out]; the weight's gradient goes to its `main_grad` if it has one."""
    if not torch.is_grad_enabled() or (multiply is None and main_grad(weight) is None):
        return F.linear(x, weight)
    result: Tensor = _Linear.apply(x, weight, multiply)
    return result
