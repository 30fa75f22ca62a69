"""An implementation of any hook, made from one function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpt_simple import hookimpl
from gpt_simple.hooks import HookInfo


def implement(info: HookInfo, act: Callable[[Any, Any, Any], Any]) -> Any:
    """A marked method that calls ``act(self, subject, event)``.

    ``subject`` is the hook's first argument: the run, the configuration or the registry. ``event`` is None in a hook
    without one. If ``act`` returns None, the method returns an empty result of the hook's type.
    """
    empty: Any = {"none": None, "metrics": {}, "findings": []}[info.returns]

    def call(self: Any, subject: Any, event: Any = None) -> Any:
        result = act(self, subject, event)
        return empty if result is None else result

    def of_registry(cls: Any, registry: Any) -> Any:
        return call(cls, registry)

    def of_config(self: Any, config: Any) -> Any:
        return call(self, config)

    def of_run(self: Any, run: Any) -> Any:
        return call(self, run)

    def of_event(self: Any, run: Any, event: Any) -> Any:
        return call(self, run, event)

    subject = info.arguments[0]
    if subject == "registry":
        return classmethod(hookimpl(of_registry))
    if subject == "config":
        return hookimpl(of_config)
    return hookimpl(of_event if "event" in info.arguments else of_run)
