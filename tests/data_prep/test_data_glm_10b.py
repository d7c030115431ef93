"""GLM-10B's samples: shares, ENC in front, 2D positions, and the same form when blanks are filled."""

from itertools import islice

import numpy as np
import pytest
from sample_checks import take_apart

from data_prep.batch import GMASK, KINDS, MASK, SMASK
from data_prep.config import SamplingConfig
from data_prep.dataset import Dataset
from data_prep.errors import ConfigError
from data_prep.samples import Sampler
from train.cli import compose_train
from train.generation.forms import Form

pytestmark = pytest.mark.unit
SLOTS = 128


@pytest.fixture(scope="module")
def recipe() -> object:
    return compose_train(["experiment=glm_10b", "data.path=DIR"])


def test_the_recipe(dataset: Dataset, recipe: object) -> None:
    """Each sample taken apart: the whole row comes back behind one ENC, under every kind, in the stated shares."""
    tokenizer = dataset.tokenizer
    sampler = Sampler(dataset, recipe.data.sampling, SLOTS, seed=3)  # type: ignore[attr-defined]
    kinds = []
    targets: dict[int, list[int]] = {GMASK: [], MASK: [], SMASK: []}
    for index in range(2000):
        address, sample = sampler.address(index), sampler.sample(index)
        kinds.append(address.kind)
        targets[address.kind].append(int((sample.loss_weight > 0).sum()))
        if index >= 400:
            continue
        (segment,) = take_apart(sample, tokenizer, two_dimensional=True)
        assert segment.slots == SLOTS
        assert segment.text[0] == tokenizer.special_ids["ENC"]
        text = segment.text[1:]
        assert np.array_equal(text, address.stream.read_row(address.row)[: len(text)])  # type: ignore[union-attr]
        assert all(start > 0 for start, _ in segment.spans)
        if address.kind == GMASK:
            assert len(text) == SLOTS - 2
            assert segment.spans[0][1] >= len(text) / 4
        else:
            assert len(text) == SLOTS - 1 - 2 * len(segment.spans)
            assert not any(tokenizer.eod in segment.text[at : at + length] for at, length in segment.spans)
    shares = np.bincount(kinds, minlength=len(KINDS)) / len(kinds)
    assert shares[[GMASK, MASK, SMASK]].tolist() == pytest.approx([0.2, 0.5, 0.3], abs=0.003)
    for kind in (GMASK, MASK):
        expected = sampler.expected_targets_by_kind[KINDS[kind]]
        spread = np.std(targets[kind]) / len(targets[kind]) ** 0.5
        assert abs(np.mean(targets[kind]) - expected) < 4 * spread


@pytest.mark.parametrize("isolate", [False, True])
def test_every_segment_begins_with_enc(dataset: Dataset, recipe: object, isolate: bool) -> None:
    """Several segments a sequence, some cut in two, documents joined or isolated."""
    sampling = compose_train(
        [
            *("experiment=glm_10b", "data.path=DIR", "data.sampling.mask_segments=3"),
            *("data.sampling.short_text_probability=0.3", f"data.sampling.isolate_documents={isolate}"),
        ]
    ).data.sampling
    sampler = Sampler(dataset, sampling, 255, seed=3)
    segments = [
        segment
        for index in range(150)
        for segment in take_apart(sampler.sample(index), dataset.tokenizer, two_dimensional=True)
    ]
    assert len(segments) > 300
    assert all(one.text[0] == dataset.tokenizer.special_ids["ENC"] for one in segments)
    assert not any(dataset.tokenizer.special_ids["ENC"] in one.text[1:] for one in segments)
    if not isolate:
        masked = [sampler.sample(index) for index in range(300) if sampler.address(index).kind == MASK]
        unused = [254 - sum(len(one.text) - 1 for one in take_apart(s, dataset.tokenizer, True)) for s in masked]
        spread = np.std(unused) / len(unused) ** 0.5
        assert abs(np.mean(unused) - sampler.expected_unused_tokens) < 4 * spread


def test_blanks_are_filled_in_the_form_of_training(dataset: Dataset, recipe: object) -> None:
    tokenizer = dataset.tokenizer
    sampler = Sampler(dataset, recipe.data.sampling, SLOTS, seed=3)  # type: ignore[attr-defined]
    for kind in (GMASK, MASK, SMASK):
        (sample, *_) = islice((sampler.sample(n) for n in range(99) if sampler.address(n).kind == kind), 1)
        context = sample.tokens[: int(sample.attend_to[0])].tolist()
        form = Form.of(context[1:], tokenizer, recipe.model, starts_with_enc=True)  # type: ignore[attr-defined]
        assert form.context == context
        places = {opening.place for opening in form.openings}
        starts = np.flatnonzero(sample.tokens == tokenizer.sop)
        assert places == set(sample.positions[0, starts].tolist())
        first = form.openings[0]
        at = int(starts[sample.positions[0, starts] == first.place][0])
        assert [list(first.position(inside)) for inside in range(2)] == sample.positions[:, at : at + 2].T.tolist()


def test_a_model_without_blanks_has_no_enc() -> None:
    with pytest.raises(ConfigError, match=r"data\.sampling\.starts_with_enc=true is for blanks"):
        SamplingConfig(objective="causal", starts_with_enc=True)
