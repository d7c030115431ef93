"""Beam search, blank by blank: the hypothesis with the best log probability for its length.

The beams of a blank are the rows of one decoder. When a blank is settled its tokens are run again in every row, and the
next blank begins from there.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from data_prep.tokenizer import Tokenizer
from train.generation.decoder import Decoder
from train.generation.forms import Form, Opening
from train.generation.picking import Decoding, allow
from train.model.build import Model

OnToken = Callable[[int, int, list[int], bool], None]
"""Called with (text, blank, its tokens so far, whether it is done) after each token."""


@dataclass(frozen=True)
class Hypothesis:
    """Tokens of a blank and their summed log probability; ended: with its end counted in."""

    tokens: list[int]
    log_probability: float
    ended: bool = False

    def score(self, length_penalty: float) -> float:
        """Log probability over length^penalty, the end counting as a token."""
        return self.log_probability / max(1, len(self.tokens) + self.ended) ** length_penalty


def search(
    model: Model, tokenizer: Tokenizer, form: Form, decoding: Decoding, text: int = 0, on_token: OnToken | None = None
) -> list[list[int]]:
    """Tokens of each blank of one text. `on_token` hears of whole blanks only."""
    slots = len(form.context) + len(form.openings) * (decoding.max_new_tokens + 1)
    decoder = Decoder(model, decoding.beams, slots, compiled=decoding.compiled)
    decoder.begin([form.context] * decoding.beams, causal=form.causal)
    written = []
    for blank, opening in enumerate(form.openings):
        before = decoder.lengths.clone()
        best = _blank(decoder, tokenizer, opening, decoding)
        written.append(best.tokens)
        if on_token is not None:
            on_token(text, blank, best.tokens, True)
        decoder.cut(before)
        positions = torch.tensor([opening.position(slot) for slot in range(len(best.tokens) + 1)]).T
        tokens = torch.tensor([opening.first, *best.tokens])
        decoder.extend(tokens.expand(decoder.rows, -1), positions.expand(decoder.rows, -1, -1))
    return written


def _blank(decoder: Decoder, tokenizer: Tokenizer, opening: Opening, decoding: Decoding) -> Hypothesis:
    """The best hypothesis of one blank. All rows hold the same tokens at the start."""
    beams, penalty = decoding.beams, decoding.length_penalty
    alive = [Hypothesis([], 0.0)]
    ended: list[Hypothesis] = []
    for slot in range(decoding.max_new_tokens):
        fed = [beam.tokens[-1] if slot else opening.first for beam in alive]
        fed += [0] * (beams - len(alive))
        logits = decoder.step(torch.tensor(fed), torch.tensor([opening.position(slot)]).expand(beams, -1))
        # Shares of what may follow: the rest is out of the question, as it is for a greedy pick.
        allow(logits, tokenizer, torch.tensor([opening.stops_at(slot)] * beams, device=logits.device))
        scores = torch.log_softmax(logits[: len(alive)], -1).double()
        scores += torch.tensor([beam.log_probability for beam in alive], device=logits.device)[:, None]
        # One end a row at most, so that twice as many leave enough that go on.
        values, places = scores.flatten().topk(min(2 * beams, scores.numel()))
        next_alive: list[Hypothesis] = []
        rows: list[int] = []
        for rank, (value, place) in enumerate(zip(values.tolist(), places.tolist(), strict=True)):
            row, token = divmod(place, logits.shape[1])
            if value == float("-inf"):
                break
            if token in opening.stops:
                # An end that is not among the best is no better than what goes on.
                if rank < beams:
                    ended.append(Hypothesis(alive[row].tokens, value, True))
            elif len(next_alive) < beams:
                next_alive.append(Hypothesis([*alive[row].tokens, token], value))
                rows.append(row)
        alive = next_alive
        if len(ended) >= beams or not alive:
            break
        decoder.reorder(torch.tensor(rows + [0] * (beams - len(rows)), device=decoder.device))
    found = ended if len(ended) >= beams else ended + alive
    return max(found, key=lambda hypothesis: hypothesis.score(penalty))
