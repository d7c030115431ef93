"""From sources to a dataset folder: what may be reused, resumed or replaced; the stages do the work.

`.work/` holds the unfinished pieces and the markers of the finished ones. It is kept when a preparation is cut off, and
the same command goes on from it; another one clears it. An unfinished folder has no manifest.
"""

import json
import logging
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_prep.config import DataConfig, PrepConfig
from data_prep.decontaminate import CHARACTERS, WORDS, read_evaluation_files
from data_prep.errors import ConfigError, DataError
from data_prep.executors import Progress, check_machine, run_stages
from data_prep.files import fingerprint, folder_lock, write_error, write_json
from data_prep.manifest import FILE, SPLITS, Manifest
from data_prep.quality import limits_of
from data_prep.shards import Shard
from data_prep.sources import Source, resolve_sources
from data_prep.steps.split import page_of, split_of
from data_prep.steps.work import Work, plan_tasks
from data_prep.tokenizer import Tokenizer, given_tokenizer

__all__ = ["Submitted", "page_of", "prepare", "split_of"]

logger = logging.getLogger(__name__)

_NOT_IN_RECIPE = ("path", "sources", "overwrite", "workers", "prefetch_batches", "sampling", "mixture", "pipeline")
_SUBMITTED = "submitted.json"
_REMOVED = ".work.tmp"


class Submitted(Exception):
    """The stages wait in a cluster's queue."""


def prepare(config: PrepConfig, progress: Progress = lambda stage, done, total: None) -> tuple[Manifest, bool]:
    """Make the dataset folder `config.data.path`.

    Returns its manifest, and whether a complete folder made with the same settings was found and kept.
    Raises ConfigError for settings that do not fit the folder or the machine, DataError for sources that cannot be used
    and for a full disk; the folder then has no manifest, and the same command goes on with what is missing. Raises
    Submitted where the work was handed to Slurm.
    """
    folder = Path(config.data.path)
    limits_of(config.data.cleaning.limits)
    sources = resolve_sources(config.data)
    loaded = given_tokenizer(config.tokenizer)
    adopted = [source for source in sources if source.adopted]
    if adopted and loaded is None:
        raise ConfigError(
            f"data.sources: {adopted[0].files[0]} holds tokens; give the tokenizer that made them as tokenizer.path"
        )
    for source in adopted:
        for path in source.files:
            Shard(path.with_suffix(""))  # a damaged one is named before any work is done
    recipe = _recipe(config, sources, loaded)
    if (folder / FILE).exists() and not config.data.overwrite:
        manifest = _reusable(folder, recipe)
        if (folder / ".work").exists() or (folder / _REMOVED).exists():
            # Left where the process was killed, or the jobs ended, after the manifest was written.
            with folder_lock(folder):
                _remove_work(folder)
        return manifest, True
    check_machine(config.data)
    evaluation = read_evaluation_files(config.data.cleaning)
    if evaluation.short:
        logger.warning(
            "data.cleaning.decontaminate: %d of %d texts are shorter than %d words or %d Chinese characters and are "
            "not looked for, %s first",
            *(len(evaluation.short), len(evaluation.names), WORDS, CHARACTERS, evaluation.short[0]),
        )
    try:
        with folder_lock(folder):
            if (folder / FILE).exists() and not config.data.overwrite:
                # Another process finished it between the two looks.
                return _reusable(folder, recipe), True
            # Beside a manifest, .work is a preparation's that is over: nothing to go on from, and no job writes here.
            complete = (folder / FILE).exists()
            if not complete:
                _refuse_submitted(folder)
            if complete or _unfinished(folder) != recipe:
                _remove_remains(folder)
                write_json(folder / ".work" / "recipe.json", recipe)
            work = Work(folder.absolute(), config, plan_tasks(sources, config.data.task_bytes), recipe)
            if config.data.pipeline.executor == "slurm":
                write_json(folder / ".work" / _SUBMITTED, {"process": os.getpid(), "host": os.uname().nodename})
            if not run_stages(work, progress):
                raise Submitted(f"the stages of {folder} are submitted; squeue shows them, {folder / FILE} ends them")
            manifest = Manifest.read(folder)
            _remove_work(folder)
    except OSError as error:
        raise write_error(error.filename or folder, error) from error
    return manifest, False


def _recipe(config: PrepConfig, sources: list[Source], loaded: Tokenizer | None) -> dict[str, Any]:
    """What decides the folder's content, flat, so that a difference can be named."""
    recipe = _settings(config.data)
    if loaded is None:
        tokenizer = asdict(config.tokenizer)
        recipe |= {
            f"tokenizer.{name}": tokenizer[name] for name in ("vocab_size", "character_coverage", "training_bytes")
        }
    else:
        recipe["tokenizer.path"] = loaded.sha256
    for number, source in enumerate(sources):
        fields = {name: value for name, value in asdict(source).items() if name != "files"}
        fields["files"] = [[path.name, _content_of(path)] for path in source.files]
        recipe[f"data.sources[{number}]"] = fields
    for number, name in enumerate(config.data.cleaning.decontaminate):
        recipe[f"data.cleaning.decontaminate[{number}]"] = _content_of(Path(name))
    return json.loads(json.dumps(recipe))


def _content_of(path: Path) -> str:
    try:
        return fingerprint(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _settings(config: DataConfig) -> dict[str, Any]:
    settings = {f"data.{name}": value for name, value in asdict(config).items() if name not in _NOT_IN_RECIPE}
    cleaning = settings.pop("data.cleaning")
    return settings | {f"data.cleaning.{name}": value for name, value in cleaning.items()}


def _reusable(folder: Path, recipe: dict[str, Any]) -> Manifest:
    manifest = Manifest.read(folder)
    # A folder made before a setting existed was made with its default.
    before = _settings(DataConfig())
    for key, value in manifest.recipe.items():
        before[key] = {**asdict(Source("", ())), **value} if key.startswith("data.sources[") else value
    for key in sorted({*recipe, *before}):
        ours, theirs = recipe.get(key), before.get(key)
        if ours != theirs:
            raise ConfigError(
                f"data.path={folder} holds data made with {key}={_short(theirs)}, now {_short(ours)}; "
                "use another folder or data.overwrite=true"
            )
    return manifest


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 160 else text[:157] + "…"


def _unfinished(folder: Path) -> Any:
    """The recipe of a preparation that was cut off in this folder, or None."""
    try:
        return json.loads((folder / ".work" / "recipe.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _refuse_submitted(folder: Path) -> None:
    """Raise ConfigError where jobs that were handed to Slurm may still write here."""
    marker = folder / ".work" / _SUBMITTED
    if marker.exists():
        raise ConfigError(
            f"data.path={folder}: its stages were submitted to Slurm before; wait until squeue shows none of them, "
            f"then remove {marker} and run the same command to do what is missing"
        )


def _remove_remains(folder: Path) -> None:
    """Clear what an unfinished or replaced preparation left; anything else in the folder is not ours to delete.

    Killed in between, what is left is a complete dataset still, or none with nothing to go on from.
    """
    ours = {FILE, ".work", "lock", "tokenizer", "rejected", "unigram.npy", "report.html", "packs", *SPLITS}
    for entry in folder.iterdir():
        if entry.name not in ours and not entry.name.endswith(".tmp"):
            raise ConfigError(f"data.path={folder} holds {entry.name}, which is no dataset; use an empty or new folder")
    _remove_work(folder)
    (folder / FILE).unlink(missing_ok=True)
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != "lock":
            entry.unlink()


def _remove_work(folder: Path) -> None:
    """Remove the scratch as one: markers of finished stages must not outlive what the stages made."""
    removed = folder / _REMOVED
    shutil.rmtree(removed, ignore_errors=True)
    if (folder / ".work").exists():
        (folder / ".work").rename(removed)
        shutil.rmtree(removed, ignore_errors=True)
