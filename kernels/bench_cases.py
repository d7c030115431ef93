"""What `python -m kernels.bench` measures: inputs, implementations, peers and least work of each operation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.linear import linear
from kernels.random import Dropout, dropout_key
from kernels.resolve import resolve

Run = Callable[[Sequence[Tensor]], Any]
BF16 = torch.bfloat16


@dataclass
class Case:
    """One operation at one shape.

    inputs: leaves that require grad. runs: implementation → function of the inputs giving a tensor, or a tuple whose
    first is differentiated; the check needs `reference`, which it also runs in float64. work: (forward, forward +
    backward), bytes or operations by `unit`. peer: the run whose error in bf16 is the bound.
    extra: peers with another mask, timed but not checked. graphed: timed from CUDA graphs.
    """

    op: str
    shape: str
    inputs: list[Tensor]
    runs: dict[str, Run]
    unit: str
    work: tuple[float, float]
    extra: dict[str, tuple[list[Tensor], Run, tuple[float, float]]] = field(default_factory=dict)
    peer: str = "reference"
    graphed: bool = True


def _randn(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    values = torch.randn(*shape, device="cuda", generator=generator, dtype=torch.float32) * scale
    return values.to(BF16).requires_grad_()


def _implementations(op: str, names: Sequence[str], features: set[str], call: Callable[..., Any]) -> dict[str, Run]:
    return {name: partial(call, resolve(op, name, "cuda", BF16, features)) for name in names}


def residual_norm_cases(small: bool) -> Iterator[Case]:
    """LN(α·x + drop(f + bias)): 3 + 5 passes."""
    for rows, hidden in [(1000, 1536)] if small else [(16384, 2048), (8192, 12288)]:
        for probability in (0.0, 0.1):
            batch = 8
            x, f = (_randn(batch, rows // batch, hidden, seed=i) for i in (1, 2))
            vectors = [_randn(hidden, seed=i) for i in (3, 4, 5)]
            samples = torch.arange(batch, device="cuda")
            dropout = Dropout(probability, dropout_key(1, 2, "ffn"), samples) if probability else None

            def call(function: Any, tensors: Sequence[Tensor], dropout: Dropout | None = dropout) -> Tensor:
                return function(*tensors, alpha=6.9, eps=1e-5, kind="layernorm", dropout=dropout)

            names = ["reference", "compile", "triton"] if probability == 0.0 or small else ["triton"]
            features = {"dropout"} if probability else set()
            size = 2 * x.numel()
            yield Case(
                "residual_norm",
                f"{rows}x{hidden} dropout {probability}",
                [x, f, *vectors],
                _implementations("residual_norm", names, features, call),
                "bytes",
                (3.0 * size, 8.0 * size),
            )


def bias_activation_cases(small: bool) -> Iterator[Case]:
    """Bias + activation: 3 + 5 passes of the output's size when gated."""
    for rows, features, kind in (
        [(999, 1000, "geglu"), (1000, 760, "gelu")] if small else [(16384, 5504, "geglu"), (8192, 8192, "geglu")]
    ):
        gated = kind in ("geglu", "swiglu")
        width = features * (2 if gated else 1)
        inputs = [_randn(rows, width, seed=1), _randn(width, seed=2)]

        def call(function: Any, tensors: Sequence[Tensor], kind: str = kind) -> Tensor:
            return function(*tensors, kind=kind)

        size = 2.0 * rows * features
        yield Case(
            "bias_activation",
            f"{rows}x{features} {kind}",
            inputs,
            _implementations("bias_activation", ["reference", "compile", "triton"], set(), call),
            "bytes",
            (3 * size, 8 * size) if gated else (2 * size, 5 * size),
        )


def rotary_cases(small: bool) -> Iterator[Case]:
    """Bias + rotary on the packed q, k, v: 2 + 2 passes."""
    for batch, length, heads, dim, mode in (
        [(3, 333, 5, 64, "2d")] if small else [(8, 2048, 16, 128, "1d"), (4, 2048, 96, 128, "1d")]
    ):
        x, bias = _randn(batch, length, 3 * heads, dim, seed=1), _randn(3 * heads * dim, seed=2)
        positions = torch.arange(length, device="cuda", dtype=torch.int32).expand(batch, 2, -1).contiguous()

        def call(
            function: Any, tensors: Sequence[Tensor], positions: Tensor = positions, dim: int = dim, mode: str = mode
        ) -> Tensor:
            return function(*tensors, positions, period=3, passthrough=1, rotary_dim=dim, mode=mode)

        size = 2.0 * x.numel()
        yield Case(
            "rotary",
            f"{batch}x{length}x{heads}x{dim} {mode}",
            [x, bias],
            _implementations("rotary", ["reference", "compile", "triton"], set(), call),
            "bytes",
            (2 * size, 4 * size),
        )


def prefix_intervals(batch: int, length: int) -> tuple[Tensor, Tensor, float]:
    """gMASK masks with contexts spread over [0, 0.8] of the sequence: from, to, visible share of length²."""
    context = (torch.linspace(0.0, 0.8, batch, device="cuda") * length).round().int()
    place = torch.arange(length, device="cuda", dtype=torch.int32).expand(batch, -1)
    stop = torch.maximum(place + 1, context[:, None]).int().contiguous()
    return torch.zeros_like(stop), stop, stop.double().mean().item() / length


def attention_cases(small: bool) -> Iterator[Case]:
    """Attention under gMASK's prefix masks; operations count visible elements only: 4·D and 14·D."""
    shapes = (
        [(2, 1000, 4, 2, 128, 0.0), (2, 777, 4, 4, 64, 0.0), (2, 512, 4, 1, 128, 0.1)]
        if small
        else [
            (8, 2048, 16, 16, 128, 0.0),
            (2, 8192, 16, 16, 128, 0.0),
            (8, 2048, 16, 16, 64, 0.0),
            (8, 2048, 16, 16, 128, 0.1),
        ]
    )
    for batch, length, heads, kv_heads, dim, probability in shapes:
        inputs = [_randn(batch, length, n, dim, seed=i) for i, n in enumerate((heads, kv_heads, kv_heads))]
        start, stop, share = prefix_intervals(batch, length)
        dropout = None
        if probability:
            dropout = Dropout(probability, dropout_key(1, 2, "attention"), torch.arange(batch, device="cuda"))

        def call(
            function: Any,
            tensors: Sequence[Tensor],
            start: Tensor = start,
            stop: Tensor = stop,
            scale: float = dim**-0.5,
            dropout: Dropout | None = dropout,
        ) -> Tensor:
            return function(*tensors, start, stop, scale=scale, dropout=dropout)[0]

        features = {"dropout"} if probability else set()
        names = ["reference", "unfused", "triton"] if small else ["triton"]
        if not probability:
            names += ["flex"] if small else ["flex", "sdpa"]
        runs = _implementations("interval_attention", names, features, call)
        visible = batch * heads * length * length * share
        case = Case(
            "interval_attention",
            f"B{batch} S{length} H{heads}/{kv_heads} D{dim} dropout {probability}",
            inputs,
            runs,
            "operations",
            (4.0 * dim * visible, 14.0 * dim * visible),
            peer="unfused",
        )
        if not small and not probability:
            case.extra = _vendor_masks(inputs, dim, batch * heads * length * length)
        yield case


def _vendor_masks(
    inputs: list[Tensor], dim: int, full: float
) -> dict[str, tuple[list[Tensor], Run, tuple[float, float]]]:
    """cuDNN under causal and full masks: other work than ours, the bar of what the vendor reaches."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    leaves = [t.detach().transpose(1, 2).contiguous().requires_grad_() for t in inputs]

    def run(tensors: Sequence[Tensor], causal: bool) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            q, k, v = tensors
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return {
        f"cudnn {name}": (leaves, partial(run, causal=causal), (4.0 * dim * full * part, 14.0 * dim * full * part))
        for name, causal, part in (("causal", True, 0.5), ("full", False, 1.0))
    }


def linear_cross_entropy_cases(small: bool) -> Iterator[Case]:
    """Head and cross entropy: 2 + 4 operations a token, hidden and vocabulary entry."""
    for tokens, hidden, vocab, z_loss in [(1000, 256, 5003, 1e-3)] if small else [(8192, 2048, 150528, 0.0)]:
        inputs = [_randn(tokens, hidden, seed=1), _randn(vocab, hidden, seed=2, scale=hidden**-0.5)]
        targets = torch.randint(0, vocab, (tokens,), device="cuda", generator=torch.Generator("cuda").manual_seed(3))
        weights = torch.full((tokens,), 1.0 / tokens, device="cuda")

        def call(
            function: Any,
            tensors: Sequence[Tensor],
            targets: Tensor = targets,
            weights: Tensor = weights,
            z_loss: float = z_loss,
        ) -> Tensor:
            loss, z, _ = function(*tensors, targets, weights, z_loss=z_loss)
            return loss + z if z_loss else loss

        runs = _implementations("linear_cross_entropy", ["reference", "triton"] if small else ["triton"], set(), call)

        def plain(tensors: Sequence[Tensor], targets: Tensor = targets) -> Tensor:
            return torch.nn.functional.cross_entropy((tensors[0] @ tensors[1].t()).float(), targets)

        if not small:
            runs |= {"eager": plain, "torch.compile": torch.compile(plain)}
        flops = 2.0 * tokens * hidden * vocab
        yield Case(
            "linear_cross_entropy",
            f"{tokens}x{hidden}x{vocab} z {z_loss}",
            inputs,
            runs,
            "operations",
            (flops, 3 * flops),
            graphed=False,
        )


def fp8_product_cases(small: bool) -> Iterator[Case]:
    """The four products of a layer of 2048: 2 + 4 operations a row, column and output. dW is bf16's."""
    layer = [(6144, 2048), (2048, 2048), (11008, 2048), (2048, 5504)]
    for rows, outputs, columns in [(1000, 208, 336)] if small else [(32768, *shape) for shape in layer]:
        inputs = [_randn(rows, columns, seed=1), _randn(outputs, columns, seed=2, scale=columns**-0.5)]

        def call(function: Any, tensors: Sequence[Tensor]) -> Tensor:
            x, weight = tensors
            if x.dtype == torch.float64:
                return linear(x, weight)  # what the error is counted from: nothing rounded
            # Without gradients `linear` does without FP8.
            return linear(x, weight, function) if torch.is_grad_enabled() else function(x, weight)

        work = 2.0 * rows * outputs * columns, 6.0 * rows * outputs * columns
        names = ["reference", "triton"] if small else ["triton"]
        yield Case(
            "fp8_product",
            f"{rows}x{columns} by {outputs}x{columns}",
            inputs,
            _implementations("fp8_product", names, set(), call),
            "operations",
            work,
            extra={} if small else {"bf16": (inputs, lambda tensors: linear(tensors[0], tensors[1]), work)},
        )


CASES: dict[str, Callable[[bool], Iterator[Case]]] = {
    "residual_norm": residual_norm_cases,
    "bias_activation": bias_activation_cases,
    "rotary": rotary_cases,
    "interval_attention": attention_cases,
    "linear_cross_entropy": linear_cross_entropy_cases,
    "fp8_product": fp8_product_cases,
}
