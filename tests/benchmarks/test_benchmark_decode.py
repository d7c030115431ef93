"""The checks that the benchmark of decoding runs before it times anything pass, so that no time on a GPU is lost."""

import pytest

from benchmarks import decode_check

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("form", ["llama", "glm"])
def test_decoding_writes_what_transformers_writes(form):
    assert decode_check.check_texts(form) is None
