"""What autograd saves for the backward pass of a model with the fused kernels: shapes alone, so of any size.

Fake tensors run no kernel and a fake process group sends nothing: one tensor-parallel rank's shapes, alone.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"  # lets the fused kernels be chosen without a GPU

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from train.cli import compose_train
from train.mesh import Mesh
from train.model import context
from train.model.build import DTYPES, Model
from train.model.parameters import Layout


def measured(words: Sequence[str]) -> tuple[int, int]:
    """Bytes saved by the second layer, and by the whole model before its loss; parameters not counted."""
    config = compose_train(["data.path=unused", "kernels=triton", *words])
    dtype = DTYPES[config.precision.dtype]
    ranks = config.parallel.tensor_parallel
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    group = torch.distributed.group.WORLD if ranks > 1 else None
    mesh = replace(Mesh.single(), tensor=ranks, tensor_group=group)
    saved: list[tuple[int, int]] = []
    kept = []  # alive, so that no address is used twice
    current = [0]

    def parameter_of(layout: Layout, device: torch.device, **_: Any) -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.empty(layout.local_shape, dtype=dtype))

    with FakeTensorMode(), mock.patch.object(context, "make_parameter", parameter_of):
        model = Model(config, mesh, dtype)
        counted = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        for position, item in enumerate(model.items):
            item.register_forward_pre_hook(lambda *_, position=position: current.__setitem__(0, position))

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in counted:
                counted.add(storage._cdata)
                kept.append(tensor)
                saved.append((current[0], storage.nbytes()))
            return tensor

        batch, slots = config.micro_batch_size, config.sequence_length
        tokens, sample_index = torch.zeros(batch, slots, dtype=torch.int64), torch.zeros(batch, dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.train()((tokens, torch.zeros(batch, 4, slots, dtype=torch.int64), sample_index))
    return sum(size for position, size in saved if position == 2), sum(size for _, size in saved)
