"""Which split a page belongs to: a hash of the seed and the page, and for small sources a page moved to valid."""

import json
from collections.abc import Mapping
from typing import Any

import xxhash

from data_prep.config import DataConfig
from data_prep.errors import DataError
from data_prep.manifest import SPLITS
from data_prep.steps.work import Work


def page_of(document_id: str) -> str:
    """The page a document belongs to: the part of its id before '#', the same for a page and its translation."""
    return document_id.split("#", 1)[0]


def split_of(page: str, seed: int, shares: list[float]) -> str:
    """Split of a page: a hash of seed and page, compared with the shares."""
    place = xxhash.xxh3_64_intdigest(f"{seed}:{page}".encode()) / 2**64 * sum(shares)
    return SPLITS[0] if place < shares[0] else SPLITS[1] if place < shares[0] + shares[1] else SPLITS[2]


class Splitter:
    """The split of each document."""

    def __init__(self, config: DataConfig, moved: set[str]) -> None:
        """moved: pages that go to valid whatever their hash."""
        self._seed, self._shares, self._moved = config.split_seed, config.split_shares, moved

    def __call__(self, document: Mapping[str, Any]) -> str:
        """Split of a cleaned document."""
        page = page_of(document["id"])
        return "valid" if page in self._moved else split_of(page, self._seed, self._shares)

    @staticmethod
    def read(work: Work) -> "Splitter":
        """As the stage `learn` left it."""
        moved = json.loads((work.path("learn", 0) / "moved.json").read_text(encoding="utf-8"))
        return Splitter(work.config.data, set(moved))


def streams_of(work: Work) -> dict[str, list[tuple[int, str]]]:
    """The (rank, language) parts of each stream `<source>.<lang>`, streams sorted, parts in the sources' order."""
    parts: dict[str, list[tuple[int, str]]] = {}
    for rank, source in enumerate(work.tasks):
        for lang in work.languages(rank):
            parts.setdefault(f"{source.name}.{lang}", []).append((rank, lang))
    contents: dict[str, str] = {}
    for key, chosen in parts.items():
        for rank, _ in chosen:
            content = contents.setdefault(key, work.tasks[rank].content)
            if content != work.tasks[rank].content:
                raise DataError(
                    f"data.sources: {work.tasks[rank].name} holds text and instructions; give one of them another name"
                )
    return {key: parts[key] for key in sorted(parts)}


def pages_to_move(work: Work) -> set[str]:
    """Pages moved from train to valid so that each stream of a small corpus has one to validate on.

    Reads a stream only up to its first valid page, so that a large one costs nothing.
    """
    shares, seed = work.config.data.split_shares, work.config.data.split_seed
    moved: set[str] = set()
    if not (shares[0] and shares[1]):
        return moved
    for parts in streams_of(work).values():
        train: set[str] = set()
        for page in (page_of(document["id"]) for rank, lang in parts for document in work.kept(rank, lang)):
            split = split_of(page, seed, shares)
            if split == "valid" or page in moved:
                break
            if split == "train":
                train.add(page)
        else:
            if len(train) > 1:
                moved.add(max(train, key=lambda page: (xxhash.xxh3_64_intdigest(page.encode()), page)))
    return moved
