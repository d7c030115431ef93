"""`python -m train.generate checkpoint=RUN text='今天天气[MASK]，我们去公园。'`: the text with its blanks filled.

[MASK] is a short blank inside the text, [sMASK] a sentence, [gMASK] an open end; a text may hold several. On a terminal
what the model wrote is marked, in a pipe the text comes plain.
"""

import re
import sys
from dataclasses import asdict, dataclass
from typing import Any

from omegaconf import MISSING
from rich.console import Console
from rich.text import Text

from data_prep import cli
from data_prep.clean import clean_text
from data_prep.errors import ConfigError
from data_prep.files import write_json
from train import backend
from train.blanks import Decoding, fill
from train.checkpoint.model import Trained, load_trained

_MASKS = re.compile(r"( ?)\[(MASK|sMASK|gMASK)\]")


@dataclass
class GenerateConfig:
    """One text to complete."""

    checkpoint: str = MISSING
    """Run folder (its newest whole checkpoint) or one step's folder."""
    text: str = MISSING
    """Text with [MASK], [sMASK] or [gMASK] where something is to be written."""
    max_new_tokens: int = 32
    """Longest blank in tokens."""
    temperature: float = 0.0
    """0 takes the likeliest token each time; above, tokens are drawn from softmax(logits / temperature)."""
    seed: int = 1234
    """Seed of the draws."""
    output: str | None = None
    """JSON file for the result; null prints it only."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature={self.temperature} must be 0 or more")


@dataclass(frozen=True)
class Blank:
    """One filled mask. start: where its text stands in the whole, in characters."""

    mask: str
    text: str
    tokens: list[int]
    start: int


def main(config: GenerateConfig) -> int:
    """Fill the blanks, print the text, write `output`. Raises ConfigError, DataError."""
    _check(config.text)
    trained = load_trained(config.checkpoint, backend.device())
    whole, blanks = complete(trained, config.text, Decoding(config.max_new_tokens, config.temperature, config.seed))
    if config.output is not None:
        write_json(config.output, _record(config, trained, whole, blanks))
    _show(whole, blanks)
    return 0


def complete(trained: Trained, text: str, decoding: Decoding) -> tuple[str, list[Blank]]:
    """The text with every mask replaced by what the model writes there, and the blanks in their order.

    The text around the masks is the user's own, character by character; the model reads it cleaned as its training
    text was. Raises ConfigError for a text without a mask, or one too long for the model, and for a model that has
    never seen a mask.
    """
    if trained.config.data.sampling.objective != "blank_infilling":
        raise ConfigError(
            f"checkpoint={trained.folder} was trained with data.sampling.objective="
            f"{trained.config.data.sampling.objective}, so it fills no blanks; give one of blank_infilling"
        )
    tokenizer = trained.tokenizer
    written = fill(trained.model, tokenizer, tokenizer.encode_with_masks(clean_text(text)), decoding)
    parts: list[str] = []
    blanks: list[Blank] = []
    end = length = 0
    for match, tokens in zip(_MASKS.finditer(text), written, strict=True):
        filled = tokenizer.decode(tokens)
        # A piece carries its space in front, so the one before a mask is part of what fills the blank.
        before = text[end : match.start()] + (match[1] if not filled else "")
        parts += [before, filled]
        blanks.append(Blank(match[2], filled, tokens, length + len(before)))
        length += len(before) + len(filled)
        end = match.end()
    return "".join([*parts, text[end:]]), blanks


def _check(text: str) -> None:
    if not _MASKS.search(text):
        raise ConfigError("text holds no [MASK], [sMASK] or [gMASK] to fill; put one where something is missing")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"text is not UTF-8 (character {error.start + 1}); check the terminal's encoding") from error


def _record(config: GenerateConfig, trained: Trained, whole: str, blanks: list[Blank]) -> dict[str, Any]:
    return {
        "text": config.text,
        "filled": whole,
        "blanks": [asdict(blank) for blank in blanks],
        "checkpoint": str(trained.folder),
        "max_new_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "seed": config.seed,
    }


def _show(whole: str, blanks: list[Blank]) -> None:
    if not sys.stdout.isatty():
        print(whole, flush=True)
        return
    marked = Text(whole)
    for blank in blanks:
        marked.stylize("bold underline green", blank.start, blank.start + len(blank.text))
    Console(soft_wrap=True, highlight=False).print(marked)


if __name__ == "__main__":
    sys.exit(cli.run("generate", GenerateConfig, main, program="train.generate"))
