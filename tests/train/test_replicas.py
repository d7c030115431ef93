"""Silent faults: a bit that flips in one copy of a parameter, a gradient that is no number, are found and named."""

from typing import Any

import pytest
import torch

from tests.train.parity import BATCH, LR, in_ranks, my_batches, start_engine
from train.model.build import named_layouts

pytestmark = pytest.mark.distributed
SHARED, CUT, TABLE = "layers.1.post_attention_norm.bias", "layers.1.mlp.dense_4h_to_h.weight", "word_embeddings.weight"


@pytest.mark.parametrize(
    ("layout", "name", "said"),
    [
        (["parallel.tensor_parallel=2"], SHARED, f"{SHARED} is not the same on the tensor-parallel ranks 0, 1"),
        (["parallel.zero_stage=1"], CUT, f"{CUT} is not the same on the data-parallel ranks 0, 1"),
        (["parallel.pipeline_parallel=2"], TABLE, f"{TABLE} is not the same on the end ranks 0, 1"),
    ],
    ids=["tensor", "data", "tied"],
)
def test_a_flipped_bit_in_one_replica_is_named(layout: list[str], name: str, said: str) -> None:
    assert in_ranks(2, _flip, layout, name) == [None, said]


def test_under_zero_3_the_pieces_are_compared() -> None:
    layout = ["parallel.tensor_parallel=2", "parallel.zero_stage=3", "parallel.sequence_parallel=true"]
    healthy, said = in_ranks(4, _flip, layout, SHARED)
    assert healthy is None
    assert said.startswith(f"{SHARED} is not the same on the tensor-parallel ranks ")


def test_the_first_layer_and_its_rank_are_named() -> None:
    assert in_ranks(2, _broken) == [
        "rank 1, layers.2",
        "rank 1, the gradient of layers.2",
        "rank 1, the gradient of layers.2.mlp.dense_4h_to_h.bias",
    ]


def _flip(layout: list[str], name: str) -> list[str | None]:
    """What the comparison says after two steps, and after the lowest bit of one value of the last rank has flipped."""
    from train.replicas import differing_replicas

    engine = start_engine(layout)
    for step in range(2):
        engine.step(my_batches(engine, step * BATCH, BATCH), LR, 1.0)
    said = [differing_replicas(engine)]
    if engine.mesh.rank == engine.mesh.world - 1:
        for found, parameter in named_layouts(engine.model.parameters()):
            if found.name == name:
                stored = parameter.ds_tensor if engine.zero_stage == 3 else parameter
                stored.data.view(-1).view(torch.int32)[3] ^= 1
    said.append(differing_replicas(engine))
    return said


def _broken() -> list[str | None]:
    """Where the engine says it went wrong, when layer 2 of the second rank's stage gives a NaN on the way, on the way
    back, or in the gradient of one bias alone."""
    return [_broken_in(place) for place in ("output", "gradient", "parameter")]


def _broken_in(place: str) -> str | None:
    engine = start_engine(["parallel.pipeline_parallel=2"])
    for item in engine.model.items:
        if getattr(item, "index", None) == 2 and place != "parameter":
            item.register_forward_hook(lambda module, inputs, output: (_spoil(output[0], place), *output[1:]))
        elif getattr(item, "index", None) == 2:
            bias = next(p for layout, p in named_layouts(item.parameters()) if layout.name.endswith("4h_to_h.bias"))
            bias.register_hook(lambda gradient: gradient * float("inf"))
    result = engine.step(my_batches(engine, 0, BATCH), LR, 1.0)
    found: str | None = engine.first_bad_layer(result)
    return found


def _spoil(hidden: torch.Tensor, place: str) -> Any:
    if place == "output":
        return hidden * float("nan")
    hidden = hidden * 1.0
    if hidden.requires_grad:
        hidden.register_hook(lambda gradient: gradient * float("nan"))
    return hidden
