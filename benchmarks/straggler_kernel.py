"""A kernel that holds multiprocessors for a while: each of its programs fills most of one's registers."""

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rounds"])
def _hold(out, rounds, SIZE: tl.constexpr):
    x = tl.arange(0, SIZE).to(tl.float32)
    for _ in range(rounds):
        x = x * 0.999 + 0.001
    tl.store(out + tl.program_id(0), tl.sum(x, axis=0))


def hold(out: torch.Tensor, rounds: int) -> None:
    """Hold as many multiprocessors as `out` has elements."""
    _hold[(out.numel(),)](out, rounds, SIZE=32768, num_warps=32)
