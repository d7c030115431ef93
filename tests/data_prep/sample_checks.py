"""Takes a sample apart without the code that made it: what it hides, and what it should be."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from data_prep.batch import Sample
from data_prep.tokenizer import Tokenizer


@dataclass
class Taken:
    """One segment taken apart."""

    text: NDArray[np.int64]
    """The text with the blanks filled in."""
    spans: list[tuple[int, int]]
    """(place of the first hidden token in the text, length) in the order of the text."""
    slots: int
    generated_order: list[int]
    """Rank of each generated block's blank in the text."""


def take_apart(sample: Sample, tokenizer: Tokenizer, two_dimensional: bool = False) -> list[Taken]:
    """Segments of a blank-infilling sample. Fails where intervals, positions, targets or weights are wrong."""
    size = len(sample.tokens)
    is_target = sample.loss_weight > 0
    assert (sample.targets[~is_target] == 0).all()
    masks = {tokenizer.mask, tokenizer.smask}
    result = []
    begin = 0
    while begin < size:
        assert sample.attend_from[begin] == begin
        context_end = int(sample.attend_to[begin])
        inside = np.flatnonzero(sample.attend_from == begin)
        end = int(inside[-1]) + 1
        assert len(inside) == end - begin
        if not is_target[begin:end].any():
            # padding: every slot sees itself only
            assert end == begin + 1
            assert context_end == begin + 1
            begin = end
            continue
        assert (sample.attend_to[begin:context_end] == context_end).all()
        assert (sample.attend_to[context_end:end] == np.arange(context_end, end) + 1).all()
        assert not is_target[begin:context_end].any()
        assert is_target[context_end:end].all()
        tokens, targets = sample.tokens[begin:end], sample.targets[begin:end]
        first, second = sample.positions[0, begin:end], sample.positions[1, begin:end]
        context = tokens[: context_end - begin]
        assert (first[: len(context)] == np.arange(len(context))).all()
        assert (second[: len(context)] == 0).all()
        if context[-1] == tokenizer.gmask:
            generation = targets[len(context) :]
            assert tokens[len(context)] == tokenizer.sop
            assert (tokens[len(context) + 1 :] == generation[:-1]).all()
            if two_dimensional:
                assert (first[len(context) :] == len(context) - 1).all()
                assert (second[len(context) :] == np.arange(1, len(generation) + 1)).all()
            else:
                assert (first == np.arange(len(first))).all()
                assert (second == 0).all()
            text = np.concatenate([context[:-1], generation])
            result.append(Taken(text, [(len(context) - 1, len(generation))], end - begin, [0]))
        else:
            # Lists: the blocks are a few tokens each, and arrays would cost more than they save.
            seen, wanted, ones, twos = (values.tolist() for values in (tokens, targets, first, second))
            places = [place for place, token in enumerate(seen[: len(context)]) if token in masks]
            filling: dict[int, list[int]] = {}
            order = []
            starts = [slot for slot in range(len(context), len(seen)) if seen[slot] == tokenizer.sop]
            for start, stop in zip(starts, [*starts[1:], len(seen)], strict=True):
                block, size_of_block = wanted[start:stop], stop - start
                assert block[-1] == tokenizer.eop
                assert seen[start + 1 : stop] == block[:-1]
                place = ones[start]
                assert ones[start:stop] == [place] * size_of_block
                expected = list(range(1, size_of_block + 1)) if two_dimensional else [0] * size_of_block
                assert twos[start:stop] == expected
                assert place in places, "a block must point at a mask"
                assert place not in filling, "a mask is filled once"
                assert len(block) >= 2
                filling[place] = block[:-1]
                order.append(places.index(place))
            assert starts[0] == len(context), "the generation begins with a block"
            assert sorted(filling) == places, "every mask is filled"
            assert all(one + 1 < other for one, other in pairwise(places)), "spans never touch"
            text, spans, done = [], [], 0
            for place in places:
                text += seen[done:place]
                spans.append((len(text), len(filling[place])))
                text += filling[place]
                done = place + 1
            text += seen[done : len(context)]
            result.append(Taken(np.array(text, dtype=np.int64), spans, end - begin, order))
        begin = end
    return result
