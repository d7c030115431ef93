"""An opened dataset folder: its manifest, tokenizer and token streams, checked before anything is read from them."""

import os
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_prep.errors import DataError
from data_prep.files import checksum
from data_prep.instructions import InstructionStream
from data_prep.manifest import Manifest, StreamInfo
from data_prep.packing import PackedStream, PackPlan
from data_prep.shards import Shard
from data_prep.tokenizer import Tokenizer


class Stream:
    """Tokens of one source in one language and one split, cut into rows that never cross a shard's end."""

    def __init__(self, info: StreamInfo, shards: list[Shard], row_length: int) -> None:
        """row_length: tokens a row, sequence_length − 1."""
        self.info = info
        self.shards = shards
        self.row_length = row_length
        self._last_rows = np.cumsum([shard.tokens // row_length for shard in shards], dtype=np.int64)
        self.rows = int(self._last_rows[-1]) if shards else 0
        """Whole rows in the stream."""
        self.unused_tokens = sum(shard.tokens % row_length for shard in shards)
        """Tokens at the shards' ends that fill no row."""
        self.hash = xxhash.xxh3_64_intdigest(info.key.encode())
        """Number made of the stream's name, so that its order does not depend on which other sources there are."""

    @property
    def key(self) -> str:
        """`<source>.<lang>`."""
        return self.info.key

    def read_row(self, row: int) -> NDArray[np.int64]:
        """Tokens of a row, int64 [row_length]."""
        number = int(np.searchsorted(self._last_rows, row, side="right")) if len(self.shards) > 1 else 0
        first = int(self._last_rows[number - 1]) if number else 0
        return self.shards[number].read((row - first) * self.row_length, self.row_length)


AnyStream = Stream | PackedStream | InstructionStream
"""What samples are drawn from."""


class Dataset:
    """A complete dataset folder. Opens its memory maps on first use, so it survives pickling and fork."""

    def __init__(
        self, folder: Path, manifest: Manifest, tokenizer: Tokenizer, shards: dict[tuple[str, str], Shard]
    ) -> None:
        """Use `Dataset.open`. shards: by path and split."""
        self.folder = folder
        self.manifest = manifest
        self.tokenizer = tokenizer
        self._shards = shards

    @staticmethod
    def open(folder: str | Path, verify: bool = False) -> "Dataset":
        """Open a folder and check it: tokenizer against manifest, sizes of all shards, with `verify` their checksums.

        Raises DataError that names the file.
        """
        folder = Path(folder)
        manifest = Manifest.read(folder)
        tokenizer = Tokenizer.load(folder / "tokenizer")
        if tokenizer.sha256 != manifest.tokenizer["sha256"]:
            raise DataError(
                f"{folder / 'tokenizer'}: sha256 {tokenizer.sha256[:16]}… is not that of the tokenizer that made the "
                f"shards, {manifest.tokenizer['sha256'][:16]}…; put that one back or prepare the data again"
            )
        shards = {}
        for stream in manifest.sources:
            for info in stream.shards:
                shard = Shard(folder / info.path)
                if info.first_document is not None and os.path.getsize(f"{shard.prefix}.bin") == info.bytes:
                    shard = shard.part(info.first_document, info.documents)
                if (shard.tokens, shard.documents) != (info.tokens, info.documents):
                    raise DataError(
                        f"{folder / info.path}.bin: {shard.tokens} tokens in {shard.documents} documents, but the "
                        f"manifest says {info.tokens} in {info.documents}; restore the file or prepare the data again"
                    )
                shards[info.path, info.split] = shard
        dataset = Dataset(folder, manifest, tokenizer, shards)
        if verify:
            for problem in dataset.damages():
                raise DataError(problem)
        return dataset

    @property
    def checksums(self) -> dict[Path, str]:
        """The files of tokens and counts with what the manifest says of them."""
        found = {self.folder / "unigram.npy": self.manifest.unigram_checksum}
        for stream in self.manifest.sources:
            for info in stream.shards:
                found[self.folder / f"{info.path}.bin"] = info.checksum
                found[self.folder / f"{info.path}.idx"] = info.index_checksum
        return found

    def damages(self, progress: Callable[[Path], None] = lambda path: None) -> Iterator[str]:
        """Read every file; one message for each whose checksum is not the manifest's. progress: told of each one."""
        for path, expected in self.checksums.items():
            progress(path)
            if (problem := _damage(path, expected)) is not None:
                yield problem

    @cached_property
    def digest(self) -> str:
        """Checksum of the manifest: two datasets with the same one hold the same tokens."""
        return checksum(self.folder / "manifest.json")

    def text_shards(self, split: str) -> list[tuple[StreamInfo, list[Shard]]]:
        """Each stream of text with its shards of a split, in the manifest's order."""
        return [(info, self._shards_of(info, split)) for info in self.manifest.sources if info.content == "text"]

    def streams(self, split: str, sequence_length: int, packs: PackPlan | None = None) -> list[AnyStream]:
        """Streams of a split in the manifest's order, text before instructions; also those too small for a row.

        packs: the plan by which documents of text are packed whole; None: text is cut into rows.
        """
        text: list[AnyStream] = []
        for info, shards in self.text_shards(split):
            if packs is None:
                text.append(Stream(info, shards, sequence_length - 1))
            else:
                text.append(PackedStream(info, shards, packs, split))
        return text + [
            InstructionStream(info, self._shards_of(info, split), sequence_length)
            for info in self.manifest.sources
            if info.content == "instructions"
        ]

    def _shards_of(self, info: StreamInfo, split: str) -> list[Shard]:
        return [self._shards[shard.path, shard.split] for shard in info.shards if shard.split == split]

    @cached_property
    def unigram_counts(self) -> NDArray[np.int64]:
        """How often each token occurs in the train split, int64 [vocab_size]."""
        path = self.folder / "unigram.npy"
        try:
            counts = np.load(path)
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read ({error}); prepare the data again") from error
        if counts.shape != (self.tokenizer.vocab_size,):
            raise DataError(f"{path}: {counts.shape} counts for {self.tokenizer.vocab_size} tokens; prepare again")
        return np.asarray(counts, dtype=np.int64)

    @cached_property
    def unigram_nats(self) -> NDArray[np.float64]:
        """−ln of each token's train frequency with one added to every count, float64 [vocab_size]."""
        counts = self.unigram_counts + 1
        return -np.log(counts / counts.sum())

    def unigram_loss(self, targets: NDArray[np.int64]) -> NDArray[np.float64]:
        """Nats that the unigram model pays for each target, in the shape of `targets`.

        Special tokens that never stand in a document (eop) cost it a count of one; `Sampler.unigram_loss` is the fair
        baseline for samples that hold them.
        """
        return self.unigram_nats[targets]

    def bytes_per_token(self, split: str = "train") -> dict[str, float]:
        """UTF-8 bytes of text a token, by language and for `all`."""
        result: dict[str, float] = {}
        for lang in [*sorted({stream.lang for stream in self.manifest.sources}), "all"]:
            counts = [s.counts[split] for s in self.manifest.sources if lang in ("all", s.lang)]
            tokens = sum(count.tokens for count in counts)
            if tokens:
                result[lang] = sum(count.bytes for count in counts) / tokens
        return result


def _damage(path: Path, expected: str) -> str | None:
    try:
        found = checksum(path)
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    if found == expected:
        return None
    return f"{path}: checksum {found} is not {expected} of the manifest; restore the file or prepare the data again"
