"""The tokenizer: SentencePiece pieces, then GLM's special tokens with the ids that follow them.

Text is encoded without a dummy prefix, so that a fragment beside a mask gets the ids it has inside a document.
"""

import hashlib
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from data_prep.errors import DataError
from data_prep.files import write_bytes

SPECIALS = ("MASK", "gMASK", "sMASK", "eod", "sop", "eop", "ENC", "dBLOCK")
"""Special tokens in the order of their ids (facts of the icetk tokenizer): pieces + 0, + 1, …"""
MODEL_FILE = "tokenizer.model"

_MASKS = re.compile(r" ?\[(MASK|gMASK|sMASK)\]")
_FULL_STOPS = tuple("。！？；：…\n")
"""End a sentence wherever they stand."""
_SPACED_STOPS = tuple(".?!;:")
"""End a sentence only before white space, so that 3.14 and a:b stay whole."""


class Tokenizer:
    """A SentencePiece model and the special tokens after its pieces."""

    def __init__(self, model: bytes, name: str = "tokenizer") -> None:
        """model: a serialised SentencePiece model. name: what errors call it. Raises DataError."""
        self.model = model
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.name = name
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except (RuntimeError, OSError) as error:
            raise DataError(f"{name}: not a SentencePiece model ({str(error).strip()})") from error
        self.pieces: int = self._processor.vocab_size()
        """Number of SentencePiece pieces."""
        self.special_ids = {special: self.pieces + offset for offset, special in enumerate(SPECIALS)}
        """Id of each special token by its name."""

    @staticmethod
    def load(path: str | Path) -> "Tokenizer":
        """Tokenizer of a dataset folder, of its `tokenizer/` folder, or of a model file. Raises DataError."""
        path = Path(path)
        for candidate in (path / "tokenizer" / MODEL_FILE, path / MODEL_FILE, path):
            if candidate.is_file():
                try:
                    return Tokenizer(candidate.read_bytes(), str(candidate))
                except OSError as error:
                    raise DataError(f"{candidate}: cannot be read ({error.strerror})") from error
        raise DataError(f"{path}: no {MODEL_FILE} there; give a SentencePiece model file or a dataset folder")

    def save(self, folder: Path) -> None:
        """Write the model file that `load` reads back."""
        write_bytes(folder / MODEL_FILE, self.model)

    def __getstate__(self) -> dict[str, object]:
        return {"model": self.model, "name": self.name}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(state["model"], state["name"])  # type: ignore[misc]

    @property
    def vocab_size(self) -> int:
        """Pieces and special tokens."""
        return self.pieces + len(SPECIALS)

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

    def encode(self, text: str) -> list[int]:
        """Ids of a text's pieces, no special token among them."""
        return list(self._processor.encode(text))

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """Ids of many texts, encoded by `threads` threads."""
        return list(self._processor.encode(list(texts), num_threads=threads))

    def encode_with_masks(self, text: str) -> list[int]:
        """Ids of a text in which `[MASK]`, `[gMASK]` and `[sMASK]` stand for the special tokens.

        One space before a mask is dropped: pieces carry their space in front, so it belongs to what fills the blank.
        """
        ids: list[int] = []
        end = 0
        for match in _MASKS.finditer(text):
            ids += self.encode(text[end : match.start()])
            ids.append(self.special_ids[match.group(1)])
            end = match.end()
        return ids + self.encode(text[end:])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; a special token is shown in brackets. Raises ValueError for an id outside the vocabulary."""
        parts: list[str] = []
        run: list[int] = []
        for token in ids:
            token = int(token)
            if 0 <= token < self.pieces:
                run.append(token)
                continue
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token id {token} is outside the vocabulary of {self.vocab_size}")
            parts += [self._text(run, bool(parts)), f"[{SPECIALS[token - self.pieces]}]"]
            run = []
        return "".join([*parts, self._text(run, bool(parts))])

    def _text(self, ids: list[int], inside: bool) -> str:
        if not ids:
            return ""
        text = str(self._processor.decode(ids))
        # A model with a dummy prefix drops the first piece's space; inside a longer text it belongs there.
        dropped = inside and self._processor.id_to_piece(ids[0]).startswith("▁") and text[:1] != " "
        return " " + text if dropped else text

    def piece(self, token: int) -> str:
        """A token's piece as the vocabulary spells it."""
        if token < self.pieces:
            return str(self._processor.id_to_piece(token))
        return f"[{SPECIALS[token - self.pieces]}]"

    @cached_property
    def token_bytes(self) -> NDArray[np.int32]:
        """UTF-8 bytes of text that each token stands for, int32 [vocab_size]; special tokens count 0."""
        sizes = np.zeros(self.vocab_size, dtype=np.int32)
        for token in range(self.pieces):
            if self._processor.is_byte(token):
                sizes[token] = 1
            elif not self._processor.is_unknown(token) and not self._processor.is_control(token):
                sizes[token] = len(self.piece(token).replace("▁", " ").encode())
        return sizes

    @cached_property
    def sentence_marks(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
        """Three bool [vocab_size]: ends a sentence; ends one before white space; starts with white space."""
        always, spaced, white = (np.zeros(self.vocab_size, dtype=np.bool_) for _ in range(3))
        for token in range(self.pieces):
            piece = "\n" if self.piece(token) == "<0x0A>" else self.piece(token)
            always[token] = piece.endswith(_FULL_STOPS)
            spaced[token] = piece.endswith(_SPACED_STOPS)
            white[token] = piece.startswith(("▁", "\n"))
        white[self.pieces :] = True
        always[self.eod] = True
        return always, spaced, white
