"""Which implementation of an operation runs: one table, one function.

`resolve("residual_norm", config.residual_norm, device, dtype, {"dropout"})` returns the callable. `auto` takes the
first of the operation's preferences that runs on the device with the dtype and has every feature asked for; a named
implementation that lacks one is refused with the config key to change. Each choice is logged once a process.

Features: residual_norm, `dropout` `return_sum`; interval_attention, `dropout` `softcap` `lse` `max_logit`
`half_softmax` `pb_relax` `deterministic` `prefix`; linear_cross_entropy, `tensor_parallel` `z_loss` `softcap`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

logger = logging.getLogger(__name__)

Operation = Callable[..., Any]
BF16 = frozenset({torch.bfloat16})
HALF = frozenset({torch.float16, torch.bfloat16})
ALL_FLOATS = HALF | {torch.float32, torch.float64}
ANY = frozenset({"*"})


class KernelError(ValueError):
    """A kernel that the config asks for cannot run here; the message names the key `kernels.<op>`."""


@dataclass(frozen=True)
class Implementation:
    """Where an implementation lives and what it can do.

    target: "module:function". features: those it has, or ANY. devices: device types, or ANY. capability: the major
    compute capability of the GPUs that it runs on, None for any. switches: features that are passed on to the function
    as keywords set to True.
    """

    target: str
    features: frozenset[str] = ANY
    devices: frozenset[str] = ANY
    dtypes: frozenset[torch.dtype] = frozenset(ALL_FLOATS)
    needs: str | None = None
    capability: int | None = None
    switches: tuple[str, ...] = ()
    compiled: bool = False

    def lacks(self, device: torch.device, dtype: torch.dtype, features: frozenset[str]) -> str | None:
        """Why it cannot serve, in a phrase, or None."""
        interpreted = self.needs == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
        if self.devices != ANY and device.type not in self.devices and not interpreted:
            return f"does not run on {device.type}"
        if self.needs and not _installed(self.needs):
            return f"needs the package {self.needs}"
        if self.capability and torch.cuda.is_available():
            found = torch.cuda.get_device_capability(device)
            if found[0] != self.capability:
                return f"needs a GPU of compute capability {self.capability}.x, not {found[0]}.{found[1]}"
        if dtype not in self.dtypes:
            return f"does not take {dtype}"
        missing = sorted(features - self.features) if self.features != ANY else []
        return f"lacks {', '.join(missing)}" if missing else None

    def load(self, features: frozenset[str]) -> Operation:
        """Import the function, with its switches set."""
        module, name = self.target.split(":")
        function: Operation = getattr(importlib.import_module(module), name)
        chosen = {switch: True for switch in self.switches if switch in features}
        if chosen:
            function = functools.partial(function, **chosen)
        return _compiled(function) if self.compiled else function


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:  # of the package that it is a part of, which is missing or broken
        return False


@functools.cache
def _compiled(function: Operation) -> Operation:
    return torch.compile(function, dynamic=False)


@dataclass(frozen=True)
class Operations:
    """An operation's implementations by their config name, and what `auto` tries, in order, by device type."""

    implementations: dict[str, Implementation]
    auto: dict[str, tuple[str, ...]] = field(default_factory=dict)


CUDA = frozenset({"cuda"})
FAST: dict[str, tuple[str, ...]] = {"cuda": ("triton", "reference")}  # what auto tries; elsewhere the reference


def _pair(name: str, features: frozenset[str]) -> dict[str, Implementation]:
    target = f"kernels.{name}:{name}"
    return {"reference": Implementation(target, features), "compile": Implementation(target, features, compiled=True)}


def _triple(name: str, features: frozenset[str]) -> dict[str, Implementation]:
    ours = Implementation(f"kernels.{name}_triton:{name}", features, CUDA, HALF | {torch.float32}, needs="triton")
    return {**_pair(name, features), "triton": ours}


_ATTENTION = "kernels.interval_attention"
_ATTENTION_FEATURES = frozenset({"dropout", "softcap", "lse", "max_logit", "deterministic"})

TABLE: dict[str, Operations] = {
    "residual_norm": Operations(_triple("residual_norm", frozenset({"dropout", "return_sum"})), FAST),
    "bias_activation": Operations(_triple("bias_activation", frozenset()), FAST),
    "rotary": Operations(_triple("rotary", frozenset()), FAST),
    "embedding": Operations(_pair("embedding", frozenset())),
    "quantised_matmul": Operations(_triple("quantised_matmul", frozenset()), FAST),
    **{
        op: Operations({name: one for name, one in _triple(op, frozenset()).items() if not one.compiled}, FAST)
        for op in ("decode_attention", "greedy_step")
    },
    "fp8_product": Operations(
        {
            "reference": Implementation("kernels.fp8_product:fp8_product", frozenset()),
            "triton": Implementation("kernels.fp8_product_triton:fp8_product", frozenset(), CUDA, BF16, needs="triton"),
        },
        {"cuda": ("triton",)},  # the reference there would be slower than no FP8, and nobody would know
    ),
    "linear_cross_entropy": Operations(
        _triple("linear_cross_entropy", frozenset({"tensor_parallel", "z_loss", "softcap"})), FAST
    ),
    "interval_attention": Operations(
        {
            **_pair("interval_attention", _ATTENTION_FEATURES | {"prefix"}),
            "triton": Implementation(
                f"{_ATTENTION}_triton:interval_attention",
                _ATTENTION_FEATURES,
                CUDA,
                HALF | {torch.float32},
                needs="triton",
            ),
            "flex": Implementation(
                f"{_ATTENTION}_flex:interval_attention", frozenset({"softcap", "lse"}), CUDA, HALF | {torch.float32}
            ),
            "flash4": Implementation(
                f"{_ATTENTION}_flash4:interval_attention",
                frozenset({"lse"}),
                CUDA,
                BF16,
                needs="flash_attn.cute",
                capability=9,  # its lists of blocks were compiled and held to the reference for Hopper only
            ),
            "unfused": Implementation(
                f"{_ATTENTION}:unfused_attention",
                _ATTENTION_FEATURES | {"half_softmax", "pb_relax", "prefix"},
                switches=("half_softmax", "pb_relax"),
            ),
            "sdpa": Implementation(f"{_ATTENTION}:sdpa_attention", frozenset({"prefix"})),
        },
        {"cuda": ("triton", "sdpa", "reference", "unfused"), "": ("sdpa", "reference", "unfused")},
    ),
}


def resolve(
    op: str,
    requested: str,
    device: torch.device | str,
    dtype: torch.dtype,
    features: Iterable[str] = (),
) -> Operation:
    """The callable of an operation; arguments and errors as `choose`."""
    name = choose(op, requested, device, dtype, features)
    _log_once(op, requested, name, str(torch.device(device).type), str(dtype))
    return TABLE[op].implementations[name].load(frozenset(features))


def choose(
    op: str,
    requested: str,
    device: torch.device | str,
    dtype: torch.dtype,
    features: Iterable[str] = (),
) -> str:
    """The name of the implementation that runs.

    op: a name of `KernelsConfig`. requested: its value. features: what the run needs, see the file's head.
    Raises KernelError (a ValueError) that names `kernels.<op>` where no implementation fits.
    """
    if op not in TABLE:
        raise KernelError(f"kernels.{op}: no such operation; there are {', '.join(sorted(TABLE))}")
    device, wanted, known = torch.device(device), frozenset(features), TABLE[op].implementations
    if requested == "auto":
        by_device = TABLE[op].auto
        order = by_device.get(device.type, by_device.get("", ("reference",)))
    elif requested in known:
        order = (requested,)
    else:
        raise KernelError(f"kernels.{op}={requested!r}; use one of auto, {', '.join(sorted(known))}")
    reasons = {name: known[name].lacks(device, dtype, wanted) for name in order}
    for name, reason in reasons.items():
        if reason is None:
            return name
    able = [name for name, one in known.items() if one.lacks(device, dtype, wanted) is None]
    why = "; ".join(f"{name} {reason}" for name, reason in reasons.items())
    hint = f"use {' or '.join(able)}" if able else "nothing else offers it"
    raise KernelError(f"kernels.{op}={requested}: {why}; {hint}")


@functools.cache
def _log_once(op: str, requested: str, chosen: str, device: str, dtype: str) -> None:
    logger.info("kernels.%s=%s runs %s on %s in %s", op, requested, chosen, device, dtype)
