"""Rendered batch scripts and manifests: shells and parsers read them, and a stand-in for Slurm runs one."""

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import yaml

from data_prep.errors import ConfigError
from launch import kubernetes, slurm
from launch.__main__ import main
from tests import update_golden
from tests.conftest import ROOT
from train.cli import compose_train

WORDS = ["cluster=slurm", "cluster.nodes=2", "model=tiny", "data.path=DIR", "run_dir=/runs/我的 run"]

SRUN = """#!/bin/bash
# Two nodes that are this machine: the command once for each name, as srun does.
for word in "$@"; do case "$word" in --*) shift;; *) break;; esac; done
for name in n0 n1; do SLURMD_NODENAME=$name "$@" & done
trap 'kill $(jobs -p); exit 143' TERM
wait
"""
SCONTROL = """#!/bin/bash
case "$1 $2" in
"show hostnames") printf 'n0\\nn1\\n';;
requeue*) echo "$2" >> "$FAKE_SLURM/requeued";;
esac
"""


@pytest.mark.unit
@pytest.mark.parametrize("file", [name for name in update_golden.scripts() if name.endswith("sbatch")])
def test_every_batch_script_is_bash(file):
    subprocess.run(["bash", "-n", update_golden.GOLDEN / file], check=True)


@pytest.mark.unit
def test_containers_and_spares_reach_the_script():
    def rendered(*words: str) -> str:
        return slurm.render(compose_train([*WORDS, *words]), WORDS)

    image = "cluster.slurm.image=/images/glm.sqsh"
    assert "#SBATCH --nodes=5" in rendered("cluster.slurm.spare_nodes=3")
    assert "#SBATCH --reservation=glm" in rendered('cluster.slurm.options=["--reservation=glm"]')
    assert "\nmodule load cuda\n" in rendered("cluster.slurm.setup=[module load cuda]")
    pyxis = rendered("cluster.slurm.container=pyxis", image, "cluster.slurm.mounts=['/shared:/shared']")
    mounts = f"{ROOT}:{ROOT},/shared:/shared"
    assert (
        pyxis.count(f"--container-image=/images/glm.sqsh --container-mounts={mounts} --container-workdir={ROOT} ") == 2
    )
    apptainer = rendered("cluster.slurm.container=apptainer", image, "cluster.slurm.mounts=['/shared:/shared']")
    assert apptainer.count(f"apptainer exec --nv --bind {mounts} /images/glm.sqsh ") == 2
    with pytest.raises(ConfigError, match=r"cluster.slurm.container=pyxis needs cluster.slurm.image"):
        rendered("cluster.slurm.container=pyxis")


@pytest.mark.unit
def test_the_manifest_is_a_service_and_an_indexed_job():
    service, job = yaml.safe_load_all(update_golden.script("kubernetes"))
    assert (service["kind"], service["spec"]["selector"]) == ("Service", {"job-name": job["metadata"]["name"]})
    assert (job["spec"]["completionMode"], job["spec"]["completions"]) == ("Indexed", 2)
    container = _container(job)
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    names = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert names["TIANKONG_NODES"] == "tiankong-glm-130b-0,tiankong-glm-130b-1"
    subprocess.run(["bash", "-n", "-c", container["args"][0]], check=True)
    with pytest.raises(ConfigError, match=r"cluster.kubernetes.image is not set"):
        kubernetes.render(compose_train(["cluster=kubernetes", "data.path=DIR"]), [])


@pytest.mark.unit
@pytest.mark.parametrize(
    "words",
    [
        [],
        ["cluster.gpus_per_node=null", "cluster.processes=2", "cluster.kubernetes.host_network=false"],
        ["cluster.kubernetes.gpu_resource=amd.com/gpu", "+cluster.environment={NCCL_DEBUG: WARN, ODD: 'a\\\\nb: c'}"],
    ],
)
def test_the_manifest_follows_the_schemas_of_kubernetes(words):
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    given = ["cluster=kubernetes", "data.path=DIR", "model=tiny", "cluster.nodes=3", "run_dir=/runs/我的 run"]
    given += ["cluster.kubernetes.image=registry:5000/glm:1", "cluster.kubernetes.volume_claim=shared", *words]
    config = compose_train(given)
    service, job = documents = list(yaml.safe_load_all(kubernetes.render(config, given)))
    for document in documents:
        kubernetes_validate.validate(document, "1.37", strict=True)
    variables = {entry["name"]: entry.get("value") for entry in _container(job)["env"]}
    assert config.cluster.environment.items() <= variables.items()
    job["spec"]["completionsMode"] = "Indexed"
    with pytest.raises(kubernetes_validate.ValidationError, match="completionsMode"):
        kubernetes_validate.validate(job, "1.37", strict=True)
    service["spec"]["clusterIP"] = 0
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(service, "1.37", strict=True)


def _container(job: dict[str, Any]) -> dict[str, Any]:
    (container,) = job["spec"]["template"]["spec"]["containers"]
    return container


@pytest.mark.unit
def test_a_dry_run_shows_the_script_and_starts_nothing(capsys, tmp_path):
    words = ["cluster=slurm", "model=tiny", "data.path=DIR", f"run_dir={tmp_path / 'run'}", "global_batch_size=32"]
    assert main([*words, "dry_run=true"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("#!/bin/bash\n#SBATCH --job-name=run\n")
    assert "dry_run=true" not in out
    assert not (tmp_path / "run").exists()


@pytest.mark.distributed
@pytest.mark.slow
def test_the_script_runs_on_two_nodes_saves_before_the_time_limit_and_is_queued_again(tmp_path):
    run_dir, tools = tmp_path / "run", tmp_path / "tools"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (tmp_path / "manifest.json").write_text("{}")
    words = ["cluster=slurm", "cluster.nodes=2", "cluster.processes=1", "cluster.gpus_per_node=null", "model=tiny"]
    words += [f"data.path={tmp_path}", f"run_dir={run_dir}", "global_batch_size=8", "micro_batch_size=1"]
    script = slurm.render(compose_train(words), words)
    # Only the model is left out, and the address, for this machine has no name that others know.
    script = script.replace("-m launch.supervise", "-m tests.launch.fake_supervise").replace("$(hostname)", "127.0.0.1")
    (tmp_path / "job").write_text(script)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "FAKE_SLURM": str(tmp_path)}
    environment |= {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "n[0-1]", "SLURMD_NODENAME": "n0"}

    def job(limit: float, pace: str) -> "subprocess.CompletedProcess[str]":
        """As Slurm would: the shell gets SIGUSR1 when the run has got so far."""
        shell = ["timeout", "--foreground", "-s", "USR1", str(limit), "bash", str(tmp_path / "job")]
        return subprocess.run(
            shell, env={**environment, "FAKE_PACE": pace}, capture_output=True, text=True, timeout=120, check=False
        )

    first = job(25, "3")
    assert "saved before the time limit; queued again" in first.stdout, first.stderr
    assert (tmp_path / "requeued").read_text() == f"{os.getpid()}\n"
    saved = max(int(path.name.removeprefix("step_")) for path in (run_dir / "checkpoints").iterdir())
    assert 0 < saved < 20
    second = job(100, "0.1")
    assert second.returncode == 0, second.stderr
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 21))
    assert set(json.loads((run_dir / "launch.json").read_text())["nodes"]) == {"n0", "n1"}


@pytest.mark.unit
def test_a_refusal_of_slurm_is_passed_on(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    config = compose_train(WORDS)
    with pytest.raises(ConfigError, match="there is no sbatch on this machine"):
        slurm.submit(config, tmp_path / "job")
    (tmp_path / "sbatch").write_text(f"#!{sys.executable}\nimport sys\nsys.exit('invalid partition: nope')\n")
    (tmp_path / "sbatch").chmod(0o755)
    with pytest.raises(ConfigError, match=re.escape(f"sbatch refused {tmp_path / 'job'}: invalid partition: nope")):
        slurm.submit(config, tmp_path / "job")
