"""Files of named tensors, one tensor at a time: safetensors are read, the zip files of `torch.save` read and written.

Nothing here holds more than one tensor. Reading a torch file unpickles its index only, by torch's weights-only rules: a
pickle that would run code is refused, and no tensor is loaded with it. The bytes then come from the zip archive, whose
checksums are compared.
"""

import io
import os
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_prep.errors import DataError
from data_prep.files import write_error
from train.checkpoint.tensor_file import SAFETENSORS_NAMES, Spec

_DTYPES = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}
_STORAGES = {
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int8: torch.CharStorage,
}
_CHUNK = 1 << 24
_NOT_WHOLE = (OSError, zipfile.BadZipFile, RuntimeError, EOFError, struct.error, ValueError)
"""What reading a file that is cut short or damaged ends with."""


class TensorFile(Protocol):
    """An opened file: its path, what it holds, and one tensor at a time."""

    path: Path
    specs: dict[str, Spec]

    def read(self, key: str) -> Tensor:
        """One tensor, on the CPU, in the stored dtype. Raises DataError naming the file."""


class SafetensorsFile:
    """A safetensors file."""

    def __init__(self, path: Path) -> None:
        """Raises DataError where the file is no whole safetensors file or holds a dtype that is not stored here."""
        self.path = path
        self.specs: dict[str, Spec] = {}
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (not a dict)
                    view = file.get_slice(key)
                    self.specs[key] = Spec(key, tuple(view.get_shape()), _dtype(path, key, view.get_dtype()))
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path}: not a whole safetensors file ({error}); fetch or write it again") from error

    def read(self, key: str) -> Tensor:
        # Opened anew each time: closing it gives the mapped pages back.
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(key)


class TorchFile:
    """A file of `torch.save`: a dictionary of tensors, or {"module": such a dictionary}."""

    def __init__(self, path: Path) -> None:
        """Raises DataError where the file is cut short, holds code or anything but contiguous tensors."""
        self.path = path
        try:
            self._archive = zipfile.ZipFile(path)
            self._entries = {_data_start(self._archive, info): info for info in self._archive.infolist()}
        except _NOT_WHOLE as error:
            raise _not_whole(path, error) from error
        state = load_safely(path, "meta")
        state = state.get("module", state) if isinstance(state, dict) else state
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise DataError(f"{path}: holds no dictionary of tensors")
        self._tensors: dict[str, Tensor] = state
        self.specs = {key: Spec(key, tuple(value.shape), value.dtype) for key, value in state.items()}

    def read(self, key: str) -> Tensor:
        meta = self._tensors[key]
        storage = meta.untyped_storage()
        info = self._entries.get(storage._checkpoint_offset or -1)
        if info is None or info.file_size != storage.nbytes():
            raise DataError(f"{self.path}: the bytes of {key} are not where its index says; fetch the file again")
        data = torch.empty(info.file_size, dtype=torch.uint8)
        view, filled = memoryview(data.numpy()), 0
        try:
            with self._archive.open(info) as file:
                # To the end of the record: only then zipfile compares its checksum.
                while chunk := file.read(_CHUNK):
                    view[filled : filled + len(chunk)] = chunk
                    filled += len(chunk)
        except (OSError, zipfile.BadZipFile, ValueError) as error:
            raise DataError(f"{self.path}: the bytes of {key} are damaged ({_reason(error)})") from error
        if filled != len(view):
            raise DataError(f"{self.path}: the bytes of {key} are cut short")
        return torch.as_strided(data.view(meta.dtype), meta.shape, meta.stride(), meta.storage_offset())


def load_safely(path: Path, device: str) -> Any:
    """What a file of `torch.save` holds, on `device` (`meta` reads no tensor's bytes), by the weights-only rules.

    Raises DataError where it is cut short, damaged, or holds code.
    """
    try:
        zipfile.ZipFile(path).close()  # else torch would take the file for one of its old, bare pickles
        return torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path}: holds code or objects beside tensors and was not opened ({_forbidden(error)}); weights are a "
            "plain dictionary of tensors"
        ) from error
    except _NOT_WHOLE as error:
        raise _not_whole(path, error) from error


def save(path: Path, content: Any) -> None:
    """`torch.save` to a new file, flushed to the disk. Raises DataError where the disk is full."""
    with refusals(path):
        torch.save(content, path)
        _flush(path)


@contextmanager
def refusals(path: Path) -> Iterator[None]:
    """Inside, what torch says of a file that it cannot write becomes a DataError."""
    try:
        yield
    except OSError as error:
        raise write_error(path, error) from error
    except RuntimeError as error:
        raise DataError(f"{path}: cannot be written ({_reason(error)}); is the disk full?") from error


class TorchWriter:
    """Writes `{"module": {key: tensor}}` as `torch.save` would, without ever holding the dictionary."""

    def __init__(self, path: Path, specs: Sequence[Spec]) -> None:
        """Raises DataError, here and later, where the disk is full."""
        self.path, self._specs, self._next = path, specs, 0
        index = _torch_index(specs)
        with refusals(self.path):
            self._writer = torch._C.PyTorchFileWriter(str(path))
            self._writer.write_record("data.pkl", index, len(index))
            self._writer.write_record("byteorder", b"little", len(b"little"))

    def add(self, tensor: Tensor) -> None:
        """Append the next tensor."""
        spec = self._specs[self._next]
        whole = spec.checked(tensor)
        if whole.untyped_storage().nbytes() != spec.bytes:
            whole = whole.clone()
        with refusals(self.path):
            # The stubs know the typed storages only, which torch itself no longer passes.
            self._writer.write_record(f"data/{self._next}", whole.untyped_storage(), spec.bytes)  # type: ignore[arg-type]
        self._next += 1

    def close(self) -> None:
        """Write the archive's table and flush to the disk."""
        assert self._next == len(self._specs)
        with refusals(self.path):
            self._writer.write_end_of_file()
            _flush(self.path)


@dataclass(frozen=True)
class _Storage:
    number: int
    spec: Spec


class _Indexer(pickle.Pickler):
    """Pickles specs as torch pickles tensors: a rebuild call on a storage that is told by its number."""

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        kind = _STORAGES[obj.spec.dtype]
        return "storage", kind, str(obj.number), "cpu", obj.spec.numel

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, _Placed):
            return NotImplemented
        shape = obj.storage.spec.shape
        stride = torch.empty(shape, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (obj.storage, 0, shape, stride, False, OrderedDict())


@dataclass(frozen=True)
class _Placed:
    storage: _Storage


def _torch_index(specs: Sequence[Spec]) -> bytes:
    buffer = io.BytesIO()
    state = {spec.key: _Placed(_Storage(number, spec)) for number, spec in enumerate(specs)}
    _Indexer(buffer, protocol=2).dump({"module": state})
    return buffer.getvalue()


def _dtype(path: Path, key: str, name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise DataError(f"{path}: {key} is stored as {name}; known are {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _data_start(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> int:
    """Where a record's bytes begin: behind its local header, whose length may differ from the central one's."""
    assert archive.fp is not None
    archive.fp.seek(info.header_offset + 26)
    name, extra = struct.unpack("<HH", archive.fp.read(4))
    return info.header_offset + 30 + int(name) + int(extra)


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _not_whole(path: Path, error: BaseException) -> DataError:
    return DataError(f"{path}: not a whole file of torch.save ({_reason(error)}); fetch or write it again")


def _forbidden(error: BaseException) -> str:
    """What torch's weights-only unpickler stumbled over, out of its long advice."""
    found = re.search(r"(?:GLOBAL|Unsupported \w+:?) ([\w.]+)", str(error))
    return found[1] if found else _reason(error)


def _reason(error: BaseException) -> str:
    """The first sentence of torch's long messages."""
    return str(error).strip().partition("\n")[0].partition(". ")[0][:200] or type(error).__name__
