"""Tiankong's GLM models for transformers: `AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)`.

Every variant of norm placement, norm, positions, activation, heads and biases; plain PyTorch, no other code needed.

A blank-infilling prompt is a text with masks, then sop: everything before the first sop is the context and sees all of
itself; what follows sees the context and what was written before. Each sop opens the next mask's blank. Positions and
visibility are read off the token ids, so `generate` needs nothing but them:

    ids = tokenizer("今天天气[MASK]，我们去公园。", return_tensors="pt")     # the tokenizer appends sop
    print(tokenizer.decode(model.generate(**ids, max_new_tokens=32)[0]))

Causal models (`objective: causal`) see the past only and count positions from 0.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class TiankongConfig(PreTrainedConfig):
    """The model's shape: the fields of Tiankong's own model config, plus the ids of the special tokens."""

    model_type = "tiankong"
    keys_to_ignore_at_inference = ["past_key_values"]


class Norm(nn.Module):
    """LayerNorm or RMSNorm, computed in float32."""

    def __init__(self, config):
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(config.hidden_size)) if config.norm == "layernorm" else None

    def forward(self, x):
        width, inner = x.shape[-1:], x.float()
        if self.bias is not None:
            return F.layer_norm(inner, width, self.weight.float(), self.bias.float(), self.eps).to(x.dtype)
        return F.rms_norm(inner, width, self.weight.float(), self.eps).to(x.dtype)


def rotate(x, positions, config):
    """Rotary positions on x [batch, slots, heads, dim]; positions int64 [batch, 2, slots]."""
    axes = {"rotary_1d": 1, "rotary_2d": 2}.get(config.positions, 0)
    if not axes:
        return x
    rotated = round(x.shape[-1] * config.rotary_fraction)
    dims = rotated // axes
    scaling = getattr(config, "rotary_scaling", "none")  # as train/model/context.py has it
    factor = 1.0 if scaling == "none" else config.rotary_scaling_factor
    base = config.rotary_base * (factor ** (dims / (dims - 2)) if scaling == "ntk" else 1.0)
    inverse = base ** -(torch.arange(0, dims, 2, dtype=torch.float32, device=x.device) / dims)
    if scaling == "linear":
        inverse = inverse / factor
    if scaling == "yarn":
        at = [
            dims * math.log(config.rotary_original_positions / (2 * math.pi * n)) / (2 * math.log(base))
            for n in (32, 1)
        ]
        first, last = max(math.floor(at[0]), 0), min(math.ceil(at[1]), dims - 1)
        pair = torch.arange(dims // 2, dtype=torch.float32, device=x.device)
        share = ((pair - first) / (max(last, first + 1e-3) - first)).clamp(0, 1)
        inverse = inverse * (1 - share) + inverse / factor * share
    place = positions[:, :axes].transpose(1, 2)[:, :, None, :, None]  # [batch, slots, 1, axes, 1]
    if config.rotary_fp16_angles:  # as GLM-130B's released code
        angle = place.half() * inverse.half()
    else:
        angle = place.float() * inverse
    cos, sin = angle.cos().float(), angle.sin().float()
    turned = x[..., :rotated].float()
    if config.rotary_interleaved:
        a, b = turned.unflatten(-1, (axes, -1, 2)).unbind(-1)
        out = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-3)
    else:
        a, b = turned.unflatten(-1, (axes, 2, -1)).unbind(-2)
        out = torch.stack((a * cos - b * sin, b * cos + a * sin), -2).flatten(-3)
    return torch.cat((out.to(x.dtype), x[..., rotated:]), -1)


class Attention(nn.Module):
    """Multi-head: packed rows per head (q, k, v). Grouped: queries, and rows per group (k, v)."""

    def __init__(self, config, index):
        super().__init__()
        self.config, self.index = config, index
        self.heads = config.num_heads
        self.groups = config.num_kv_heads or config.num_heads
        self.dim = config.head_dim or config.hidden_size // config.num_heads
        bias = config.bias in ("all", "qkv")
        if self.groups == self.heads:
            self.query_key_value = nn.Linear(config.hidden_size, 3 * self.heads * self.dim, bias=bias)
        else:
            self.query = nn.Linear(config.hidden_size, self.heads * self.dim, bias=bias)
            self.key_value = nn.Linear(config.hidden_size, 2 * self.groups * self.dim, bias=bias)
        yarn = getattr(config, "rotary_scaling", "none") == "yarn"
        sharper = 0.1 * math.log(config.rotary_scaling_factor) + 1 if yarn else 1.0
        self.scale = self.dim**-0.5 * sharper**2
        self.dense = nn.Linear(self.heads * self.dim, config.hidden_size, bias=config.bias == "all")

    def forward(self, x, positions, visible, cache):
        if self.groups == self.heads:
            query, key, value = self.query_key_value(x).unflatten(-1, (self.heads, 3, self.dim)).unbind(3)
        else:
            query = self.query(x).unflatten(-1, (self.heads, self.dim))
            key, value = self.key_value(x).unflatten(-1, (self.groups, 2, self.dim)).unbind(3)
        query, key = rotate(query, positions, self.config), rotate(key, positions, self.config)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        if cache is not None:
            key, value = cache.update(key, value, self.index)
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=visible[..., : key.shape[2]],
            scale=self.scale,
            enable_gqa=self.groups != self.heads,
        )
        return self.dense(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """W2 (linear * act(gate)) with [linear; gate] = W1 x, or W2 act(W1 x)."""

    def __init__(self, config):
        super().__init__()
        self.activation = config.activation
        self.gated = config.activation in ("geglu", "swiglu")
        inner, bias = config.ffn_hidden_size, config.bias == "all"
        self.dense_h_to_4h = nn.Linear(config.hidden_size, inner * (2 if self.gated else 1), bias=bias)
        self.dense_4h_to_h = nn.Linear(inner, config.hidden_size, bias=bias)

    def forward(self, x):
        x = self.dense_h_to_4h(x)
        if self.gated:
            linear, gate = x.chunk(2, -1)
            x = linear * (F.silu(gate) if self.activation == "swiglu" else F.gelu(gate))
        else:
            x = F.gelu(x, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        return self.dense_4h_to_h(x)


class Layer(nn.Module):
    """deepnorm and post add a branch to the norm's output, times alpha; pre and sandwich to the raw stream."""

    def __init__(self, config, index):
        super().__init__()
        self.post = config.norm_placement in ("deepnorm", "post")
        self.alpha = 1.0
        if config.norm_placement == "deepnorm":
            self.alpha = config.deepnorm_alpha or math.sqrt(2 * config.num_layers)
        self.input_norm = Norm(config)
        self.attention = Attention(config, index)
        self.post_attention_norm = Norm(config)
        self.mlp = FeedForward(config)
        if config.norm_placement == "sandwich":
            self.attention_output_norm = Norm(config)
            self.mlp_output_norm = Norm(config)
        self.sandwich = config.norm_placement == "sandwich"

    def forward(self, x, positions, visible, cache):
        normed = self.input_norm(x)
        branch = self.attention(normed, positions, visible, cache)
        if self.sandwich:
            branch = self.attention_output_norm(branch)
        x = self.alpha * normed + branch if self.post else x + branch
        normed = self.post_attention_norm(x)
        branch = self.mlp(normed)
        if self.sandwich:
            branch = self.mlp_output_norm(branch)
        return self.alpha * normed + branch if self.post else x + branch


class TiankongForCausalLM(PreTrainedModel, GenerationMixin):
    """The model and its head; `forward` and `generate` as every causal language model of transformers."""

    config_class = TiankongConfig
    _supports_sdpa = True
    _no_split_modules = ["Layer"]

    def __init__(self, config):
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.hidden_size)
        if config.positions == "learned_2d":
            self.position_embeddings = nn.Embedding(config.max_positions + 1, config.hidden_size)
            self.block_position_embeddings = nn.Embedding(config.max_positions + 1, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_layers))
        self.final_norm = Norm(config)
        if not config.tied_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.word_embeddings

    def get_output_embeddings(self):
        return None if self.config.tied_embeddings else self.lm_head

    def layout(self, input_ids, attention_mask=None):
        """Positions [batch, 2, slots], first and end of the visible slots [batch, slots] of whole sequences."""
        config, (batch, slots) = self.config, input_ids.shape
        device = input_ids.device
        place = torch.arange(slots, device=device).expand(batch, slots)
        seen = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, :slots].long()
        first = seen.argmax(-1, keepdim=True)
        end = first + seen.sum(-1, keepdim=True)
        positions = (place - first).clamp(min=0)
        if config.objective == "causal":
            return torch.stack((positions, torch.zeros_like(positions)), 1), first.expand_as(place), place + 1
        opens = input_ids == config.sop_token_id
        blank = opens.long().cumsum(-1)  # 0 in the context, k in the k-th blank
        context = ((blank == 0) & (place < end)).sum(-1, keepdim=True).clamp(max=slots)
        began = torch.where(opens, place, 0).cummax(-1).values
        written = place - began
        spots = torch.stack([positions, torch.zeros_like(positions)], 1)
        masks = torch.tensor([config.mask_token_id, config.smask_token_id, config.gmask_token_id], device=device)
        planar = config.positions in ("rotary_2d", "learned_2d")
        for row in range(batch):
            inside = blank[row] > 0
            found = (torch.isin(input_ids[row], masks) & (place[row] < context[row])).nonzero().flatten()
            if not len(found):
                found = context[row] - 1
            mask = found[(blank[row] - 1).clamp(0, len(found) - 1)]
            endless = (input_ids[row][mask] == config.gmask_token_id) & (not planar)
            at = torch.where(endless, context[row] - first[row] + written[row], mask - first[row])
            spots[row, 0] = torch.where(inside, at, positions[row])
            if planar:
                spots[row, 1] = torch.where(inside, written[row] + 1, 0)
        return spots, first.expand_as(place), torch.where(blank == 0, context, place + 1)

    def forward(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        attend_from=None,
        attend_to=None,
        past_key_values=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        **_,
    ):
        """input_ids [batch, slots] behind what the cache holds.

        position_ids [batch, 2, slots], attend_from and attend_to [batch, slots]: a slot sees the keys [from, to); left
        out, they are read off the ids, which must then be whole sequences. labels: as input_ids, −100 where none.
        """
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if attend_to is None:
            if past:
                raise ValueError("with a cache, give position_ids, attend_from and attend_to; generate() does")
            position_ids, attend_from, attend_to = self.layout(input_ids, attention_mask)
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache(config=self.config)
        length = past + input_ids.shape[1]
        if past_key_values is not None and past_key_values.is_compileable:
            length = max(length, past_key_values.get_max_cache_shape())
        keys = torch.arange(length, device=input_ids.device)
        own = torch.arange(past, past + input_ids.shape[1], device=input_ids.device)
        visible = (keys >= attend_from[..., None]) & (keys < attend_to[..., None])
        visible = (visible | (keys == own[:, None]))[:, None]  # padding sees itself
        x = self.word_embeddings(input_ids)
        if self.config.positions == "learned_2d":
            x = x + self.position_embeddings(position_ids[:, 0]) + self.block_position_embeddings(position_ids[:, 1])
        for layer in self.layers:
            x = layer(x, position_ids, visible, past_key_values)
        x = self.final_norm(x)
        if logits_to_keep:
            x = x[:, -logits_to_keep:]
        head = self.word_embeddings if self.config.tied_embeddings else self.lm_head
        logits = F.linear(x, head.weight).float()
        if self.config.softcap:
            logits = self.config.softcap * torch.tanh(logits / self.config.softcap)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, attention_mask=None, **_):
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        positions, attend_from, attend_to = self.layout(input_ids, attention_mask)
        return {
            "input_ids": input_ids[:, past:],
            "position_ids": positions[..., past:],
            "attend_from": attend_from[:, past:],
            "attend_to": attend_to[:, past:],
            "past_key_values": past_key_values,
            "use_cache": past_key_values is not None,
            "logits_to_keep": 1,
        }
