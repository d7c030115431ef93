"""The model in fp32 against an independent float64 implementation: logits, loss and every gradient to 1e-5.

And what the facts of GLM-130B say of sizes: the parameters of every shipped model file, and the initial deviations.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor

from data_prep.batch import NUM_GROUPS, Batch, group_of
from data_prep.cli import CONFIG_DIR
from kernels.config import KernelsConfig
from tests.train.float64_reference import Reference, Settings
from train import arithmetic
from train.cli import compose_train
from train.config import Config, LossConfig, ModelConfig
from train.labels import Labels, inputs
from train.mesh import Mesh
from train.model import parameters
from train.model.build import Model, named_layouts
from train.stability.config import StabilityConfig

pytestmark = pytest.mark.unit

TOLERANCE = 1e-5
SLOTS, SEQUENCES = 20, 2
BASE = ModelConfig(
    name="reference",
    num_layers=3,
    hidden_size=32,
    num_heads=4,
    ffn_hidden_size=44,
    padded_vocab_size=60,
    max_positions=SLOTS,
)
"""GLM-130B's layer."""
YARN = {"rotary_scaling": "yarn", "rotary_scaling_factor": 8.0, "rotary_original_positions": 2048}
MODELS = {
    "glm_130b": {},
    "glm_130b_fp16_angles": {"rotary_fp16_angles": True},
    "deepnorm_alpha": {"deepnorm_alpha": 1.7, "norm_eps": 1e-3},
    "post": {"norm_placement": "post"},
    "pre": {"norm_placement": "pre"},
    "sandwich": {"norm_placement": "sandwich"},
    "sandwich_no_bias": {"norm_placement": "sandwich", "bias": "none"},
    "peri": {"norm_placement": "peri"},
    "embedding_norm_pre": {"norm_placement": "pre", "embedding_norm": True},
    "embedding_norm_deepnorm": {"embedding_norm": True, "norm": "rmsnorm", "positions": "learned_2d"},
    "qk_norm": {"qk_norm": True},
    "qk_norm_grouped": {"qk_norm": True, "num_kv_heads": 2, "rotary_interleaved": True, "bias": "qkv"},
    "qk_norm_no_bias_no_positions": {"qk_norm": True, "bias": "none", "positions": "none"},
    "rmsnorm": {"norm": "rmsnorm"},
    "rmsnorm_sandwich": {"norm": "rmsnorm", "norm_placement": "sandwich"},
    "rotary_2d": {"positions": "rotary_2d"},
    "rotary_2d_partial_interleaved": {"positions": "rotary_2d", "rotary_fraction": 0.5, "rotary_interleaved": True},
    "rotary_partial": {"rotary_fraction": 0.5, "rotary_base": 500.0},
    "rotary_interleaved": {"rotary_interleaved": True},
    "rotary_linear": {"rotary_scaling": "linear", "rotary_scaling_factor": 4.0, "rotary_fraction": 0.5},
    "rotary_ntk": {"rotary_scaling": "ntk", "rotary_scaling_factor": 8.0},
    "rotary_ntk_2d": {"rotary_scaling": "ntk", "rotary_scaling_factor": 8.0, "positions": "rotary_2d"},
    "rotary_yarn": {**YARN},
    "rotary_yarn_2d": {**YARN, "positions": "rotary_2d"},
    "rotary_yarn_partial": {**YARN, "rotary_fraction": 0.5, "qk_norm": True},
    "learned_2d": {"positions": "learned_2d"},
    "no_positions": {"positions": "none"},
    "gelu": {"activation": "gelu"},
    "gelu_tanh": {"activation": "gelu_tanh"},
    "swiglu": {"activation": "swiglu"},
    "grouped": {"num_kv_heads": 2},
    "multi_query": {"num_kv_heads": 1, "bias": "qkv"},
    "head_dim": {"head_dim": 12},
    "untied": {"tied_embeddings": False},
    "bias_qkv": {"bias": "qkv"},
    "bias_none": {"bias": "none"},
    "glm_10b": {"norm_placement": "pre", "positions": "learned_2d", "activation": "gelu_tanh"},
    "chatglm_6b": {"positions": "rotary_2d", "activation": "gelu_tanh", "tied_embeddings": False},
    "chatglm2_6b": {
        "norm_placement": "pre",
        "norm": "rmsnorm",
        "num_kv_heads": 2,
        "rotary_fraction": 0.5,
        "rotary_interleaved": True,
        "activation": "swiglu",
        "bias": "qkv",
        "tied_embeddings": False,
    },
}
"""Changes to BASE: each choice alone, and the relatives as a whole."""


def batch() -> Batch:
    """A prefix sequence with a padded tail, and two packed segments, with 2D positions and random weights."""
    generator = torch.Generator().manual_seed(5)
    slots = torch.arange(SLOTS, dtype=torch.int32)
    attend_from = torch.zeros(SEQUENCES, SLOTS, dtype=torch.int32)
    attend_to = torch.zeros(SEQUENCES, SLOTS, dtype=torch.int32)
    attend_to[0] = torch.where(slots < 8, 8, slots + 1)
    attend_from[0, 17:], attend_to[0, 17:] = slots[17:], slots[17:] + 1
    attend_from[1, 9:] = 9
    attend_to[1] = torch.where(slots < 5, 5, torch.where((slots >= 9) & (slots < 14), 14, slots + 1))
    positions = torch.stack(
        [torch.stack([slots.clamp(max=7), (slots - 7).clamp(min=0)]), torch.stack([slots % 9, (slots % 9) // 5])]
    )
    weight = torch.rand(SEQUENCES, SLOTS, generator=generator)
    weight = weight * (torch.rand(SEQUENCES, SLOTS, generator=generator) < 0.6)
    tokens, targets = torch.randint(0, BASE.padded_vocab_size, (2, SEQUENCES, SLOTS), generator=generator)
    return Batch(
        tokens=tokens,
        targets=targets,
        loss_weight=weight,
        positions=positions.int(),
        attend_from=attend_from,
        attend_to=attend_to,
        group=torch.tensor([group_of(0, "zh"), group_of(1, "en")], dtype=torch.uint8),
        sample_index=torch.arange(SEQUENCES),
    )


def random_values(model: Model) -> dict[str, Tensor]:
    """Every parameter by name, filled with numbers that leave nothing at zero or one: biases and norms too."""
    generator = torch.Generator().manual_seed(7)
    values: dict[str, Tensor] = {}
    for layout, parameter in named_layouts(model.parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 2:
            noise = noise * (1.4 / math.sqrt(parameter.shape[1]))
        else:
            noise = 0.3 * noise + (1.0 if layout.name.endswith("norm.weight") else 0.0)
        parameter.data = noise
        values[layout.name] = parameter
    return values


def alike_values(model: Model) -> dict[str, Tensor]:
    """The initial values, and one direction that every FFN adds: the last layer's slots are all but the same."""
    values = {layout.name: parameter for layout, parameter in named_layouts(model.parameters())}
    for name, parameter in values.items():
        if name.endswith("mlp.dense_4h_to_h.bias"):
            parameter.data = 10.0 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return values


def compare(
    model: ModelConfig,
    settings: Settings,
    kernels: KernelsConfig,
    *,
    told: ModelConfig | None = None,
    softmax: str | None = None,
    values: Callable[[Model], dict[str, Tensor]] = random_values,
) -> dict[str, Tensor]:
    """Logits, loss, group sums and gradients of both implementations. told: what the reference takes the model for.

    values: sets the parameters. Returns them by name.
    """
    config = Config(
        model=model,
        kernels=kernels,
        stability=StabilityConfig(softmax=softmax or ("scaled" if settings.scaled_softmax else "fp32")),
        loss=LossConfig(z_loss=settings.z_loss, softcap=settings.softcap),
    )
    ours = Model(config, Mesh.single(), torch.float32)
    ours.set_shrink(settings.lookup_shrink, settings.head_shrink)
    weights = values(ours)
    exact = {name: value.detach().double().requires_grad_() for name, value in weights.items()}
    reference, given = Reference(told or model, exact, settings), batch()

    rows = [
        reference.logits(given.tokens[b], given.positions[b], given.attend_from[b], given.attend_to[b])
        for b in range(SEQUENCES)
    ]
    hidden = ours(inputs(given))
    logits = ours.head.logits(hidden)
    assert relative(logits, torch.stack(rows)) < TOLERANCE

    pairs = [reference.loss(rows[b], given.targets[b], given.loss_weight[b]) for b in range(SEQUENCES)]
    wanted, wanted_z = (sum(parts) / SEQUENCES for parts in zip(*pairs, strict=True))
    loss, z_loss, sums = ours.head.loss(hidden, Labels.of(given))
    assert relative(loss, wanted) < TOLERANCE
    assert not settings.z_loss or relative(z_loss, wanted_z) < TOLERANCE
    counted = (given.loss_weight > 0).double()
    assert sums[:, 1].sum() == counted.sum()
    assert sums.shape == (NUM_GROUPS, 2)
    for b in range(SEQUENCES):
        entropy, _ = reference.loss(rows[b], given.targets[b], counted[b])
        assert relative(sums[int(given.group[b]), 0], entropy) < TOLERANCE

    (loss + z_loss if settings.z_loss else loss).backward()
    (wanted + wanted_z).backward()
    for name, value in exact.items():
        assert relative(weights[name].grad, value.grad) < TOLERANCE, name
    return weights


def relative(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((found.detach().double() - wanted.detach()).norm() / wanted.detach().norm())


@pytest.mark.parametrize("change", MODELS.values(), ids=MODELS.keys())
def test_logits_loss_and_gradients_are_those_of_float64(change):
    compare(replace(BASE, **change), Settings(), KernelsConfig())


def test_gradients_are_right_where_they_all_but_vanish():
    """What the unigram plateau of a deep DeepNorm model looks like: nearly nothing reaches the lowest layer."""
    weights = compare(replace(BASE, num_layers=12), Settings(), KernelsConfig(), values=alike_values)
    low, high = (weights[f"layers.{index}.mlp.dense_4h_to_h.weight"].grad.norm() for index in (0, 11))
    assert 0 < low < 1e-4 * high


@pytest.mark.parametrize(
    "settings",
    [
        Settings(scaled_softmax=True),
        Settings(lookup_shrink=0.1),
        Settings(lookup_shrink=0.1, head_shrink=0.1),
        Settings(softcap=4.0, z_loss=0.01),
    ],
    ids=["scaled_softmax", "shrink_lookup", "shrink_lookup_and_head", "softcap_and_z_loss"],
)
def test_remedies_are_those_of_float64(settings):
    compare(BASE, settings, KernelsConfig())


def test_pb_relax_is_the_same_softmax():
    compare(BASE, Settings(), KernelsConfig(), softmax="pb_relax")


@pytest.mark.parametrize("attention", ["reference", "sdpa", "unfused"])
@pytest.mark.parametrize("model", ["glm_130b", "chatglm2_6b"])
def test_each_attention_on_a_cpu_is_that_of_float64(model, attention):
    kernels = KernelsConfig(*["reference"] * 6)
    kernels.interval_attention = attention
    compare(replace(BASE, **MODELS[model]), Settings(), kernels)


@pytest.mark.parametrize(
    "fault",
    [
        {"deepnorm_alpha": 1.0},
        {"rotary_interleaved": True},
        {"activation": "swiglu"},
        {"norm_placement": "post"},
        {"norm_eps": 1e-2},
        {"rotary_base": 9000.0},
        {"rotary_scaling": "ntk", "rotary_scaling_factor": 1.1},
        {"rotary_scaling": "yarn", "rotary_scaling_factor": 1.1, "rotary_original_positions": 2048},
    ],
    ids=str,
)
def test_a_planted_fault_is_seen(fault):
    with pytest.raises(AssertionError):
        compare(BASE, Settings(), KernelsConfig(), told=replace(BASE, **fault))


def shipped(name: str) -> ModelConfig:
    positions = "2d" if name in ("glm_10b", "chatglm_6b") else "1d"
    return compose_train([f"model={name}", f"data.sampling.positions={positions}", "data.path=none"]).model


def size_from_the_facts(m: ModelConfig) -> int:
    """Parameters, added up by hand: layers of two branches, norms, tables."""
    heads, groups = m.num_heads, m.num_kv_heads or m.num_heads
    dim = m.hidden_size // heads
    up = 2 if m.activation in ("geglu", "swiglu") else 1
    norm = m.hidden_size * (2 if m.norm == "layernorm" else 1)
    layer = m.hidden_size * dim * (heads + 2 * groups) + heads * dim * m.hidden_size
    layer += (up + 1) * m.hidden_size * m.ffn_hidden_size + 2 * norm
    if m.bias != "none":
        layer += dim * (heads + 2 * groups)
    if m.bias == "all":
        layer += m.hidden_size + up * m.ffn_hidden_size + m.hidden_size
    tables = m.padded_vocab_size * m.hidden_size * (1 if m.tied_embeddings else 2)
    if m.positions == "learned_2d":
        tables += 2 * (m.max_positions + 1) * m.hidden_size
    return m.num_layers * layer + norm + tables


BILLIONS = {"glm_130b": 128.70, "glm_10b": 9.88, "chatglm_6b": 6.71, "chatglm2_6b": 6.24}
"""GLM-130B's of its facts sheet; GLM-10B and ChatGLM2-6B as published; ChatGLM-6B with its output matrix apart."""


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIG_DIR / "model").glob("*.yaml")))
def test_every_shipped_model_has_the_parameters_of_the_arithmetic_and_of_the_facts(name):
    model = shipped(name)

    def empty(layout: parameters.Layout, key: int, device: torch.device) -> Tensor:
        return torch.empty(layout.local_shape, device=device)

    config = Config(model=model, kernels=KernelsConfig(*["reference"] * 6))
    with mock.patch.object(parameters, "_addressed", empty):
        built = Model(config, Mesh.single("meta"), torch.bfloat16)
    counted = sum(parameter.numel() for _, parameter in named_layouts(built.parameters()))
    assert counted == arithmetic.parameters(model).total == size_from_the_facts(model)
    if name in BILLIONS:
        assert round(counted / 1e9, 2) == BILLIONS[name]
    if name == "glm_130b":
        assert round(model.padded_vocab_size * model.hidden_size / 1e9, 2) == 1.85


@pytest.mark.parametrize("beta", [None, 0.6])
def test_initial_values_are_xavier_with_deepnorms_gain_on_value_output_and_ffn(beta):
    model = replace(BASE, num_layers=8, hidden_size=256, num_heads=4, ffn_hidden_size=640, padded_vocab_size=1024)
    model = replace(model, deepnorm_beta=beta)
    built = Model(Config(model=model), Mesh.single(), torch.float32)
    values = {layout.name: parameter.detach() for layout, parameter in named_layouts(built.parameters())}
    beta = beta or 16**-0.5

    def xavier(rows: int, columns: int) -> float:
        return math.sqrt(2 / (rows + columns))

    packed = values["layers.3.attention.query_key_value.weight"].view(4, 3, 64, 256)
    wanted = {
        "query": (packed[:, 0], xavier(256, 256)),
        "key": (packed[:, 1], xavier(256, 256)),
        "value": (packed[:, 2], beta * xavier(256, 256)),
        "dense": (values["layers.3.attention.dense.weight"], beta * xavier(256, 256)),
        "up": (values["layers.3.mlp.dense_h_to_4h.weight"], beta * xavier(1280, 256)),
        "down": (values["layers.3.mlp.dense_4h_to_h.weight"], beta * xavier(256, 640)),
        "embedding": (values["word_embeddings.weight"], xavier(1024, 256)),
    }
    for name, (found, deviation) in wanted.items():
        # 65,536 or more draws: four deviations of the estimate are about 1.1 %.
        assert float(found.std()) == pytest.approx(deviation, rel=0.015), name
        assert abs(float(found.mean())) < 0.02 * deviation, name
    vectors: Mapping[str, Tensor] = {name: value for name, value in values.items() if value.dim() == 1}
    for name, value in vectors.items():
        assert bool((value == (1.0 if name.endswith("norm.weight") else 0.0)).all()), name
