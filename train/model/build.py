"""The list of layers, which part of it a stage holds, and the choice of kernels."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from data_prep.errors import ConfigError
from kernels.resolve import TABLE, KernelError, choose, resolve
from train.arithmetic import layers_per_stage
from train.config import Config
from train.labels import Labels
from train.mesh import Mesh
from train.model.context import Context, Operations, State
from train.model.ends import Embedding, Head
from train.model.layers import PostNormLayer, PreNormLayer
from train.model.lora import add_lora
from train.model.parameters import Layout, layout_of
from train.model.prefix import is_prefix
from train.model.probe import Probe
from train.scatter import Scatter

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""`precision.dtype` as torch has it."""


def stage_bounds(num_layers: int, stages: int, cut: Sequence[int] = ()) -> list[int]:
    """Where each stage starts in the list [embedding, layers…, head], and the list's end.

    cut: parallel.layers_per_stage.
    """
    sizes = layers_per_stage(num_layers, stages, cut)
    sizes[0] += 1
    sizes[-1] += 1
    return [0, *itertools.accumulate(sizes)]


def operations(config: Config, device: torch.device, dtype: torch.dtype) -> Operations:
    """Each operation's implementation. Raises ConfigError naming the key of one that cannot run here."""
    kernels, model = config.kernels, config.model
    norm = {"dropout"} if model.hidden_dropout else set()
    norm |= {"return_sum"} if model.norm_placement in ("pre", "sandwich", "peri") else set()
    attention = {"dropout"} if model.attention_dropout else set()
    attention |= {"half_softmax"} if config.stability.softmax in ("half", "pb_relax") else set()
    attention |= {"pb_relax"} if config.stability.softmax == "pb_relax" else set()
    attention |= {"prefix"} if config.prefix.length else set()
    head = {"tensor_parallel"} if config.parallel.tensor_parallel > 1 else set()
    head |= {"z_loss"} if config.loss.z_loss else set()
    head |= {"softcap"} if config.loss.softcap else set()
    try:
        chosen = choose("interval_attention", kernels.interval_attention, device, dtype, attention)
        return Operations(
            residual_norm=resolve("residual_norm", kernels.residual_norm, device, dtype, norm),
            bias_activation=resolve("bias_activation", kernels.bias_activation, device, dtype),
            rotary=resolve("rotary", kernels.rotary, device, dtype),
            attention=resolve("interval_attention", kernels.interval_attention, device, dtype, attention),
            linear_cross_entropy=resolve("linear_cross_entropy", kernels.linear_cross_entropy, device, dtype, head),
            embedding=resolve("embedding", kernels.embedding, device, dtype),
            fp8_product=resolve("fp8_product", kernels.fp8_product, device, dtype) if config.precision.fp8 else None,
            greedy_step=resolve("greedy_step", kernels.greedy_step, device, dtype),
            # It has no prefix, and its softmax is float32: generation must compute what training did.
            decode_attention=None
            if {"half_softmax", "pb_relax", "prefix"} & attention
            else resolve("decode_attention", kernels.decode_attention, device, dtype),
            # Telemetry takes the logit where it is to be had; it never decides which kernel runs.
            max_logit="max_logit" in TABLE["interval_attention"].implementations[chosen].features,
        )
    except KernelError as error:
        raise ConfigError(str(error)) from error


class Model(nn.Module):
    """The layers that this stage holds, run one after the other.

    In one stage that is all of them: `forward` takes (tokens, meta, sample_index) and returns the normalised hidden
    states, `head.loss` or `head.logits` goes on from there.
    """

    def __init__(self, config: Config, mesh: Mesh, dtype: torch.dtype) -> None:
        super().__init__()
        self.context = Context(
            model=config.model,
            mesh=mesh,
            ops=operations(config, mesh.device, dtype),
            seed=config.seed,
            probe=Probe(config.model.num_layers, mesh.device),
            softmax=config.stability.softmax,
            pb_relax_alpha=config.stability.pb_relax_alpha,
            query_key_gain=config.stability.stress.query_key_gain,
            z_loss=config.loss.z_loss,
            softcap=config.loss.softcap,
            prefix=config.prefix.length,
            recompute=config.parallel.activation_checkpointing,
            recompute_every=config.parallel.activation_checkpointing_every_layers,
            sequence_parallel=config.parallel.sequence_parallel and mesh.tensor > 1,
            overlap_tensor=config.parallel.overlap_tensor and mesh.tensor > 1,
            starts_with_enc=config.data.sampling.starts_with_enc,
        )
        bounds = stage_bounds(config.model.num_layers, mesh.pipeline, config.parallel.layers_per_stage)
        self.start, self.stop = bounds[mesh.stage], bounds[mesh.stage + 1]
        self.embedding: Embedding | None = None
        self.head: Head | None = None
        self.flags: Tensor | None = None
        self.graphs: Callable[[Callable[[State], State], State], State] | None = None
        """Runs the layers by graphs while training, where the engine put it (`train.layer_graphs`)."""
        self.scatter: Scatter | None = None
        """Told how far a backward pass has come, where the engine put it."""
        self.items = nn.ModuleList(self._item(index) for index in range(self.start, self.stop))
        if config.lora.rank:
            add_lora(self, self.context, config.lora)
        if config.prefix.length:
            for layout, parameter in named_layouts(self.parameters()):
                parameter.requires_grad_(is_prefix(layout.name))

    def _item(self, index: int) -> nn.Module:
        """Item `index` of the whole list; the layers stand at 1 … num_layers."""
        context = self.context
        if index == 0:
            self.embedding = Embedding(context)
            return self.embedding
        if index == context.model.num_layers + 1:
            tied = self.embedding.weight if self.embedding is not None and context.model.tied_embeddings else None
            self.head = Head(context, tied)
            return self.head
        return (PostNormLayer if context.post_norm else PreNormLayer)(context, index - 1)

    def forward(self, state: State, labels: Labels | None = None) -> Any:
        """This stage's part of the model.

        Returns a State, or on the last stage the head's hidden states [B,S,H], or with labels the head's loss triple.
        """
        whole = len(self.items)
        if self.graphs is None or not self.training:
            return self._run(0, whole, state, labels)
        state = self._run(0, 1, state)
        state = self.graphs(lambda state: self._run(1, whole - 1, state), state)
        return self._run(whole - 1, whole, state, labels)

    def _run(self, first: int, last: int, state: State, labels: Labels | None = None) -> Any:
        """Items [first, last) one after the other."""
        for position, item in enumerate(self.items[first:last], first):
            # Apart, not as one tuple: ZeRO-3 hangs its gather and release on tensors that are arguments themselves.
            state = item(*state) if item is not self.head else item(*state, labels)
            if self.flags is not None:
                self._watch(position, state)
        return state

    def watch(self) -> Tensor:
        """From now on count non-finite outputs and gradients of outputs, item by item.

        Returns the counters, int32 [2, items] on the device. One sum an item, no wait: what tells afterwards in which
        layer a run first went wrong.
        """
        self.flags = torch.zeros(2, len(self.items), dtype=torch.int32, device=self.context.mesh.device)
        return self.flags

    def _watch(self, position: int, state: Any) -> None:
        first = state[0] if isinstance(state, tuple) else state
        self._count(0, position, first.detach())
        if first.requires_grad:
            first.register_hook(lambda gradient: self._returned(position, gradient))

    def _returned(self, position: int, gradient: Tensor) -> None:
        # Without `watch` nothing tells the scatter, and all goes at the end.
        self._count(1, position, gradient)
        if self.scatter is not None:
            self.scatter.passed(position)

    def _count(self, row: int, position: int, values: Tensor) -> None:
        assert self.flags is not None
        self.flags[row, position] += ~values.sum(dtype=torch.float32).isfinite()

    def item_name(self, position: int) -> str:
        """Name of the stage's item at a position, for messages: `embedding`, `layers.3`, `head`."""
        index = self.start + position
        last = self.context.model.num_layers + 1
        return {0: "embedding", last: "head"}.get(index, f"layers.{index - 1}")

    def set_shrink(self, lookup: float, head: float) -> None:
        """EGS alpha of the coming step, at the lookup and at the tied logits."""
        if self.embedding is not None:
            self.embedding.shrink = lookup
        if self.head is not None:
            self.head.shrink = head

    def tied_weight(self) -> nn.Parameter | None:
        """This stage's copy of a table that lives on two stages, or None."""
        if not self.context.model.tied_embeddings or self.context.mesh.pipeline == 1:
            return None
        end = self.embedding or self.head
        return None if end is None else end.weight


def named_layouts(parameters: Iterable[nn.Parameter]) -> Iterator[tuple[Layout, nn.Parameter]]:
    """Each parameter once, with its layout."""
    seen: set[int] = set()
    for parameter in parameters:
        if id(parameter) not in seen:
            seen.add(id(parameter))
            yield layout_of(parameter), parameter
