"""What the stage clean leaves of each document beside its text: where it came from, its key, and its signature.

All of it goes to the disk a batch at a time, so that a piece of work may hold any number of documents; one table of
hashes at a time is sorted in memory.
"""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.signatures import Signer, compact
from data_prep.steps.work import DOCUMENT

_PAIR = np.dtype([("hash", "<u8"), ("number", "<u4")])


class GrowingArray:
    """An `.npy` file to which rows are added; numpy leaves room in its header for their number."""

    def __init__(self, path: Path, dtype: Any, row: tuple[int, ...] = ()) -> None:
        """row: shape of one row."""
        self.rows = 0
        self._dtype, self._row = np.dtype(dtype), row
        self._file = open(path, "wb")  # noqa: SIM115 - closed by close
        self._header()
        self._start = self._file.tell()

    def add(self, values: Any) -> None:
        """Append rows."""
        array = np.ascontiguousarray(values, dtype=self._dtype)
        self.rows += len(array)
        self._file.write(array.tobytes())

    def close(self) -> None:
        """Say in the header how many rows there are."""
        with self._file:
            self._file.seek(0)
            self._header()
            assert self._file.tell() == self._start

    def _header(self) -> None:
        description = np.lib.format.dtype_to_descr(self._dtype)
        shape = (self.rows, *self._row)
        np.lib.format.write_array_header_1_0(self._file, {"descr": description, "fortran_order": False, "shape": shape})


class Keys:
    """Writes `documents.npy`, and for each document's key (`exact.npy`) and bands the hashes in rising order, each with
    its document's number: a range of hashes is then one slice. `signatures.npy` has a row a document."""

    def __init__(self, folder: Path, signer: Signer | None) -> None:
        """signer: None where near-duplicates are not looked for."""
        self._signer = signer
        bands = range(signer.bands if signer else 0)
        self._tables = [folder / "exact.npy", *(folder / f"band-{band:03d}.npy" for band in bands)]
        self._documents = GrowingArray(folder / "documents.npy", DOCUMENT)
        self._hashes = [GrowingArray(path, _PAIR) for path in self._tables]
        self._signatures = GrowingArray(folder / "signatures.npy", np.uint8, (signer.bins,)) if signer else None

    def __enter__(self) -> "Keys":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for array in (self._documents, *self._hashes, *filter(None, [self._signatures])):
            array.close()
        for path in self._tables if error is None else []:
            pairs = np.load(path)
            np.save(path, pairs[np.argsort(pairs["hash"], kind="stable")])

    def __len__(self) -> int:
        """Documents so far."""
        return self._documents.rows

    def add(self, documents: NDArray[Any], texts: Sequence[str], chinese: Sequence[bool]) -> None:
        """documents: `DOCUMENT` records, whose `signed` is set here. texts: their texts. chinese: as `Signer.sign`."""
        if not len(documents):
            return
        numbers = len(self) + np.arange(len(documents))
        if self._signer is not None and self._signatures is not None:
            minima, signed = self._signer.sign(texts, chinese)
            documents["signed"] = signed
            self._signatures.add(compact(minima))
            for table, hashes in zip(self._hashes[1:], self._signer.band_hashes(minima), strict=True):
                table.add(_pairs(hashes[signed], numbers[signed]))
        self._hashes[0].add(_pairs(documents["high"], numbers))
        self._documents.add(documents)


def _pairs(hashes: NDArray[np.uint64], numbers: NDArray[np.int64]) -> NDArray[Any]:
    pairs = np.empty(len(hashes), dtype=_PAIR)
    pairs["hash"], pairs["number"] = hashes, numbers
    return pairs
