"""The docs say what the code does: the config page is current, every key is documented, links and commands hold."""

import dataclasses
import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.conftest import ROOT
from train import rules
from train.cli import compose_train
from train.config import Config

pytestmark = pytest.mark.unit
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")])


def _maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_config_reference", ROOT / "docs" / "make_config_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_config_page_is_current() -> None:
    assert (ROOT / "docs" / "config.md").read_text("utf-8") == _maker().reference(), "run `make docs`"


def test_every_field_is_documented() -> None:
    maker = _maker()

    def schemas(schema: Any) -> list[Any]:
        inner = [item.type for item in dataclasses.fields(schema) if dataclasses.is_dataclass(item.type)]
        return [schema, *(found for one in inner for found in schemas(one))]

    for schema in schemas(Config):
        documented = maker.field_docs(schema)
        for item in dataclasses.fields(schema):
            if not dataclasses.is_dataclass(item.type):
                assert documented.get(item.name), f"{schema.__name__}.{item.name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
        if not target.startswith(("http:", "https:", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_train_commands_compose(page: Path) -> None:
    """Each `python -m train …` line of a shell block is a config that holds together."""
    for block in re.findall(r"```(?:bash|sh)\n(.*?)```", page.read_text("utf-8"), flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:3] not in (["python", "-m", "train"], ["python", "-m", "launch"]):
                continue
            overrides = [word for word in words[3:] if "=" in word and not word.startswith("-")]
            needed = [] if any("data" in word or "experiment" in word for word in overrides) else ["data.path=unused"]
            rules.check(compose_train([*overrides, *needed]))
