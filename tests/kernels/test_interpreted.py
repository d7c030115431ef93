"""The Triton kernels of generation without a GPU: their tests in one process with Triton's interpreter.

The interpreter must be chosen before triton is first imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FILES = (
    "test_decode_attention.py",
    "test_flash4.py",
    "test_fp8_product.py",
    "test_greedy_step.py",
    "test_quantised_matmul.py",
)


@pytest.mark.unit
@pytest.mark.skipif(torch.cuda.is_available(), reason="they run on the GPU")
def test_the_kernels_of_generation():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    files = [str(Path(__file__).with_name(name)) for name in FILES]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "the_kernel", *files]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
