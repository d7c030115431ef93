"""The tokenizer: pieces of a SentencePiece model, of icetk's text model or of a tokenizer.json, and GLM's special
tokens with the ids that follow them.

A tokenizer trained here puts no space in front of a text; of one that does, a fragment behind a mask still gets the ids
it has inside a document.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.config import TokenizerConfig
from data_prep.errors import ConfigError, DataError
from data_prep.files import write_bytes
from data_prep.json_pieces import JsonPieces
from data_prep.pieces import Pieces, SentencePieces

SPECIALS = ("MASK", "gMASK", "sMASK", "eod", "sop", "eop", "ENC", "dBLOCK")
"""Special tokens in the order of their ids (facts of the icetk tokenizer): pieces + 0, + 1, …"""
MODEL_FILE = "tokenizer.model"
JSON_FILE = "tokenizer.json"
SETTINGS_FILE = "tiankong.json"
"""Image tokens and special tokens, where they were given."""

_MASKS = re.compile(r" ?\[(MASK|gMASK|sMASK)\]")
_FULL_STOPS = tuple(stop.encode() for stop in "。！？；：…\n")
"""End a sentence wherever they stand."""
_SPACED_STOPS = tuple(stop.encode() for stop in ".?!;:")
"""End a sentence only before white space, so that 3.14 and a:b stay whole."""


class Tokenizer:
    """Pieces, and the special tokens behind them or, where the file has its own, among them."""

    def __init__(
        self,
        model: bytes,
        name: str = MODEL_FILE,
        *,
        image_tokens: int = 0,
        specials: Mapping[str, str] | None = None,
    ) -> None:
        """model: content of a SentencePiece model or, where `name` ends in .json, of a tokenizer.json.

        name: what errors call it. image_tokens: ids in front of the pieces that no text uses (icetk: 20000). specials:
        our special tokens that the file has under another name, {eod: "</s>"}. Raises DataError, ConfigError.
        """
        self.model, self.name = model, name
        self.image_tokens, self.specials = image_tokens, dict(specials or {})
        self._pieces: Pieces = JsonPieces(model, name) if _is_json(name) else SentencePieces.of(model, name)
        settings = self._settings
        self.sha256 = hashlib.sha256(model + (settings or b"")).hexdigest()
        self.pieces = self._pieces.count
        """Number of pieces; for a tokenizer.json all ids of the file."""
        found = {key: token + image_tokens for key, token in self._found(self.specials).items()}
        added = [key for key in SPECIALS if key not in found]
        self.vocab_size = image_tokens + self.pieces + len(added)
        """Image tokens, pieces and special tokens."""
        found |= {key: image_tokens + self.pieces + place for place, key in enumerate(added)}
        self.special_ids = {key: found[key] for key in SPECIALS}
        """Id of each special token by its name."""
        self._names = {token: key for key, token in self.special_ids.items()}

    @staticmethod
    def load(
        path: str | Path, *, image_tokens: int | None = None, specials: Mapping[str, str] | None = None
    ) -> "Tokenizer":
        """Tokenizer of a dataset folder, of its `tokenizer/` folder, or of a file, with the settings saved beside it.

        image_tokens, specials: as in the constructor, in place of the saved ones. Raises DataError, ConfigError.
        """
        path = Path(path)
        folders = (path / "tokenizer", path)
        for candidate in (*(folder / name for folder in folders for name in (MODEL_FILE, JSON_FILE)), path):
            if candidate.is_file():
                try:
                    model, saved = candidate.read_bytes(), candidate.with_name(SETTINGS_FILE)
                    settings = dict(json.loads(saved.read_bytes()) if saved.is_file() else {})
                except OSError as error:
                    raise DataError(f"{candidate}: cannot be read ({error.strerror})") from error
                except (ValueError, TypeError) as error:
                    raise DataError(f"{saved}: damaged ({error}); restore it beside {candidate.name}") from error
                return Tokenizer(
                    model,
                    str(candidate),
                    image_tokens=settings.get("image_tokens", 0) if image_tokens is None else image_tokens,
                    specials=settings.get("specials", {}) if specials is None else specials,
                )
        raise DataError(
            f"{path}: no {MODEL_FILE} or {JSON_FILE} there; give a SentencePiece model, a tokenizer.json or a dataset "
            "folder"
        )

    def save(self, folder: Path) -> None:
        """Write the files that `load` reads back."""
        write_bytes(folder / self.file_name, self.model)
        if self._settings is not None:
            write_bytes(folder / SETTINGS_FILE, self._settings)

    @property
    def file_name(self) -> str:
        """What `save` calls the model."""
        return JSON_FILE if self.kind == "json" else MODEL_FILE

    @property
    def kind(self) -> str:
        """sentencepiece, ice (icetk's text model) or json."""
        return self._pieces.kind

    @property
    def _settings(self) -> bytes | None:
        """What is saved beside the model, where the model does not say it all."""
        if not self.image_tokens and not self.specials:
            return None
        settings = {"image_tokens": self.image_tokens, "specials": self.specials}
        return (json.dumps(settings, ensure_ascii=False, sort_keys=True) + "\n").encode()

    def _found(self, specials: Mapping[str, str]) -> dict[str, int]:
        """Ids of our special tokens that the file has, by its own names and by those that are given."""
        found = self._pieces.known_specials()
        for key, spelling in specials.items():
            if key not in SPECIALS:
                raise ConfigError(f"tokenizer.specials: unknown token {key}; there are {', '.join(SPECIALS)}")
            token = self._pieces.control_id(spelling)
            if token is None:
                raise ConfigError(f"tokenizer.specials: {self.name} has no special token '{spelling}' to take as {key}")
            found[key] = token
        if len(set(found.values())) < len(found):
            raise ConfigError(f"tokenizer.specials: two special tokens are the same one of {self.name}: {found}")
        return found

    def __getstate__(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in ("model", "name", "image_tokens", "specials")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @property
    def mask(self) -> int:
        """Id of [MASK]."""
        return self.special_ids["MASK"]

    @property
    def gmask(self) -> int:
        """Id of [gMASK]."""
        return self.special_ids["gMASK"]

    @property
    def smask(self) -> int:
        """Id of [sMASK]."""
        return self.special_ids["sMASK"]

    @property
    def eod(self) -> int:
        """Id of the end of a document."""
        return self.special_ids["eod"]

    @property
    def sop(self) -> int:
        """Id of the start of a piece to generate."""
        return self.special_ids["sop"]

    @property
    def eop(self) -> int:
        """Id of the end of a generated piece."""
        return self.special_ids["eop"]

    def encode(self, text: str, inside: bool = False) -> list[int]:
        """Ids of a text's pieces, no special token among them. inside: it goes on within a document."""
        ids = self._pieces.encode(text, inside)
        return [token + self.image_tokens for token in ids] if self.image_tokens else ids

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[NDArray[np.int32]]:
        """Ids of many texts, int32 [tokens] each, encoded by `threads` threads."""
        found = self._pieces.encode_batch(texts, threads)
        return [ids + np.int32(self.image_tokens) for ids in found] if self.image_tokens else found

    def encode_with_masks(self, text: str) -> list[int]:
        """Ids of a text in which `[MASK]`, `[gMASK]` and `[sMASK]` stand for the special tokens.

        One space before a mask is dropped: pieces carry their space in front, so it belongs to what fills the blank.
        """
        ids: list[int] = []
        end = 0
        for match in _MASKS.finditer(text):
            ids += self.encode(text[end : match.start()], inside=end > 0)
            ids.append(self.special_ids[match.group(1)])
            end = match.end()
        return ids + self.encode(text[end:], inside=end > 0)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; a special token is shown in brackets. Raises ValueError for an id outside the vocabulary."""
        parts: list[str] = []
        run: list[int] = []
        for token in ids:
            token = int(token)
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token id {token} is outside the vocabulary of {self.vocab_size}")
            if token >= self.image_tokens and token not in self._names:
                run.append(token - self.image_tokens)
                continue
            parts += [self._text(run, bool(parts)), self.piece(token)]
            run = []
        return "".join([*parts, self._text(run, bool(parts))])

    def _text(self, ids: list[int], inside: bool) -> str:
        if not ids:
            return ""
        text = self._pieces.decode(ids)
        # A model that puts a space in front of a text drops the first piece's; inside a longer text it belongs there.
        dropped = inside and self._pieces.spelling(ids[0]).startswith("▁") and text[:1] != " "
        return " " + text if dropped else text

    def piece(self, token: int) -> str:
        """A token's piece as the vocabulary spells it."""
        if token in self._names:
            return f"[{self._names[token]}]"
        return f"[image {token}]" if token < self.image_tokens else self._pieces.spelling(token - self.image_tokens)

    @cached_property
    def surfaces(self) -> list[bytes]:
        """UTF-8 bytes of text that each token stands for; none for special tokens, the unknown and image tokens."""
        surfaces = [b""] * self.image_tokens + [self._pieces.surface(token) for token in range(self.pieces)]
        surfaces += [b""] * (self.vocab_size - len(surfaces))
        for token in np.flatnonzero(self.no_text).tolist():
            surfaces[token] = b""
        return surfaces

    @cached_property
    def no_text(self) -> NDArray[np.bool_]:
        """Tokens that no text becomes and no blank is filled with: special ones, control pieces, image tokens; bool
        [vocab_size]."""
        none = np.zeros(self.vocab_size, dtype=np.bool_)
        none[: self.image_tokens] = True
        none[self.image_tokens + self.pieces :] = True
        none[[*self._names]] = True
        none[[token + self.image_tokens for token in self._pieces.control()]] = True
        return none

    @cached_property
    def no_text_ranges(self) -> list[slice]:
        """`no_text` as ranges; the last one is open, so that it covers a padded vocabulary too."""
        edges = np.flatnonzero(np.diff(self.no_text, prepend=False)).tolist()
        return [slice(first, end) for first, end in zip(edges[::2], [*edges[1::2], None], strict=True)]

    @property
    def unknown(self) -> int | None:
        """Id of the piece that stands for what the vocabulary cannot spell."""
        token = self._pieces.unknown()
        return None if token is None else token + self.image_tokens

    @cached_property
    def byte_tokens(self) -> NDArray[np.bool_]:
        """Tokens that stand for a byte or another part of a character, bool [vocab_size]."""
        parts = np.zeros(self.vocab_size, dtype=np.bool_)
        parts[[token + self.image_tokens for token in self._pieces.bytes_only()]] = True
        return parts

    @cached_property
    def token_bytes(self) -> NDArray[np.int32]:
        """UTF-8 bytes of text that each token stands for, int32 [vocab_size]; special tokens count 0."""
        return np.array([len(surface) for surface in self.surfaces], dtype=np.int32)

    @cached_property
    def sentence_marks(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
        """Three bool [vocab_size]: ends a sentence; ends one before white space; starts with white space."""
        surfaces = self.surfaces
        always = np.array([surface.endswith(_FULL_STOPS) for surface in surfaces])
        spaced = np.array([surface.endswith(_SPACED_STOPS) for surface in surfaces])
        white = np.array([surface.startswith((b" ", b"\n")) for surface in surfaces]) | self.no_text
        always[self.eod] = True
        return always, spaced, white


def given_tokenizer(config: TokenizerConfig) -> Tokenizer | None:
    """The tokenizer that a config names, or None where one is to be trained. Raises DataError, ConfigError."""
    if config.path is None:
        return None
    return Tokenizer.load(config.path, image_tokens=config.image_tokens, specials=config.specials or None)


def _is_json(name: str) -> bool:
    return name.endswith(".json")
