"""The `kernels` node of the config: which implementation of each operation a run uses."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class KernelsConfig:
    """One value an operation: `auto` (the fastest that has what the run needs), `reference` (readable PyTorch, every
    feature, every device), `compile` (the reference under torch.compile), `triton` (this project's kernels, CUDA)."""

    residual_norm: str = "auto"
    """Residual, bias, dropout and norm: auto | reference | compile | triton."""

    bias_activation: str = "auto"
    """Bias and GeGLU, SwiGLU or GELU: auto | reference | compile | triton."""

    rotary: str = "auto"
    """Bias and rotary positions on the packed heads: auto | reference | compile | triton."""

    interval_attention: str = "auto"
    """auto | reference | compile | triton | sdpa | flex | flash4 | unfused. Only `unfused` can run the softmax in
    half precision or with PB-Relax; it, `reference` and `sdpa` build a mask of sequence_length² elements. `flash4` (a
    Hopper GPU, the extra of that name) is the fastest on long sequences, its gradients differ in their last bits from
    run to run."""

    linear_cross_entropy: str = "auto"
    """Head and cross entropy: auto | reference | compile | triton."""

    embedding: str = "auto"
    """Token embedding with gradient shrink: auto | reference | compile."""

    decode_attention: str = "auto"
    """Attention of one new token over the key-value cache (generation, with `stability.softmax` in float32):
    auto | reference | triton."""

    fp8_product: str = "auto"
    """Products of precision.fp8: auto | reference (e4m3 values multiplied in float32) | triton (Hopper GPUs)."""

    quantised_matmul: str = "auto"
    """Products with INT8 and INT4 weights, with the feed-forward layer's activation (`quantise=` of train.generate and
    train.evaluate): auto | reference | compile | triton."""

    greedy_step: str = "auto"
    """Picking each text's likeliest token and what it feeds next (generation): auto | reference | triton."""
