"""Several hosts on one machine: network namespaces with addresses of their own on one bridge.

    with Hosts(2) as hosts:
        hosts.start("-m", "launch", *hosts.words(), …)     # the launcher, beside the bridge
        hosts.cut(1)                                       # pull host 1's cable; `mend` puts it back

Each host has its own name and reaches the others and the launcher through its own veth. The file system and the
processes are shared, as on a cluster with a parallel file system. Needs root and the right to make namespaces;
`Hosts.available()` says so.
"""

import contextlib
import itertools
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Self

from tests.conftest import ROOT

HUB_ADDRESS = "10.77.0.254"
_ETC = Path("/etc/netns")
_CGROUP = Path("/sys/fs/cgroup/cpu")
_NUMBERS = itertools.count()
# In place of ssh: a process of the host, which also sees the host's name as its own.
_SHELL = """#!/bin/sh
[ ! -f {folder}/"$1" ] || . {folder}/"$1"
exec ip netns exec "$1" unshare --uts sh -c 'hostname "$0" && exec sh -c "$1"' "$1" "$2"
"""


class Hosts:
    """`count` hosts named <prefix>h0, <prefix>h1 … and the hub where the launcher runs."""

    def __init__(self, count: int) -> None:
        self.prefix = f"tk{os.getpid() % 100000}x{next(_NUMBERS)}"
        self.hub = f"{self.prefix}hub"
        self.names = [f"{self.prefix}h{number}" for number in range(count)]
        self.folder = Path(tempfile.mkdtemp(prefix="tiankong-hosts-"))

    @staticmethod
    def available() -> bool:
        """Whether namespaces may be made here."""
        try:
            with Hosts(1):
                return True
        except (OSError, subprocess.SubprocessError):
            return False

    def __enter__(self) -> Self:
        shell = self.folder / "shell"
        shell.write_text(_SHELL.format(folder=self.folder))
        shell.chmod(shell.stat().st_mode | stat.S_IXUSR)
        (self.folder / "hostfile").write_text("".join(f"{name}\n" for name in self.names))
        for name in (self.hub, *self.names):
            # `ip netns exec` puts this over /etc, so that the hosts know one another by name.
            (_ETC / name).mkdir(parents=True)
            table = [f"{self.address(number)} {other}" for number, other in enumerate(self.names)]
            lines = ["127.0.0.1 localhost", f"{HUB_ADDRESS} {self.hub}", *table]
            (_ETC / name / "hosts").write_text("".join(f"{line}\n" for line in lines))
        try:
            _ip("netns", "add", self.hub)
            _ip("-n", self.hub, "link", "set", "lo", "up")
            _ip("-n", self.hub, "link", "add", "br0", "type", "bridge")
            _ip("-n", self.hub, "addr", "add", f"{HUB_ADDRESS}/24", "dev", "br0")
            _ip("-n", self.hub, "link", "set", "br0", "up")
            for number, name in enumerate(self.names):
                _ip("netns", "add", name)
                _ip("-n", name, "link", "set", "lo", "up")
                _ip("-n", self.hub, "link", "add", f"port{number}", "type", "veth", "peer", "eth0", "netns", name)
                _ip("-n", self.hub, "link", "set", f"port{number}", "master", "br0", "up")
                _ip("-n", name, "addr", "add", f"{self.address(number)}/24", "dev", "eth0")
                _ip("-n", name, "link", "set", "eth0", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in (*self.names, self.hub):
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                _ip("netns", "del", name)
            shutil.rmtree(_ETC / name, ignore_errors=True)
            with contextlib.suppress(OSError):
                (_CGROUP / name).rmdir()
        for file in self.folder.iterdir():
            file.unlink()
        self.folder.rmdir()

    def words(self, nodes: int | None = None) -> list[str]:
        """Overrides that make `python -m launch` use these hosts."""
        return [
            "cluster=ssh",
            f"cluster.nodes={nodes or len(self.names)}",
            f"cluster.ssh.hostfile={self.folder / 'hostfile'}",
            f"cluster.ssh.command={self.folder / 'shell'}",
            f"cluster.supervisor_address={HUB_ADDRESS}",
        ]

    def start(self, *words: str, **options: Any) -> "subprocess.Popen[str]":
        """Python with these words in the hub, where all hosts can be reached."""
        return subprocess.Popen(
            self.inside(self.hub, sys.executable, *words), cwd=ROOT, text=True, start_new_session=True, **options
        )

    @staticmethod
    def inside(name: str, *command: str) -> list[str]:
        """A command as a process of that host, which also sees the host's name as its own."""
        shell = ["sh", "-c", 'hostname "$0" && exec "$@"', name, *command]
        return ["ip", "netns", "exec", name, "unshare", "--uts", *shell]

    @staticmethod
    def address(number: int) -> str:
        """A host's."""
        return f"10.77.0.{number + 1}"

    def prepare(self, number: int, script: str) -> None:
        """Shell that runs before a host's agent, such as `export PATH=…`."""
        (self.folder / self.names[number]).write_text(script)

    def cut(self, number: int) -> None:
        """Pull a host's cable."""
        _ip("-n", self.hub, "link", "set", f"port{number}", "down")

    def mend(self, number: int) -> None:
        """Put it back."""
        _ip("-n", self.hub, "link", "set", f"port{number}", "up")

    def throttle(self, number: int, megabit: int) -> None:
        """Make what a host sends slow."""
        shape = ["tbf", "rate", f"{megabit}mbit", "burst", "32kbit", "latency", "400ms"]
        command = ["ip", "netns", "exec", self.names[number], "tc", "qdisc", "add", "dev", "eth0", "root", *shape]
        subprocess.run(command, check=True, capture_output=True)

    def slow(self, number: int, share: float) -> None:
        """Let the processes that run on a host have so much of one core from now on; needs `cgroups()`."""
        folder = _CGROUP / self.names[number]
        folder.mkdir(exist_ok=True)
        (folder / "cpu.cfs_quota_us").write_text(str(int(100_000 * share)))
        found = subprocess.run(["ip", "netns", "pids", self.names[number]], capture_output=True, text=True, check=True)
        for process in found.stdout.split():
            (folder / "cgroup.procs").write_text(process)

    @staticmethod
    def cgroups() -> bool:
        """Whether hosts can be made slow here."""
        return (_CGROUP / "tasks").exists()


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
