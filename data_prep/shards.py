"""Token shards in the indexed format of Megatron-style trainers: `NAME.bin` holds tokens, `NAME.idx` tells them apart.

Layout of the index, little-endian: magic `MMIDIDX\\0\\0`, version 1 (uint64), token type (uint8), sequences (uint64),
documents + 1 (uint64), tokens of each sequence (int32), byte offset of each sequence (int64), first sequence of each
document (int64). A document of text is one sequence and ends with eod; one of instructions is two, prompt and answer.
"""

import os
import struct
from array import array
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import DataError
from data_prep.files import atomic_write, sync_folder, write_error

MAGIC = b"MMIDIDX\x00\x00"
DTYPES: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
"""Token types by their code in the index."""


def token_dtype(vocab_size: int) -> type[np.generic]:
    """Smallest type that other readers of this format expect: uint16 where ids fit, else int32."""
    return np.uint16 if vocab_size < 65_500 else np.int32


class ShardWriter:
    """Writes one shard, document by document; nothing appears under its name before `close`."""

    def __init__(self, prefix: str | Path, dtype: type[np.generic]) -> None:
        """prefix: path without `.bin`."""
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype)
        self.sizes = array("i")
        self.documents = 0
        self.tokens = 0
        self._marks = array("q", [0])
        self._temporary = self.prefix.with_name(f".{self.prefix.name}.bin.{os.getpid()}.tmp")
        try:
            self.prefix.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._temporary, "wb")  # noqa: SIM115 - closed by close or abort
        except OSError as error:
            raise write_error(self._temporary, error) from error

    def add(self, *sequences: Sequence[int] | NDArray[Any]) -> None:
        """Append one document of one or more sequences. Raises DataError where the disk is full."""
        for tokens in sequences:
            ids = np.asarray(tokens, dtype=self.dtype)
            try:
                self._file.write(ids.tobytes())
            except OSError as error:
                raise write_error(self.path(".bin"), error) from error
            self.sizes.append(len(ids))
            self.tokens += len(ids)
        self.documents += 1
        self._marks.append(len(self.sizes))

    def path(self, suffix: str) -> Path:
        """Path of the `.bin` or the `.idx`."""
        return self.prefix.with_name(self.prefix.name + suffix)

    def close(self) -> None:
        """Write the index and put both files in place."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._temporary, self.path(".bin"))
            sync_folder(self.prefix.parent)
        except OSError as error:
            raise write_error(self.path(".bin"), error) from error
        sizes = np.asarray(self.sizes, dtype=np.int32)
        starts = np.zeros(len(sizes), dtype=np.int64)
        np.cumsum(sizes[:-1], out=starts[1:], dtype=np.int64)
        code = next(code for code, dtype in DTYPES.items() if np.dtype(dtype) == self.dtype)
        with atomic_write(self.path(".idx")) as file:
            file.write(MAGIC + struct.pack("<QBQQ", 1, code, len(sizes), len(self._marks)))
            file.write(sizes.tobytes())
            file.write((starts * self.dtype.itemsize).tobytes())
            file.write(np.asarray(self._marks, dtype=np.int64).tobytes())

    def abort(self) -> None:
        """Give up and leave nothing behind."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)


class Shard:
    """Reads one shard through a memory map. The map opens on first use, so a shard survives pickling and fork."""

    def __init__(self, prefix: str | Path) -> None:
        """Raises DataError when the index or the size of the token file is wrong."""
        self.prefix = str(prefix)
        index = self.prefix + ".idx"
        try:
            with open(index, "rb") as file:
                header = file.read(len(MAGIC) + struct.calcsize("<QBQQ"))
            index_bytes = os.path.getsize(index)
            bin_bytes = os.path.getsize(self.prefix + ".bin")
        except OSError as error:
            raise DataError(f"{error.filename or index}: cannot be read ({error.strerror})") from error
        if len(header) < len(MAGIC) + struct.calcsize("<QBQQ") or not header.startswith(MAGIC):
            raise DataError(f"{index}: not an index of a .bin/.idx shard (its first bytes are {header[:9]!r})")
        version, code, self.sequences, document_marks = struct.unpack("<QBQQ", header[len(MAGIC) :])
        if version != 1 or code not in DTYPES:
            raise DataError(
                f"{index}: version {version} with token type {code} is not read here, only version 1 with types "
                f"{', '.join(map(str, DTYPES))}"
            )
        self.documents = document_marks - 1
        self._marks = document_marks
        self._first_document = self._first_sequence = self._first_token = 0
        self.dtype = np.dtype(DTYPES[code])
        self._offset = len(header)
        self._all_sequences = self.sequences
        expected = self._offset + self.sequences * 12 + document_marks * 8
        if index_bytes != expected:
            raise DataError(f"{index}: {index_bytes} bytes instead of {expected}: truncated or damaged; write it anew")
        self.tokens = bin_bytes // self.dtype.itemsize
        self._map: NDArray[Any] | None = None
        end = 0
        if self.sequences:
            sizes, pointers = self.sizes(), self.pointers()
            end = int(pointers[-1]) + int(sizes[-1]) * self.dtype.itemsize
        if bin_bytes != end:
            raise DataError(
                f"{self.prefix}.bin: {bin_bytes} bytes, but its index says {end}: truncated or damaged; write it anew"
            )

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_map": None}

    def sizes(self) -> NDArray[np.int32]:
        """Tokens of each sequence, int32 [sequences]."""
        sizes = np.memmap(self.prefix + ".idx", np.int32, "r", self._offset, (self._all_sequences,))
        return sizes[self._first_sequence : self._first_sequence + self.sequences]

    def pointers(self) -> NDArray[np.int64]:
        """Byte offset of each sequence in the `.bin`, int64 [sequences]."""
        offset = self._offset + 4 * self._all_sequences
        pointers = np.memmap(self.prefix + ".idx", np.int64, "r", offset, (self._all_sequences,))
        return pointers[self._first_sequence : self._first_sequence + self.sequences]

    def document_marks(self) -> NDArray[np.int64]:
        """First sequence of each document of the whole file, and the number of sequences; int64 [documents + 1]."""
        offset = self._offset + 12 * self._all_sequences
        return np.memmap(self.prefix + ".idx", np.int64, "r", offset, (self._marks,))

    def document_starts(self) -> NDArray[np.int64]:
        """First token of each document, and the number of tokens; int64 [documents + 1]."""
        marks = np.asarray(self.document_marks())
        if not (marks[0] == 0 and marks[-1] == self._all_sequences and (np.diff(marks) >= 0).all()):
            raise DataError(f"{self.prefix}.idx: its list of documents is damaged; write it anew")
        sizes = np.asarray(self.sizes(), dtype=np.int64)
        own = marks[self._first_document : self._first_document + self.documents + 1]
        return np.concatenate([[0], sizes.cumsum()])[own - self._first_sequence]

    def part(self, first: int, documents: int) -> "Shard":
        """`documents` documents from number `first` on, as a shard of its own over the same files."""
        marks = self.document_marks()
        begin, end = int(marks[first]), int(marks[first + documents])
        edges = [
            int(self.pointers()[mark]) // self.dtype.itemsize if mark < self.sequences else self.tokens
            for mark in (begin, end)
        ]
        part = copy(self)
        part.documents, part.sequences, part.tokens = documents, end - begin, edges[1] - edges[0]
        part._first_document, part._first_sequence, part._first_token, part._map = first, begin, edges[0], None
        return part

    def read(self, start: int, length: int) -> NDArray[np.int64]:
        """Tokens `start` … `start + length`, int64 [length], across document ends."""
        if self._map is None:
            # A plain view: slicing numpy's memmap class costs several microseconds a read.
            self._map = self._opened()
        start += self._first_token
        return self._map[start : start + length].astype(np.int64)

    def tokens_at(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens at single places of the whole file, int64 as `places`."""
        return self._opened()[places].astype(np.int64) if len(places) else np.zeros(0, dtype=np.int64)

    def _opened(self) -> NDArray[Any]:
        if not os.path.getsize(self.prefix + ".bin"):
            return np.zeros(0, dtype=self.dtype)
        return np.memmap(self.prefix + ".bin", self.dtype, "r").view(np.ndarray)

    def document(self, number: int) -> NDArray[np.int64]:
        """All tokens of a sequence: a document of text with its eod, or a prompt, or an answer."""
        start = int(self.pointers()[number]) // self.dtype.itemsize - self._first_token
        return self.read(start, int(self.sizes()[number]))
