"""All formats by name."""

from data_prep.errors import ConfigError
from train.convert.causal_formats import ChatGlm2, Glm, Llama, Qwen2
from train.convert.formats import Format, HuggingFace
from train.convert.glm_formats import ChatGlm6b, Glm130b

FORMATS: dict[str, Format] = {
    found.name: found for found in (Glm130b(), ChatGlm6b(), ChatGlm2(), Glm(), Llama(), Qwen2(), HuggingFace())
}
"""`format=` as the command line has it."""
UNIVERSAL = "deepspeed_universal"
"""`format=` of a whole training state, not of a model's weights: `train.convert.universal`."""


def format_of(name: str) -> Format:
    """The format of a name; raises ConfigError."""
    if name not in FORMATS:
        raise ConfigError(f"format={name} is not known; use one of {', '.join(FORMATS)}, {UNIVERSAL}")
    return FORMATS[name]
