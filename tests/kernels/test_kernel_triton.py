"""The Triton kernels against the float64 formulas, on a GPU where there is one, else in Triton's interpreter.

The interpreter must be chosen before triton is first imported, so without a GPU these run in processes of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

CUDA = torch.cuda.is_available()
GROUPS = ["philox or cross_entropy or registered", "residual_norm or bias_activation or rotary", "attention"]

if not CUDA and os.environ.get("TRITON_INTERPRET") != "1":

    @pytest.mark.unit
    @pytest.mark.parametrize("names", GROUPS)
    def test_in_the_interpreter(names):
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", names, __file__]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]

else:
    import kernel_formulas as formulas
    import triton
    import triton.language as tl
    from kernel_formulas import as64, error_ratio, leaf, philox_scalar
    from test_kernel_references import gradients_agree, intervals
    from torch.utils.checkpoint import checkpoint

    import kernels.interval_attention_triton as attention
    import kernels.linear_cross_entropy_triton as cross_entropy
    import kernels.residual_norm_triton as norm
    from kernels.bias_activation import KINDS as ACTIVATIONS
    from kernels.bias_activation_triton import bias_activation
    from kernels.interval_attention import interval_attention as attention_reference
    from kernels.interval_attention import unpack_heads
    from kernels.random import Dropout, dropout_key, keep_attention, keep_hidden
    from kernels.rotary_triton import rotary
    from kernels.shared_triton import words_of

    pytestmark = pytest.mark.gpu if CUDA else pytest.mark.unit
    DEVICE = "cuda" if CUDA else "cpu"
    # the interpreter's bfloat16 is wrong; on a GPU it is checked here and, against PyTorch's error, in kernels.bench
    TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3} | ({torch.bfloat16: 1.2e-2} if CUDA else {})
    DTYPES = list(TOLERANCE)

    def tensor(*shape, seed, dtype=torch.float32):
        return leaf(*shape, seed=seed).detach().to(DEVICE, dtype).requires_grad_()

    @triton.jit
    def _philox_kernel(out, key, sample, first, BLOCK: tl.constexpr):
        block = first + tl.arange(0, BLOCK).to(tl.int64)
        w0, w1, w2, w3 = words_of(key, tl.full([], 0, tl.int64) + sample, block)
        at = out + tl.arange(0, BLOCK) * 4
        tl.store(at, w0.to(tl.int64))
        tl.store(at + 1, w1.to(tl.int64))
        tl.store(at + 2, w2.to(tl.int64))
        tl.store(at + 3, w3.to(tl.int64))

    @pytest.mark.parametrize("sample,first", [(3, 0), (2**40 + 5, 2**33 - 3)])
    def test_philox_words(sample, first):
        out, key = torch.zeros(8, 4, dtype=torch.int64, device=DEVICE), dropout_key(1, 2, "ffn")
        _philox_kernel[(1,)](out, key, sample, first, BLOCK=8)
        for i in range(8):
            block = first + i
            counter = (block & 0xFFFFFFFF, block >> 32, sample & 0xFFFFFFFF, sample >> 32)
            assert out[i].tolist() == philox_scalar(key, counter)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("wide", [False, True])
    @pytest.mark.parametrize(
        "rows,hidden,kind,with_f,probability,both",
        [(7, 24, "layernorm", 1, 0.3, 1), (1, 30, "rmsnorm", 1, 0.0, 0), (5, 96, "layernorm", 0, 0.0, 0),
         (3, 30, "layernorm", 1, 0.2, 0)],
    )  # fmt: skip
    def test_residual_norm(monkeypatch, dtype, wide, rows, hidden, kind, with_f, probability, both):
        if wide:
            monkeypatch.setattr(norm, "WIDE", 16)
            monkeypatch.setattr(norm, "WIDE_TILE", (2, 32, 4, 1))
        x = tensor(2, rows, 2 * hidden, seed=1, dtype=dtype)[..., ::2]  # not contiguous
        f, bias = (
            (tensor(2, rows, hidden, seed=2, dtype=dtype), tensor(hidden, seed=3, dtype=dtype))
            if with_f
            else (None,) * 2
        )
        weight = tensor(hidden, seed=4, dtype=dtype)
        shift = tensor(hidden, seed=5, dtype=dtype) if kind == "layernorm" else None
        dropout = Dropout(probability, dropout_key(7, 3, "ffn"), torch.tensor([5, 2**40], device=DEVICE), offset=2)
        keep = keep_hidden(dropout, rows, hidden).double() if probability else None
        inputs = [x, f, bias, weight, shift]
        wide64 = [as64(t) for t in inputs]
        options = {"alpha": 3.7 if with_f else 1.0, "eps": 1e-5, "kind": kind}
        outs = norm.residual_norm(*inputs, **options, dropout=dropout if probability else None, return_sum=True)
        expected = formulas.residual_norm(*wide64, **options, keep=keep, probability=probability)
        if not both:
            outs, expected = outs[:1], expected[:1]
        present = [i for i, t in enumerate(inputs) if t is not None]
        gradients_agree(outs, [inputs[i] for i in present], expected, [wide64[i] for i in present], TOLERANCE[dtype])

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("kind", ACTIVATIONS)
    @pytest.mark.parametrize("rows,width,with_bias", [(7, 30, True), (1, 34, False)])
    def test_bias_activation(dtype, kind, rows, width, with_bias):
        inputs = [tensor(3, rows, width, seed=1, dtype=dtype)] + [tensor(width, seed=2, dtype=dtype)] * with_bias
        wide = [as64(t) for t in inputs]
        out = bias_activation(inputs[0], inputs[1] if with_bias else None, kind=kind)
        expected = formulas.bias_activation(wide[0], wide[1] if with_bias else None, kind)
        gradients_agree([out], inputs, [expected], wide, TOLERANCE[dtype])

    @pytest.mark.parametrize("dtype", DTYPES if CUDA else [torch.float32])
    @pytest.mark.parametrize(
        "mode,interleaved,rotary_dim,period,passthrough,with_bias",
        [("1d", False, 16, 3, 1, True), ("1d", True, 8, 4, 1, True), ("2d", False, 16, 3, 1, False),
         ("2d", True, 8, 12, 2, True), ("none", False, 16, 3, 1, True), ("1d", False, 12, 1, 0, True)],
    )  # fmt: skip
    def test_rotary(dtype, mode, interleaved, rotary_dim, period, passthrough, with_bias):
        inputs = [tensor(2, 9, 12, 16, seed=1, dtype=dtype)] + [tensor(12 * 16, seed=2, dtype=dtype)] * with_bias
        # Two rows of a larger tensor, as a batch's meta holds them.
        meta = torch.randint(0, 300, (2, 4, 9), dtype=torch.int32, generator=torch.Generator().manual_seed(3))
        positions = meta.to(DEVICE)[:, :2]
        options = {"period": period, "passthrough": passthrough, "rotary_dim": rotary_dim, "mode": mode}
        options |= {"interleaved": interleaved, "base": 10000.0, "scale": 4.0 if interleaved else 1.0}
        options |= {"ramp_from": 0.5, "ramp_to": 1.75} if interleaved and mode == "2d" else {}
        wide = [as64(t) for t in inputs]
        out = rotary(inputs[0], inputs[1] if with_bias else None, positions, **options)
        expected = formulas.rotary(wide[0], wide[1] if with_bias else None, positions, **options)
        gradients_agree([out], inputs, [expected], wide, max(TOLERANCE[dtype], 2e-5))

    @pytest.mark.parametrize("mask", ["causal", "full", "prefix", "one", "random"])
    @pytest.mark.parametrize(
        "heads,kv_heads,length,options",
        [(2, 2, 35, {}), (4, 2, 20, {"softcap": 5.0, "probability": 0.3}), (2, 1, 18, {})],
    )
    def test_attention(monkeypatch, mask, heads, kv_heads, length, options):
        small = attention.Tile(16, 16, 4, 1)
        monkeypatch.setattr(attention, "SMALL", attention.Tiles(small, small, small))
        packed = tensor(2, length, heads + 2 * kv_heads, 16, seed=heads)  # slices of a packed projection
        inputs = list(packed.split((heads, kv_heads, kv_heads), dim=2))
        start, stop = (t.to(DEVICE) for t in intervals(mask, 2, length, length))
        options = dict(options)
        probability = options.pop("probability", 0.0)
        dropout = Dropout(
            probability, dropout_key(1, 2, "attention"), torch.tensor([3, 2**40], device=DEVICE), offset=1
        )
        keep = keep_attention(dropout, heads, length, length).double() if probability else None
        out, lse, top = attention.interval_attention(
            *inputs, start, stop, scale=0.35, dropout=dropout, want_max_logit=True, **options
        )
        wide = [as64(t) for t in inputs]
        expected, expected_lse = formulas.interval_attention(
            *wide, start, stop, scale=0.35, softcap=options.get("softcap", 0.0), keep=keep, probability=probability
        )
        gradients_agree([out], inputs, [expected], wide, 1e-5)
        torch.testing.assert_close(lse.double().cpu(), expected_lse, atol=1e-5, rtol=1e-5)
        wanted = attention_reference(*inputs, start, stop, scale=0.35, want_max_logit=True)[2]
        torch.testing.assert_close(top, wanted, atol=1e-5, rtol=1e-5)

    def test_attention_gradients_of_packed_heads_lie_in_one_tensor():
        packed = tensor(2, 20, 2, 3, 16, seed=7)
        start, stop = (t.to(DEVICE) for t in intervals("prefix", 2, 20, 20))
        heads = unpack_heads(packed)
        out = attention.interval_attention(*heads, start, stop, scale=0.35)[0]
        wide = as64(packed)
        expected = formulas.interval_attention(*wide.unbind(3), start, stop, scale=0.35, keep=None)[0]
        gradients_agree([out], [packed], [expected], [wide], 1e-5)
        parts = torch.autograd.grad(attention.interval_attention(*heads, start, stop, scale=0.35)[0].sum(), heads)
        assert len({part.untyped_storage().data_ptr() for part in parts}) == 1

    def test_attention_under_activation_checkpointing():
        q, k, v = (tensor(1, 20, 2, 16, seed=seed) for seed in (1, 2, 3))
        start, stop = (t.to(DEVICE) for t in intervals("prefix", 1, 20, 20))

        def run(*heads):
            return attention.interval_attention(*heads, start, stop, scale=0.35)[0]

        kept = torch.autograd.grad(run(q, k, v).sum(), (q, k, v))
        again = torch.autograd.grad(checkpoint(run, q, k, v, use_reentrant=False).sum(), (q, k, v))
        assert all(torch.equal(one, other) for one, other in zip(kept, again, strict=True))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("z_loss,softcap,shrink", [(0.0, 0.0, 1.0), (1e-2, 0.0, 0.25), (1e-2, 3.0, 1.0)])
    @pytest.mark.parametrize("chunk", [1 << 20, 4 * 37 * 4])
    def test_cross_entropy(monkeypatch, dtype, z_loss, softcap, shrink, chunk):
        monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", chunk)
        monkeypatch.setattr(cross_entropy, "BLOCK", 16)
        hidden, weight = tensor(11, 16, seed=1, dtype=dtype), tensor(37, 16, seed=2, dtype=dtype)
        generator = torch.Generator().manual_seed(3)
        targets, weights = torch.randint(0, 37, (11,), generator=generator), 1e-4 * torch.rand(11, generator=generator)
        weights[3:6] = 0.0
        groups = torch.arange(11, dtype=torch.uint8).to(DEVICE)
        loss, z, sums = cross_entropy.linear_cross_entropy(
            hidden, weight, targets.masked_fill(weights == 0, -1).to(DEVICE), weights.to(DEVICE),
            groups=groups, z_loss=z_loss, softcap=softcap, weight_shrink=shrink,
        )  # fmt: skip
        wide = [as64(hidden), as64(weight)]
        want_loss, want_z, row_loss = formulas.linear_cross_entropy(
            *wide, targets.to(DEVICE), weights.double().to(DEVICE), z_loss=z_loss, softcap=softcap
        )
        torch.testing.assert_close((loss + z).double(), want_loss + want_z, rtol=1e-5, atol=0)
        grads = torch.autograd.grad(1000.0 * (loss + z), [hidden, weight])
        wants = torch.autograd.grad(1000.0 * (want_loss + want_z), wide)
        assert error_ratio(grads[0], wants[0]) < TOLERANCE[dtype]
        assert error_ratio(grads[1], shrink * wants[1]) < TOLERANCE[dtype]
        weight.main_grad = torch.ones(weight.shape, device=DEVICE)
        summed = cross_entropy.linear_cross_entropy(
            hidden, weight, targets.masked_fill(weights == 0, -1).to(DEVICE), weights.to(DEVICE),
            z_loss=z_loss, softcap=softcap, weight_shrink=shrink,
        )  # fmt: skip
        (1000.0 * (summed[0] + summed[1])).backward()
        assert weight.grad is None
        assert error_ratio(weight.main_grad - 1.0, shrink * wants[1]) < max(TOLERANCE[dtype], 1e-4)
        with torch.no_grad():  # evaluation makes no gradients
            again = cross_entropy.linear_cross_entropy(
                hidden, weight, targets.clamp(min=0).to(DEVICE), weights.to(DEVICE), z_loss=z_loss, softcap=softcap
            )
        assert torch.equal(again[0], loss)
        assert sums[3].tolist() == [0.0, 0.0]
        assert sums[8].tolist() == [pytest.approx(row_loss[8].item(), rel=1e-5), 1.0]

    def test_registered_operations_are_sound():
        """Schemas, fake tensors and autograd as torch.compile sees them."""
        checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        x, f, v = tensor(2, 3, 8, seed=1), tensor(2, 3, 8, seed=2), [tensor(8, seed=i) for i in range(3)]
        ops = torch.ops.tiankong
        torch.library.opcheck(ops.residual_norm, (x, f, *v, None, 0, 0, 0.0, 2.0, 1e-5, False, True), test_utils=checks)
        torch.library.opcheck(ops.bias_activation, (x, v[0], 0), test_utils=checks)
        positions = torch.zeros(2, 2, 3, dtype=torch.int32, device=DEVICE)
        heads = tensor(2, 3, 3, 8, seed=4)
        angles = (3, 1, 8, 1, False, 1e4, 1.0, -1.0, 0.0, False)
        torch.library.opcheck(ops.rotary, (heads, None, positions, *angles), test_utils=checks)
        q = tensor(1, 20, 2, 16, seed=5)
        start, stop = (t.to(DEVICE) for t in intervals("causal", 1, 20, 20))
        options = (0.25, 0.0, 0, 0, 0.0, True)
        torch.library.opcheck(ops.interval_attention, (q, q, q, start, stop, None, *options), test_utils=checks)

    def test_attention_refuses_what_it_cannot():
        q = tensor(1, 4, 2, 24, seed=1)
        vectors = [t.to(DEVICE) for t in intervals("causal", 1, 4, 4)]
        with pytest.raises(ValueError, match="head_dim=24"):
            attention.interval_attention(q, q, q, *vectors, scale=1.0)
        many = torch.zeros(1, 1, 1, 16, device=DEVICE).expand(4096, 1, 16, 16)
        with pytest.raises(ValueError, match="4096 sequences of 16 heads"):
            attention.interval_attention(many, many, many, *[vectors[0][:1, :1].expand(4096, 1)] * 2, scale=1.0)
        with pytest.raises(ValueError, match="scale="):
            attention.interval_attention(q[..., :16], q[..., :16], q[..., :16], *vectors, scale=-1.0)
