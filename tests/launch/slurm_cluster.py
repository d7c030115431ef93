"""A real Slurm of several nodes on one machine: munged, slurmctld and a slurmd in each network namespace.

    with Hosts(2) as hosts, SlurmCluster(hosts, folder) as slurm:
        slurm.run(sys.executable, "-m", "launch", "cluster=slurm", …)      # on the login node, beside the bridge
        slurm.wait(seconds)

Nothing of the machine's own Slurm is used: keys, state and logs lie in `folder`. Needs Debian's packages slurmctld,
slurmd, slurm-client and munge, and what `Hosts` needs.
"""

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from tests.conftest import ROOT
from tests.launch.hosts import HUB_ADDRESS, Hosts

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol", "squeue")
# No cgroups, no accounting: what the namespaces of one machine cannot share, and the script does not ask for.
# cred_expire is also how long a job that is queued again has to wait, 120 s where it is not set.
CONF = """ClusterName=tiankong
SlurmctldHost={hub}({hub_address})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SchedulerType=sched/backfill
SelectType=select/linear
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
KillWait=5
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class SlurmCluster:
    """One Slurm node a host; the controller and the user's shell are in the hub."""

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self._hosts, self._folder = hosts, folder
        self._daemons: list[subprocess.Popen[bytes]] = []
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    @staticmethod
    def missing() -> list[str]:
        """Programs that are not installed here."""
        return [name for name in PROGRAMS if shutil.which(name) is None]

    def __enter__(self) -> Self:
        folder = self._folder
        nodes = [
            f"NodeName={name} NodeAddr={self._hosts.address(number)} CPUs=1"
            for number, name in enumerate(self._hosts.names)
        ]
        text = CONF.format(hub=self._hosts.hub, hub_address=HUB_ADDRESS, folder=folder, nodes="\n".join(nodes))
        (folder / "slurm.conf").write_text(text)
        # Not to be looked for: `ip netns exec` shows a /sys without them.
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        for name in ("state", *(f"spool-{name}" for name in self._hosts.names)):
            (folder / name).mkdir()
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        files = {"key-file": key, "socket": folder / "munge.socket", "seed-file": folder / "munge.seed"}
        files |= {"pid-file": folder / "munged.pid", "log-file": folder / "munged.log"}
        munged = ["munged", "--foreground", "--force", *(f"--{name}={file}" for name, file in files.items())]
        try:
            self._start("munged", munged)
            self.until(lambda: files["socket"].exists(), 10, "munged does not start")
            self._start("slurmctld", self._hosts.inside(self._hosts.hub, "slurmctld", "-D", "-i"))
            for name in self._hosts.names:
                self._start(name, self._hosts.inside(name, "slurmd", "-D", "-N", name))
            self.until(self._all_idle, 30, "the nodes do not come up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        # Its steps would outlive the daemons.
        with contextlib.suppress(subprocess.SubprocessError, RuntimeError):
            self.run("scancel", "--full", "--user=root")
            self.wait(30)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def run(self, *command: str) -> str:
        """Standard output of a user's command in the hub. Raises CalledProcessError."""
        return subprocess.run(
            self._hosts.inside(self._hosts.hub, *command),
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout

    def wait(self, seconds: float) -> None:
        """Until no job is queued or runs. Raises RuntimeError after so many seconds."""
        self.until(lambda: not self.run("squeue", "--noheader").strip(), seconds, "jobs are left")

    def until(self, done: Callable[[], bool], seconds: float, otherwise: str) -> None:
        """Wait for something. Raises RuntimeError with the daemons' last words after so many seconds."""
        deadline = time.monotonic() + seconds
        while not done():
            if time.monotonic() > deadline:
                logs = "\n".join(file.read_text()[-1000:] for file in sorted(self._folder.glob("*.log")))
                raise RuntimeError(f"Slurm: {otherwise}:\n{logs}")
            time.sleep(0.2)

    def _all_idle(self) -> bool:
        try:
            return self.run("sinfo", "--noheader", "--format=%T").split() == ["idle"]
        except subprocess.SubprocessError:
            return False

    def _start(self, name: str, command: list[str]) -> None:
        with open(self._folder / f"{name}.log", "ab") as log:
            self._daemons.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log))
