"""Writing one safetensors file while training goes on.

The library's own writer copies every tensor into a Python object before it writes. Here the bytes go to the file where
they lie, block by block, and are hashed on the way: no second copy in memory, no second reading of the file, and the
interpreter is free for the training loop during each block.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from data_prep.files import write_error

_BLOCK = 8 << 20
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""The format's names of the dtypes that a checkpoint holds."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Any]:
    """Write CPU tensors to a new file and flush it to disk.

    Returns the file's entry for a manifest: `bytes` and `checksum` (as `data_prep.files.checksum`), taken from memory,
    so that what the disk made of them is found out at load. Raises DataError naming the path.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    # The data begins at a multiple of 8 bytes.
    text += b" " * (-len(text) % 8)
    digest = xxhash.xxh3_128()
    try:
        with open(path, "wb", buffering=0) as file:
            for part in (memoryview(len(text).to_bytes(8, "little") + text), *map(_bytes, tensors.values())):
                while part:
                    # A nearly full disk may take a part of a block; the next round then meets the error.
                    written = file.write(part[:_BLOCK])
                    digest.update(part[:written])
                    part = part[written:]
            os.fsync(file.fileno())
    except OSError as error:
        raise write_error(path, error) from error
    return {"bytes": 8 + len(text) + end, "checksum": digest.hexdigest()}


def _bytes(tensor: Tensor) -> memoryview:
    """The tensor's own memory."""
    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
