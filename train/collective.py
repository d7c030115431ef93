"""Agreeing over ranks on the host: errors, flags and small objects, apart from the device's own collectives."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from data_prep.errors import ConfigError, DataError
from data_prep.files import write_error
from train.mesh import Mesh

Result = TypeVar("Result")


def gather(mesh: Mesh, value: Any) -> list[Any]:
    """Every rank's value, in rank order, on every rank."""
    if mesh.world == 1:
        return [value]
    values: list[Any] = [None] * mesh.world
    torch.distributed.all_gather_object(values, value, group=mesh.host_group)
    return values


def any_rank(mesh: Mesh, flag: bool) -> bool:
    """Whether the flag is set on any rank; one small message, cheap enough for every step."""
    if mesh.world == 1:
        return flag
    found = torch.tensor([int(flag)])
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX, group=mesh.host_group)
    return bool(found.item())


def together(mesh: Mesh, work: Callable[[], Result]) -> Result:
    """Run `work` on every rank; where any fails with a user's error, all raise the first rank's.

    Returns this rank's own result. Keeps ranks from waiting for one that has gone.
    """
    result, error = _attempt(work)
    for found in gather(mesh, error):
        if found is not None:
            raise found
    return result  # type: ignore[return-value]


def on_rank_zero(mesh: Mesh, work: Callable[[], Result]) -> Result | None:
    """Run `work` on rank 0 only; its result there, None elsewhere; its error everywhere."""
    return together(mesh, lambda: work() if mesh.rank == 0 else None)


def from_rank_zero(mesh: Mesh, work: Callable[[], Result]) -> Result:
    """Run `work` on rank 0 only; its result, and its error, everywhere."""
    result: Result = gather(mesh, on_rank_zero(mesh, work))[0]
    return result


def _attempt(work: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
    try:
        return work(), None
    except (ConfigError, DataError) as error:
        return None, type(error)(str(error))
    except OSError as error:
        return None, write_error(str(error.filename or "a file"), error)
