"""The house stays in order: which room imports which, one module for DeepSpeed, no back end by name."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.unit
ROOMS = {"data_prep": set(), "kernels": set(), "train": {"data_prep", "kernels"}, "launch": {"train", "data_prep"}}
LAUNCH_MAY_IMPORT = {
    *("train.cluster", "train.config", "train.rules", "train.cli", "train.arithmetic", "train.run_folder"),
    *("train.heartbeat", "train.progress", "train.run_lock"),
    *("train.charts", "train.page", "train.observers", "train.memory"),
}


def sources(room: str) -> Iterator[Path]:
    yield from sorted((ROOT / room).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("room", ROOMS)
def test_arrows_go_one_way(room: str) -> None:
    for path in sources(room):
        for name in imports(path):
            top = name.split(".")[0]
            if top in ROOMS and top != room:
                assert top in ROOMS[room], f"{path.relative_to(ROOT)} imports {name}"
                if room == "launch" and top == "train":
                    assert name in LAUNCH_MAY_IMPORT, f"{path.relative_to(ROOT)} imports {name}"


def test_one_module_imports_deepspeed() -> None:
    found = {
        str(path.relative_to(ROOT))
        for room in ROOMS
        for path in sources(room)
        if any(name.split(".")[0] == "deepspeed" for name in imports(path))
    }
    assert found == {"train/backend.py"}


def test_no_back_end_is_named_outside_the_kernels() -> None:
    for room in set(ROOMS) - {"kernels"}:
        for path in sources(room):
            text = path.read_text("utf-8").lower()
            code = "\n".join(line.split("#")[0] for line in text.splitlines())
            assert "torch.cuda" not in code, path
            assert '"cuda"' not in code, path


@pytest.mark.parametrize("module", sorted(LAUNCH_MAY_IMPORT))
def test_what_the_launcher_imports_needs_no_torch(module: str) -> None:
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    assert "torch" not in {name.split(".")[0] for name in imports(path)}
