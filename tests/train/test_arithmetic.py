"""Parameter counts against known models, FLOPs and memory against hand-made sums, peaks against data sheets."""

import subprocess
import sys
from dataclasses import replace

import pytest

from train.arithmetic import (
    flops_per_token,
    hardware_flops_per_token,
    layers_per_stage,
    matmul_parameters,
    model_flops_utilization,
    parameters,
    peak_flops,
    recomputed_layers,
    stage_parameters,
)
from train.config import ModelConfig, ParallelConfig

pytestmark = pytest.mark.unit

GLM_130B = ModelConfig(
    name="glm_130b",
    num_layers=70,
    hidden_size=12288,
    num_heads=96,
    ffn_hidden_size=32768,
    padded_vocab_size=150528,
    max_positions=2048,
)
GLM_10B = ModelConfig(
    name="glm_10b",
    num_layers=48,
    hidden_size=4096,
    num_heads=64,
    ffn_hidden_size=16384,
    padded_vocab_size=50304,
    max_positions=1024,
    norm_placement="pre",
    positions="learned_2d",
    activation="gelu",
)
CHATGLM_6B = ModelConfig(
    name="chatglm_6b",
    num_layers=28,
    hidden_size=4096,
    num_heads=32,
    ffn_hidden_size=16384,
    padded_vocab_size=130528,
    max_positions=2048,
    positions="rotary_2d",
    activation="gelu_tanh",
    tied_embeddings=False,
)
CHATGLM2_6B = ModelConfig(
    name="chatglm2_6b",
    num_layers=28,
    hidden_size=4096,
    num_heads=32,
    num_kv_heads=2,
    ffn_hidden_size=13696,
    padded_vocab_size=65024,
    max_positions=32768,
    norm="rmsnorm",
    norm_placement="pre",
    rotary_fraction=0.5,
    activation="swiglu",
    bias="qkv",
    tied_embeddings=False,
)


def test_glm_130b_has_128_70_billion_parameters():
    counts = parameters(GLM_130B)
    assert round(counts.total / 1e9, 2) == 128.70
    assert round(counts.embedding / 1e9, 2) == 1.85
    assert counts.head == 0
    assert counts.norms == 141 * 2 * 12288


def test_the_relatives_have_their_published_counts():
    assert parameters(CHATGLM2_6B).total == 6_243_584_000
    # ChatGLM-6B is published as 6.2 B: 6,173,286,400 without the output matrix, which the checkpoint holds apart.
    assert parameters(replace(CHATGLM_6B, tied_embeddings=True)).total == 6_173_286_400
    assert parameters(CHATGLM_6B).head == 130_528 * 4096
    assert parameters(GLM_10B).total == 48 * 201_379_840 + 2 * 4096 + 50_304 * 4096 + 2 * 1025 * 4096


@pytest.mark.parametrize(
    "change, difference",
    [
        ({"bias": "none"}, -28 * (3 * 4096 + 4096 + 16384 + 4096)),
        ({"bias": "qkv"}, -28 * (4096 + 16384 + 4096)),
        ({"norm": "rmsnorm"}, -57 * 4096),
        ({"norm_placement": "sandwich"}, 56 * 2 * 4096),
        ({"activation": "geglu"}, 28 * (4096 * 16384 + 16384)),
        ({"num_kv_heads": 1}, -28 * 2 * 31 * 128 * 4097),
        ({"head_dim": 64}, -28 * (4 * 2048 * 4096 + 3 * 2048)),
        ({"positions": "learned_2d"}, 2 * 2049 * 4096),
    ],
)
def test_each_choice_changes_the_count_by_what_it_adds(change, difference):
    assert parameters(replace(CHATGLM_6B, **change)).total - parameters(CHATGLM_6B).total == difference


def test_the_head_counts_as_a_product_and_the_lookup_does_not():
    layers = 28 * (4 * 4096 * 4096 + 2 * 4096 * 16384)
    assert matmul_parameters(CHATGLM_6B) == layers + 130_528 * 4096
    assert matmul_parameters(replace(CHATGLM_6B, tied_embeddings=True)) == matmul_parameters(CHATGLM_6B)


def test_flops_of_a_step_measured_elsewhere():
    # 1.42 B parameters; 61,844 tokens/s are 563 TFLOP/s (facts of the anchor run).
    anchor = ModelConfig(
        name="anchor",
        num_layers=24,
        hidden_size=2048,
        num_heads=16,
        ffn_hidden_size=5504,
        padded_vocab_size=50304,
        max_positions=2048,
        tied_embeddings=False,
    )
    assert round(parameters(anchor).total / 1e9, 2) == 1.42
    assert flops_per_token(anchor, 2048) * 61_844 / 1e12 == pytest.approx(563, abs=1)


def test_glm_130b_reported_134_tflops_and_its_mfu_is_three_quarters_of_its_hfu():
    useful = flops_per_token(GLM_130B, 2048)
    done = hardware_flops_per_token(GLM_130B, 2048, ParallelConfig(activation_checkpointing="full"))
    assert useful / done == pytest.approx(0.75, abs=0.005)
    assert hardware_flops_per_token(GLM_130B, 2048, ParallelConfig()) == useful
    tokens_per_second = 4224 * 2048 / 88.5 / 768
    assert useful * tokens_per_second / 312e12 == pytest.approx(0.325, abs=0.01)
    assert done * tokens_per_second / 1e12 == pytest.approx(134, abs=3)


def test_recomputed_parts_count_once_more():
    def again(mode: str, every: int = 1) -> float:
        parallel = ParallelConfig(activation_checkpointing=mode, activation_checkpointing_every_layers=every)
        return hardware_flops_per_token(GLM_130B, 2048, parallel) - flops_per_token(GLM_130B, 2048)

    # 4 h^2 multiply-adds of the attention's products and 2 h S of its core; 3 h F of the FFN's.
    assert again("attention") == 70 * 2 * (4 * 12288**2 + 2 * 12288 * 2048)
    assert again("ffn") == 70 * 2 * 3 * 12288 * 32768
    assert again("attention") + again("ffn") == pytest.approx(again("full"))
    assert again("full", 3) / again("full") == pytest.approx(24 / 70)
    every_third = ParallelConfig(activation_checkpointing="ffn", activation_checkpointing_every_layers=3)
    assert [recomputed_layers(every_third, first, 4) for first in range(4)] == [2, 1, 1, 2]


def test_attended_pairs_alone_count_less():
    full = flops_per_token(CHATGLM_6B, 2048)
    attended = flops_per_token(CHATGLM_6B, 1500.5)
    assert full - attended == pytest.approx(12 * 28 * 4096 * 547.5)


def test_stages_count_embedding_and_head_as_a_layer_each():
    assert layers_per_stage(70, 8) == [8, 9, 9, 9, 9, 9, 9, 8]
    assert layers_per_stage(4, 1) == [4]
    assert layers_per_stage(4, 2) == [2, 2]
    assert layers_per_stage(28, 4) == [6, 8, 8, 6]
    for layers in range(2, 30):
        for stages in range(1, layers + 1):
            counts = layers_per_stage(layers, stages)
            assert sum(counts) == layers
            assert min(counts) >= 0


def test_stages_and_tensor_parallel_ranks_hold_the_whole_model():
    untied = CHATGLM_6B
    assert sum(stage_parameters(untied, 1, 1)) == parameters(untied).total
    assert sum(stage_parameters(untied, 4, 1)) == parameters(untied).total
    tied = replace(CHATGLM_6B, tied_embeddings=True)
    assert sum(stage_parameters(tied, 4, 1)) == parameters(tied).total + 130_528 * 4096
    eight = sum(stage_parameters(untied, 1, 8))
    # Seven eighths of what all ranks repeat: a layer's two norms and two row-parallel biases, and the first norm.
    repeated = 28 * (4 + 2) * 4096 + 2 * 4096
    assert eight - parameters(untied).total / 8 == repeated * 7 / 8


def test_two_kv_heads_on_four_ranks_are_repeated():
    two = sum(stage_parameters(CHATGLM2_6B, 1, 2))
    four = sum(stage_parameters(replace(CHATGLM2_6B, num_kv_heads=4), 1, 4))
    assert sum(stage_parameters(CHATGLM2_6B, 1, 4)) == four
    assert two > four


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"norm_placement": "pre", "tied_embeddings": False, "bias": "qkv", "num_kv_heads": 2, "norm": "rmsnorm"},
        {"norm_placement": "sandwich", "activation": "gelu", "positions": "learned_2d"},
        {"norm_placement": "post", "bias": "none", "num_kv_heads": 1, "head_dim": 16},
    ],
)
def test_the_built_model_has_as_many_parameters(change):
    torch = pytest.importorskip("torch")
    from train.config import Config
    from train.mesh import Mesh
    from train.model.build import Model, named_layouts

    tiny = ModelConfig(
        name="test",
        num_layers=3,
        hidden_size=32,
        num_heads=4,
        ffn_hidden_size=48,
        padded_vocab_size=64,
        max_positions=16,
    )
    model = replace(tiny, **change)
    built = Model(Config(model=model, sequence_length=16), Mesh.single(), torch.float32)
    counted = sum(parameter.numel() for _, parameter in named_layouts(built.parameters()))
    assert parameters(model).total == counted


@pytest.mark.parametrize(
    "name, dtype, tflops",
    [
        ("NVIDIA A100-SXM4-40GB", "bf16", 312),
        ("NVIDIA A100-SXM4-80GB", "fp16", 312),
        ("NVIDIA A100-PCIE-40GB", "fp32", 19.5),
        ("a100_40g", "bf16", 312),
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H100 NVL", "bf16", 835),
        ("NVIDIA H200", "fp16", 989),
        ("Tesla V100-SXM2-32GB", "fp16", 125),
        ("Tesla V100-SXM2-32GB", "bf16", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA A1000", "bf16", None),
        ("NVIDIA A10G", "bf16", None),
        ("cpu", "fp32", None),
        ("", "bf16", None),
    ],
)
def test_peaks_are_the_data_sheets_or_nothing(name, dtype, tflops):
    assert peak_flops(name, dtype) == (None if tflops is None else tflops * 1e12)


def test_utilization_is_over_all_devices():
    assert model_flops_utilization(2 * 156e12, "NVIDIA A100-SXM4-40GB", "bf16", devices=2) == 0.5
    assert model_flops_utilization(1e12, "a new accelerator", "bf16", devices=1) is None


def test_importing_it_does_not_import_torch():
    code = "import sys, train.arithmetic; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
