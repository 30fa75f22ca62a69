"""A plugin that implements every hook and writes down what it was told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attrs import frozen

from gpt_simple import Plugin, hookimpl
from gpt_simple.hooks import HOOKS, HookInfo, NoConfig, RunEnd

if TYPE_CHECKING:
    import torch


@frozen
class Call:
    """One call of a hook: its name, its event (None for hooks without one) and the step the run had reached."""

    hook: str
    event: Any
    step: int


class Recorder(Plugin[NoConfig]):
    """Pass an instance to a run and read ``calls`` afterwards; ``weights`` are those at the run's end."""

    ranks = "all"
    on_error = "abort"

    def __init__(self, config: NoConfig | None = None) -> None:
        super().__init__(config or NoConfig())
        self.calls: list[Call] = []
        self.weights: dict[str, torch.Tensor] = {}

    def hooks(self) -> list[str]:
        """The names of the hooks in the order in which they were called."""
        return [call.hook for call in self.calls]

    def events(self, hook: str) -> list[Any]:
        """The events of one hook."""
        return [call.event for call in self.calls if call.hook == hook]


def _implementation(info: HookInfo) -> Any:
    answer: Any = {"none": None, "metrics": {}, "findings": []}[info.returns]

    def of_config(self: Recorder, config: Any) -> Any:
        self.calls.append(Call(info.name, None, 0))
        return answer

    def of_run(self: Recorder, run: Any) -> Any:
        self.calls.append(Call(info.name, None, run.step))
        return answer

    def of_event(self: Recorder, run: Any, event: Any) -> Any:
        self.calls.append(Call(info.name, event, run.step))
        if isinstance(event, RunEnd):
            self.weights = {name: value.detach().clone() for name, value in run.model.state_dict().items()}
        return answer

    return of_config if "config" in info.arguments else of_event if "event" in info.arguments else of_run


for _info in HOOKS.values():
    if _info.name != "register_components":
        setattr(Recorder, _info.name, hookimpl(_implementation(_info)))
