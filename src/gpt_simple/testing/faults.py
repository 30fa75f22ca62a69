"""Plugins that misbehave in one hook, to test that a run and its other plugins are unaffected."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import torch
from attrs import frozen

from gpt_simple import Config, ConfigError, Plugin
from gpt_simple.hooks import HOOKS
from gpt_simple.testing.hook_methods import implement


class _Odd(BaseException):
    """As a cancelled task or a panic of a native library, and its message cannot be shown."""

    def __str__(self) -> str:
        raise ValueError("this exception has no text")


def _raising(error: Callable[[], BaseException]) -> Callable[[object], None]:
    def act(_: object) -> None:
        raise error()

    return act


def _draw_random_numbers(_: object) -> None:
    torch.manual_seed(0)
    torch.randn(7)


def _enter(mode: Any) -> None:
    _entered.append(mode)  # an inference mode ends when its object is deleted
    mode.__enter__()


def _replace_handler(_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _change_the_config(config: Config | None) -> None:
    if config is not None:
        config.plugins.tables["misbehaving"] = {}  # type: ignore[index]


_entered: list[Any] = []


@frozen
class Misbehaviour:
    """``act`` gets the configuration, or None where a hook has none. ``fails``: a run counts it as a failure."""

    act: Callable[[Config | None], Any]
    fails: bool = True


MISBEHAVIOURS = MappingProxyType(
    {
        "raises": Misbehaviour(_raising(lambda: RuntimeError("this plugin fails on purpose"))),
        "raises a BaseException": Misbehaviour(_raising(_Odd)),
        "raises a ConfigError": Misbehaviour(_raising(lambda: ConfigError("this plugin has a mistake"))),
        "exits": Misbehaviour(_raising(lambda: SystemExit(3))),
        "returns garbage": Misbehaviour(lambda _: "garbage"),
        "leaves gradients off": Misbehaviour(lambda _: torch.set_grad_enabled(False) and None),
        "changes the default dtype": Misbehaviour(lambda _: torch.set_default_dtype(torch.float64)),
        "leaves autocast on": Misbehaviour(lambda _: _enter(torch.autocast("cpu", torch.bfloat16))),
        "leaves inference mode on": Misbehaviour(lambda _: _enter(torch.inference_mode())),
        "changes the default device": Misbehaviour(lambda _: torch.set_default_device("meta")),
        "replaces a signal handler": Misbehaviour(_replace_handler),
        "changes the configuration": Misbehaviour(_change_the_config),
        "draws random numbers": Misbehaviour(_draw_random_numbers, fails=False),
        "is slow": Misbehaviour(lambda _: time.sleep(0.01), fails=False),
    }
)


def misbehaving(
    hook: str, how: str, *, rank: int | None = None, name: str = "misbehaving", **declared: Any
) -> type[Plugin[Any]]:
    """A plugin class called ``name`` that does ``how`` (a key of MISBEHAVIOURS) in ``hook``.

    With ``rank`` only that process misbehaves, in a hook that gets the run. ``declared`` are class attributes such as
    ``on_error="abort"``.
    """
    misbehave = MISBEHAVIOURS[how].act

    def act(self: Any, subject: Any, event: Any) -> Any:
        if rank is not None and getattr(subject, "rank", rank) != rank:
            return None
        return misbehave(subject if isinstance(subject, Config) else getattr(subject, "config", None))

    return type(name.title().replace("_", ""), (Plugin,), {hook: implement(HOOKS[hook], act), **declared})
