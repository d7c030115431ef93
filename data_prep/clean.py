"""Cleaning of one document: normal form, control characters, width, length, and the key of exact duplicates.

Every rule is a plain function of the text; the reason a document is refused for is one of `REASONS`.
"""

import re
import unicodedata
from collections.abc import Callable
from itertools import pairwise

import xxhash

from data_prep.quality import FIGURES

REASONS = {
    "broken_utf8": "the bytes are not UTF-8",
    "bad_json": "the line is not a JSON object",
    "missing_text": "the text field is missing or not a string",
    "line_too_long": "the line is longer than data.max_line_bytes",
    "empty": "nothing is left after cleaning",
    "too_short": "fewer characters than data.min_characters",
    "too_long": "more characters than data.max_characters",
    "unreadable": "over 1 % of the characters are U+FFFD, control characters or half surrogates",
    "empty_target": "the answer to the prompt is empty",
    "over_cap": "the source's cap is reached",
    "duplicate": "equal to an earlier document but for white space",
    "near_duplicate": "much like an earlier document (data.cleaning.similarity)",
    "other_language": "not in one of data.cleaning.languages",
    "contaminated": "shares a long run of text with an evaluation set",
    **{f"quality_{name}": f"out of limits: {meaning}" for name, meaning in FIGURES.items()},
}
"""Why a document is kept aside, by the name used in reports and in rejected/."""

_CONTROL = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060\ufeff\ufffd\ud800-\udfff]"
)
_NEWLINES = re.compile("\r\n?|\u2028|\u2029|\x85")
# Looking back, a run is tried from its start alone; from each of its blanks, a long one takes the square of its length.
_TRAILING = re.compile(r"(?<![ \t\u3000\xa0])[ \t\u3000\xa0]+\n")
_BLANK_LINES = re.compile(r"\n{3,}")
_WHITE = re.compile(r"\s+")
_MARK = f"[{''.join(filter(unicodedata.combining, map(chr, range(0x300, 0x1F000))))}]"
_RUN = 256
"""Combining marks in a row that are put in order together: Python takes the square of their number."""
_ANY_MARK, _LONG_RUN = re.compile(_MARK), re.compile(f"{_MARK}{{{_RUN}}}")
_WIDE = {
    code: code - 0xFEE0
    for first, last in ((0xFF10, 0xFF19), (0xFF21, 0xFF3A), (0xFF41, 0xFF5A))
    for code in range(first, last + 1)
}
_WIDE[0x3000] = 0x20


def clean_text(text: str) -> str:
    """Text in Unicode NFC, with \\n line ends, no control or invisible characters, no long runs of blank lines."""
    text = _NEWLINES.sub("\n", text)
    text = _CONTROL.sub("", _composed(text))
    return _BLANK_LINES.sub("\n\n", _TRAILING.sub("\n", text)).strip()


def _composed(text: str) -> str:
    """Unicode NFC, but that runs of over `_RUN` combining marks, which no script has, are put in order in parts."""
    # Such a run holds one of every `_RUN`th characters, and these are looked at quickly.
    if _ANY_MARK.search(text[::_RUN]) is None:
        return unicodedata.normalize("NFC", text)
    cuts = [found.end() for found in _LONG_RUN.finditer(text)]
    return "".join(unicodedata.normalize("NFC", text[start:end]) for start, end in pairwise([0, *cuts, len(text)]))


def normalize_width(text: str) -> str:
    """Full-width letters, digits and the ideographic space in their usual width."""
    return text.translate(_WIDE)


def simplifier() -> Callable[[str], str]:
    """Traditional characters to simplified ones (OpenCC's t2s)."""
    import opencc

    convert: Callable[[str], str] = opencc.OpenCC("t2s").convert
    return convert


def refusal(raw: str, cleaned: str, min_characters: int, max_characters: int) -> str | None:
    """Name of the reason to refuse a document, or None."""
    if not cleaned:
        return "empty"
    if len(_CONTROL.findall(raw)) * 100 > len(raw):
        return "unreadable"
    if len(cleaned) < min_characters:
        return "too_short"
    if len(cleaned) > max_characters:
        return "too_long"
    return None


def duplicate_key(cleaned: str) -> int:
    """128-bit hash that two documents share when they differ in white space only."""
    return int(xxhash.xxh3_128_intdigest(_WHITE.sub("", cleaned).encode()))
