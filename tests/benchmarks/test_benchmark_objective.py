"""The objective table's runs are valid configs that differ in what they say they differ in."""

import argparse
from pathlib import Path

import pytest

from benchmarks.objective import VARIANTS, words
from train import rules
from train.cli import compose_train

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("toy", [True, False])
def test_every_variant_is_a_valid_config(toy: bool):
    options = argparse.Namespace(data="D", vocabulary=50304, slots=256, steps=1000, batch=16, toy=toy)
    seen = set()
    for variant, kinds in VARIANTS.items():
        config = compose_train(words(options, variant, 2, Path("RUN")))
        rules.check(config, world_size=1)
        sampling = config.data.sampling
        assert (sampling.gmask_share, sampling.positions) == (float(kinds["gmask_share"]), kinds["positions"])
        assert (config.seed, config.run_dir, config.sequence_length) == (2, "RUN", 256)
        seen.add((sampling.gmask_share, sampling.mask_share, config.model.positions))
    assert len(seen) == len(VARIANTS)
