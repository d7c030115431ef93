"""GLM-130B's released class on small models exported by `train.convert`: writes the logits that CI compares with.

The class comes in the wheel SwissArmyTransformer 0.2.12, which wants packages that this project does without. Unpack
the wheel into any folder and run, from the repository's root:

    PYTHONPATH=FOLDER python -m tests.train.sat_reference

Each of one or two gloo ranks loads its own mp_rank file and computes in fp32. What the class asks of CUDA and apex is
stubbed: the current device, and the fused scale-mask-softmax, here three lines of torch. For `fp32` angles the class's
fp16 frequencies are replaced, nothing else.
"""

import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from data_prep.config import TokenizerConfig
from data_prep.files import write_bytes
from data_prep.tokenizer_training import train_tokenizer
from kernels.random import mix_key, normal_slice
from tests.train.convert_helpers import config_of, convert, model_of, write_checkpoint
from tests.train.parity import in_ranks
from train.config import ModelConfig
from train.convert.mapping import layouts

FIXTURE = Path(__file__).parent / "sat_logits.npz"
STUBS = ("tensorboardX", "cpm_kernels", "cpm_kernels.kernels", "cpm_kernels.kernels.base", "webdataset", "braceexpand")
CASES = {"fp16_angles_tp1": (True, 1), "fp16_angles_tp2": (True, 2), "fp32_angles_tp1": (False, 1)}
"""Name of each stored array: whether angles are the release's fp16 ones, and the tensor-parallel size."""
SLOTS, CONTEXT = 12, 7


def model_for(fp16_angles: bool) -> ModelConfig:
    """GLM-130B's architecture at a size that a fixture can hold."""
    return model_of(num_layers=3, max_positions=2048, rotary_fp16_angles=fp16_angles)


def addressed_weights(model: ModelConfig) -> dict[str, Tensor]:
    """Weights drawn by name and index, the same on any version of torch."""
    found = {}
    for name, layout in layouts(model).items():
        rows, columns = (1, *layout.full_shape)[-2:]
        value = normal_slice(mix_key(11, name), (0, rows), (0, columns), columns).view(layout.full_shape)
        found[name] = 0.2 * value + ("norm.weight" in name)
    return found


def sample() -> tuple[Tensor, Tensor]:
    """Tokens and positions, int64 [2, SLOTS]: a context that sees itself, then a blank at one position and a tail.

    Positions reach 2047, where fp16 angles are furthest off.
    """
    tokens = torch.arange(2 * SLOTS).view(2, SLOTS) * 53 % 601
    places = torch.arange(SLOTS).repeat(2, 1)
    places[0, CONTEXT:] = 3
    places[1, 2:] += 2036
    return tokens, places


def main() -> int:
    """Write the fixture."""
    for name in STUBS:
        sys.modules[name] = mock.MagicMock()
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        # Any tokenizer that the vocabulary can hold: none of its tokens is used.
        pieces = train_tokenizer([Path(__file__).read_text("utf-8")], TokenizerConfig(vocab_size=300))
        write_bytes(Path(scratch) / "tokenizer" / "tokenizer.model", pieces.model)
        for name, (fp16_angles, ranks) in CASES.items():
            folder = Path(scratch) / name
            model = model_for(fp16_angles)
            config = config_of(model, objective="blank_infilling")
            source = write_checkpoint(folder / "ours", config, addressed_weights(model), Path(scratch))
            away = convert(source, folder / "theirs", "glm_130b", tensor_parallel=ranks)
            found[name] = in_ranks(ranks, _rank, str(away), ranks, fp16_angles)
    np.savez_compressed(FIXTURE, **found)
    print(f"{FIXTURE}: {', '.join(found)}")
    return 0


def _rank(folder: str, ranks: int, fp16_angles: bool) -> Any:
    """Logits float32 [2, SLOTS, vocabulary] of the released class, whole on every rank."""
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment]
    from SwissArmyTransformer import mpu
    from SwissArmyTransformer.model.official.glm130B_model import GLM130B

    mpu.initialize_model_parallel(ranks)
    shape = model_for(fp16_angles)
    settings = Namespace(
        num_layers=shape.num_layers,
        vocab_size=shape.padded_vocab_size,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_heads,
        inner_hidden_size=shape.ffn_hidden_size,
        max_sequence_length=shape.max_positions,
        hidden_size_per_attention_head=None,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        checkpoint_activations=False,
        checkpoint_num_layers=1,
        layernorm_order="post",
        model_parallel_size=ranks,
        skip_init=True,
        use_gpu_initialization=False,
        fp16=False,
    )
    model = GLM130B(settings).eval().float()
    model.get_mixin("fp32-softmax").scale_mask_softmax = _Softmax()
    # float() has turned the frequencies' buffer into fp32 too, with its values rounded to fp16: neither form.
    dims = shape.hidden_size // shape.num_heads
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, dims, 2).float() / dims)
    rotary = model.get_mixin("rotary-embedding").rotary_emb
    rotary.inv_freq = frequencies.half() if fp16_angles else frequencies
    path = Path(folder) / "30" / f"mp_rank_{torch.distributed.get_rank():02d}_model_states.pt"
    state = torch.load(path, weights_only=True)["module"]
    missing, extra = model.load_state_dict(state, strict=False)
    assert not extra, extra
    assert not [key for key in missing if "rotary" not in key], missing
    tokens, places = sample()
    hidden = torch.arange(SLOTS) >= torch.arange(SLOTS)[:, None] + 1
    hidden[:, :CONTEXT] = False
    with torch.no_grad():
        logits = model(tokens, places, hidden[None, None].expand(2, 1, SLOTS, SLOTS))[0]
    if logits.shape[-1] != shape.padded_vocab_size:
        logits = mpu.gather_from_model_parallel_region(logits)
    return logits.numpy()


class _Softmax:
    """apex's FusedScaleMaskSoftmax, as the class sets it up: mask, scale, softmax in fp32."""

    scale: Any = 1.0

    def __call__(self, scores: Tensor, mask: Tensor) -> Tensor:
        return torch.softmax(scores.masked_fill(mask, -10000.0) * self.scale, dim=-1)


if __name__ == "__main__":
    sys.exit(main())
