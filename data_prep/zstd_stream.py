"""A zstd file as a stream, of which the library itself does not say that it is cut off."""

import io
from typing import IO, Any

import zstandard

_PACKED_BYTES = 2048
"""Read at a time: zstd packs up to 30,000 times, so what comes out stays under about 64 MiB."""
_WINDOW = 2**31
"""Longest distance of a repetition that is read: `zstd --long=31`. A file takes as much memory as it asks for."""


class WholeZstd(io.RawIOBase):
    """Raw reader over zstd frames that, unlike the library's own, notices when the last frame is cut off.

    Wrap it in an `io.BufferedReader`. Reading raises EOFError where the last frame has no end.
    """

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._library = zstandard.ZstdDecompressor(max_window_size=_WINDOW)
        self._frame = self._library.decompressobj()
        self._open = False
        self._piece = b""
        self._used = 0

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a part of `buffer`; 0 at the end of the last frame."""
        if self._used == len(self._piece):
            self._piece, self._used = self._more(), 0
        size = min(len(buffer), len(self._piece) - self._used)
        buffer[:size] = memoryview(self._piece)[self._used : self._used + size]
        self._used += size
        return size

    def _more(self) -> bytes:
        """Next non-empty decompressed piece, or b"" at the end of the last frame."""
        while True:
            packed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = self._library.decompressobj()
                self._open = False
            packed = packed or self._raw.read(_PACKED_BYTES)
            if not packed:
                if self._open:
                    raise EOFError("the last frame has no end")
                return b""
            self._open = True
            if out := self._frame.decompress(packed):
                return bytes(out)
