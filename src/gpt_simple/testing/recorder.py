"""A plugin that implements every hook and records each call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from attrs import frozen

from gpt_simple import Plugin
from gpt_simple.hooks import HOOKS, HookInfo, NoConfig, RunEnd
from gpt_simple.testing.hook_methods import implement

if TYPE_CHECKING:
    import torch

    from gpt_simple.plugin_host.loading import LoadedPlugin


@frozen
class Call:
    """One call of a hook: its name, its event (None for hooks without one) and the run's last step."""

    hook: str
    event: Any
    step: int


class Recorder(Plugin[NoConfig]):
    """Pass an instance to a run and read it afterwards.

    ``calls`` are in order, ``weights`` those at the run's end, ``plugins`` all of the run with their failures.
    """

    ranks = "all"
    on_error = "abort"

    def __init__(self, config: NoConfig | None = None) -> None:
        super().__init__(config or NoConfig())
        self.calls: list[Call] = []
        self.weights: dict[str, torch.Tensor] = {}
        self.plugins: Sequence[LoadedPlugin] = ()

    def hooks(self) -> list[str]:
        """The names of the hooks in the order in which they were called."""
        return [call.hook for call in self.calls]

    def events(self, hook: str) -> list[Any]:
        """The events of one hook."""
        return [call.event for call in self.calls if call.hook == hook]


def _recording(info: HookInfo) -> Any:
    def record(self: Recorder, subject: Any, event: Any) -> None:
        self.calls.append(Call(info.name, event, getattr(subject, "step", 0)))
        if isinstance(event, RunEnd):
            self.weights = {name: value.detach().clone() for name, value in subject.model.state_dict().items()}

    return implement(info, record)


for _info in HOOKS.values():
    if _info.name != "register_components":
        setattr(Recorder, _info.name, _recording(_info))
