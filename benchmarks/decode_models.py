"""The models of `benchmarks.decode`: random weights in this project's model, and the same in transformers' classes.

Weights travel by the same descriptions that `train.convert` writes files by (`Format.entries`), without the files.
"""

import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.step_worker import SHAPES, Shape
from data_prep.tokenizer import SPECIALS
from kernels.quantised_weight import dequantise, quantise, unpack_int4
from train.cli import compose_train
from train.convert.causal_formats import Llama
from train.convert.formats import Format, HuggingFace
from train.convert.mapping import Mapping
from train.convert.vocabulary import Vocabulary
from train.mesh import Mesh
from train.model.build import DTYPES, Model, named_layouts, operations
from train.model.layers import Attention, FeedForward
from train.model.quantised import MATRICES

PRE_NORM = (
    "model.norm_placement=pre",
    "model.norm=rmsnorm",
    "model.activation=swiglu",
    "model.bias=none",
    "model.init=normal",
    "data.sampling.objective=causal",
)


ATEN_GROUP = 128
"""Columns that share a scale in PyTorch's INT4 product."""


@dataclass(frozen=True)
class Ids:
    """The special tokens of a table, which is all of a tokenizer that decoding asks for."""

    pieces: int
    name: str = "benchmark"
    kind: str = "model"

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """As `data_prep.tokenizer.Tokenizer`'s."""
        return {special: self.pieces + offset for offset, special in enumerate(SPECIALS)}

    @property
    def no_text_ranges(self) -> list[slice]:
        """As `data_prep.tokenizer.Tokenizer`'s: every id behind the pieces."""
        return [slice(self.pieces, None)]

    def __getattr__(self, name: str) -> int:
        ids = {special.lower(): place for special, place in self.special_ids.items()}
        if name == "vocab_size":
            return self.pieces + len(SPECIALS)
        if name not in ids:
            raise AttributeError(name)
        return ids[name]


def config_for(form: str, shape: Shape, dtype: str, kernels: str = "auto") -> Any:
    """The training config of a model."""
    form_words = PRE_NORM if form == "llama" else ()
    return compose_train([*shape.overrides, f"precision={dtype}", f"kernels={kernels}", *form_words])


def model_of(form: str, shape: Shape, device: torch.device, dtype: str) -> tuple[Model, Any]:
    """A model of random weights, and its special tokens, which it never writes.

    The rows of the special tokens in the head are zero: among so many logits, zero is never the largest, so that every
    contender writes text to the end.
    """
    config = config_for(form, shape, dtype)
    model = Model(config, Mesh.single(device), DTYPES[dtype]).to(DTYPES[dtype]).eval().requires_grad_(False)
    ids = Ids(shape.vocabulary - 2 * len(SPECIALS))
    assert model.head is not None
    model.head.weight[ids.pieces :] = 0.0
    return model, ids


def with_kernels(model: Model, kernels: str) -> Model:
    """A copy of a model that runs other implementations of its operations."""
    other = copy.deepcopy(model)
    config = config_for("glm", SHAPES["toy"], "fp32", kernels)
    config.model = model.context.model
    dtype = next(model.parameters()).dtype
    context = replace(model.context, ops=operations(config, model.context.mesh.device, dtype))
    for module in other.modules():
        if hasattr(module, "context"):
            module.context = context
    return other


def text_for(form: str, ids: Any, batch: int, context: int) -> list[list[int]]:
    """Random texts that end in a [gMASK]; `context` tokens with it, or with the sop that a causal text begins with."""
    generator = torch.Generator().manual_seed(len(form))
    words = torch.randint(0, ids.pieces, (batch, context - 1), generator=generator)
    return [[*row, ids.gmask] for row in words.tolist()]


def theirs_of(form: str, model: Model, ids: Any) -> Any:
    """transformers' Llama, or our exported class for the GLM layer, with the same weights; greedy, never stopping."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from train.convert.remote.modeling_tiankong import TiankongConfig, TiankongForCausalLM

    layout: Format = Llama() if form == "llama" else HuggingFace()
    config = config_for(form, SHAPES["toy"], "fp32")
    config.model = model.context.model
    vocabulary = Vocabulary(ids, config.model.padded_vocab_size)
    native = {place.name: parameter.detach() for place, parameter in named_layouts(model.parameters())}
    mapping = Mapping(
        layout.entries(config.model, vocabulary), {name: tuple(tensor.shape) for name, tensor in native.items()}
    )
    described = layout.describe(config, vocabulary) | {"eos_token_id": None, "pad_token_id": None}
    kinds = (LlamaConfig, LlamaForCausalLM) if form == "llama" else (TiankongConfig, TiankongForCausalLM)
    with model.context.mesh.device:
        peer = kinds[1](kinds[0](**described)).to(next(model.parameters()).dtype).eval()
    rows = {name: tensor.cpu() for name, tensor in native.items()}
    peer.load_state_dict({key: mapping.outward(key, rows.__getitem__) for key in mapping.entries}, strict=True)
    peer.generation_config.eos_token_id = None
    peer.generation_config.pad_token_id = ids.eod
    return peer


class _AtenInt4(nn.Module):
    """Stands in for a weight, as `QuantisedWeight`: PyTorch's product of INT4 weights, w = (u − 8) · scale + zero."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        values, scale = quantise(weight, 4, group_size=ATEN_GROUP)
        unsigned = unpack_int4(values).view(torch.uint8) + 8
        pairs = (unsigned[:, ::2] & 15) << 4 | unsigned[:, 1::2] & 15
        self.packed = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), 8)
        scales = torch.stack([scale, torch.zeros_like(scale)], 2)  # [rows, groups, 2]
        self.scales = scales.transpose(0, 1).contiguous().to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.ops.aten._weight_int4pack_mm(x.flatten(0, -2), self.packed, ATEN_GROUP, self.scales)
        return flat.unflatten(0, x.shape[:-1])


def aten_int4(model: Model) -> bool:
    """Replace the layers' matrices, in place, by PyTorch's own INT4 product; False where the device lacks it.

    Raises RuntimeError where a product is not that with the rounded weight.
    """
    weight = next(part for part in model.modules() if isinstance(part, Attention)).dense_weight
    if weight.device.type != "cuda" or weight.dtype != torch.bfloat16:
        return False
    for part in [module for module in model.modules() if isinstance(module, Attention | FeedForward)]:
        for name in MATRICES:
            weight = part._parameters.get(name)
            if weight is None:
                continue
            other = _AtenInt4(weight.detach())
            x = torch.randn(3, weight.shape[1], dtype=torch.bfloat16, device=weight.device)
            rounded = dequantise(*quantise(weight.detach(), 4, group_size=ATEN_GROUP), 4)
            error = float((other(x).float() - (wanted := x.float() @ rounded.T)).norm() / wanted.norm())
            if not error < 2e-2:  # their scales are bf16
                raise RuntimeError(f"aten::_weight_int4pack_mm differs by {error:.1e} for {name}")
            del part._parameters[name]
            setattr(part, name, other)
    return True


@torch.no_grad()
def greedy_without_cache(model: Model, tokens: list[int], new: int, *, causal: bool) -> list[int]:
    """Greedy tokens behind `tokens`, the whole text run anew for each. Not causal: all but the last, a sop, is context
    that sees itself."""
    assert model.head is not None
    device, text = model.context.mesh.device, list(tokens)
    context = 0 if causal else len(tokens) - 1
    for _ in range(new):
        place = torch.arange(len(text), device=device)
        upto: Tensor = (place + 1).clamp(min=context)
        zero = torch.zeros_like(place)
        meta = torch.stack([place, zero, zero, upto])[None]
        hidden = model((torch.tensor([text], device=device), meta, zero[:1]))
        text.append(int(model.head.logits(hidden[:, -1]).argmax()))
    return text[len(tokens) :]
