"""Lines of a zstd file, of which the library itself does not say that it is cut off."""

from typing import IO

import zstandard


class WholeZstd:
    """Line reader over zstd frames that, unlike the library's own, notices when the last frame is cut off."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._open = False
        self._buffer = b""

    def __enter__(self) -> "WholeZstd":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def readline(self, limit: int) -> bytes:
        """The next line with its end, or its first `limit` bytes; b"" at the end. Raises EOFError if it is cut off."""
        pieces = [self._buffer]
        size = len(self._buffer)
        end = self._buffer.find(b"\n")
        while end < 0 and size < limit:
            more = self._more()
            if not more:
                break
            at = more.find(b"\n")
            end = size + at if at >= 0 else -1
            pieces.append(more)
            size += len(more)
        whole = b"".join(pieces)
        cut = min(end + 1 if end >= 0 else len(whole), limit)
        self._buffer = whole[cut:]
        return whole[:cut]

    def _more(self) -> bytes:
        """Next non-empty decompressed piece, or b"" at the end of the last frame."""
        while True:
            packed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
                self._open = False
            packed = packed or self._raw.read(1 << 16)
            if not packed:
                if self._open:
                    raise EOFError("the last frame has no end")
                return b""
            self._open = True
            if out := self._frame.decompress(packed):
                return bytes(out)
