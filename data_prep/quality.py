"""Quality of a document in figures, and the limits outside which it is kept aside.

Rules in the manner of Gopher (arXiv 2112.11446, table A1) and C4, with limits of their own for each language, which
`data.cleaning.limits` changes one by one. The reason for keeping a document aside is `quality_<figure>`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.characters import Kind, count_kinds
from data_prep.errors import ConfigError
from data_prep.language import ENGLISH_WORDS
from data_prep.shingles import by_characters, by_words

FIGURES = {
    "length": "characters that are not white space",
    "chinese": "part of the visible characters that are Chinese",
    "symbols": "part of the visible characters that are neither letter, digit nor punctuation",
    "punctuation": "part of the visible characters that divide or end sentences",
    "digits": "part of the visible characters that are digits",
    "repeated_lines": "part of the text in lines that stood in it before",
    "repeated_ngrams": "part of the text taken by its most frequent run of ten characters (Chinese) or three words",
    "word_length": "characters a word",
    "stop_words": "part of the words that are function words",
    "unfinished_lines": "part of the lines that end in an ellipsis",
}
"""Meaning of each figure."""

Limits = Mapping[str, tuple[float, float]]
CHARACTERS, WORDS = 10, 3
"""Length of the runs whose repetition counts."""
_INFINITY = float("inf")
_COMMON: Limits = {
    "length": (100, _INFINITY),
    "symbols": (0, 0.15),
    "digits": (0, 0.3),
    "repeated_lines": (0, 0.3),
    "repeated_ngrams": (0, 0.2),
    "unfinished_lines": (0, 0.3),
}
LIMITS: Mapping[str, Limits] = {
    "zh": {**_COMMON, "chinese": (0.4, 1), "punctuation": (0.01, 0.35)},
    "zh_hant": {**_COMMON, "chinese": (0.4, 1), "punctuation": (0.01, 0.35)},
    "en": {**_COMMON, "length": (200, _INFINITY), "word_length": (3, 10), "stop_words": (0.06, 1)},
    "code": {"length": (50, _INFINITY), "repeated_lines": (0, 0.6), "repeated_ngrams": (0, 0.4)},
    "other": _COMMON,
}
"""Limits by language; a language without its own has those of `other`."""


def figures(text: str, lang: str) -> dict[str, float]:
    """Every figure of `FIGURES` that the language's limits look at."""
    counts = count_kinds(text)
    visible = max(1, int(counts.sum() - counts[Kind.WHITE]))
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    characters = sum(map(len, lines)) or 1
    result = {
        "length": float(visible),
        "chinese": float(counts[Kind.HAN] + counts[Kind.SIMPLIFIED] + counts[Kind.TRADITIONAL]) / visible,
        "symbols": float(counts[Kind.SYMBOL] + counts[Kind.CODE]) / visible,
        "punctuation": float(counts[Kind.STOP]) / visible,
        "digits": float(counts[Kind.DIGIT]) / visible,
        "repeated_lines": (characters - sum(map(len, set(lines)))) / characters,
        "unfinished_lines": sum(line.endswith(("…", "...")) for line in lines) / max(1, len(lines)),
    }
    if lang.startswith("zh"):
        result["repeated_ngrams"] = _most_frequent(by_characters([text], CHARACTERS)[0], CHARACTERS)
        return result
    words = text.lower().split()
    result["repeated_ngrams"] = _most_frequent(by_words([text], WORDS)[0], WORDS)
    result["word_length"] = visible / max(1, len(words))
    result["stop_words"] = len([word for word in words if word in ENGLISH_WORDS]) / max(1, len(words))
    return result


def _most_frequent(runs: NDArray[np.uint64], length: int) -> float:
    """Part of the text in the commonest run of `length` units, where it stands three times or more."""
    runs = np.sort(runs)
    if len(runs) < 3:
        return 0.0
    edges = np.flatnonzero(np.concatenate([[True], runs[1:] != runs[:-1], [True]]))
    count = int(np.diff(edges).max())
    return min(1.0, count * length / (len(runs) + length - 1)) if count > 2 else 0.0


def limits_of(changes: Mapping[str, Any]) -> dict[str, dict[str, tuple[float, float]]]:
    """`LIMITS` with a config's changes, `{lang: {figure: [lowest, highest] or null}}`; null takes a limit away.

    Raises ConfigError for an unknown figure or a wrong pair.
    """
    result = {lang: dict(limits) for lang, limits in LIMITS.items()}
    for lang, figures_changed in changes.items():
        own = result.setdefault(str(lang), dict(LIMITS["other"]))
        for name, pair in dict(figures_changed).items():
            key = f"data.cleaning.limits.{lang}.{name}"
            if name not in FIGURES:
                raise ConfigError(f"{key} is not known; the figures are {', '.join(FIGURES)}")
            if pair is None:
                own.pop(name, None)
                continue
            if len(list(pair)) != 2 or pair[0] > pair[1]:
                raise ConfigError(f"{key}={pair} must be [lowest, highest]")
            own[name] = (float(pair[0]), float(pair[1]))
    return result


def outside(values: Mapping[str, float], limits: Limits) -> tuple[str, str] | None:
    """(reason, detail) of the first figure outside its limits, or None."""
    for name, (lowest, highest) in limits.items():
        if name in values and not lowest <= values[name] <= highest:
            bound = f"under {lowest:g}" if values[name] < lowest else f"over {highest:g}"
            return f"quality_{name}", f"{values[name]:.4g} is {bound}"
    return None
