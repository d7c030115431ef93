"""Stages cut by measured cost: the cut is the best there is, and the command measures what it prints."""

import itertools

import pytest

from train.balance import Costs, balance, main
from train.cli import compose_train

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("costs", [Costs(0.2, 1.0, 2.6), Costs(3.0, 1.0, 0.0), Costs(0.0, 1.0, 0.0), Costs(1, 1, 1)])
@pytest.mark.parametrize(("layers", "stages"), [(9, 3), (10, 4), (4, 4), (7, 2)])
def test_no_other_cut_has_a_faster_slowest_stage(costs: Costs, layers: int, stages: int) -> None:
    cut = balance(costs, layers, stages)
    assert sum(cut) == layers
    every = itertools.product(range(1, layers + 1), repeat=stages)
    best = min(max(costs.of_stages(other)) for other in every if sum(other) == layers)
    assert max(costs.of_stages(cut)) == pytest.approx(best)


def test_the_command_prints_a_list_that_training_takes(
    tiny_overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*tiny_overrides, "parallel.pipeline_parallel=2", "model.num_layers=5"]
    assert main(compose_train(words)) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in said[1:]] == ["by slots", "measured"]
    cut = said[2].split()[1].partition("=")[2]
    assert sum(compose_train([*words, f"parallel.layers_per_stage={cut}"]).parallel.layers_per_stage) == 5
