"""Readers of files as the world publishes them: JSON arrays, zstd with long windows; and sources that share a name."""

import gzip
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest
import zstandard
from data_prep_helpers import document, small_config
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import json_array, zstd_stream
from data_prep.config import DataConfig
from data_prep.errors import ConfigError, DataError
from data_prep.json_array import elements, is_array
from data_prep.reading import Document, Rejected, read_documents
from data_prep.sources import Source, resolve_sources
from data_prep.zstd_stream import WholeZstd

pytestmark = pytest.mark.unit
ZH = "春天来了，花园里的花都开了，蜜蜂在花丛中飞来飞去。"
PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def read(path: Path, **data: object) -> list[Document | Rejected]:
    """What a file gives."""
    config = DataConfig(path="", **data)  # type: ignore[arg-type]
    return list(read_documents(Source("s", (path,)), config))


@pytest.mark.parametrize("packing", PACKINGS)
def test_the_elements_of_an_array_are_documents(tmp_path: Path, packing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_array, "_CHUNK", 7)
    texts = [f'{ZH} "{n}" [\\]{{}}, ' + "\\" * n for n in range(5)]
    records = [{"titleUkey": n, "text": text, "tags": [["a"], {"b": "]"}]} for n, text in enumerate(texts)]
    path = tmp_path / f"part-0.json{packing}"
    for content in (json.dumps(records), "\ufeff\n" + json.dumps(records, ensure_ascii=False, indent=2) + "\n"):
        path.write_bytes(PACKINGS[packing](content.encode()))
        found = read(path)
        assert [one.text for one in found] == texts
        assert [one.line for one in found] == [1, 2, 3, 4, 5]


def test_what_is_broken_in_an_array_is_named_by_its_element(tmp_path: Path) -> None:
    path = tmp_path / "part.json"
    good, long = json.dumps({"text": ZH}).encode(), json.dumps({"text": "x" * 3000}).encode()
    broken = [good, b"{'a': 1}", b'{"a": 1]}', b'{"text": "\xff"}', b"7", b'{"body": ""}', long, b"", b"}", good]
    path.write_bytes(b"[" + b",".join(broken) + b"]")
    found = read(path, max_line_bytes=2000)
    assert [(one.line, one.reason if isinstance(one, Rejected) else "") for one in found] == [
        (1, ""),
        *((line, "bad_json") for line in (2, 3)),
        (4, "broken_utf8"),
        (5, "bad_json"),
        (6, "missing_text"),
        (7, "line_too_long"),
        *((line, "bad_json") for line in (8, 9)),
        (10, ""),
    ]
    assert isinstance(found[4], Rejected)
    assert found[4].detail == "element 5 of the array: a JSON int, not an object"
    for content, message in (
        (b"[" + good + b"," + good, "after element 1: the file is cut off or damaged .the array has no end"),
        (b"[" + good + b"] []", "after element 1: .* behind the array's end"),
        (b"[]", "no usable document"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            read(path)


@given(st.recursive(st.text() | st.integers() | st.none(), lambda inner: st.lists(inner)), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_any_array_comes_apart_as_the_library_reads_it(value: object, chunk: int) -> None:
    packed = json.dumps(value, ensure_ascii=False).encode()
    assert is_array(io.BytesIO(b"  " + packed)) == isinstance(value, list)
    if isinstance(value, list):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(json_array, "_CHUNK", chunk)
            assert [json.loads(one or b"") for one in elements(io.BytesIO(packed), 10**6)] == value


def test_an_array_is_held_an_element_at_a_time() -> None:
    """The file is read on only when its elements so far are taken."""
    content = io.BytesIO(b"[" + b",".join([b'{"text": "' + b"x" * 1000 + b'"}'] * 2000) + b"]")
    found = elements(content, 2000)
    next(found)
    assert content.tell() <= 2 * json_array._CHUNK
    assert sum(1 for _ in found) == 1999


def test_zstd_with_the_longest_window(tmp_path: Path) -> None:
    """A frame that asks for a window of 2 GiB (RFC 8878, 3.1.1.1): one raw block."""
    line = document(ZH).encode()
    header = b"\x28\xb5\x2f\xfd" + bytes([0, (31 - 10) << 3])
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(header + (len(line) << 3 | 1).to_bytes(3, "little") + line)
    assert [one.text for one in read(path)] == [ZH]


def test_lines_of_repetitive_text_are_read_in_bounded_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So much in so few bytes would come out at once, and each line would copy what is left of it."""

    class Counted(WholeZstd):
        pieces: list[int] = []  # noqa: RUF012

        def _more(self) -> bytes:
            self.pieces.append(len(piece := super()._more()))
            return piece

    packed = zstandard.ZstdCompressor().compress(b"a line\n" * 5_000_000)
    assert len(packed) > zstd_stream._PACKED_BYTES
    reader = io.BufferedReader(Counted(io.BytesIO(packed)), 1 << 16)
    assert sum(1 for _ in iter(lambda: reader.readline(100), b"")) == 5_000_000
    assert max(Counted.pieces) < 64 << 20


@pytest.mark.parametrize("size", [1, 2000, 70_000])
def test_a_zstd_file_that_is_cut_anywhere_is_noticed(size: int) -> None:
    content = os.urandom(size)
    frame = zstandard.ZstdCompressor().compress(content)

    def unpacked(packed: bytes) -> bytes:
        raw: IO[bytes] = io.BytesIO(packed)
        return io.BufferedReader(WholeZstd(raw)).read()

    assert unpacked(frame * 3) == content * 3
    for cut in (1, len(frame) - 1):
        with pytest.raises(EOFError):
            unpacked(frame + frame[:-cut])


def test_entries_of_one_name_lose_nothing(tmp_path: Path) -> None:
    for name in ("web/a.jsonl", "web/b.jsonl", "books/a.jsonl", "books/b.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(document(ZH), encoding="utf-8")
    web, books = {"path": str(tmp_path / "web/*.jsonl")}, {"path": str(tmp_path / "books/*.jsonl")}

    def names(*entries: object) -> list[str]:
        return [source.name for source in resolve_sources(small_config(tmp_path / "out", list(entries)).data)]

    assert names(web, books) == ["source", "source"]
    assert names(web | {"name": "web", "weight": 3}, books | {"name": "books", "weight": 1}) == ["web", "books"]
    named = {"name": "all", "weight": 1}
    assert names(web | named | {"lang": "zh"}, books | named | {"lang": "en"}) == ["all", "all"]
    for first, second, key in (
        ({"weight": 3}, {"weight": 1}, "weight"),
        ({"epochs": 2}, {}, "epochs"),
        ({"cap": 2}, {"cap": 3}, "cap"),
        ({"template": "title_zh"}, {"template": "summary_zh"}, "template"),
        ({"licence": "MIT"}, {}, "licence"),
        ({"name": "all", "weight": 3}, {"name": "all", "weight": 1}, "weight"),
        ({"name": "all", "template": "title_zh"}, {"name": "all"}, "content"),
    ):
        with pytest.raises(ConfigError, match=f"differ in {key} .*give each a name") as caught:
            names(web | first, books | second)
        assert str(tmp_path / "web/*.jsonl") in str(caught.value)
        assert str(tmp_path / "books/*.jsonl") in str(caught.value)


def test_a_file_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/\xff.jsonl"
    with open(name, "wb") as file:
        file.write(document(ZH).encode())
    with pytest.raises(DataError, match="not UTF-8"):
        resolve_sources(small_config(tmp_path / "out", [str(tmp_path)]).data)
