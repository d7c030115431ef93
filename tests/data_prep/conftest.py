"""A small real dataset, prepared once a session from a part of the embedded corpus."""

import gzip
from pathlib import Path

import pytest
from data_prep_helpers import small_config

from data_prep.dataset import Dataset
from data_prep.prepare import prepare
from data_prep.sources import BUNDLED

DOCUMENTS = 60


@pytest.fixture(scope="session")
def source_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The first documents of each language as jsonl files."""
    folder = tmp_path_factory.mktemp("sources")
    files = []
    for lang in ("zh", "en"):
        with gzip.open(BUNDLED / f"{lang}.jsonl.gz", "rt", encoding="utf-8") as packed:
            lines = [next(packed) for _ in range(DOCUMENTS)]
        files.append(folder / f"{lang}.jsonl")
        files[-1].write_text("".join(lines), encoding="utf-8")
    return files


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, source_files: list[Path]) -> Path:
    """A complete dataset folder."""
    path = tmp_path_factory.mktemp("dataset") / "small"
    prepare(small_config(path, [str(file) for file in source_files], split_shares=[80, 15, 5]))
    return path


@pytest.fixture(scope="session")
def dataset(folder: Path) -> Dataset:
    """The opened small dataset."""
    return Dataset.open(folder, verify=True)
