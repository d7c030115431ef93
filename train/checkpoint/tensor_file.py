"""Writing safetensors files: while training goes on, and of models too large for memory.

The library's own writer takes a whole dictionary and copies every tensor into a Python object before it writes. Here
tensors come one at a time and their bytes go to the file where they lie, block by block, hashed on the way: no second
copy in memory, no second reading of the file, and the interpreter is free for a training loop during each block.
"""

import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from data_prep.files import write_error
from train.progress import alive

_BLOCK = 8 << 20
_FLUSHED = 256 << 20
"""Bytes after which a file is flushed: the disk's pace shows in the progress, and the last flush is a short one."""
SAFETENSORS_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
}
"""Names of the dtypes that this project stores."""


@dataclass(frozen=True)
class Spec:
    """What is known of a tensor before its bytes."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return self.numel * self.dtype.itemsize

    def checked(self, tensor: Tensor) -> Tensor:
        """The tensor, contiguous; an assertion that it is what was announced."""
        assert tuple(tensor.shape) == self.shape, (self, tensor.shape)
        assert tensor.dtype == self.dtype, (self, tensor.dtype)
        return tensor.contiguous()


class SafetensorsWriter:
    """Writes a safetensors file: `add` each tensor in the order of the specs, then `close`."""

    def __init__(self, path: Path, specs: Sequence[Spec], metadata: Mapping[str, str]) -> None:
        """Raises DataError, here and later, where the disk is full."""
        self.path = path
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        offset = 0
        for spec in specs:
            place = [offset, offset + spec.bytes]
            header[spec.key] = {"dtype": SAFETENSORS_NAMES[spec.dtype], "shape": spec.shape, "data_offsets": place}
            offset += spec.bytes
        self._left = list(reversed(specs))
        self._digest = xxhash.xxh3_128()
        self._bytes = self._flushed = 0
        try:
            # Unbuffered: what is written went to the system, and a full disk is met here.
            self._file = path.open("wb", buffering=0)
        except OSError as error:
            raise write_error(path, error) from error
        text = json.dumps(header, separators=(",", ":")).encode()
        # The data begins at a multiple of 8 bytes.
        text += b" " * (-len(text) % 8)
        self._write(memoryview(struct.pack("<Q", len(text)) + text))

    def add(self, tensor: Tensor) -> None:
        """Append the next tensor, which lies on the CPU."""
        spec = self._left.pop()
        self._write(memoryview(spec.checked(tensor.detach()).reshape(-1).view(torch.uint8).numpy()))

    def _write(self, content: memoryview) -> None:
        try:
            while content:
                # A nearly full disk may take a part of a block; the next round then meets the error.
                written = self._file.write(content[:_BLOCK])
                self._digest.update(content[:written])
                self._bytes += written
                content = content[written:]
                if self._bytes - self._flushed >= _FLUSHED:
                    os.fsync(self._file.fileno())
                    self._flushed = self._bytes
                alive()
        except OSError as error:
            self._file.close()
            raise write_error(self.path, error) from error

    def close(self) -> dict[str, Any]:
        """Flush to the disk.

        Returns the file's entry for a manifest: `bytes` and `checksum` (as `data_prep.files.checksum`), taken from
        memory, so that what the disk made of them is found out at load.
        """
        assert not self._left, self._left
        try:
            with self._file:
                os.fsync(self._file.fileno())
        except OSError as error:
            raise write_error(self.path, error) from error
        return {"bytes": self._bytes, "checksum": self._digest.hexdigest()}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Any]:
    """Write CPU tensors to a new file; returns what `SafetensorsWriter.close` does.

    Raises DataError naming the path.
    """
    specs = [Spec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    writer = SafetensorsWriter(path, specs, metadata)
    for tensor in tensors.values():
        writer.add(tensor)
    return writer.close()
