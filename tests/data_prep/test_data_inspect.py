"""The inspector shows what is in a sample: every hidden token, its place, and the mask as the intervals say."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from sample_checks import take_apart

from data_prep.cli import run
from data_prep.config import SamplingConfig
from data_prep.dataset import Dataset
from data_prep.inspect import InspectConfig, describe, main, picture, png, segments, small_picture
from data_prep.samples import Sampler

pytestmark = pytest.mark.unit


def unpacked(content: bytes) -> np.ndarray:
    """The pixels of a PNG with a palette, read by the format's description."""
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    chunks, at = {}, 8
    while at < len(content):
        (size,) = struct.unpack(">I", content[at : at + 4])
        name, body = content[at + 4 : at + 8], content[at + 8 : at + 8 + size]
        assert struct.unpack(">I", content[at + 8 + size : at + 12 + size])[0] == zlib.crc32(name + body)
        chunks[name] = body
        at += 12 + size
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert not rows[:, 0].any()
    return rows[:, 1:]


@pytest.mark.parametrize("isolate", [False, True])
def test_the_words_and_the_picture_are_the_sample(dataset: Dataset, isolate: bool) -> None:
    sampler = Sampler(dataset, SamplingConfig(isolate_documents=isolate, positions="2d"), 128, seed=5)
    for index in range(30):
        sample = sampler.sample(index)
        taken = take_apart(sample, dataset.tokenizer, two_dimensional=True)
        shown = describe(sample, dataset.tokenizer)
        assert len(shown) == len(taken) == len(segments(sample))
        for text, segment in zip(shown, taken, strict=True):
            assert text.plain.count("targets at slots") == len(segment.spans)
            for start, length in segment.spans:
                hidden = dataset.tokenizer.decode(segment.text[start : start + length].tolist())
                assert hidden in text.plain
        seen = picture(sample)
        keys = np.arange(128)
        expected = (keys >= sample.attend_from[:, None]) & (keys < sample.attend_to[:, None])
        assert ((seen > 0) == expected).all()
        assert ((seen == 2).any(axis=1) >= (sample.loss_weight > 0)).all()
        assert (unpacked(png(seen)) == seen).all()
        assert small_picture(sample).plain.count("▀") == 64 * 32


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def command(*words: str) -> int:
        argv = [f"data.path={folder}", "sequence_length=64", *words]
        return run("inspect", InspectConfig, main, program="data_prep.inspect", argv=argv)

    assert command("index=3", f"output={tmp_path / '图.png'}") == 0
    assert unpacked((tmp_path / "图.png").read_bytes()).shape == (64, 64)
    assert "sample 3 of train" in capsys.readouterr().out
    assert command("index=3", "split=dev") == 2
    assert command("index=-1") == 2
    assert command() == 2
