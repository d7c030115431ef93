"""Accelerators and the machines around them, as the planner needs them: memory, links, power.

Peaks come from `train.arithmetic.peak_flops`, the same table that MFU uses. Figures are the makers' data sheets of one
common machine each (links a direction and accelerator); what is not published for certain is None, and a plan that
needs it says so. Every figure can be overridden on the command line (`planner.network_gb_per_second=…`).
"""

from dataclasses import dataclass, replace

from data_prep.errors import ConfigError
from train.arithmetic import peak_flops


@dataclass(frozen=True)
class Hardware:
    """One kind of accelerator in its usual machine."""

    name: str
    """The word of `cluster.hardware`, which also finds the peak."""
    memory_gib: float | None = None
    """Memory that programs can have on one accelerator."""
    memory_gb_per_second: float | None = None
    """Read and written bytes, data sheet."""
    link_gb_per_second: float | None = None
    """One direction, one accelerator, to its neighbours in the node (NVLink)."""
    network_gb_per_second: float | None = None
    """One direction, one accelerator's share of the node's network."""
    node_watts: float | None = None
    """A whole machine at full load."""
    gpus_per_node: int = 8
    """Accelerators of the machine that `node_watts` speaks of."""
    dollars_per_hour: float | None = None
    """One accelerator for an hour: a round figure to replace by your own."""
    host_gb_per_second: float = 20.0
    """Between page-locked host memory and one accelerator, each way at once: assumed for PCIe 4.0 x16."""
    implied_tflops: float | None = None
    """Peak that published days and utilisation imply, where no data sheet is at hand."""

    def peak(self, dtype: str) -> float:
        """Peak in FLOP/s. Raises ConfigError where it is not known."""
        found = peak_flops(self.name, dtype) if self.implied_tflops is None else self.implied_tflops * 1e12
        if found is None:
            raise ConfigError(
                f"cluster.hardware={self.name} has no known {dtype} peak, so neither time nor MFU can be planned; "
                "give planner.peak_tflops, or another precision"
            )
        return found

    def needs(self, *names: str) -> None:
        """Raise ConfigError that names the first of these fields that is not known."""
        for name in names:
            if getattr(self, name) is None:
                raise ConfigError(
                    f"cluster.hardware={self.name} has no known {name}, which a search needs; give planner.{name}, or "
                    "planner.utilization to plan from a measured utilisation alone"
                )


TABLE = {
    one.name: one
    for one in (
        # DGX A100: NVLink 3 (600 GB/s both ways), 8 x HDR InfiniBand (200 Gbit/s), 6.5 kW.
        Hardware("a100_40g", 39.4, 1555, 300, 25, 6500, dollars_per_hour=1.5),
        Hardware("a100_80g", 79.2, 2039, 300, 25, 6500, dollars_per_hour=2.0),
        # DGX H100 and H200: NVLink 4 (900 GB/s both ways), 8 x NDR InfiniBand (400 Gbit/s), 10.2 kW. Their PCIe 5.0
        # carried 42.6 GB/s each way in benchmarks/offload.csv.
        Hardware("h100", 79.1, 3350, 450, 50, 10200, dollars_per_hour=3.0, host_gb_per_second=42.0),
        Hardware("h200", 139.8, 4800, 450, 50, 10200, dollars_per_hour=3.5, host_gb_per_second=42.0),
        # Published days of large runs on them imply these peaks (docs/planning.md); no more is known for certain.
        Hardware("hygon_dcu", implied_tflops=21.2, gpus_per_node=4),
        Hardware("sunway_sw26010_pro", implied_tflops=54.1, gpus_per_node=1),
    )
}


def find(name: str | None) -> Hardware:
    """The entry of a `cluster.hardware` word. Raises ConfigError that lists the known ones."""
    known = ", ".join(TABLE)
    if name is None:
        raise ConfigError(
            f"cluster.hardware is not set; choose a cluster=… file that names it, or cluster.hardware={known}"
        )
    if name not in TABLE:
        raise ConfigError(f"cluster.hardware={name} is not known; use one of {known}")
    return TABLE[name]


def changed(hardware: Hardware, **values: float | None) -> Hardware:
    """The entry with figures replaced where a value is given."""
    return replace(hardware, **{name: value for name, value in values.items() if value is not None})  # type: ignore[arg-type]
