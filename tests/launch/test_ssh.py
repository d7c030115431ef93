"""launcher=ssh over real sshd daemons: hosts with addresses of their own, which do not have this checkout's code."""

import json
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from shutil import which

import pytest

from launch.facts import ROOMS, ROOT
from tests.launch.hosts import Hosts

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif(which("sshd") is None or which("ssh") is None, reason="no sshd here (openssh-server)"),
    pytest.mark.skipif(not Hosts.available(), reason="needs root and the right to make network namespaces"),
]
STEPS = 20
SSHD = """HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile none
PermitRootLogin prohibit-password
PasswordAuthentication no
StrictModes no
UsePAM no
"""
SSH = """IdentityFile {folder}/user_key
UserKnownHostsFile {folder}/known_hosts
StrictHostKeyChecking accept-new
BatchMode yes
ConnectTimeout 5
"""


@contextmanager
def reachable(hosts: Hosts, names: list[str], folder: Path, *, with_code: bool = False) -> Iterator[str]:
    """sshd on these hosts, with keys that live in `folder`; yields the ssh command that reaches them.

    with_code: whether the hosts see this checkout.
    """
    for key in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    (folder / "sshd_config").write_text(SSHD.format(folder=folder))
    (folder / "ssh_config").write_text(SSH.format(folder=folder))
    Path("/run/sshd").mkdir(exist_ok=True)  # where sshd wants to be alone
    # Mounts of `ip netns exec` are its own: the code is away on these hosts only.
    hide = "" if with_code else "".join(f"mount -t tmpfs none '{ROOT / room}' && " for room in ROOMS)
    serve = f"{hide}exec {which('sshd')} -D -e -f '{folder}/sshd_config'"
    with ExitStack() as daemons, open(folder / "sshd.log", "ab") as log:
        for name in names:
            daemon = subprocess.Popen(hosts.inside(name, "sh", "-c", serve), stderr=log)
            daemons.callback(daemon.wait)
            daemons.callback(daemon.terminate)
        yield f"ssh -F {folder / 'ssh_config'}"


def test_the_code_is_sent_and_trains_where_it_was_not_and_a_deaf_host_is_named(tmp_path, tiny_overrides):
    run_dir, code = tmp_path / "run", tmp_path / "code"
    words = [*tiny_overrides, f"run_dir={run_dir}", f"max_steps={STEPS}", "global_batch_size=6", "cluster.processes=1"]
    with Hosts(3) as hosts, reachable(hosts, hosts.names[:2], tmp_path) as ssh:

        def launch(nodes: int, *more: str) -> tuple[int, str]:
            job = hosts.start(
                *("-m", "launch", *words, *hosts.words(nodes), f"cluster.ssh.command={ssh}"),
                *(f"cluster.ssh.code_dir={code}", "cluster.connect_seconds=60", *more),
                stderr=subprocess.PIPE,
            )
            return job.wait(timeout=200), job.communicate()[1]

        status, err = launch(3)
        assert status == 2, err
        refused = f"node {hosts.names[2]}: starting its agent ended with status 255: ssh: connect to host"
        assert refused in err
        assert "2 of 3 nodes can be reached" in err
        status, err = launch(2)
        assert status == 0, err
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["consumed_samples"]) for line in lines] == [(n, 6 * n) for n in range(1, STEPS + 1)]
    beats = [json.loads((run_dir / "heartbeat" / f"rank_{rank}.json").read_text()) for rank in range(2)]
    assert [beat["host"] for beat in beats] == hosts.names[:2]
    assert list(code.glob("*/train/__pycache__/trainer.*.pyc")), "the ranks ran other code"
