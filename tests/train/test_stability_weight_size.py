"""Whether a tensor of weights has grown at once: against plain numbers, and a flipped bit in every layout."""

import math
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from tests.train.parity import BATCH, LR, SHRINK, in_ranks, my_batches, start_engine
from train.mesh import Mesh
from train.stability.groups import Tensors
from train.stability.reactions import Reactions
from train.stability.weight_size import SMALLEST, TIMES, WeightSize

NAMES = ["layers.0.attention.dense.weight", "layers.0.attention.dense.bias", "layers.1.mlp.dense_4h_to_h.weight"]


@pytest.mark.unit
def test_the_tensor_that_grew_most_is_told() -> None:
    mesh = Mesh.single()
    values = dict(zip(NAMES, (torch.ones(3, 4), torch.zeros(4), torch.full((4, 2), 0.5)), strict=True))
    fragments: list[Any] = [
        SimpleNamespace(master=value.view(-1), owner=True, layout=SimpleNamespace(name=name))
        for name, value in values.items()
    ]
    fragments.append(SimpleNamespace(master=torch.ones(9), owner=False, layout=SimpleNamespace(name=NAMES[0])))
    tensors = Tensors(mesh, NAMES)
    size = WeightSize(mesh, tensors)
    size.watch(fragments)

    def step(name: str, index: int, value: float) -> tuple[float, str]:
        size.begin()
        values[name].view(-1)[index] = value
        times, number = size.end().tolist()
        return times, tensors.names[int(number)]

    assert step(NAMES[0], 0, 5.0) == (pytest.approx(math.sqrt((11 + 25) / 12)), NAMES[0])
    assert step(NAMES[1], 0, 1e-4)[0] == pytest.approx(1.0)  # from zero to anything
    times, name = step(NAMES[1], 1, 0.1)  # far more than before, but it is held against SMALLEST
    assert (times, name) == (pytest.approx(0.1 / (SMALLEST * math.sqrt(4)), rel=1e-4), NAMES[1])
    assert step(NAMES[2], 3, 1e37) == (math.inf, NAMES[2])
    assert step(NAMES[2], 2, 0.6)[0] < TIMES  # it was lost before
    values[NAMES[2]].fill_(0.5)
    size.forget()
    assert step(NAMES[2], 3, -0.5)[0] == pytest.approx(1.0)


def _flipped(words: list[str]) -> list[str]:
    """Events of eight steps, in the sixth of which the highest bit of an FFN weight's exponent is flipped."""
    fault = ["stability.stress.flip_step=6", "stability.stress.flip=weight"]
    engine = start_engine([*words, *fault, "stability.cooldown_steps=0"])
    reactions, told = Reactions(engine.config, engine), []
    for step in range(1, 9):
        engine.guard.coming(step)
        number = engine.read([engine.step(my_batches(engine, (step - 1) * BATCH, BATCH), LR, SHRINK)])[0]
        event = reactions.see(step, step * BATCH, number, mock.Mock())
        told += [] if event is None or "weight_size" not in event["kind"] else [f"{event['step']} {event['seen']}"]
    return told


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world", "words"),
    [
        (1, ["parallel.zero_stage=0"]),
        (2, ["parallel.zero_stage=2", "precision=bf16"]),
        (2, ["parallel.tensor_parallel=2"]),
    ],
)
def test_a_flipped_bit_is_found_in_its_step(world: int, words: list[str]) -> None:
    told = in_ranks(world, _flipped, words)
    # The steps after it, with weights that are lost, tell of others.
    assert told[0].startswith("6 ")
    assert told[0].endswith("the norm of layers.0.mlp.dense_4h_to_h.weight is not finite in fp32")
