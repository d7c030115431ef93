"""Takes a sample apart without the code that made it: what it hides, and what it should be."""

from dataclasses import dataclass

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
            places = [place for place, token in enumerate(context.tolist()) if token in masks]
            filling: dict[int, NDArray[np.int64]] = {}
            order = []
            starts = np.flatnonzero(tokens[len(context) :] == tokenizer.sop) + len(context)
            for start, stop in zip(starts, [*starts[1:], len(tokens)], strict=True):
                block = targets[start:stop]
                assert block[-1] == tokenizer.eop
                assert (tokens[start + 1 : stop] == block[:-1]).all()
                place = int(first[start])
                assert (first[start:stop] == place).all()
                expected = np.arange(1, stop - start + 1) if two_dimensional else 0
                assert (second[start:stop] == expected).all()
                assert place in places, "a block must point at a mask"
                assert place not in filling, "a mask is filled once"
                assert len(block) >= 2
                filling[place] = block[:-1]
                order.append(places.index(place))
            assert sorted(filling) == places, "every mask is filled"
            assert (np.diff(places) > 1).all(), "spans never touch"
            pieces, spans, at, done = [], [], 0, 0
            for place in places:
                pieces += [context[done:place], filling[place]]
                at += place - done
                spans.append((at, len(filling[place])))
                at += len(filling[place])
                done = place + 1
            pieces.append(context[done:])
            result.append(Taken(np.concatenate(pieces), spans, end - begin, order))
        begin = end
    return result
