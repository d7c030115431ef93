"""A Kubernetes manifest from a config: an indexed job with one pod a node, its service and the supervisor in pod 0."""

import json
import re
import secrets
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from data_prep.errors import EXIT_DONE, ConfigError
from launch.slurm import agent_loop
from launch.supervise import NODES_VARIABLE
from launch.wire import TOKEN_VARIABLE
from train.config import Config
from train.run_folder import JOB_VARIABLE

PORT = 29400
"""Port of the supervisor in its pod, unless cluster.supervisor_port says otherwise."""

_MANIFEST = """\
# kubectl create secret generic {name} --namespace={namespace} --from-literal=token=$(openssl rand -hex 16)
# kubectl apply -f THIS
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: {namespace}}}
spec:
  clusterIP: None   # gives the pods names
  publishNotReadyAddresses: true
  selector: {{job-name: {name}}}
---
apiVersion: batch/v1
kind: Job
metadata: {{name: {name}, namespace: {namespace}}}
spec:
  completionMode: Indexed
  completions: {nodes}
  parallelism: {nodes}
  backoffLimit: {restarts}
  template:
    spec:
      subdomain: {name}
      restartPolicy: OnFailure
      hostNetwork: {host_network}
      dnsPolicy: {dns}
      terminationGracePeriodSeconds: 600   # time to save
      containers:
        - name: node
          image: {image}
          workingDir: {workdir}
          command: [bash, -c]
          args:
            - |
              # Pod 0 supervises and trains; the others train.
              supervisor={name}-0.{name}
              if [ "$JOB_COMPLETION_INDEX" = 0 ]; then
                {supervisor} &
                supervisor_pid=$!
                trap 'kill -TERM "$supervisor_pid"' TERM
              fi
              {agent} &
              wait $!
              [ "$JOB_COMPLETION_INDEX" != 0 ] || wait "$supervisor_pid"
          env:
            - name: {token}
              valueFrom: {{secretKeyRef: {{name: {name}, key: token}}}}
            - name: {variable}
              value: {names}
            - name: {job_variable}   # resume.step and resume.enabled are obeyed once a job
              valueFrom: {{fieldRef: {{fieldPath: "metadata.labels['batch.kubernetes.io/controller-uid']"}}}}
{environment}          resources:
            limits: {{{limits}}}
          volumeMounts:
            - {{name: shared, mountPath: {mount_path}}}
            - {{name: shm, mountPath: /dev/shm}}
      volumes:
        - name: shared
          persistentVolumeClaim: {{claimName: {claim}}}
        - name: shm
          emptyDir: {{medium: Memory, sizeLimit: {shm}}}
"""


def render(config: Config, words: Sequence[str]) -> str:
    """The manifest of a job. Raises ConfigError where the image or the shared volume is not named."""
    cluster, kubernetes = config.cluster, config.cluster.kubernetes
    for key in ("image", "volume_claim"):
        if getattr(kubernetes, key) is None:
            raise ConfigError(f"cluster.kubernetes.{key} is not set; cluster.launcher=kubernetes needs it")
    name = job_name(config)
    port = cluster.supervisor_port or PORT
    quoted = " ".join(shlex.quote(word) for word in words)
    own = f'cluster.supervisor_port={port} "cluster.supervisor_address=$supervisor"'
    variables = "".join(
        f"            - {{name: {key}, value: {json.dumps(value)}}}\n"
        for key, value in sorted(cluster.environment.items())
    )
    cards = cluster.gpus_per_node
    limits = "cpu: 4" if cards is None else f"{kubernetes.gpu_resource}: {cards}"
    return _MANIFEST.format(
        name=name,
        namespace=kubernetes.namespace,
        nodes=cluster.nodes,
        restarts=max(6, cluster.max_restarts),
        host_network=str(kubernetes.host_network).lower(),
        dns="ClusterFirstWithHostNet" if kubernetes.host_network else "ClusterFirst",
        image=kubernetes.image,
        workdir=kubernetes.workdir,
        supervisor=f"python -m launch.supervise {quoted} {own}",
        agent=agent_loop(f'python -m launch.node "$supervisor:{port}" "{name}-$JOB_COMPLETION_INDEX"'),
        token=TOKEN_VARIABLE,
        variable=NODES_VARIABLE,
        job_variable=JOB_VARIABLE,
        names=",".join(f"{name}-{index}" for index in range(cluster.nodes)),
        environment=variables,
        limits=limits,
        mount_path=kubernetes.mount_path,
        claim=kubernetes.volume_claim,
        shm=kubernetes.shared_memory,
    )


def submit(config: Config, file: Path) -> int:
    """Create the job's secret and hand the manifest to kubectl; returns 0. Raises ConfigError with kubectl's words."""
    name, namespace = job_name(config), config.cluster.kubernetes.namespace
    token = f"--from-literal=token={secrets.token_hex(16)}"
    for command, may_fail in (
        (["kubectl", "delete", "secret", name, f"--namespace={namespace}", "--ignore-not-found"], False),
        (["kubectl", "create", "secret", "generic", name, f"--namespace={namespace}", token], False),
        (["kubectl", "apply", "-f", str(file)], False),
    ):
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise ConfigError("cluster.launcher=kubernetes: there is no kubectl on this machine") from error
        if done.returncode and not may_fail:
            raise ConfigError(f"{shlex.join(command[:3])}: {' '.join(done.stderr.split())}")
    print(f"job {name} in namespace {namespace}: {file}")
    return EXIT_DONE


def job_name(config: Config) -> str:
    """The run folder's name as Kubernetes allows it: lower case, digits and dashes."""
    plain = re.sub(r"[^a-z0-9-]+", "-", Path(config.run_dir).name.lower()).strip("-")
    return f"tiankong-{plain}"[:50].rstrip("-")
