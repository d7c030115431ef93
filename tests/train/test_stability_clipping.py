"""AdaGC and ZClip: against implementations in plain Python, alone and under tensor and pipeline parallelism."""

import math

import pytest
import torch

from tests.train.parity import curves, plain_curve
from tests.train.test_parity import LOSS, NORM, deviation
from train.config import OptimizerConfig
from train.stability.clipping import Clipping

LIMIT, DECAY, WARMUP, RELATIVE, Z = 0.6, 0.9, 4, 1.02, 1.5
WORDS = [
    f"optimizer.clip={LIMIT}",
    f"optimizer.clip_decay={DECAY}",
    f"optimizer.clip_warmup_steps={WARMUP}",
    f"optimizer.clip_relative={RELATIVE}",
    f"optimizer.clip_z={Z}",
]
STEPS = 12


class PlainAdaGC:
    """Algorithm 1 of arXiv 2502.11034, tensor by tensor."""

    def __init__(self) -> None:
        self.steps = 0
        self.gamma: dict[str, float] = {}
        self.clipped: list[int] = []

    def factors(self, norms: dict[str, float]) -> dict[str, float]:
        found = {}
        whole = math.sqrt(sum(norm**2 for norm in norms.values()))
        for name, norm in norms.items():
            if self.steps < WARMUP:
                found[name] = min(LIMIT / (whole + 1e-6), 1.0)
                self.gamma[name] = min(self.gamma.get(name, math.inf), norm * found[name])
            else:
                found[name] = min(RELATIVE * self.gamma[name] / norm, 1.0)
                self.gamma[name] = DECAY * self.gamma[name] + (1 - DECAY) * norm * found[name]
        self.clipped.append(sum(factor < 1 for factor in found.values()))
        self.steps += 1
        return found


class PlainZClip:
    """ZClip with the reciprocal threshold, in the order of its authors' code, warmed up on a list of norms."""

    def __init__(self) -> None:
        self.first: list[float] = []
        self.mean = self.variance = 0.0
        self.clipped: list[int] = []

    def factors(self, norms: dict[str, float]) -> dict[str, float]:
        norm = math.sqrt(sum(value**2 for value in norms.values()))
        wanted = norm
        if len(self.first) < WARMUP:
            self.first.append(norm)
            self.mean = sum(self.first) / len(self.first)
            self.variance = sum((value - self.mean) ** 2 for value in self.first) / len(self.first)
            wanted = norm * min(LIMIT / (norm + 1e-6), 1.0)
            self.clipped.append(0)
        else:
            z = (norm - self.mean) / (math.sqrt(self.variance) + 1e-6)
            if z > Z:
                wanted = self.mean + Z * Z / z * math.sqrt(self.variance)
            self.clipped.append(int(z > Z))
            self.mean = DECAY * self.mean + (1 - DECAY) * wanted
            self.variance = DECAY * self.variance + (1 - DECAY) * (wanted - self.mean) ** 2
            wanted *= min(LIMIT / (wanted + 1e-6), 1.0)
        return dict.fromkeys(norms, wanted / norm)


PLAIN = {"adagc": PlainAdaGC, "zclip": PlainZClip}


@pytest.mark.unit
@pytest.mark.parametrize("kind", PLAIN)
def test_factors_are_those_of_plain_python(kind: str) -> None:
    config = OptimizerConfig(
        lr=1.0, clip=LIMIT, clip_kind=kind, clip_decay=DECAY, clip_warmup_steps=WARMUP, clip_relative=RELATIVE, clip_z=Z
    )
    ours, plain = Clipping.of(config, 3, torch.device("cpu")), PLAIN[kind]()
    assert ours is not None
    generator = torch.Generator().manual_seed(1)
    for step in range(60):
        norms = 0.1 + torch.rand(3, dtype=torch.float64, generator=generator) * (5.0 if step in (20, 40) else 0.2)
        wanted = plain.factors({str(number): float(norm) for number, norm in enumerate(norms)})
        assert ours.factors(norms).tolist() == pytest.approx(list(wanted.values()), rel=1e-9)
        if step == 30:
            # An overflow leaves the averages alone, and they survive a checkpoint.
            ours.factors(norms * math.inf)
            again = Clipping.of(config, 3, torch.device("cpu"))
            assert again is not None
            again.state.copy_(torch.tensor(ours.state.tolist(), dtype=torch.float64))
            ours = again
    assert plain.clipped[20]
    assert plain.clipped[40]
    assert sum(plain.clipped[WARMUP:]) < 3 * 56


@pytest.mark.unit
def test_each_kind_has_constants_of_its_own() -> None:
    for kind, constants in {"adagc": (0.98, 100), "zclip": (0.97, 25)}.items():
        clipping = Clipping.of(OptimizerConfig(lr=1.0, clip_kind=kind), 3, torch.device("cpu"))
        assert clipping is not None
        assert (clipping.decay, clipping.warmup_steps) == constants
        assert (clipping.config.clip_relative, clipping.config.clip_z) == (1.05, 2.5)


@pytest.mark.distributed
@pytest.mark.parametrize("kind", PLAIN)
def test_clipped_training_follows_a_plain_loop_in_every_layout(kind: str) -> None:
    plain = PLAIN[kind]()

    def clip(parameters: dict[str, torch.nn.Parameter]) -> float:
        gradients = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
        norms = {name: float(gradient.double().norm()) for name, gradient in gradients.items()}
        for name, factor in plain.factors(norms).items():
            gradients[name].mul_(factor)
        return math.sqrt(sum(norm**2 for norm in norms.values()))

    words = [*WORDS, f"optimizer.clip_kind={kind}"]
    expected = plain_curve(words, STEPS, clip)
    assert any(plain.clipped[WARMUP:])
    two = [[], ["parallel.zero_stage=0"], ["parallel.zero_stage=3"]]
    four = [["parallel.tensor_parallel=2", "parallel.pipeline_parallel=2"]]
    for world, layouts in ((2, two), (4, four)):
        for layout, curve in zip(layouts, curves(world, [[*one, *words] for one in layouts], STEPS), strict=True):
            loss, norm = deviation(curve, expected)
            assert loss <= LOSS, layout
            assert norm <= NORM, layout
