"""Which parameters decay, the optimizer that clips by itself, and the one that keeps its moments on the host."""

from typing import Any

import pytest
import torch

from tests.train.parity import OVERRIDES, batch_of, noisy_vectors
from train import host_moments
from train.cli import compose_train
from train.host_moments import HostMomentsAdamW
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


@pytest.mark.parametrize("fused", [None, True])
def test_moments_on_the_host_change_no_number(fused: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against torch's AdamW on the same gradients; each parameter in pieces, and one update left out on the device."""
    monkeypatch.setattr(host_moments, "PIECE", 64)
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((3, 100), (64,), (5,))]
    settings: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "fused": fused}
    optimizers, found = [], []
    for kind in (torch.optim.AdamW, HostMomentsAdamW):
        mine = [torch.nn.Parameter(value.clone()) for value in start]
        groups = [{"params": mine[:1], "weight_decay": 0.1}, {"params": mine[1:], "weight_decay": 0.0}]
        optimizers.append(kind(groups, **settings))
        found.append(mine)
    for step in range(5):
        gradients = [torch.randn(value.shape, generator=generator) for value in start]
        for optimizer, mine in zip(optimizers, found, strict=True):
            for parameter, gradient in zip(mine, gradients, strict=True):
                parameter.grad = gradient.clone()
            if fused:
                optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(float(step == 3))
            optimizer.step()
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
        states = [optimizer.state[own] for optimizer, own in zip(optimizers, (one, other), strict=True)]
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(states[0][key], states[1][key])
    assert int(states[0]["step"]) == (4 if fused else 5)
