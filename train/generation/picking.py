"""Picking the next token from logits: the likeliest, or a draw after temperature, top-k and top-p.

A draw has an address like every random number here: (seed, number of the text, tokens drawn before), so that a text's
result does not depend on which others share its batch, nor on the rank.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from data_prep.errors import ConfigError
from data_prep.tokenizer import Tokenizer
from kernels.random import addressed_uniform, mix_key


@dataclass(frozen=True)
class Decoding:
    """How tokens are picked. temperature 0: the likeliest; above: drawn from softmax(logits / temperature).

    top_k: draw among the k likeliest only; 0 for all. top_p: draw among the fewest tokens whose probabilities reach p
    (Holtzman et al. 2020, arXiv 1904.09751). beams: keep so many hypotheses of a blank instead. length_penalty: a
    beam's score is its log probability over length to this power. compiled: decode through torch.compile.
    """

    max_new_tokens: int = 32
    temperature: float = 0.0
    seed: int = 0
    top_k: int = 0
    top_p: float = 1.0
    beams: int = 1
    length_penalty: float = 1.0
    compiled: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature={self.temperature} must be 0 or more")
        if self.top_k < 0:
            raise ConfigError(f"top_k={self.top_k} must be 0 or more; 0 draws among all tokens")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} must lie in (0, 1]; 1 draws among all tokens")
        if self.beams < 1:
            raise ConfigError(f"beams={self.beams} must be at least 1")
        if self.beams > 1 and self.temperature:
            raise ConfigError(
                f"beams={self.beams} and temperature={self.temperature} exclude each other; leave one out"
            )
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise ConfigError("top_k and top_p have no effect with temperature=0; set a temperature, such as 1.0")


def pick(logits: Tensor, decoding: Decoding, texts: Tensor, drawn: Tensor) -> Tensor:
    """The next token of each row, int64 [rows] on the logits' device.

    logits: fp32 [rows, vocabulary], −inf where a token is out of the question. texts, drawn: int64 [rows], the number
    of the row's text and how many tokens it drew before.
    """
    if decoding.temperature == 0:
        return logits.argmax(-1)
    values, order = (logits / decoding.temperature).sort(dim=-1, descending=True, stable=True)
    probabilities = torch.softmax(values, -1)
    if decoding.top_k:
        probabilities[:, decoding.top_k :] = 0.0
        probabilities /= probabilities.sum(-1, keepdim=True)
    # The token that crosses p still counts.
    before = probabilities.cumsum(-1) - probabilities
    probabilities = torch.where(before < decoding.top_p, probabilities, 0.0)
    reached = probabilities.double().cumsum(-1)
    uniform = addressed_uniform(mix_key(decoding.seed, "decoding"), drawn, texts).to(logits.device)
    place = torch.searchsorted(reached, (uniform * reached[:, -1])[:, None], right=True)
    # Rounding may put a draw behind the last token that has any probability.
    place = place.clamp(max=(probabilities > 0).sum(-1, keepdim=True) - 1)
    return order.gather(1, place)[:, 0]


def allow(logits: Tensor, tokenizer: Tokenizer, stops: Tensor) -> None:
    """Set everything that cannot be text to −inf, in place.

    logits: fp32 [rows, vocabulary]. stops: int64 [rows, 2], tokens that may end the row's blank, −1 for none.
    """
    column = stops.clamp(min=0)
    end = logits.gather(1, column)
    for barred in tokenizer.no_text_ranges:
        logits[:, barred] = -torch.inf
    logits.scatter_(1, column, torch.where(stops >= 0, end, logits.gather(1, column)))
