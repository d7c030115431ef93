"""Foreign `.bin`/`.idx` files taken into a dataset where they lie: checked and counted, never copied.

Megatron-LM, GPT-NeoX and their like leave such files. They hold token ids without the text or its pages, so nothing is
cleaned, and the split is by the documents' order in the file, as these trainers split them.
"""

import logging
from itertools import pairwise

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_prep.errors import DataError
from data_prep.files import checksum
from data_prep.manifest import SPLITS, Counts, ShardInfo, StreamInfo
from data_prep.shards import Shard
from data_prep.sources import Source
from data_prep.tokenizer import Tokenizer

_TOKENS_AT_ONCE = 1 << 22
_log = logging.getLogger(__name__)


def adopt(source: Source, shares: list[float], tokenizer: Tokenizer, unigram: NDArray[np.int64]) -> StreamInfo:
    """The stream of a source's files; its train tokens are counted into `unigram`.

    shares: of train, valid and test. Raises DataError for a file that is damaged, or was made by another tokenizer.
    """
    assert source.lang is not None
    stream = StreamInfo(
        name=source.name,
        lang=source.lang,
        weight=source.weight,
        licence={},
        counts={split: Counts() for split in SPLITS},
        shards=[],
        epochs=source.epochs,
    )
    # A character begins with a byte that is not of the form 10xxxxxx.
    letters = np.array([sum(byte & 0xC0 != 0x80 for byte in surface) for surface in tokenizer.surfaces])
    for path in source.files:
        whole, digest, parts = Shard(path.with_suffix("")), xxhash.xxh3_128(), list[ShardInfo]()
        _check(whole, tokenizer)
        for split, (first, end) in split_documents(whole.documents, shares).items():
            part = whole.part(first, end - first)
            counts = _count(part, tokenizer, digest)
            if split == "train":
                unigram += counts
            if end > first:
                stream.counts[split] = stream.counts[split].plus(
                    Counts(
                        documents=part.documents,
                        characters=int(counts @ letters),
                        bytes=int(counts @ tokenizer.token_bytes),
                        tokens=part.tokens,
                    )
                )
                info = ShardInfo(str(path.with_suffix("").absolute()), split, path.stat().st_size, part.tokens)
                info.documents, info.first_document = part.documents, first
                parts.append(info)
        for info in parts:
            info.checksum, info.index_checksum = digest.hexdigest(), checksum(path.with_suffix(".idx"))
        stream.shards += parts
    stream.licence = {source.licence or "unknown": sum(counts.documents for counts in stream.counts.values())}
    return stream


def split_documents(documents: int, shares: list[float]) -> dict[str, tuple[int, int]]:
    """First document of each split, and one past its last: train in front, valid and test behind.

    A file of two documents or more has one to validate on, where the shares give any.
    """
    edges = [round(documents * sum(shares[:number]) / sum(shares)) for number in range(len(shares) + 1)]
    if documents > 1 and shares[0] and shares[1] and edges[1] == edges[2]:
        edges[1] -= 1
    return dict(zip(SPLITS, pairwise(edges), strict=True))


def _check(shard: Shard, tokenizer: Tokenizer) -> None:
    """Raise DataError where the index does not fit the file; warn where documents do not end in eod."""
    starts = shard.document_starts()
    if (np.diff(starts) < 0).any() or starts[0] != 0 or starts[-1] != shard.tokens:
        raise DataError(f"{shard.prefix}.idx: its documents do not follow one another; write the file anew")
    sizes = np.asarray(shard.sizes(), dtype=np.int64)
    if (np.asarray(shard.pointers()) != (sizes.cumsum() - sizes) * shard.dtype.itemsize).any():
        raise DataError(f"{shard.prefix}.idx: its sequences do not lie end to end in the .bin; write the file anew")
    ends = shard.tokens_at(starts[1:][np.diff(starts) > 0] - 1)
    marked = int((ends == tokenizer.eod).sum())
    if marked < len(ends):
        _log.warning(
            "%s.bin: %d of %d documents do not end in %s (%d): blanks may cross them, and only packing isolates them",
            *(shard.prefix, len(ends) - marked, len(ends), tokenizer.piece(tokenizer.eod), tokenizer.eod),
        )


def _count(shard: Shard, tokenizer: Tokenizer, digest: "xxhash.xxh3_128") -> NDArray[np.int64]:
    """How often each token comes, int64 [vocab_size]; the bytes go into `digest`. Raises DataError for a foreign id."""
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for start in range(0, shard.tokens, _TOKENS_AT_ONCE):
        tokens = shard.read(start, min(_TOKENS_AT_ONCE, shard.tokens - start))
        digest.update(tokens.astype(shard.dtype).tobytes())
        if tokens.min() < 0 or tokens.max() >= tokenizer.vocab_size:
            wrong = int(tokens[(tokens < 0) | (tokens >= tokenizer.vocab_size)][0])
            raise DataError(
                f"{shard.prefix}.bin: token id {wrong} is outside the vocabulary of {tokenizer.vocab_size}; give the "
                "tokenizer that made the file as tokenizer.path"
            )
        counts += np.bincount(tokens, minlength=len(counts))
    return counts
