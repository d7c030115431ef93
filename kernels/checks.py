"""Argument checks of the operations: each raises a ValueError that names the argument, what it is and what is right."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def require_float(op: str, **tensors: Tensor | None) -> None:
    """Every given tensor has a floating-point dtype that the kernels know."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in FLOATS:
            raise ValueError(f"{op}: {name} is {tensor.dtype}; use float16, bfloat16, float32 or float64")


def require_dtype(op: str, name: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    """`tensor` has one of `dtypes`."""
    if tensor.dtype not in dtypes:
        raise ValueError(f"{op}: {name} is {tensor.dtype}; use {' or '.join(str(dtype) for dtype in dtypes)}")


def require_shape(op: str, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """`tensor` has exactly `shape`."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}; expected {list(shape)}")


def require_device(op: str, device: torch.device, **tensors: Tensor | None) -> None:
    """Every given tensor lies on `device`."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{op}: {name} is on {tensor.device}; expected {device}, where the first input lies")


def require_choice(op: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    """`value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{op}: {name}={value!r}; use one of {', '.join(choices)}")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype statistics and sums are kept in: float32, or float64 for float64 inputs (tests)."""
    return torch.float64 if dtype == torch.float64 else torch.float32
