"""What fills each rank's memory, said once when the first steps are done: a line, and `memory.json` for the report.

On an accelerator it is measured: weights and optimizer states are counted, the rest of what is held between two steps
is gradients (with their buffers), what a step needs beyond is activations, what the allocator holds beyond that is
fragmentation. A CPU does not tell, so there the config's arithmetic (`train/memory.py`) speaks alone.
"""

import logging
from typing import Any

from torch import Tensor, nn

from train import backend
from train.collective import gather, on_rank_zero
from train.engine import Engine
from train.memory import peak_memory
from train.observers import size
from train.run_folder import RunFolder

logger = logging.getLogger(__name__)

KINDS = ("parameters", "gradients", "optimizer", "activations", "fragmentation")


class MemoryUse:
    """Memory fields for the metrics; the first reading tells of the kinds too."""

    def __init__(self, engine: Engine, folder: RunFolder | None) -> None:
        """folder: the run folder on rank 0, None elsewhere."""
        self.engine, self.folder, self._told = engine, folder, False

    def read(self) -> dict[str, int]:
        """The metrics' fields of the steps since the last reading; all ranks call it together, after a step."""
        used = backend.memory()
        if not self._told:
            self._told = True
            fullest = self._of_the_fullest_rank(used)
            on_rank_zero(self.engine.mesh, lambda: self._tell(fullest))
        return used

    def _of_the_fullest_rank(self, used: dict[str, int]) -> dict[str, Any]:
        engine = self.engine
        predicted = predicted_use(engine)
        if not used:
            return {"source": "config", "predicted": predicted}
        every = gather(engine.mesh, measured_use(engine, used))
        rank = max(range(len(every)), key=lambda rank: sum(every[rank].values()))
        return {"source": "measured", "rank": rank, "measured": every[rank], "predicted": predicted}

    def _tell(self, record: dict[str, Any]) -> None:
        kinds = record.get("measured", record["predicted"])
        parts = ", ".join(f"{kind} {size(kinds[kind])}" for kind in KINDS if kind in kinds)
        how = f"measured, rank {record['rank']}" if "rank" in record else "by the config's arithmetic"
        logger.info("memory of the fullest rank (%s): %s", how, parts)
        assert self.folder is not None
        self.folder.write_json("memory.json", record)


def measured_use(engine: Engine, used: dict[str, int]) -> dict[str, int]:
    """Bytes by kind on this rank. used: what `backend.memory` found after a step."""
    parameters = sum(_bytes(parameter) for parameter in engine.model.parameters())
    optimizer = sum(
        sum(moment.nbytes for moment in fragment.moments.values() if moment.device == fragment.master.device)
        # Without ZeRO the fp32 weights are their own masters.
        + (0 if fragment.master.data_ptr() == fragment.parameter.data_ptr() else fragment.master.nbytes)
        for fragment in engine.fragments()
    )
    held, peak, reserved = (used[f"memory_{name}_bytes"] for name in ("held", "peak", "reserved"))
    return {
        "parameters": parameters,
        "gradients": held - parameters - optimizer,
        "optimizer": optimizer,
        "activations": peak - held,
        "fragmentation": reserved - peak,
    }


def predicted_use(engine: Engine) -> dict[str, float]:
    """Bytes by kind on the fullest rank as the planner counts them; fragmentation is not predicted."""
    config, data = engine.config, engine.mesh.data
    micro_batches = config.global_batch_size // (config.micro_batch_size * data)
    memory = peak_memory(config, data_parallel=data, micro_batches=micro_batches)
    return {
        "parameters": memory.weights,
        "gradients": memory.gradients + memory.buffers,
        "optimizer": memory.master + memory.adam,
        "activations": memory.activations + memory.working + memory.head + memory.update,
    }


def _bytes(parameter: nn.Parameter) -> int:
    """What this rank holds of a parameter; of one that ZeRO 3 divides, its part."""
    held: Tensor = getattr(parameter, "ds_tensor", parameter)
    return held.nbytes
