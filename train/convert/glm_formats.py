"""GLM-130B's and ChatGLM-6B's layouts: a DeepNorm layer, QKV rows per head (q, k, v), names alike but for the head."""

from typing import ClassVar

from data_prep.errors import ConfigError
from train.config import Config, ModelConfig
from train.convert.formats import Format, Json, Settings
from train.convert.mapping import Entry, Part, layouts
from train.convert.vocabulary import Vocabulary

_DEEPNORM = {
    "model.norm_placement": ("deepnorm",),
    "model.deepnorm_alpha": (None,),
    "model.norm": ("layernorm",),
    "model.rotary_fraction": (1.0,),
    "model.rotary_interleaved": (False,),
    "model.rotary_base": (10000.0,),
    "model.rotary_scaling": ("none",),
    "model.bias": ("all",),
}


def _key(name: str) -> str:
    """SwissArmyTransformer's name of a native one."""
    name = name.replace("input_norm", "input_layernorm").replace("post_attention_norm", "post_attention_layernorm")
    return name if name.startswith("lm_head") else "transformer." + name.replace("final_norm", "final_layernorm")


class _Glm(Format):
    quantisable = True
    ignored = ("rotary_emb.inv_freq",)

    def entries(self, model: ModelConfig, vocabulary: Vocabulary) -> list[Entry]:
        tables = ("word_embeddings.weight", "lm_head.weight")
        rows = vocabulary.native_rows()
        return [Entry(_key(name), (Part(name, rows if name in tables else None),)) for name in layouts(model)]

    def check(self, config: Config) -> None:
        super().check(config)
        model = config.model
        if model.num_kv_heads not in (None, model.num_heads) or model.head_dim not in (
            None,
            model.hidden_size // model.num_heads,
        ):
            raise ConfigError(
                f"model.num_kv_heads={model.num_kv_heads}, model.head_dim={model.head_dim}: format={self.name} has "
                "hidden_size / num_heads dims in each of num_heads heads; use format=huggingface"
            )


class Glm130b(_Glm):
    """The release of GLM-130B: fp16 angles in its code, embedding shared with the head."""

    name = "glm_130b"
    ranked = True
    only: ClassVar[Settings] = {
        **_DEEPNORM,
        "model.positions": ("rotary_1d",),
        "model.activation": ("geglu",),
        "model.tied_embeddings": (True,),
        "model.norm_eps": (1e-5,),
    }

    def describe(self, config: Config, vocabulary: Vocabulary) -> Json:
        return {}

    def model(self, stored: Json) -> Json:
        raise KeyError("the model's shape")


class ChatGlm6b(_Glm):
    """ChatGLM-6B: 2D rotary, plain tanh GELU, a head of its own."""

    name = "chatglm_6b"
    only: ClassVar[Settings] = {
        **_DEEPNORM,
        "model.positions": ("rotary_2d",),
        "model.activation": ("gelu_tanh",),
        "model.tied_embeddings": (False,),
        "model.rotary_fp16_angles": (False,),
    }

    def describe(self, config: Config, vocabulary: Vocabulary) -> Json:
        model, ids = config.model, vocabulary.token_ids()
        return {
            "model_type": "chatglm",
            "architectures": ["ChatGLMModel"],
            "hidden_size": model.hidden_size,
            "inner_hidden_size": model.ffn_hidden_size,
            "layernorm_epsilon": model.norm_eps,
            "max_sequence_length": model.max_positions,
            "num_attention_heads": model.num_heads,
            "num_layers": model.num_layers,
            "position_encoding_2d": True,
            "use_cache": True,
            "vocab_size": model.padded_vocab_size,
            "mask_token_id": ids["mask_token_id"],
            "gmask_token_id": ids["gmask_token_id"],
            "bos_token_id": ids["sop_token_id"],
            "eos_token_id": ids["eop_token_id"],
        }

    def model(self, stored: Json) -> Json:
        return {
            "name": "chatglm_6b",
            "num_layers": stored["num_layers"],
            "hidden_size": stored["hidden_size"],
            "num_heads": stored["num_attention_heads"],
            "ffn_hidden_size": stored["inner_hidden_size"],
            "padded_vocab_size": stored["vocab_size"],
            "max_positions": stored["max_sequence_length"],
            "norm_eps": stored["layernorm_epsilon"],
            "positions": "rotary_2d",
            "activation": "gelu_tanh",
            "tied_embeddings": False,
        }
