"""Filling blanks with a trained model, in the form that it was trained on.

The context with its masks comes first and sees all of itself. Each blank is then written behind it: sop at the mask's
position, one token at a time, until eop (behind a [gMASK] eod too) or the length limit. Later blanks see earlier ones.
A causal model has no masks: its text goes on at a [gMASK] at the end.

Several texts of different lengths run side by side over one key-value cache (`train.generation.decoder`). The device
picks and feeds tokens by itself (`train.generation.course`); the host only reads what was picked.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field

from data_prep.tokenizer import Tokenizer
from train import backend
from train.generation.beams import OnToken, search
from train.generation.course import Course
from train.generation.decoder import Decoder
from train.generation.forms import Form
from train.generation.picking import Decoding
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
    slots = max(len(form.context) for form in forms)
    slots += max(len(form.openings) for form in forms) * (decoding.max_new_tokens + 1)
    decoder = Decoder(model, len(forms), slots, compiled=decoding.compiled)
    decoder.begin([form.context for form in forms], causal=causal)
    writers = [_Writer(form, decoding.max_new_tokens) for form in forms]
    course = Course(decoder, forms, tokenizer, decoding, numbers)
    with closing(backend.results(course.start(), course.picked)) as steps:
        while not all(writer.done for writer in writers):
            for number, (token, writer) in enumerate(zip(next(steps), writers, strict=True)):
                blank = writer.blank
                news = writer.take(token)
                if news is not None and on_token is not None:
                    on_token(numbers[number], blank, writer.written[blank], news)
    return [writer.written for writer in writers]


@dataclass
class _Writer:
    """What is written of one text."""

    form: Form
    limit: int
    written: list[list[int]] = field(default_factory=lambda: [[]])
    """Tokens of each blank begun so far."""
    done: bool = False

    @property
    def blank(self) -> int:
        """Number of the present blank."""
        return len(self.written) - 1

    def take(self, token: int) -> bool | None:
        """What the model says follows the last feed. Returns whether the blank is now whole; None: nothing was asked.

        A full blank's last token is run too, for the blanks behind it, but what follows it is not asked.
        """
        written, last = self.written[-1], self.blank == len(self.form.openings) - 1
        if self.done:
            return None
        if len(written) == self.limit:
            self.written.append([])
            return None
        ended = token in self.form.openings[self.blank].stops
        if not ended:
            written.append(token)
        whole = ended or len(written) == self.limit
        self.done = whole and last
        if ended and not last:
            self.written.append([])
        return whole
