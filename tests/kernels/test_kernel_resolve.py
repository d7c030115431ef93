"""The choice of implementations: what `auto` takes, what a missing feature says, that configs and schema agree."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import kernels.resolve
from kernels.config import KernelsConfig
from kernels.resolve import TABLE, KernelError, choose, resolve

pytestmark = pytest.mark.unit
CONFIGS = Path(__file__).parents[2] / "configs" / "kernels"


def test_the_schema_names_every_operation():
    assert {field.name for field in dataclasses.fields(KernelsConfig)} == set(TABLE)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs(path):
    values = yaml.safe_load(path.read_text())
    assert set(values) == set(TABLE)
    for op, value in values.items():
        assert value == "auto" or value in TABLE[op].implementations, (op, value)


@pytest.mark.parametrize("op", sorted(TABLE))
def test_auto_on_the_cpu_needs_nothing(op):
    assert callable(resolve(op, "auto", "cpu", torch.float32))


def test_attention_falls_back_by_feature():
    assert resolve("interval_attention", "auto", "cpu", torch.float32, {"dropout"}).__name__ == "interval_attention"
    chosen = resolve("interval_attention", "auto", "cpu", torch.float32, {"pb_relax"})
    assert chosen.func.__name__ == "unfused_attention"
    assert chosen.keywords == {"pb_relax": True}


def test_errors_name_the_key():
    with pytest.raises(KernelError, match=r"kernels\.interval_attention=sdpa: sdpa lacks softcap; use reference"):
        resolve("interval_attention", "sdpa", "cpu", torch.float32, {"softcap"})
    with pytest.raises(ValueError, match=r"kernels\.rotary='fast'; use one of auto, compile, reference"):
        resolve("rotary", "fast", "cpu", torch.float32)
    with pytest.raises(KernelError, match=r"kernels\.swish: no such operation"):
        resolve("swish", "auto", "cpu", torch.float32)
    with pytest.raises(KernelError, match=r"kernels\.residual_norm=reference: reference does not take torch\.int8"):
        resolve("residual_norm", "reference", "cpu", torch.int8)


@pytest.mark.parametrize("content", [None, "raise ImportError('undefined symbol')"])
def test_a_package_that_is_missing_or_broken_is_named(content, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    if content is not None:
        (tmp_path / "flash_attn").mkdir()
        (tmp_path / "flash_attn" / "__init__.py").write_text(content)
    with pytest.raises(KernelError, match=r"attention=flash4: flash4 needs the package flash_attn\.cute; use "):
        resolve("interval_attention", "flash4", "cuda", torch.bfloat16)


def test_a_gpu_of_another_kind_is_named(monkeypatch):
    monkeypatch.setattr(kernels.resolve, "_installed", lambda name: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(KernelError, match=r"flash4 needs a GPU of compute capability 9\.x, not 8\.0; use "):
        resolve("interval_attention", "flash4", "cuda", torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert choose("interval_attention", "flash4", "cuda", torch.bfloat16) == "flash4"


def test_a_choice_is_logged_once(caplog):
    kernels.resolve._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="kernels.resolve"):
        for _ in range(3):
            resolve("rotary", "reference", "cpu", torch.float32)
    assert [r.message for r in caplog.records] == ["kernels.rotary=reference runs reference on cpu in torch.float32"]


def test_importing_the_package_loads_nothing():
    code = "import sys, kernels, kernels.config; assert not {'torch', 'triton', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=CONFIGS.parents[1])
