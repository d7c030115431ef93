"""`python -m data_prep.tokenizer_report tokenizers='[data/mine,other/tokenizer.json]'`: tokenizers side by side.

On the same text, by language: how many tokens a character takes, how much is left to bytes or unknown, which pieces are
never used, and whether the text comes back. Plain UTF-8 bytes and plain characters stand beside them as bounds.
"""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from omegaconf import MISSING
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from data_prep.clean import clean_text
from data_prep.cli import run
from data_prep.config import DataConfig
from data_prep.errors import ConfigError, DataError
from data_prep.files import write_bytes
from data_prep.html import STYLE, bars, html_table
from data_prep.language import detect_language
from data_prep.reading import Document, read_documents
from data_prep.sources import resolve_sources
from data_prep.tokenizer import Tokenizer

_BATCH = 64
_COLUMNS = ("tokenizer", "lang", "tokens", "tok/char", "B/tok", "bytes", "unknown", "covered", "same")
_MEANING = (
    "tok/char: tokens a character; B/tok: UTF-8 bytes a token; bytes, unknown: part of the tokens that stand for a "
    "byte (or another part of a character), or for what cannot be spelt; covered: part of the characters that have a "
    "piece of their own; same: documents that come back exactly."
)


@dataclass
class TokenizerReportConfig:
    """Everything `python -m data_prep.tokenizer_report` reads."""

    tokenizers: list[str] = MISSING
    """Dataset folders, SentencePiece models and tokenizer.json files to compare, the one in question first."""
    data: DataConfig = field(default_factory=DataConfig)
    """The text to measure on: `data.sources` as in a preparation; without any, the embedded corpus."""
    characters: int = 1_000_000
    """Characters of each language to measure on."""
    output: str = "tokenizer_report.html"
    """HTML page to write."""

    def __post_init__(self) -> None:
        if self.characters < 1000:
            raise ConfigError(f"characters={self.characters} must be at least 1000")


@dataclass(frozen=True)
class Measured:
    """What one tokenizer does with the text of one language."""

    characters: int
    bytes: int
    counts: NDArray[np.int64]
    """How often each token came, int64 [vocab_size]."""
    byte_share: float
    """Of the tokens, those that stand for a byte or another part of a character."""
    unknown_share: float
    covered: float
    """Of the characters, those that are cut into whole pieces when they stand alone."""
    unchanged: float
    """Of the documents, those that come back exactly."""
    uncovered: list[tuple[str, int]]
    """The commonest characters that have no piece, and how often they came."""

    @property
    def tokens(self) -> int:
        """All tokens."""
        return int(self.counts.sum())


def read_texts(config: DataConfig, characters: int) -> dict[str, list[str]]:
    """Cleaned documents by language, each language up to `characters`. Raises DataError where there is no text."""
    texts: dict[str, list[str]] = {}
    left: Counter[str] = Counter()
    for source in resolve_sources(config):
        for item in read_documents(source, config):
            if not isinstance(item, Document):
                continue
            text = clean_text(item.text)
            lang = item.lang or detect_language(text)
            if text and left[lang] < characters:
                left[lang] += len(text)
                texts.setdefault(lang, []).append(text)
    if not texts:
        raise DataError("data.sources: no document in it")
    return dict(sorted(texts.items()))


def measure(tokenizer: Tokenizer, texts: Sequence[str]) -> Measured:
    """Figures of one tokenizer on documents of one language."""
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    unchanged = 0
    for first in range(0, len(texts), _BATCH):
        batch = texts[first : first + _BATCH]
        for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
            counts += np.bincount(ids, minlength=len(counts))
            unchanged += tokenizer.decode(ids.tolist()) == text
    characters = Counter[str]()
    for text in texts:
        characters.update(text)
    bad = tokenizer.byte_tokens.copy()
    if tokenizer.unknown is not None:
        bad[tokenizer.unknown] = True
    uncovered = [(one, count) for one, count in characters.items() if bad[tokenizer.encode(one, inside=True)].any()]
    uncovered.sort(key=lambda item: (-item[1], item[0]))
    every, tokens = characters.total(), max(1, int(counts.sum()))
    return Measured(
        characters=every,
        bytes=sum(len(text.encode()) for text in texts),
        counts=counts,
        byte_share=float(counts[tokenizer.byte_tokens].sum()) / tokens,
        unknown_share=0.0 if tokenizer.unknown is None else float(counts[tokenizer.unknown]) / tokens,
        covered=1 - sum(count for _, count in uncovered) / every,
        unchanged=unchanged / len(texts),
        uncovered=uncovered[:30],
    )


def unused(tokenizer: Tokenizer, counts: NDArray[np.int64]) -> tuple[int, list[str]]:
    """Pieces of text that never came, of how many, and as they are spelt; bytes are not counted among them."""
    text = ~tokenizer.no_text & ~tokenizer.byte_tokens
    if tokenizer.unknown is not None:
        text[tokenizer.unknown] = False
    return int(text.sum()), [tokenizer.piece(token) for token in np.flatnonzero(text & (counts == 0)).tolist()]


Results = Mapping[str, Mapping[str, Measured]]
"""By tokenizer, then by language."""


def lines(results: Results) -> list[tuple[str, ...]]:
    """A line a tokenizer and language, with bytes and characters as bounds; the columns are `_COLUMNS`."""
    found: list[tuple[str, ...]] = [
        (
            name,
            lang,
            f"{one.tokens:,}",
            f"{one.tokens / one.characters:.3f}",
            f"{one.bytes / max(1, one.tokens):.2f}",
            f"{one.byte_share:.2%}",
            f"{one.unknown_share:.2%}",
            f"{one.covered:.2%}",
            f"{one.unchanged:.1%}",
        )
        for name, languages in results.items()
        for lang, one in languages.items()
    ]
    for lang, one in next(iter(results.values())).items():
        wide = one.bytes / one.characters
        found.append(("(bytes)", lang, f"{one.bytes:,}", f"{wide:.3f}", "1.00", "", "", "", ""))
        found.append(("(characters)", lang, f"{one.characters:,}", "1.000", f"{wide:.2f}", "", "", "", ""))
    return found


def page(tokenizers: Mapping[str, Tokenizer], results: Results) -> str:
    """One HTML page without outside files."""
    parts = []
    languages = list(next(iter(results.values())))
    for lang in languages:
        each = {name: results[name][lang] for name in results}
        values = [round(1000 * one.tokens / one.characters) for one in each.values()]
        parts.append(bars(f"{lang}: tokens a thousand characters", values, list(each)))
    for name, tokenizer in tokenizers.items():
        total = sum(one.counts for one in results[name].values())
        pieces, never = unused(tokenizer, np.asarray(total))
        lengths = np.array([len(surface.decode("utf-8", "replace")) for surface in tokenizer.surfaces])
        weights = np.bincount(lengths, weights=np.asarray(total, dtype=float)).round().astype(int)[:17]
        missing = [(lang, one, f"{count:,}") for lang in languages for one, count in results[name][lang].uncovered]
        parts.append(
            f"<h2>{escape(name)}</h2><p>{escape(tokenizer.name)}: {tokenizer.kind}, {tokenizer.pieces:,} pieces, "
            f"sha256 <code>{tokenizer.sha256}</code>. {len(never):,} of {pieces:,} pieces of text "
            f"({len(never) / max(1, pieces):.1%}) never came.</p>"
            + bars("tokens by their length in characters", weights.tolist(), [str(n) for n in range(len(weights))])
            + f"<details><summary>pieces that never came</summary><pre>{escape(' '.join(never[:2000]))}</pre></details>"
            + "<details><summary>commonest characters without a piece</summary>"
            + html_table(("language", "character", "times"), missing)
            + "</details>"
        )
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Tokenizers</title><style>{STYLE}</style>
<h1>Tokenizers</h1><p>{escape(_MEANING)}</p>{html_table(_COLUMNS, lines(results))}
{"".join(parts)}</html>
"""


def main(config: TokenizerReportConfig) -> int:
    """Measure, print the table, write the page."""
    if not config.tokenizers:
        raise ConfigError("tokenizers is empty; give one or more: tokenizers='[data/mine,other/tokenizer.json]'")
    tokenizers = {short: Tokenizer.load(path) for short, path in _short_names(config.tokenizers).items()}
    if not config.data.sources:
        config.data.sources = ["bundled:zh.jsonl.gz", "bundled:en.jsonl.gz"]
    texts = read_texts(config.data, config.characters)
    results = {
        name: {lang: measure(tokenizer, own) for lang, own in texts.items()} for name, tokenizer in tokenizers.items()
    }
    write_bytes(Path(config.output), page(tokenizers, results).encode())
    console = Console()
    console.print(_table(results))
    for name, tokenizer in tokenizers.items():
        pieces, never = unused(tokenizer, np.asarray(sum(one.counts for one in results[name].values())))
        console.print(f"{name}: {len(never):,} of {pieces:,} pieces of text never came", markup=False, highlight=False)
    console.print(f"{config.output} tells more", markup=False)
    return 0


def _table(results: Results) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for number, column in enumerate(_COLUMNS):
        table.add_column(column, justify="left" if number < 2 else "right", no_wrap=True)
    for row in lines(results):
        table.add_row(*row)
    return table


def _short_names(paths: Sequence[str]) -> dict[str, str]:
    """Paths by the shortest end that tells them all apart."""
    if len(set(paths)) < len(paths):
        raise ConfigError(f"tokenizers: a path is given twice in {list(paths)}")
    every = [Path(path).absolute().parts for path in paths]
    for length in range(1, max(map(len, every)) + 1):
        names = [str(Path(*parts[-length:])) for parts in every]
        if len(set(names)) == len(names):
            break
    return dict(zip(names, paths, strict=True))


if __name__ == "__main__":
    sys.exit(run("tokenizer_report", TokenizerReportConfig, main, program="data_prep.tokenizer_report"))
