"""Faults planted on purpose, at an address: a step, a range of samples, one bit of one element of one parameter."""

import struct
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from data_prep.batch import Batch
from data_prep.order import mix
from train.fragments import Fragment
from train.model.parameters import Layout
from train.stability.config import StressConfig

NGRAM = 4
"""Pieces that a sample poisoned by `repeat` says over and over."""


def lr_factor(stress: StressConfig, step: int) -> float:
    """What the learning rate of a step is multiplied by."""
    return stress.lr_factor if stress.lr_steps and stress.lr_steps[0] <= step <= stress.lr_steps[1] else 1.0


def poisoned(batch: Batch, stress: StressConfig, seed: int, pieces: int) -> Batch:
    """The batch with the text of the samples in stress.poison_samples replaced, tokens and targets alike.

    Specials (ids from `pieces` on) and the shape of the sample stay. Garbage is drawn by (seed, sample index), so that
    every stage and rank sees the same.
    """
    if not stress.poison_samples:
        return batch
    first, end = stress.poison_samples
    hit = [row for row, index in enumerate(batch.sample_index.tolist()) if first <= index < end]
    if not hit:
        return batch
    tokens, targets = batch.tokens.clone(), batch.targets.clone()
    for row in hit:
        index = int(batch.sample_index[row])
        for place, side in enumerate((tokens, targets)):
            text = side[row] < pieces
            size = int(text.sum())
            if stress.poison == "garbage":
                generator = np.random.Generator(np.random.Philox(key=mix(seed, index, place)))
                words = torch.from_numpy(generator.integers(0, pieces, size))
            else:
                words = tokens[row][tokens[row] < pieces][:NGRAM].repeat(size // NGRAM + 1)[:size]
            side[row, text] = words
    return replace(batch, tokens=tokens, targets=targets)


def flip(stress: StressConfig, fragments: Sequence[Fragment], gradients: Sequence[Tensor]) -> None:
    """Flip one bit of a weight's fp32 master, or of a gradient, on every rank that holds the element."""
    for one, gradient in zip(fragments, gradients, strict=True):
        if one.layout.name != stress.flip_parameter:
            continue
        place = local_index(one.layout, stress.flip_index)
        if place is not None and one.start <= place < one.start + one.master.numel():
            target = one.master if stress.flip == "weight" else gradient
            target[place - one.start] = flipped(float(target[place - one.start]), stress.flip_bit)


def flipped(value: float, bit: int) -> float:
    """The fp32 number with one bit the other way round."""
    (word,) = struct.unpack("<I", struct.pack("<f", value))
    (changed,) = struct.unpack("<f", struct.pack("<I", word ^ (1 << bit)))
    return float(changed)


def local_index(layout: Layout, index: int) -> int | None:
    """Where element `index` of the flattened full tensor lies in this rank's flattened shard; None if not here."""
    place = list(np.unravel_index(index, layout.full_shape))
    if layout.dim is not None:
        offset = 0
        for start, stop in layout.blocks:
            if start <= place[layout.dim] < stop:
                place[layout.dim] = np.intp(offset + place[layout.dim] - start)
                break
            offset += stop - start
        else:
            return None
    return int(np.ravel_multi_index(tuple(place), layout.local_shape))
