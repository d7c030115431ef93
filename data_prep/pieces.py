"""What cuts text into pieces and joins them again: one interface, and the SentencePiece models behind it.

A `Pieces` knows nothing of GLM's special tokens; `data_prep.tokenizer.Tokenizer` puts them beside its ids.
`data_prep.json_pieces` holds the `tokenizer.json` behind the same interface.
"""

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import numpy as np
import sentencepiece
from numpy.typing import NDArray
from sentencepiece import sentencepiece_model_pb2

from data_prep.errors import DataError

BLANKS = 80
"""Longest run of spaces that is one piece in the ICE tokenizer."""


class Pieces(Protocol):
    """A vocabulary of pieces with ids 0 … count − 1, and the rule that cuts text into them."""

    kind: str
    """sentencepiece, ice or json."""
    count: int

    def encode(self, text: str, inside: bool = False) -> list[int]:
        """Ids of a text. inside: it goes on within a document, so nothing is put in front of it."""

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[NDArray[np.int32]]:
        """Ids of many texts, each the start of a document."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""

    def spelling(self, token: int) -> str:
        """A piece as the vocabulary spells it."""

    def surface(self, token: int) -> bytes:
        """UTF-8 bytes of text that a piece stands for; empty for the unknown and for control pieces."""

    def control(self) -> list[int]:
        """Pieces that no text becomes: the file's own starts, ends and the like."""

    def unknown(self) -> int | None:
        """The piece that stands for what the vocabulary cannot spell."""

    def bytes_only(self) -> list[int]:
        """Pieces that stand for a byte of a character that has no piece."""

    def control_id(self, name: str) -> int | None:
        """Id of a control piece by its spelling."""

    def known_specials(self) -> dict[str, int]:
        """Ids of the special tokens of GLM that the file has under a name that means nothing else."""


class SentencePieces:
    """A SentencePiece model."""

    kind = "sentencepiece"

    def __init__(self, model: bytes, name: str) -> None:
        """model: serialised. name: what errors call it. Raises DataError."""
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except (RuntimeError, OSError) as error:
            raise DataError(f"{name}: not a SentencePiece model ({str(error).strip()})") from error
        self.count: int = self._processor.vocab_size()

    @staticmethod
    def of(model: bytes, name: str) -> "SentencePieces":
        """The class that a model's pieces ask for. Raises DataError."""
        plain = SentencePieces(model, name)
        return IcePieces(_completed(plain._proto), name) if plain._has("<n>") else plain

    def encode(self, text: str, inside: bool = False) -> list[int]:
        """As `Pieces.encode`."""
        return list((self._without_prefix if inside and self._prefix_is_wrong(text) else self._processor).encode(text))

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[NDArray[np.int32]]:
        """As `Pieces.encode_batch`."""
        return list(self._processor.encode_as_numpy(list(texts), num_threads=threads))

    def decode(self, ids: Sequence[int]) -> str:
        """As `Pieces.decode`."""
        return str(self._processor.decode(list(ids)))

    def spelling(self, token: int) -> str:
        """As `Pieces.spelling`."""
        return str(self._processor.id_to_piece(token))

    def surface(self, token: int) -> bytes:
        """As `Pieces.surface`."""
        if self._processor.is_byte(token):
            return bytes([int(self.spelling(token)[1:-1], 16)])
        if self._processor.is_unknown(token) or self._processor.is_control(token):
            return b""
        return self.spelling(token).replace("▁", " ").encode()

    def control(self) -> list[int]:
        """As `Pieces.control`."""
        return [token for token in range(self.count) if self._processor.is_control(token)]

    def unknown(self) -> int | None:
        """As `Pieces.unknown`."""
        token = int(self._processor.unk_id())
        return token if token >= 0 else None

    def bytes_only(self) -> list[int]:
        """As `Pieces.bytes_only`."""
        return [token for token in range(self.count) if self._processor.is_byte(token)]

    def control_id(self, name: str) -> int | None:
        """As `Pieces.control_id`."""
        token = int(self._processor.piece_to_id(name))
        return token if self._has(name) and self._processor.is_control(token) else None

    def known_specials(self) -> dict[str, int]:
        """None: a SentencePiece model of a GLM has its special tokens behind its pieces."""
        return {}

    def _has(self, piece: str) -> bool:
        return str(self._processor.id_to_piece(self._processor.piece_to_id(piece))) == piece

    def _prefix_is_wrong(self, text: str) -> bool:
        """Whether the model would put a space in front of a text where none belongs."""
        normal = self._proto.normalizer_spec
        # A model that strips leading spaces and adds one gives a text that begins with one its right ids.
        return bool(normal.add_dummy_prefix and not (normal.remove_extra_whitespaces and text.startswith(" ")))

    @cached_property
    def _proto(self) -> sentencepiece_model_pb2.ModelProto:
        proto = sentencepiece_model_pb2.ModelProto()
        proto.ParseFromString(self._model)
        return proto

    @cached_property
    def _without_prefix(self) -> sentencepiece.SentencePieceProcessor:
        proto = sentencepiece_model_pb2.ModelProto()
        proto.CopyFrom(self._proto)
        proto.normalizer_spec.add_dummy_prefix = False
        return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


class IcePieces(SentencePieces):
    """The text model of the ICE tokenizer (icetk, of GLM-130B and ChatGLM-6B): pieces of its own for white space.

    A line break is `<n>`, a tab `<|tab|>`, and 2 to 80 spaces are `<|blank_N|>`; a text that holds one of these
    spellings comes back as the white space, as it does there. icetk's own file has only `<n>`: GLM-130B's code puts the
    special tokens behind its pieces, then tab and spaces, then the bytes. ChatGLM-6B's file holds all of them.
    """

    kind = "ice"
    _SPACE = re.compile(rf"\n|\t| {{2,{BLANKS}}}")
    _SPELT = re.compile(r"<n>|<\|tab\|>|<\|blank_(\d+)\|>")

    def encode(self, text: str, inside: bool = False) -> list[int]:
        """As `Pieces.encode`."""
        return super().encode(self._spell(text), inside)

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[NDArray[np.int32]]:
        """As `Pieces.encode_batch`."""
        return super().encode_batch([self._spell(text) for text in texts], threads)

    def decode(self, ids: Sequence[int]) -> str:
        """As `Pieces.decode`."""
        return self._SPELT.sub(lambda found: _white(found.group()), super().decode(ids))

    def known_specials(self) -> dict[str, int]:
        """As `Pieces.known_specials`."""
        named = [(key, self.control_id(name)) for key, names in _ICE_SPECIALS.items() for name in names]
        return {key: token for key, token in named if token is not None}

    def surface(self, token: int) -> bytes:
        """As `Pieces.surface`."""
        spelt = self.spelling(token)
        return _white(spelt).encode() if self._SPELT.fullmatch(spelt) else super().surface(token)

    def _spell(self, text: str) -> str:
        return self._SPACE.sub(lambda found: _ICE_SPACE.get(found.group()) or f"<|blank_{len(found.group())}|>", text)


_ICE_SPACE = {"\n": "<n>", "\t": "<|tab|>"}
_ICE_SPECIALS = {
    "MASK": ["[MASK]"],
    "gMASK": ["[gMASK]"],
    "sMASK": ["[sMASK]"],
    "eod": ["<eod>", "<unused_0>"],
    "sop": ["<sop>"],
    "eop": ["<eop>"],
    "ENC": ["<ENC>"],
    "dBLOCK": ["<dBLOCK>"],
}
"""How ICE models spell the special tokens, in the order of their ids; ChatGLM-6B's has no use for eod."""


def _completed(found: sentencepiece_model_pb2.ModelProto) -> bytes:
    """An ICE model with all the pieces that the code of GLM-130B adds to icetk's file, and no special token that text
    can spell."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.CopyFrom(found)
    kinds = proto.SentencePiece
    known = {piece.piece: piece for piece in proto.pieces}
    for names in _ICE_SPECIALS.values():
        for name in names:
            if name in known:
                known[name].type = kinds.CONTROL
    if "<|tab|>" not in known:
        added = [(names[0], kinds.CONTROL) for names in _ICE_SPECIALS.values()]
        added += [(name, kinds.USER_DEFINED) for name in ("<|tab|>", *(f"<|blank_{n}|>" for n in range(2, BLANKS + 1)))]
        added += [(f"<0x{byte:02X}>", kinds.BYTE) for byte in range(256)]
        proto.trainer_spec.byte_fallback = True
        for name, kind in added:
            if name not in known:
                proto.pieces.add(piece=name, score=0.0, type=kind)
    return proto.SerializeToString()


def _white(spelt: str) -> str:
    """White space that an ICE piece stands for."""
    if spelt == "<n>":
        return "\n"
    return "\t" if spelt == "<|tab|>" else " " * int(spelt[len("<|blank_") : -len("|>")])
