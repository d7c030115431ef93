"""Sums scattered under the last backward pass: the numbers of a scatter at the end, each element sent once."""

from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from tests.train.parity import BATCH, LR, SHRINK, in_ranks, my_batches, start_engine
from train import scatter
from train.scatter import Scatter, by_owner, joined

BF16 = ["precision=bf16", "parallel.zero_stage=1"]
LAYOUTS = {
    2: [
        ["optimizer.clip=0.5", "model.hidden_dropout=0.1"],
        ["model.tied_embeddings=false", "lora.rank=2", "parallel.activation_checkpointing=full"],
    ],
    4: [
        ["parallel.pipeline_parallel=2"],
        ["parallel.pipeline_parallel=2", "model.tied_embeddings=false", "parallel.layers_per_stage=[3,1]"],
        ["parallel.tensor_parallel=2", "parallel.sequence_parallel=true", "model.num_kv_heads=1"],
    ],
}


@pytest.mark.unit
def test_spans_are_cut_at_their_owners_borders() -> None:
    assert list(by_owner((3, 21), 8)) == [((3, 8), 0), ((8, 16), 1), ((16, 21), 2)]
    assert list(by_owner((8, 16), 8)) == [((8, 16), 1)]
    assert joined([(0, 3), (3, 5), (6, 8)]) == [(0, 5), (6, 8)]


@pytest.mark.unit
def test_where_nothing_tells_of_backward_passes_all_goes_at_the_end() -> None:
    weight, sums = nn.Parameter(torch.zeros(4)), torch.zeros(4)
    weight.main_grad = sums  # type: ignore[attr-defined]
    optimizer = mock.Mock(
        bf16_groups=[[weight]],
        fp32_groups_gradients_flat=[sums],
        fp32_groups_gradient_flat_partition=[sums[:2]],
        real_dp_process_group=[None],
    )
    with (
        mock.patch.object(scatter, "_ranks", return_value=2),
        mock.patch.object(scatter, "_mean"),
        mock.patch.object(torch.distributed, "reduce_scatter_tensor") as sent,
    ):
        Scatter(optimizer, [], None).end()
    assert sent.call_args.args == (optimizer.fp32_groups_gradient_flat_partition[0], sums)


@pytest.mark.distributed
def test_a_rank_alone_sends_nothing() -> None:
    assert in_ranks(1, _alone) == 0


def _alone() -> int:
    with mock.patch.object(scatter, "LEAST", 1), mock.patch.object(torch.distributed, "reduce") as sent:
        engine = start_engine(BF16)
        engine.step(my_batches(engine, 0, BATCH), LR, SHRINK)
    return sent.call_count


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_sums_sent_layer_by_layer_are_those_sent_at_the_end(world: int) -> None:
    for layout in LAYOUTS[world]:
        apart = in_ranks(world, _both, [*BF16, *layout])
        assert apart == [0.0, 0.0], layout


@pytest.mark.slow
@pytest.mark.distributed
def test_four_ranks_differ_by_the_order_of_additions_only() -> None:
    first, _ = in_ranks(4, _both, [*BF16, "model.tied_embeddings=false"])
    assert first < 1e-7


def _both(layout: list[str]) -> list[float]:
    """Largest difference on any rank, in the sums of each of two steps, over their largest."""
    with mock.patch.object(scatter, "LEAST", 1):
        plain, found = (_steps(layout, announced=announced) for announced in (False, True))
    apart = torch.stack([(a - b).abs().max() / a.abs().max() for a, b in zip(plain, found, strict=True)])
    torch.distributed.all_reduce(apart, op=torch.distributed.ReduceOp.MAX)
    return apart.tolist()


def _steps(layout: list[str], *, announced: bool) -> list[Tensor]:
    """This rank's part of the sums of two steps."""
    engine = start_engine(layout)
    optimizer, sums = engine.deepspeed.optimizer, engine.model.scatter
    early: list[int] = []
    found: list[Tensor] = []
    ended = sums.end

    def end() -> None:
        early.append(len(engine.model.items) - sums._first_sent)
        ended()
        found.append(torch.cat(optimizer.fp32_groups_gradient_flat_partition))

    with mock.patch.object(sums, "end", end), mock.patch.object(sums, "begin", sums.begin if announced else _nothing):
        engine.step(my_batches(engine, 0, BATCH), LR, SHRINK)
        # What is evaluated goes through the items too, and the batch may grow.
        engine.evaluate(my_batches(engine, 0, BATCH))
        engine.step(my_batches(engine, BATCH, 2 * BATCH), LR, SHRINK)
    # Every item but the first has gone before the end (a frozen embedding does not say when it has been passed).
    wanted = len(engine.model.items) - (2 if engine.config.lora.rank else 1)
    assert early == [wanted if announced else 0] * 2
    return found


def _nothing(_: int) -> None:
    return None
