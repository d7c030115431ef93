"""Stages learn and tokenise: the tokenizer, then the token shards of each piece of work."""

import gzip
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import ConfigError, DataError
from data_prep.files import checksum, write_error, write_json
from data_prep.manifest import SPLITS, Counts, ShardInfo, StreamInfo
from data_prep.shards import ShardWriter, token_dtype
from data_prep.steps.adopt import adopt
from data_prep.steps.clean import Step, rejected_line
from data_prep.steps.split import Splitter, pages_to_move, streams_of
from data_prep.steps.work import DROP_REASONS, Work
from data_prep.tally import Tally
from data_prep.tokenizer import Tokenizer, given_tokenizer
from data_prep.tokenizer_training import balanced, train_tokenizer

_ENCODE_DOCUMENTS, _ENCODE_CHARACTERS = 256, 4_000_000
"""Encoded together, at most; the library needs up to 50 bytes a character of them. One longer document goes alone."""


class Learn(Step):
    """The tokenizer, trained on equal parts of each language's train split, or the one that is given."""

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Ends the pipeline: yields nothing."""
        work, config = self.work, self.work.config
        streams = streams_of(work)
        if not any(source.adopted or len(work.documents(task)) for task, source in enumerate(work.tasks)):
            raise DataError("data.sources: no document is left after cleaning; see .work/clean/*/rejected.jsonl.gz")
        with work.output("learn", 0) as folder:
            moved = pages_to_move(work)
            write_json(folder / "moved.json", sorted(moved))
            tokenizer = given_tokenizer(config.tokenizer)
            if tokenizer is None:
                if config.data.split_shares[0] == 0:
                    raise ConfigError("data.split_shares leaves nothing to train a tokenizer on; give tokenizer.path")
                split = Splitter(config.data, moved)
                languages = sorted({lang for parts in streams.values() for _, lang in parts})
                texts = {lang: _train_texts(work, streams, lang, split) for lang in languages}
                tokenizer = train_tokenizer(balanced(texts, config.tokenizer.training_bytes), config.tokenizer)
            tokenizer.save(folder)
        yield from ()


def _train_texts(work: Work, streams: dict[str, list[tuple[int, str]]], lang: str, split: Splitter) -> Iterator[str]:
    for parts in streams.values():
        for rank, own in parts:
            if own == lang:
                yield from (one["text"] for one in work.kept(rank, lang) if split(one) == "train")


class Tokenise(Step):
    """Shards, counts, and what the stage decide dropped, for one piece of work."""

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Ends the pipeline: yields nothing."""
        work = self.work
        tokenizer = Tokenizer.load(work.path("learn", 0))
        unigram = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        try:
            with work.output("tokenise", rank) as folder:
                streams = []
                source, shares = work.tasks[rank], work.config.data.split_shares
                for lang in () if source.adopted else work.languages(rank):
                    with self.track_time("stream"):
                        streams.append(asdict(_write_stream(work, rank, lang, tokenizer, unigram, folder)))
                if source.adopted:
                    streams.append(asdict(adopt(source, shares, tokenizer, unigram)))
                write_json(folder / "streams.json", streams)
                np.save(folder / "unigram.npy", unigram)
                self._keep_dropped(rank, folder)
        except OSError as error:
            raise write_error(error.filename or work.folder, error) from error
        yield from ()

    def _keep_dropped(self, rank: int, folder: Path) -> None:
        work, tally = self.work, Tally()
        tally.add(json.loads((work.path("clean", rank) / "tally.json").read_text(encoding="utf-8")))
        drops = work.drops(rank)
        numbers = np.array(drops["number"])
        with gzip.GzipFile(folder / "rejected.jsonl.gz", "wb", mtime=0) as aside:
            for lang in work.languages(rank) if len(drops) else []:
                for record in work.cleaned(rank, lang):
                    place = int(np.searchsorted(numbers, record["number"]))
                    if place == len(numbers) or numbers[place] != record["number"]:
                        continue
                    drop = drops[place]
                    reason = DROP_REASONS[int(drop["reason"])]
                    earlier = f"of {work.place(int(drop['task']), int(drop['first']))}"
                    detail = f"cap={work.tasks[rank].cap}" if reason == "over_cap" else earlier
                    fields = record | {"lang": lang, "reason": reason, "detail": detail}
                    tally.drop(record["text"], fields)
                    aside.write(rejected_line(fields, record["id"], record["text"]))
        write_json(folder / "tally.json", tally.to_json())


def _batches(documents: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Documents in their order, `_ENCODE_DOCUMENTS` and `_ENCODE_CHARACTERS` at most together."""
    batch: list[dict[str, Any]] = []
    size = 0
    for document in documents:
        length = len(document["text"])
        if batch and (len(batch) == _ENCODE_DOCUMENTS or size + length > _ENCODE_CHARACTERS):
            yield batch
            batch, size = [], 0
        batch.append(document)
        size += length
    if batch:
        yield batch


def _write_stream(
    work: Work, rank: int, lang: str, tokenizer: Tokenizer, unigram: NDArray[np.int64], folder: Path
) -> StreamInfo:
    """Write the shards of one language of a piece of work and count its tokens into `unigram`."""
    source, split = work.tasks[rank], Splitter.read(work)
    stream = StreamInfo(
        name=source.name,
        lang=lang,
        weight=source.weight,
        licence={},
        counts={name: Counts() for name in SPLITS},
        shards=[],
        epochs=source.epochs,
        content=source.content,
    )
    writers: dict[str, ShardWriter] = {}
    licences: Counter[str] = Counter()

    def close(name: str) -> None:
        writer = writers.pop(name)
        writer.close()
        stream.shards.append(
            ShardInfo(
                path=str(writer.prefix.relative_to(folder)),
                split=name,
                bytes=writer.path(".bin").stat().st_size,
                tokens=writer.tokens,
                documents=writer.documents,
                checksum=checksum(writer.path(".bin")),
                index_checksum=checksum(writer.path(".idx")),
            )
        )

    def flush(batch: list[dict[str, Any]]) -> None:
        texts = [document["text"] for document in batch]
        trained = [np.zeros(0, dtype=np.int64)]
        for document, ids in zip(batch, tokenizer.encode_batch(texts, work.config.tokenizer.threads), strict=True):
            name = split(document)
            if name not in writers:
                number = sum(shard.split == name for shard in stream.shards)
                prefix = folder / name / f"{stream.key}-{number:05d}"
                writers[name] = ShardWriter(prefix, token_dtype(tokenizer.vocab_size))
            text = document["text"]
            if document["target"] is not None:
                answer = tokenizer.encode(document["target"], inside=True)
                writers[name].add(ids, answer)
                tokens, text = np.append(ids, answer), text + document["target"]
            else:
                tokens = np.append(ids, tokenizer.eod)
                writers[name].add(tokens)
            licences[document["licence"] or "unknown"] += 1
            stream.counts[name].add(len(text), len(text.encode()), len(tokens))
            if name == "train":
                trained.append(tokens)
            if writers[name].tokens >= work.config.data.max_shard_tokens:
                close(name)
        # Once a batch: for a large vocabulary this costs as much as encoding a document.
        unigram[:] += np.bincount(np.concatenate(trained), minlength=len(unigram))

    try:
        for batch in _batches(work.kept(rank, lang)):
            flush(batch)
        for name in list(writers):
            close(name)
    finally:
        for writer in writers.values():
            writer.abort()
    stream.licence = dict(sorted(licences.items()))
    return stream
