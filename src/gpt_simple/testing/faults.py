"""Plugins that misbehave in one hook, to see that everybody else is left alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import torch
from attrs import frozen

from gpt_simple import Config, Plugin, hookimpl
from gpt_simple.hooks import HOOKS


def _raise(_: object) -> None:
    raise RuntimeError("this plugin fails on purpose")


def _exit(_: object) -> None:
    raise SystemExit(3)


def _draw_random_numbers(_: object) -> None:
    torch.manual_seed(0)
    torch.randn(7)


def _enter(mode: Any) -> None:
    _entered.append(mode)  # an inference mode that is forgotten would end by itself
    mode.__enter__()


def _change_the_config(config: Config | None) -> None:
    if config is not None:
        config.plugins.tables["misbehaving"] = {}  # type: ignore[index]


_entered: list[Any] = []


@frozen
class Misbehaviour:
    """What is done, given the configuration where there is one, and whether a well-guarded run takes it for a failure
    of the plugin."""

    act: Callable[[Config | None], Any]
    fails: bool = True


MISBEHAVIOURS = MappingProxyType(
    {
        "raises": Misbehaviour(_raise),
        "exits": Misbehaviour(_exit),
        "returns garbage": Misbehaviour(lambda _: "garbage"),
        "leaves gradients off": Misbehaviour(lambda _: torch.set_grad_enabled(False) and None),
        "changes the default dtype": Misbehaviour(lambda _: torch.set_default_dtype(torch.float64)),
        "leaves autocast on": Misbehaviour(lambda _: _enter(torch.autocast("cpu", torch.bfloat16))),
        "leaves inference mode on": Misbehaviour(lambda _: _enter(torch.inference_mode())),
        "changes the default device": Misbehaviour(lambda _: torch.set_default_device("meta")),
        "changes the configuration": Misbehaviour(_change_the_config),
        "draws random numbers": Misbehaviour(_draw_random_numbers, fails=False),
        "is slow": Misbehaviour(lambda _: time.sleep(0.01), fails=False),
    }
)


def misbehaving(
    hook: str, how: str, *, rank: int | None = None, name: str = "misbehaving", **declared: Any
) -> type[Plugin[Any]]:
    """A plugin class called ``name`` that does ``how`` (a key of MISBEHAVIOURS) in ``hook``.

    With ``rank`` only that process misbehaves, in a hook that is given the run. ``declared`` are class attributes such
    as ``on_error="abort"``.
    """
    info, act = HOOKS[hook], MISBEHAVIOURS[how].act
    answer: Any = {"none": None, "metrics": {}, "findings": []}[info.returns]

    def misbehave(config: Config | None, run: Any = None) -> Any:
        if rank is not None and run is not None and run.rank != rank:
            return answer
        result = act(config)
        return answer if result is None else result

    def of_config(self: Any, config: Any) -> Any:
        return misbehave(config)

    def of_run(self: Any, run: Any) -> Any:
        return misbehave(run.config, run)

    def of_registry(cls: Any, registry: Any) -> Any:
        return misbehave(None)

    implementations: dict[str, Any] = {
        "registry": classmethod(hookimpl(of_registry)),
        "config": hookimpl(of_config),
        "run": hookimpl(of_run),
    }
    return type(name.title().replace("_", ""), (Plugin,), {hook: implementations[info.arguments[0]], **declared})
