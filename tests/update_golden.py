"""Resolved configs of every shipped recipe, and `python -m tests.update_golden` to write them to tests/golden/ anew.

    experiment/NAME.yaml   everything that `python -m train experiment=NAME` resolves to
    model/NAME.yaml        the model node of `python -m train model=NAME`
    default.yaml           `python -m train`
    convert.yaml, data_prep.yaml, evaluate.yaml, generate.yaml   the other commands
    launch/NAME.sbatch, launch/NAME.manifest   what `python -m launch cluster=NAME dry_run=true` shows

`tests/train/test_config.py` compares them, so that a changed default shows in the diff. Look at the diff before you
commit it.
"""

import sys
from pathlib import Path

from data_prep.cli import CONFIG_DIR, as_yaml, compose
from data_prep.config import PrepConfig
from launch import kubernetes, slurm
from train.cli import compose_train
from train.convert.config import ConvertConfig
from train.evaluate import EvaluateConfig
from train.generate import GenerateConfig

GOLDEN = Path(__file__).parent / "golden"
FOLDERS = ("experiment", "model")
DATA = "data.path=DIR"


def recipes(group: str) -> list[str]:
    """Names of the shipped files of a config group."""
    folder = CONFIG_DIR / group
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def overrides(group: str, name: str) -> list[str]:
    """What a user adds to the recipe: a folder where it names none, 2D positions for the models that need them."""
    words = [f"{group}={name}"]
    if group == "model":
        two_dimensional = name in ("glm_10b", "chatglm_6b")
        return [*words, DATA, f"data.sampling.positions={'2d' if two_dimensional else '1d'}"]
    recipe = (CONFIG_DIR / group / f"{name}.yaml").read_text(encoding="utf-8")
    named = "/data: sample" in recipe or "\n  path:" in recipe
    return words if named else [*words, DATA]


def script(name: str) -> str:
    """The batch script or manifest of a shipped cluster, for the GLM-130B recipe in /opt/tiankong."""
    words = [f"cluster={name}", "experiment=glm_130b", "data.path=/shared/data", "run_dir=/shared/runs/glm_130b"]
    if name == "kubernetes":
        words += ["cluster.kubernetes.image=registry.local/tiankong:1", "cluster.kubernetes.volume_claim=shared"]
        return kubernetes.render(compose_train(words), words)
    root = Path("/opt/tiankong")
    return slurm.render(
        compose_train(words), words, root=root, python=f"{root}/.venv/bin/python", job="0123456789abcdef"
    )


def scripts() -> dict[str, str]:
    """Golden file of each shipped cluster that has a script, with the cluster's name."""
    launchers = {name: compose_train([f"cluster={name}", DATA]).cluster.launcher for name in recipes("cluster")}
    endings = {"slurm": "sbatch", "kubernetes": "manifest"}
    return {f"launch/{name}.{endings[kind]}": name for name, kind in launchers.items() if kind in endings}


def resolved(file: str) -> str:
    """Today's text of one golden file, given by its name in the folder."""
    if file.startswith("launch/"):
        return script(Path(file).stem)
    group, _, name = (file if "/" in file else f"/{file}").removesuffix(".yaml").partition("/")
    if group == "experiment":
        return as_yaml(compose_train(overrides(group, name)))
    if group == "model":
        return as_yaml(compose_train(overrides(group, name)).model)
    if name == "default":
        return as_yaml(compose_train([DATA]))
    if name == "convert":
        return as_yaml(compose("convert", ConvertConfig, ["source=RUN", "target=DIR", "format=glm_130b"]))
    if name == "data_prep":
        return as_yaml(compose("data_prep", PrepConfig, [DATA]))
    if name == "evaluate":
        return as_yaml(compose("evaluate", EvaluateConfig, ["checkpoint=RUN"]))
    return as_yaml(compose("generate", GenerateConfig, ["checkpoint=RUN", "text=[MASK]"]))


def files() -> list[str]:
    """Names of all golden config files."""
    single = ["default.yaml", "convert.yaml", "data_prep.yaml", "evaluate.yaml", "generate.yaml"]
    return [*single, *(f"{group}/{name}.yaml" for group in FOLDERS for name in recipes(group)), *scripts()]


def main() -> int:
    """Write all of them and remove those whose recipe is gone."""
    wanted = {GOLDEN / file for file in files()}
    for file in files():
        (GOLDEN / file).parent.mkdir(parents=True, exist_ok=True)
        (GOLDEN / file).write_text(resolved(file), encoding="utf-8")
    for path in {path for group in (*FOLDERS, "launch") for path in (GOLDEN / group).rglob("*.*")} - wanted:
        path.unlink()
    print(f"{len(wanted)} files in {GOLDEN}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
