"""What each rank of `benchmarks.parallel` does: it imports everything, waits for its task on standard input, does it.

Tasks: `parity` trains a small model on real text and returns the loss of every step; `speed` times steps of a large one
and splits one of them by a trace. Rank 0 writes the result, as JSON, to the file that the task names.
"""

import collections
import gzip
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor

from benchmarks import step_worker, trace
from benchmarks.step import device, versions
from benchmarks.step_worker import SHAPES, Shape, Step, batch_of
from data_prep.batch import Batch
from train import backend
from train.arithmetic import flops_per_token, model_flops_utilization, parameters
from train.engine import Engine

CORPUS = Path(__file__).parent.parent / "data_prep" / "corpus"
PARITY_BATCH = 16
"""Sequences of a parity step."""
DROPOUT = ["model.hidden_dropout=0.1", "model.attention_dropout=0.1"]


def main() -> None:
    """Wait for the task and do it."""
    line = sys.stdin.readline()
    if not line:
        return
    task = json.loads(line)
    os.environ.update({key: str(value) for key, value in task["environment"].items()})
    result = TASKS[task["task"]](task)
    if backend.global_rank() == 0:
        about = {"device": device(), "versions": versions()}
        Path(task["result"]).write_text(json.dumps(result | about), encoding="utf-8")
    backend.stop()


# ---- parity ----


def parity(task: dict[str, Any]) -> dict[str, Any]:
    """Losses of `steps` steps in one layout: `shape`, `overrides`, `micro_batch`, all in bf16 with dropout."""
    shape, size = SHAPES[task["shape"]], task["micro_batch"]
    data = task["world"] // task["model_ranks"]
    config = step_worker.glm(
        shape, size, PARITY_BATCH // size, f"global_batch_size={PARITY_BATCH}", *DROPOUT, *task["overrides"]
    )
    backend.start()
    engine = Engine.start(config, backend.make_mesh(config))
    text = characters(shape.vocabulary)
    results = []
    for step in range(task["steps"]):
        whole = batch_of(shape, PARITY_BATCH, step, text)
        pieces = [piece(whole, first, size) for first in range(0, PARITY_BATCH, size)]
        # The rate warms up over 20 steps, so that the first ones measure the gradients and not Adam's noise.
        rate = 3e-4 * min(1.0, (step + 1) / 20)
        results.append(engine.step(pieces[engine.mesh.data_rank :: data], rate, 1.0))
    numbers = engine.read(results)
    return {"losses": [n.loss for n in numbers], "grad_norms": [n.grad_norm for n in numbers]}


def piece(batch: Batch, first: int, size: int) -> Batch:
    """Samples [first, first + size) of a batch."""
    return Batch(**{name: tensor[first : first + size] for name, tensor in vars(batch).items()})


def characters(vocabulary: int) -> Tensor:
    """The embedded corpus as character numbers by frequency, int64 [characters]; rare ones share the last number.

    Real Chinese and English text for a machine without a tokenizer: documents alternate between the two.
    """
    documents: list[list[str]] = []
    for lang in ("zh", "en"):
        with gzip.open(CORPUS / f"{lang}.jsonl.gz", "rt", encoding="utf-8") as file:
            documents.append([json.loads(line)["text"] for line in file])
    text = "".join(document for pair in zip(*documents, strict=False) for document in pair)
    counts = collections.Counter(text).most_common(vocabulary - 9)
    numbers = {character: number for number, (character, _) in enumerate(counts)}
    return torch.tensor([numbers.get(character, vocabulary - 9) for character in text])


# ---- speed ----


def speed(task: dict[str, Any]) -> dict[str, Any]:
    """Tokens a second, MFU, memory and the split of one step, of `micro_batches` micro-batches a data-parallel rank."""
    shape, size, count, world = SHAPES[task["shape"]], task["micro_batch"], task["micro_batches"], task["world"]
    clocks = [time.monotonic()]
    gpu, data = torch.cuda.is_available(), world // task["model_ranks"]
    step = builder(task)(shape, size, count)
    replica = distributed.get_rank() if data > 1 else 0
    batches = [batch_of(shape, size, replica * count + k) for k in range(count)]
    clocks.append(time.monotonic())
    losses = [step(batches) for _ in range(task["warmup"])]
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    clocks.append(time.monotonic())
    times, asked = [], device_allocations(gpu)
    for _ in range(task["steps"]):
        seconds, loss = together(lambda: step(batches), gpu)
        times.append(seconds)
        losses.append(loss)
    # Every rank of the last stage has a part, or with tensor parallelism the same.
    first, last = (float(summed(loss)) * task["stages"] / world for loss in (losses[0], losses[-1]))
    if not last < first:
        raise RuntimeError(f"the loss did not fall: {first} to {last}")
    seconds = statistics.median(times)
    rate = data * count * size * shape.slots / seconds
    model = step_worker.glm(shape, 1, 1).model
    flops = flops_per_token(model, shape.slots)
    mfu = model_flops_utilization(rate * flops, backend.device_name(), "bf16", world)
    peaks = (torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()) if gpu else (0, 0)
    memory = torch.tensor([peak / 2**30 for peak in peaks], device=backend.device())
    distributed.all_reduce(memory, op=distributed.ReduceOp.MAX)
    parts: list[Any] = [None] * world
    clocks.append(time.monotonic())
    asked = device_allocations(gpu) - asked
    distributed.all_gather_object(parts, (*trace.split_step(lambda: step(batches)), asked) if task["trace"] else None)
    return {
        "parameters": parameters(model).total,
        "tokens_per_second": round(rate, 1),
        "mfu": None if mfu is None else round(mfu, 4),
        "model_tflops": round(rate * flops / world / 1e12, 2),
        "step_ms": round(1e3 * seconds, 2),
        "spread": f"{min(times) / seconds:.3f}-{max(times) / seconds:.3f}",
        "memory_gib": round(float(memory[0]), 2) if gpu else None,
        "allocated_gib": round(float(memory[1]), 2) if gpu else None,
        "first_loss": round(first, 4),
        "last_loss": round(last, 4),
        # Building, steps that do not count, steps that do, the traced one.
        "seconds": " ".join(f"{b - a:.0f}" for a, b in itertools.pairwise([*clocks, time.monotonic()])),
        "split": [split for split, *_ in filter(None, parts)],
        "gaps": [gaps for _, gaps, _ in filter(None, parts)],
        "allocations": [number for *_, number in filter(None, parts)],
    }


def device_allocations(gpu: bool) -> int:
    """How often PyTorch has asked this rank's device for memory so far; 0 on a CPU."""
    return int(torch.cuda.memory_stats()["num_device_alloc"]) if gpu else 0


def builder(task: dict[str, Any]) -> Callable[[Shape, int, int], Step]:
    """How the contender of a task builds its step."""
    if task["peer"]:
        return fsdp2
    whole = task["micro_batch"] * task["micro_batches"] * task["world"] // task["model_ranks"]
    return step_worker.tiankong(*task["overrides"], f"global_batch_size={whole}")


def together(step: Callable[[], Tensor], gpu: bool) -> tuple[float, Tensor]:
    """Seconds of one step from when all ranks begin it to when the last one's device is done, and its result."""
    wait = torch.cuda.synchronize if gpu else lambda: None
    distributed.barrier()
    wait()
    clock = time.perf_counter()
    result = step()
    wait()
    distributed.barrier()
    wait()
    return time.perf_counter() - clock, result


def summed(loss: Tensor) -> Tensor:
    """A copy of the loss summed over the ranks; it is 0 on all stages but the last."""
    total = loss.detach().double().clone()
    distributed.all_reduce(total)
    return total


def fsdp2(shape: Shape, micro_batch: int, accumulation: int) -> Step:
    """litgpt's model under PyTorch's FSDP2 with fp32 master weights, sharded and compiled by layer as in torchtitan.

    Gradients are reduced once a step, as litgpt's own pre-training does under accumulation.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    backend.start()
    target = backend.device()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    with torch.device(target):
        model = step_worker.litgpt_model(shape)
    for index, block in enumerate(model.transformer.h):
        model.transformer.h[index] = torch.compile(block) if target.type == "cuda" else block
        fully_shard(model.transformer.h[index], mp_policy=policy)
    fully_shard(model, mp_policy=policy)

    def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    chosen = torch.compile(cross_entropy) if target.type == "cuda" else cross_entropy
    return step_worker.accumulated(
        lambda batch: chosen(model(batch.tokens.to(target)), batch.targets.to(target)),
        list(model.parameters()),
        before=model.set_requires_gradient_sync,
    )


TASKS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"parity": parity, "speed": speed}

if __name__ == "__main__":
    main()
