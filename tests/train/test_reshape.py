"""A checkpoint of any layout goes on in any other: the next 20 steps are those of the run that was not reshaped.

CI tries a random half of the pairs, another one each day; the slow test tries all.
"""

import datetime
import itertools
import random
from pathlib import Path
from typing import Any

import pytest

from tests.train.parity import BATCH, LR, SHRINK, Curve, in_ranks, my_batches, saver_of, start_engine

pytestmark = pytest.mark.distributed
BEFORE, AFTER, TOLERANCE = 4, 20, 1e-5
DROPOUT = ["model.hidden_dropout=0.1", "model.attention_dropout=0.1"]
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "tensor_2_pipeline_2": (
        4,
        [
            "parallel.tensor_parallel=2",
            "parallel.pipeline_parallel=2",
            "parallel.layers_per_stage=[1,3]",
            "micro_batch_size=4",
        ],
    ),
    "data_4_zero_1": (4, ["parallel.zero_stage=1", "micro_batch_size=1"]),
    "tensor_4": (4, ["parallel.tensor_parallel=4", "micro_batch_size=4"]),
    "data_2_zero_3": (2, ["parallel.zero_stage=3", "parallel.offload_optimizer=true"]),
}
"""Ranks and overrides of each; all take two micro-batches a step."""
PAIRS = list(itertools.permutations(LAYOUTS, 2))


@pytest.fixture(scope="module")
def unreshaped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Curve]]:
    """Folder with a run of each layout, saved after 4 steps; and the 20 steps that each took after that."""
    folder, found = tmp_path_factory.mktemp("reshape"), {}
    for world in (2, 4):
        mine = [name for name, (ranks, _) in LAYOUTS.items() if ranks == world]
        curves = in_ranks(world, _train_all, [(LAYOUTS[name][1], str(folder / name)) for name in mine])
        found |= dict(zip(mine, curves, strict=True))
    return folder, found


@pytest.mark.parametrize("share", ["half", pytest.param("all", marks=pytest.mark.slow)])
def test_reshaped_runs_go_on_alike(share: str, unreshaped: tuple[Path, dict[str, Curve]]) -> None:
    folder, expected = unreshaped
    seed = datetime.date.today().toordinal()
    pairs = PAIRS if share == "all" else random.Random(seed).sample(PAIRS, len(PAIRS) // 2)
    print(f"seed {seed}: {pairs}")
    for world in (2, 4):
        mine = [(source, target) for source, target in pairs if LAYOUTS[target][0] == world]
        if not mine:
            continue
        curves = in_ranks(world, _go_on, [(LAYOUTS[target][1], str(folder / source)) for source, target in mine])
        for (source, target), curve in zip(mine, curves, strict=True):
            for (loss, norm), (other_loss, other_norm) in zip(curve, expected[source], strict=True):
                assert loss == pytest.approx(other_loss, rel=TOLERANCE), (source, target)
                assert norm == pytest.approx(other_norm, rel=10 * TOLERANCE), (source, target)


def _train_all(runs: list[tuple[list[str], str]]) -> list[Curve]:
    """Train each layout for 4 steps, save it, and train 20 more, whose curve is returned."""
    from train.fragments import adam_steps

    curves = []
    for overrides, run_dir in runs:
        engine = start_engine([*overrides, *DROPOUT])
        _steps(engine, 0, BEFORE)
        state = {"step": BEFORE, "optimizer_steps": adam_steps(engine.deepspeed.optimizer), "loss_scaler": {}}
        saver_of(engine, run_dir, asynchronous=False).start(state)
        curves.append(_steps(engine, BEFORE, AFTER))
    return curves


def _go_on(runs: list[tuple[list[str], str]]) -> list[Curve]:
    """Load each checkpoint into a layout and train 20 steps."""
    from train.checkpoint.read import load
    from train.checkpoint.select import find

    curves = []
    for overrides, run_dir in runs:
        engine = start_engine([*overrides, *DROPOUT])
        assert load(engine, find(run_dir))["step"] == BEFORE
        curves.append(_steps(engine, BEFORE, AFTER))
    return curves


def _steps(engine: Any, first: int, count: int) -> Curve:
    steps = range(first, first + count)
    results = [engine.step(my_batches(engine, step * BATCH, BATCH), LR, SHRINK) for step in steps]
    return [(numbers.loss, numbers.grad_norm) for numbers in engine.read(results)]
