"""Filling blanks with a trained model, in the form that it was trained on.

The context with its masks comes first and sees all of itself. Each blank is then written behind it: sop at the mask's
position, one token at a time, until eop ([MASK], [sMASK]) or the length limit ([gMASK], whose training targets have no
end). Later blanks see earlier ones. Each token runs the whole sequence again; there is no key-value cache here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_prep.errors import ConfigError
from data_prep.tokenizer import Tokenizer
from train.model.build import Model


@dataclass(frozen=True)
class Decoding:
    """How tokens are picked. temperature 0: the likeliest; above: drawn from softmax(logits / temperature)."""

    max_new_tokens: int = 32
    temperature: float = 0.0
    seed: int = 0


def fill(model: Model, tokenizer: Tokenizer, context: Sequence[int], decoding: Decoding) -> list[list[int]]:
    """Tokens for each mask of a context, in the order of the masks.

    context: token ids holding [MASK], [sMASK] or [gMASK]. Raises ConfigError where there is none, or where context and
    blanks do not fit the model's positions.
    """
    masks = [place for place, token in enumerate(context) if token in _masks(tokenizer)]
    if not masks:
        raise ConfigError("text holds no [MASK], [sMASK] or [gMASK] to fill")
    limit = model.context.model.max_positions
    if len(context) + len(masks) * (decoding.max_new_tokens + 1) > limit:
        raise ConfigError(
            f"the text's {len(context)} tokens and {len(masks)} blanks of max_new_tokens={decoding.max_new_tokens} do "
            f"not fit the model's {limit} positions; shorten one of them"
        )
    generator = torch.Generator().manual_seed(decoding.seed)
    sequence = _Sequence(model, tokenizer, context)
    filled = []
    for place in masks:
        endless = context[place] == tokenizer.gmask
        sequence.begin(place, endless)
        written: list[int] = []
        while len(written) < decoding.max_new_tokens:
            token = _pick(sequence.scores(endless), decoding, generator)
            if token in (tokenizer.eop, tokenizer.eod):
                break
            written.append(token)
            sequence.append(token)
        filled.append(written)
    return filled


def log_probability(model: Model, tokenizer: Tokenizer, context: Sequence[int], truth: Sequence[int]) -> float:
    """Natural log of the probability that the context's first mask is filled with `truth`, its eop not counted."""
    sequence = _Sequence(model, tokenizer, context)
    place = next(place for place, token in enumerate(context) if token in _masks(tokenizer))
    sequence.begin(place, context[place] == tokenizer.gmask)
    for token in truth[:-1]:
        sequence.append(token)
    logits = model.head.logits(sequence.hidden())[0, -len(truth) :]  # type: ignore[union-attr]
    chosen = torch.log_softmax(logits, -1)[torch.arange(len(truth)), torch.tensor(list(truth))]
    return float(chosen.sum())


class _Sequence:
    """A context and what has been written behind it, with positions and intervals."""

    def __init__(self, model: Model, tokenizer: Tokenizer, context: Sequence[int]) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._two_dimensional = model.context.model.positions in ("rotary_2d", "learned_2d")
        self._context = len(context)
        self._tokens = list(context)
        self._positions = [(place, 0) for place in range(len(context))]

    def begin(self, place: int, endless: bool) -> None:
        """Start the blank whose mask stands at `place` of the context."""
        self._place, self._endless, self._written = place, endless, 0
        self.append(self._tokenizer.sop)

    def append(self, token: int) -> None:
        """Write one token of the current blank."""
        place = self._place
        if self._endless and not self._two_dimensional:
            # A [gMASK] target simply counts on behind the context.
            place = self._context + self._written
        self._written += 1
        self._tokens.append(token)
        self._positions.append((place, self._written if self._two_dimensional else 0))

    def hidden(self) -> Tensor:
        """Final hidden states [1, slots, hidden]."""
        device, slots = self._model.context.mesh.device, len(self._tokens)
        upto = torch.arange(slots) + 1
        upto[: self._context] = self._context
        positions = torch.tensor(self._positions).T
        meta = torch.stack([positions[0], positions[1], torch.zeros_like(upto), upto])[None]
        state = torch.tensor([self._tokens]), meta, torch.zeros(1, dtype=torch.int64)
        with torch.no_grad():
            hidden: Tensor = self._model(tuple(tensor.to(device) for tensor in state))
        return hidden

    def scores(self, endless: bool) -> Tensor:
        """Logits of the next token on the CPU, with everything that cannot be text at −inf.

        A [MASK] or [sMASK] hides at least one token, so its end is not offered first.
        """
        logits = self._model.head.logits(self.hidden()[:, -1:])[0, 0].cpu()  # type: ignore[union-attr]
        stop = self._tokenizer.eod if endless else self._tokenizer.eop
        end = logits[stop].clone()
        logits[self._tokenizer.mask :] = -torch.inf  # specials stand behind all pieces, padding behind them
        if endless or self._written > 1:
            logits[stop] = end
        return logits


def _masks(tokenizer: Tokenizer) -> tuple[int, int, int]:
    return tokenizer.mask, tokenizer.smask, tokenizer.gmask


def _pick(logits: Tensor, decoding: Decoding, generator: torch.Generator) -> int:
    if decoding.temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial(torch.softmax(logits / decoding.temperature, -1), 1, generator=generator))
