"""Classes of characters, counted over a whole text at once: what language and quality are judged by.

A text becomes an array of code points; one table says each one's class. Simplified and Traditional are told apart by
two old character sets: what GB 2312 has and Big5 lacks is Simplified, and the other way round.
"""

import unicodedata
from enum import IntEnum
from functools import cache

import numpy as np
from numpy.typing import NDArray


class Kind(IntEnum):
    """Class of a character."""

    WHITE = 0
    HAN = 1
    SIMPLIFIED = 2
    TRADITIONAL = 3
    ASCII_LETTER = 4
    ACCENTED = 5
    KANA_HANGUL = 6
    OTHER_LETTER = 7
    DIGIT = 8
    STOP = 9
    """Ends or divides a sentence, in any script."""
    CODE = 10
    """Common in programs and rare in prose."""
    SYMBOL = 11


_STOPS = ".,;:?!'\"()-。，；：？！、（）《》“”‘’—…「」『』·〈〉【】"
_CODE = "{}[]<>=_#*/\\|&^~$@+`%"
_HAN = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF))
_TABLE_SIZE = 0x10000


def code_points(text: str) -> NDArray[np.uint32]:
    """The text's characters, uint32 [characters]."""
    return np.frombuffer(text.encode("utf-32-le", "replace"), dtype=np.uint32)


def count_kinds(text: str) -> NDArray[np.int64]:
    """Characters of each `Kind`, int64 [12]."""
    codes = code_points(text)
    # Beyond the table stand rare Chinese characters, emoji and dead scripts.
    kinds = _table()[np.minimum(codes, _TABLE_SIZE - 1)]
    counts = np.bincount(kinds, minlength=len(Kind))
    rare = int(((codes >= 0x20000) & (codes <= 0x323AF)).sum())
    counts[Kind.SYMBOL] -= rare
    counts[Kind.HAN] += rare
    return counts


@cache
def _table() -> NDArray[np.uint8]:
    table = np.full(_TABLE_SIZE, Kind.SYMBOL, dtype=np.uint8)
    for code in range(_TABLE_SIZE - 1):
        table[code] = _kind(chr(code))
    return table


def _kind(character: str) -> Kind:
    code = ord(character)
    if character.isspace():
        return Kind.WHITE
    if character in _STOPS:
        return Kind.STOP
    if character in _CODE:
        return Kind.CODE
    if any(first <= code <= last for first, last in _HAN):
        simplified, traditional = _encodes(character, "gb2312"), _encodes(character, "big5")
        if simplified != traditional:
            return Kind.SIMPLIFIED if simplified else Kind.TRADITIONAL
        return Kind.HAN
    if 0x3040 <= code <= 0x30FF or 0xAC00 <= code <= 0xD7AF:
        return Kind.KANA_HANGUL
    category = unicodedata.category(character)
    if category.startswith("L"):
        if code < 0x80:
            return Kind.ASCII_LETTER
        return Kind.ACCENTED if code < 0x250 else Kind.OTHER_LETTER
    return Kind.DIGIT if category.startswith("N") else Kind.SYMBOL


def _encodes(character: str, codec: str) -> bool:
    try:
        character.encode(codec)
    except UnicodeEncodeError:
        return False
    return True
