"""Registers the optimizer ``schedule_free``."""

from typing import Annotated, Any

from annotated_types import Gt, Lt
from attrs import frozen
from typing_extensions import Doc

from gpt_simple import Finding, OptimizerConfig, Plugin, hookimpl
from gpt_simple.hooks import NoConfig, Registry


@frozen
class ScheduleFreeConfig(OptimizerConfig):
    """``[optimizer]`` with ``name = "schedule_free"``."""

    name: Annotated[str, Doc("optimizer component")] = "schedule_free"
    beta1: Annotated[float, Gt(0), Lt(1), Doc("weight of the average in the point where gradients are taken")] = 0.9
    beta2: Annotated[float, Gt(0), Lt(1), Doc("decay of the second moment")] = 0.999
    schedule: Annotated[str, Doc("schedule component: only a constant rate, after a warm-up, makes sense")] = "constant"


class ScheduleFree(Plugin[NoConfig]):
    """Registers ``optimizer.name = "schedule_free"``."""

    @classmethod
    @hookimpl
    def register_components(cls, registry: Registry) -> None:
        registry.add("optimizer", "schedule_free", f"{__name__}.optimizer:build", config=ScheduleFreeConfig)

    @hookimpl
    def check_config(self, config: Any) -> list[Finding]:  # type: ignore[override]
        if config.optimizer.name != "schedule_free" or config.optimizer.schedule == "constant":
            return []
        message, hint = "the average of the weights replaces a decay of the learning rate", 'set it to "constant"'
        return [Finding("warning", "schedule-not-free", message, "optimizer.schedule", hint)]
