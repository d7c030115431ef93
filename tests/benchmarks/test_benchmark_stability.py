"""The runs of the stability benchmark: every one is a valid training run, and no two share a folder."""

import pytest

from benchmarks.stability_plan import FAULT, Size, plan, steps_of
from train import rules
from train.cli import compose_train

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_planned_run_is_a_valid_config(whole: bool):
    """One run of each group; all of them where there is time."""
    runs = plan(Size(), seeds=(1,))
    assert len({run.name for run in runs}) == len(runs)
    first = {run.group: run for run in reversed(runs)}
    for run in runs if whole else first.values():
        config = compose_train(["data.path=D", *run.words, "micro_batch_size=16", "global_batch_size=16"])
        rules.check(config, world_size=1)
        assert (config.model.num_layers, config.sequence_length) == (8, 256), run.name
        assert config.max_steps == steps_of(run)
        assert config.schedule.warmup_samples < config.schedule.decay_samples
        if run.group == "softmax":
            stored = "fused" not in run.variant
            assert config.kernels.interval_attention == ("unfused" if stored else "triton")


def test_a_fault_begins_where_its_step_does():
    words = {run.variant: run.words for run in plan(Size(batch=16), seeds=(1,)) if run.group == "faults"}
    assert f"stability.stress.poison_samples=[{16 * (FAULT - 1)},{16 * (FAULT + 4)}]" in words["garbage"]
    assert f"stability.stress.flip_step={FAULT}" in words["flip_weight"]
    assert f"stability.stress.lr_steps=[{FAULT},{FAULT + 19}]" in words["lr_x10"]
