"""Documents of a source: json lines and arrays (plain, gzip, zstd), plain text, parquet, and data sets of a hub.

Text files are read line by line here, not through `datasets`, because an error must name the file and the line; parquet
and hub data stream through `datasets`. What cannot be used comes out as a `Rejected` with its reason.
"""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import zstandard

from data_prep.config import DataConfig
from data_prep.errors import ConfigError, DataError
from data_prep.json_array import elements, is_array
from data_prep.language import language_code
from data_prep.sources import JSON, PACKED, TEXT, Source
from data_prep.templates import fields_of, render
from data_prep.zstd_stream import WholeZstd

_BINARY_HEADS = (
    b"\x7fELF",
    b"PK\x03\x04",
    b"%PDF",
    b"\x89PNG",
    b"\xff\xd8\xff",
    b"GIF8",
    b"\x1f\x8b",
    b"\x28\xb5\x2f\xfd",
)


@dataclass(frozen=True)
class Document:
    """One document as its source gave it."""

    id: str
    text: str
    lang: str | None
    licence: str | None
    file: str
    line: int
    target: str | None = None
    """The answer, where `text` is a prompt."""


@dataclass(frozen=True)
class Rejected:
    """Something in a source that is no usable document."""

    file: str
    line: int
    reason: str
    detail: str = ""
    text: str = ""
    """What was there, as far as it can be shown."""


def read_documents(source: Source, config: DataConfig) -> Iterator[Document | Rejected]:
    """Every document of a source, and every piece of it that is none.

    Raises DataError naming file and line for a file that is empty, binary or cut off, or whose every line lacks text.
    """
    if source.hub is not None:
        yield from _read_hub(source, config)
    for path in source.files:
        if path.stat().st_size == 0:
            raise DataError(f"{path}: the file is empty; remove it from data.sources")
        reader = _reader_of(path)
        found, first_refusal = 0, None
        for item in reader(path, source, config):
            if isinstance(item, Document):
                found += 1
            elif first_refusal is None:
                first_refusal = item
            yield item
        if not found:
            why = f"line {first_refusal.line}: {first_refusal.detail}" if first_refusal else "it holds no line"
            raise DataError(f"{path}: no usable document in it ({why})")


def _reader_of(path: Path) -> Any:
    inner = path.with_suffix("") if path.suffix in PACKED else path
    if inner.suffix in JSON:
        return _read_json
    if inner.suffix == ".parquet" and inner == path:
        return _read_parquet
    if inner.suffix in TEXT:
        return _read_text
    raise DataError(
        f"{path}: unknown kind of file; .jsonl, .txt, each also .gz or .zst, and .parquet are read (data.sources)"
    )


@dataclass
class _Place:
    """How far a file is read, for errors."""

    unit: str = "line"
    number: int = 0


@contextmanager
def _opened(path: Path, place: _Place) -> Iterator[Any]:
    """A file's unpacked bytes. Raises DataError where it turns out to be damaged or cannot be read."""
    try:
        with open(path, "rb") as raw:
            yield _unpacked(path, raw)
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        kind = "compressed " if path.suffix in PACKED else ""
        raise DataError(
            f"{path}: after {place.unit} {place.number}: the {kind}file is cut off or damaged ({error}); fetch it again"
        ) from error
    except OSError as error:
        why = error.strerror or error
        raise DataError(f"{path}: after {place.unit} {place.number}: cannot be read ({why})") from error


def _unpacked(path: Path, raw: IO[bytes]) -> Any:
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if path.suffix == ".zst":
        return io.BufferedReader(WholeZstd(raw), 1 << 16)
    return raw


def _lines(path: Path, config: DataConfig) -> Iterator[tuple[int, bytes | None]]:
    """(line number, bytes) of each line, None for one over the limit. Raises DataError for a damaged or binary file."""
    place = _Place()
    with _opened(path, place) as file:
        while line := file.readline(config.max_line_bytes + 1):
            place.number += 1
            if place.number == 1 and (b"\x00" in line[:4096] or line.startswith(_BINARY_HEADS)):
                raise DataError(f"{path}: line 1: this is a binary file, not text; remove it from data.sources")
            if len(line) <= config.max_line_bytes:
                yield place.number, line
                continue
            while line and not line.endswith(b"\n"):
                line = file.readline(config.max_line_bytes)
            yield place.number, None


def _elements(path: Path, config: DataConfig) -> Iterator[tuple[int, bytes | None]]:
    """As `_lines` for the elements of a JSON array."""
    place = _Place("element")
    with _opened(path, place) as file:
        for element in elements(file, config.max_line_bytes):
            place.number += 1
            yield place.number, element


def _holds_array(path: Path) -> bool:
    """Whether a `.json` file is one array rather than lines."""
    if (path.with_suffix("") if path.suffix in PACKED else path).suffix != ".json":
        return False
    with _opened(path, _Place()) as file:
        return is_array(file)


def _read_json(path: Path, source: Source, config: DataConfig) -> Iterator[Document | Rejected]:
    """Lines that hold an object each or, in a `.json` file that begins with a bracket, the elements of an array."""
    if not _holds_array(path):
        for number, line in _lines(path, config):
            if line is None or line.strip():
                yield _record(path, number, line, source, config)
        return
    for number, element in _elements(path, config):
        item = _record(path, number, element, source, config)
        if isinstance(item, Rejected):
            item = replace(item, detail=f"element {number} of the array: {item.detail}")
        yield item


def _record(path: Path, number: int, line: bytes | None, source: Source, config: DataConfig) -> Document | Rejected:
    """The document in a line or an element; None stands for one over the limit."""
    if line is None:
        return Rejected(str(path), number, "line_too_long", f"over {config.max_line_bytes} bytes")
    try:
        fields = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        return _refused(path, number, "broken_utf8", f"byte {error.start}: {error.reason}", line)
    except (ValueError, RecursionError) as error:  # a number of over 4,300 digits is a plain ValueError
        return _refused(path, number, "bad_json", str(error), line)
    if not isinstance(fields, dict):
        return _refused(path, number, "bad_json", f"a JSON {type(fields).__name__}, not an object", line)
    return _document(fields, source, config, str(path), number)


def _plain(value: object) -> str:
    """Text that can be written as UTF-8: JSON may hold half surrogates."""
    return str(value).encode("utf-8", "replace").decode()


def _refused(path: Path, number: int, reason: str, detail: str, line: bytes) -> Rejected:
    return Rejected(str(path), number, reason, detail, line.decode("utf-8", "replace"))


def _document(
    fields: dict[str, Any], source: Source, config: DataConfig, file: str, number: int
) -> Document | Rejected:
    wanted = [source.text_field] if source.template is None else [*fields_of(source.template), source.target_field]
    for name in wanted:
        if not isinstance(fields.get(name), str):
            known = ", ".join(map(str, fields)) or "none"
            record = _plain(json.dumps(fields, ensure_ascii=False, default=str))
            detail = _plain(f"no string in field '{name}'; fields are {known}")
            return Rejected(file, number, "missing_text", detail, record)
    text = fields[source.text_field] if source.template is None else render(source.template, fields)
    lang = source.lang or fields.get(config.lang_field)
    licence = source.licence or fields.get("licence") or fields.get("license")
    return Document(
        id=_plain(fields.get(config.id_field) or f"{Path(file).name}/{number}"),
        text=text,
        lang=None if not lang else language_code(str(lang)),
        licence=None if not licence else _plain(licence),
        file=file,
        line=number,
        target=None if source.template is None else fields[source.target_field],
    )


def _read_text(path: Path, source: Source, config: DataConfig) -> Iterator[Document | Rejected]:
    lines: list[str] = []
    size = 0
    for number, line in _lines(path, config):
        if line is None:
            yield Rejected(str(path), number, "line_too_long", f"over {config.max_line_bytes} bytes")
            continue
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            yield _refused(path, number, "broken_utf8", f"byte {error.start}: {error.reason}", line)
            continue
        if config.text_documents == "line":
            if text.strip():
                yield Document(f"{path.name}/{number}", text, source.lang, source.licence, str(path), number)
            continue
        lines.append(text)
        size += len(line)
        if size > config.max_line_bytes:
            raise DataError(
                f"{path}: line {number}: over data.max_line_bytes={config.max_line_bytes} in one document; "
                "set data.text_documents=line or raise the limit"
            )
    if lines:
        yield Document(path.name, "".join(lines), source.lang, source.licence, str(path), 1)


def _read_parquet(path: Path, source: Source, config: DataConfig) -> Iterator[Document | Rejected]:
    import pyarrow.parquet

    try:
        columns = pyarrow.parquet.read_schema(path).names
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: not a readable parquet file ({error}); fetch it again") from error
    wanted = [source.text_field] if source.template is None else [*fields_of(source.template), source.target_field]
    for name in wanted:
        if name not in columns:
            raise DataError(f"{path}: no column '{name}' (columns are {', '.join(columns)}); set data.text_field")
    import datasets

    rows = datasets.load_dataset("parquet", data_files=[str(path)], split="train", streaming=True)
    yield from _read_rows(rows, source, config, str(path))


def _read_hub(source: Source, config: DataConfig) -> Iterator[Document | Rejected]:
    import datasets

    try:
        rows = datasets.load_dataset(source.hub, source.hub_config, split=source.hub_split, streaming=True)
    except Exception as error:
        raise DataError(f"hub:{source.hub}: cannot be opened ({type(error).__name__}: {error})") from error
    if source.hub_shards > 1:
        if rows.num_shards < source.hub_shards:
            raise ConfigError(
                f"data.sources: hub:{source.hub} has {rows.num_shards} files, fewer than shards={source.hub_shards}"
            )
        rows = rows.shard(num_shards=source.hub_shards, index=source.hub_shard)
    yield from _read_rows(rows, source, config, f"hub:{source.hub}")


def _read_rows(rows: Any, source: Source, config: DataConfig, file: str) -> Iterator[Document | Rejected]:
    number = 0
    try:
        for fields in rows:
            number += 1
            yield _document(fields, source, config, file, number)
    except DataError:
        raise
    except Exception as error:
        # Streaming raises whatever the file system, pyarrow or the network raised below it.
        raise DataError(f"{file}: after row {number}: cannot be read ({type(error).__name__}: {error})") from error
