"""The manifest of a dataset folder: what is in it, where it came from, and how to tell that it is whole.

It is written last, so a folder without one is unfinished. All paths in it are relative to the folder.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import DataError
from data_prep.files import write_json

VERSION = 1
FILE = "manifest.json"
SPLITS = ("train", "valid", "test")


@dataclass
class Counts:
    """How much text there is."""

    documents: int = 0
    characters: int = 0
    bytes: int = 0
    """UTF-8 bytes of the cleaned text."""
    tokens: int = 0
    """Tokens, one eod a document included."""

    def add(self, characters: int, size: int, tokens: int) -> None:
        """Count one document."""
        self.documents += 1
        self.characters += characters
        self.bytes += size
        self.tokens += tokens

    def plus(self, other: "Counts") -> "Counts":
        """Both together."""
        return Counts(**{name: value + getattr(other, name) for name, value in asdict(self).items()})


@dataclass
class ShardInfo:
    """One `.bin`/`.idx` pair."""

    path: str
    """Without `.bin`, relative to the folder; absolute for a file that was adopted where it lies."""
    split: str
    bytes: int
    """Size of the `.bin`."""
    tokens: int
    documents: int = 0
    checksum: str = ""
    """xxh3-128 of the `.bin`."""
    index_checksum: str = ""
    """xxh3-128 of the `.idx`."""
    first_document: int | None = None
    """Of an adopted file, the first of its documents that are in this split; None: the whole file is."""


@dataclass
class StreamInfo:
    """The documents of one source in one language: what rows are cut from, and what mixtures weigh."""

    name: str
    lang: str
    weight: float | None
    """Share of the training samples relative to the other sources; None: in proportion to the rows."""
    licence: dict[str, int]
    """Documents under each licence."""
    counts: dict[str, Counts]
    """By split."""
    shards: list[ShardInfo]
    epochs: float | None = None
    """How often its rows may be drawn before the other sources take its share; None: without end."""
    content: str = "text"
    """text, or instructions: prompts and answers, two sequences a document."""

    @property
    def key(self) -> str:
        """`<source>.<lang>`, the stream's name in mixtures and file names."""
        return f"{self.name}.{self.lang}"


@dataclass
class Manifest:
    """Everything `manifest.json` says."""

    tokenizer: dict[str, Any]
    """sha256, pieces, specials."""
    split: dict[str, Any]
    """key, seed, shares, and the pages moved so that each stream has a validation page."""
    sources: list[StreamInfo]
    rejected: dict[str, dict[str, int]]
    """Refused documents by source and reason."""
    recipe: dict[str, Any]
    """The settings and input files it was made from, to tell whether the folder can be reused."""
    unigram_checksum: str
    version: int = VERSION

    def write(self, folder: Path) -> None:
        """Put the manifest in place: the folder is complete from here on."""
        write_json(folder / FILE, asdict(self))

    @staticmethod
    def read(folder: Path) -> "Manifest":
        """Manifest of a folder. Raises DataError when it is missing, damaged or of another version."""
        path = folder / FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            what = "the folder is unfinished" if folder.is_dir() else "no such folder"
            raise DataError(
                f"{path}: missing, {what}; make it with: python -m data_prep data.path={folder} …"
            ) from None
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: damaged ({error}); prepare the data again with data.overwrite=true") from error
        if not isinstance(content, dict) or content.get("version") != VERSION:
            found = content.get("version") if isinstance(content, dict) else None
            raise DataError(
                f"{path}: version {found} is not {VERSION}; prepare the data again with data.overwrite=true"
            )
        # Earlier folders have an empty list of this name; the plans have files of their own (data_prep/packing.py).
        content.pop("pack_plans", None)
        try:
            streams = [
                StreamInfo(
                    **{
                        **stream,
                        "counts": {split: Counts(**counts) for split, counts in stream["counts"].items()},
                        "shards": [ShardInfo(**shard) for shard in stream["shards"]],
                    }
                )
                for stream in content.pop("sources")
            ]
            return Manifest(sources=streams, **content)
        except (TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{path}: damaged ({error}); prepare the data again with data.overwrite=true") from error

    def counts(self, split: str) -> Counts:
        """Counts of a split over all sources."""
        total = Counts()
        for stream in self.sources:
            total = total.plus(stream.counts.get(split, Counts()))
        return total
