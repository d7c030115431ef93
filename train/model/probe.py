"""What the layers show of themselves in a measured step: mean squares of activations, and the largest attention logits.

Off except in the steps that `train.stability` measures, and then sums on the device: nothing waits.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

SITES = ("attention", "ffn", "norms")
"""Places in a layer: the outputs of the two branches before their biases, and what the layer hands on."""


class Probe:
    """Counters of one stage, in the order of the whole model's places: embedding, three a layer, head."""

    def __init__(self, num_layers: int, device: torch.device) -> None:
        self.num_layers = num_layers
        self.active = False
        layers = [f"layers.{layer}.{site}" for layer in range(num_layers) for site in SITES]
        self.places = ["embedding", *layers, "head"]
        self._place = {name: number for number, name in enumerate(self.places)}
        self.sums = torch.zeros(2, len(self.places), dtype=torch.float64, device=device)
        """Mean squares added up over micro-batches, and how many there were."""
        self.max_logits = torch.full((num_layers,), -torch.inf, dtype=torch.float32, device=device)

    def start(self) -> None:
        """Measure from now on, from nothing."""
        self.active = True
        self.sums.zero_()
        self.max_logits.fill_(-torch.inf)

    @contextlib.contextmanager
    def unseen(self) -> Iterator[None]:
        """What the layers show meanwhile is taken back."""
        before = self.sums.clone(), self.max_logits.clone()
        yield
        self.sums.copy_(before[0])
        self.max_logits.copy_(before[1])

    def note(self, name: str, x: Tensor) -> None:
        """One micro-batch's activations at one of `places`. Recomputed ones count twice, in sum and number alike."""
        if self.active:
            place = self._place[name]
            norm = torch.linalg.vector_norm(x.detach(), dtype=torch.float32).double()
            self.sums[0, place] += norm.square() / x.numel()
            self.sums[1, place] += 1.0

    def note_logits(self, layer: int, max_logit: Tensor | None) -> None:
        """The largest visible logit of each head, float32 [heads]."""
        if self.active and max_logit is not None:
            torch.maximum(self.max_logits[layer], max_logit.amax(), out=self.max_logits[layer])
