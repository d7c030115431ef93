"""The form of training, for text to be completed: what is run at once, and how each blank is written behind it."""

from collections.abc import Sequence
from dataclasses import dataclass

from data_prep.errors import ConfigError
from data_prep.tokenizer import Tokenizer
from train.config import ModelConfig


@dataclass(frozen=True)
class Opening:
    """How one blank is written: the token fed first, the position of each of its slots, and what ends it."""

    first: int
    place: int
    counts_on: bool
    """Positions go on behind the context (a 1D [gMASK], a causal text) in place of standing still at the mask."""
    two_dimensional: bool
    stops: tuple[int, int]
    """Tokens that end it: eop behind a [MASK]; behind a [gMASK] eod, or eop where answers were trained with one."""
    least: int
    """Tokens written before the end is offered: a blank of training hides at least one, an open end may be empty."""

    @property
    def ends(self) -> bool:
        """Whether the blank's end is part of it: a [MASK] or [sMASK] is so long and no longer, an open end goes on."""
        return self.least > 0

    def stops_at(self, inside: int) -> tuple[int, int]:
        """Tokens that may end it after `inside` tokens, −1 for none."""
        return self.stops if inside >= self.least else (-1, -1)

    def position(self, inside: int) -> tuple[int, int]:
        """Both positions of slot `inside`, the first token's being 0."""
        if self.counts_on:
            return self.place + inside, 0
        return self.place, inside + 1 if self.two_dimensional else 0


@dataclass(frozen=True)
class Form:
    """A text ready to be completed: tokens to run at once, and the blanks in the order of their masks."""

    context: list[int]
    openings: list[Opening]
    causal: bool = False

    @staticmethod
    def of(
        tokens: Sequence[int],
        tokenizer: Tokenizer,
        model: ModelConfig,
        *,
        causal: bool = False,
        starts_with_enc: bool = False,
    ) -> "Form":
        """tokens: a text with mask tokens. causal: the model was trained on plain text; one [gMASK] at the end only.

        starts_with_enc: the model's contexts begin with ENC, which is put in front.
        Raises ConfigError for a text without a mask.
        """
        if starts_with_enc and not causal:
            tokens = [tokenizer.special_ids["ENC"], *tokens]
        masks = (tokenizer.mask, tokenizer.smask, tokenizer.gmask)
        places = [place for place, token in enumerate(tokens) if token in masks]
        if not places:
            raise ConfigError("text holds no [MASK], [sMASK] or [gMASK] to fill")
        if causal:
            if places != [len(tokens) - 1] or tokens[-1] != tokenizer.gmask:
                raise ConfigError(
                    "text: a model of data.sampling.objective=causal fills no blanks; write one [gMASK] at the end"
                )
            before = [tokenizer.sop, *tokens[:-1]]
            opening = Opening(before[-1], len(before) - 1, True, False, (tokenizer.eod, tokenizer.eop), 0)
            return Form(before[:-1], [opening], causal=True)
        flat = model.positions not in ("rotary_2d", "learned_2d")
        openings = []
        for place in places:
            endless = tokens[place] == tokenizer.gmask
            openings.append(
                Opening(
                    first=tokenizer.sop,
                    place=len(tokens) if endless and flat else place,
                    counts_on=endless and flat,
                    two_dimensional=not flat,
                    stops=(tokenizer.eod if endless else tokenizer.eop, tokenizer.eop),
                    least=0 if endless else 1,
                )
            )
        return Form(list(tokens), openings)

    def check(self, longest: int, limit: int) -> None:
        """Raise ConfigError where context and blanks of `longest` tokens do not fit `limit` positions."""
        if len(self.context) + len(self.openings) * (longest + 1) > limit:
            raise ConfigError(
                f"the text's {len(self.context)} tokens and {len(self.openings)} blanks of max_new_tokens={longest} do "
                f"not fit the model's {limit} positions; shorten one of them"
            )
