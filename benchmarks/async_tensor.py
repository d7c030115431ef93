"""Do the tensor-parallel products gain by running beside their traffic? One layer's four products on two ranks.

    torchrun --nproc-per-node 2 -m benchmarks.async_tensor         # 30 s on two GPUs; benchmarks/async_tensor.csv
    torchrun --nproc-per-node 2 -m benchmarks.async_tensor --toy   # on a CPU: does it run?

With sequence parallelism a layer gathers before qkv and h_to_4h (columns) and scatters a sum after dense and 4h_to_h
(rows); backward it is the other way round. Contenders:

- plain: `train.model.tensor_parallel`, whose column backward already has its traffic beside products;
- beside: `train.model.tensor_overlap`, this rank's rows first or last;
- torch: PyTorch's async tensor parallel, torch.ops.symm_mem.fused_all_gather_matmul and fused_matmul_reduce_scatter.

Each is held to fp32 first: outputs and input gradients, then the sums of weight gradients. Times are medians of CUDA
graphs (no launch gaps), microseconds of one forward, and of forward and backward together; `alone` has the products
without traffic. What fails says why and ends no other.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# NVLink multicast is not needed, and not every host has it to give.
os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
# A message that is queued while a product runs gets the next free processors, not the last ones.
os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory  # its operations register themselves
from torch import Tensor

from benchmarks.turns import say, write
from kernels.bench import error_ratio
from kernels.linear import main_grad, product32, weight_gradient
from train import backend
from train.model import tensor_parallel

SHAPES = {"3b": (4, 2048, 3072, 8192), "glm_130b": (1, 2048, 12288, 32768), "toy": (2, 32, 16, 48)}
"""Sequences, slots, hidden size, inner size of the gated feed-forward part."""
ALLOWED = 1.5
"""Times the plain form's error."""
INNER = 4


@dataclass
class Product:
    """One tensor-parallel linear of a layer as this rank has it. column: gathers its input; else it scatters a sum."""

    column: bool
    x: Tensor
    weight: Tensor
    grad: Tensor
    long: Tensor
    """As many rows as all ranks' x, or grad, have together; only `alone` takes them."""


Run = Callable[[Product, bool], tuple[Tensor, Tensor | None]]
"""(product, also backward) -> result, gradient of x."""


def plain(product: Product, backward: bool, *, beside: bool = False) -> tuple[Tensor, Tensor | None]:
    """`train.model.tensor_parallel`'s."""
    settings: dict[str, Any] = {"group": _group(), "sequence": True, "beside": beside}
    if product.column:
        (out,), _ = tensor_parallel.column_parallel(product.x, product.weight, **settings)
    else:
        out = tensor_parallel.row_parallel(product.x, product.weight, **settings)
    return out, torch.autograd.grad(out, product.x, product.grad)[0] if backward else None


def beside(product: Product, backward: bool) -> tuple[Tensor, Tensor | None]:
    """The same with `train.model.tensor_overlap`; a column's backward pass is the plain one's."""
    return plain(product, backward, beside=True)


def torchs(product: Product, backward: bool) -> tuple[Tensor, Tensor | None]:
    """PyTorch's."""
    name, ops = _group().group_name, torch.ops.symm_mem
    x, weight = product.x.detach(), product.weight.detach()
    grad_x = None
    if product.column:
        _, (out,) = ops.fused_all_gather_matmul(x, [weight.t()], 1, name)
        if backward:
            parts, work = tensor_parallel._start_gather(x, _group())
            grad_x = ops.fused_matmul_reduce_scatter(product.grad, weight, "sum", 1, name)
            weight_gradient(tensor_parallel._end_gather(parts, work), product.grad, main_grad(product.weight))
        return out, grad_x
    out = ops.fused_matmul_reduce_scatter(x, weight.t(), "sum", 1, name)
    if backward:
        whole, (grad_x,) = ops.fused_all_gather_matmul(product.grad, [weight], 1, name)
        weight_gradient(x, whole, main_grad(product.weight))
    return out, grad_x


def alone(product: Product, backward: bool) -> tuple[Tensor, Tensor | None]:
    """The products of as many rows without traffic: what all the others could reach at best. Not right, so not held."""
    weight = product.weight.detach()
    x, grad = (product.long, product.grad) if product.column else (product.x.detach(), product.long)
    out, grad_x = x @ weight.t(), None
    if backward:
        grad_x = grad @ weight
        weight_gradient(x, grad, main_grad(product.weight))
    return out, grad_x


TURNS: list[dict[str, Run]] = [{"plain": plain, "beside": beside, "alone": alone}, {"torch": torchs}]
"""The second turn after all shapes of the first: what fails there cannot take the rest along."""


def _group() -> Any:
    return dist.group.WORLD


def products(shape: str) -> dict[str, Product]:
    """The four products of a layer, of the same numbers on every rank where they are the same."""
    sequences, slots, hidden, inner = SHAPES[shape]
    ranks, rank, target = dist.get_world_size(), dist.get_rank(), backend.device()
    found = {}
    sizes = {
        "qkv": (True, 3 * hidden, hidden),
        "dense": (False, hidden, hidden),
        "h_to_4h": (True, 2 * inner, hidden),
        "4h_to_h": (False, hidden, inner),
    }
    for number, (name, (column, rows, columns)) in enumerate(sizes.items()):
        # Every rank draws its own.
        generator = torch.Generator(target).manual_seed(10 * number + rank)

        def drawn(*size: int, scale: float = 1.0, generator: torch.Generator = generator) -> Tensor:
            return (scale * torch.randn(*size, device=target, generator=generator)).bfloat16()

        rows, columns = (rows // ranks, columns) if column else (rows, columns // ranks)
        share, whole = (sequences, slots // ranks), (sequences, slots)
        x = drawn(*(share if column else whole), columns).requires_grad_()
        weight = drawn(rows, columns, scale=columns**-0.5).requires_grad_()
        weight.main_grad = torch.zeros(rows, columns, device=target)  # type: ignore[attr-defined]
        grad = drawn(*(whole if column else share), rows)
        long = (x.detach() if column else grad).repeat(1, ranks, 1)
        found[name] = Product(column, x, weight, grad, long)
    return found


def wanted(product: Product) -> list[Tensor]:
    """Result, gradient of x and of the weight, in fp32."""
    x, weight, grad = (tensor.detach().float() for tensor in (product.x, product.weight, product.grad))
    whole = tensor_parallel.gather(x, _group()) if product.column else x
    whole_grad = grad if product.column else tensor_parallel.gather(grad, _group())
    out, grad_x = whole @ weight.t(), whole_grad @ weight
    ranks, rank = dist.get_world_size(), dist.get_rank()
    if product.column:
        dist.all_reduce(grad_x)
        grad_x = grad_x.chunk(ranks, 1)[rank]
    else:
        dist.all_reduce(out)
        out = out.chunk(ranks, 1)[rank]
    return [out, grad_x, product32(whole_grad.flatten(0, 1).t(), whole.flatten(0, 1))]


def errors(product: Product, run: Run) -> list[float]:
    """Of result, gradient of x and of the weight, the worse rank's."""
    total = main_grad(product.weight)
    assert total is not None
    total.zero_()
    out, grad_x = run(product, True)
    assert grad_x is not None
    found = [error_ratio(a, b) for a, b in zip((out.detach(), grad_x, total), wanted(product), strict=True)]
    worst = torch.tensor(found, dtype=torch.float64, device=out.device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return worst.tolist()


def microseconds(function: Callable[[], object], repeats: int) -> float:
    """Median of one call, from a graph of several where there are graphs; the slower rank's."""

    def several() -> None:
        for _ in range(INNER):
            function()

    several()
    backend.synchronize()
    run = backend.capture(several)
    run()
    times = []
    for _ in range(repeats):
        dist.barrier()
        backend.synchronize()
        clock = time.perf_counter()
        run()
        backend.synchronize()
        times.append(1e6 * (time.perf_counter() - clock) / INNER)
    found = torch.tensor(statistics.median(times), dtype=torch.float64, device=backend.device())
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found)


def measure(shape: str, contenders: dict[str, Run], repeats: int) -> Iterable[dict[str, Any]]:
    """A row a product and contender: checked, then timed."""
    for name, product in products(shape).items():
        base = errors(product, plain)
        for contender, run in contenders.items():
            row: dict[str, Any] = {"shape": shape, "product": name, "contender": contender}
            try:
                if contender != "alone":
                    found = errors(product, run)
                    row["error"] = f"{max(found):.2e}"
                    if any(mine > ALLOWED * allowed for mine, allowed in zip(found, base, strict=True)):
                        row["reason"] = f"errors {found} against {base}"
                        yield row
                        continue
                row["forward_us"] = round(microseconds(lambda: run(product, False), repeats), 1)  # noqa: B023
                row["both_us"] = round(microseconds(lambda: run(product, True), repeats), 1)  # noqa: B023
            except (RuntimeError, NotImplementedError, AttributeError, ValueError) as error:
                row["reason"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            yield row


def main() -> None:
    """All shapes; the table is written after each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=["3b", "glm_130b"], choices=SHAPES)
    parser.add_argument("--toy", action="store_true", help="a toy shape, for a machine without GPUs")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".csv"))
    options = parser.parse_args()
    backend.start()
    table: list[dict[str, Any]] = []
    for contenders in TURNS:
        for shape in ["toy"] if options.toy else options.shapes:
            for row in measure(shape, contenders, options.repeats):
                table.append(row)
                say(row)
                write(options.output, "benchmarks.async_tensor", table)
    backend.stop()


if __name__ == "__main__":
    main()
