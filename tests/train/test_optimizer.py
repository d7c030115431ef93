"""Which parameters decay, and the optimizer that clips by itself."""

import pytest
import torch

from tests.train.parity import OVERRIDES, batch_of, noisy_vectors
from train.cli import compose_train
from train.labels import Labels, inputs
from train.mesh import Mesh
from train.model.build import Model, named_layouts
from train.optimizer import ClippingAdamW, global_norm, make_optimizer

pytestmark = pytest.mark.unit


def made(*overrides: str) -> tuple[Model, torch.optim.Optimizer]:
    config = compose_train([*OVERRIDES, *overrides])
    with noisy_vectors():
        model = Model(config, Mesh.single(), torch.float32)
    return model, make_optimizer(model, config.optimizer, Mesh.single(), clips=True)


@pytest.mark.parametrize("embeddings", [True, False])
def test_matrices_decay_and_nothing_else(embeddings: bool) -> None:
    model, optimizer = made(
        f"optimizer.decay_embeddings={str(embeddings).lower()}",
        "model.positions=learned_2d",
        "data.sampling.positions=2d",
    )
    names = {id(parameter): layout.name for layout, parameter in named_layouts(model.parameters())}
    decayed = {names[id(p)] for group in optimizer.param_groups if group["weight_decay"] > 0 for p in group["params"]}
    tables = {name for name in names.values() if "embeddings" in name}
    assert len(tables) == 3
    vectors = {layout.name for layout, _ in named_layouts(model.parameters()) if len(layout.full_shape) == 1}
    assert decayed == set(names.values()) - vectors - (set() if embeddings else tables)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)


@pytest.mark.parametrize("clip", [0.0, 0.1, 100.0])
def test_it_clips_as_torch_does(clip: float) -> None:
    model, optimizer = made(f"optimizer.clip={clip}")
    loss, _, _ = model(inputs(batch_of(0, 4)), Labels.of(batch_of(0, 4)))
    loss.backward()
    parameters = list(model.parameters())
    before = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    norm = global_norm(parameters, Mesh.single())
    assert float(norm) == pytest.approx(float(torch.cat([grad.flatten() for grad in before]).double().norm()), rel=1e-6)
    assert isinstance(optimizer, ClippingAdamW)
    optimizer.step()
    factor = min(1.0, clip / (float(norm) + 1e-6)) if clip else 1.0
    for parameter, grad in zip(parameters, before, strict=True):
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, grad * factor, rtol=1e-6, atol=0)
    assert float(optimizer._global_grad_norm) == pytest.approx(float(norm))
