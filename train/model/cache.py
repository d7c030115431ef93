"""Keys and values of earlier slots, so that new tokens run alone.

The buffers have a fixed size and every token says which slot it takes, so that a decoding step has static shapes: it
can be compiled once, or captured as a CUDA graph. Intervals go on meaning what they mean in training, now over the
slots of the buffer: a query sees the keys [attend_from, attend_to). What lies behind attend_to is never seen, so a slot
that held padding may be taken by a later token.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from train.model.build import Model
from train.model.layers import Attention
from train.model.prefix import before


class LayerCache:
    """One layer's buffers, [rows, slots, kv heads, head dim] each, in the compute dtype.

    A learnt prefix stands in front of the slots, in every row, and is counted by none of the numbers given here.
    """

    def __init__(self, rows: int, slots: int, prefix: tuple[Tensor, Tensor] | None = None) -> None:
        """prefix: its keys and values, [length, kv heads, head dim] each."""
        self.rows, self.slots, self.prefix = rows, slots, prefix
        self._front = 0 if prefix is None else len(prefix[0])
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def extend(self, key: Tensor, value: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values, [rows, new, kv heads, dim], at the slots `place`, ints [rows, new].

        Returns the whole buffers.
        """
        keys, values = self.buffers(key, value)
        row = torch.arange(self.rows, device=place.device)[:, None]
        keys[row, place + self._front] = key
        values[row, place + self._front] = value
        return keys, values

    def buffers(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The whole buffers, made at the first call, when the heads on this rank are known; key, value as `extend`."""
        if self.keys is None or self.values is None:
            empty = [part.new_zeros(self.rows, self.slots, *part.shape[2:]) for part in (key, value)]
            self.keys, self.values = empty if self.prefix is None else before(self.prefix, *empty)
            for buffer in (self.keys, self.values):
                # CUDA graphs read and write the same memory at every step.
                torch._dynamo.mark_static_address(buffer)
        return self.keys, self.values

    def spread(self, rows: Tensor, places: Tensor) -> "LayerCache":
        """Another cache that holds copies of slots of this one: row i, slot j is (rows[i], places[i, j])."""
        assert self.keys is not None
        assert self.values is not None
        other = LayerCache(places.shape[0], places.shape[1], self.prefix)
        front = torch.arange(self._front, device=places.device).expand(len(places), -1)
        places = torch.cat([front, places + self._front], 1)
        other.keys, other.values = self.keys[rows[:, None], places], self.values[rows[:, None], places]
        return other

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes what row rows[i] was, in place; rows: int64 [rows]."""
        for buffer in (self.keys, self.values):
            if buffer is not None:
                buffer.copy_(buffer.index_select(0, rows))


class KeyValueCache:
    """The buffers of all layers of a model on one device.

    Inside `attached` the model stores and reads them: its meta then has a fifth row, the slot of each token.
    """

    def __init__(self, attentions: list[Attention], layers: list[LayerCache]) -> None:
        self._attentions, self.layers = attentions, layers

    @staticmethod
    def empty(model: Model, rows: int, slots: int) -> "KeyValueCache":
        """A cache in which nothing is stored yet."""
        attentions = [module for module in model.modules() if isinstance(module, Attention)]
        with torch.no_grad():
            prefixes = [attention.prefix_parts() for attention in attentions]
        return KeyValueCache(attentions, [LayerCache(rows, slots, prefix) for prefix in prefixes])

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The model's attention runs over this cache."""
        for attention, layer in zip(self._attentions, self.layers, strict=True):
            attention.cache = layer
        try:
            yield
        finally:
            for attention in self._attentions:
                attention.cache = None

    def spread(self, rows: Tensor, places: Tensor) -> "KeyValueCache":
        """A cache of copied slots: row i, slot j is this one's (rows[i], places[i, j]); int64 [n], [n, slots]."""
        return KeyValueCache(self._attentions, [layer.spread(rows, places) for layer in self.layers])

    def reorder(self, rows: Tensor) -> None:
        """Row i of every layer becomes what row rows[i] was."""
        for layer in self.layers:
            layer.reorder(rows)
