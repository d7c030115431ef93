"""Decoding over the key-value cache: equal to running everything again, whatever stands beside it in the batch."""

import math
from pathlib import Path

import pytest
import torch

from data_prep.dataset import Dataset
from data_prep.errors import ConfigError
from data_prep.tokenizer import Tokenizer
from tests.train.parity import in_ranks
from tests.train.variants import VARIANTS, untrained
from train import backend
from train.generation.beams import search
from train.generation.blanks import fill, fill_all
from train.generation.decoder import Decoder
from train.generation.forms import Form
from train.generation.picking import Decoding, pick
from train.generation.scoring import log_probability
from train.model.build import Model

pytestmark = pytest.mark.unit
TEXTS = ("今天天气[MASK]，我们去[MASK]公园。", "The old man[gMASK]", "他说：[sMASK]然后[MASK]走了。[gMASK]", "[gMASK]")


@pytest.fixture(scope="module")
def tokenizer(tiny_dataset: Path) -> Tokenizer:
    return Dataset.open(tiny_dataset).tokenizer


def contexts(tokenizer: Tokenizer) -> list[list[int]]:
    return [tokenizer.encode_with_masks(text) for text in TEXTS]


def logits_again(model: Model, form: Form, written: list[list[int]]) -> torch.Tensor:
    """Logits behind every slot of the blanks, [slots, vocabulary], from one pass over the whole sequence."""
    tokens, positions = list(form.context), [(place, 0) for place in range(len(form.context))]
    for opening, blank in zip(form.openings, written, strict=False):
        tokens += [opening.first, *blank]
        positions += [opening.position(slot) for slot in range(len(blank) + 1)]
    slots = torch.arange(len(tokens))
    upto = slots + 1
    if not form.causal:
        upto[: len(form.context)] = len(form.context)
    meta = torch.cat([torch.tensor(positions).T, torch.stack([torch.zeros_like(slots), upto])])[None]
    with torch.no_grad():
        hidden = model((torch.tensor([tokens]), meta, torch.zeros(1, dtype=torch.int64)))
    return model.head.logits(hidden[0, len(form.context) :])


@pytest.mark.parametrize("causal", [False, True], ids=["blanks", "causal"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_logits_are_those_of_the_whole_sequence(tokenizer, variant, causal):
    model, shape = untrained(variant), untrained(variant).context.model
    texts = ["今天天气很好[gMASK]", "[gMASK]", "The old man[gMASK]"] if causal else TEXTS
    forms = [Form.of(tokenizer.encode_with_masks(text), tokenizer, shape, causal=causal) for text in texts]
    generator = torch.Generator().manual_seed(3)
    written = [[torch.randint(0, 600, (3,), generator=generator).tolist() for _ in form.openings] for form in forms]
    wanted = [logits_again(model, form, blanks) for form, blanks in zip(forms, written, strict=True)]
    decoder = Decoder(model, len(forms), 64)
    decoder.begin([form.context for form in forms], causal=causal)
    steps = [
        [
            ([opening.first, *blank][slot], opening.position(slot))
            for opening, blank in zip(form.openings, blanks, strict=True)
            for slot in range(len(blank) + 1)
        ]
        for form, blanks in zip(forms, written, strict=True)
    ]
    for step in range(max(len(row) for row in steps)):
        fed = [row[min(step, len(row) - 1)] for row in steps]
        logits = decoder.step(torch.tensor([token for token, _ in fed]), torch.tensor([at for _, at in fed]))
        for row, expected in enumerate(wanted):
            if step < len(expected):
                assert (logits[row] - expected[step]).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_text_gets_the_same_blanks_alone_and_in_a_batch(tokenizer, variant):
    model, batch = untrained(variant), contexts(tokenizer)
    for decoding in (Decoding(5), Decoding(5, temperature=1.0, seed=4, top_k=50, top_p=0.9)):
        together = fill_all(model, tokenizer, batch, decoding)
        assert [len(blanks) for blanks in together] == [2, 1, 3, 1]
        for number, context in enumerate(batch):
            assert fill_all(model, tokenizer, [context], decoding, numbers=[number]) == [together[number]]
        assert all(len(blank) <= 5 and max(blank, default=0) < tokenizer.pieces for row in together for blank in row)


def test_greedy_writes_the_likeliest_token_of_the_whole_sequence_each_time(tokenizer):
    model = untrained()
    for context in contexts(tokenizer):
        form = Form.of(context, tokenizer, model.context.model)
        written = fill(model, tokenizer, context, Decoding(4))
        logits = logits_again(model, form, written)
        at = 0
        for opening, blank in zip(form.openings, written, strict=True):
            for inside, token in enumerate([*blank, None][:4]):
                allowed = logits[at + inside].clone()
                ends = [(stop, allowed[stop].clone()) for stop in opening.stops_at(inside) if stop >= 0]
                allowed[tokenizer.mask :] = -torch.inf
                for stop, value in ends:
                    allowed[stop] = value
                likeliest = int(allowed.argmax())
                assert likeliest in opening.stops if token is None else likeliest == token
            at += len(blank) + 1


def test_every_token_is_told_as_it_comes(tokenizer):
    heard: list[tuple[int, int, list[int], bool]] = []
    batch = contexts(tokenizer)[:3]
    written = fill_all(
        untrained(), tokenizer, batch, Decoding(3), numbers=[7, 8, 9],
        on_token=lambda text, blank, tokens, done: heard.append((text, blank, list(tokens), done)),
    )  # fmt: skip
    for number, blanks in zip((7, 8, 9), written, strict=True):
        mine = [news for news in heard if news[0] == number]
        assert [(news[1], news[2]) for news in mine if news[3]] == list(enumerate(blanks))
        assert all(news[2] == blanks[news[1]][: len(news[2])] for news in mine)


def test_a_reader_that_is_a_few_steps_behind_reads_the_same(tokenizer, monkeypatch):
    """As on a GPU, where the next steps run while a token is read: what runs too long does no harm."""

    def behind(run, result):
        waiting = []
        while True:
            run()
            waiting.append(result.tolist())
            if len(waiting) > 3:
                yield waiting.pop(0)

    model, batch = untrained("learned_2d"), contexts(tokenizer)
    for decoding in (Decoding(5), Decoding(5, temperature=1.0, seed=4)):
        wanted = fill_all(model, tokenizer, batch, decoding)
        with monkeypatch.context() as patched:
            patched.setattr(backend, "results", behind)
            assert fill_all(model, tokenizer, batch, decoding) == wanted


def test_draws_have_the_probabilities_of_temperature_top_k_and_top_p():
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -torch.inf]).log_softmax(-1)
    rows = 20000
    for settings in ({"temperature": 1.0}, {"temperature": 0.7, "top_k": 3}, {"temperature": 1.3, "top_p": 0.8}):
        decoding = Decoding(seed=5, **settings)
        drawn = pick(logits.expand(rows, -1).clone(), decoding, torch.arange(rows), torch.zeros(rows).long())
        wanted = torch.softmax(logits / settings["temperature"], -1)
        if "top_k" in settings:
            wanted[3:] = 0
        if "top_p" in settings:
            # Shares .44 .20 .14 .10 .04 at this temperature: the fourth crosses 0.8.
            wanted[(wanted.cumsum(-1) - wanted) >= 0.8] = 0
        wanted /= wanted.sum()
        found = torch.bincount(drawn, minlength=6) / rows
        assert (found - wanted).abs().max() < 4 * math.sqrt(0.25 / rows)
        assert found[wanted == 0].sum() == 0
        again = pick(logits.expand(rows, -1).clone(), decoding, torch.arange(rows), torch.zeros(rows).long())
        assert torch.equal(drawn, again)


def every_filling(model: Model, tokenizer: Tokenizer, context: list[int]) -> dict[tuple[int, ...], float]:
    """Log probability over the number of tokens of every way to fill a [MASK] with one or two tokens."""
    (opening,), pieces = Form.of(context, tokenizer, model.context.model).openings, tokenizer.pieces
    tokens = torch.tensor([[*context, opening.first, token] for token in range(pieces)])
    slots = torch.arange(tokens.shape[1])
    upto = (slots + 1).clamp(min=len(context))
    place = torch.where(slots < len(context), slots, opening.place)
    meta = torch.stack([place, torch.zeros_like(slots), torch.zeros_like(slots), upto]).expand(pieces, -1, -1)
    with torch.no_grad():
        logits = model.head.logits(model((tokens, meta, torch.zeros(pieces, dtype=torch.int64)))[:, -2:])
    first = torch.log_softmax(logits[0, 0, :pieces], -1)
    second = torch.log_softmax(torch.cat([logits[:, 1, :pieces], logits[:, 1, [tokenizer.eop]]], 1), -1)
    found = {(token,): float(first[token] + second[token, -1]) / 2 for token in range(pieces)}
    both = ((first[:, None] + second[:, :-1]) / 2).tolist()
    return found | {(one, two): both[one][two] for one in range(pieces) for two in range(pieces)}


def test_beams_as_wide_as_the_search_find_the_best_of_all(tokenizer):
    """With as many beams as there are pieces, two tokens deep, nothing can be missed."""
    context = [*contexts(tokenizer)[0][:4], tokenizer.mask]
    model = untrained()
    every = every_filling(model, tokenizer, context)
    form = Form.of(context, tokenizer, model.context.model)
    (found,) = search(model, tokenizer, form, Decoding(2, beams=tokenizer.pieces))
    assert tuple(found) == max(every, key=lambda tokens: every[tokens])


def test_beams_settle_one_blank_after_the_other(tokenizer):
    model, context = untrained(), contexts(tokenizer)[2]
    written = fill(model, tokenizer, context, Decoding(4, beams=3))
    assert len(written) == 3
    # The second blank is the best given the first, so it is what a text with the first already run gives.
    form = Form.of(context, tokenizer, model.context.model)
    scores = logits_again(model, form, written)[len(written[0]) + 1]
    assert scores[: tokenizer.mask].topk(3).indices.tolist().count(written[1][0]) == 1
    greedy = fill(model, tokenizer, context, Decoding(1))[0]
    assert log_probability(model, tokenizer, context, greedy) >= log_probability(
        model, tokenizer, context, fill(model, tokenizer, context, Decoding(1, temperature=2.0))[0]
    )


def test_a_compiled_step_is_one_graph_and_gives_the_same(tokenizer):
    from torch._dynamo.testing import CompileCounter

    model, batch = untrained("grouped"), contexts(tokenizer)
    forms = [Form.of(context, tokenizer, model.context.model) for context in batch]
    counter = CompileCounter()
    decoders = [Decoder(model, 4, 40), Decoder(model, 4, 40, compiled=True, compiler=counter)]
    for decoder in decoders:
        decoder.begin([form.context for form in forms])
    for step in range(6):
        fed = torch.full((4,), step + 1), torch.tensor([[step, 0]] * 4)
        plain, compiled = (decoder.step(*fed) for decoder in decoders)
        assert torch.allclose(plain, compiled, atol=1e-6)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_inductor_gives_the_same(tokenizer):
    model, batch = untrained(), contexts(tokenizer)
    assert fill_all(model, tokenizer, batch, Decoding(6, compiled=True)) == fill_all(
        model, tokenizer, batch, Decoding(6)
    )


def _shared(path: Path, variants: list[str]) -> list[list[list[list[int]]]]:
    tokenizer, mesh = Tokenizer.load(path), backend.tensor_mesh()
    decodings = (Decoding(4), Decoding(4, temperature=1.0), Decoding(3, beams=2))
    models = [untrained(variant, mesh) for variant in variants]
    return [fill_all(model, tokenizer, contexts(tokenizer), how) for model in models for how in decodings]


@pytest.mark.distributed
def test_tensor_parallel_ranks_write_what_one_process_writes(tiny_dataset):
    variants = ["glm_130b", "multi_query", "learned_2d"]
    alone = in_ranks(1, _shared, tiny_dataset, variants)
    assert in_ranks(2, _shared, tiny_dataset, variants) == alone


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": -1}, "top_k=-1 must be 0 or more"),
        ({"top_p": 0.0}, r"top_p=0.0 must lie in \(0, 1\]"),
        ({"beams": 0}, "beams=0 must be at least 1"),
        ({"beams": 2, "temperature": 1.0}, "beams=2 and temperature=1.0 exclude each other"),
        ({"top_k": 5}, "no effect with temperature=0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Decoding(**settings)


def test_a_causal_text_goes_on_at_its_end_only(tokenizer):
    model = untrained()
    for text in ("今天[MASK]很好", "[gMASK]很好", "今天[gMASK]很好[gMASK]"):
        with pytest.raises(ConfigError, match=r"one \[gMASK\] at the end"):
            fill_all(model, tokenizer, [tokenizer.encode_with_masks(text)], Decoding(), causal=True)
