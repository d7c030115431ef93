"""The schema of `cluster.*`: where a job's ranks run, how they are started there and who watches over them."""

from dataclasses import dataclass, field


@dataclass
class SshConfig:
    """launcher=ssh: how a node is reached, and where the code goes there."""

    hostfile: str | None = None
    """File of hosts, one a line as `name` or `name slots=8`; the first `cluster.nodes` train, the others are spares."""
    command: str = "ssh -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=10"
    """Remote shell: called with the host and one shell command."""
    code_dir: str | None = "/tmp/tiankong"
    """Folder on each node for the shipped code, one folder a version; null runs from this checkout's path there."""
    python: str | None = None
    """Interpreter with the packages on the nodes; null means this one's path."""


@dataclass
class SlurmConfig:
    """launcher=slurm: what the batch script asks for. Null leaves a line out."""

    partition: str | None = None
    """Partition."""
    account: str | None = None
    """Account that pays."""
    qos: str | None = None
    """Quality of service."""
    time: str = "24:00:00"
    """Time limit of one job of the chain, as Slurm writes it."""
    save_seconds: int = 600
    """So long before the limit the run saves itself and is queued again."""
    spare_nodes: int = 0
    """Nodes beyond cluster.nodes that wait for one to fail."""
    cpus_per_node: int | None = None
    """Cores on each node; null leaves it to the partition."""
    options: list[str] = field(default_factory=list)
    """Further sbatch options, such as ["--reservation=glm"]."""
    setup: list[str] = field(default_factory=list)
    """Shell lines that run first, such as [module load cuda]."""
    container: str = "none"
    """none, pyxis (enroot images) or apptainer."""
    image: str | None = None
    """The container's image."""
    mounts: list[str] = field(default_factory=list)
    """Folders that the container sees beside this checkout, as /host/path:/path/inside."""


@dataclass
class KubernetesConfig:
    """launcher=kubernetes: what the job's manifest says."""

    image: str | None = None
    """Image with the packages and this checkout under workdir."""
    namespace: str = "default"
    """Namespace."""
    workdir: str = "/workspace/tiankong"
    """Folder of this checkout inside the image."""
    gpu_resource: str = "nvidia.com/gpu"
    """Name under which the nodes offer their accelerators."""
    volume_claim: str | None = None
    """Persistent volume claim that holds data and runs, shared by all pods."""
    mount_path: str = "/workspace/shared"
    """Where it is mounted."""
    shared_memory: str = "64Gi"
    """Size of /dev/shm."""
    host_network: bool = True
    """Use the node's own network, which InfiniBand and RoCE want."""


@dataclass
class ClusterConfig:
    """Where the ranks run; read by `python -m launch` and the planner."""

    launcher: str = "local"
    """local (this machine), ssh (a hostfile), slurm (a batch script) or kubernetes (a job's manifest)."""
    nodes: int = 1
    """Machines."""
    gpus_per_node: int | None = None
    """Accelerators on each; null detects."""
    processes: int | None = None
    """Ranks on each machine; null means one an accelerator, or one on a CPU."""
    hardware: str | None = None
    """Accelerator name for the planner and MFU when it cannot be detected, such as a100_40g; null detects."""
    min_nodes: int | None = None
    """Fewest nodes to go on with when some fail and no spare is left; null means all of `nodes`."""
    max_restarts: int = 0
    """Restarts in a row without a new checkpoint after which the job gives up; 0 on one machine means no supervisor."""
    hang_seconds: float = 600.0
    """The job hangs when no rank has made progress for so long: stacks are dumped, the ranks ended and restarted."""
    silent_seconds: float = 30.0
    """A node or rank that has given no sign of life for so long is lost."""
    connect_seconds: float = 300.0
    """How long the nodes may take to answer when the job starts."""
    wait_seconds: float = 60.0
    """After a failure, how long to wait for lost nodes before going on with spares or fewer."""
    network_interface: str | None = None
    """Interface that NCCL and gloo use on every node; null lets them choose."""
    supervisor_address: str | None = None
    """Address of the supervisor's machine as the nodes see it; null means its host name's."""
    supervisor_port: int = 0
    """Port on which the supervisor listens; 0 takes a free one."""
    rendezvous_port: int = 0
    """Port of the ranks' rendezvous on the first node; 0 takes a free one."""
    preflight: bool = False
    """Measure nodes and links before the first attempt, and leave out the bad ones."""
    flight_recorder: int = 0
    """Newest collectives that each rank keeps with NCCL, written to stacks/ when the job hangs; 0 keeps none."""
    kernel_times_every_steps: int = 0
    """Time the kernels of one step in so many with NVIDIA's resiliency package, so that a slow GPU is told from a slow
    host; 0 never does. See docs/launching.md for what it needs and costs."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of every rank, such as NCCL_IB_HCA."""
    ssh: SshConfig = field(default_factory=SshConfig)
    """Machines of a hostfile."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    """The batch script."""
    kubernetes: KubernetesConfig = field(default_factory=KubernetesConfig)
    """The manifest."""
