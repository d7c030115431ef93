"""What `python -m train.convert` reads."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from data_prep.errors import ConfigError
from train.config import ModelConfig
from train.convert.registry import UNIVERSAL, format_of
from train.model.build import DTYPES

BITS = {"int8": 8, "int4": 4}
"""`quantise=` as the command line has it."""


@dataclass
class SourceTokenizerConfig:
    """The tokenizer of a folder that has none of its own."""

    path: str | None = None
    """SentencePiece model or tokenizer.json; null takes tokenizer.model or ice_text.model of the source."""


@dataclass
class ConvertConfig:
    """One conversion."""

    source: str = MISSING
    """Run folder or checkpoint to write out, or a folder in the layout `format` to read."""
    target: str = MISSING
    """Folder to make; it must not exist."""
    format: str = MISSING
    """glm_130b, chatglm_6b, chatglm2_6b, glm, llama, qwen2, huggingface or deepspeed_universal."""
    tensor_parallel: int = 1
    """glm_130b: how many files, one a rank, to write or to read."""
    dtype: str | None = None
    """fp32, bf16 or fp16; null keeps what is stored, so that nothing is rounded."""
    quantise: str | None = None
    """Writing: int8 or int4 stores the layers' matrices as integers with a scale a row. Reading recognises them."""
    evaluations: list[str] = field(default_factory=list)
    """Writing: outputs of `train.evaluate` of this checkpoint, for the model card; a run's own eval.json is found."""
    image_tokens: int = 0
    """Rows before the text pieces in the foreign embedding: 20000 for GLM-130B and the first ChatGLM-6B."""
    shard_gigabytes: float = 5.0
    """Largest safetensors file, in 10^9 bytes; a larger tensor gets a file of its own."""
    model: ModelConfig | None = None
    """Reading: the model (`model=glm_130b`), where the folder does not tell it."""
    tokenizer: SourceTokenizerConfig = field(default_factory=SourceTokenizerConfig)
    """Reading: the tokenizer, where the folder has none."""
    like: str | None = None
    """Reading deepspeed_universal: a run folder or checkpoint of this project whose config, tokenizer and data the
    checkpoint that is made takes over."""

    def __post_init__(self) -> None:
        if self.format == UNIVERSAL:
            self._check_universal()
            return
        if self.like is not None:
            raise ConfigError(f"like={self.like} is for format={UNIVERSAL}; give model= and tokenizer.path=")
        found = format_of(self.format)
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(f"dtype={self.dtype} is not known; use one of {', '.join(DTYPES)}")
        if self.quantise is not None and self.quantise not in BITS:
            raise ConfigError(f"quantise={self.quantise} is not known; use int8 or int4")
        if self.quantise is not None and not found.quantisable:
            raise ConfigError(f"quantise={self.quantise} needs glm_130b, chatglm_6b or chatglm2_6b as format")
        if self.tensor_parallel < 1 or (self.tensor_parallel > 1 and not found.ranked):
            raise ConfigError(
                f"tensor_parallel={self.tensor_parallel}: format={self.format} is not divided over ranks; leave it at 1"
            )
        if self.image_tokens < 0 or not self.shard_gigabytes > 0:
            raise ConfigError(
                f"image_tokens={self.image_tokens} must not be negative, shard_gigabytes={self.shard_gigabytes} "
                "must be more than 0"
            )

    def _check_universal(self) -> None:
        """All that the other settings tell stands in the checkpoints on both sides."""
        defaults: dict[str, Any] = {
            "tensor_parallel": 1,
            "dtype": None,
            "quantise": None,
            "evaluations": [],
            "image_tokens": 0,
            "model": None,
            "tokenizer": SourceTokenizerConfig(),
        }
        for name, default in defaults.items():
            if getattr(self, name) != default:
                raise ConfigError(f"{name}= has no meaning with format={UNIVERSAL}, which keeps all as it is; leave it")
