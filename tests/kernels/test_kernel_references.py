"""The PyTorch references against the float64 formulas: values, gradients, options, layouts, bad input."""

from __future__ import annotations

import kernel_formulas as formulas
import pytest
import torch
from kernel_formulas import as64, error_ratio, leaf

from kernels.bias_activation import KINDS as ACTIVATIONS
from kernels.bias_activation import bias_activation
from kernels.embedding import embedding
from kernels.interval_attention import interval_attention, sdpa_attention, unfused_attention, unpack_heads
from kernels.linear import linear, linear_and_input
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.random import Dropout, dropout_key, keep_attention, keep_hidden
from kernels.residual_norm import residual_norm
from kernels.rotary import rotary

pytestmark = pytest.mark.unit
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def gradients_agree(outs, inputs, expected_outs, expected_inputs, tolerance, seed=99):
    """Values and gradients of every input under random output gradients."""
    grads = [leaf(*out.shape, seed=seed + i).detach().to(out.device) for i, out in enumerate(expected_outs)]
    for out, expected in zip(outs, expected_outs, strict=True):
        assert error_ratio(out, expected) < tolerance
    actual = torch.autograd.grad(outs, inputs, [g.to(o.dtype) for g, o in zip(grads, outs, strict=True)])
    wanted = torch.autograd.grad(
        expected_outs, expected_inputs, [g.to(o.dtype).double() for g, o in zip(grads, outs, strict=True)]
    )
    for got, want in zip(actual, wanted, strict=True):
        assert error_ratio(got, want) < tolerance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize(
    "with_f,with_bias,probability,both", [(1, 1, 0.0, 1), (1, 0, 0.2, 0), (1, 1, 0.3, 1), (0, 0, 0.0, 0)]
)
def test_residual_norm(dtype, kind, with_f, with_bias, probability, both):
    x, f = leaf(2, 5, 24, seed=1, dtype=dtype), leaf(2, 5, 24, seed=2, dtype=dtype) if with_f else None
    bias = leaf(24, seed=3, dtype=dtype) if with_bias else None
    weight, shift = leaf(24, seed=4, dtype=dtype), leaf(24, seed=5, dtype=dtype) if kind == "layernorm" else None
    dropout = Dropout(probability, dropout_key(7, 3, "ffn"), torch.tensor([5, 2**40]))
    keep = keep_hidden(dropout, 5, 24).double() if probability else None
    inputs = [x, f, bias, weight, shift]
    wide = [as64(t) for t in inputs]
    options = {"alpha": 3.7 if with_f else 1.0, "eps": 1e-5, "kind": kind}
    outs = residual_norm(*inputs, **options, dropout=dropout if with_f else None, return_sum=True)
    expected = formulas.residual_norm(*wide, **options, keep=keep, probability=probability)
    if not both:
        outs, expected = outs[:1], expected[:1]
    present = [i for i, t in enumerate(inputs) if t is not None]
    gradients_agree(outs, [inputs[i] for i in present], expected, [wide[i] for i in present], TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("with_bias", [True, False])
def test_bias_activation(dtype, kind, with_bias):
    inputs = [leaf(3, 7, 30, seed=1, dtype=dtype)] + ([leaf(30, seed=2, dtype=dtype)] if with_bias else [])
    wide = [as64(t) for t in inputs]
    out = bias_activation(inputs[0], inputs[1] if with_bias else None, kind=kind)
    expected = formulas.bias_activation(wide[0], wide[1] if with_bias else None, kind)
    gradients_agree([out], inputs, [expected], wide, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "mode,interleaved,rotary_dim,period,passthrough,with_bias",
    [("1d", False, 16, 3, 1, True), ("1d", True, 8, 4, 1, True), ("2d", False, 16, 3, 1, False),
     ("2d", True, 8, 12, 2, True), ("none", False, 16, 3, 1, True), ("1d", False, 12, 1, 0, True)],
)  # fmt: skip
def test_rotary(dtype, mode, interleaved, rotary_dim, period, passthrough, with_bias):
    x, bias = leaf(2, 9, 12, 16, seed=1, dtype=dtype), leaf(12 * 16, seed=2, dtype=dtype)
    positions = torch.randint(0, 300, (2, 2, 9), dtype=torch.int32, generator=torch.Generator().manual_seed(3))
    options = {"period": period, "passthrough": passthrough, "rotary_dim": rotary_dim, "mode": mode}
    options |= {"interleaved": interleaved, "base": 10000.0, "scale": 4.0 if interleaved else 1.0}
    options |= {"ramp_from": 0.5, "ramp_to": 1.75} if interleaved and mode == "2d" else {}
    inputs = [x, bias] if with_bias else [x]
    wide = [as64(t) for t in inputs]
    out = rotary(x, bias if with_bias else None, positions, **options)
    expected = formulas.rotary(wide[0], wide[1] if with_bias else None, positions, **options)
    # angles are float32 by definition: positions up to 300 leave 300 · 2⁻²⁴ of an angle
    gradients_agree([out], inputs, [expected], wide, max(TOLERANCE[dtype], 2e-5))


def test_rotary_fp16_angles_differ_as_released():
    x = leaf(1, 2048, 1, 128, seed=1, dtype=torch.float32).detach()
    positions = torch.stack([torch.arange(2048), torch.zeros(2048)]).int()[None]
    options = {"period": 1, "passthrough": 0, "rotary_dim": 128, "mode": "1d"}
    exact = rotary(x, None, positions, **options)
    released = rotary(x, None, positions, **options, fp16_angles=True)
    assert error_ratio(released[:, :2], exact[:, :2]) < 1e-3
    # GLM-130B's released code is up to 0.63 rad off at position 2047
    pair = torch.complex(exact[0, -1, 0, :64], exact[0, -1, 0, 64:])
    off = (torch.complex(released[0, -1, 0, :64], released[0, -1, 0, 64:]) / pair).angle().abs().max().item()
    assert off == pytest.approx(0.629, abs=1e-3)


def intervals(kind: str, batch: int, queries: int, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    place = torch.arange(queries).expand(batch, -1)
    start, stop = torch.zeros_like(place), place + 1
    if kind == "full":
        stop = torch.full_like(place, keys)
    elif kind == "prefix":
        stop = torch.maximum(stop, torch.tensor([queries // 3, queries // 2])[:batch, None])
    elif kind == "one":
        start = place
    elif kind == "random":  # with empty, inverted and out-of-range intervals
        generator = torch.Generator().manual_seed(5)
        start = torch.randint(-2, keys, (batch, queries), generator=generator)
        stop = torch.randint(0, keys + 4, (batch, queries), generator=generator)
        stop[:, ::4] = start[:, ::4]
    return start.int(), stop.int()


@pytest.mark.parametrize("mask", ["causal", "full", "prefix", "one", "random"])
@pytest.mark.parametrize("heads,kv_heads", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize(
    "implementation,options",
    [("reference", {}), ("reference", {"softcap": 5.0, "alpha": 3.0}), ("unfused", {}), ("sdpa", {}),
     ("unfused", {"pb_relax": True, "alpha": 32.0}), ("unfused", {"softcap": 5.0, "pb_relax": True, "alpha": 4.0})],
)  # fmt: skip
def test_attention(mask, heads, kv_heads, implementation, options):
    function = {"reference": interval_attention, "unfused": unfused_attention, "sdpa": sdpa_attention}[implementation]
    start, stop = intervals(mask, 2, 13, 13)
    inputs = [leaf(2, 13, n, 8, seed=n + i, dtype=torch.float32) for i, n in enumerate((heads, kv_heads, kv_heads))]
    wide = [as64(t) for t in inputs]
    out, lse, _ = function(*inputs, start, stop, scale=0.35, **options)
    expected, expected_lse = formulas.interval_attention(
        *wide, start, stop, scale=0.35, softcap=options.get("softcap", 0.0)
    )
    gradients_agree([out], inputs, [expected], wide, 1e-5)
    if lse is not None:
        torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("function", [interval_attention, unfused_attention])
def test_attention_dropout_and_max_logit(function):
    start, stop = intervals("random", 2, 9, 9)
    inputs = [leaf(2, 9, 4, 8, seed=i, dtype=torch.float64) for i in range(3)]
    dropout = Dropout(0.3, dropout_key(1, 2, "attention"), torch.tensor([3, 4]))
    keep = keep_attention(dropout, 4, 9, 9)
    out, _, largest = function(*inputs, start, stop, scale=0.3, alpha=2.0, dropout=dropout, want_max_logit=True)
    wide = [as64(t) for t in inputs]
    expected, _ = formulas.interval_attention(*wide, start, stop, scale=0.3, keep=keep, probability=0.3)
    gradients_agree([out], inputs, [expected], wide, 1e-12)
    logits = 0.3 * torch.einsum("bqhd,bkhd->bhqk", *inputs[:2])
    keys = torch.arange(9)
    logits = logits.masked_fill(~((keys >= start[..., None]) & (keys < stop[..., None]))[:, None], -torch.inf)
    torch.testing.assert_close(largest.double(), logits.amax((0, 2, 3)).detach(), atol=1e-6, rtol=1e-6)


def test_half_softmax_loses_what_fp32_keeps():
    start, stop = intervals("full", 1, 64, 64)
    q, k, v = (leaf(1, 64, 2, 16, seed=i, dtype=torch.float16, scale=4.0) for i in range(3))
    expected, _ = formulas.interval_attention(*(as64(t) for t in (q, k, v)), start, stop, scale=0.25)
    half = error_ratio(unfused_attention(q, k, v, start, stop, scale=0.25, half_softmax=True)[0], expected)
    full = error_ratio(unfused_attention(q, k, v, start, stop, scale=0.25)[0], expected)
    best = error_ratio(interval_attention(q, k, v, start, stop, scale=0.25)[0], expected)
    assert best < full <= half < 0.1
    overflow = unfused_attention(q * 40, k * 40, v, start, stop, scale=1.0)[0]
    cured = unfused_attention(q * 40, k * 40, v, start, stop, scale=1.0, alpha=64.0)[0]
    assert not torch.isfinite(overflow).all()
    assert torch.isfinite(cured).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("z_loss,softcap,shrink", [(0.0, 0.0, 1.0), (1e-2, 0.0, 0.25), (1e-2, 3.0, 1.0)])
@pytest.mark.parametrize("kept", [1 << 24, 64])
def test_linear_cross_entropy(monkeypatch, dtype, z_loss, softcap, shrink, kept):
    monkeypatch.setattr("kernels.linear_cross_entropy.KEPT_ELEMENTS", kept)
    hidden, weight = leaf(11, 12, seed=1, dtype=dtype), leaf(37, 12, seed=2, dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    targets = torch.randint(0, 37, (11,), generator=generator)
    loss_weight = torch.rand(11, generator=generator)
    loss_weight[3:6] = 0.0
    groups = torch.tensor([1, 1, 5, 5, 5, 5, 0, 0, 63, 63, 2], dtype=torch.uint8)
    loss, z, sums = linear_cross_entropy(
        hidden, weight, targets.masked_fill(loss_weight == 0, -1), loss_weight,
        groups=groups, z_loss=z_loss, softcap=softcap, weight_shrink=shrink,
    )  # fmt: skip
    wide = [as64(hidden), as64(weight)]
    want_loss, want_z, row_loss = formulas.linear_cross_entropy(
        *wide, targets, loss_weight.double(), z_loss=z_loss, softcap=softcap
    )
    tolerance = TOLERANCE[dtype] if dtype != torch.float64 else 1e-7  # loss_weight is float32
    torch.testing.assert_close(loss.double(), want_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(z.double(), want_z, rtol=1e-5, atol=0)
    grads = torch.autograd.grad(2.0 * loss + 0.5 * z, [hidden, weight])
    wants = torch.autograd.grad(2.0 * want_loss + 0.5 * want_z, wide)
    assert error_ratio(grads[0], wants[0]) < tolerance
    assert error_ratio(grads[1], shrink * wants[1]) < tolerance
    for group in (0, 1, 2, 5, 63, 7):
        member = (groups == group) & (loss_weight > 0)
        assert sums[group, 1].item() == member.sum().item()
        assert sums[group, 0].item() == pytest.approx(row_loss[member].sum().item(), rel=1e-5)


def test_linear_cross_entropy_without_targets():
    hidden, weight = leaf(4, 6, seed=1, dtype=torch.float32), leaf(9, 6, seed=2, dtype=torch.float32)
    loss, z, sums = linear_cross_entropy(hidden, weight, torch.zeros(4, dtype=torch.int64), torch.zeros(4), z_loss=0.1)
    (loss + z).backward()
    assert loss.item() == z.item() == sums.sum().item() == 0.0
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_loss_does_not_depend_on_the_split():
    hidden, weight = leaf(64, 16, seed=1, dtype=torch.float32), leaf(50, 16, seed=2, dtype=torch.float32)
    targets, loss_weight = torch.arange(64) % 50, torch.full((64,), 1 / 64)
    whole = linear_cross_entropy(hidden, weight, targets, loss_weight)[0]
    parts = [
        linear_cross_entropy(hidden[i : i + 7], weight, targets[i : i + 7], loss_weight[i : i + 7])[0]
        for i in range(0, 64, 7)
    ]
    assert abs(torch.stack(parts).double().sum() - whole) / whole < 2e-7


def test_embedding_shrinks_and_shards():
    weight = leaf(10, 4, seed=1)
    tokens = torch.tensor([[1, 7, 7], [9, 0, 3]])
    out = embedding(tokens, weight, shrink=0.1)
    assert torch.equal(out, weight[tokens])
    (grad,) = torch.autograd.grad(out.sum(), weight)
    expected = torch.zeros(10, 4, dtype=torch.float64)
    for token in tokens.flatten():
        expected[token] += 0.1
    torch.testing.assert_close(grad, expected)
    shards = [embedding(tokens, weight[s : s + 5], shrink=0.1, vocab_start=s) for s in (0, 5)]
    assert torch.equal(shards[0] + shards[1], out)
    torch.testing.assert_close(torch.autograd.grad(sum(shards).sum(), weight)[0], expected)


def test_dropout_is_the_same_in_every_layout():
    x, f = leaf(4, 6, 8, seed=1), leaf(4, 6, 8, seed=2)
    weight, key, samples = torch.ones(8, dtype=torch.float64), dropout_key(3, 1, "ffn"), torch.tensor([10, 11, 12, 13])
    whole = residual_norm(x, f, None, weight, None, dropout=Dropout(0.5, key, samples))
    halves = [
        residual_norm(x[i : i + 2], f[i : i + 2], None, weight, None, dropout=Dropout(0.5, key, samples[i : i + 2]))
        for i in (0, 2)
    ]
    assert torch.equal(torch.cat(halves), whole)
    sequence = [
        residual_norm(x[:, i : i + 3], f[:, i : i + 3], None, weight, None, dropout=Dropout(0.5, key, samples, i))
        for i in (0, 3)
    ]
    assert torch.equal(torch.cat(sequence, 1), whole)
    heads = keep_attention(Dropout(0.5, key, samples), 4, 5, 5)
    assert torch.equal(keep_attention(Dropout(0.5, key, samples, 2), 2, 5, 5), heads[:, 2:])


def bad(function, *args, **kwargs):
    return lambda: function(*args, **kwargs)


X, W8 = torch.zeros(2, 3, 8), torch.zeros(8)
QKV = [torch.zeros(1, 4, 2, 8)] * 3
FROM = torch.zeros(1, 4, dtype=torch.int32)
POSITIONS = torch.zeros(2, 2, 3, dtype=torch.int32)
ROTARY = {"period": 2, "passthrough": 1, "rotary_dim": 4, "mode": "1d"}


@pytest.mark.parametrize(
    "call,words",
    [
        (bad(residual_norm, X, X, None, torch.zeros(7), None), r"weight has shape \[7\]; expected \[8\]"),
        (bad(residual_norm, X, X.half(), None, W8, None), "f is torch.float16"),
        (bad(residual_norm, X, X, None, W8, None, kind="batchnorm"), "kind='batchnorm'"),
        (bad(residual_norm, X, X.to("meta"), None, W8, None), "f is on meta"),
        (bad(residual_norm, X.long(), X.long(), None, W8, None), "x is torch.int64"),
        (bad(residual_norm, X, None, W8, W8, None), "belong to f"),
        (bad(bias_activation, X[..., :7], None, kind="geglu"), "even"),
        (bad(bias_activation, X, torch.zeros(3), kind="gelu"), r"bias has shape \[3\]"),
        (bad(rotary, X[:, :, None], None, POSITIONS.long(), **ROTARY), "positions is torch.int64"),
        (bad(rotary, X.view(2, 3, 2, 4), None, POSITIONS[:, :1], **ROTARY), "positions has shape"),
        (bad(rotary, X.view(2, 3, 2, 4), None, POSITIONS, **{**ROTARY, "rotary_dim": 6}), "rotary_dim=6"),
        (bad(interval_attention, *QKV, FROM.long(), FROM, scale=1.0), "attend_from is torch.int64"),
        (bad(interval_attention, QKV[0][:, :, :1], *QKV[1:], FROM, FROM, scale=1.0), "do not divide"),
        (bad(interval_attention, *QKV, FROM, FROM[:, :2], scale=1.0), "attend_to has shape"),
        (bad(sdpa_attention, *QKV, FROM, FROM, scale=1.0, softcap=1.0), "no softcap"),
        (bad(linear_cross_entropy, X[0], X[1].half(), torch.zeros(3).long(), torch.zeros(3)), "weight torch.float16"),
        (bad(linear_cross_entropy, X[0], X[1], torch.zeros(3), torch.zeros(3)), "targets is torch.float32"),
        (bad(embedding, torch.zeros(2), X[0]), "tokens is torch.float32"),
        (bad(Dropout, 1.0, 1, torch.zeros(2).long()), "probability=1.0"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_unpacked_heads_pass_any_gradient_back():
    packed = leaf(2, 5, 3, 3, 4, seed=1)
    query, key, value = unpack_heads(packed)
    grads = [leaf(2, 5, 3, 4, seed=seed).detach() for seed in (2, 3, 4)]
    (found,) = torch.autograd.grad([query, key, value], packed, grads)
    assert torch.equal(found, torch.stack(grads, 3))
    together = torch.stack(grads, 3)
    (found,) = torch.autograd.grad([*unpack_heads(packed)], packed, list(together.unbind(3)))
    assert found.data_ptr() == together.data_ptr()
    shuffled = [together[:, :, :, part] for part in (1, 0, 2)]  # of one tensor, but not in its order
    (found,) = torch.autograd.grad([*unpack_heads(packed)], packed, shuffled)
    assert torch.equal(found, torch.stack(shuffled, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_gradients_are_summed_in_float32(dtype):
    x, weight = leaf(3, 50, 8, seed=1, dtype=dtype), leaf(6, 8, seed=2, dtype=dtype)
    dout = leaf(3, 50, 6, seed=3, dtype=dtype).detach()
    (dx, dweight) = torch.autograd.grad(linear(x, weight), [x, weight], dout)
    exact = dout.flatten(0, 1).double().t() @ x.detach().flatten(0, 1).double()
    weight.main_grad = torch.full(weight.shape, 2.0)
    linear(x, weight).backward(dout)
    linear(x, weight).backward(dout)
    assert weight.grad is None
    assert torch.equal(x.grad, 2 * dx)
    assert error_ratio((weight.main_grad - 2.0) / 2, exact) < 1e-6
    assert error_ratio(dweight, exact) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_adds_its_gradient_to_the_next_readers(dtype):
    x, weight = leaf(3, 50, 8, seed=1, dtype=dtype), leaf(6, 8, seed=2, dtype=dtype)
    dout, dnext = leaf(3, 50, 6, seed=3, dtype=dtype).detach(), leaf(3, 50, 8, seed=4, dtype=dtype).detach()
    plain, same = linear_and_input(x, weight)
    assert same is x
    exact = 3.0 * dnext.double() + dout.double() @ weight.detach().double()
    weight.main_grad = torch.zeros(weight.shape)
    out, passed = linear_and_input(x, weight)
    assert torch.equal(out, plain)
    assert torch.equal(passed, x)
    readers: list[int] = []
    passed.register_hook(lambda gradient: readers.append(gradient.data_ptr()))
    torch.autograd.backward([out, passed * 3.0], [dout, dnext])
    assert error_ratio(x.grad, exact) < TOLERANCE[dtype]
    assert x.grad.data_ptr() == readers[0]
    x.grad = None
    linear_and_input(x, weight)[0].backward(dout)  # nobody read what was handed on
    assert error_ratio(x.grad, exact - 3.0 * dnext.double()) < TOLERANCE[dtype]


def test_a_summed_table_takes_the_looked_up_rows_only():
    table, tokens = leaf(9, 4, seed=1, dtype=torch.float32), torch.tensor([[3, 3, 0], [8, 3, 5]])
    dout = leaf(2, 3, 4, seed=2, dtype=torch.float32).detach()
    (expected,) = torch.autograd.grad(embedding(tokens, table, shrink=0.1, vocab_start=0), table, dout)
    table.main_grad = torch.ones(9, 4)
    embedding(tokens, table, shrink=0.1, vocab_start=0).backward(dout)
    assert table.grad is None
    torch.testing.assert_close(table.main_grad - 1.0, expected)
