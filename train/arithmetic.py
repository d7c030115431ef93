"""Parameters and FLOPs of a model, from its config alone; `train/memory.py` goes on to bytes.

Free of torch, so that the launcher and the planner import it. The layout is the trainer's:

    query_key_value   [heads * 3 * D, H] for multi-head attention
    query, key_value  [heads * D, H], [kv_heads * 2 * D, H] for grouped and multi-query heads
    dense             [H, heads * D]
    dense_h_to_4h     [2 F, H] gated, [F, H] not
    dense_4h_to_h     [H, F]

Legend: H hidden_size, D head_dim, F ffn_hidden_size, V padded_vocab_size, L num_layers, S sequence_length.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from train.config import ModelConfig, ParallelConfig

GATED = ("geglu", "swiglu")
"""Activations whose first FFN matrix has two halves."""
POST_NORM = ("deepnorm", "post")
"""Placements whose first norm follows the embedding; the others end with one before the head."""


def head_dim(model: ModelConfig) -> int:
    """D, dimensions of an attention head."""
    return model.head_dim or model.hidden_size // model.num_heads


def kv_heads(model: ModelConfig) -> int:
    """Key and value heads."""
    return model.num_kv_heads or model.num_heads


@dataclass(frozen=True)
class Parameters:
    """How many parameters a model (or a rank's part of it) has, by kind."""

    embedding: int = 0
    """Rows of the vocabulary at the input; the head too, when it is tied."""
    positions: int = 0
    """Learned position tables."""
    attention: int = 0
    """Matrices of query, key, value and output."""
    ffn: int = 0
    """Both feed-forward matrices."""
    biases: int = 0
    """Biases of the linear layers."""
    norms: int = 0
    """Weights (and biases) of the norms."""
    head: int = 0
    """The output matrix, when it is a tensor of its own."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.embedding + self.positions + self.attention + self.ffn + self.biases + self.norms + self.head

    def __add__(self, other: "Parameters") -> "Parameters":
        return Parameters(*(mine + theirs for mine, theirs in zip(_values(self), _values(other), strict=True)))

    def times(self, count: int) -> "Parameters":
        """So many copies."""
        return Parameters(*(value * count for value in _values(self)))


def parameters(model: ModelConfig) -> Parameters:
    """The whole model's parameters by kind; a tied embedding counts once."""
    layers = layer_parameters(model).times(model.num_layers)
    return embedding_parameters(model) + layers + head_parameters(model, own_matrix=not model.tied_embeddings)


def embedding_parameters(model: ModelConfig, tensor_parallel: int = 1) -> Parameters:
    """One rank's part of the embedding: the tables, its norm, and the first norm of post-norm models."""
    # Learned tables have one row more than positions: blocks are numbered from 1 and the context takes 0.
    positions = 2 * (model.max_positions + 1) * model.hidden_size if model.positions == "learned_2d" else 0
    rows = _divide(model.padded_vocab_size, tensor_parallel)
    norms = norm_parameters(model) if model.norm_placement in POST_NORM else 0
    norms += norm_parameters(model) if model.embedding_norm or model.norm_placement == "peri" else 0
    return Parameters(embedding=rows * model.hidden_size, positions=positions, norms=norms)


def head_parameters(model: ModelConfig, tensor_parallel: int = 1, *, own_matrix: bool) -> Parameters:
    """One rank's part of the head: the final norm of pre-norm models, and the matrix unless it is the embedding's."""
    rows = _divide(model.padded_vocab_size, tensor_parallel)
    norms = 0 if model.norm_placement in POST_NORM else norm_parameters(model)
    return Parameters(head=rows * model.hidden_size if own_matrix else 0, norms=norms)


def layer_parameters(model: ModelConfig, tensor_parallel: int = 1) -> Parameters:
    """One rank's part of a layer: its matrices are cut over the tensor-parallel ranks, the rest is on each of them.

    Key and value heads that are fewer than the ranks are repeated, one on each rank.
    """
    hidden, dim = model.hidden_size, head_dim(model)
    query = _divide(model.num_heads, tensor_parallel) * dim
    key_value = 2 * _divide(kv_heads(model), tensor_parallel) * dim
    wide = _divide(model.ffn_hidden_size, tensor_parallel)
    up = 2 * wide if model.activation in GATED else wide
    qkv_bias = query + key_value if model.bias in ("all", "qkv") else 0
    # The outputs of row-parallel matrices are summed over the ranks, so each rank holds their whole bias.
    other_bias = hidden + up + hidden if model.bias == "all" else 0
    norms = 4 if model.norm_placement in ("sandwich", "peri") else 2
    return Parameters(
        attention=(query + key_value) * hidden + hidden * query,
        ffn=up * hidden + hidden * wide,
        biases=qkv_bias + other_bias,
        norms=norms * norm_parameters(model) + (2 * dim if model.qk_norm else 0),
    )


def norm_parameters(model: ModelConfig) -> int:
    """Parameters of one norm. A model has 2 L + 1 of them, 4 L + 1 with sandwich placement."""
    return model.hidden_size * (2 if model.norm == "layernorm" else 1)


def matmul_parameters(model: ModelConfig) -> int:
    """Parameters that a token is multiplied with: every matrix and the head; a lookup multiplies nothing."""
    layer = layer_parameters(model)
    return (layer.attention + layer.ffn) * model.num_layers + model.padded_vocab_size * model.hidden_size


def flops_per_token(model: ModelConfig, sequence_length: float) -> float:
    """FLOPs of one token's forward and backward pass: 6 N_matmul + 12 L (heads D) S (PaLM, arXiv 2204.02311, app. B).

    sequence_length: S counts every pair of slots, which is `mfu`; the mean number of keys that a query attends to
    in its place gives `mfu_attended`.
    """
    return 6.0 * matmul_parameters(model) + _attention_flops(model, sequence_length)


def hardware_flops_per_token(model: ModelConfig, sequence_length: float, parallel: ParallelConfig) -> float:
    """FLOPs that the device does for one token (`hfu`): what is recomputed runs forward twice, the head never does.

    With `full`, the layers cost 8 N + 16 L h S in place of 6 N + 12 L h S: MFU is nearly three quarters of HFU.
    """
    layer = layer_parameters(model)
    attention = 2.0 * layer.attention + 4.0 * model.num_heads * head_dim(model) * sequence_length
    ffn = 2.0 * layer.ffn
    again = {"none": 0.0, "full": attention + ffn, "attention": attention, "ffn": ffn}
    layers = recomputed_layers(parallel, 0, model.num_layers)
    return flops_per_token(model, sequence_length) + layers * again[parallel.activation_checkpointing]


def recomputed_layers(parallel: ParallelConfig, first: int, count: int) -> int:
    """How many of the layers [first, first + count) recompute anything: those whose number divides by the config's."""
    if parallel.activation_checkpointing == "none":
        return 0
    every = parallel.activation_checkpointing_every_layers
    return -(-(first + count) // every) - -(-first // every)


def _attention_flops(model: ModelConfig, sequence_length: float) -> float:
    # Two products (scores, values), 2 FLOPs a multiply-add, once forward and twice backward: 12 a pair and dimension.
    return 12.0 * model.num_layers * model.num_heads * head_dim(model) * sequence_length


def stage_parameters(
    model: ModelConfig, pipeline_parallel: int, tensor_parallel: int, cut: Sequence[int] = ()
) -> list[int]:
    """Parameters on one rank of each pipeline stage. The last stage keeps its own copy of a tied embedding.

    cut: parallel.layers_per_stage.
    """
    layer = layer_parameters(model, tensor_parallel).total
    held = [count * layer for count in layers_per_stage(model.num_layers, pipeline_parallel, cut)]
    held[0] += embedding_parameters(model, tensor_parallel).total
    own_matrix = pipeline_parallel > 1 or not model.tied_embeddings
    held[-1] += head_parameters(model, tensor_parallel, own_matrix=own_matrix).total
    return held


def layers_per_stage(num_layers: int, stages: int, cut: Sequence[int] = ()) -> list[int]:
    """Layers of each pipeline stage: `cut` (parallel.layers_per_stage) where it is given, else by slots.

    By slots the embedding and the head count as a layer each.
    GLM-130B: 70 layers in 8 stages give 8, 9, 9, 9, 9, 9, 9, 8. Slots left over go to the middle, then to the first.
    """
    if cut:
        return list(cut)
    slots = [(num_layers + 2) // stages] * stages
    middle_first = sorted(range(stages), key=lambda stage: (stage in (0, stages - 1), stage))
    for stage in middle_first[: (num_layers + 2) % stages]:
        slots[stage] += 1
    slots[0] -= 1
    slots[-1] -= 1
    return slots


_PEAKS: list[tuple[frozenset[str], frozenset[str], dict[str, float]]] = [
    # (all of these words, none of these words, {dtype: dense TFLOP/s}). The first match wins; makers' data sheets,
    # without sparsity; fp16 and bf16 with fp32 accumulation; fp32 without TF32, torch's default.
    (frozenset({"gh200"}), frozenset(), {"fp16": 989, "bf16": 989, "fp32": 67}),
    (frozenset({"h200", "nvl"}), frozenset(), {"fp16": 835, "bf16": 835, "fp32": 60}),
    (frozenset({"h200"}), frozenset(), {"fp16": 989, "bf16": 989, "fp32": 67}),
    (frozenset({"h100", "nvl"}), frozenset(), {"fp16": 835, "bf16": 835, "fp32": 60}),
    (frozenset({"h100", "pcie"}), frozenset(), {"fp16": 756, "bf16": 756, "fp32": 51}),
    (frozenset({"h100"}), frozenset({"64gb", "96gb"}), {"fp16": 989, "bf16": 989, "fp32": 67}),
    (frozenset({"h800", "pcie"}), frozenset(), {"fp16": 756, "bf16": 756, "fp32": 51}),
    (frozenset({"h800"}), frozenset(), {"fp16": 989, "bf16": 989, "fp32": 67}),
    (frozenset({"h20"}), frozenset(), {"fp16": 148, "bf16": 148, "fp32": 44}),
    (frozenset({"a100"}), frozenset({"64gb"}), {"fp16": 312, "bf16": 312, "fp32": 19.5}),
    (frozenset({"a800"}), frozenset(), {"fp16": 312, "bf16": 312, "fp32": 19.5}),
    (frozenset({"a30"}), frozenset(), {"fp16": 165, "bf16": 165, "fp32": 10.3}),
    (frozenset({"a10"}), frozenset(), {"fp16": 125, "bf16": 125, "fp32": 31.2}),
    (frozenset({"l40s"}), frozenset(), {"fp16": 362, "bf16": 362, "fp32": 91.6}),
    (frozenset({"l40"}), frozenset(), {"fp16": 181, "bf16": 181, "fp32": 90.5}),
    (frozenset({"l4"}), frozenset(), {"fp16": 121, "bf16": 121, "fp32": 30.3}),
    (frozenset({"v100", "pcie"}), frozenset(), {"fp16": 112, "fp32": 14}),
    (frozenset({"v100"}), frozenset({"v100s"}), {"fp16": 125, "fp32": 15.7}),
    (frozenset({"t4"}), frozenset(), {"fp16": 65, "fp32": 8.1}),
    (frozenset({"rtx", "4090"}), frozenset({"d"}), {"fp16": 165.2, "bf16": 165.2, "fp32": 82.6}),
    (frozenset({"rtx", "3090"}), frozenset({"ti"}), {"fp16": 71, "bf16": 71, "fp32": 35.6}),
    (frozenset({"mi300x"}), frozenset(), {"fp16": 1307, "bf16": 1307, "fp32": 163.4}),
]

_PARTS = frozenset({"mig", "grid", "vgpu", "laptop", "mobile", "max"})
"""Words of a slice of a device or a slower sibling: its peak is not the whole device's."""


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Dense peak of a device in FLOP/s, or None where it is not known for certain.

    device_name: as the driver gives it ("NVIDIA H100 80GB HBM3"), or a cluster file's hardware word ("a100_40g").
    dtype: `fp32`, `bf16` or `fp16`. Never another device's peak: a MIG slice, a laptop part or an unknown memory
    variant gives None, and the caller says once that MFU is not known.
    """
    words = frozenset(re.split(r"[^a-z0-9]+", device_name.lower()))
    if words & _PARTS:
        return None
    for needed, forbidden, peaks in _PEAKS:
        if needed <= words and not forbidden & words:
            return peaks[dtype] * 1e12 if dtype in peaks else None
    return None


def model_flops_utilization(flops_per_second: float, device_name: str, dtype: str, devices: int) -> float | None:
    """Share of the devices' peak, 0 to 1; None where the peak is not known."""
    peak = peak_flops(device_name, dtype)
    return None if peak is None else flops_per_second / (peak * devices)


def _divide(count: int, ranks: int) -> int:
    """What the fullest rank holds."""
    return math.ceil(count / ranks)


def _values(counts: Parameters) -> tuple[int, ...]:
    return (
        counts.embedding,
        counts.positions,
        counts.attention,
        counts.ffn,
        counts.biases,
        counts.norms,
        counts.head,
    )
