"""Showing one text on a terminal while its blanks are written: blanks fill from left to right, so it simply grows."""

import re

from rich.console import Console
from rich.text import Text

from data_prep.tokenizer import Tokenizer

MASKS = re.compile(r"( ?)\[(MASK|sMASK|gMASK)\]")
"""A mask as users write it, with the space in front: a piece carries its space, so the blank brings its own."""
STYLE = "bold underline green"


class Stream:
    """Prints a text as far as it is known; `on_token` is what `fill_all` calls."""

    def __init__(self, tokenizer: Tokenizer, text: str, console: Console) -> None:
        self._tokenizer, self._console = tokenizer, console
        self._matches = list(MASKS.finditer(text))
        ends = [0, *(match.end() for match in self._matches)]
        self._before = [text[end : match.start()] for end, match in zip(ends, self._matches, strict=False)]
        self._rest = text[ends[-1] :]
        self._begun = 0
        self._shown = ""

    def on_token(self, _: int, blank: int, tokens: list[int], done: bool) -> None:
        """Show what the blank's text has gained. Bytes of a character that is not whole yet wait."""
        if self._begun == blank:
            self._print(self._before[blank])
            self._begun, self._shown = blank + 1, ""
        filled = self._tokenizer.decode(tokens)
        certain = filled if done else filled.rstrip("\ufffd")
        if certain.startswith(self._shown):
            self._print(certain[len(self._shown) :], STYLE)
            self._shown = certain
        if done and not filled:
            self._print(self._matches[blank][1])

    def close(self) -> None:
        """The text behind the last blank."""
        self._print(self._rest + "\n")

    def _print(self, text: str, style: str = "") -> None:
        if text:
            self._console.print(Text(text, style=style), end="", soft_wrap=True, highlight=False)
