"""Rows of the embedding: this project's order against a foreign one.

Here: pieces, the eight special tokens, padding. ChatGLM2's special tokens stand in another order, and the tables of
GLM-130B and the first ChatGLM-6B begin with rows of image tokens that no text uses. Converting moves the rows, so that
token ids are right on both sides; a round trip puts every row back.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data_prep.errors import ConfigError
from data_prep.tokenizer import SPECIALS, Tokenizer


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's ids beside a table of `rows` rows.

    image_tokens: rows in front of the pieces in the foreign table (icetk: 20000). specials: names in the foreign order;
    they stand behind the foreign pieces, but in icetk's model among them.
    """

    tokenizer: Tokenizer
    rows: int
    image_tokens: int = 0
    specials: tuple[str, ...] = SPECIALS

    def __post_init__(self) -> None:
        expected = [self.tokenizer.pieces + place for place in range(len(SPECIALS))]
        if not self.holds_specials and [self.tokenizer.special_ids[name] for name in SPECIALS] != expected:
            raise ConfigError(
                f"{self.tokenizer.name}: some special tokens stand among its pieces, or image tokens before them "
                "(tokenizer.specials, tokenizer.image_tokens); only tables with all of them behind the pieces convert"
            )
        needed = self.tokenizer.vocab_size + self.image_tokens
        if needed > self.rows:
            raise ConfigError(
                f"{self.tokenizer.name} has {self.tokenizer.vocab_size} tokens (and image_tokens={self.image_tokens}), "
                f"but the embedding has {self.rows} rows: it is another model's tokenizer; give the right one as "
                "tokenizer.path="
            )

    @property
    def holds_specials(self) -> bool:
        """Whether the special tokens are pieces of icetk's model, and so stand where the foreign table has them."""
        return self.tokenizer.kind == "ice" and self.tokenizer.vocab_size == self.tokenizer.pieces

    @property
    def order(self) -> list[str]:
        """All special tokens in the foreign order: names that it lacks follow, so that rows stay a permutation."""
        return [*self.specials, *(name for name in SPECIALS if name not in self.specials)]

    def native_rows(self) -> Tensor | None:
        """int64 [rows]: the native row of each foreign one; None where the order is the same."""
        pieces, images = self.tokenizer.pieces, self.image_tokens
        if self.holds_specials:
            moved = [torch.arange(pieces, pieces + images), torch.arange(pieces)]
            return torch.cat([*moved, torch.arange(pieces + images, self.rows)]) if images else None
        if not images and self.specials == SPECIALS:
            return None
        native = [torch.arange(pieces + len(SPECIALS), pieces + len(SPECIALS) + images), torch.arange(pieces)]
        native.append(torch.tensor([self.tokenizer.special_ids[name] for name in self.order]))
        native.append(torch.arange(pieces + len(SPECIALS) + images, self.rows))
        return torch.cat(native)

    def foreign_id(self, special: str) -> int:
        """A special token's id in the foreign table."""
        if self.holds_specials:
            return self.image_tokens + self.tokenizer.special_ids[special]
        return self.image_tokens + self.tokenizer.pieces + self.order.index(special)

    def token_ids(self) -> dict[str, Any]:
        """Ids of the special tokens as a config.json spells them."""
        names = ("MASK", "gMASK", "sMASK", "eod", "sop", "eop")
        ids: dict[str, Any] = {f"{name.lower()}_token_id": self.foreign_id(name) for name in names}
        return {**ids, "bos_token_id": ids["sop_token_id"], "eos_token_id": [ids["eop_token_id"], ids["eod_token_id"]]}
