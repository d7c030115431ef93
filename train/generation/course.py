"""The way of a batch of texts through their blanks, kept on the device, so that a step needs nothing from the host.

Slot 0 of a blank is its opening, slot i the i-th token written; a text stands at one slot of one blank, its place. What
a place asks for is known beforehand and laid out in a table: the positions of what is fed there, what may end the
blank, and where a text goes on that ends it. So a step picks a token, looks up where its text is then, and feeds it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from data_prep.tokenizer import Tokenizer
from kernels.greedy_step import COLUMNS, GROWS, NEXT_PLACE, NEXT_TOKEN, POSITIONS, SETTLED, STOPS, go_on
from train.generation.decoder import Decoder
from train.generation.forms import Form
from train.generation.picking import Decoding, allow, pick


def places_of(form: Form, limit: int, first: int) -> Tensor:
    """The table of one text, int64 [blanks · (limit + 1), COLUMNS]; its own places begin at number `first`.

    The last place of all is that of a text that is done, and leads to itself.
    """
    slots = torch.arange(limit + 1)[:, None]
    end = first + len(form.openings) * (limit + 1) - 1
    table = torch.ones(len(form.openings), limit + 1, COLUMNS, dtype=torch.int64)
    for number, (opening, places) in enumerate(zip(form.openings, table, strict=True)):
        begin, one_on = torch.tensor([opening.position(0), opening.position(1)])
        places[:, POSITIONS] = begin + slots * (one_on - begin)
        stops = [torch.tensor(opening.stops_at(slot)) for slot in range(opening.least + 1)]
        places[:, STOPS] = stops[-1]
        for slot, early in enumerate(stops[:-1]):
            places[slot, STOPS] = early
        places[:, SETTLED] = slots[:, 0] == limit
        last = number == len(form.openings) - 1
        places[:, NEXT_PLACE] = end if last else first + (number + 1) * (limit + 1)
        places[:, NEXT_TOKEN] = 0 if last else form.openings[number + 1].first
    table[-1, -1] = torch.tensor([0, 0, -1, -1, 1, end, 0, 0])
    return table.flatten(0, 1)


class Course:
    """Where each text of a batch stands; the decoder's rows are the texts."""

    def __init__(
        self, decoder: Decoder, forms: Sequence[Form], tokenizer: Tokenizer, decoding: Decoding, numbers: Sequence[int]
    ) -> None:
        """numbers: of the texts, which address their draws. The decoder holds the contexts."""
        self._decoder, self._tokenizer, self._decoding = decoder, tokenizer, decoding
        limit, tables, starts = decoding.max_new_tokens, list[Tensor](), [0]
        for form in forms:
            tables.append(places_of(form, limit, starts[-1]))
            starts.append(starts[-1] + len(tables[-1]))
        device = decoder.device
        self._table = torch.cat(tables).to(device)
        self._text = torch.ones(decoder.model.context.model.padded_vocab_size, dtype=torch.bool, device=device)
        for barred in tokenizer.no_text_ranges:
            self._text[barred] = False
        self._texts = torch.tensor(list(numbers), device=device)
        self._drawn = torch.zeros_like(self._texts)
        """Tokens that each text drew before."""
        self._place = torch.tensor(starts[:-1], device=device)
        self._here = self._table[self._place]
        self.picked = torch.zeros_like(self._texts)
        """What the last step picked for each text, int64 [texts]; without meaning where nothing was asked."""
        decoder.tokens.copy_(torch.tensor([form.openings[0].first for form in forms]))
        decoder.positions, decoder.grows = self._here[:, POSITIONS], self._here[:, GROWS]

    def start(self) -> Callable[[], None]:
        """The function that takes all texts one step on."""
        return self._decoder.loop(self._choose, (self._drawn, self._place, self._here))

    def _choose(self, logits: Tensor) -> None:
        state = (self._table, self._place, self._here, self.picked, self._decoder.tokens)
        if not self._decoding.temperature:
            self._decoder.model.context.ops.greedy_step(logits, self._text, *state)
            return
        allow(logits, self._tokenizer, self._here[:, STOPS])
        token = pick(logits, self._decoding, self._texts, self._drawn)
        self._drawn += 1 - self._here[:, SETTLED]
        go_on(token, *state)
