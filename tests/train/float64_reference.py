"""The model in float64, written from the papers: what the fused, sharded, fp32 model is compared with.

It shares no code with `train/` or `kernels/`: sequence by sequence, head by head, S x S score matrices, nothing but
torch's elementary functions, and autograd for the gradients. It reads parameters by their names in a checkpoint.

    GLM-130B (arXiv 2210.02414, its released code)   a = LN_in(x); h = alpha a + Attn(a); m = LN_post(h);
                                                     x = alpha m + FFN(m); logits = LN_final(x) E^T
    post-norm  the same with alpha 1                 pre-norm  x + f(LN(x)), a norm before the head
    sandwich (CogView, arXiv 2105.13290)             x + LN'(f(LN(x)))
    peri (arXiv 2502.02732)                          sandwich on LN(E[ids])
    QK-norm (arXiv 2302.05442)                       RMSNorm(q), RMSNorm(k) per head, then the rotation

Legend: S slots, H hidden, D head dims, F ffn width, V vocabulary.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Settings:
    """What to compute besides the model's shape, which is read from `train.config.ModelConfig`'s fields."""

    scaled_softmax: bool = False
    lookup_shrink: float = 1.0
    head_shrink: float = 1.0
    softcap: float = 0.0
    z_loss: float = 0.0


class Reference:
    """One model. model: an object with ModelConfig's fields. weights: float64 tensors by canonical name."""

    def __init__(self, model: Any, weights: Mapping[str, Tensor], settings: Settings) -> None:
        self.m, self.w, self.settings = model, weights, settings
        self.head_dim = model.head_dim or model.hidden_size // model.num_heads
        self.kv_heads = model.num_kv_heads or model.num_heads
        self.alpha = 1.0
        if model.norm_placement == "deepnorm":
            self.alpha = model.deepnorm_alpha or math.sqrt(2 * model.num_layers)

    def logits(self, tokens: Tensor, positions: Tensor, attend_from: Tensor, attend_to: Tensor) -> Tensor:
        """Logits [S, V] of one sequence. tokens, attend_from, attend_to: [S]; positions: [2, S]."""
        m = self.m
        table = shrunk(self.w["word_embeddings.weight"], self.settings.lookup_shrink)
        x = torch.stack([table[token] for token in tokens.tolist()])
        if m.positions == "learned_2d":
            x = x + self.w["position_embeddings.weight"][positions[0].long()]
            x = x + self.w["block_position_embeddings.weight"][positions[1].long()]
        if m.embedding_norm or m.norm_placement == "peri":
            x = self.norm("embedding_norm", x)
        mask = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
        for query in range(len(tokens)):
            mask[query, int(attend_from[query]) : int(attend_to[query])] = True
        for number in range(m.num_layers):
            x = self.layer(number, x, positions, mask)
        x = self.norm("final_norm", x)
        if m.tied_embeddings:
            out = x @ shrunk(self.w["word_embeddings.weight"], self.settings.head_shrink).T
        else:
            out = x @ self.w["lm_head.weight"].T
        cap = self.settings.softcap
        return cap * torch.tanh(out / cap) if cap else out

    def loss(self, logits: Tensor, targets: Tensor, loss_weight: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of weight times cross entropy of one sequence, and the z-loss. logits [S, V]; the others [S]."""
        total, z_total = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for slot in range(len(targets)):
            if loss_weight[slot] > 0:
                row = logits[slot]
                log_sum = row.max() + torch.log(torch.exp(row - row.max()).sum())
                total = total + loss_weight[slot].double() * (log_sum - row[targets[slot]])
                z_total = z_total + self.settings.z_loss * loss_weight[slot].double() * log_sum**2
        return total, z_total

    def layer(self, number: int, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """One layer, from the raw stream to the raw stream, [S, H]."""
        name = f"layers.{number}"
        a = self.norm(f"{name}.input_norm", x)
        if self.m.norm_placement in ("deepnorm", "post"):
            h = self.alpha * a + self.attention(number, a, positions, mask)
            middle = self.norm(f"{name}.post_attention_norm", h)
            return self.alpha * middle + self.ffn(number, middle)
        branch = self.attention(number, a, positions, mask)
        if self.m.norm_placement in ("sandwich", "peri"):
            branch = self.norm(f"{name}.attention_output_norm", branch)
        x = x + branch
        branch = self.ffn(number, self.norm(f"{name}.post_attention_norm", x))
        if self.m.norm_placement in ("sandwich", "peri"):
            branch = self.norm(f"{name}.mlp_output_norm", branch)
        return x + branch

    def norm(self, name: str, x: Tensor) -> Tensor:
        """LayerNorm or RMSNorm over the last dimension."""
        if self.m.norm == "rmsnorm":
            return x / torch.sqrt((x**2).mean(-1, keepdim=True) + self.m.norm_eps) * self.w[f"{name}.weight"]
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + self.m.norm_eps)
        return scaled * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def head_norm(self, name: str, x: Tensor) -> Tensor:
        """RMSNorm of one head, [S, D]: x / sqrt(mean x^2 + eps) * weight."""
        return x / torch.sqrt((x**2).mean(-1, keepdim=True) + self.m.norm_eps) * self.w[f"{name}.weight"]

    def linear(self, name: str, x: Tensor) -> Tensor:
        """x W^T, and the bias where the model has one."""
        out = x @ self.w[f"{name}.weight"].T
        bias = f"{name}.bias"
        return out + self.w[bias] if bias in self.w else out

    def attention(self, number: int, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Heads one after the other. Packed rows: [head, (q, k, v), D]; grouped: [head, D] and [group, (k, v), D]."""
        name, dim = f"layers.{number}.attention", self.head_dim
        queries, keys, values = [], [], []
        if self.kv_heads == self.m.num_heads:
            rows = self.linear(f"{name}.query_key_value", x)
            for head in range(self.m.num_heads):
                first = 3 * head * dim
                queries.append(rows[:, first : first + dim])
                keys.append(rows[:, first + dim : first + 2 * dim])
                values.append(rows[:, first + 2 * dim : first + 3 * dim])
        else:
            rows, pairs = self.linear(f"{name}.query", x), self.linear(f"{name}.key_value", x)
            for head in range(self.m.num_heads):
                first = 2 * dim * (head * self.kv_heads // self.m.num_heads)
                queries.append(rows[:, head * dim : (head + 1) * dim])
                keys.append(pairs[:, first : first + dim])
                values.append(pairs[:, first + dim : first + 2 * dim])
        # GLM-130B divides the scores by a factor of the layer before the softmax and multiplies inside it.
        factor = max(1, number) if self.settings.scaled_softmax else 1
        outputs = []
        if self.m.qk_norm:
            queries = [self.head_norm(f"{name}.query_norm", query) for query in queries]
            keys = [self.head_norm(f"{name}.key_norm", key) for key in keys]
        if self.m.rotary_scaling == "yarn":
            # The paper's code folds the temperature into the cosines and sines, once on either side.
            sharper = 0.1 * math.log(self.m.rotary_scaling_factor) + 1
            queries, keys = [query * sharper for query in queries], [key * sharper for key in keys]
        for query, key, value in zip(queries, keys, values, strict=True):
            scores = self.rotated(query, positions) @ self.rotated(key, positions).T / (factor * math.sqrt(dim))
            scores = (scores * factor).masked_fill(~mask, -math.inf)
            weights = torch.exp(scores - scores.max(-1, keepdim=True).values)
            outputs.append(weights / weights.sum(-1, keepdim=True) @ value)
        return self.linear(f"{name}.dense", torch.cat(outputs, -1))

    def rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        """RoFormer's rotation (arXiv 2104.09864) of one head, [S, D], on the first `rotary_fraction` of its dims."""
        m = self.m
        if not m.positions.startswith("rotary"):
            return x
        dims = round(self.head_dim * m.rotary_fraction)
        if m.positions == "rotary_1d":
            parts = [self.turned(x[:, :dims], positions[0])]
        else:
            parts = [self.turned(x[:, : dims // 2], positions[0]), self.turned(x[:, dims // 2 : dims], positions[1])]
        return torch.cat([*parts, x[:, dims:]], -1)

    def turned(self, x: Tensor, positions: Tensor) -> Tensor:
        """Each pair of dims as a complex number, multiplied by exp(i * position * base^(-2j / dims)).

        Linear scaling divides every frequency by the factor f; the ntk one divides pair j's by f^(2j / (dims - 2));
        yarn keeps the fast ones, divides the slow ones and goes from one to the other between them.
        """
        half = x.shape[1] // 2
        if self.m.rotary_fp16_angles:
            # As the released GLM-130B computes them: inverse frequency, position and product in half precision.
            inverse = np.float32(1) / np.float32(self.m.rotary_base) ** (np.arange(half, dtype=np.float32) / half)
            product = np.outer(positions.numpy().astype(np.float16), inverse.astype(np.float16))
            cos, sin = (torch.from_numpy(f(product).astype(np.float64)) for f in (np.cos, np.sin))
        else:
            frequency = torch.tensor([self.m.rotary_base ** (-2 * j / (2 * half)) for j in range(half)]).double()
            factor, pairs = self.m.rotary_scaling_factor, torch.arange(half).double()
            if self.m.rotary_scaling == "yarn":
                # Wavelengths in number of pairs: 2 pi b^(j / half) is a 32nd of the original length, and all of it.
                length = self.m.rotary_original_positions / (2 * math.pi)
                fast, slow = (half * math.log(length / turns, self.m.rotary_base) for turns in (32, 1))
                fast, slow = max(math.floor(fast), 0), min(math.ceil(slow), 2 * half - 1)
                kept = torch.tensor([min(max((slow - j) / (slow - fast), 0), 1) for j in range(half)]).double()
                frequency = frequency * kept + frequency / factor * (1 - kept)
            else:
                share = {"none": 0 * pairs, "linear": torch.ones(half).double(), "ntk": pairs / (half - 1)}
                frequency = frequency / factor ** share[self.m.rotary_scaling]
            angle = positions.double()[:, None] * frequency
            cos, sin = torch.cos(angle), torch.sin(angle)
        even = slice(0, None, 2) if self.m.rotary_interleaved else slice(0, half)
        odd = slice(1, None, 2) if self.m.rotary_interleaved else slice(half, None)
        out = torch.empty_like(x)
        out[:, even] = x[:, even] * cos - x[:, odd] * sin
        out[:, odd] = x[:, even] * sin + x[:, odd] * cos
        return out

    def ffn(self, number: int, x: Tensor) -> Tensor:
        """W2 (x1 * act(x2)) + b2 with [x1; x2] = W1 x + b1, or W2 act(W1 x + b1) + b2."""
        inner = self.linear(f"layers.{number}.mlp.dense_h_to_4h", x)
        width, kind = self.m.ffn_hidden_size, self.m.activation
        if kind in ("geglu", "swiglu"):
            linear, gate = inner[:, :width], inner[:, width:]
            inner = linear * (gelu(gate) if kind == "geglu" else gate / (1 + torch.exp(-gate)))
        elif kind == "gelu":
            inner = gelu(inner)
        else:
            inner = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        return self.linear(f"layers.{number}.mlp.dense_4h_to_h", inner)


def gelu(x: Tensor) -> Tensor:
    """x times the normal distribution function."""
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def shrunk(table: Tensor, alpha: float) -> Tensor:
    """GLM-130B's embedding-gradient shrink: E * alpha + E.detach() * (1 - alpha)."""
    return table * alpha + table.detach() * (1 - alpha)
