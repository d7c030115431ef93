"""Page-locked host memory that is taken without holding up the device's work.

CUDA's own allocator makes the pages and locks them in one call, during which nothing can be launched: 15 s for 20 GB on
an H100's host. Here the pages are made first, by writing to them (large ones where the system has them); to lock pages
that are there is short.
"""

import contextlib
import mmap
import weakref
from typing import Any

import torch
from torch import Tensor


def host_memory(size: int, device: torch.device, owner: object) -> Tensor:
    """uint8 [size] on the host, page-locked where the device is an accelerator, while `owner` lives."""
    if device.type == "cpu":
        return torch.empty(size, dtype=torch.uint8)
    module = torch.get_device_module(device)
    if not hasattr(module, "cudart"):  # back ends with another runtime
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # A process that the loader forks must not share them: whose page is written to would be another one then, and the
    # device would go on writing to the first.
    pages.madvise(mmap.MADV_DONTFORK)
    with contextlib.suppress(OSError):  # a system without large pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(pages, dtype=torch.uint8).zero_()
    with module.device(device):  # a thread begins on the first device, whoever's that is
        if int(module.cudart().cudaHostRegister(memory.data_ptr(), size, 0)):
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    # Another mapping may get these addresses. `memory` is an argument, so that it is still there then.
    weakref.finalize(owner, _unlock, module.cudart(), memory)
    return memory


def _unlock(runtime: Any, memory: Tensor) -> None:
    runtime.cudaHostUnregister(memory.data_ptr())
