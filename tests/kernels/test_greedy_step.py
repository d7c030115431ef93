"""A greedy step: the reference and the Triton kernels (on a CPU in the interpreter) against plain Python."""

from __future__ import annotations

import os

import pytest
import torch

from kernels.greedy_step import COLUMNS, NEXT_PLACE, NEXT_TOKEN, SETTLED, STOPS
from kernels.greedy_step import greedy_step as reference

CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.gpu if CUDA else pytest.mark.unit
STOP, OTHER, BARRED = 90, 91, 95
"""Ids of no text: two stops, and one that is never offered."""
PLACES = 12


def case(vocabulary, dtype=torch.float32):
    """Seven rows: the likeliest is text, a barred id, a stop that is offered, one that is not, a stop where −1 may not
    be taken for a column, two ids alike, and a settled place whose pick means nothing."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(7, vocabulary, generator=generator).clamp(max=5.0)
    for row, column in enumerate((40, BARRED, STOP, STOP, vocabulary - 1, 70, 33)):
        logits[row, column] = 9.0
    logits[5, 20] = 9.0
    logits[1, 17] = 8.0
    text = torch.ones(vocabulary, dtype=torch.bool)
    text[STOP : BARRED + 1] = False
    text[-1] = False
    table = torch.randint(0, PLACES, (PLACES, COLUMNS), generator=generator)
    table[:, STOPS] = torch.tensor([OTHER, STOP])
    table[:, SETTLED] = 0
    table[3, STOPS] = -1
    table[4, STOPS] = -1
    table[6, SETTLED] = 1
    place = torch.arange(7)
    return [logits.to(dtype), text, table, place, table[place], *torch.zeros(2, 7, dtype=torch.int64)]


def plain(logits, text, table, place, here, picked, fed):
    """The same by lists."""
    result = []
    for row, values in enumerate(logits.tolist()):
        entry = table[place[row]].tolist()
        ids = [one for one, is_text in enumerate(text.tolist()) if is_text or one in entry[STOPS]]
        token = max(ids, key=lambda one, values=values: (values[one], -one))
        leaves = token in entry[STOPS] or entry[SETTLED]
        to = entry[NEXT_PLACE] if leaves else int(place[row]) + 1
        result.append((token, entry[NEXT_TOKEN] if leaves else token, to, table[to].tolist()))
    return result


def found(step, arguments, device="cpu"):
    arguments = [argument.clone().to(device) for argument in arguments]
    step(*arguments)
    _, _, _, place, here, picked, fed = (argument.cpu().tolist() for argument in arguments)
    return list(zip(picked, fed, place, here, strict=True))


def test_the_reference_does_what_plain_python_does():
    arguments = case(97)
    picked = [token for token, *_ in plain(*arguments)]
    assert picked[:3] == [40, 17, STOP]
    assert not {STOP, BARRED, 96} & {*picked[3:5]}
    assert picked[5:] == [20, 33]
    assert found(reference, arguments) == plain(*arguments)


def test_wrong_arguments_are_named():
    arguments = case(97)
    with pytest.raises(ValueError, match=r"text has shape \[96\]; expected \[97\]"):
        reference(arguments[0], arguments[1][1:], *arguments[2:])
    with pytest.raises(ValueError, match=r"fed is torch.int32; use torch.int64"):
        reference(*arguments[:6], arguments[6].int())


if CUDA or INTERPRETED:  # without a GPU, test_interpreted.py runs these in a process of their own
    from kernels.greedy_step_triton import greedy_step

    DEVICE = "cuda" if CUDA else "cpu"

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize("vocabulary", [97, 1024, 5003])
    def test_the_kernel_does_what_plain_python_does(vocabulary, dtype):
        arguments = case(vocabulary, dtype)
        assert found(greedy_step, arguments, DEVICE) == plain(*arguments)

    def test_the_kernel_takes_nan_for_the_largest_as_pytorch_does():
        arguments = case(97)
        arguments[0][0, 60] = torch.nan
        arguments[0][1] = -torch.inf
        assert found(greedy_step, arguments, DEVICE) == found(reference, arguments)
        assert found(greedy_step, arguments, DEVICE)[0][0] == 60
