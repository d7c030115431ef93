"""Hashes of overlapping pieces of text, many documents at once: the ground of near-duplicates and decontamination.

Chinese is cut into runs of characters, other text into runs of words; case, punctuation and white space do not count.
A run's hash comes from prefix sums: with S[i] = Σ_{j<i} c[j]·Rʲ (mod 2⁶⁴), the piece i … i+n has the hash
(S[i+n] − S[i])·R⁻ⁱ wherever it stands, since the odd R has an inverse.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

_ROOT = 0x9E3779B97F4A7C15
_INVERSE = pow(_ROOT, -1, 1 << 64)
_MIX = np.uint64(0xFF51AFD7ED558CCD)
_MIX2 = np.uint64(0xC4CEB9FE1A85EC53)

Hashes = tuple[NDArray[np.uint64], NDArray[np.int64]]


def by_characters(texts: Sequence[str], length: int) -> Hashes:
    """Hashes of all runs of `length` letters or digits: (uint64 [N], number of the text of each int64 [N])."""
    codes = np.frombuffer("".join(texts).encode("utf-32-le", "replace"), dtype=np.uint32)
    folded = _fold_table()[np.minimum(codes, 0xFFFF)]
    folded = np.where(codes > 0xFFFF, codes, folded) if codes.size and codes.max() > 0xFFFF else folded
    kept = np.flatnonzero(folded)
    sizes = np.fromiter(map(len, texts), np.int64, len(texts))
    edges = np.searchsorted(kept, np.concatenate([[0], sizes.cumsum()]))
    units = folded[kept].astype(np.uint64)
    sums = np.zeros(len(units) + 1, dtype=np.uint64)
    np.cumsum(units * _powers(len(units))[0], out=sums[1:])
    return _runs(sums, edges, length)


def by_words(texts: Sequence[str], length: int) -> Hashes:
    """As `by_characters` for runs of `length` words."""
    encoded = [text.encode("utf-8", "replace") for text in texts]
    raw = np.frombuffer(b"\n".join(encoded) + b"\n", dtype=np.uint8)
    folded = _fold_bytes()[raw]
    _leave_out_punctuation(raw, folded)
    inside = folded != 0
    change = np.flatnonzero(inside[1:] != inside[:-1]) + 1
    if len(inside) and inside[0]:
        change = np.concatenate([[0], change])
    starts, ends = change[::2], change[1::2]
    power, inverse = _powers(len(raw))
    sums = np.zeros(len(raw) + 1, dtype=np.uint64)
    np.cumsum(folded * power, out=sums[1:])
    words = mixed((sums[ends] - sums[starts]) * inverse[starts])
    sizes = np.fromiter(map(len, encoded), np.int64, len(encoded)) + 1
    edges = np.searchsorted(starts, np.concatenate([[0], sizes.cumsum()]))
    sums = np.zeros(len(words) + 1, dtype=np.uint64)
    np.cumsum(words * power[: len(words)], out=sums[1:])
    return _runs(sums, edges, length)


def _leave_out_punctuation(raw: NDArray[np.uint8], folded: NDArray[np.uint64]) -> None:
    """Set to 0 what is UTF-8 of U+0080 … U+00BF (« »), U+2000 … U+203F (“ ” ’ – …) and U+3000 … U+303F (、。「)."""
    at = np.flatnonzero(raw == 0xC2)
    folded[np.concatenate([at, at + 1])] = 0
    for lead in (0xE2, 0xE3):
        at = np.flatnonzero(raw == lead)
        at = at[raw[at + 1] == 0x80]
        folded[np.concatenate([at, at + 1, at + 2])] = 0


def mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Every bit of a hash depends on every other: the finaliser of MurmurHash3."""
    values = values ^ (values >> np.uint64(33))
    values *= _MIX
    values ^= values >> np.uint64(33)
    values *= _MIX2
    values ^= values >> np.uint64(33)
    return values


def _runs(sums: NDArray[np.uint64], edges: NDArray[np.int64], length: int) -> Hashes:
    counts = np.maximum(np.diff(edges) - length + 1, 0)
    document = np.repeat(np.arange(len(counts)), counts)
    first = np.repeat(edges[:-1] - (counts.cumsum() - counts), counts) + np.arange(int(counts.sum()))
    inverse = _powers(len(sums))[1]
    return mixed((sums[first + length] - sums[first]) * inverse[first]), document


_POWERS = [np.ones(1, dtype=np.uint64), np.ones(1, dtype=np.uint64)]


def _powers(size: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """R⁰ … and R⁻⁰ … , uint64 [size] each; computed once for the longest batch so far."""
    if len(_POWERS[0]) < size:
        full = (
            np.full(max(size, 1 << 20), _ROOT, dtype=np.uint64),
            np.full(max(size, 1 << 20), _INVERSE, dtype=np.uint64),
        )
        for number, values in enumerate(full):
            values[0] = 1
            _POWERS[number] = np.cumprod(values)
    return _POWERS[0][:size], _POWERS[1][:size]


@cache
def _fold_table() -> NDArray[np.uint32]:
    """Lower case of each character of the basic plane, 0 for what is no letter or digit, uint32 [65536]."""
    table = np.zeros(1 << 16, dtype=np.uint32)
    for code in range(1 << 16):
        character = chr(code)
        if character.isalnum():
            lower = character.lower()
            table[code] = ord(lower) if len(lower) == 1 else code
    return table


@cache
def _fold_bytes() -> NDArray[np.uint64]:
    """Lower case of ASCII letters and digits, bytes of other characters as they are, 0 for the rest; uint64 [256]."""
    table = np.zeros(256, dtype=np.uint64)
    for byte in range(256):
        if byte >= 0x80 or chr(byte).isalnum():
            table[byte] = ord(chr(byte).lower()) if byte < 0x80 else byte
    return table
