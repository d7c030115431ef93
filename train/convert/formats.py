"""The layouts that other code reads, and which models each can hold.

A format names its tensors and says what their rows are (`entries`), translates the model's shape to and from its
config.json, and lists the only values of the model's settings that its code computes (`only`).

    glm_130b      SwissArmyTransformer's: latest, <step>/mp_rank_XX_model_states.pt, any tensor-parallel size
    chatglm_6b    ChatGLM-6B on Hugging Face
    chatglm2_6b   ChatGLM2-6B on Hugging Face
    glm, llama, qwen2    GlmForCausalLM, LlamaForCausalLM and Qwen2ForCausalLM of transformers, which vLLM has too
    huggingface   every model of this project: safetensors beside a modeling file of our own
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, ClassVar

from data_prep.errors import ConfigError
from train.config import Config, ModelConfig
from train.convert.mapping import Entry, Part, layouts
from train.convert.vocabulary import Vocabulary

Json = dict[str, Any]
Settings = Mapping[str, tuple[Any, ...]]


class Format(ABC):
    """One layout. Subclasses are stateless."""

    name: str
    only: ClassVar[Settings] = {}
    """Model settings (and `loss.softcap`) whose values the format's code is bound to."""
    causal = False
    """Whether its code lets every token see the past only."""
    ranked = False
    """Whether it is one file a tensor-parallel rank."""
    shipped = False
    """Whether transformers has its class, so that no file of ours need travel."""
    quantisable = False
    """Whether its layers' weights may be stored as integers with a scale."""
    ignored: tuple[str, ...] = ()
    """Ends of keys that hold buffers, not weights; skipped when reading."""
    specials: tuple[str, ...] | None = None
    """Order of the special tokens behind the pieces, where it is another than this project's."""

    @abstractmethod
    def entries(self, model: ModelConfig, vocabulary: Vocabulary) -> list[Entry]:
        """Its tensors, in the order they are written."""

    @abstractmethod
    def describe(self, config: Config, vocabulary: Vocabulary) -> Json:
        """What its config.json says."""

    @abstractmethod
    def model(self, stored: Json) -> Json:
        """ModelConfig's fields from its config.json. Raises KeyError for a missing entry, ConfigError for a value that
        no model here has."""

    def check(self, config: Config) -> None:
        """Raise ConfigError for the first setting of a model that the format's code cannot compute."""
        settings = {f"model.{name}": value for name, value in asdict(config.model).items()}
        settings["loss.softcap"] = config.loss.softcap
        settings["model.num_kv_heads"] = config.model.num_kv_heads or config.model.num_heads
        wanted = {**self.only, "loss.softcap": (0.0,)} if self.name != "huggingface" else {}
        for key, values in wanted.items():
            if settings[key] not in values:
                raise ConfigError(
                    f"{key}={settings[key]} cannot be written as format={self.name}, whose code knows "
                    f"{' or '.join(map(str, values))}; use format=huggingface"
                )
        if self.causal and config.data.sampling.objective != "causal":
            raise ConfigError(
                f"data.sampling.objective={config.data.sampling.objective}: this model's context sees itself in both "
                f"directions, but format={self.name} is causal; use format=huggingface"
            )


class HuggingFace(Format):
    """Native names and rows; the modeling file that travels along knows every setting."""

    name = "huggingface"

    def entries(self, model: ModelConfig, vocabulary: Vocabulary) -> list[Entry]:
        return [Entry(name, (Part(name),)) for name in layouts(model)]

    def describe(self, config: Config, vocabulary: Vocabulary) -> Json:
        model = asdict(config.model)
        shape = {name: model[name] for name in model if not name.startswith("init") and "dropout" not in name}
        return {
            "model_type": "tiankong",
            "architectures": ["TiankongForCausalLM"],
            "auto_map": {
                "AutoConfig": "modeling_tiankong.TiankongConfig",
                "AutoModelForCausalLM": "modeling_tiankong.TiankongForCausalLM",
                "AutoTokenizer": ["tokenization_tiankong.TiankongTokenizer", None],
            },
            **shape,
            # Names that transformers itself reads.
            "vocab_size": model["padded_vocab_size"],
            "num_hidden_layers": model["num_layers"],
            "num_attention_heads": model["num_heads"],
            "num_key_value_heads": model["num_kv_heads"] or model["num_heads"],
            "max_position_embeddings": model["max_positions"],
            "tie_word_embeddings": model["tied_embeddings"],
            "softcap": config.loss.softcap,
            "objective": config.data.sampling.objective,
            **vocabulary.token_ids(),
        }

    def model(self, stored: Json) -> Json:
        return {name: stored[name] for name in ModelConfig.__dataclass_fields__ if name in stored}
