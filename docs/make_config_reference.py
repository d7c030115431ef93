"""Write docs/config.md: every config key with its type, default and meaning, read from the dataclasses themselves.

make docs
"""

import ast
import dataclasses
import inspect
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from omegaconf import MISSING  # noqa: E402

from launch.plan_config import PlannerConfig  # noqa: E402
from launch.simulate import SimulationConfig  # noqa: E402
from train.config import CHOICES, Config  # noqa: E402

TARGET = ROOT / "docs" / "config.md"


def reference() -> str:
    """The page's text."""
    lines = [
        "# Every config key",
        "",
        "Written by `make docs` from the schemas in `train/`, `data_prep/`, `kernels/` and `launch/`. Values come from",
        "the files in `configs/`; the default below is what holds where none of them sets the key.",
        "`python -m train … --cfg job` prints what a run would use; `planner.*` belongs to `python -m launch.plan`,",
        "`simulation.*` to `python -m launch.simulate`.",
    ]
    groups = [(item.name, item.type) for item in dataclasses.fields(Config) if _is_group(item.type)]
    lines += _table("", Config)
    for name, schema in [*groups, ("planner", PlannerConfig), ("simulation", SimulationConfig)]:
        lines += _table(f"{name}.", schema)
    return "\n".join(lines) + "\n"


def _table(prefix: str, schema: Any) -> list[str]:
    docs = field_docs(schema)
    title = f"`{prefix.rstrip('.')}`" if prefix else "Top level"
    lines = ["", f"## {title}", "", *textwrap.wrap(_first_line(schema), 118), ""]
    lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
    nested = []
    for item in dataclasses.fields(schema):
        if _is_group(item.type):
            nested.append((f"{prefix}{item.name}.", item.type))
            continue
        words = CHOICES.get(f"{prefix}{item.name}")
        kind = " \\| ".join(words) if words else str(getattr(item.type, "__name__", item.type)).replace("|", "\\|")
        lines.append(f"| `{prefix}{item.name}` | {kind} | {_default(item)} | {docs[item.name]} |")
    for name, inner in nested if prefix else []:
        lines += _table(name, inner)
    return lines


def field_docs(schema: Any) -> dict[str, str]:
    """The string under each field of a dataclass, on one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(schema))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            assert isinstance(field.target, ast.Name)
            found[field.target.id] = " ".join(str(text.value.value).split()).replace("|", "\\|")
    return found


def _default(item: "dataclasses.Field[Any]") -> str:
    if item.default is not dataclasses.MISSING:
        value = item.default
    elif item.default_factory is not dataclasses.MISSING:
        value = item.default_factory()
    else:
        return "required"
    if value == MISSING:
        return "required"
    return f"`{'null' if value is None else str(value).lower() if isinstance(value, bool) else value}`"


def _first_line(schema: Any) -> str:
    return " ".join((schema.__doc__ or "").split("\n\n")[0].split())


def _is_group(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


if __name__ == "__main__":
    TARGET.write_text(reference(), encoding="utf-8")
    print(f"wrote {TARGET.relative_to(ROOT)}")
