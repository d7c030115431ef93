"""The parity experiment: one tiny model trained 20 steps in a given layout, and by a plain PyTorch loop.

Batches are made from the sample index alone; vectors (biases, norms) start from random values drawn by address, so that
a wrong sum of any of them shows. `FAULTS` are ways to break a layout on purpose.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.multiprocessing as multiprocessing

from data_prep.batch import Batch, group_of
from data_prep.cli import as_yaml
from kernels.random import mix_key, normal_slice
from train.cli import compose_train
from train.labels import Labels, inputs
from train.mesh import Mesh
from train.model import context as context_module
from train.model.build import Model, named_layouts
from train.model.parameters import Layout, make_parameter

SLOTS, BATCH, LR, SHRINK = 32, 8, 1e-3, 0.5
OVERRIDES = [
    "data.path=unused",
    "model.num_layers=4",
    "model.hidden_size=32",
    "model.num_heads=4",
    "model.ffn_hidden_size=48",
    "model.padded_vocab_size=128",
    f"model.max_positions={SLOTS}",
    f"global_batch_size={BATCH}",
    "micro_batch_size=2",
    "seed=3",
]
Curve = list[tuple[float, float]]
"""(loss, gradient norm) of each step."""


def batch_of(first: int, count: int) -> Batch:
    """Samples [first, first + count): random tokens, a bidirectional context, causal targets, one padded tail."""
    rows: list[tuple[torch.Tensor, ...]] = []
    slots = torch.arange(SLOTS, dtype=torch.int32)
    for index in range(first, first + count):
        generator = torch.Generator().manual_seed(index)
        tokens, targets = torch.randint(0, 120, (2, SLOTS), generator=generator)
        context = int(torch.randint(4, SLOTS // 2, (1,), generator=generator))
        used = SLOTS - int(torch.randint(0, 4, (1,), generator=generator))
        weight = torch.zeros(SLOTS)
        weight[context:used] = 1.0 / (used - context)
        attend_from = torch.where(slots < used, 0, slots)
        attend_to = torch.where(slots < context, context, slots + 1)
        group = torch.tensor(group_of(index % 2, "zh" if index % 3 else "en"), dtype=torch.uint8)
        positions = torch.stack([slots, torch.zeros_like(slots)])
        rows.append(
            (tokens, targets, weight, positions, attend_from.int(), attend_to.int(), group, torch.tensor(index))
        )
    return Batch(*(torch.stack(column) for column in zip(*rows, strict=True)))


@contextlib.contextmanager
def noisy_vectors() -> Iterator[None]:
    """Biases and norms made inside start from 0.05 x normal deviates around their usual value."""

    def noisy(layout: Layout, device: torch.device, **settings: Any) -> torch.nn.Parameter:
        parameter = make_parameter(layout, device, **settings)
        if len(layout.full_shape) == 1:
            size = layout.full_shape[0]
            deviates = normal_slice(mix_key(7, layout.name), (0, 1), (0, size), size, device=device)[0]
            parameter.data += 0.05 * layout.cut(deviates)
        return parameter

    with mock.patch.object(context_module, "make_parameter", noisy):
        yield


Clip = Callable[[dict[str, torch.nn.Parameter]], float]
"""Changes the gradients of the parameters, by name, and returns their norm before."""


def plain_curve(overrides: Sequence[str], steps: int, clip: Clip | None = None) -> Curve:
    """The trusted baseline: one process, fp32, torch's own optimizer and clip (or another), no DeepSpeed."""
    config = compose_train([*OVERRIDES, *overrides])
    with noisy_vectors():
        model = Model(config, Mesh.single(), torch.float32)
    matrices = [p for layout, p in named_layouts(model.parameters()) if len(layout.full_shape) > 1]
    vectors = [p for layout, p in named_layouts(model.parameters()) if len(layout.full_shape) == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, config.optimizer.beta2), eps=config.optimizer.eps)
    model.set_shrink(SHRINK, SHRINK if config.stability.shrink_head else 1.0)
    curve = []
    for step in range(steps):
        batch = batch_of(step * BATCH, BATCH)
        optimizer.zero_grad()
        loss, z_loss, _ = model(inputs(batch), Labels.of(batch))
        (loss + z_loss).backward()
        if clip is None:
            norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip))
        else:
            norm = clip({layout.name: parameter for layout, parameter in named_layouts(model.parameters())})
        optimizer.step()
        curve.append((float(loss.detach()), norm))
    return curve


def curves(world: int, layouts: Sequence[Sequence[str]], steps: int, fault: str | None = None) -> list[Curve]:
    """The curve of each layout (a list of overrides), all run by the same `world` processes one after the other."""
    return in_ranks(world, _curves, [list(layout) for layout in layouts], steps, fault)


def assert_two_ranks_follow_one(kinds: Sequence[Sequence[str]], layouts: Sequence[Sequence[str]], steps: int) -> None:
    """Every kind of model learns in every layout of two ranks what it learns in one process without ZeRO."""
    alone = curves(1, [[*kind, "parallel.zero_stage=0"] for kind in kinds], steps)
    found = iter(curves(2, [[*kind, *layout] for kind in kinds for layout in layouts], steps))
    for wanted in alone:
        assert wanted[-1][0] != wanted[0][0]
        for _ in layouts:
            for (loss, norm), (loss_alone, norm_alone) in zip(next(found), wanted, strict=True):
                assert abs(loss - loss_alone) <= 1e-6 * abs(loss_alone)
                assert abs(norm - norm_alone) <= 1e-5 * abs(norm_alone)


def in_ranks(world: int, work: Callable[..., Any], *settings: Any) -> Any:
    """Run `work(*settings)` in `world` forked ranks with a gloo process group; returns what rank 0's gave.

    An exception on any rank is raised here with that rank's traceback.
    """
    # This process holds the store, as torchrun does, so that nobody can take the port before the ranks have it.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    # Imported once here, so that forked ranks need not.
    import train.backend  # noqa: F401

    queue = multiprocessing.get_context("fork").SimpleQueue()
    words = (world, store.port, work, settings, queue)
    multiprocessing.start_processes(_rank, words, nprocs=world, start_method="fork")
    return queue.get()


def _rank(rank: int, world: int, port: int, work: Callable[..., Any], settings: tuple[Any, ...], queue: Any) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    names |= {"TORCHELASTIC_USE_AGENT_STORE": True}
    os.environ.update({key: str(value) for key, value in names.items()})
    torch.set_num_threads(1)
    from train import backend

    backend.start()
    result = work(*settings)
    if rank == 0:
        queue.put(result)
    backend.stop()


def _curves(layouts: list[list[str]], steps: int, fault: str | None) -> list[Curve]:
    with FAULTS[fault]() if fault else contextlib.nullcontext():
        return [_curve(layout, steps) for layout in layouts]


def _curve(layout: Sequence[str], steps: int) -> Curve:
    engine = start_engine(layout)
    results = [engine.step(my_batches(engine, step * BATCH, BATCH), LR, SHRINK) for step in range(steps)]
    return [(numbers.loss, numbers.grad_norm) for numbers in engine.read(results)]


def start_engine(overrides: Sequence[str]) -> Any:
    """An engine of the tiny model in this process group, with noisy vectors."""
    from train import backend, rules
    from train.engine import Engine

    config = compose_train([*OVERRIDES, *overrides])
    rules.check(config, world_size=backend.world_size())
    with noisy_vectors():
        return Engine.start(config, backend.make_mesh(config))


def saver_of(engine: Any, run_dir: str, **config: Any) -> Any:
    """A saver of this engine; tokenizer/ of the run folder is what it saves for one. config: SavingConfig's fields."""
    from train.checkpoint.saver import Saver
    from train.config import SavingConfig

    tokenizer = Path(run_dir) / "tokenizer"
    tokenizer.mkdir(parents=True, exist_ok=True)
    return Saver(
        engine,
        Path(run_dir),
        SavingConfig(**config),
        config_yaml=as_yaml(engine.config),
        tokenizer=tokenizer,
        before_commit=lambda: None,
    )


def my_batches(engine: Any, first: int, count: int) -> list[Batch]:
    """This rank's micro-batches of the global batch [first, first + count)."""
    size, mesh = engine.config.micro_batch_size, engine.mesh
    rounds = range(count // (size * mesh.data))
    return [batch_of(first + (k * mesh.data + mesh.data_rank) * size, size) for k in rounds]


@contextlib.contextmanager
def _bias_on_every_rank() -> Iterator[None]:
    """A row-parallel bias added before the sum over ranks, so once a rank."""
    from train.model.context import Norm

    after = Norm.after

    def wrong(self: Norm, x: Any, branch: Any, bias: Any, **settings: Any) -> Any:
        return after(self, x, branch, None if bias is None else bias * self.context.mesh.tensor, **settings)

    with mock.patch.object(Norm, "after", wrong):
        yield


@contextlib.contextmanager
def _gradient_not_summed() -> Iterator[None]:
    """Column-parallel inputs keep their own rank's gradient, so the norms before them get a part only."""

    def wrong(x: torch.Tensor, *weights: torch.Tensor, **_: Any) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        return tuple(torch.nn.functional.linear(x, weight) for weight in weights), x

    with mock.patch.object(context_module, "column_parallel", wrong):
        yield


@contextlib.contextmanager
def _norm_gradient_of_one_share() -> Iterator[None]:
    """Norms and biases keep the gradient of this rank's share of the sequence."""
    with mock.patch.object(context_module, "sum_gradients", lambda group, *tensors: tensors):
        yield


@contextlib.contextmanager
def _dropout_of_the_first_share() -> Iterator[None]:
    """Every rank drops what the first drops, wherever its share of the sequence lies."""
    made = context_module.Context.hidden_dropout

    def wrong(self: Any, *settings: Any) -> Any:
        return dataclasses.replace(made(self, *settings), offset=0)

    with mock.patch.object(context_module.Context, "hidden_dropout", wrong):
        yield


@contextlib.contextmanager
def _norm_gradient_of_one_rank() -> Iterator[None]:
    """Norm weights take the first data-parallel rank's gradient in place of the mean."""
    with _hooked(lambda name, mesh: "norm" in name, lambda grad, mesh: grad * mesh.data * (mesh.data_rank == 0)):
        yield


@contextlib.contextmanager
def _tied_gradient_halved() -> Iterator[None]:
    """The table's gradient from the last stage counts half."""
    with _hooked(lambda name, mesh: name == "word_embeddings.weight" and mesh.last_stage, lambda grad, mesh: grad / 2):
        yield


@contextlib.contextmanager
def _hooked(
    wanted: Callable[[str, Mesh], bool], change: Callable[[torch.Tensor, Mesh], torch.Tensor]
) -> Iterator[None]:
    made = Model.__init__

    def wrong(self: Model, *settings: Any) -> None:
        made(self, *settings)
        mesh = self.context.mesh
        for layout, parameter in named_layouts(self.parameters()):
            if wanted(layout.name, mesh):
                parameter.register_hook(lambda grad: change(grad, mesh))

    with mock.patch.object(Model, "__init__", wrong):
        yield


FAULTS: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "bias_on_every_rank": _bias_on_every_rank,
    "gradient_not_summed": _gradient_not_summed,
    "norm_gradient_of_one_share": _norm_gradient_of_one_share,
    "dropout_of_the_first_share": _dropout_of_the_first_share,
    "norm_gradient_of_one_rank": _norm_gradient_of_one_rank,
    "tied_gradient_halved": _tied_gradient_halved,
}
