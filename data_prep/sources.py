"""Sources and their documents: json lines (plain, gzip, zstd), plain text, parquet, and data sets of a hub.

Token shards that others wrote are sources without documents (`Source.adopted`).

Text files are read line by line here, not through `datasets`, because an error must name the file and the line; parquet
and hub data stream through `datasets`. What cannot be used comes out as a `Rejected` with its reason.
"""

import glob
import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import zstandard

from data_prep.config import DataConfig
from data_prep.errors import ConfigError, DataError
from data_prep.language import language_code
from data_prep.templates import fields_of, render
from data_prep.zstd_lines import WholeZstd

BUNDLED = Path(__file__).parent / "corpus"
_JSON = (".jsonl", ".json", ".ndjson")
_TEXT = (".txt", ".md", ".text")
_PACKED = (".gz", ".zst")
_TOKENS = (".bin", ".idx")
_ENTRY_KEYS = (
    "path",
    "hub",
    "name",
    "lang",
    "licence",
    "weight",
    "epochs",
    "cap",
    "shards",
    "text_field",
    "template",
    "target_field",
    "config",
    "split",
)
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
class Source:
    """One entry of data.sources with its files found."""

    name: str
    files: tuple[Path, ...]
    """Local files in order; empty for a hub data set."""
    hub: str | None = None
    """OWNER/NAME on the hub."""
    hub_config: str | None = None
    """Configuration (subset) of the hub data set."""
    hub_split: str = "train"
    """Split of the hub data set."""
    lang: str | None = None
    """Language of all documents, where the entry says so."""
    licence: str | None = None
    """Licence of all documents, where the entry says so."""
    weight: float | None = None
    """Share of the training samples relative to the other sources; None: in proportion to the tokens."""
    text_field: str = "text"
    """Field or column with the text."""
    template: str | None = None
    """Template that makes a prompt of each record (data_prep/templates.py): the source holds instructions."""
    target_field: str = "target"
    """Field or column with the answer to a prompt."""
    epochs: float | None = None
    """How often its rows may be drawn; None: without end."""
    cap: int | None = None
    """Most documents that are taken of it; None: all."""
    hub_shards: int = 1
    """Pieces of work that read a hub data set."""
    hub_shard: int = 0
    """Which of these pieces this is."""

    @property
    def adopted(self) -> bool:
        """Whether its files are token shards, which are used where they lie."""
        return bool(self.files) and self.files[0].suffix == ".bin"

    @property
    def content(self) -> str:
        """instructions where there is a template, else text."""
        return "text" if self.template is None else "instructions"


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


def resolve_sources(config: DataConfig) -> list[Source]:
    """The sources of a config with globs expanded. Raises ConfigError for a bad entry, DataError for a missing file."""
    if not config.sources:
        raise ConfigError(
            "data.sources is empty; give files, e.g. data.sources='[zh.jsonl.gz,en.jsonl.gz]', or data=sample"
        )
    sources = [_resolve(entry, config) for entry in config.sources]
    for content in ("text", "instructions"):
        chosen = [source for source in sources if source.content == content]
        missing = [source.name for source in chosen if source.weight is None]
        if missing and len(missing) < len(chosen):
            raise ConfigError(
                f"data.sources: {missing[0]} has no weight while others have; give all sources of {content} a weight, "
                "or none"
            )
    return sources


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


def _resolve(entry: Any, config: DataConfig) -> Source:
    fields = {"path": entry} if isinstance(entry, str) else dict(entry)
    unknown = sorted(set(fields) - set(_ENTRY_KEYS))
    if unknown:
        raise ConfigError(f"data.sources: unknown key {unknown[0]} in {fields}; known are {', '.join(_ENTRY_KEYS)}")
    path, hub = fields.get("path"), fields.get("hub")
    if isinstance(path, str) and path.startswith("hub:"):
        hub, path = path.removeprefix("hub:"), None
    if (path is None) == (hub is None):
        raise ConfigError(f"data.sources: an entry needs either path or hub, but got {fields}")
    files: tuple[Path, ...] = ()
    if path is not None:
        files = _token_files(_find(str(path)), fields)
    weight = fields.get("weight")
    if weight is not None and not (isinstance(weight, int | float) and weight >= 0):
        raise ConfigError(f"data.sources: weight={weight} must be a number ≥ 0")
    epochs, cap = fields.get("epochs"), fields.get("cap")
    if epochs is not None and not (isinstance(epochs, int | float) and epochs > 0):
        raise ConfigError(f"data.sources: epochs={epochs} must be a number > 0")
    if cap is not None and not (isinstance(cap, int) and cap > 0):
        raise ConfigError(f"data.sources: cap={cap} must be a whole number of documents > 0")
    shards = fields.get("shards", 1)
    if not (isinstance(shards, int) and shards > 0) or (shards > 1 and hub is None):
        raise ConfigError(f"data.sources: shards={shards} must be a whole number > 0, and is for hub data sets")
    template = fields.get("template")
    if template is not None:
        fields_of(str(template))
    lang = fields.get("lang")
    return Source(
        name=_safe_name(str(fields.get("name") or hub or _stem(files[0] if len(files) == 1 else Path(str(path))))),
        files=files,
        hub=hub,
        hub_config=fields.get("config"),
        hub_split=str(fields.get("split", "train")),
        lang=None if lang is None else language_code(str(lang)),
        licence=fields.get("licence"),
        weight=None if weight is None else float(weight),
        text_field=str(fields.get("text_field", config.text_field)),
        template=None if template is None else str(template),
        target_field=str(fields.get("target_field", "target")),
        epochs=None if epochs is None else float(epochs),
        cap=cap,
        hub_shards=shards,
    )


def _find(path: str) -> tuple[Path, ...]:
    if path.startswith("bundled:"):
        path = str(BUNDLED / path.removeprefix("bundled:"))
    if Path(path).is_file():
        return (Path(path),)
    if Path(path).is_dir():
        path = glob.escape(path) + "/**"
    files = tuple(Path(name) for name in sorted(glob.glob(path, recursive=True)) if Path(name).is_file())
    if not files:
        raise DataError(f"{path}: no such file (data.sources); a data set of the hub is written hub:OWNER/NAME")
    return files


def _token_files(files: tuple[Path, ...], fields: Mapping[str, Any]) -> tuple[Path, ...]:
    """The `.bin` of each `.bin`/`.idx` pair; other files as they are. Raises ConfigError for an entry that mixes them,
    or asks for what needs the text."""
    tokens = [file for file in files if file.suffix in _TOKENS]
    if not tokens:
        return files
    if len(tokens) < len(files):
        other = next(file for file in files if file.suffix not in _TOKENS)
        raise ConfigError(f"data.sources: {fields['path']} holds token shards and others ({other}); give two entries")
    for key in ("template", "cap"):
        if fields.get(key) is not None:
            raise ConfigError(f"data.sources: {key} needs text, but {fields['path']} holds tokens; leave it out")
    if not fields.get("lang"):
        raise ConfigError(f"data.sources: {fields['path']} holds tokens; say their language, such as lang: zh")
    return tuple(sorted({file.with_suffix(".bin") for file in tokens}))


def _stem(path: Path) -> str:
    """File name without its known endings: zh.jsonl.gz → zh."""
    name = path.name
    for suffix in (*_PACKED, *_JSON, *_TEXT, *_TOKENS, ".parquet"):
        name = name.removesuffix(suffix)
    return name


def _safe_name(name: str) -> str:
    """A name that is safe in a file name and, holding no dot, easy to tell from the language after it."""
    return re.sub(r"[^\w-]+", "_", name).strip("_") or "source"


def _reader_of(path: Path) -> Any:
    inner = path.with_suffix("") if path.suffix in _PACKED else path
    if inner.suffix in _JSON:
        return _read_json_lines
    if inner.suffix == ".parquet" and inner == path:
        return _read_parquet
    if inner.suffix in _TEXT:
        return _read_text
    raise DataError(
        f"{path}: unknown kind of file; .jsonl, .txt, each also .gz or .zst, and .parquet are read (data.sources)"
    )


def _lines(path: Path, config: DataConfig) -> Iterator[tuple[int, bytes | None]]:
    """(line number, bytes) of each line, None for one over the limit. Raises DataError for a damaged or binary file."""
    number = 0
    try:
        with open(path, "rb") as raw, _unpacked(path, raw) as file:
            while line := file.readline(config.max_line_bytes + 1):
                number += 1
                if number == 1 and (b"\x00" in line[:4096] or line.startswith(_BINARY_HEADS)):
                    raise DataError(f"{path}: line 1: this is a binary file, not text; remove it from data.sources")
                if len(line) <= config.max_line_bytes:
                    yield number, line
                    continue
                while line and not line.endswith(b"\n"):
                    line = file.readline(config.max_line_bytes)
                yield number, None
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise DataError(
            f"{path}: after line {number}: the compressed file is cut off or damaged ({error}); fetch it again"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: after line {number}: cannot be read ({error.strerror or error})") from error


def _unpacked(path: Path, raw: IO[bytes]) -> Any:
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if path.suffix == ".zst":
        return WholeZstd(raw)
    return raw


def _read_json_lines(path: Path, source: Source, config: DataConfig) -> Iterator[Document | Rejected]:
    for number, line in _lines(path, config):
        if line is None:
            yield Rejected(str(path), number, "line_too_long", f"over {config.max_line_bytes} bytes")
            continue
        if not line.strip():
            continue
        try:
            fields = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            yield _refused(path, number, "broken_utf8", f"byte {error.start}: {error.reason}", line)
            continue
        except (ValueError, RecursionError) as error:  # a number of over 4,300 digits is a plain ValueError
            yield _refused(path, number, "bad_json", str(error), line)
            continue
        if not isinstance(fields, dict):
            yield _refused(path, number, "bad_json", f"a JSON {type(fields).__name__}, not an object", line)
            continue
        yield _document(fields, source, config, str(path), number)


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
