"""Stage finish: put the pieces together into a dataset folder, and the manifest in place last."""

import gzip
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import DataError
from data_prep.files import atomic_write, checksum, sync_folder, write_bytes, write_error
from data_prep.manifest import SPLITS, Counts, Manifest, ShardInfo, StreamInfo
from data_prep.report import html_report
from data_prep.steps.clean import Step
from data_prep.steps.split import streams_of
from data_prep.steps.work import Work
from data_prep.tally import Tally
from data_prep.tokenizer import Tokenizer

SCRATCH = ("clean", "match", "decide", "learn", "tokenise")


class Finish(Step):
    """Moves the shards to their names; every move can be repeated, so a kill between two of them costs nothing."""

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Ends the pipeline: yields nothing."""
        work = self.work
        try:
            _finish(work)
        except OSError as error:
            raise write_error(error.filename or work.folder, error) from error
        yield from ()


def _finish(work: Work) -> None:
    folder = work.folder
    tokenizer = Tokenizer.load(work.path("learn", 0))
    tokenizer.save(folder / "tokenizer")
    unigram = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    tally, rejected = Tally(), {source.name: Counter[str]() for source in work.tasks}
    for rank, source in enumerate(work.tasks):
        made = work.path("tokenise", rank)
        unigram += np.load(made / "unigram.npy")
        own = json.loads((made / "tally.json").read_text(encoding="utf-8"))
        tally.add(own)
        for key, count in own["documents"].items():
            if (reason := key.rsplit("/", 1)[1]) != "kept":
                rejected[source.name][reason] += count
    with atomic_write(folder / "unigram.npy") as file:
        np.save(file, unigram)
    _join_rejected(work)
    streams = [_join_stream(work, key, parts) for key, parts in streams_of(work).items()]
    streams = [stream for stream in streams if stream.shards]
    if not streams:
        raise DataError(f"data.sources: no document is left after cleaning; see {folder / 'rejected'} for the reasons")
    moved = json.loads((work.path("learn", 0) / "moved.json").read_text(encoding="utf-8"))
    manifest = Manifest(
        tokenizer={
            "sha256": tokenizer.sha256,
            "kind": tokenizer.kind,
            "pieces": tokenizer.pieces,
            "image_tokens": tokenizer.image_tokens,
            "specials": tokenizer.special_ids,
        },
        split={
            "key": "page",
            "seed": work.config.data.split_seed,
            "shares": list(work.config.data.split_shares),
            "moved_to_valid": moved,
        },
        sources=streams,
        rejected={name: dict(sorted(counts.items())) for name, counts in rejected.items()},
        recipe=work.recipe,
        unigram_checksum=checksum(folder / "unigram.npy"),
    )
    write_bytes(folder / "report.html", html_report(manifest, tally).encode())
    manifest.write(folder)
    for stage in SCRATCH:
        shutil.rmtree(folder / ".work" / stage, ignore_errors=True)


def _join_stream(work: Work, key: str, parts: list[tuple[int, str]]) -> StreamInfo:
    """One stream out of its parts: shards are numbered on in the order of the sources."""
    name, lang = key.rsplit(".", 1)
    whole: StreamInfo | None = None
    numbers = Counter[str]()
    licences: Counter[str] = Counter()
    for rank, _ in parts:
        made = work.path("tokenise", rank)
        part = next(s for s in json.loads((made / "streams.json").read_text(encoding="utf-8")) if s["lang"] == lang)
        if whole is None:
            fields = {field: part[field] for field in ("weight", "epochs", "content")}
            whole = StreamInfo(
                name, lang, licence={}, counts={split: Counts() for split in SPLITS}, shards=[], **fields
            )
        licences.update(part["licence"])
        for split in SPLITS:
            whole.counts[split] = whole.counts[split].plus(Counts(**part["counts"][split]))
        for shard in part["shards"]:
            info = ShardInfo(**shard)
            whole.shards.append(info)
            if info.first_document is not None:
                continue
            source, info.path = made / info.path, f"{info.split}/{key}-{numbers[info.split]:05d}"
            numbers[info.split] += 1
            for suffix in (".bin", ".idx"):
                _move(source.with_name(source.name + suffix), work.folder / f"{info.path}{suffix}")
    assert whole is not None
    whole.licence = dict(sorted(licences.items()))
    whole.shards.sort(key=lambda shard: (shard.path, shard.first_document or 0))
    return whole


def _move(source: Path, target: Path) -> None:
    if source.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, target)
        sync_folder(target.parent)
    elif not target.exists():
        raise DataError(f"{target}: is lost, and {source} with it; prepare the data again")


def _join_rejected(work: Work) -> None:
    """`rejected/<source>.jsonl.gz` out of the pieces: gzip members may follow one another."""
    parts: dict[str, list[Path]] = {}
    for rank, source in enumerate(work.tasks):
        for stage in ("clean", "tokenise"):
            parts.setdefault(source.name, []).append(work.path(stage, rank) / "rejected.jsonl.gz")
    for name, paths in parts.items():
        with atomic_write(work.folder / "rejected" / f"{name}.jsonl.gz") as file:
            for path in paths:
                if path.stat().st_size > len(gzip.compress(b"", mtime=0)):
                    with open(path, "rb") as part:
                        shutil.copyfileobj(part, file)
            if file.tell() == 0:
                file.write(gzip.compress(b"", mtime=0))
