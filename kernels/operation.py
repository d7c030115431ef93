"""An operation that torch.compile sees as one node, and that eager code calls without the dispatcher.

PyTorch's custom ops wrap each call in some ten Python functions which only tracing needs: more host time than launching
the kernel inside. Outside of compilation an `Operation` is the plain function, under a plain `autograd.Function`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


class Operation:
    """A function of tensors and numbers, by position, with its custom op `name` ("tiankong::…").

    mutates: the arguments that it writes to. Without `differentiate` it has no gradient.
    """

    def __init__(self, name: str, function: Callable[..., Any], mutates: Sequence[str] = ()) -> None:
        self._function: Callable[..., Any] = function
        self._op = torch.library.custom_op(name, function, mutates_args=mutates)

    def fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Say what the results look like, for tracing (decorator)."""
        self._op.register_fake(function)
        return function

    def differentiate(self, backward: Callable[..., Any], setup: Callable[..., None]) -> None:
        """Give it a gradient; both as `torch.autograd.Function` has them, with setup(ctx, inputs, output)."""
        self._op.register_autograd(backward, setup_context=setup)
        function = self._function

        class Differentiable(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *values: Any) -> Any:
                # Not as two methods: PyTorch would look at the function's signature in each call.
                output = function(*values)
                setup(ctx, values, output)
                return output

        Differentiable.backward = staticmethod(backward)  # type: ignore[method-assign]
        self._function = Differentiable.apply

    def __call__(self, *values: Any) -> Any:
        """The function's result."""
        # Fake tensors, which have no memory to run on, come with a dispatch mode.
        traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
        return self._op(*values) if traced else self._function(*values)


def operation(name: str, mutates: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Operation]:
    """`Operation` as a decorator."""
    return lambda function: Operation(name, function, mutates)
