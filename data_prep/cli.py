"""One entry point for every command: Hydra composes, a dataclass validates, errors become exit statuses.

    python -m train model=tiny data.path='我的 数据/(v2)' --cfg job

Hydra's own grammar stumbles over Chinese, spaces and brackets in values. The keys in `VALUE_KEYS` hold paths or free
text, never groups, so their values are quoted here before Hydra parses them.
"""

import dataclasses
import difflib
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from data_prep.errors import (
    EXIT_CONFIG,
    EXIT_CRASH,
    EXIT_DATA,
    EXIT_DONE,
    EXIT_STOPPED,
    ConfigError,
    DataError,
    RunFailed,
    Stopped,
)

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"

VALUE_KEYS = frozenset(
    {
        "data.path",
        "data.sources",
        "run_dir",
        "checkpoint",
        "text",
        "input",
        "tasks",
        "task_details",
        "evaluation.tasks",
        "evaluations",
        "output",
        "png",
        "run_dirs",
        "initialize_from",
        "tokenizer.path",
        "tokenizers",
        "source",
        "target",
    }
)
"""Keys whose values are paths or free text: quoted before Hydra sees them. `LIST_KEYS` hold lists of such."""
LIST_KEYS = frozenset({"data.sources", "run_dirs", "tasks", "evaluation.tasks", "tokenizers", "evaluations"})

_QUIET = ["hydra.run.dir=.", "hydra.sweep.subdir=.", "hydra.output_subdir=null"]
_QUIET += ["hydra/job_logging=none", "hydra/hydra_logging=none"]

Schema = TypeVar("Schema")


def run(
    config_name: str,
    schema: type[Schema],
    task: Callable[[Schema], int | None],
    *,
    program: str,
    aliases: Mapping[str, str] | None = None,
    argv: Sequence[str] | None = None,
) -> int:
    """Compose `configs/<config_name>.yaml` with the command line, validate it as `schema`, call `task`.

    aliases: key prefixes that users may write for another (`{"checkpoint.": "saving."}`).
    argv: the command line without the program's name; default `sys.argv[1:]`.
    Returns the exit status: what `task` returned (None counts as 0), 2 for a wrong setting, 3 for broken data, 75 for
    a run that stopped after saving, 1 with a traceback for anything else.
    """
    words = quote_values(sys.argv[1:] if argv is None else argv, aliases or {})
    if any(word.partition("=")[0] in ("--cfg", "-c") for word in words) and "--resolve" not in words:
        words.append("--resolve")
    ConfigStore.instance().store(name=f"{config_name}_schema", node=schema)
    composed: list[DictConfig] = []

    def keep(config: DictConfig) -> None:
        # The task runs after Hydra is done: Hydra would print a line of its own before each error.
        composed.append(config)

    previous = sys.argv
    # Without this Hydra prints its errors itself and always exits with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    status = EXIT_DONE
    try:
        _check_groups(words)
        # A sweep leaves a file behind, a single run does not.
        with tempfile.TemporaryDirectory(prefix="tiankong-sweep-") as scratch:
            # Flags last: Hydra's parser takes the words without a dash in one piece only.
            sys.argv = [program, *_QUIET, f"hydra.sweep.dir={scratch}", *_flags_last(words)]
            hydra.main(version_base=None, config_path=str(CONFIG_DIR), config_name=config_name)(keep)()
        for config in composed:
            try:
                status = max(status, task(to_object(config, schema)) or EXIT_DONE)
            except RunFailed as error:
                # In a sweep a run that diverged is a result; the others go on.
                if len(composed) == 1:
                    raise
                status = _say(program, EXIT_CRASH, error)
    except (ConfigError, HydraException, OmegaConfBaseException) as error:
        return _say(program, EXIT_CONFIG, error, schema)
    except DataError as error:
        return _say(program, EXIT_DATA, error)
    except RunFailed as error:
        return _say(program, EXIT_CRASH, error)
    except Stopped as stop:
        print(f"{program}: {stop}", file=sys.stderr, flush=True)
        return EXIT_STOPPED
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr, flush=True)
        return 130
    except Exception:
        traceback.print_exc()
        return EXIT_CRASH
    finally:
        sys.argv = previous
    return status


def compose(
    config_name: str, schema: type[Schema], overrides: Sequence[str] = (), aliases: Mapping[str, str] | None = None
) -> Schema:
    """The validated config of `configs/<config_name>.yaml` with `overrides`, without running anything.

    Raises ConfigError for an unknown key, a wrong type or a broken rule.
    """
    ConfigStore.instance().store(name=f"{config_name}_schema", node=schema)
    words = quote_values(overrides, aliases or {})
    try:
        _check_groups(words)
        with hydra.initialize_config_dir(version_base=None, config_dir=str(CONFIG_DIR)):
            return to_object(hydra.compose(config_name, overrides=words), schema)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_one_line(error, schema)) from error


def to_object(composed: DictConfig, schema: type[Schema]) -> Schema:
    """Dataclass instance of a composed config; runs each dataclass's `__post_init__` checks.

    Raises ConfigError for a key that `+key=` put in though the schema has none of that name.
    """
    container = OmegaConf.to_object(composed)
    if not isinstance(container, schema):
        raise TypeError(f"the defaults list of this config must start with the schema of {schema.__name__}")
    _check_keys(container, schema)
    return container


def _check_keys(node: Any, schema: type[Any], prefix: str = "") -> None:
    known = {item.name for item in dataclasses.fields(node)}
    for name, value in vars(node).items():
        if name not in known:
            raise ConfigError(_unknown_key(prefix + name, schema))
        if dataclasses.is_dataclass(value):
            _check_keys(value, schema, f"{prefix}{name}.")


def _check_groups(words: Sequence[str]) -> None:
    """Raise ConfigError for `model=…` and the like where the group's folder holds no such file."""
    if "-m" in words or "--multirun" in words:
        return
    for word in words:
        group, equals, name = word.lstrip("+").partition("=")
        if equals and name not in ("", "null") and group.isidentifier() and (CONFIG_DIR / group).is_dir():
            folder = CONFIG_DIR / group
            names = sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
            if name not in names:
                raise ConfigError(f"{word} is not known; use one of {', '.join(names)}")


def _flags_last(words: Sequence[str]) -> list[str]:
    """The words with `--cfg job` and the like behind the overrides."""
    flags = [number for number, word in enumerate(words) if word.startswith("-")]
    # What follows a flag is its value, unless it is an override.
    values = [number + 1 for number in flags if number + 1 < len(words) and "=" not in words[number + 1]]
    moved = sorted({*flags, *values})
    return [word for number, word in enumerate(words) if number not in moved] + [words[number] for number in moved]


def quote_values(words: Sequence[str], aliases: Mapping[str, str] | None = None) -> list[str]:
    """The command line with aliases replaced and the values of `VALUE_KEYS` quoted for Hydra's grammar."""
    multirun = "-m" in words or "--multirun" in words
    result = []
    for word in words:
        key, equals, value = word.partition("=")
        if key == "+experiment":
            key = "experiment"  # it stands in the defaults list, so that both spellings work
        bare = key.lstrip("+~")
        for alias, name in (aliases or {}).items():
            if bare.startswith(alias):
                key = key[: len(key) - len(bare)] + name + bare[len(alias) :]
                bare = key.lstrip("+~")
        if equals and bare in VALUE_KEYS and value not in ("", "null"):
            sweep = multirun and "," in value and not value.startswith("[")
            value = value if sweep else _quoted(bare, value)
        result.append(key + equals + value)
    return result


def _quoted(key: str, value: str) -> str:
    if key in LIST_KEYS:
        return _quote_list(value)
    return _quote(value if key == "text" else _unquoted(value))


def _quote_list(value: str) -> str:
    """A list of paths, or one path in place of a list of one; entries with fields are in Hydra's grammar already."""
    if not (value.startswith("[") and value.endswith("]")):
        value = f"[{value}]"
    if "{" in value:
        return value
    return "[" + ",".join(_quote(_unquoted(item.strip())) for item in _split(value[1:-1])) + "]"


def _unquoted(value: str) -> str:
    """A path without the quotes that a user of Hydra's grammar put around it."""
    return value[1:-1] if len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"" else value


def _quote(value: str) -> str:
    """A quoted string of Hydra's grammar, which unescapes backslashes before a quote only and `${` after it."""
    value = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return "'" + re.sub(r"(\\*)('|\Z)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value) + "'"


def _split(inner: str) -> list[str]:
    """Items between commas that are not inside quotes."""
    items: list[str] = [""]
    quote = ""
    for character in inner:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        if character == "," and not quote:
            items.append("")
        else:
            items[-1] += character
    return [item for item in items if item.strip()]


def _say(program: str, status: int, error: BaseException, schema: type[Any] | None = None) -> int:
    print(f"{program}: {_one_line(error, schema)}", file=sys.stderr, flush=True)
    return status


def _one_line(error: BaseException, schema: type[Any] | None = None) -> str:
    """Hydra and OmegaConf spread a message over lines and end with type noise; the useful part on one line."""
    if isinstance(error, HydraException) and isinstance(error.__cause__, OmegaConfBaseException):
        error = error.__cause__ if "Could not override" not in str(error) else error
    lines = [line.strip() for line in str(error).partition("Config search path")[0].splitlines()]
    useful = [line for line in lines if line and not line.startswith(("reference_type=", "object_type=", "set_struct"))]
    key = next((line.removeprefix("full_key: ") for line in useful if line.startswith("full_key: ")), "")
    text = " ".join(line for line in useful if not line.startswith("full_key: "))
    if isinstance(error, MissingMandatoryValue):
        return f"{key} is not set; give {key}=…"
    unknown = re.search(r"Could not override '([^']+)'", text)
    if unknown is not None:
        return _unknown_key(unknown[1], schema)
    if isinstance(error, OverrideParseException):
        return f"{error.override}: {text.partition(' See https://')[0]}"
    return (text if not key or key in text else f"{key}: {text}") or type(error).__name__


def _unknown_key(key: str, schema: type[Any] | None) -> str:
    near = difflib.get_close_matches(key, _keys(schema) if schema else [], n=3, cutoff=0.6)
    return f"{key} is not a known key" + (f"; did you mean {' or '.join(near)}?" if near else "")


def _keys(schema: type[Any], prefix: str = "") -> list[str]:
    """Dotted names of all fields of nested dataclasses."""
    names = []
    for item in dataclasses.fields(schema):
        names.append(prefix + item.name)
        if isinstance(item.type, type) and dataclasses.is_dataclass(item.type):
            names += _keys(item.type, f"{prefix}{item.name}.")
    return names


def as_yaml(config: Any) -> str:
    """YAML of a validated config, keys in the schema's order."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
