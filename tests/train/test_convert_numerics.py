"""GLM-130B's released class, on files that `train.convert` wrote, computes what this project computes.

Its logits are stored (tests/train/sat_reference.py made them and says how); the slow test runs the class itself.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.train import sat_reference
from tests.train.convert_helpers import config_of
from tests.train.sat_reference import CASES, CONTEXT, FIXTURE, SLOTS, addressed_weights, model_for, sample
from train.mesh import Mesh
from train.model.build import Model, named_layouts


def our_logits(fp16_angles: bool) -> Tensor:
    """Logits [2, SLOTS, vocabulary] of this project's model with the same weights, in fp32."""
    shape = model_for(fp16_angles)
    weights = addressed_weights(shape)
    model = Model(config_of(shape, objective="blank_infilling"), Mesh.single(), torch.float32).eval()
    for layout, parameter in named_layouts(model.parameters()):
        parameter.data = weights[layout.name]
    tokens, places = sample()
    upto = (torch.arange(SLOTS) + 1).clamp(min=CONTEXT).expand_as(tokens)
    meta = torch.stack([places, 0 * places, 0 * places, upto], 1)
    assert model.head is not None
    with torch.no_grad():
        return model.head.logits(model((tokens, meta, torch.arange(2))))


def check(stored: dict[str, np.ndarray]) -> None:
    for name, (fp16_angles, _) in CASES.items():
        theirs, ours = torch.from_numpy(stored[name]), our_logits(fp16_angles)
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max(), name
    assert np.abs(stored["fp16_angles_tp1"] - stored["fp32_angles_tp1"]).max() > 1e-2, "the angles made no difference"


@pytest.mark.unit
def test_the_released_class_gave_our_logits() -> None:
    with np.load(FIXTURE) as stored:
        check(dict(stored))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(importlib.util.find_spec("SwissArmyTransformer") is None, reason="see tests/train/sat_reference.py")
def test_the_released_class_gives_our_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One and two ranks; run with the unpacked wheel on PYTHONPATH."""
    monkeypatch.setattr(sat_reference, "FIXTURE", tmp_path / "logits.npz")
    assert sat_reference.main() == 0
    with np.load(tmp_path / "logits.npz") as stored:
        check(dict(stored))
