"""A model with a key-value cache: give it contexts, then token after token.

    decoder = Decoder(model, rows=2, slots=128)
    decoder.begin([context_a, context_b])            # contexts of any length, each seeing all of itself
    logits = decoder.step(tokens, positions)         # one token a row -> fp32 [rows, vocabulary]
    run = decoder.loop(choose, state)                # or: run() feeds what choose(logits) wrote to `tokens`

A step has the same shapes each time (tokens [rows, 1], the whole cache) and its tensors stay where they are, so on a
GPU it is captured once and replayed as one graph: launching some hundred small kernels would take longer than running
them. Tensor-parallel ranks call the same methods together and get the same logits; they run without a graph.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from train import backend
from train.model.build import Model
from train.model.cache import KeyValueCache

Result = TypeVar("Result")


class Decoder:
    """Rows of tokens that grow side by side."""

    def __init__(
        self, model: Model, rows: int, slots: int, *, compiled: bool = False, compiler: str = "inductor"
    ) -> None:
        """slots: tokens that a row can hold, context and all. compiled: run a step through torch.compile, whose
        backend is `compiler`."""
        assert model.head is not None
        self.model, self.head, self.rows = model, model.head, rows
        mesh = model.context.mesh
        self.device = mesh.device
        self.cache = KeyValueCache.empty(model, rows, slots)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=self.device)
        """Slots filled in each row."""
        self._sample_index = torch.zeros(rows, dtype=torch.int64, device=self.device)
        self.grows = torch.ones(rows, dtype=torch.int64, device=self.device)
        """1, or 0 for a row whose next token does not count: the one after it takes the same slot."""
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=self.device)
        """What the next step feeds, a token a row."""
        self.positions = torch.zeros(rows, 2, dtype=torch.int64, device=self.device)
        self._offsets = torch.tensor([1, 0], device=self.device)
        self._meta = torch.zeros(rows, 5, 1, dtype=torch.int32, device=self.device)
        self._captures = mesh.tensor == 1
        self._run: Callable[[], Tensor] | None = None
        self._forward: Callable[[Tensor, Tensor], Tensor] = self._logits
        if compiled:
            self._forward = torch.compile(self._logits, dynamic=False, fullgraph=True, backend=compiler)

    @torch.no_grad()
    def begin(self, contexts: Sequence[Sequence[int]], *, causal: bool = False) -> None:
        """Run the contexts, one a row. They see all of themselves, or with `causal` what precedes."""
        longest = max(1, *(len(context) for context in contexts))
        tokens = torch.zeros(self.rows, longest, dtype=torch.int64)
        for row, context in enumerate(contexts):
            tokens[row, : len(context)] = torch.tensor(context, dtype=torch.int64)
        lengths = torch.tensor([len(context) for context in contexts], dtype=torch.int64)
        place = torch.arange(longest).expand(self.rows, -1)
        upto = place + 1 if causal else lengths[:, None].expand(-1, longest)
        meta = torch.stack([place, torch.zeros_like(place), torch.zeros_like(place), upto, place], 1)
        with self.cache.attached():
            self.model((tokens.to(self.device), meta.to(self.device, torch.int32), self._sample_index))
        self.lengths.copy_(lengths)

    @torch.no_grad()
    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits of what follows one more token a row.

        tokens: int64 [rows]. positions: int64 [rows, 2], as a batch has them. Returns fp32 [rows, padded vocabulary],
        which the next step may write over.
        """
        self.tokens.copy_(tokens)
        self.positions.copy_(positions)
        if self._run is None:
            self._run = self._captured(self._advance, ())
        return self._run()

    @torch.no_grad()
    def loop(self, choose: Callable[[Tensor], None], state: Sequence[Tensor]) -> Callable[[], None]:
        """A function that feeds `tokens` and then calls choose(logits), which writes the next ones.

        choose: works on the device alone, on tensors that stay where they are; state: those of them that it changes.
        `positions` and `grows` may be some of these, put in the place of the decoder's own before.
        """
        return self._captured(lambda: choose(self._advance()), state)

    @torch.no_grad()
    def extend(self, tokens: Tensor, positions: Tensor) -> None:
        """Several more tokens a row, each seeing what precedes it. tokens: [rows, new], positions: [rows, 2, new]."""
        with self.cache.attached():
            place = self.lengths[:, None] + torch.arange(tokens.shape[1], device=self.device)
            here = torch.stack([torch.zeros_like(place), place + 1, place], 1)
            meta = torch.cat([positions.to(self.device), here], 1).to(torch.int32)
            self.model((tokens.to(self.device), meta, self._sample_index))
        self.lengths += tokens.shape[1]

    def cut(self, lengths: Tensor) -> None:
        """Forget the slots from `lengths`, int64 [rows], on."""
        self.lengths.copy_(lengths)

    def reorder(self, rows: Tensor) -> None:
        """Row i goes on from what row rows[i] holds; rows: int64 [rows]."""
        self.cache.reorder(rows)
        self.lengths.copy_(self.lengths[rows])

    def _captured(self, function: Callable[[], Result], state: Sequence[Tensor]) -> Callable[[], Result]:
        """`function`, as one graph where there are graphs; what it changes is as it was before."""
        if not self._captures:
            return function
        changed = (self.lengths, self.tokens, *state)
        kept = [tensor.clone() for tensor in changed]
        run = backend.capture(function)
        # Capturing ran it once.
        for tensor, old in zip(changed, kept, strict=True):
            tensor.copy_(old)
        return run

    @torch.no_grad()
    def _advance(self) -> Tensor:
        # As the layers want it, so that none of them has to convert: positions, from slot 0, up to its own.
        self._meta[:, :2, 0] = self.positions
        torch.add(self.lengths[:, None], self._offsets, out=self._meta[:, 3:, 0])
        with self.cache.attached():
            logits = self._forward(self.tokens[:, None], self._meta)
        self.lengths += self.grows
        return logits

    def _logits(self, tokens: Tensor, meta: Tensor) -> Tensor:
        hidden = self.model((tokens, meta, self._sample_index))
        return self.head.logits(hidden[:, -1])
