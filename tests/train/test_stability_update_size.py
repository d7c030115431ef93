"""How far a step moves the weights: the window against plain Python, what it forgets, and a rate that is ten times."""

import json
import math
import random
import statistics
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from tests.train.parity import BATCH, LR, SHRINK, in_ranks, my_batches, start_engine
from train.cli import compose_train
from train.mesh import Mesh
from train.stability.reactions import Reactions
from train.stability.update_size import TIMES, WINDOW, UpdateSize


def _fragment(values: torch.Tensor, *, owner: bool = True) -> Any:
    return SimpleNamespace(master=values.view(-1), owner=owner, layout=SimpleNamespace(full_shape=tuple(values.shape)))


@pytest.mark.unit
@pytest.mark.parametrize("tuned", [False, True])
def test_the_window_is_a_plain_median(tuned: bool) -> None:
    vector, another, matrix, replica = torch.ones(8), torch.zeros(4), torch.zeros(4, 8), torch.zeros(8)
    fragments = [_fragment(one) for one in (vector, another, matrix)] + [_fragment(replica, owner=False)]
    ours = UpdateSize(Mesh.single(), tuned=tuned)
    ours.watch(fragments)
    generator, held = random.Random(5), [math.nan] * WINDOW
    over = []
    for step in range(60):
        # A warm-up from 0, then noise; one step is far too long and some are left out.
        rate = 1e-3 * min(1.0, (step + 1) / 20) * math.exp(generator.gauss(0, 0.1))
        rate *= {40: 10.0, 50: 0.0, 51: 0.0}.get(step, 1.0)
        ours.begin()
        for values in (vector, another, matrix, replica):
            values += rate
        size, times = ours.end().tolist()
        assert size == pytest.approx(rate * math.sqrt(8 + 4 + (32 if tuned else 0)), rel=1e-3)
        known = [value for value in held[-WINDOW:] if not math.isnan(value)]
        told = len(known) * 2 >= WINDOW and rate > 0
        assert times == pytest.approx(size / statistics.median_low(known) if told else 0.0, rel=1e-6)
        held.append(size if rate > 0 else math.nan)
        if times > TIMES:
            over.append(step)
        if step in (10, 52):
            again = UpdateSize(Mesh.single(), tuned=tuned)
            again.watch(fragments)
            again.load(json.loads(json.dumps(ours.state())))
            ours = again
    assert over == [40]


def _known(reactions: Reactions) -> int:
    return sum(value is not None for value in reactions.engine.guard.update_size.state())


def _reactions(*words: str) -> Reactions:
    size = UpdateSize(Mesh.single(), tuned=False)
    size.load([1.0] * WINDOW)
    guard = mock.Mock(update_size=size)
    guard.state.return_value = {}
    fragments = mock.Mock(return_value=[])
    return Reactions(
        compose_train(["experiment=demo", *words]),
        mock.Mock(guard=guard, fragments=fragments, deepspeed=mock.Mock(optimizer=torch.optim.AdamW([torch.zeros(1)]))),
    )


@pytest.mark.unit
@pytest.mark.parametrize(
    ("act", "forgets"),
    [
        ("action: reset_optimizer", True),
        ("action: lower_lr, factor: 4", True),
        ("action: lower_lr, factor: 0.5", False),
        ("action: lower_shrink, factor: 0.5", False),
    ],
)
def test_an_act_that_makes_updates_larger_is_no_spike(act: str, forgets: bool) -> None:
    reactions = _reactions(f"stability.events=[{{step: 3, {act}}}]")
    for step in (1, 2, 3):
        assert _known(reactions) == WINDOW
        reactions.before(step, step * BATCH)
    assert _known(reactions) == (0 if forgets else WINDOW)
    reactions.engine.guard.update_size.load([1.0] * WINDOW)
    reactions.before(4, 4 * BATCH)
    assert _known(reactions) == WINDOW


@pytest.mark.unit
@pytest.mark.parametrize("change", ["optimizer.lr=0.5", "schedule.decay_samples=9999999", "max_steps=77"])
def test_a_run_that_goes_on_with_another_rate_begins_a_new_window(change: str) -> None:
    saved = json.loads(json.dumps(_reactions().state()))
    same, other = _reactions(), _reactions(change)
    for reactions in (same, other):
        reactions.load_state(saved)
    assert _known(same) == WINDOW
    assert _known(other) == (WINDOW if change.startswith("max_steps") else 0)


def _hurried(layout: list[str]) -> tuple[list[dict[str, float]], list[str]]:
    """Twenty steps, the thirteenth and two more at ten times the rate."""
    engine = start_engine(layout)
    reactions, told = Reactions(engine.config, engine), []
    seen = []
    for step in range(1, 21):
        engine.guard.coming(step)
        rate = LR * (10 if 13 <= step <= 15 else 1)
        number = engine.read([engine.step(my_batches(engine, (step - 1) * BATCH, BATCH), rate, SHRINK)])[0]
        event = reactions.see(step, step * BATCH, number, mock.Mock())
        told += [] if event is None else [f"{event['step']} {event['kind']} {event['seen']}"]
        seen.append(number.seen)
    return seen, told


@pytest.mark.distributed
def test_ten_times_the_rate_is_found_in_its_first_step() -> None:
    (alone, told), (two, told_by_two) = (
        in_ranks(world, _hurried, layout)
        for world, layout in ((1, ["parallel.zero_stage=0"]), (2, ["parallel.zero_stage=2", "precision=bf16"]))
    )
    for seen in (alone, two):
        assert [number + 1 for number, one in enumerate(seen) if one["update_times"] > TIMES] == [13, 14, 15]
    assert [one["update_times"] for one in two] == pytest.approx([one["update_times"] for one in alone], rel=0.1)
    for events in (told, told_by_two):
        assert len(events) == 1
        assert events[0].startswith("13 update_size_spike update_size ")
        assert events[0].endswith(" times the median of the steps before it")
