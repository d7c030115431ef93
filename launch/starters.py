"""How the agents of a job (`launch.node`) get onto its nodes: a child process, ssh, or by other means."""

import contextlib
import io
import math
import shlex
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from data_prep.errors import ConfigError
from launch.facts import ROOT, code_digest, code_files
from launch.wire import TOKEN_VARIABLE
from train.cluster import ClusterConfig

KEPT_LINES = 20


class Starter(Protocol):
    """One way to start agents."""

    names: list[str]
    """All nodes, spares last."""

    def start(self, names: Sequence[str]) -> None:
        """Start agents there, again where one has ended."""

    def last_words(self, name: str) -> str:
        """What starting a node's agent ended with; empty where it did not fail."""

    def close(self) -> None:
        """Wait for what was started to end; end it after a while."""


class _Children:
    """Processes that stand for agents, one or several nodes each, whose standard error passes through."""

    def __init__(self) -> None:
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._begun: dict[str, float] = {}
        self._lines: dict[str, deque[str]] = {}

    def run(self, name: str, command: Sequence[str], feed: bytes, patience: float = math.inf) -> None:
        """Start one, with `feed` on its standard input; one that has run for less than `patience` s is left alone."""
        running = self._processes.get(name)
        if running is not None and running.poll() is None:
            if time.monotonic() - self._begun[name] < patience:
                return
            running.kill()
            running.wait()
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._processes[name], self._begun[name] = process, time.monotonic()
        self._lines[name] = deque(maxlen=KEPT_LINES)
        threading.Thread(target=self._feed, args=(process, feed), daemon=True).start()
        threading.Thread(target=self._read, args=(process, self._lines[name]), daemon=True).start()

    def last_words(self, name: str) -> str:
        """Status and last line of a process, as far as there are any."""
        process = self._processes.get(name)
        if process is None:
            return ""
        lines = self._lines[name]
        if process.poll() is None:
            return f"its agent says: {lines[-1]}" if lines else ""
        said = f": {lines[-1]}" if lines else ""
        return f"starting its agent ended with status {process.returncode}{said}"

    def close(self) -> None:
        """Let them end, for some seconds."""
        for process in self._processes.values():
            try:
                process.wait(5.0)
            except subprocess.TimeoutExpired:
                process.kill()

    @staticmethod
    def _feed(process: subprocess.Popen[bytes], feed: bytes) -> None:
        assert process.stdin is not None
        # An agent that has the code already does not read it.
        with contextlib.suppress(OSError), process.stdin as pipe:
            pipe.write(feed)

    @staticmethod
    def _read(process: subprocess.Popen[bytes], lines: "deque[str]") -> None:
        assert process.stderr is not None
        with process.stderr as pipe:
            for line in pipe:
                lines.append(line.decode(errors="replace").strip())
                with contextlib.suppress(OSError):
                    sys.stderr.buffer.write(line)
                    sys.stderr.buffer.flush()


class LocalStarter:
    """One agent, on this machine."""

    def __init__(self, port: int, token: str) -> None:
        self.names = ["localhost"]
        self._children = _Children()
        self._address, self._token = f"127.0.0.1:{port}", token

    def start(self, names: Sequence[str]) -> None:
        """A child process."""
        for name in names:
            command = [sys.executable, "-m", "launch.node", self._address, name]
            self._children.run(name, command, self._token.encode() + b"\n")

    def last_words(self, name: str) -> str:
        """How the child ended."""
        return self._children.last_words(name)

    def close(self) -> None:
        """Wait for the child."""
        self._children.close()


class SshStarter:
    """An agent on each host of a hostfile; the code is sent along, so that the hosts need not share it."""

    def __init__(self, cluster: ClusterConfig, hosts: Sequence[str], port: int, token: str) -> None:
        self.names = list(hosts)
        self._ssh = cluster.ssh
        self._patience = cluster.connect_seconds
        self._address = f"{cluster.supervisor_address or address_towards(hosts[0])}:{port}"
        self._token = token
        self._children = _Children()
        self._archive = _archive() if cluster.ssh.code_dir is not None else b""
        self._folder = ROOT if cluster.ssh.code_dir is None else Path(cluster.ssh.code_dir) / code_digest()

    def command(self, name: str) -> list[str]:
        """The command for one host. It reads the token and, where the code is not there yet, the code."""
        folder = shlex.quote(str(self._folder))
        agent = f"{shlex.quote(self._ssh.python or sys.executable)} -m launch.node {self._address} {shlex.quote(name)}"
        # Unpacked beside its place and renamed: two jobs may send the same code at once.
        unpack = (
            f'{{ [ -d {folder} ] || {{ t={folder}.$$; mkdir -p "$t" && tar xzf - -C "$t" && '
            f'{{ mv -T "$t" {folder} 2>/dev/null || rm -rf "$t"; }}; }}; }} && '
            if self._archive
            else ""
        )
        line = f"IFS= read -r {TOKEN_VARIABLE} && export {TOKEN_VARIABLE} && {unpack}cd {folder} && exec {agent}"
        return [*shlex.split(self._ssh.command), name, line]

    def start(self, names: Sequence[str]) -> None:
        """One ssh a host: the token and the code on its standard input.

        The ssh to a machine that lost its power may wait for ever: one that has brought no agent by now is replaced.
        """
        for name in names:
            feed = self._token.encode() + b"\n" + self._archive
            self._children.run(name, self.command(name), feed, self._patience)

    def last_words(self, name: str) -> str:
        """How ssh ended."""
        return self._children.last_words(name)

    def close(self) -> None:
        """Wait for the connections to end."""
        self._children.close()


class PresentStarter:
    """Agents that something else starts and starts again: Slurm's srun, Kubernetes' pods."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)

    def start(self, names: Sequence[str]) -> None:
        """Nothing: they come by themselves."""

    def last_words(self, name: str) -> str:
        """Not known here."""
        return ""

    def close(self) -> None:
        """Nothing of ours to wait for."""


def read_hostfile(path: str | None) -> list[str]:
    """Hosts of a hostfile, in its order; `slots=` and comments are left out. Raises ConfigError."""
    if path is None:
        raise ConfigError("cluster.ssh.hostfile is not set; give a file with one host a line")
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"cluster.ssh.hostfile={path} cannot be read ({error.strerror})") from error
    hosts = [line.split("#")[0].split()[0] for line in lines if line.split("#")[0].strip()]
    twice = sorted({host for host in hosts if hosts.count(host) > 1})
    if not hosts or twice:
        raise ConfigError(f"cluster.ssh.hostfile={path} " + (f"names {twice[0]} twice" if twice else "names no host"))
    return hosts


def address_towards(host: str) -> str:
    """This machine's address on the way to a host; no packet is sent. Its host name where that is not known."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))
            return str(probe.getsockname()[0])
    except OSError:
        return socket.gethostname()


def _archive() -> bytes:
    """The code as a tar.gz; the same bytes for the same files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        for path in code_files():
            archive.add(path, arcname=str(path.relative_to(ROOT)))
    return buffer.getvalue()
