"""Stage clean: read a piece of work, clean and judge each document, and leave keys and signatures beside the text.

A document that is kept aside travels on with its reason: one writer at the end writes both kinds, in the order of the
files, so that nothing can be lost between two steps.
"""

import gzip
import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from data_prep.clean import clean_text, duplicate_key, normalize_width, refusal, simplifier
from data_prep.decontaminate import read_evaluation_files
from data_prep.errors import DataError
from data_prep.files import write_error, write_json
from data_prep.language import detect_language
from data_prep.personal import mask_personal
from data_prep.quality import figures, limits_of, outside
from data_prep.reading import Rejected, read_documents
from data_prep.signatures import Signer
from data_prep.steps.keys import Keys
from data_prep.steps.work import DOCUMENT, Work
from data_prep.tally import Tally

BATCH_CHARACTERS = 200_000
"""Text that is hashed at once: more than that leaves the cache and takes longer."""
Documents = Iterable[Document]


def clean_steps(work: Work) -> list[PipelineStep]:
    """The steps of this stage that the config asks for."""
    cleaning = work.config.data.cleaning
    steps: list[PipelineStep] = [ReadTask(work), Normalize(work), Language(work)]
    if cleaning.quality:
        steps.append(Quality(work))
    if cleaning.mask_personal:
        steps.append(MaskPersonal(work))
    if cleaning.decontaminate:
        steps.append(Decontaminate(work))
    return [*steps, WriteClean(work)]


class Step(PipelineStep):
    """A step that looks at the documents not yet kept aside; `data_prep` names it in datatrove's statistics."""

    type = "data_prep"

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.work = work
        self.name = type(self).__name__

    def run(self, data: Documents, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Look at each document; it travels on in any case."""
        for document in data:
            if "reason" not in document.metadata:
                with self.track_time():
                    self.look_at(document)
                self.stat_update(document.metadata.get("reason", "kept"))
            yield document

    def look_at(self, document: Document) -> None:
        """Change the document, or keep it aside by `refuse`."""
        raise AssertionError(f"{self.name} looks at batches")


def refuse(document: Document, reason: str, detail: str) -> None:
    """Keep a document aside."""
    document.metadata |= {"reason": reason, "detail": detail}


class ReadTask(Step):
    """The documents of this rank's files; what is none comes with its reason."""

    def run(self, data: Documents, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """See `data_prep.reading.read_documents`, whose errors stop the rank."""
        source = self.work.tasks[rank]
        for item in () if source.adopted else read_documents(source, self.work.config.data):
            self.stat_update("read")
            if isinstance(item, Rejected):
                place = {"file": item.file, "line": item.line, "reason": item.reason, "detail": item.detail}
                yield Document(text=item.text, id="", metadata=place)
            else:
                fields = {name: getattr(item, name) for name in ("file", "line", "lang", "licence", "target")}
                yield Document(text=item.text, id=item.id, metadata=fields | {"raw": item.text})


class Normalize(Step):
    """Normal form of the text, and the checks that are always made."""

    def look_at(self, document: Document) -> None:
        """Clean the text, and the answer where there is one."""
        config, fields = self.work.config.data, document.metadata
        document.text = self._clean(document.text)
        least = config.min_characters
        if fields["target"] is not None:
            least, fields["target"] = 1, self._clean(fields["target"])
        reason = refusal(fields["raw"], document.text, least, config.max_characters)
        if reason is None and fields["target"] == "":
            reason = "empty_target"
        if reason is not None:
            refuse(document, reason, f"{len(document.text)} characters")

    def _clean(self, text: str) -> str:
        text = clean_text(text)
        return normalize_width(text) if self.work.config.data.cleaning.normalize_width else text


class Language(Step):
    """The language, where the source does not say it; Traditional to Simplified; languages that are not wanted."""

    def run(self, data: Documents, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """As `Step.run`."""
        self._convert = simplifier() if self.work.config.data.cleaning.simplify else None
        yield from super().run(data, rank, world_size)

    def look_at(self, document: Document) -> None:
        """Set `lang`."""
        fields, wanted = document.metadata, self.work.config.data.cleaning.languages
        fields["lang"] = fields["lang"] or detect_language(document.text)
        if self._convert is not None and fields["lang"] in ("zh", "zh_hant"):
            document.text, fields["lang"] = self._convert(document.text), "zh"
            fields["target"] = fields["target"] and self._convert(fields["target"])
        if wanted and fields["lang"] not in wanted:
            refuse(document, "other_language", fields["lang"])


class Quality(Step):
    """Documents of text outside their language's limits."""

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self.limits = limits_of(work.config.data.cleaning.limits)

    def look_at(self, document: Document) -> None:
        """Set `figures`."""
        fields = document.metadata
        if fields["target"] is None:
            fields["figures"] = figures(document.text, fields["lang"])
            found = outside(fields["figures"], self.limits.get(fields["lang"], self.limits["other"]))
            if found is not None:
                refuse(document, *found)


class MaskPersonal(Step):
    """Placeholders for personal data."""

    def look_at(self, document: Document) -> None:
        """Set `masked`: how many of each kind."""
        fields = document.metadata
        document.text, fields["masked"] = mask_personal(document.text)
        if fields["target"] is not None:
            fields["target"], more = mask_personal(fields["target"])
            fields["masked"] |= {kind: count + fields["masked"].get(kind, 0) for kind, count in more.items()}


class Decontaminate(Step):
    """Documents that share a long run of text with an evaluation set."""

    def run(self, data: Documents, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """In batches."""
        known = read_evaluation_files(self.work.config.data.cleaning)
        for batch in batches(data):
            open_ones = [document for document in batch if "reason" not in document.metadata]
            with self.track_time("batch"):
                texts = [document.text + "\n" + (document.metadata["target"] or "") for document in open_ones]
                places = known.found_in(texts, [is_chinese(document) for document in open_ones])
            for document, place in zip(open_ones, places, strict=True):
                if place is not None:
                    refuse(document, "contaminated", place)
            yield from batch


class WriteClean(Step):
    """Cleaned text by language, what was kept aside, the documents' keys, and their signatures sorted by band."""

    def run(self, data: Documents, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Ends the pipeline: yields nothing."""
        cleaning = self.work.config.data.cleaning
        near = cleaning.near_duplicates and self.work.tasks[rank].content == "text"
        signer = Signer(cleaning.bands, cleaning.rows) if near else None
        try:
            with self.work.output("clean", rank) as folder, Keys(folder, signer) as keys, ExitStack() as open_files:
                self._write(data, rank, folder, open_files, keys)
        except OSError as error:
            raise write_error(error.filename or self.work.folder, error) from error
        yield from ()

    def _write(self, data: Documents, rank: int, folder: Path, open_files: ExitStack, keys: Keys) -> None:
        source = self.work.tasks[rank]
        files = {str(path): number for number, path in enumerate(source.files)}
        aside = open_files.enter_context(gzip.GzipFile(folder / "rejected.jsonl.gz", "wb", mtime=0))
        writers: dict[str, Any] = {}
        streams: dict[str, int] = {}
        tally = Tally()
        for batch in batches(data):
            kept = []
            for document in batch:
                tally.count(document.text, document.metadata)
                if "reason" in document.metadata:
                    aside.write(rejected_line(document.metadata, document.id, document.text))
                else:
                    kept.append(document)
            records = np.zeros(len(kept), dtype=DOCUMENT)
            for number, document in enumerate(kept):
                fields = document.metadata
                lang = fields["lang"]
                if lang not in writers:
                    streams[lang] = len(streams)
                    raw = open_files.enter_context((folder / f"{lang}.jsonl.zst").open("wb"))
                    writers[lang] = open_files.enter_context(zstandard.ZstdCompressor(level=1).stream_writer(raw))
                record = {"number": len(keys) + number, "id": document.id, "text": document.text}
                record |= {name: fields[name] for name in ("file", "line", "licence", "target")}
                writers[lang].write((json.dumps(record) + "\n").encode())
                key = duplicate_key(document.text + ("" if fields["target"] is None else "\0" + fields["target"]))
                place = fields["line"], files.get(fields["file"], 0)
                records[number] = (key >> 64, key & (1 << 64) - 1, *place, streams[lang], False)
            with self.track_time("batch"):
                keys.add(records, [one.text for one in kept], [is_chinese(one) for one in kept])
        if source.adopted:
            # A language without a document: the stages after this one find the stream, and nothing to do in it.
            streams[str(source.lang)] = 0
        if not files and not len(keys):
            raise DataError(f"hub:{source.hub}: no usable document in it")
        write_json(folder / "languages.json", list(streams))
        write_json(folder / "tally.json", tally.to_json())


def batches(data: Documents) -> Iterator[list[Document]]:
    """Documents in groups of about `BATCH_CHARACTERS`."""
    batch: list[Document] = []
    size = 0
    for document in data:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def is_chinese(document: Document) -> bool:
    """Whether a document's text is cut into characters rather than words."""
    return str(document.metadata["lang"]).startswith("zh")


def rejected_line(fields: dict[str, Any], name: str, text: str) -> bytes:
    """A line of rejected/*.jsonl.gz: what was there as its source gave it, where, and why it is not used."""
    line = {key: fields[key] for key in ("file", "line", "reason", "detail")}
    line |= {"lang": fields.get("lang"), "id": name, "text": fields.get("raw", text)}
    return (json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8", "replace")
