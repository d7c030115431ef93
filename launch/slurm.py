"""A Slurm batch script from a config: one agent a node, a supervisor, and a chain of jobs that follow one another.

The script is meant to be read. Slurm sends its shell SIGUSR1 some minutes before the time limit; the run saves itself
and the job is queued again, until the run is done.
"""

import re
import secrets
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from data_prep.errors import EXIT_DONE, EXIT_STOPPED, ConfigError
from launch.facts import ROOT
from launch.supervise import NODES_VARIABLE
from launch.wire import TOKEN_VARIABLE
from train.cluster import ClusterConfig
from train.config import Config
from train.run_folder import JOB_VARIABLE

_STEP = "--overlap --mpi=none"
_BODY = """
set -u
cd {root}
{setup}# One word that agents and supervisor share, the nodes in their order, and a port that differs from job to job.
export {token}=$(head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \\n')
export {nodes}=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd, -)
export TIANKONG_COMMAND="sbatch {file}"
# The same each time this script runs: resume.step and resume.enabled are obeyed by its first run alone.
export {job_variable}={job}
head=$(hostname)
port={port}

# Before the time limit: save and stop. The supervisor passes it on to all ranks.
again=no
save_and_stop() {{ again=yes; kill -USR1 "$supervisor"; }}
trap save_and_stop USR1
trap 'kill -USR1 "$supervisor"' TERM

{supervisor}

# An agent on each node (torch's elastic agent); one that dies comes back, one that is let go ends with 0.
{agents}
agents=$!

status=0
while kill -0 "$supervisor" 2>/dev/null; do wait "$supervisor"; status=$?; done
sleep 5; kill "$agents" 2>/dev/null; wait "$agents"
if [ "$again" = yes ] && [ "$status" = {stopped} ]; then
    echo "saved before the time limit; queued again"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""


def render(
    config: Config,
    words: Sequence[str],
    *,
    root: Path = ROOT,
    python: str = sys.executable,
    job: str | None = None,
) -> str:
    """The batch script of a job. Raises ConfigError for a container without an image.

    words: the user's. root, python: this checkout and interpreter on the nodes; the container's own where there is one.
    job: the word that its runs share; by default a new one.
    """
    cluster = config.cluster
    run_dir = root / config.run_dir
    slurm = cluster.slurm
    count = cluster.nodes + slurm.spare_nodes
    if slurm.container != "none" and slurm.image is None:
        raise ConfigError(f"cluster.slurm.container={slurm.container} needs cluster.slurm.image")
    options: list[tuple[str, object]] = [
        ("job-name", re.sub(r"[^\w.-]+", "-", Path(config.run_dir).name) or "tiankong"),
        ("partition", slurm.partition),
        ("account", slurm.account),
        ("qos", slurm.qos),
        ("nodes", count),
        ("ntasks-per-node", 1),
        ("cpus-per-task", slurm.cpus_per_node),
        ("gpus-per-node", cluster.gpus_per_node),
        ("time", slurm.time),
        ("signal", f"B:USR1@{slurm.save_seconds}"),
        ("output", f"{run_dir}/slurm-%j.log"),
        ("open-mode", "append"),
    ]
    head = [f"#SBATCH --{name}={value}" for name, value in options if value is not None]
    head += [
        "#SBATCH --requeue",
        "#SBATCH --exclusive",
        "#SBATCH --no-kill   # a lost node is the supervisor's to mend",
    ]
    head += [f"#SBATCH {option}" for option in slurm.options]
    own_python = shlex.quote(python) if slurm.container == "none" else "python"
    quoted = " ".join(shlex.quote(word) for word in words)
    own = '"cluster.supervisor_port=$port" "cluster.supervisor_address=$head"'
    supervisor = " ".join([*_on_head(cluster, root), f"{own_python} -m launch.supervise {quoted} {own} &"])
    step = f"srun --nodes={count} --ntasks={count} --ntasks-per-node=1 {_STEP} --kill-on-bad-exit=0 --wait=0"
    agent = f'{own_python} -m launch.node "$0"'
    agents = f"{step} {_inside(cluster, root)}\\\n    bash -c '{agent_loop(agent)}' \"$head:$port\" &"
    body = _BODY.format(
        root=shlex.quote(str(root)),
        setup="".join(f"{line}\n" for line in [*slurm.setup, *_exports(cluster)]),
        token=TOKEN_VARIABLE,
        nodes=NODES_VARIABLE,
        file=shlex.quote(str(run_dir / "job.sbatch")),
        job_variable=JOB_VARIABLE,
        job=job or secrets.token_hex(8),
        port=cluster.supervisor_port or "$((20000 + SLURM_JOB_ID % 20000))",
        supervisor=f"{supervisor}\nsupervisor=$!",
        agents=agents,
        stopped=EXIT_STOPPED,
    )
    return "#!/bin/bash\n" + "\n".join(head) + "\n" + body


def _exports(cluster: ClusterConfig) -> list[str]:
    """The ranks' variables, where a reader of the script looks for them; the supervisor hands them on as well."""
    return [f"export {name}={shlex.quote(value)}" for name, value in sorted(cluster.environment.items())]


def agent_loop(agent: str) -> str:
    """Shell that runs an agent until it is let go."""
    return f"until {agent}; do sleep 5; done"


def submit(config: Config, file: Path) -> int:
    """Hand the script to sbatch; returns 0. Raises ConfigError with Slurm's words when it refuses."""
    try:
        done = subprocess.run(["sbatch", str(file)], capture_output=True, text=True)
    except FileNotFoundError as error:
        raise ConfigError(
            f"cluster.launcher=slurm: there is no sbatch on this machine; take {file} to the login node"
        ) from error
    if done.returncode:
        raise ConfigError(f"sbatch refused {file}: {' '.join(done.stderr.split())}")
    print(f"{done.stdout.strip()}: {file}")
    return EXIT_DONE


def _inside(cluster: ClusterConfig, root: Path) -> str:
    """What puts a step's command into the container, this checkout with it; ends with a space where there is any."""
    slurm = cluster.slurm
    image, mounts = shlex.quote(slurm.image or ""), shlex.quote(",".join([f"{root}:{root}", *slurm.mounts]))
    if slurm.container == "pyxis":
        return f"--container-image={image} --container-mounts={mounts} --container-workdir={shlex.quote(str(root))} "
    if slurm.container == "apptainer":
        return f"apptainer exec --nv --bind {mounts} {image} "
    return ""


def _on_head(cluster: ClusterConfig, root: Path) -> list[str]:
    """What the supervisor's command starts with: pyxis' containers exist only inside of steps."""
    if cluster.slurm.container == "pyxis":
        return [
            'srun --nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME" --overlap --mpi=none',
            _inside(cluster, root).strip(),
        ]
    return [_inside(cluster, root).strip()] if cluster.slurm.container == "apptainer" else []
