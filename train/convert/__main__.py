"""`python -m train.convert source=FROM target=TO format=NAME`: a checkpoint in another layout.

Which way it goes is told by the source: a run folder or a checkpoint of this project is written as `format`; any other
folder is read as `format` and becomes a checkpoint, for `initialize_from=`, `checkpoint=` and this command.
"""

import sys
from pathlib import Path

from data_prep import cli
from data_prep.errors import DataError
from train.checkpoint.select import checkpoint_steps, find
from train.convert.config import ConvertConfig
from train.convert.inward import read_in
from train.convert.outward import export
from train.convert.registry import UNIVERSAL
from train.convert.universal import read_universal, write_universal


def main(config: ConvertConfig) -> int:
    """Convert and say what was made. Raises ConfigError, DataError."""
    source = Path(config.source)
    if not source.exists():
        raise DataError(f"source={source}: no such folder")
    ours = (source / "manifest.json").is_file() or checkpoint_steps(source)
    if config.format == UNIVERSAL:
        target = write_universal(config, find(source)) if ours else read_universal(config, source)
    else:
        target = export(config, find(source)) if ours else read_in(config, source)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    kind = f"format={config.format}" if ours else "checkpoint"
    print(f"{target}: {kind}, {size / 1e9:.3f} GB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run("convert", ConvertConfig, main, program="train.convert"))
