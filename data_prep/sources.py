"""The sources of a config: their entries checked, their files found, their names made.

`data_prep.reading` reads their documents. Token shards that others wrote are sources without documents
(`Source.adopted`).
"""

import glob
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.config import DataConfig
from data_prep.errors import ConfigError, DataError
from data_prep.language import language_code
from data_prep.templates import fields_of

BUNDLED = Path(__file__).parent / "corpus"
JSON = (".jsonl", ".json", ".ndjson")
TEXT = (".txt", ".md", ".text")
PACKED = (".gz", ".zst")
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
_OF_A_SOURCE = ("weight", "epochs", "cap", "content")
"""Properties of a source as a whole."""
_OF_DOCUMENTS = ("template", "target_field", "text_field", "lang", "licence", "hub", "hub_config", "hub_split")
"""Properties of the documents of one entry."""


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
    _refuse_shared_names(sources, config.sources)
    return sources


def _refuse_shared_names(sources: Sequence[Source], entries: Sequence[Any]) -> None:
    """Raise ConfigError where entries of one name, which become one source, differ in what a source has only once.

    Where each of them is given the name, they may still differ in what belongs to their documents, such as `lang`.
    """
    first: dict[str, int] = {}
    for number, source in enumerate(sources):
        other = first.setdefault(source.name, number)
        named = all(isinstance(entries[place], Mapping) and entries[place].get("name") for place in (other, number))
        for key in _OF_A_SOURCE if named else (*_OF_A_SOURCE, *_OF_DOCUMENTS):
            ours, theirs = getattr(source, key), getattr(sources[other], key)
            if ours != theirs:
                raise ConfigError(
                    f"data.sources: {_shown(entries[other])} and {_shown(entries[number])} would be one source named "
                    f"'{source.name}', but differ in {key} ({theirs} and {ours}); give each a name, such as name: web"
                )


def _shown(entry: Any) -> str:
    return entry if isinstance(entry, str) else str(entry.get("path") or f"hub:{entry.get('hub')}")


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
    pattern = glob.escape(path) + "/**" if Path(path).is_dir() else path
    found = [path] if Path(path).is_file() else sorted(glob.glob(pattern, recursive=True))
    files = tuple(Path(name) for name in found if Path(name).is_file())
    if not files:
        raise DataError(f"{path}: no such file (data.sources); a data set of the hub is written hub:OWNER/NAME")
    for file in files:
        if (shown := str(file).encode("utf-8", "replace").decode()) != str(file):
            raise DataError(f"{shown}: the file's name is not UTF-8; rename it (data.sources)")
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
    for suffix in (*PACKED, *JSON, *TEXT, *_TOKENS, ".parquet"):
        name = name.removesuffix(suffix)
    return name


def _safe_name(name: str) -> str:
    """A name that is safe in a file name and, holding no dot, easy to tell from the language after it."""
    return re.sub(r"[^\w-]+", "_", name).strip("_") or "source"
