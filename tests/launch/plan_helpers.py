"""Planned configs for the planner's tests."""

from data_prep import cli
from launch.plan_config import PlanConfig


def planned(*overrides: str) -> PlanConfig:
    """The composed config of `python -m launch.plan` with these words."""
    return cli.compose("plan", PlanConfig, overrides)
