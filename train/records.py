"""The lines of metrics.jsonl: what the host knows of a step when it is given to the device, and what is read later."""

from typing import Any

from train import backend
from train.arithmetic import flops_per_token, model_flops_utilization
from train.config import Config
from train.engine import StepNumbers
from train.mesh import Mesh
from train.scores import loss_by_group, targets_by_group


class Records:
    """Makes the records of one run."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        """The device is the one that `cluster.hardware` names, else the one that is found."""
        self.config, self.mesh = config, mesh
        self.device_name = config.cluster.hardware or backend.device_name()
        self._flops = flops_per_token(config.model, config.sequence_length)

    def begun(
        self, step: int, *, lr: float, consumed_samples: int, trained_samples: int, samples: int, seconds: float
    ) -> dict[str, Any]:
        """What the host knows of a step; `tokens_per_second` holds its tokens until the time is known.

        consumed_samples: the cursor behind the step. trained_samples: of all steps so far. samples, seconds: this
        step's, up to its last launch.
        """
        length = self.config.sequence_length
        return {
            "step": step,
            "lr": lr,
            "consumed_samples": consumed_samples,
            "consumed_tokens": trained_samples * length,
            "tokens_per_second": samples * length,
            "step_seconds": seconds,
        }

    def done(self, record: dict[str, Any], number: StepNumbers, *, waited: float, target_tokens: int) -> dict[str, Any]:
        """The whole record of a step.

        waited: seconds, its share of the time in which the host waited for the device. target_tokens: of all steps so
        far.
        """
        seconds = record["step_seconds"] + waited
        rate = record["tokens_per_second"] / seconds
        whole = record | {
            "tokens_per_second": rate,
            "step_seconds": seconds,
            "mfu": self.utilization(rate),
            "loss": number.loss,
            "grad_norm": number.grad_norm,
            "loss_scale": number.loss_scale,
            "target_tokens": target_tokens,
            "loss_by_group": loss_by_group(number.sums),
            "targets_by_group": targets_by_group(number.sums),
            "skipped": number.skipped,
        }
        whole |= {key: value for key, value in number.seen.items() if key in ("embedding_grad_norm", "update_size")}
        whole |= {} if number.telemetry is None else {"telemetry": number.telemetry}
        return whole | ({"z_loss": number.z_loss} if self.config.loss.z_loss else {})

    def utilization(self, tokens_per_second: float) -> float | None:
        """MFU of a rate over all ranks, None where the device's peak is not known."""
        return model_flops_utilization(
            tokens_per_second * self._flops, self.device_name, self.config.precision.dtype, self.mesh.world
        )
