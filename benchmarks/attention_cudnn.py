"""The halves of a prefix mask on cuDNN's attention, for `benchmarks.attention_routes`.

cuDNN takes each sequence's lengths as tensors (padding mask), and where each begins as offsets (ragged layout), so
nothing is copied and the host never learns a length.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

CUTS = {"square + trapezoid": ("square", "trapezoid"), "rectangle + triangle": ("rectangle", "triangle")}


@triton.jit
def _merge_kernel(
    out1, lse1, out2, lse2, context, out, lse, S, H: tl.constexpr, D: tl.constexpr, MOVED: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    batch, place = token // S, token % S
    edge = tl.load(context + batch)
    head = tl.arange(0, H)
    at = (token * H + head[:, None]) * D + tl.arange(0, D)[None, :]
    row = (batch * H + head) * S
    total = tl.load(lse1 + row + place)
    o = tl.load(out1 + at).to(tl.float32)
    if place >= edge:
        own = place
        if MOVED:
            own = place - edge
        other = tl.load(lse2 + row + own)
        top = tl.maximum(total, other)
        a, b = tl.exp(total - top), tl.exp(other - top)
        o = (o * a[:, None] + tl.load(out2 + at).to(tl.float32) * b[:, None]) / (a + b)[:, None]
        total = top + tl.log(a + b)
    tl.store(out + at, o.to(out.dtype.element_ty))
    tl.store(lse + row + place, total)


def merge(
    out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor, context: Tensor, moved: bool
) -> tuple[Tensor, Tensor]:
    """The first half below the context, from it on both: out = Σ exp(lse_i − lse) · out_i. out [B,S,H,D], lse [B,H,S].

    moved: lse2 of a sequence begins with the row at its context.
    """
    out, lse = torch.empty_like(out1), torch.empty_like(lse1)
    batch, slots, heads, dim = out1.shape
    _merge_kernel[(batch * slots,)](out1, lse1, out2, lse2, context, out, lse, slots, H=heads, D=dim, MOVED=moved)
    return out, lse


@triton.jit
def _add_kernel(one, two, context, S, row, H: tl.constexpr, D: tl.constexpr, MERGED: tl.constexpr):
    """Packed gradients [token, H, 3, D] of two halves into `one`.

    MERGED: from the context on dq is the sum, dk and dv are two's. Else dk and dv are two's, below the context the sum.
    """
    token = tl.program_id(0).to(tl.int64)
    place, edge = token % S, tl.load(context + token // S)
    i = tl.arange(0, H * 4 * D)
    part = i // D % 4
    at = token * row + i // (4 * D) * 3 * D + part * D + i % D
    if MERGED:
        if place >= edge:
            total = tl.load(two + at, mask=part < 3, other=0.0).to(tl.float32)
            total += tl.load(one + at, mask=part == 0, other=0.0).to(tl.float32)
            tl.store(one + at, total.to(one.dtype.element_ty), mask=part < 3)
    else:
        inner = (part == 1) | (part == 2)
        total = tl.load(two + at, mask=inner, other=0.0).to(tl.float32)
        total += tl.load(one + at, mask=inner & (place < edge), other=0.0).to(tl.float32)
        tl.store(one + at, total.to(one.dtype.element_ty), mask=inner)


class CudnnHalves:
    """Forward and backward of one cut, for packed qkv [B, S, H, 3, D] in bf16 and contexts int32 [B]."""

    def __init__(self, qkv: Tensor, context: Tensor, scale: float, cut: str, deterministic: bool) -> None:
        import cudnn

        self._cudnn, self._handle = cudnn, cudnn.create_handle()
        self._qkv, self._context, self._scale, self._deterministic = qkv, context, scale, deterministic
        self._merged, self._names = cut.startswith("rectangle"), CUTS[cut]
        self._graphs = {(name, back): self._build(name, back) for name in self._names for back in (False, True)}
        size = max(graph.get_workspace_size() for graph, _ in self._graphs.values())
        self._workspace = torch.empty(max(size, 1), dtype=torch.uint8, device=qkv.device)
        self._vectors = {name: self._lengths(name) for name in self._names}
        self._kept: dict[str, Tensor] = {}

    def _build(self, name: str, back: bool) -> tuple[Any, dict[str, Any]]:
        """A graph of one half, and its tensors by name."""
        c = self._cudnn
        batch, slots, heads, _, dim = self._qkv.shape
        graph = c.pygraph(
            io_data_type=c.data_type.BFLOAT16,
            intermediate_data_type=c.data_type.FLOAT,
            compute_data_type=c.data_type.FLOAT,
            handle=self._handle,
        )
        tensors: dict[str, Any] = {}

        def tensor(label: str, size: list[int], stride: list[int], kind: Any) -> Any:
            tensors[label] = graph.tensor(name=label, dim=size, stride=stride, data_type=kind)
            return tensors[label]

        row = heads * 3 * dim
        whole, packed, plain = [batch, heads, slots, dim], [slots * row, 3 * dim, row, 1], [slots * heads * dim, dim]
        plain += [heads * dim, 1]
        q, k, v = (tensor(label, whole, packed, c.data_type.BFLOAT16) for label in "qkv")
        lengths = {
            label: tensor(label, [batch, 1, 1, 1], [1, 1, 1, 1], c.data_type.INT32)
            for label in ("seq_len_q", "seq_len_kv")
        }
        causal = name in ("trapezoid", "triangle")
        places: dict[str, Any] = {}
        options: dict[str, Any] = {}
        if causal:
            for label in ("at_q", "at_kv", "at_o"):
                places[label] = tensor(label, [batch + 1, 1, 1, 1], [1, 1, 1, 1], c.data_type.INT64)
            for one, label in ((q, "at_q"), (k, "at_kv"), (v, "at_kv")):
                one.set_ragged_offset(places[label])
            corner = c.diagonal_alignment.BOTTOM_RIGHT if name == "trapezoid" else c.diagonal_alignment.TOP_LEFT
            options = {"diagonal_band_right_bound": 0, "diagonal_alignment": corner}
        options |= {"attn_scale": self._scale, "use_padding_mask": True, **lengths}
        if back:
            o, do = (tensor(label, whole, plain, c.data_type.BFLOAT16) for label in ("o", "do"))
            sums = tensor("stats", [batch, heads, slots, 1], [heads * slots, slots, 1, 1], c.data_type.FLOAT)
            grads = graph.sdpa_backward(
                q=q, k=k, v=v, o=o, dO=do, stats=sums, use_deterministic_algorithm=self._deterministic, **options
            )
            results = [(*pair, packed) for pair in zip(("dq", "dk", "dv"), grads, strict=True)]
            inputs = [("o", o), ("do", do)]
        else:
            o, sums = graph.sdpa(q=q, k=k, v=v, generate_stats=True, **options)
            sums.set_output(True).set_data_type(c.data_type.FLOAT)
            tensors["stats"] = sums
            results, inputs = [("o", o, plain)], []
        for label, result, stride in results:
            tensors[label] = result.set_output(True).set_dim(whole).set_stride(stride)
            inputs.append((label, result))
        for label, one in inputs if causal else ():
            one.set_ragged_offset(places["at_q" if label == "dq" else "at_o" if label in ("o", "do") else "at_kv"])
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([c.heur_mode.A, c.heur_mode.FALLBACK])
        graph.check_support()
        graph.build_plans()
        return graph, tensors

    def _lengths(self, name: str) -> dict[str, Tensor]:
        """Lengths of a half, and for the causal ones where each sequence begins, in elements."""
        batch, slots, heads, _, dim = self._qkv.shape
        context, all_slots = self._context, torch.full_like(self._context, slots)
        queries, keys = {
            "square": (context, context),
            "trapezoid": (slots - context, all_slots),
            "rectangle": (all_slots, context),
            "triangle": (slots - context, slots - context),
        }[name]
        vectors = {"seq_len_q": queries, "seq_len_kv": keys}
        if name in ("trapezoid", "triangle"):
            first = torch.arange(batch + 1, device=context.device, dtype=torch.int64) * slots
            edge = torch.cat([first[:-1] + context, first[-1:]])
            row = heads * 3 * dim
            key_row = first if name == "trapezoid" else edge
            vectors |= {"at_q": edge * row, "at_kv": key_row * row, "at_o": edge * heads * dim}
        return vectors

    def _run(self, name: str, back: bool, given: dict[str, Tensor]) -> None:
        graph, tensors = self._graphs[name, back]
        self._cudnn.set_stream(handle=self._handle, stream=torch.cuda.current_stream().cuda_stream)
        given = given | self._vectors[name] | dict(zip("qkv", self._qkv.unbind(3), strict=True))
        graph.execute({one: given[label] for label, one in tensors.items()}, self._workspace, handle=self._handle)

    def forward(self) -> tuple[Tensor, Tensor | None]:
        """out [B, S, H, D]; lse [B, H, S] where the halves are merged."""
        batch, slots, heads, _, dim = self._qkv.shape
        out = self._qkv.new_empty(batch, slots, heads, dim)
        sums = [torch.empty(batch, heads, slots, device=out.device) for _ in range(2)]
        other = torch.empty_like(out) if self._merged else out
        # The first half writes rows of the second too; the second writes its own only.
        for name, half, stats in zip(self._names, (out, other), sums, strict=True):
            self._run(name, False, {"o": half, "stats": stats})
        lse = None
        if self._merged:
            out, lse = merge(out, sums[0], other, sums[1], self._context, True)
            own = torch.arange(slots, device=out.device) + self._context[:, None]
            own = own.clamp(max=slots - 1)[:, None].expand(-1, heads, -1)
            sums = [lse, lse.gather(2, own)]
        self._kept = {"o": out, **dict(zip(self._names, sums, strict=True))}
        return out, lse

    def backward(self, dout: Tensor) -> tuple[Tensor, ...]:
        """dq, dk, dv of the last forward."""
        one, two = (torch.empty_like(self._qkv) for _ in range(2))
        first, second = one.unbind(3), two.unbind(3)
        if not self._merged:
            second = (first[0], *second[1:])
        for name, grads in zip(self._names, (first, second), strict=True):
            given = {"o": self._kept["o"], "do": dout, "stats": self._kept[name]}
            self._run(name, True, given | dict(zip(("dq", "dk", "dv"), grads, strict=True)))
        batch, slots, heads, _, dim = self._qkv.shape
        _add_kernel[(batch * slots,)](
            one, two, self._context, slots, heads * 3 * dim, H=heads, D=dim, MERGED=self._merged, num_warps=8
        )
        return first
