"""Evaluation texts in the training data: a document that shares a long run of text with one is kept aside.

The runs are 13 words, or 30 Chinese characters (GPT-3, arXiv 2005.14165, appendix C; PaLM), compared by 64-bit hash
with case, punctuation and white space left out. Both sides are in the normal form that `data.cleaning` gives documents.
A text shorter than a run is not looked for: a handful of words stands in many innocent documents.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.clean import clean_text, normalize_width, simplifier
from data_prep.config import CleaningConfig
from data_prep.errors import DataError
from data_prep.shingles import by_characters, by_words

WORDS = 13
CHARACTERS = 30


@dataclass(frozen=True)
class EvaluationText:
    """All runs of the evaluation files, sorted, each with the place it came from."""

    hashes: NDArray[np.uint64]
    places: NDArray[np.int64]
    """Index into `names` of each hash."""
    names: tuple[str, ...]
    """`file:line`."""

    @property
    def short(self) -> list[str]:
        """Names of the texts that are shorter than a run."""
        covered = set(self.places.tolist())
        return [name for number, name in enumerate(self.names) if number not in covered]

    def found_in(self, texts: Sequence[str], chinese: Sequence[bool]) -> list[str | None]:
        """For each text the place of an evaluation run that it holds, or None."""
        result: list[str | None] = [None] * len(texts)
        if not len(self.hashes):
            return result
        for wanted in (True, False):
            chosen = [number for number, is_chinese in enumerate(chinese) if is_chinese == wanted]
            if not chosen:
                continue
            hashes, document = _runs([texts[number] for number in chosen], wanted)
            at = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
            for hit in np.flatnonzero(self.hashes[at] == hashes)[::-1].tolist():
                result[chosen[int(document[hit])]] = self.names[int(self.places[at[hit]])]
        return result


def read_evaluation_files(cleaning: CleaningConfig) -> EvaluationText:
    """Runs of every string in the lines of `cleaning.decontaminate`: jsonl files, or text files with a text a line.

    Raises DataError naming the file.
    """
    texts: list[str] = []
    names: list[str] = []
    normal = _normal_form(cleaning)
    for name in cleaning.decontaminate:
        path = Path(name)
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read ({error}); data.cleaning.decontaminate lists it") from error
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                text = "\n".join(_strings(json.loads(line))) if path.suffix in (".jsonl", ".json") else line
            except ValueError as error:
                raise DataError(f"{path}: line {number}: not JSON ({error})") from error
            texts.append(normal(text))
            names.append(f"{path.name}:{number}")
    parts = [_runs(texts, wanted) for wanted in (True, False)]
    hashes = np.concatenate([part[0] for part in parts])
    places = np.concatenate([part[1] for part in parts])
    order = np.argsort(hashes, kind="stable")
    return EvaluationText(hashes[order], places[order], tuple(names))


def _runs(texts: list[str], chinese: bool) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    return by_characters(texts, CHARACTERS) if chinese else by_words(texts, WORDS)


def _normal_form(cleaning: CleaningConfig) -> Callable[[str], str]:
    simplified = simplifier() if cleaning.simplify else lambda text: text
    if cleaning.normalize_width:
        return lambda text: simplified(normalize_width(clean_text(text)))
    return lambda text: simplified(clean_text(text))


def _strings(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [text for item in value for text in _strings(item)] if isinstance(value, list) else []
