"""Both ends of the list: the embedding with what precedes the first layer, and the head with its loss.

Both are divided over the vocabulary among the tensor-parallel ranks. Where they share their table (`tied_embeddings`)
they share one parameter in one process; on different pipeline stages each holds a copy, drawn by the same address, and
the engine sums their gradients.
"""

import torch
from torch import Tensor, nn

from data_prep.batch import NUM_GROUPS
from kernels.random import drop_hidden
from train.labels import Labels
from train.model.context import Context, Norm, State, Stream, intervals
from train.model.parameters import Layout
from train.model.tensor_parallel import gather_for_all, sum_over_ranks

EMBEDDING = "word_embeddings.weight"


class Embedding(nn.Module):
    """Token lookup (with EGS), learned positions and a norm where the model has them, dropout, layer 0's input norm."""

    def __init__(self, context: Context) -> None:
        super().__init__()
        self.context = context
        model = context.model
        shape = (model.padded_vocab_size, model.hidden_size)
        self.weight = context.matrix(context.cut(EMBEDDING, shape, 0), context.std(*shape, branch=False))
        self.learned = model.positions == "learned_2d"
        if self.learned:
            # One row more than positions: GLM numbers blocks from 1 and keeps 0 for the context.
            table = (model.max_positions + 1, model.hidden_size)
            std = context.std(*table, branch=False)
            self.position_weight = context.matrix(Layout("position_embeddings.weight", table), std)
            self.block_weight = context.matrix(Layout("block_position_embeddings.weight", table), std)
        self.embedding_norm = Norm(context, "embedding_norm") if context.embedding_norm else None
        self.input_norm = Norm(context, "layers.0.input_norm") if context.post_norm else None
        self.shrink = 1.0
        """EGS alpha of the current step; the engine sets it."""

    def forward(self, tokens: Tensor, meta: Tensor, sample_index: Tensor) -> State:
        """tokens int64 [B,S], meta, sample_index -> (hidden [B,S,H], meta, sample_index)."""
        context, mesh = self.context, self.context.mesh
        start = None if mesh.tensor == 1 else mesh.tensor_rank * self.weight.shape[0]
        hidden = context.ops.embedding(tokens, self.weight, shrink=self.shrink, vocab_start=start)
        hidden = sum_over_ranks(hidden, mesh.tensor_group, sequence=context.sequence_parallel)
        if self.learned:
            positions, _, _ = intervals(meta)
            if context.sequence_parallel:
                positions = positions.chunk(mesh.tensor, 2)[mesh.tensor_rank]
            for row, table in enumerate(context.replicated(self.position_weight, self.block_weight)):
                hidden = hidden + nn.functional.embedding(positions[:, row].long(), table)
        context.probe.note("embedding", hidden)
        if self.embedding_norm is not None:
            hidden = self.embedding_norm(hidden)
        dropout = context.hidden_dropout(self, 0, "embedding", hidden, sample_index)
        hidden = drop_hidden(hidden, dropout)
        if self.input_norm is not None:
            hidden = self.input_norm(hidden)
        return hidden, meta, sample_index


class Head(nn.Module):
    """The final norm of pre-norm models, and the product with the (tied) table."""

    def __init__(self, context: Context, tied: nn.Parameter | None = None) -> None:
        """tied: the embedding's parameter where it lives in this process too."""
        super().__init__()
        self.context = context
        model = context.model
        shape = (model.padded_vocab_size, model.hidden_size)
        name = EMBEDDING if model.tied_embeddings else "lm_head.weight"
        if tied is None:
            self.weight = context.matrix(context.cut(name, shape, 0), context.std(*shape, branch=False))
        else:
            self.weight = tied
        self.final_norm = None if context.post_norm else Norm(context, "final_norm")
        self.shrink = 1.0
        """EGS alpha at the tied logits; the engine sets it."""

    def forward(
        self, state: Tensor | Stream, meta: Tensor, sample_index: Tensor, labels: Labels | None = None
    ) -> "Tensor | tuple[Tensor, Tensor, Tensor]":
        """A `State`'s parts -> normalised hidden [B,S,H], or with labels what `loss` returns."""
        hidden: Tensor
        if isinstance(state, Stream):
            assert self.final_norm is not None
            hidden = self.final_norm.after(*state)
        else:
            hidden = state if self.final_norm is None else self.final_norm(state)
        if self.context.sequence_parallel:
            hidden = gather_for_all(hidden, self.context.mesh.tensor_group)
        return hidden if labels is None else self.loss(hidden, labels)

    def loss(self, hidden: Tensor, labels: Labels) -> tuple[Tensor, Tensor, Tensor]:
        """Cross entropy of the target rows only.

        hidden: [B,S,H] from `forward` without labels. Returns (sum of loss_weight * cross entropy, z-loss, group sums
        float64 [NUM_GROUPS, 2] of cross entropy and targets), each whole on every tensor-parallel rank.
        """
        context = self.context
        rows = hidden.flatten(0, 1).index_select(0, labels.rows)
        context.probe.note("head", hidden)
        loss, z_loss, sums = context.ops.linear_cross_entropy(
            rows,
            self.weight,
            labels.targets,
            labels.loss_weight,
            groups=labels.groups,
            num_groups=NUM_GROUPS,
            tp_group=context.mesh.tensor_group,
            z_loss=context.z_loss,
            softcap=context.softcap,
            weight_shrink=self.shrink,
        )
        return loss, z_loss, sums

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits over the whole padded vocabulary, [..., V], on every tensor-parallel rank; no gradient."""
        with torch.no_grad():
            part = nn.functional.linear(hidden, self.weight).float()
            if self.context.softcap:
                part = self.context.softcap * torch.tanh(part / self.context.softcap)
            if self.context.mesh.tensor_group is None:
                return part
            parts = [torch.empty_like(part) for _ in range(self.context.mesh.tensor)]
            torch.distributed.all_gather(parts, part.contiguous(), group=self.context.mesh.tensor_group)
            return torch.cat(parts, -1)
