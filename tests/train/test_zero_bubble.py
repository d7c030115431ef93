"""Zero bubble: the paper's closed form, and 1F1B's numbers bit by bit in every layout."""

from collections.abc import Iterator

import pytest

from tests.train.parity import curves
from train.zero_bubble import order

PIPELINE, BF16 = "parallel.pipeline_parallel=2", ["precision=bf16", "parallel.zero_stage=1"]
ZERO_BUBBLE = "parallel.pipeline_schedule=zero_bubble"
DROPOUT = ["model.hidden_dropout=0.1", "model.attention_dropout=0.1"]
KINDS = ("forward", "backward", "weights")
LAYOUTS = {
    2: [[PIPELINE, *DROPOUT, "parallel.layers_per_stage=[3,1]", "loss.z_loss=1e-3"]],
    4: [
        ["parallel.pipeline_parallel=4", "model.num_layers=6"],
        [PIPELINE, "parallel.offload_optimizer=true", "model.tied_embeddings=false"],
        [PIPELINE, "parallel.tensor_parallel=2", "parallel.sequence_parallel=true", *DROPOUT],
        [PIPELINE, "parallel.tensor_parallel=2", "parallel.activation_checkpointing=full", "model.num_kv_heads=1"],
    ],
}


def seconds(stages: int, micro_batches: int, forward: float, inputs: float, weights: float) -> float:
    """Of a step whose messages cost nothing, each pass starting when the stage and what it needs are ready."""
    lasts = {"forward": forward, "backward": inputs, "weights": weights}
    todo = [order(stage, stages, micro_batches, stage) for stage in range(stages)]
    clock, done = [0.0] * stages, {}
    while any(todo):
        for stage, passes in enumerate(todo):
            while passes:
                kind, number = passes[0]
                source = {"forward": stage - 1, "backward": stage + 1}.get(kind, -1)
                if 0 <= source < stages and (kind, source, number) not in done:
                    break
                clock[stage] = max(clock[stage], done.get((kind, source, number), 0.0)) + lasts[kind]
                done[kind, stage, number] = clock[stage]
                passes.pop(0)
    return max(clock)


@pytest.mark.unit
@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 8), (4, 16), (8, 16)])
def test_stages_wait_as_long_as_the_paper_says(stages: int, micro_batches: int) -> None:
    # Qi et al. 2023 (arXiv 2401.10241), table 1, ZB-H1: (p - 1)(F + B - W).
    found = seconds(stages, micro_batches, 1.0, 1.25, 0.75)
    assert found == pytest.approx(3.0 * micro_batches + 1.5 * (stages - 1))


@pytest.mark.unit
def test_every_stage_does_every_pass_once_and_holds_no_more_than_1f1b() -> None:
    for stages in (2, 4):
        for stage in range(stages):
            for count in (1, 2, 8):
                passes = order(stage, stages, count, stage)
                assert sorted(passes) == sorted((kind, number) for kind in KINDS for number in range(count))
                live = [
                    sum((kind == "forward") - (kind == "weights") for kind, _ in passes[:end])
                    for end in range(len(passes) + 1)
                ]
                assert max(live) <= stages


@pytest.mark.unit
def test_every_message_finds_its_other_end_though_each_stage_waits_for_its_own() -> None:
    # The worst that memory to be allocated or a kernel to be loaded can do: after each pass a stage waits until what it
    # sends and what its next pass needs have both passed.
    for stages in range(2, 9):
        for count in (1, 2, 3, 8, 17):
            rounds = [list(messages(stage, stages, count)) for stage in range(stages)]
            while any(rounds):
                open_now = [message for todo in rounds for message in (todo[0] if todo else ())]
                met = {message for message in open_now if open_now.count(message) == 2}
                left = [[todo[0] - met, *todo[1:]] if todo else [] for todo in rounds]
                left = [todo[1:] if todo and not todo[0] else todo for todo in left]
                assert left != rounds, (stages, count)
                rounds = left


def messages(stage: int, stages: int, count: int) -> Iterator[set[tuple[str, int, int]]]:
    """What a stage has under way after each pass but those of weights: {(kind, the lower stage, micro-batch)}."""
    passes = [one for one in order(stage, stages, count, stage) if one[0] != "weights"]
    for before, after in zip([None, *passes], [*passes, None], strict=True):
        found = set()
        for one, sends in ((before, True), (after, False)):
            if one is not None:
                kind, number = one
                lower = stage if sends == (kind == "forward") else stage - 1
                if 0 <= lower < stages - 1:
                    found.add((kind, lower, number))
        yield found


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_zero_bubble_gives_1f1bs_numbers_bit_by_bit(world: int) -> None:
    both = [[*BF16, *layout, *more] for layout in LAYOUTS[world] for more in ([], [ZERO_BUBBLE])]
    found = iter(curves(world, both, 2))
    for layout in LAYOUTS[world]:
        plain, moved = next(found), next(found)
        assert plain[0] != plain[-1]
        assert plain == moved, layout
