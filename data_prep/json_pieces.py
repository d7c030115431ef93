"""A `tokenizer.json` of Hugging Face's `tokenizers` behind the interface of `data_prep.pieces`.

Its special tokens are never matched in text, so that no document can hold a mask by writing its name.
"""

import json
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from data_prep.errors import DataError

_SPELLINGS = {
    "MASK": ("[MASK]",),
    "gMASK": ("[gMASK]",),
    "sMASK": ("[sMASK]",),
    "eod": ("<|endoftext|>", "<|eod|>"),
    "sop": ("<sop>", "<|sop|>", "<|startofpiece|>"),
    "eop": ("<eop>", "<|eop|>", "<|endofpiece|>"),
    "ENC": ("<|ENC|>",),
    "dBLOCK": ("<|dBLOCK|>",),
}
"""How tokenizers of GLM models spell our special tokens; taken only where the file marks them as special."""


class JsonPieces:
    """The tokenizer of a `tokenizer.json`, without its templates, truncation and padding."""

    kind = "json"

    def __init__(self, model: bytes, name: str) -> None:
        """model: the file's content. name: what errors call it. Raises DataError."""
        try:
            self._stored: dict[str, Any] = json.loads(model)
            self._tokenizer = _made(self._stored)
            vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
            self.count: int = max(vocabulary.values()) + 1
            added = self._stored.get("added_tokens") or []
            # The library gives an added token whose spelling is a piece that piece's id, whatever the file says.
            self._added = {token["content"]: vocabulary[token["content"]] for token in added}
            self._special = {token["content"]: self._added[token["content"]] for token in added if token["special"]}
        except Exception as error:  # tokenizers raises bare Exception, and the file may hold anything
            why = " ".join(str(error).split())[:200]
            raise DataError(f"{name}: not a tokenizer.json of Hugging Face's tokenizers ({why})") from error
        self._byte_level = any(part.get("type") == "ByteLevel" for part in _parts(self._stored))

    def encode(self, text: str, inside: bool = False) -> list[int]:
        """As `Pieces.encode`."""
        return list((self._without_prefix if inside else self._tokenizer).encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str], threads: int) -> list[NDArray[np.int32]]:
        """As `Pieces.encode_batch`. With one thread the library's own are switched off, else it takes every core."""
        os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
        found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, dtype=np.int32) for one in found]

    def decode(self, ids: Sequence[int]) -> str:
        """As `Pieces.decode`."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def spelling(self, token: int) -> str:
        """As `Pieces.spelling`."""
        return str(self._tokenizer.id_to_token(token) or "")

    def surface(self, token: int) -> bytes:
        """As `Pieces.surface`."""
        spelt = self.spelling(token)
        if self._added.get(spelt) == token:
            return b"" if spelt in self._special else spelt.encode()
        if token == self.unknown():
            return b""
        if self._byte_level:
            return bytes(_BYTES[character] for character in spelt) if set(spelt) <= _BYTES.keys() else spelt.encode()
        if token in self._fallback:
            return bytes([int(spelt[1:-1], 16)])
        return spelt.removeprefix(self._continuing).replace("▁", " ").encode()

    def control(self) -> list[int]:
        """As `Pieces.control`, and ids that have no piece."""
        holes = set(range(self.count)) - set(self._tokenizer.get_vocab(with_added_tokens=True).values())
        return sorted({*self._special.values(), *holes})

    def unknown(self) -> int | None:
        """As `Pieces.unknown`."""
        model = self._stored["model"]
        name = model.get("unk_token")
        found = self._tokenizer.token_to_id(name) if isinstance(name, str) else model.get("unk_id")
        return None if found is None else int(found)

    def bytes_only(self) -> list[int]:
        """As `Pieces.bytes_only`; in a byte-level vocabulary the pieces that are no whole characters."""
        if self._byte_level:
            return [token for token in range(self.count) if not _is_text(self.surface(token))]
        return sorted(self._fallback)

    def control_id(self, name: str) -> int | None:
        """As `Pieces.control_id`."""
        return self._special.get(name)

    def known_specials(self) -> dict[str, int]:
        """As `Pieces.known_specials`."""
        return {
            special: next(self._special[name] for name in names if name in self._special)
            for special, names in _SPELLINGS.items()
            if any(name in self._special for name in names)
        }

    @cached_property
    def _fallback(self) -> set[int]:
        if not self._stored["model"].get("byte_fallback"):
            return set()
        ids = (self._tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        return {token for token in ids if token is not None}

    @property
    def _continuing(self) -> str:
        """What WordPiece writes in front of a piece that goes on within a word."""
        return str(self._stored["model"].get("continuing_subword_prefix") or "")

    @cached_property
    def _without_prefix(self) -> tokenizers.Tokenizer:
        """The same tokenizer without the space that some put in front of every text."""
        stored = json.loads(json.dumps(self._stored))
        changed = False
        for part in _parts({"pre_tokenizer": stored.get("pre_tokenizer"), "normalizer": stored.get("normalizer")}):
            if part.get("type") == "Metaspace" and part.get("prepend_scheme", "always") != "never":
                part["prepend_scheme"], changed = "never", True
                part.pop("add_prefix_space", None)
            elif part.get("type") == "ByteLevel" and part.get("add_prefix_space"):
                part["add_prefix_space"], changed = False, True
            elif part.get("type") == "Prepend":
                part["prepend"], changed = "", True
        return _made(stored) if changed else self._tokenizer


def _made(stored: dict[str, Any]) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(stored))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _parts(stored: Any) -> Iterator[dict[str, Any]]:
    """The normalizers, pre-tokenizers and decoders of a file, nested ones among them."""
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        waiting = [stored.get(name)]
        while waiting:
            part = waiting.pop()
            if isinstance(part, dict):
                yield part
                waiting += [one for value in part.values() if isinstance(value, list) for one in value]


def _is_text(surface: bytes) -> bool:
    try:
        surface.decode()
    except UnicodeDecodeError:
        return False
    return True


def _byte_alphabet() -> dict[str, int]:
    """The byte of each character of GPT-2's byte-level spelling: printable ones stand for themselves, the others for
    the characters from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_alphabet()
