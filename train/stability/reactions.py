"""What a run does about a spike, and the acts its config lists: decided from numbers that every rank shares.

A spike seen in step t (`train.stability.detector`) is acted on before step t + 1. An act is a few plain numbers; the
learning rate and EGS alpha of a step are pure functions of the acts before it, and the acts are in every checkpoint. So
a resumed run repeats them. A roll-back is the one act that a checkpoint cannot hold, since it goes back to before it
was decided: it stands in events.jsonl, and a run that resumes from the checkpoint it went back to takes it from there.
Each checkpoint says how many roll-backs the file held when it was written: none of these leads to it.
"""

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from data_prep.errors import ConfigError
from train.config import Config
from train.engine import Engine, StepNumbers
from train.fragments import set_adam_steps
from train.stability import update_size, weight_size
from train.stability.detector import LASTING, SIGNALS
from train.stability.stress import lr_factor

Act = dict[str, Any]
"""{id, step, from_sample, action, …}: in effect before `step`, which begins at `from_sample`."""
Event = dict[str, Any]
Before = Callable[[int], "tuple[int, int] | None"]
"""Step and consumed samples of the newest checkpoint before a step."""
LATE = ("roll_back", "lower_lr", "lower_shrink", "reset_loss_scale", "reset_optimizer")
"""Reactions for which the host must know a step's numbers before the next one begins."""


class Reactions:
    """The acts of one run: those in effect, and what to do next."""

    def __init__(self, config: Config, engine: Engine) -> None:
        self.config, self.engine = config, engine
        self.acts: list[Act] = []
        self.history: list[Event] = []
        """All roll-backs in events.jsonl, oldest first."""
        self._older = 0
        """How many of them the checkpoint that was loaded is younger than."""
        self.roll_backs: list[str] = []
        """Ids of the roll-backs that the run has behind it; one does not take another back."""
        self.last_spike = 0
        self.cursors: list[int] = []
        """Where each of the last steps began, in samples; oldest first."""

    @property
    def wait(self) -> bool:
        """Whether each step's numbers must be read before the next step."""
        return any(word in LATE for word in self.config.stability.reactions)

    def learning_rate(self, step: int, consumed: int, rate: float) -> float:
        """The schedule's rate for a step that ends at `consumed`, as acts and stress change it."""
        for act in self.acts:
            if act["action"] == "lower_lr" and act["step"] <= step:
                warm = act.get("rewarm_samples", 0)
                rate *= act["factor"] * (min(1.0, (consumed - act["from_sample"]) / warm) if warm else 1.0)
        return rate * lr_factor(self.config.stability.stress, step)

    def shrink(self, step: int, alpha: float) -> float:
        """The schedule's EGS alpha, as acts change it."""
        for act in self.acts:
            if act["action"] == "lower_shrink" and act["step"] <= step:
                alpha *= act["factor"]
        return alpha

    def before(self, step: int, consumed: int) -> list[Event]:
        """Bring about what is due before a step that begins at `consumed`; events of the acts that the config lists."""
        self.cursors = [*self.cursors, consumed][-(self.config.stability.roll_back_margin_steps + 1) :]
        events = []
        for planned in self.config.stability.events:
            if planned["step"] == step and not self._has(_planned_id(planned)):
                act = {**planned, "id": _planned_id(planned), "from_sample": consumed}
                self.acts.append(act)
                events.append(_event(act["id"], step, consumed, "planned", "stability.events", [act]))
        for act in self.acts:
            if act["step"] == step and act["action"] == "reset_optimizer":
                for fragment in self.engine.fragments():
                    for moment in fragment.moments.values():
                        moment.zero_()
                set_adam_steps(self.engine.deepspeed.optimizer, 0)
                self._forget_update_size()
            if act["step"] == step and act["action"] == "lower_lr" and act["factor"] > 1:
                self._forget_update_size()
            if act["step"] == step and act["action"] == "reset_loss_scale":
                precision = self.config.precision
                scale = 2.0**precision.loss_scale_initial_power
                hysteresis = precision.loss_scale_hysteresis
                self.engine.load_scaler_state({"cur_scale": scale, "cur_hysteresis": hysteresis})
        if self.engine.guard is not None:
            self.engine.guard.coming(step)
        return events

    def skipped(self, step: int) -> list[list[int]]:
        """Ranges of samples that the config skips from this step on."""
        return [one["samples"] for one in self.config.stability.events if _skips(one) and one["step"] == step]

    def see(self, step: int, consumed: int, number: StepNumbers, checkpoint_before: Before) -> Event | None:
        """Judge a step that ended at `consumed`; the event, if it is a spike that is to be reported.

        checkpoint_before is called by all ranks, for a roll-back only.
        """
        stability = self.config.stability
        seen_by = {name: [number.seen.get(f"{name}_{of}", 0.0) for of in ("score", "lasting")] for name in SIGNALS}
        over = [name for name, scores in seen_by.items() if max(scores) > stability.spike_sigma]
        times = [number.seen.get(f"{of}_times", 0.0) if stability.reactions else 0.0 for of in ("update", "weight")]
        moved, grown = times
        over += ["update_size"] if moved > update_size.TIMES else []
        over += ["weight_size"] if grown > weight_size.TIMES else []
        if not over or (self.last_spike and step - self.last_spike <= stability.cooldown_steps):
            return None
        self.last_spike = step
        values = {"loss": number.loss, "grad_norm": number.grad_norm, "repetition": number.seen["repetition"]}
        told = [_seen(name, values[name], seen_by[name], stability.spike_sigma) for name in over if name in values]
        if moved > update_size.TIMES:
            told.append(
                f"update_size {number.seen['update_size']:.4g} is {moved:.1f} times the median of the steps before it"
            )
        if grown > weight_size.TIMES and self.engine.guard is not None:
            name = self.engine.guard.tensors.names[int(number.seen["weight_number"])]
            size = f"{grown:.3g} times that of the step before" if math.isfinite(grown) else "not finite in fp32"
            told.append(f"the norm of {name} is {size}")
        # The same step may spike again after a roll-back.
        name = f"spike-{step}-{len(self.roll_backs)}"
        acts = self._decide(step, consumed, name, checkpoint_before) if self._may_act() else []
        if number.seen.get("left_out"):
            acts = [{"id": f"{name}/skip", "step": step, "from_sample": consumed, "action": "skip"}, *acts]
        event = _event(name, step, consumed, f"{'_and_'.join(over)}_spike", ", ".join(told), acts)
        if target_of(event) is not None:
            self.history.append(event)
        else:
            self.acts += acts
        return event

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        guard = {} if self.engine.guard is None else self.engine.guard.state()
        # Copies: the checkpoint may be written while the run goes on.
        return {
            "acts": list(self.acts),
            "roll_backs": list(self.roll_backs),
            "history": len(self.history),
            "last_spike": self.last_spike,
            "cursors": list(self.cursors),
            "rate": self._rate(),
            "guard": guard,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Put back what `state` gave; a checkpoint of a version before this one gives nothing."""
        self.acts = list(state.get("acts", []))
        self.roll_backs, self._older = list(state.get("roll_backs", [])), state.get("history", 0)
        self.last_spike, self.cursors = state.get("last_spike", 0), list(state.get("cursors", []))
        if self.engine.guard is not None:
            self.engine.guard.load_state(state.get("guard", {}))
        if state.get("rate") != self._rate():
            self._forget_update_size()

    def remember(self, events: list[Event]) -> None:
        """Take up what events.jsonl holds, at a start."""
        self.history = [event for event in events if target_of(event) is not None]

    def go_on_from(self, step: int) -> list[list[int]]:
        """Take up the roll-backs to this step, whose checkpoint was loaded; the ranges of samples they skip.

        What was decided later, or where a process was killed before it could go back, is forgotten: the run comes to it
        again. Raises ConfigError for an act in stability.events that should have happened by now and did not.
        """
        # Decided again where it was not carried out, it has its id from before.
        behind = list({event["id"]: event for event in self.history[self._older :]}.values())
        while behind and target_of(behind[-1]) != step:
            behind.pop()
        self.roll_backs += [event["id"] for event in behind]
        mine = [event for event in behind if target_of(event) == step]
        self.acts += [act for event in mine for act in event["acts"]]
        for planned in self.config.stability.events:
            if planned["step"] <= step and not self._has(_planned_id(planned)):
                raise ConfigError(
                    f"stability.events holds an act at step {planned['step']}, but the run stands at step {step}; "
                    "give a later step, or go back with resume.step"
                )
        return [act["skip"] for event in mine for act in event["acts"] if act["action"] == "roll_back"]

    def _rate(self) -> dict[str, Any]:
        """What decides how large an update is meant to be."""
        return asdict(self.config.optimizer) | asdict(self.config.schedule)

    def _forget_update_size(self) -> None:
        """What the run does to it on purpose is no spike."""
        if self.engine.guard is not None:
            self.engine.guard.update_size.forget()

    def _has(self, name: str) -> bool:
        return any(act["id"] == name for act in self.acts)

    def _may_act(self) -> bool:
        reacted = {act["id"].partition("/")[0] for act in self.acts if act["id"].startswith("spike")}
        reacted |= set(self.roll_backs)
        return len(reacted) < self.config.stability.max_acts

    def _decide(self, step: int, consumed: int, name: str, checkpoint_before: Before) -> list[Act]:
        """What config.stability.reactions makes of a spike in `step`."""
        stability, words = self.config.stability, self.config.stability.reactions
        base: Act = {"step": step + 1, "from_sample": consumed}
        acts: list[Act] = []
        if "roll_back" in words:
            first_skipped = max(1, step - stability.roll_back_margin_steps)
            target = checkpoint_before(first_skipped)
            if target is not None:
                start = self.cursors[-1 - min(stability.roll_back_margin_steps, len(self.cursors) - 1)]
                skip = [start, consumed + stability.skip_ahead_samples]
                acts.append({"action": "roll_back", "to_step": target[0], "skip": skip})
                base = {"step": target[0] + 1, "from_sample": target[1]}
        if "lower_lr" in words:
            factor = {"factor": stability.lr_factor, "rewarm_samples": stability.rewarm_samples}
            acts.append({"action": "lower_lr", **factor})
        if "lower_shrink" in words:
            acts.append({"action": "lower_shrink", "factor": stability.shrink_factor})
        acts += [{"action": word} for word in ("reset_loss_scale", "reset_optimizer") if word in words]
        return [{"id": f"{name}/{act['action']}", **base, **act} for act in acts]


def _seen(name: str, value: float, scores: list[float], sigma: float) -> str:
    """What the detector saw in a step. scores: the step's, and that of the steps in a row."""
    score, lasting = scores
    if score > sigma:
        return f"{name} {value:.4g} is {score:.1f} deviations over its mean"
    least = lasting / math.sqrt(LASTING)
    return f"{name} {value:.4g} after {LASTING} steps at least {least:.1f} deviations over its mean"


def _event(name: str, step: int, consumed: int, kind: str, seen: str, acts: list[Act]) -> Event:
    told = "; ".join(_told(act) for act in acts) or "warned"
    return {
        "id": name,
        "step": step,
        "from_sample": consumed,
        "kind": kind,
        "seen": seen,
        "action": told,
        "acts": acts,
    }


def _told(act: Act) -> str:
    left = {key: value for key, value in act.items() if key not in ("id", "step", "from_sample", "action")}
    told = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in left.items())
    return act["action"].replace("_", " ") + (f" ({told})" if told else "")


def target_of(event: Event) -> int | None:
    """The step that an event rolled back to; None for the others."""
    return next((act["to_step"] for act in event.get("acts") or [] if act.get("action") == "roll_back"), None)


def _skips(planned: Act) -> bool:
    return bool(planned["action"] == "skip_samples")


def _planned_id(planned: Act) -> str:
    return f"planned-{planned['step']}-{planned['action']}"
