"""The pieces of work of a preparation, and the folders in which they leave what they made."""

import io
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from data_prep.config import PrepConfig
from data_prep.files import sync_folder
from data_prep.sources import Source

DOCUMENT = np.dtype(
    [("high", "<u8"), ("low", "<u8"), ("line", "<u4"), ("file", "<u4"), ("stream", "<u2"), ("signed", "?")]
)
"""One cleaned document: the halves of its duplicate key, where it came from, its language's number, and whether it has
a signature."""
DROP = np.dtype([("number", "<u4"), ("reason", "u1"), ("task", "<u4"), ("first", "<u4")])
"""A document that is dropped after all: which, why, and the earlier document (task, number) that it equals."""
DROP_REASONS = ("duplicate", "near_duplicate", "over_cap")


@dataclass(frozen=True)
class Work:
    """A preparation under way. Travels to every rank."""

    folder: Path
    """The dataset folder."""
    config: PrepConfig
    tasks: tuple[Source, ...]
    """One source a rank, with the files that this rank reads."""
    recipe: dict[str, Any]

    def path(self, stage: str, rank: int) -> Path:
        """Where a rank of a stage leaves what it made."""
        return self.folder / ".work" / stage / f"{rank:05d}"

    @contextmanager
    def output(self, stage: str, rank: int) -> Iterator[Path]:
        """A new folder that takes the place of `path(stage, rank)` when the block ends without an error."""
        final = self.path(stage, rank)
        # Left by processes of this rank that were killed; a rank runs in one process at a time.
        for remains in final.parent.glob(f".{final.name}.*.tmp"):
            shutil.rmtree(remains)
        temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
        temporary.mkdir(parents=True)
        try:
            yield temporary
            if final.exists():
                # Left by a rank that was killed between the rename and its marker.
                shutil.rmtree(final)
            os.replace(temporary, final)
            sync_folder(final.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def documents(self, rank: int) -> Any:
        """The cleaned documents of a rank, memory-mapped `DOCUMENT` records."""
        return load(self.path("clean", rank) / "documents.npy")

    def languages(self, rank: int) -> list[str]:
        """Languages found by a rank, by their number."""
        return list(json.loads((self.path("clean", rank) / "languages.json").read_text(encoding="utf-8")))

    def kept(self, rank: int, lang: str) -> Iterator[dict[str, Any]]:
        """Cleaned documents of a rank in one language that are not dropped, in their order."""
        dropped = np.zeros(len(self.documents(rank)), dtype=bool)
        dropped[self.drops(rank)["number"]] = True
        for record in self.cleaned(rank, lang):
            if not dropped[record["number"]]:
                yield record

    def drops(self, rank: int) -> Any:
        """`DROP` records of a rank in rising order."""
        return load(self.path("decide", 0) / f"{rank:05d}.npy")

    def cleaned(self, rank: int, lang: str) -> Iterator[dict[str, Any]]:
        """All cleaned documents of a rank in one language, in their order; none of token shards that are adopted."""
        if self.tasks[rank].adopted:
            return
        with (
            open(self.path("clean", rank) / f"{lang}.jsonl.zst", "rb") as raw,
            zstandard.ZstdDecompressor().stream_reader(raw) as reader,
        ):
            yield from map(json.loads, io.BufferedReader(reader, 1 << 20))

    def place(self, rank: int, number: int) -> str:
        """`file:line` of a cleaned document."""
        document = self.documents(rank)[number]
        source = self.tasks[rank]
        file = source.files[int(document["file"])] if source.files else f"hub:{source.hub}"
        return f"{file}:{int(document['line'])}"


def load(path: Path) -> Any:
    """A memory-mapped array; numpy cannot map an empty one."""
    return np.load(path, mmap_mode="r") if os.path.getsize(path) > 256 else np.load(path)


def plan_tasks(sources: Sequence[Source], task_bytes: int) -> tuple[Source, ...]:
    """Pieces of work: consecutive files of one source up to `task_bytes`, each shard of a hub data set."""
    tasks: list[Source] = []
    for source in sources:
        if source.hub is not None:
            tasks += [replace(source, hub_shard=number) for number in range(source.hub_shards)]
            continue
        files: list[Path] = []
        size = 0
        for path in source.files:
            files.append(path)
            size += path.stat().st_size
            if size >= task_bytes:
                tasks.append(replace(source, files=tuple(files)))
                files, size = [], 0
        if files:
            tasks.append(replace(source, files=tuple(files)))
    return tuple(tasks)
