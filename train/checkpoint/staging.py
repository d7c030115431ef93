"""The copy that a save is written from: this rank's pieces in host memory, as they were when the save began.

    pieces    the main thread: what is to be copied, where it lies
    copy      the saving thread: every piece, on a stream of its own beside the work of the training
    order     the main thread, before weights or optimizer states change: the device changes them after the copy
    wait      the saving thread, before it reads the copy

Only an update changes what is copied, so the next forward and backward passes run meanwhile.
"""

from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor

from train.checkpoint.pieces import Piece
from train.engine import Engine
from train.host_memory import host_memory
from train.model.build import named_layouts
from train.progress import alive

Pieces = dict[str, list[tuple[Piece, Tensor]]]
"""This rank's share of a checkpoint by part, `model` and `optimizer`: on the device, or their copies."""
SLAB = 256 << 20
"""Bytes of host memory taken at a time: few enough that the training's launches come in between."""
_ALIGNED = 64


class Staging:
    """Host memory, page-locked on accelerators, which makes the copy as fast as the bus.

    Page-locking is slow, so it is done once, in the background from the start of the run. It holds what this rank
    writes: with half precision 14 bytes for each of its parameters, divided by the data-parallel ranks.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._streams = torch.get_device_module(engine.mesh.device)
        self._stream = self._streams.Stream()
        self._buffers: dict[str, Tensor] = {}

    def pieces(self) -> Pieces:
        """What a save of this moment holds; the copy will wait for what the device was given before."""
        found = {"model": list(_weights(self._engine)), "optimizer": list(_states(self._engine))}
        self._stream.wait_stream(self._streams.current_stream())
        return found

    def prepare(self, pieces: Pieces) -> None:
        """Take the memory for these pieces, which are the same in all saves of a run; once."""
        if self._buffers:
            return
        wanted = [(piece.key, tensor) for piece, tensor in chain.from_iterable(pieces.values())]
        sizes = [-(-tensor.nbytes // _ALIGNED) * _ALIGNED for _, tensor in wanted]
        left = sum(sizes)
        buffers, slab, used = {}, torch.empty(0, dtype=torch.uint8), 0
        for (key, tensor), size in zip(wanted, sizes, strict=True):
            if used + size > slab.numel():
                slab, used = host_memory(max(size, min(SLAB, left)), self._engine.mesh.device, self), 0
                alive()
            buffers[key] = slab[used : used + tensor.nbytes].view(tensor.dtype)
            used, left = used + size, left - size
        self._buffers = buffers

    def copy(self, pieces: Pieces) -> Pieces:
        """Start the copies. On an accelerator they are under way when this returns; on a CPU they are made."""
        self.prepare(pieces)
        with self._streams.stream(self._stream):
            return {
                part: [(piece, self._copied(piece, tensor)) for piece, tensor in held] for part, held in pieces.items()
            }

    def order(self) -> None:
        """Let what the device is given from now on come after the copies that were started."""
        self._streams.current_stream().wait_stream(self._stream)

    def wait(self) -> None:
        """Until the copies that were started are made."""
        done = self._streams.Event()
        done.record(self._stream)
        done.synchronize()

    def _copied(self, piece: Piece, tensor: Tensor) -> Tensor:
        alive()
        return self._buffers[piece.key].copy_(tensor.detach().view(-1), non_blocking=True)


def _weights(engine: Engine) -> Iterator[tuple[Piece, Tensor]]:
    """The compute-dtype weights that this rank saves.

    Under ZeRO-3 the ranges that it holds. Else all data-parallel ranks hold the same: laid end to end, the parameters
    make a line, of which each of these ranks saves as long a part.
    """
    if engine.zero_stage == 3:
        for fragment in engine.fragments():
            if fragment.owner:
                stored = fragment.parameter.ds_tensor.narrow(0, 0, fragment.master.numel())  # type: ignore[attr-defined]
                yield Piece("weight", fragment.layout, fragment.start, stored.numel()), stored
        return
    held = [
        (layout, parameter.detach().view(-1))
        for layout, parameter in named_layouts(engine.model.parameters())
        if not getattr(parameter, "ds_pipe_replicated", False)
        and (layout.dim is not None or engine.mesh.tensor_rank == 0)
    ]
    total, rank, ranks = sum(tensor.numel() for _, tensor in held), engine.mesh.data_rank, engine.mesh.data
    first, last = total * rank // ranks, total * (rank + 1) // ranks
    place = 0
    for layout, tensor in held:
        start, end = (min(max(bound - place, 0), tensor.numel()) for bound in (first, last))
        if start < end:
            yield Piece("weight", layout, start, end - start), tensor[start:end]
        place += tensor.numel()


def _states(engine: Engine) -> Iterator[tuple[Piece, Tensor]]:
    """Moments, and master weights where the compute dtype does not hold them already."""
    for fragment in engine.fragments():
        if not fragment.owner:
            continue
        tensors = dict(fragment.moments)
        if engine.dtype != torch.float32:
            tensors["master"] = fragment.master
        for kind, tensor in tensors.items():
            yield Piece(kind, fragment.layout, fragment.start, tensor.numel()), tensor
