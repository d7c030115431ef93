"""Several hosts on one machine: network namespaces with addresses of their own on one bridge.

    with Hosts(2) as hosts:
        hosts.run("-m", "launch", *hosts.words(), …)       # the launcher, beside the bridge
        hosts.cut(1)                                       # pull host 1's cable; `mend` puts it back

Each host reaches the others and the launcher through its own veth. The file system and the processes are shared, as
on a cluster with a parallel file system. Needs root and the right to make namespaces; `Hosts.available()` says so.
"""

import contextlib
import itertools
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Self

from tests.conftest import ROOT

_NUMBERS = itertools.count()


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
        shell.write_text('#!/bin/sh\nexec ip netns exec "$1" sh -c "$2"\n')
        shell.chmod(shell.stat().st_mode | stat.S_IXUSR)
        (self.folder / "hostfile").write_text("".join(f"{name}\n" for name in self.names))
        try:
            _ip("netns", "add", self.hub)
            _ip("-n", self.hub, "link", "set", "lo", "up")
            _ip("-n", self.hub, "link", "add", "br0", "type", "bridge")
            _ip("-n", self.hub, "addr", "add", "10.77.0.254/24", "dev", "br0")
            _ip("-n", self.hub, "link", "set", "br0", "up")
            for number, name in enumerate(self.names):
                _ip("netns", "add", name)
                _ip("-n", name, "link", "set", "lo", "up")
                _ip("-n", self.hub, "link", "add", f"port{number}", "type", "veth", "peer", "eth0", "netns", name)
                _ip("-n", self.hub, "link", "set", f"port{number}", "master", "br0", "up")
                _ip("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", "eth0")
                _ip("-n", name, "link", "set", "eth0", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in (*self.names, self.hub):
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                _ip("netns", "del", name)
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
            "cluster.supervisor_address=10.77.0.254",
        ]

    def start(self, *words: str, **options: Any) -> "subprocess.Popen[str]":
        """Python with these words in the hub, where all hosts can be reached."""
        command = ["ip", "netns", "exec", self.hub, sys.executable, *words]
        return subprocess.Popen(command, cwd=ROOT, text=True, start_new_session=True, **options)

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


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
