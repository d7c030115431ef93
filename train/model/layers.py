"""The transformer layer: attention and feed-forward with two ways to place the norms.

Shapes: B sequences, S slots, H hidden, N query heads and K key-value heads on this rank, D dims a head, F ffn width.
Maths of the default: GLM-130B (arXiv 2210.02414, section 2.1), a post-norm layer with DeepNorm written so that the
residual comes from the norm's output; a layer takes the normalised input and returns the next layer's.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.interval_attention import unpack_heads
from kernels.random import Dropout, drop_hidden
from train.model.context import Context, HeadNorm, Norm, State, Stream, intervals
from train.model.parameters import Layout
from train.model.prefix import Prefix, before, layouts_of
from train.model.tensor_parallel import sum_gradients


class Cache(Protocol):
    """What attention asks of a key-value cache; see `train.model.cache`."""

    def extend(self, key: Tensor, value: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values at the slots `place`; returns those of all slots."""

    def buffers(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all slots, to be written by who asked."""


class Attention(nn.Module):
    """Interval attention over heads divided among the tensor-parallel ranks.

    Multi-head: one packed matrix, rows per head (q, k, v). Grouped heads: a query matrix and a key-value matrix, rows
    per group (k, v); where the ranks do not divide the groups, every rank computes all of them and uses those its own
    query heads need.
    """

    def __init__(self, context: Context, layer: int) -> None:
        super().__init__()
        self.context, self.layer = context, layer
        self.cache: Cache | None = None
        """Set while `train.model.cache` is attached: keys and values of earlier slots."""
        model, dim, ranks = context.model, context.head_dim, context.mesh.tensor
        name = f"layers.{layer}.attention"
        self.heads = model.num_heads // ranks
        self.packed = context.kv_heads == model.num_heads
        self.kv_split = context.kv_heads % ranks == 0
        self.kv_heads = context.kv_heads // ranks if self.kv_split else context.kv_heads
        width, kv_width = model.num_heads * dim, context.kv_heads * dim
        has_bias = model.bias in ("all", "qkv")
        query_std = context.std(model.hidden_size, width, branch=False) * context.query_key_gain
        value_std = context.std(model.hidden_size, kv_width, branch=True)
        key_std = context.std(model.hidden_size, kv_width, branch=False) * context.query_key_gain
        if self.packed:
            rows = torch.tensor([query_std, key_std, value_std]).repeat_interleave(dim).repeat(self.heads)
            packed = (3 * width, model.hidden_size)
            self.qkv_weight = context.matrix(
                context.cut(f"{name}.query_key_value.weight", packed, 0), rows[:, None].to(context.mesh.device)
            )
            self.qkv_bias = context.vector(context.cut(f"{name}.query_key_value.bias", packed[:1], 0), wanted=has_bias)
        else:
            query = (width, model.hidden_size)
            self.query_weight = context.matrix(context.cut(f"{name}.query.weight", query, 0), query_std)
            self.query_bias = context.vector(context.cut(f"{name}.query.bias", query[:1], 0), wanted=has_bias)
            pair = (2 * kv_width, model.hidden_size)
            names = f"{name}.key_value.weight", f"{name}.key_value.bias"
            kv_rows = torch.tensor([key_std, value_std]).repeat_interleave(dim).repeat(self.kv_heads)
            layouts = (
                (context.cut(names[0], pair, 0), context.cut(names[1], pair[:1], 0))
                if self.kv_split
                else (Layout(names[0], pair), Layout(names[1], pair[:1]))
            )
            self.kv_weight = context.matrix(layouts[0], kv_rows[:, None].to(context.mesh.device))
            self.kv_bias = context.vector(layouts[1], wanted=has_bias)
        output = (model.hidden_size, width)
        self.dense_weight = context.matrix(
            context.cut(f"{name}.dense.weight", output, 1), context.output_std(width, model.hidden_size)
        )
        self.dense_bias = context.vector(Layout(f"{name}.dense.bias", output[:1]), wanted=model.bias == "all")
        self.prefix = self._prefix(name, kv_width) if context.prefix else None
        self.query_norm = HeadNorm(context, f"{name}.query_norm") if model.qk_norm else None
        self.key_norm = HeadNorm(context, f"{name}.key_norm") if model.qk_norm else None

    def _prefix(self, name: str, width: int) -> Prefix:
        context = self.context
        named = layouts_of(name, context.prefix, width)
        key, value = (context.cut(*one, 1) if self.kv_split else Layout(*one) for one in named)
        group = None if self.kv_split else context.mesh.tensor_group
        return Prefix((key, value), context.head_dim, context.mesh.device, context.seed, group)

    def prefix_parts(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values of the prefix for the heads of this rank, [length, kv heads, dim] each; None without one."""
        if self.prefix is None:
            return None
        key, value = self.prefix.parts()
        own = self._own_groups(key.device)
        return key[:, own], value[:, own]

    def forward(self, x: Tensor, meta: Tensor, sample_index: Tensor) -> tuple[Tensor, Tensor]:
        """x [B,S,H] -> the output product [B,S,H], its bias not yet added; and x, for the residual."""
        positions, attend_from, attend_to = intervals(meta)
        query, key, value, x = self._packed(x, positions) if self.packed else self._grouped(x, positions)
        context, step = self.context, self.context.ops.decode_attention
        if self.cache is not None and step is not None and x.shape[1] == 1:
            place = meta[:, 4].to(torch.int32)
            buffers = self.cache.buffers(key, value)
            out = step(query, key, value, *buffers, place, attend_from, attend_to, scale=context.attention_scale)
            return context.row_parallel(out.flatten(2), self.dense_weight), x
        extra: dict[str, int] = {}
        if self.cache is not None:
            key, value = self.cache.extend(key, value, meta[:, 4])
        elif (parts := self.prefix_parts()) is not None:
            key, value = before(parts, key, value)
        if context.prefix:
            attend_from, attend_to = attend_from + context.prefix, attend_to + context.prefix
            extra["prefix"] = context.prefix
        out, _, max_logit = context.ops.attention(
            query,
            key,
            value,
            attend_from,
            attend_to,
            scale=context.attention_scale,
            alpha=context.logit_scale(self.layer),
            softcap=0.0,
            dropout=context.dropout(
                self,
                context.model.attention_dropout,
                self.layer,
                "attention",
                sample_index,
                offset=context.mesh.tensor_rank * self.heads,
            ),
            want_max_logit=context.probe.active and context.ops.max_logit,
            **extra,
        )
        context.probe.note_logits(self.layer, max_logit)
        out = context.row_parallel(out.flatten(2), self.dense_weight)
        context.probe.note(f"layers.{self.layer}.attention", out)
        return out, x

    def _packed(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query, key and value [B,S,heads,D], and x."""
        dim = self.context.head_dim
        (packed,), x = self.context.column_parallel(x, self.qkv_weight)
        packed = self._turned(packed.unflatten(2, (-1, dim)), self.qkv_bias, positions, query=True, pair=True)
        return *unpack_heads(packed.unflatten(2, (self.heads, 3))), x

    def _grouped(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query, key and value [B,S,heads,D], and x."""
        dim = self.context.head_dim
        weight, bias = self.kv_weight, self.kv_bias
        if not self.kv_split:
            # All ranks compute all of these heads and each uses some: every rank has a part of the gradient.
            weight, bias = sum_gradients(self.context.mesh.tensor_group, weight, bias)
        (query, pair), x = self.context.column_parallel(x, self.query_weight, weight)
        query = self._turned(query.unflatten(2, (-1, dim)), self.query_bias, positions, query=True, pair=False)
        pair = self._turned(pair.unflatten(2, (-1, dim)), bias, positions, query=False, pair=True)
        key, value = pair.unflatten(2, (self.kv_heads, 2)).unbind(3)
        own = self._own_groups(x.device)
        return query, key[:, :, own], value[:, :, own], x

    def _own_groups(self, device: torch.device) -> slice | Tensor:
        """Which of the key-value heads held here the rank's own query heads read."""
        if self.kv_split:
            return slice(None)
        first = self.context.mesh.tensor_rank * self.heads
        share = self.context.model.num_heads // self.kv_heads
        if self.heads % share == 0:
            return slice(first // share, (first + self.heads) // share)
        if share % self.heads == 0:
            return slice(first // share, first // share + 1)
        # A rank whose heads straddle groups unevenly: one key-value head for each query head.
        return torch.arange(first, first + self.heads, device=device) // share

    def _turned(self, x: Tensor, bias: Tensor | None, positions: Tensor, *, query: bool, pair: bool) -> Tensor:
        """Bias, QK-norm where the model has one, and rotation of heads in the order (query, key, value) per group.

        query, pair: whether x [B,S,heads,D] holds queries, and whether keys and values.
        """
        period, passthrough = query + 2 * pair, int(pair)
        if self.query_norm is None or self.key_norm is None:
            return self._rotate(x, bias, positions, period=period, passthrough=passthrough)
        if bias is not None:
            x = x + bias.to(x.dtype).view(x.shape[2:])
        parts = list(x.unflatten(2, (-1, period)).unbind(3))
        norms = [self.query_norm] * query + [self.key_norm] * pair
        parts[: len(norms)] = [norm(part) for norm, part in zip(norms, parts, strict=False)]
        x = torch.stack(parts, 3).flatten(2, 3)
        return self._rotate(x, None, positions, period=period, passthrough=passthrough)

    def _rotate(self, x: Tensor, bias: Tensor | None, positions: Tensor, *, period: int, passthrough: int) -> Tensor:
        model = self.context.model
        modes = {"rotary_1d": "1d", "rotary_2d": "2d"}
        return self.context.ops.rotary(
            x,
            bias,
            positions,
            period=period,
            passthrough=passthrough,
            rotary_dim=round(self.context.head_dim * model.rotary_fraction),
            mode=modes.get(model.positions, "none"),
            interleaved=model.rotary_interleaved,
            fp16_angles=model.rotary_fp16_angles,
            **self.context.rotary_options,
        )


class FeedForward(nn.Module):
    """W2 (x1 * act(x2)) with [x1; x2] = W1 x + b1, or W2 act(W1 x + b1) where it is not gated."""

    def __init__(self, context: Context, layer: int) -> None:
        super().__init__()
        self.context, self.layer = context, layer
        model, halves = context.model, 2 if context.gated else 1
        name, inner, has_bias = f"layers.{layer}.mlp", model.ffn_hidden_size, model.bias == "all"
        first = (halves * inner, model.hidden_size)
        self.first_weight = context.matrix(
            context.cut(f"{name}.dense_h_to_4h.weight", first, 0, halves=halves),
            context.std(model.hidden_size, first[0], branch=True),
        )
        self.first_bias = context.vector(
            context.cut(f"{name}.dense_h_to_4h.bias", first[:1], 0, halves=halves), wanted=has_bias
        )
        second = (model.hidden_size, inner)
        self.second_weight = context.matrix(
            context.cut(f"{name}.dense_4h_to_h.weight", second, 1), context.output_std(inner, model.hidden_size)
        )
        self.second_bias = context.vector(Layout(f"{name}.dense_4h_to_h.bias", second[:1]), wanted=has_bias)
        self.first_activates = False
        """Whether what stands in for `first_weight` adds bias and activation itself (`train.model.quantised`)."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B,S,H] -> the second product [B,S,H], its bias not yet added; and x, for the residual."""
        (inner,), x = self.context.column_parallel(x, self.first_weight)
        if not self.first_activates:
            inner = self.context.ops.bias_activation(inner, self.first_bias, kind=self.context.model.activation)
        out = self.context.row_parallel(inner, self.second_weight)
        self.context.probe.note(f"layers.{self.layer}.ffn", out)
        return out, x


class Layer(nn.Module):
    """What the two placements share: the branches, their dropout, and recomputation.

    Recomputing a branch stops at the last tensor that its backward pass needs, before the sum over the tensor-parallel
    ranks, and before its last product too where autograd keeps that product's inputs itself. With
    parallel.overlap_tensor product and sum are one operation, and both are repeated.
    """

    def __init__(self, context: Context, index: int) -> None:
        super().__init__()
        self.context, self.index = context, index
        self.recomputed = context.recompute if index % context.recompute_every == 0 else "none"
        self.attention = Attention(context, index)
        self.ffn = FeedForward(context, index)
        self.post_norm = Norm(context, f"layers.{index}.post_attention_norm")

    def forward(self, hidden: Tensor, meta: Tensor, sample_index: Tensor) -> State:
        """One layer on a `State`'s parts."""
        hidden = self._kept("full", self.run, hidden, meta, sample_index)
        self.context.probe.note(f"layers.{self.index}.norms", hidden)
        return hidden, meta, sample_index

    def run(self, hidden: Tensor, meta: Tensor, sample_index: Tensor) -> Tensor:
        """The layer's maths, [B,S,H] -> [B,S,H]."""
        raise NotImplementedError("PostNormLayer and PreNormLayer define it")

    def _kept(self, part: str, function: Callable[..., Any], *inputs: Tensor) -> Any:
        """function(*inputs), of which the backward pass keeps the inputs alone where this part is recomputed."""
        if self.recomputed != part or not (self.training and torch.is_grad_enabled()):
            return function(*inputs)
        # Addressed dropout repeats itself, so there is no generator state to save.
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)

    def _drop(self, site: str, hidden: Tensor, sample_index: Tensor) -> Dropout | None:
        return self.context.hidden_dropout(self, self.index, site, hidden, sample_index)


class PostNormLayer(Layer):
    """deepnorm and post: takes the normalised input a, returns the next layer's.

    h = alpha * a + drop(attention(a) + b);  m = norm(h);  x = alpha * m + drop(ffn(m) + b);  next a = norm(x)
    """

    def __init__(self, context: Context, index: int) -> None:
        super().__init__(context, index)
        last = index == context.model.num_layers - 1
        self.next_norm = Norm(context, "final_norm" if last else f"layers.{index + 1}.input_norm")

    def run(self, hidden: Tensor, meta: Tensor, sample_index: Tensor) -> Tensor:
        alpha = self.context.residual_scale
        branch, hidden = self._kept("attention", self.attention, hidden, meta, sample_index)
        middle = self.post_norm.after(
            hidden,
            branch,
            self.attention.dense_bias,
            alpha=alpha,
            dropout=self._drop("attention_output", hidden, sample_index),
        )
        branch, middle = self._kept("ffn", self.ffn, middle)
        return self.next_norm.after(
            middle, branch, self.ffn.second_bias, alpha=alpha, dropout=self._drop("ffn", hidden, sample_index)
        )


class PreNormLayer(Layer):
    """pre, sandwich and peri: the raw stream flows; each branch reads a norm of it.

    x = x + drop(attention(norm(x)) + b);  x = x + drop(ffn(norm(x)) + b). sandwich puts another norm on each branch's
    output before it is added (CogView, arXiv 2105.13290); peri has a norm behind the embedding too (arXiv 2502.02732).
    """

    def __init__(self, context: Context, index: int) -> None:
        super().__init__(context, index)
        self.input_norm = Norm(context, f"layers.{index}.input_norm")
        second = context.branch_norm
        self.attention_norm = Norm(context, f"layers.{index}.attention_output_norm") if second else None
        self.ffn_norm = Norm(context, f"layers.{index}.mlp_output_norm") if second else None

    def forward(self, hidden: Tensor | Stream, meta: Tensor, sample_index: Tensor) -> Any:
        """One layer on a `State`'s parts; over a cache it returns a `Stream` in place of hidden states."""
        if isinstance(hidden, Stream):
            normed, stream = self.input_norm.after(*hidden, return_sum=True)
        elif self.attention.cache is None:
            return super().forward(hidden, meta, sample_index)
        else:
            normed, stream = self.input_norm(hidden), hidden
        return Stream(*self._branches(normed, stream, meta, sample_index)), meta, sample_index

    def run(self, hidden: Tensor, meta: Tensor, sample_index: Tensor) -> Tensor:
        stream, branch, bias = self._branches(self.input_norm(hidden), hidden, meta, sample_index)
        (bias,) = self.context.replicated(bias)
        branch = branch if bias is None else branch + bias
        return stream + drop_hidden(branch, self._drop("ffn", hidden, sample_index))

    def _branches(
        self, normed: Tensor, stream: Tensor, meta: Tensor, sample_index: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The stream after attention, and the feed-forward branch with its bias, not yet added to it."""
        branch, _ = self._kept("attention", self.attention, normed, meta, sample_index)
        branch, bias = _normed(self.attention_norm, branch, self.attention.dense_bias)
        middle, stream = self.post_norm.after(
            stream, branch, bias, dropout=self._drop("attention_output", stream, sample_index), return_sum=True
        )
        branch, _ = self._kept("ffn", self.ffn, middle)
        return stream, *_normed(self.ffn_norm, branch, self.ffn.second_bias)


def _normed(norm: Norm | None, branch: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if norm is None:
        return branch, bias
    (bias,) = norm.context.replicated(bias)
    normed: Tensor = norm(branch if bias is None else branch + bias)
    return normed, None
