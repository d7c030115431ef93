"""What a piece of work holds in memory does not grow with its documents: they go to the disk a batch at a time."""

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from datatrove.data import Document

from data_prep.config import CleaningConfig, DataConfig, PrepConfig
from data_prep.signatures import Signer, compact
from data_prep.sources import Source
from data_prep.steps import clean, tokenise
from data_prep.steps.clean import WriteClean
from data_prep.steps.keys import GrowingArray, Keys
from data_prep.steps.work import DOCUMENT, Work, load

pytestmark = pytest.mark.unit
ZH = "春天来了，花园里的花都开了，蜜蜂在花丛中飞来飞去。"


@pytest.mark.parametrize("rows", [0, 3, 100_000])
def test_a_growing_array_is_the_file_that_numpy_writes(tmp_path: Path, rows: int) -> None:
    content = np.arange(rows * 2, dtype="<u4").reshape(rows, 2)
    array = GrowingArray(tmp_path / "grown.npy", "<u4", (2,))
    for start in range(0, rows, 30_000):
        array.add(content[start : start + 30_000])
    array.close()
    np.save(tmp_path / "saved.npy", content)
    assert (tmp_path / "grown.npy").read_bytes() == (tmp_path / "saved.npy").read_bytes()


def test_keys_added_in_batches_are_those_of_all_documents(tmp_path: Path) -> None:
    texts = [ZH[n % 7 :] * (n % 5) + str(n) for n in range(90)]
    documents = np.zeros(90, dtype=DOCUMENT)
    documents["high"] = np.random.default_rng(0).integers(0, 50, 90)
    signer = Signer(bands=3, rows=2)
    with Keys(tmp_path, signer) as keys:
        for some in (slice(0, 40), slice(40, 40), slice(40, 41), slice(41, 90)):
            keys.add(documents[some].copy(), texts[some], [True] * len(texts[some]))
        assert len(keys) == 90
    minima, signed = signer.sign(texts, [True] * 90)
    assert 0 < signed.sum() < 90
    assert (load(tmp_path / "documents.npy")["signed"] == signed).all()
    assert (load(tmp_path / "signatures.npy") == compact(minima)).all()
    hashes = {f"band-{band:03d}": values for band, values in enumerate(signer.band_hashes(minima))}
    hashes["exact"] = documents["high"]
    for name, values in hashes.items():
        numbers = np.arange(90) if name == "exact" else np.flatnonzero(signed)
        expected = sorted((int(values[number]), int(number)) for number in numbers)
        assert load(tmp_path / f"{name}.npy").tolist() == expected


def test_cleaned_documents_are_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four times the documents: what grows is one table while it is sorted, 32 bytes each, not their rows and bands."""
    monkeypatch.setattr(clean, "BATCH_CHARACTERS", 20_000)
    data = DataConfig(path="", cleaning=CleaningConfig(near_duplicates=True, bands=20))
    config = PrepConfig(data=data)

    def documents(count: int) -> Iterator[Document]:
        for number in range(count):
            place = {"file": "a", "line": number, "lang": "zh", "licence": None, "target": None, "raw": ""}
            yield Document(text=f"{ZH}{number}", id=str(number), metadata=place)

    def peak(count: int) -> int:
        work = Work(tmp_path / str(count), config, (Source("a", (Path("a"),)),), {})
        tracemalloc.start()
        list(WriteClean(work).run(documents(count)))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(work.documents(0)) == count
        return most

    peak(100)  # what is made once, such as tables
    assert peak(4_000) - peak(1_000) < 3_000 * 100


def test_documents_are_encoded_in_bounded_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenise, "_ENCODE_CHARACTERS", 100)
    monkeypatch.setattr(tokenise, "_ENCODE_DOCUMENTS", 5)
    sizes = [40, 60, 1, 500, 99, 1, 1, *[2] * 12]
    found = list(tokenise._batches({"text": "x" * size} for size in sizes))
    assert [len(one["text"]) for batch in found for one in batch] == sizes
    assert [len(batch) for batch in found] == [2, 1, 1, 2, 5, 5, 3]
    assert not list(tokenise._batches([]))
