"""What every layer is handed besides its input: the model's shape, the mesh, the kernels and the seed."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kernels.linear import Multiply
from kernels.random import Dropout, dropout_key
from train.config import ModelConfig
from train.mesh import Mesh
from train.model.parameters import Layout, make_parameter, split, xavier_std
from train.model.probe import Probe
from train.model.tensor_parallel import Weight, column_parallel, row_parallel, sum_gradients

State = tuple[Tensor, Tensor, Tensor]
"""What flows from layer to layer and from stage to stage: hidden [B,S,H] (with sequence parallelism this rank's share
of S; the embedding takes tokens int64 [B,S] in its place), meta int64 [B,4,S] (two position rows, attend_from,
attend_to), sample_index int64 [B]."""


class Stream(NamedTuple):
    """In generation, what flows from one pre-norm layer to the next in place of its hidden states x + branch + bias:
    the norm that reads them does the addition too, in one kernel."""

    x: Tensor
    branch: Tensor
    bias: Tensor | None


YARN_FAST, YARN_SLOW = 32, 1
"""Turns over the original positions from which yarn leaves a pair alone, and to which it divides its frequency."""


@dataclass(frozen=True)
class Operations:
    """The chosen implementation of each fused operation; see the file of that name in `kernels/`."""

    residual_norm: Callable[..., Any]
    bias_activation: Callable[..., Tensor]
    rotary: Callable[..., Tensor]
    attention: Callable[..., tuple[Tensor, Tensor, Tensor | None]]
    linear_cross_entropy: Callable[..., tuple[Tensor, Tensor, Tensor]]
    embedding: Callable[..., Tensor]
    greedy_step: Callable[..., None]
    fp8_product: Multiply | None = None
    """The layers' products while they train; None: in the dtype of the weights."""
    decode_attention: Callable[..., Tensor] | None = None
    """One new token a row over a cache; None where `attention` must do that too."""
    max_logit: bool = False
    """Whether the attention gives its largest logit when it is asked."""


@dataclass(frozen=True)
class Context:
    """Shared by all layers of one model; immutable."""

    model: ModelConfig
    mesh: Mesh
    ops: Operations
    seed: int
    probe: Probe
    softmax: str = "fp32"
    pb_relax_alpha: float = 1.0
    query_key_gain: float = 1.0
    z_loss: float = 0.0
    softcap: float = 0.0
    recompute: str = "none"
    """parallel.activation_checkpointing, in the layers whose number divides by recompute_every."""
    recompute_every: int = 1
    prefix: int = 0
    """Slots of the learnt prefix of every layer (`train.model.prefix`)."""
    sequence_parallel: bool = False
    """Whether each tensor-parallel rank holds a share of the sequence between the products."""
    overlap_tensor: bool = False
    """Whether the products' traffic runs beside them."""
    starts_with_enc: bool = False
    """Whether texts with blanks begin with ENC (data.sampling.starts_with_enc)."""

    @property
    def kv_heads(self) -> int:
        return self.model.num_kv_heads or self.model.num_heads

    @property
    def head_dim(self) -> int:
        return self.model.head_dim or self.model.hidden_size // self.model.num_heads

    @property
    def gated(self) -> bool:
        return self.model.activation in ("geglu", "swiglu")

    @property
    def post_norm(self) -> bool:
        """Whether the residual comes from the norm's output (deepnorm, post) or from the raw stream (pre, sandwich)."""
        return self.model.norm_placement in ("deepnorm", "post")

    @property
    def branch_norm(self) -> bool:
        """Whether each branch's output has a norm of its own before it is added (sandwich, peri)."""
        return self.model.norm_placement in ("sandwich", "peri")

    @property
    def embedding_norm(self) -> bool:
        """Whether the embedding's output is normalised (BLOOM's, and peri's own)."""
        return self.model.embedding_norm or self.model.norm_placement == "peri"

    def logit_scale(self, layer: int) -> float:
        """What attention takes out of the scores before the softmax and puts back in it."""
        return {"scaled": max(1.0, float(layer)), "pb_relax": self.pb_relax_alpha}.get(self.softmax, 1.0)

    @property
    def residual_scale(self) -> float:
        """DeepNorm's alpha (arXiv 2203.00555), GLM-130B's (2N)^(1/2) where the config says none; 1 for the others."""
        if self.model.norm_placement != "deepnorm":
            return 1.0
        return self.model.deepnorm_alpha or (2.0 * self.model.num_layers) ** 0.5

    @property
    def rotary_options(self) -> dict[str, float]:
        """What model.rotary_scaling makes of the rotary frequencies, as options of `kernels.rotary`.

        ntk: base · factor^(d/(d−2)) over the d dims of an axis, so that θ of the last pair, base^−(d−2)/d, is divided
        by the factor and that of the first, 1, is kept. yarn (arXiv 2309.00071, section 3.2): pair i turns
        n = P θ_i / 2π times over the P positions of before; those with n ≥ 32 are kept, with n ≤ 1 divided, and between
        them it goes by the number of the pair, rounded outwards, as in the paper's code.
        """
        model = self.model
        base, factor = model.rotary_base, model.rotary_scaling_factor
        dims = round(self.head_dim * model.rotary_fraction) // (2 if model.positions == "rotary_2d" else 1)
        if model.rotary_scaling == "ntk":
            return {"base": base * factor ** (dims / (dims - 2))}
        if model.rotary_scaling == "yarn":

            def pair_that_turns(times: int) -> float:
                turns = model.rotary_original_positions / (2 * math.pi * times)
                return dims * math.log(turns) / (2 * math.log(base))

            first = max(float(math.floor(pair_that_turns(YARN_FAST))), 0.0)
            last = min(float(math.ceil(pair_that_turns(YARN_SLOW))), dims - 1.0)
            return {"base": base, "scale": factor, "ramp_from": first, "ramp_to": max(last, first + 1e-3)}
        return {"base": base, "scale": factor}

    @property
    def attention_scale(self) -> float:
        """Factor of the scores: 1/√D, times yarn's 1/t = (0.1 ln factor + 1)² (its section 3.4)."""
        factor = self.model.rotary_scaling_factor if self.model.rotary_scaling == "yarn" else 1.0
        return float(self.head_dim**-0.5 * (0.1 * math.log(factor) + 1) ** 2)

    def std(self, fan_in: int, fan_out: int, *, branch: bool) -> float:
        """Deviation of a matrix's initial values. branch: the matrices that DeepNorm damps (value, output, FFN)."""
        model = self.model
        if model.init == "normal":
            std = (3.0 * model.hidden_size) ** -0.5 if model.init_std is None else model.init_std
        else:
            damped = branch and model.norm_placement == "deepnorm"
            # GLM-130B's; the paper's table 1 has (8N)^(-1/4) for decoders, and (2N)^(1/4) for alpha.
            beta = model.deepnorm_beta or (2.0 * model.num_layers) ** -0.5
            std = xavier_std(fan_in, fan_out, beta if damped else 1.0)
        return std * model.init_scale

    def output_std(self, fan_in: int, fan_out: int) -> float:
        """Deviation of a branch's last matrix: GPT-2's 1 / sqrt(2 N) with init=normal."""
        std = self.std(fan_in, fan_out, branch=True)
        return std / (2.0 * self.model.num_layers) ** 0.5 if self.model.init == "normal" else std

    def cut(self, name: str, shape: tuple[int, ...], dim: int, *, halves: int = 1) -> Layout:
        """This rank's layout of a parameter that tensor parallelism divides."""
        return split(name, shape, dim, self.mesh.tensor_rank, self.mesh.tensor, halves=halves)

    def matrix(self, layout: Layout, std: float | Tensor) -> nn.Parameter:
        """A weight matrix, drawn by address."""
        return make_parameter(layout, self.mesh.device, seed=self.seed, std=std)

    def vector(self, layout: Layout, *, value: float = 0.0, wanted: bool = True) -> nn.Parameter | None:
        """A bias or a norm's weight; None where the model has none."""
        return make_parameter(layout, self.mesh.device, value=value) if wanted else None

    def column_parallel(self, x: Tensor, *weights: Weight) -> tuple[tuple[Tensor, ...], Tensor]:
        """x [B,S or share,in] times this rank's rows of each weight, [B,S,out / ranks] each; and x for the residual.

        With DeepNorm the residual is x times alpha, whose gradient is a tensor of its own, to which products may add.
        """
        return column_parallel(
            x,
            *weights,
            group=self.mesh.tensor_group,
            sequence=self.sequence_parallel,
            beside=self.overlap_tensor,
            handing_on=self.residual_scale != 1.0,
            multiply=self.ops.fp8_product,
        )

    def row_parallel(self, x: Tensor, weight: Weight) -> Tensor:
        """x [B,S,in / ranks] times this rank's columns, summed over the ranks: [B,S or share,out]."""
        return row_parallel(
            x,
            weight,
            group=self.mesh.tensor_group,
            sequence=self.sequence_parallel,
            beside=self.overlap_tensor,
            multiply=self.ops.fp8_product,
        )

    def replicated(self, *parameters: Tensor | None) -> tuple[Any, ...]:
        """Parameters that every tensor-parallel rank holds, for work on hidden states between the products.

        On shares of the sequence each rank has a part of their gradients, which are summed.
        """
        return sum_gradients(self.mesh.tensor_group, *parameters) if self.sequence_parallel else parameters

    def hidden_dropout(
        self, module: nn.Module, layer: int, site: str, hidden: Tensor, sample_index: Tensor
    ) -> Dropout | None:
        """The addressed dropout of hidden states [B,S or share,H] that lie between the products."""
        first = self.mesh.tensor_rank * hidden.shape[1] if self.sequence_parallel else 0
        return self.dropout(module, self.model.hidden_dropout, layer, site, sample_index, first)

    def dropout(
        self, module: nn.Module, probability: float, layer: int, site: str, sample_index: Tensor, offset: int = 0
    ) -> Dropout | None:
        """The addressed dropout of one site, or None in evaluation."""
        if not module.training or probability == 0.0:
            return None
        return Dropout(probability, dropout_key(self.seed, layer, site), sample_index, offset)


class HeadNorm(nn.Module):
    """RMSNorm over the dims of each query or key head (arXiv 2302.05442, 2309.14322); one weight for all heads."""

    def __init__(self, context: Context, name: str) -> None:
        super().__init__()
        self.context = context
        self.weight = make_parameter(Layout(f"{name}.weight", (context.head_dim,)), context.mesh.device, value=1.0)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D]; each tensor-parallel rank has its own heads, so the weight's gradient is summed over them."""
        (weight,) = sum_gradients(self.context.mesh.tensor_group, self.weight)
        return nn.functional.rms_norm(x.float(), x.shape[-1:], weight.float(), self.context.model.norm_eps).to(x.dtype)


class Norm(nn.Module):
    """The weight (and bias) of a LayerNorm or RMSNorm; the fused kernels apply it."""

    def __init__(self, context: Context, name: str) -> None:
        super().__init__()
        self.context = context
        width = (context.model.hidden_size,)
        self.weight = make_parameter(Layout(f"{name}.weight", width), context.mesh.device, value=1.0)
        self.bias = context.vector(Layout(f"{name}.bias", width), wanted=context.model.norm == "layernorm")

    def forward(self, x: Tensor) -> Tensor:
        """norm(x), [..., hidden]."""
        return self.after(x, None, None)

    def after(
        self,
        x: Tensor,
        branch: Tensor | None,
        bias: Tensor | None,
        *,
        alpha: float = 1.0,
        dropout: Dropout | None = None,
        return_sum: bool = False,
    ) -> Any:
        """norm(alpha * x + dropout(branch + bias)), and the sum itself with return_sum."""
        model = self.context.model
        weight, norm_bias, bias = self.context.replicated(self.weight, self.bias, bias)
        return self.context.ops.residual_norm(
            x,
            branch,
            bias,
            weight,
            norm_bias,
            alpha=alpha,
            eps=model.norm_eps,
            kind=model.norm,
            dropout=dropout,
            return_sum=return_sum,
        )


def intervals(meta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """positions int32 [B,2,S], attend_from and attend_to int32 [B,S] of a meta tensor."""
    meta = meta.to(torch.int32)
    return meta[:, :2], meta[:, 2], meta[:, 3]
