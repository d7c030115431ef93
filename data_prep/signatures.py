"""MinHash signatures of documents, many at once: one permutation, binned (Li, Owen, Zhang 2012).

Every shingle is hashed once; the high half of the hash picks one of K bins, the low half competes for the bin's
minimum. Bins that stay empty copy a full one that a fixed hash of (bin, attempt) names (optimal densification,
Shrivastava 2017). The share of equal bins estimates the Jaccard similarity of two documents' shingles; B bands of R
bins turn that into buckets: two documents meet in some band with probability 1 − (1 − Jᴿ)ᴮ.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_prep.shingles import by_characters, by_words, mixed

CHARACTERS = 5
"""Characters in a shingle of Chinese text."""
WORDS = 5
"""Words in a shingle of other text."""
FEWEST = 20
"""Shingles under which a document is too short to be compared."""
_EMPTY = np.uint32(0xFFFFFFFF)


@dataclass(frozen=True)
class Signer:
    """Bands and rows of the signatures."""

    bands: int = 20
    rows: int = 6

    @property
    def bins(self) -> int:
        """Minima a signature."""
        return self.bands * self.rows

    def sign(self, texts: Sequence[str], chinese: Sequence[bool]) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
        """Signatures uint32 [texts, bins], and which texts are long enough to have one, bool [texts].

        chinese: whether a text is cut into characters rather than words.
        """
        minima = np.full((len(texts), self.bins), _EMPTY, dtype=np.uint32)
        shingles = np.zeros(len(texts), dtype=np.int64)
        for wanted, cut, length in ((True, by_characters, CHARACTERS), (False, by_words, WORDS)):
            chosen = [number for number, is_chinese in enumerate(chinese) if is_chinese == wanted]
            if not chosen:
                continue
            hashes, document = cut([texts[number] for number in chosen], length)
            place = np.array(chosen)[document]
            shingles += np.bincount(place, minlength=len(texts))
            slot = place * self.bins + ((hashes >> np.uint64(32)) * np.uint64(self.bins) >> np.uint64(32)).astype(
                np.int64
            )
            np.minimum.at(minima.reshape(-1), slot, hashes.astype(np.uint32))
        enough = shingles >= FEWEST
        self._fill(minima, enough)
        return minima, enough

    def band_hashes(self, minima: NDArray[np.uint32]) -> NDArray[np.uint64]:
        """Bucket of each band, uint64 [bands, texts]."""
        grouped = minima.reshape(len(minima), self.bands, self.rows).astype(np.uint64)
        value = np.zeros(grouped.shape[:2], dtype=np.uint64)
        for row in range(self.rows):
            value = mixed(value * np.uint64(0x9E3779B97F4A7C15) + grouped[:, :, row] + np.uint64(row + 1))
        return np.ascontiguousarray(value.T)

    def _fill(self, minima: NDArray[np.uint32], enough: NDArray[np.bool_]) -> None:
        original = minima.copy()
        text, slot = np.nonzero((minima == _EMPTY) & enough[:, None])
        attempt = 0
        while len(text):
            attempt += 1
            source = (mixed((slot * 1024 + attempt).astype(np.uint64)) % np.uint64(self.bins)).astype(np.int64)
            found = original[text, source]
            full = found != _EMPTY
            minima[text[full], slot[full]] = found[full]
            text, slot = text[~full], slot[~full]


def compact(minima: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """Eight bits of each minimum, uint8 in the same shape: enough to estimate similarity (Li and König 2010)."""
    return (minima * np.uint32(0x9E3779B1) >> np.uint32(24)).astype(np.uint8)


def similarity(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Estimated Jaccard similarity of pairs of compact signatures [N, bins]; chance matches are taken out."""
    equal = (first == second).mean(axis=1)
    return np.maximum(0.0, (equal - 1 / 256) / (1 - 1 / 256))
