"""Causal pre-norm models: ChatGLM2-6B's layout, and the Glm, Llama and Qwen2 classes of transformers and vLLM.

All are RMSNorm, SwiGLU and rotary. They put the gate before the linear half, and take rotary pairs as neighbours
(ChatGLM2, Glm) or as halves (Llama, Qwen2); either is a permutation of the query and key rows, since scores see the sum
over a pair only.
"""

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from data_prep.errors import ConfigError
from train.config import Config, ModelConfig
from train.convert.formats import Format, Json, Settings
from train.convert.mapping import Entry, Part
from train.convert.vocabulary import Vocabulary

_PRE_NORM = {
    "model.norm_placement": ("pre",),
    "model.norm": ("rmsnorm",),
    "model.positions": ("rotary_1d",),
    "model.activation": ("swiglu",),
    "model.rotary_fp16_angles": (False,),
    "model.rotary_scaling": ("none",),
}


def query_key_value(model: ModelConfig, layer: int, kind: str, *, interleaved: bool) -> tuple[Part, Part, Part]:
    """All query, key and value rows of a layer, head by head. kind: weight or bias. interleaved: the wanted order of
    rotary pairs."""
    dim = model.head_dim or model.hidden_size // model.num_heads
    heads, groups = model.num_heads, model.num_kv_heads or model.num_heads
    name, order = f"layers.{layer}.attention", pair_order(model, dim, interleaved)
    plain = torch.arange(dim)

    def rows(count: int, stride: int, place: int, inner: Tensor) -> Tensor:
        return (torch.arange(count)[:, None] * stride * dim + place * dim + inner).flatten()

    if groups == heads:
        packed = f"{name}.query_key_value.{kind}"
        parts = [Part(packed, rows(heads, 3, place, inner)) for place, inner in enumerate((order, order, plain))]
        return parts[0], parts[1], parts[2]
    pair = f"{name}.key_value.{kind}"
    query = Part(f"{name}.query.{kind}", rows(heads, 1, 0, order))
    return query, Part(pair, rows(groups, 2, 0, order)), Part(pair, rows(groups, 2, 1, plain))


def pair_order(model: ModelConfig, dim: int, interleaved: bool) -> Tensor:
    """Native dims of a head in the foreign order of rotary pairs, int64 [dim]."""
    rotated = round(dim * model.rotary_fraction)
    halves = torch.arange(rotated).view(2, -1)
    if model.rotary_interleaved and not interleaved:
        turned = halves.flatten().view(-1, 2).T.flatten()
    elif interleaved and not model.rotary_interleaved:
        turned = halves.T.flatten()
    else:
        turned = halves.flatten()
    return torch.cat([turned, torch.arange(rotated, dim)])


def gate_up(model: ModelConfig, layer: int) -> tuple[Part, Part]:
    """Gate rows and linear rows of a gated feed-forward matrix; here the linear half comes first."""
    name, width = f"layers.{layer}.mlp.dense_h_to_4h.weight", model.ffn_hidden_size
    return Part(name, torch.arange(width, 2 * width)), Part(name, torch.arange(width))


def kinds(model: ModelConfig) -> Iterator[str]:
    """weight, and bias where query, key and value have one."""
    yield "weight"
    if model.bias == "qkv":
        yield "bias"


class ChatGlm2(Format):
    """ChatGLM2-6B: query, key and value in one matrix, rotary on neighbouring pairs of half of the dims."""

    name = "chatglm2_6b"
    only: ClassVar[Settings] = {
        **_PRE_NORM,
        "model.rotary_fraction": (0.5,),
        "model.rotary_base": (10000.0,),
        "model.bias": ("qkv",),
        "model.tied_embeddings": (False,),
    }
    causal = True
    quantisable = True
    ignored = ("rotary_pos_emb.inv_freq",)
    specials = ("MASK", "gMASK", "sMASK", "sop", "eop")

    def entries(self, model: ModelConfig, vocabulary: Vocabulary) -> list[Entry]:
        rows = vocabulary.native_rows()
        found = [Entry("transformer.embedding.word_embeddings.weight", (Part("word_embeddings.weight", rows),))]
        for layer in range(model.num_layers):
            here, there = f"layers.{layer}.", f"transformer.encoder.layers.{layer}."
            found.append(Entry(there + "input_layernorm.weight", (Part(here + "input_norm.weight"),)))
            found += [
                Entry(
                    f"{there}self_attention.query_key_value.{kind}",
                    query_key_value(model, layer, kind, interleaved=True),
                )
                for kind in kinds(model)
            ]
            found.append(Entry(there + "self_attention.dense.weight", (Part(here + "attention.dense.weight"),)))
            norm = Part(here + "post_attention_norm.weight")
            found.append(Entry(there + "post_attention_layernorm.weight", (norm,)))
            found.append(Entry(there + "mlp.dense_h_to_4h.weight", gate_up(model, layer)))
            found.append(Entry(there + "mlp.dense_4h_to_h.weight", (Part(here + "mlp.dense_4h_to_h.weight"),)))
        found.append(Entry("transformer.encoder.final_layernorm.weight", (Part("final_norm.weight"),)))
        found.append(Entry("transformer.output_layer.weight", (Part("lm_head.weight", rows),)))
        return found

    def describe(self, config: Config, vocabulary: Vocabulary) -> Json:
        model = config.model
        return {
            "model_type": "chatglm",
            "architectures": ["ChatGLMModel"],
            "add_bias_linear": False,
            "add_qkv_bias": True,
            "apply_residual_connection_post_layernorm": False,
            "ffn_hidden_size": model.ffn_hidden_size,
            "hidden_size": model.hidden_size,
            "kv_channels": model.head_dim or model.hidden_size // model.num_heads,
            "layernorm_epsilon": model.norm_eps,
            "multi_query_attention": True,
            "multi_query_group_num": model.num_kv_heads or model.num_heads,
            "num_attention_heads": model.num_heads,
            "num_layers": model.num_layers,
            "original_rope": True,
            "padded_vocab_size": model.padded_vocab_size,
            "post_layer_norm": True,
            "rmsnorm": True,
            "seq_length": model.max_positions,
            "use_cache": True,
        }

    def model(self, stored: Json) -> Json:
        groups = stored["multi_query_group_num"] if stored["multi_query_attention"] else None
        return {
            "name": "chatglm2_6b",
            "num_layers": stored["num_layers"],
            "hidden_size": stored["hidden_size"],
            "num_heads": stored["num_attention_heads"],
            "num_kv_heads": groups,
            "head_dim": stored["kv_channels"],
            "ffn_hidden_size": stored["ffn_hidden_size"],
            "padded_vocab_size": stored["padded_vocab_size"],
            "max_positions": stored["seq_length"],
            "norm_eps": stored["layernorm_epsilon"],
            "rotary_fraction": 0.5,
            "rotary_interleaved": True,
            "bias": "qkv",
            "tied_embeddings": False,
            **_CAUSAL,
        }


_CAUSAL = {
    "norm_placement": "pre",
    "norm": "rmsnorm",
    "positions": "rotary_1d",
    "activation": "swiglu",
    "init": "normal",
}


class _Shipped(Format):
    """What transformers' Glm, Llama and Qwen2 classes share."""

    causal = True
    shipped = True
    interleaved: bool
    """Order of rotary pairs."""
    architecture: str

    def feed_forward(self, model: ModelConfig, layer: int) -> list[Entry]:
        """Entries of the first feed-forward product."""
        raise NotImplementedError("each class defines it")

    def entries(self, model: ModelConfig, vocabulary: Vocabulary) -> list[Entry]:
        rows = vocabulary.native_rows()
        found = [Entry("model.embed_tokens.weight", (Part("word_embeddings.weight", rows),))]
        for layer in range(model.num_layers):
            here, there = f"layers.{layer}.", f"model.layers.{layer}."
            found.append(Entry(there + "input_layernorm.weight", (Part(here + "input_norm.weight"),)))
            for kind in kinds(model):
                parts = query_key_value(model, layer, kind, interleaved=self.interleaved)
                found += [
                    Entry(f"{there}self_attn.{name}_proj.{kind}", (part,))
                    for name, part in zip("qkv", parts, strict=True)
                ]
            found.append(Entry(there + "self_attn.o_proj.weight", (Part(here + "attention.dense.weight"),)))
            norm = Part(here + "post_attention_norm.weight")
            found.append(Entry(there + "post_attention_layernorm.weight", (norm,)))
            found += self.feed_forward(model, layer)
            found.append(Entry(there + "mlp.down_proj.weight", (Part(here + "mlp.dense_4h_to_h.weight"),)))
        found.append(Entry("model.norm.weight", (Part("final_norm.weight"),)))
        if not model.tied_embeddings:
            found.append(Entry("lm_head.weight", (Part("lm_head.weight", rows),)))
        return found

    def describe(self, config: Config, vocabulary: Vocabulary) -> Json:
        model = config.model
        rope = {
            "rope_type": "default",
            "rope_theta": model.rotary_base,
            "partial_rotary_factor": model.rotary_fraction,
        }
        return {
            "model_type": self.name,
            "architectures": [self.architecture],
            "hidden_size": model.hidden_size,
            "intermediate_size": model.ffn_hidden_size,
            "num_hidden_layers": model.num_layers,
            "num_attention_heads": model.num_heads,
            "num_key_value_heads": model.num_kv_heads or model.num_heads,
            "head_dim": model.head_dim or model.hidden_size // model.num_heads,
            "vocab_size": model.padded_vocab_size,
            "max_position_embeddings": model.max_positions,
            "rms_norm_eps": model.norm_eps,
            "hidden_act": "silu",
            "attention_bias": model.bias == "qkv",
            "tie_word_embeddings": model.tied_embeddings,
            "rope_parameters": rope,
            # transformers before 5 and vLLM read these.
            "rope_theta": model.rotary_base,
            "partial_rotary_factor": model.rotary_fraction,
            "eos_token_id": vocabulary.token_ids()["eos_token_id"],
            "bos_token_id": None,
            "pad_token_id": vocabulary.foreign_id("eop"),
        }

    def model(self, stored: Json) -> Json:
        rope = stored.get("rope_parameters") or stored.get("rope_scaling") or {}
        kind = rope.get("rope_type", "default")
        if kind != "default":
            raise ConfigError(f"rope_type={kind} in config.json is not known here; only plain rotary positions are")
        settings = {"rope_theta": 10000.0, "partial_rotary_factor": 1.0} | stored | rope
        return {
            "name": self.name,
            "num_layers": stored["num_hidden_layers"],
            "hidden_size": stored["hidden_size"],
            "num_heads": stored["num_attention_heads"],
            "num_kv_heads": stored["num_key_value_heads"],
            "head_dim": stored.get("head_dim"),
            "ffn_hidden_size": stored["intermediate_size"],
            "padded_vocab_size": stored["vocab_size"],
            "max_positions": stored["max_position_embeddings"],
            "norm_eps": stored["rms_norm_eps"],
            "rotary_base": float(settings["rope_theta"]),
            "rotary_fraction": float(settings["partial_rotary_factor"]),
            "rotary_interleaved": self.interleaved,
            "bias": "qkv" if stored.get("attention_bias") else "none",
            "tied_embeddings": stored.get("tie_word_embeddings", False),
            **_CAUSAL,
        }


class Glm(_Shipped):
    """GlmForCausalLM (GLM-4): partial rotary on neighbouring pairs, gate and linear in one matrix."""

    name = "glm"
    architecture = "GlmForCausalLM"
    interleaved = True
    only: ClassVar[Settings] = {**_PRE_NORM, "model.bias": ("qkv", "none")}

    def feed_forward(self, model: ModelConfig, layer: int) -> list[Entry]:
        return [Entry(f"model.layers.{layer}.mlp.gate_up_proj.weight", gate_up(model, layer))]


class Llama(_Shipped):
    """LlamaForCausalLM: rotary halves over the whole head, no bias."""

    name = "llama"
    architecture = "LlamaForCausalLM"
    interleaved = False
    only: ClassVar[Settings] = {**_PRE_NORM, "model.bias": ("none",), "model.rotary_fraction": (1.0,)}
    ignored = ("rotary_emb.inv_freq",)

    def feed_forward(self, model: ModelConfig, layer: int) -> list[Entry]:
        gate, up = gate_up(model, layer)
        names = f"model.layers.{layer}.mlp.gate_proj.weight", f"model.layers.{layer}.mlp.up_proj.weight"
        return [Entry(names[0], (gate,)), Entry(names[1], (up,))]


class Qwen2(Llama):
    """Qwen2ForCausalLM: Llama with a bias on query, key and value, and heads that share out the hidden size."""

    name = "qwen2"
    architecture = "Qwen2ForCausalLM"
    only: ClassVar[Settings] = {**Llama.only, "model.bias": ("qkv",)}

    def check(self, config: Config) -> None:
        super().check(config)
        model = config.model
        if model.head_dim not in (None, model.hidden_size // model.num_heads):
            raise ConfigError(
                f"model.head_dim={model.head_dim} cannot be written as format=qwen2, whose heads are "
                f"model.hidden_size / model.num_heads wide; use format=huggingface"
            )

    def model(self, stored: Json) -> Json:
        if stored.get("use_sliding_window"):
            raise ConfigError("use_sliding_window=true in config.json is not known here; attention has no window")
        return {**super().model(stored), "bias": "qkv"}
