"""Elements of a JSON array that is too large to be parsed whole: the files in which WuDao, for one, is published.

An element is cut out by its brackets and strings alone and parsed by the caller, so that a broken one is refused like a
broken line, and those behind it are read.
"""

import re
from collections.abc import Iterator
from typing import IO

_CHUNK = 1 << 16
_OUTSIDE = re.compile(rb'["{}\[\],]')
_INSIDE = re.compile(rb'["\\]')
_BLANK = b" \t\r\n"
_MARK = b"\xef\xbb\xbf"
"""Byte order mark."""


def is_array(file: IO[bytes]) -> bool:
    """Whether the first byte that is not blank opens an array."""
    head = file.read(_CHUNK).removeprefix(_MARK).lstrip(_BLANK)
    while not head and (piece := file.read(_CHUNK)):
        head = piece.lstrip(_BLANK)
    return head.startswith(b"[")


def elements(file: IO[bytes], limit: int) -> Iterator[bytes | None]:
    """The bytes of each element of the array that a file holds, None for one of over `limit` bytes.

    Raises EOFError where the array has no end, or something stands behind its end.
    """
    parts: list[bytes] = []
    size = depth = 0
    in_string = escaped = ended = False

    def take(piece: bytes) -> None:
        nonlocal size
        size += len(piece)
        if size <= limit:
            parts.append(piece)
        else:
            parts.clear()

    while chunk := file.read(_CHUNK):
        start = place = 0
        while not ended:
            # A backslash takes the byte behind it with it, in the next chunk if need be.
            place, escaped = place + escaped, False
            found = (_INSIDE if in_string else _OUTSIDE).search(chunk, place)
            if found is None:
                break
            byte, place = found.group(), found.end()
            if byte == b"\\":
                if place == len(chunk):
                    escaped = True
                    break
                place += 1
            elif byte == b'"':
                in_string = not in_string
            elif byte in b"[{":
                depth += 1
                start = place if depth == 1 else start
            elif depth == 1 and byte in b",]":
                take(chunk[start : place - 1])
                start, ended = place, byte == b"]"
                element = b"".join(parts)
                if size > limit:
                    yield None
                elif not ended or element.strip(_BLANK):
                    yield element.strip(_BLANK)
                parts, size = [], 0
            elif byte in b"]}":
                # A bracket too many is its element's fault; the array goes on.
                depth = max(1, depth - 1)
        if ended and chunk[start:].strip(_BLANK):
            raise EOFError("something stands behind the array's end")
        take(chunk[start:] if depth else b"")
    if not ended:
        raise EOFError("the array has no end")
