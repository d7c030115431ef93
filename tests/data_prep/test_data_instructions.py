"""Instructions: packing loses no example, samples hold prompt and answer as stated, shares are exact."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from data_prep_helpers import document, small_config

from data_prep.batch import INSTRUCTION, KINDS
from data_prep.config import SamplingConfig, TokenizerConfig
from data_prep.dataset import Dataset
from data_prep.errors import ConfigError, DataError
from data_prep.instructions import Example, InstructionStream, fit
from data_prep.prepare import prepare
from data_prep.samples import Sampler
from data_prep.templates import TEMPLATES, fields_of, render

pytestmark = pytest.mark.unit
SLOTS = 128
ANSWERS = {f"第{n}课讲什么？" + "请简单说明。" * (n % 5): f"第{n}课讲数字{n}。" for n in range(300)}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, folder: Path, source_files: list[Path]) -> Dataset:
    """Text in two languages, and two sources of instructions of 300 and 40 examples."""
    place = tmp_path_factory.mktemp("tasks")
    lines = [document(prompt, target=answer, id=f"qa-{n}") for n, (prompt, answer) in enumerate(ANSWERS.items())]
    (place / "qa.jsonl").write_text("".join(lines), encoding="utf-8")
    lines = [document(f"The film number {n} was long.", label="bad", id=f"film-{n}") for n in range(40)]
    (place / "film.jsonl").write_text("".join(lines), encoding="utf-8")
    sources: list[object] = [str(file) for file in source_files]
    sources += [
        {"path": str(place / "qa.jsonl"), "template": "plain"},
        {"path": str(place / "film.jsonl"), "template": "Review: {text} It is", "target_field": "label", "cap": 30},
    ]
    config = small_config(place / "out", sources, split_shares=[90, 10, 0])
    config.tokenizer = TokenizerConfig(path=str(folder), threads=1)
    prepare(config)
    return Dataset.open(place / "out", verify=True)


def sampler_of(dataset: Dataset, **settings: object) -> Sampler:
    return Sampler(dataset, SamplingConfig(**settings), SLOTS, seed=3)  # type: ignore[arg-type]


def stream_of(sampler: Sampler, name: str) -> InstructionStream:
    stream = next(stream for stream in sampler.streams if stream.info.name == name)
    assert isinstance(stream, InstructionStream)
    return stream


@pytest.mark.parametrize("mask", ["MASK", "gMASK"])
@pytest.mark.parametrize("positions", ["1d", "2d"])
def test_every_example_is_in_one_pack_and_comes_back(tasks: Dataset, mask: str, positions: str) -> None:
    """Packs taken apart: prompt, mask, sop, answer, eop; targets, intervals and positions of each segment."""
    sampler = sampler_of(tasks, instruction_mask=mask, positions=positions)
    tokenizer = tasks.tokenizer
    stream = stream_of(sampler, "qa")
    found: dict[str, str] = {}
    for row in range(stream.rows):
        sample = sampler.instructions(stream.examples(row), "zh")
        is_target = sample.loss_weight > 0
        assert abs(float(sample.loss_weight.sum()) - 1) < 1e-5
        begin = 0
        while begin < SLOTS and sample.attend_to[begin] > begin + 1:
            context_end = int(sample.attend_to[begin])
            end = int(np.flatnonzero(sample.attend_from == begin)[-1]) + 1
            prompt, answer = sample.tokens[begin : context_end - 1], sample.targets[context_end:end]
            assert sample.tokens[context_end - 1] == tokenizer.special_ids[mask]
            assert sample.tokens[context_end] == tokenizer.sop
            assert (sample.tokens[context_end + 1 : end] == answer[:-1]).all()
            assert answer[-1] == tokenizer.eop
            assert not is_target[begin:context_end].any()
            assert is_target[context_end:end].all()
            assert (sample.attend_to[begin:context_end] == context_end).all()
            assert (sample.attend_to[context_end:end] == np.arange(context_end, end) + 1).all()
            first, second = sample.positions[:, begin:end]
            generated = np.arange(end - context_end)
            runs_on = mask == "gMASK" and positions == "1d"
            place = len(prompt) + 1 + generated if runs_on else np.full(len(generated), len(prompt))
            assert (first == [*range(len(prompt) + 1), *place]).all()
            assert (second[len(prompt) + 1 :] == (generated + 1 if positions == "2d" else 0)).all()
            found[tokenizer.decode(prompt)] = tokenizer.decode(answer[:-1])
            begin = end
        assert not is_target[begin:].any()
    train = next(info for info in tasks.manifest.sources if info.name == "qa").counts["train"].documents
    assert len(found) == train == stream.packing.examples
    assert all(ANSWERS[prompt] == answer for prompt, answer in found.items())
    assert stream.packing.fill > 0.9
    assert tasks.manifest.rejected["film"] == {"over_cap": 10}


def test_instructions_take_their_share_exactly_and_no_example_repeats_in_an_epoch(tasks: Dataset) -> None:
    sampler = sampler_of(tasks)
    addresses = [sampler.address(index) for index in range(4000)]
    assert sum(address.kind == INSTRUCTION for address in addresses) == 200
    assert all((address.kind == INSTRUCTION) == (address.stream.info.content != "text") for address in addresses)
    packs = Counter((a.stream.key, a.epoch, a.row) for a in addresses)
    assert max(packs.values()) == 1
    sample = sampler.sample(next(n for n, address in enumerate(addresses) if address.kind == INSTRUCTION))
    assert KINDS[sample.group // 8] == "instruction"
    assert sampler.summary()["instructions"]["qa.zh"]["cut_prompts"] == 0
    weighted = Sampler(tasks, SamplingConfig(), SLOTS, seed=3, weighting="token")
    expected = weighted.expected_targets_by_kind
    shares = [0.7 * 0.95, 0.3 * 0.95, 0.05]
    mean = sum(share * expected[kind] for share, kind in zip(shares, ("gmask", "mask", "instruction"), strict=True))
    assert weighted.expected_targets == pytest.approx(mean)


def test_text_alone_is_sampled_as_if_there_were_no_instructions(tasks: Dataset, dataset: Dataset) -> None:
    """Instructions at share 0 leave every text sample where it was."""
    with_tasks = sampler_of(tasks, instruction_share=0.0)
    assert {with_tasks.address(index).stream.info.content for index in range(500)} == {"text"}
    assert sampler_of(tasks, instruction_share=1.0).address(0).kind == INSTRUCTION


def test_long_examples_are_cut_at_the_prompt_first() -> None:
    kept = fit(np.array([10, 500, 500, 5]), np.array([20, 20, 500, 500]), 128)
    assert kept.prompts.tolist() == [10, 106, 32, 5]
    assert kept.answers.tolist() == [20, 20, 95, 122]
    assert kept.whole.tolist() == [True, True, False, False]
    assert kept.slots.tolist() == [32, 128, 128, 128]


def test_examples_of_every_length_fit_a_sequence(tasks: Dataset) -> None:
    """An answer that ends in the very last slot leaves none for its eop."""
    sampler = sampler_of(tasks)
    prompts, answers = (sizes.ravel() for sizes in np.mgrid[1 : SLOTS + 3, 1 : SLOTS + 3])
    kept = fit(prompts, answers, SLOTS)
    assert kept.slots.max() == SLOTS
    assert (kept.whole == (np.minimum(prompts, SLOTS // 4) + answers + 2 <= SLOTS)).all()
    assert (kept.answers <= answers).all()
    for number in np.flatnonzero(kept.slots >= SLOTS - 1)[::31]:
        example = Example(np.zeros(kept.prompts[number], int), np.ones(kept.answers[number], int), kept.whole[number])
        sample = sampler.instructions([example], "zh")
        assert int((sample.loss_weight > 0).sum()) == kept.answers[number] + kept.whole[number]


def test_templates_render_and_bad_ones_are_named(tmp_path: Path, folder: Path) -> None:
    for name in TEMPLATES:
        fields = dict.fromkeys(fields_of(name), "一二三")
        assert "一二三" in render(name, fields)
    with pytest.raises(ConfigError, match="must be one of plain"):
        fields_of("summary_fr")
    with pytest.raises(ConfigError, match="cannot be read"):
        fields_of("Q: {question")
    (tmp_path / "qa.jsonl").write_text(document("x" * 30), encoding="utf-8")
    config = small_config(tmp_path / "out", [{"path": str(tmp_path / "qa.jsonl"), "template": "plain"}])
    config.tokenizer = TokenizerConfig(path=str(folder), threads=1)
    with pytest.raises(DataError, match="line 1: no string in field 'target'"):
        prepare(config)


def test_sources_end_after_their_epochs_and_others_take_their_share(tmp_path: Path, folder: Path) -> None:
    sources: list[object] = []
    for name, text in (("a", "one two three four five "), ("b", "six seven eight nine ten ")):
        (tmp_path / f"{name}.txt").write_text(text * 300, encoding="utf-8")
        sources.append({"path": str(tmp_path / f"{name}.txt"), "weight": 1, "epochs": 2 if name == "a" else 5})
    config = small_config(tmp_path / "out", sources, split_shares=[1, 0, 0])
    config.tokenizer = TokenizerConfig(path=str(folder), threads=1)
    prepare(config)
    sampler = sampler_of(Dataset.open(tmp_path / "out"), mixture_period=10)
    rows = {stream.info.name: stream.rows for stream in sampler.streams}
    assert sampler.course is not None
    last = sampler.course.samples
    assert last == 2 * rows["a"] + 5 * rows["b"]
    draws = Counter((a.stream.info.name, a.epoch, a.row) for a in map(sampler.address, range(last)))
    assert len(draws) == last
    with pytest.raises(DataError, match="every source was read as often"):
        sampler.address(last)


def test_segments_that_begin_with_enc_are_for_text_alone(tasks: Dataset) -> None:
    with pytest.raises(ConfigError, match=r"starts_with_enc=true is for text alone, but \w+\.\w+ holds instructions"):
        sampler_of(tasks, starts_with_enc=True)
