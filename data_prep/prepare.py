"""From sources to a dataset folder: read, clean, train the tokenizer, write shards, and the manifest last.

Cleaned documents wait in `.work/` while the tokenizer is trained, so sources are read once and memory stays flat but
for one 128-bit hash a document. Two processes cannot write one folder, and an unfinished folder has no manifest.
"""

import gzip
import io
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import zstandard

from data_prep.clean import clean_text, detect_language, duplicate_key, refusal
from data_prep.config import DataConfig, PrepConfig
from data_prep.errors import ConfigError, DataError
from data_prep.files import atomic_write, checksum, fingerprint, folder_lock, write_bytes, write_error
from data_prep.manifest import FILE, SPLITS, Counts, Manifest, ShardInfo, StreamInfo
from data_prep.report import html_report
from data_prep.shards import ShardWriter, token_dtype
from data_prep.sources import Document, Rejected, Source, read_documents, resolve_sources
from data_prep.tokenizer import MODEL_FILE, Tokenizer
from data_prep.tokenizer_training import balanced, train_tokenizer

Progress = Callable[[str, int, int], None]
"""Called with the stage, the work done and the work in all."""
_ENCODE_DOCUMENTS = 256
_NOT_IN_RECIPE = ("path", "sources", "overwrite", "workers", "prefetch_batches", "sampling")


@dataclass
class _Spool:
    """Cleaned documents of one source and language on their way to the tokenizer."""

    source: Source
    lang: str
    path: Path
    licence: Counter[str] = field(default_factory=Counter)
    documents: int = 0
    pages: set[str] = field(default_factory=set)

    def read(self) -> Iterator[dict[str, str]]:
        with open(self.path, "rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as reader:
            for line in io.TextIOWrapper(reader, encoding="utf-8", newline="\n"):
                yield json.loads(line)


def prepare(config: PrepConfig, progress: Progress = lambda stage, done, total: None) -> tuple[Manifest, bool]:
    """Make the dataset folder `config.data.path`.

    Returns its manifest, and whether a complete folder made with the same settings was found and kept.
    Raises ConfigError for settings that do not fit the folder, DataError for sources that cannot be used and for a full
    disk; the folder then has no manifest, and the same command starts it again.
    """
    folder = Path(config.data.path)
    sources = resolve_sources(config.data)
    loaded = Tokenizer.load(config.tokenizer.path) if config.tokenizer.path else None
    recipe = _recipe(config, sources, loaded)
    if (folder / FILE).exists() and not config.data.overwrite:
        return _reusable(folder, recipe), True
    try:
        with folder_lock(folder):
            if (folder / FILE).exists() and not config.data.overwrite:
                # Another process finished it between the two looks.
                return _reusable(folder, recipe), True
            (folder / FILE).unlink(missing_ok=True)
            _remove_remains(folder)
            manifest = _build(folder, config, sources, loaded, recipe, progress)
    except OSError as error:
        raise write_error(error.filename or folder, error) from error
    return manifest, False


def page_of(document_id: str) -> str:
    """The page a document belongs to: the part of its id before '#', the same for a page and its translation."""
    return document_id.split("#", 1)[0]


def split_of(page: str, seed: int, shares: list[float]) -> str:
    """Split of a page: a hash of seed and page, compared with the shares."""
    place = xxhash.xxh3_64_intdigest(f"{seed}:{page}".encode()) / 2**64 * sum(shares)
    return SPLITS[0] if place < shares[0] else SPLITS[1] if place < shares[0] + shares[1] else SPLITS[2]


def _recipe(config: PrepConfig, sources: list[Source], loaded: Tokenizer | None) -> dict[str, Any]:
    """What decides the folder's content, flat, so that a difference can be named."""
    recipe = {f"data.{name}": value for name, value in asdict(config.data).items() if name not in _NOT_IN_RECIPE}
    if loaded is None:
        tokenizer = asdict(config.tokenizer)
        recipe |= {
            f"tokenizer.{name}": tokenizer[name] for name in ("vocab_size", "character_coverage", "training_bytes")
        }
    else:
        recipe["tokenizer.path"] = loaded.sha256
    for number, source in enumerate(sources):
        fields = {name: value for name, value in asdict(source).items() if name != "files"}
        fields["files"] = [[path.name, fingerprint(path)] for path in source.files]
        recipe[f"data.sources[{number}]"] = fields
    return json.loads(json.dumps(recipe))


def _reusable(folder: Path, recipe: dict[str, Any]) -> Manifest:
    manifest = Manifest.read(folder)
    # A folder made before a setting existed was made with its default.
    before = {f"data.{name}": value for name, value in asdict(DataConfig()).items() if name not in _NOT_IN_RECIPE}
    for key, value in manifest.recipe.items():
        before[key] = {**asdict(Source("", ())), **value} if key.startswith("data.sources[") else value
    for key in sorted({*recipe, *before}):
        ours, theirs = recipe.get(key), before.get(key)
        if ours != theirs:
            raise ConfigError(
                f"data.path={folder} holds data made with {key}={_short(theirs)}, now {_short(ours)}; "
                "use another folder or data.overwrite=true"
            )
    return manifest


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 160 else text[:157] + "…"


def _remove_remains(folder: Path) -> None:
    """Clear what an unfinished or replaced preparation left; anything else in the folder is not ours to delete."""
    ours = {".work", "lock", "tokenizer", "rejected", "unigram.npy", "report.html", *SPLITS}
    for entry in folder.iterdir():
        if entry.name not in ours and not entry.name.endswith(".tmp"):
            raise ConfigError(f"data.path={folder} holds {entry.name}, which is no dataset; use an empty or new folder")
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != "lock":
            entry.unlink()


def _build(
    folder: Path,
    config: PrepConfig,
    sources: list[Source],
    loaded: Tokenizer | None,
    recipe: dict[str, Any],
    progress: Progress,
) -> Manifest:
    spools, rejected = _clean(folder, config.data, sources, progress)
    if not spools:
        raise DataError(f"data.sources: no document is left after cleaning; see {folder / 'rejected'} for the reasons")
    moved = _pages_to_move(spools, config.data)

    def split(document: dict[str, str]) -> str:
        page = page_of(document["id"])
        return "valid" if page in moved else split_of(page, config.data.split_seed, config.data.split_shares)

    if loaded is None:
        progress("train the tokenizer", 0, 0)
        if config.data.split_shares[0] == 0:
            raise ConfigError("data.split_shares leaves nothing to train a tokenizer on; give tokenizer.path")
        by_language: dict[str, Iterator[str]] = {}
        for lang in sorted({spool.lang for spool in spools}):
            chosen = [spool for spool in spools if spool.lang == lang]
            by_language[lang] = (
                document["text"] for spool in chosen for document in spool.read() if split(document) == "train"
            )
        loaded = train_tokenizer(balanced(by_language, config.tokenizer.training_bytes), config.tokenizer)
        progress("train the tokenizer", 1, 1)
    write_bytes(folder / "tokenizer" / MODEL_FILE, loaded.model)

    unigram = np.zeros(loaded.vocab_size, dtype=np.int64)
    total, done, streams = sum(spool.documents for spool in spools), 0, []
    for spool in spools:
        start = done

        def advance(count: int, start: int = start) -> None:
            progress("tokenise", start + count, total)

        streams.append(_tokenise(folder, spool, split, loaded, config, unigram, advance))
        done += spool.documents
        progress("tokenise", done, total)
    with atomic_write(folder / "unigram.npy") as file:
        np.save(file, unigram)
    manifest = Manifest(
        tokenizer={"sha256": loaded.sha256, "pieces": loaded.pieces, "specials": loaded.special_ids},
        split={
            "key": "page",
            "seed": config.data.split_seed,
            "shares": list(config.data.split_shares),
            "moved_to_valid": sorted(moved),
        },
        sources=streams,
        rejected=rejected,
        recipe=recipe,
        unigram_checksum=checksum(folder / "unigram.npy"),
    )
    write_bytes(folder / "report.html", html_report(manifest).encode())
    shutil.rmtree(folder / ".work")
    manifest.write(folder)
    return manifest


def _clean(
    folder: Path, config: DataConfig, sources: list[Source], progress: Progress
) -> tuple[list[_Spool], dict[str, dict[str, int]]]:
    """Read and clean every source into `.work/`; what is refused goes to `rejected/<source>.jsonl.gz`."""
    spools: dict[str, _Spool] = {}
    writers: dict[str, Any] = {}
    counts: dict[str, Counter[str]] = {}
    taken: Counter[str] = Counter()
    seen: set[int] = set()
    sizes = {str(path): path.stat().st_size for source in sources for path in source.files}
    done, current = 0, ""
    (folder / ".work").mkdir(parents=True)
    with ExitStack() as open_files:
        kept_aside: dict[str, Any] = {}
        for source in sources:
            if source.name not in kept_aside:
                raw = open_files.enter_context(atomic_write(folder / "rejected" / f"{source.name}.jsonl.gz"))
                kept_aside[source.name] = open_files.enter_context(gzip.GzipFile(fileobj=raw, mode="wb", mtime=0))
                counts[source.name] = Counter()
            for item in read_documents(source, config):
                if item.file != current:
                    done += sizes.get(current, 0)
                    current = item.file
                    progress("read and clean", done, sum(sizes.values()))
                refused: Rejected | None
                if isinstance(item, Rejected):
                    refused, text = item, ""
                else:
                    text = clean_text(item.text)
                    if item.target is not None:
                        item = replace(item, target=clean_text(item.target))
                    refused = _refuse(item, text, config, seen)
                    if refused is None and taken[source.name] == source.cap:
                        refused = Rejected(item.file, item.line, "over_cap", f"cap={source.cap}")
                    taken[source.name] += refused is None
                if refused is not None:
                    counts[source.name][refused.reason] += 1
                    line = {
                        **asdict(refused),
                        **({"id": item.id, "text": item.text} if isinstance(item, Document) else {}),
                    }
                    kept_aside[source.name].write(
                        (json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8", "replace")
                    )
                    continue
                assert isinstance(item, Document)
                _spool(folder, source, item, text, spools, writers, open_files)
        progress("read and clean", sum(sizes.values()), sum(sizes.values()))
    ordered = [spools[key] for key in sorted(spools)]
    return ordered, {name: dict(sorted(counter.items())) for name, counter in counts.items()}


def _refuse(item: Document, text: str, config: DataConfig, seen: set[int]) -> Rejected | None:
    least = config.min_characters if item.target is None else 1
    reason = "empty_target" if item.target == "" else refusal(item.text, text, least, config.max_characters)
    if reason is None and config.deduplicate:
        key = duplicate_key(text if item.target is None else f"{text}\0{item.target}")
        if key in seen:
            reason = "duplicate"
        seen.add(key)
    return None if reason is None else Rejected(item.file, item.line, reason, f"{len(text)} characters")


def _spool(
    folder: Path,
    source: Source,
    item: Document,
    text: str,
    spools: dict[str, _Spool],
    writers: dict[str, Any],
    open_files: ExitStack,
) -> None:
    lang = item.lang or detect_language(text)
    key = f"{source.name}.{lang}"
    if key not in spools:
        spools[key] = _Spool(source, lang, folder / ".work" / f"{key}.jsonl.zst")
        raw = open_files.enter_context(spools[key].path.open("wb"))
        writers[key] = open_files.enter_context(zstandard.ZstdCompressor(level=1).stream_writer(raw))
    spool = spools[key]
    spool.documents += 1
    spool.licence[item.licence or "unknown"] += 1
    spool.pages.add(page_of(item.id))
    record = {"id": item.id, "text": text} | ({} if item.target is None else {"target": item.target})
    writers[key].write((json.dumps(record) + "\n").encode())


def _pages_to_move(spools: list[_Spool], config: DataConfig) -> set[str]:
    """Pages moved from train to valid so that each stream of a small corpus has one to validate on."""
    shares, seed = config.split_shares, config.split_seed
    moved: set[str] = set()
    if not (shares[0] and shares[1]):
        return moved
    for spool in spools:
        by_split = {name: [page for page in spool.pages if split_of(page, seed, shares) == name] for name in SPLITS}
        if not by_split["valid"] and not moved & spool.pages and len(by_split["train"]) > 1:
            moved.add(max(by_split["train"], key=lambda page: (xxhash.xxh3_64_intdigest(page.encode()), page)))
    return moved


def _tokenise(
    folder: Path,
    spool: _Spool,
    split: Callable[[dict[str, str]], str],
    tokenizer: Tokenizer,
    config: PrepConfig,
    unigram: np.ndarray[Any, np.dtype[np.int64]],
    progress: Callable[[int], None],
) -> StreamInfo:
    """Write the shards of one stream and count its tokens."""
    stream = StreamInfo(
        name=spool.source.name,
        lang=spool.lang,
        weight=spool.source.weight,
        epochs=spool.source.epochs,
        content=spool.source.content,
        licence=dict(sorted(spool.licence.items())),
        counts={name: Counts() for name in SPLITS},
        shards=[],
    )
    writers: dict[str, ShardWriter] = {}

    def close(name: str) -> None:
        writer = writers.pop(name)
        writer.close()
        stream.shards.append(
            ShardInfo(
                path=str(writer.prefix.relative_to(folder)),
                split=name,
                bytes=writer.path(".bin").stat().st_size,
                tokens=writer.tokens,
                documents=writer.documents,
                checksum=checksum(writer.path(".bin")),
                index_checksum=checksum(writer.path(".idx")),
            )
        )

    def flush(batch: list[dict[str, str]]) -> None:
        texts = [document["text"] for document in batch]
        for document, ids in zip(batch, tokenizer.encode_batch(texts, config.tokenizer.threads), strict=True):
            name = split(document)
            if name not in writers:
                number = sum(shard.split == name for shard in stream.shards)
                writers[name] = ShardWriter(
                    folder / name / f"{stream.key}-{number:05d}", token_dtype(tokenizer.vocab_size)
                )
            if "target" in document:
                answer = tokenizer.encode(document["target"])
                writers[name].add(ids, answer)
                tokens, text = np.asarray([*ids, *answer]), document["text"] + document["target"]
            else:
                tokens, text = np.asarray([*ids, tokenizer.eod]), document["text"]
                writers[name].add(tokens)
            stream.counts[name].add(len(text), len(text.encode()), len(tokens))
            if name == "train":
                unigram[:] += np.bincount(tokens, minlength=len(unigram))
            if writers[name].tokens >= config.data.max_shard_tokens:
                close(name)

    batch: list[dict[str, str]] = []
    try:
        for number, document in enumerate(spool.read()):
            batch.append(document)
            if len(batch) == _ENCODE_DOCUMENTS:
                flush(batch)
                batch = []
                progress(number + 1)
        flush(batch)
        for name in list(writers):
            close(name)
    finally:
        for writer in writers.values():
            writer.abort()
    stream.shards.sort(key=lambda shard: shard.path)
    return stream
