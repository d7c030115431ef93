"""Filling blanks with a trained model, in the form that it was trained on.

The context with its masks comes first and sees all of itself. Each blank is then written behind it: sop at the mask's
position, one token at a time, until eop (behind a [gMASK] eod too) or the length limit. Later blanks see earlier ones.
A causal model has no masks: its text goes on at a [gMASK] at the end.

Several texts of different lengths run side by side over one key-value cache (`train.generation.decoder`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from data_prep.tokenizer import Tokenizer
from train.generation.beams import OnToken, search
from train.generation.decoder import Decoder
from train.generation.forms import Form
from train.generation.picking import Decoding, allow, pick
from train.model.build import Model


def fill(model: Model, tokenizer: Tokenizer, context: Sequence[int], decoding: Decoding) -> list[list[int]]:
    """Tokens for each mask of one context, in the order of the masks; see `fill_all`."""
    return fill_all(model, tokenizer, [context], decoding)[0]


def fill_all(
    model: Model,
    tokenizer: Tokenizer,
    contexts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    causal: bool = False,
    numbers: Sequence[int] | None = None,
    on_token: OnToken | None = None,
) -> list[list[list[int]]]:
    """Tokens for each mask of each context, decoded as one batch.

    contexts: token ids holding [MASK], [sMASK] or [gMASK]. numbers: of the contexts, which address their draws and name
    them to `on_token`; null counts from 0. Raises ConfigError where one holds no mask, or where context and blanks do
    not fit the model's positions.
    """
    shape, enc = model.context.model, model.context.starts_with_enc
    forms = [Form.of(context, tokenizer, shape, causal=causal, starts_with_enc=enc) for context in contexts]
    for form in forms:
        form.check(decoding.max_new_tokens, model.context.model.max_positions)
    numbers = range(len(forms)) if numbers is None else numbers
    if decoding.beams > 1:
        pairs = zip(numbers, forms, strict=True)
        return [search(model, tokenizer, form, decoding, text, on_token) for text, form in pairs]
    # A row that is done goes on being fed until the last one is: room for that, too.
    slots = max(len(form.context) for form in forms)
    slots += max(len(form.openings) for form in forms) * (decoding.max_new_tokens + 1)
    decoder = Decoder(model, len(forms), slots, compiled=decoding.compiled)
    decoder.begin([form.context for form in forms], causal=causal)
    writers = [_Writer(form, decoding.max_new_tokens) for form in forms]
    texts = torch.tensor(list(numbers), device=decoder.device)
    while not all(writer.done for writer in writers):
        # One copy to the device a step: token, both positions, both stops, tokens drawn.
        rows = [[*writer.feed(), *writer.stops, writer.drawn] for writer in writers]
        fed = torch.tensor(rows).to(decoder.device)
        logits = decoder.step(fed[:, 0], fed[:, 1:3])
        allow(logits, tokenizer, fed[:, 3:5])
        for number, token in enumerate(pick(logits, decoding, texts, fed[:, 5]).tolist()):
            blank = writers[number].blank
            news = writers[number].take(token)
            if news is not None and on_token is not None:
                on_token(numbers[number], blank, writers[number].written[blank], news)
    return [writer.written for writer in writers]


@dataclass
class _Writer:
    """Where one text stands. Slot 0 of a blank is its opening, slot i the i-th token written."""

    form: Form
    limit: int
    written: list[list[int]] = field(default_factory=lambda: [[]])
    """Tokens of each blank begun so far."""
    fed: int = 0
    """Slots of the present blank that went into the model."""
    drawn: int = 0
    done: bool = False

    @property
    def blank(self) -> int:
        """Number of the present blank."""
        return len(self.written) - 1

    @property
    def stops(self) -> tuple[int, int]:
        """Tokens that may end the blank now, −1 for none."""
        return self.form.openings[self.blank].stops_at(len(self.written[-1]))

    def feed(self) -> tuple[int, int, int]:
        """The next token to run, and its two positions; anything once the text is done."""
        if self.done:
            return 0, 0, 0
        opening = self.form.openings[self.blank]
        token = self.written[-1][self.fed - 1] if self.fed else opening.first
        self.fed += 1
        return token, *opening.position(self.fed - 1)

    def take(self, token: int) -> bool | None:
        """What the model says follows the last feed. Returns whether the blank is now whole; None: nothing was asked.

        A full blank's last token is run too, for the blanks behind it, but what follows it is not asked.
        """
        written, last = self.written[-1], self.blank == len(self.form.openings) - 1
        if self.done:
            return None
        if len(written) == self.limit:
            self._begin()
            return None
        self.drawn += 1
        ended = token in self.form.openings[self.blank].stops
        if not ended:
            written.append(token)
        whole = ended or len(written) == self.limit
        self.done = whole and last
        if ended and not last:
            self._begin()
        return whole

    def _begin(self) -> None:
        self.written.append([])
        self.fed = 0
