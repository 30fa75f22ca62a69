"""The base class of every plugin, ours and strangers'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

from attrs import frozen

if TYPE_CHECKING:
    # To a type checker a plugin inherits every hook, so a wrong event, arity or result is an error there. At
    # run time it inherits none: what it does not implement is never called.
    from gpt_simple.hooks.specs import HookSpecs as Hooks
else:
    Hooks = object

Ranks = Literal["main", "all"]
OnError = Literal["abort", "disable"]


@frozen
class NoConfig:
    """The configuration of a plugin that has nothing to configure."""


C = TypeVar("C")


class Plugin(Generic[C], Hooks):
    """A plugin: a config class, a few declarations, and methods marked with ``@hookimpl``.

    A custom logger in full::

        from attrs import frozen
        from gpt_simple import Plugin, hookimpl

        @frozen
        class CsvLogConfig:
            path: str = "loss.csv"

        class CsvLog(Plugin[CsvLogConfig]):
            Config = CsvLogConfig

            @hookimpl
            def on_metrics(self, run, event):
                with open(run.output_dir / self.config.path, "a") as f:
                    f.write(f"{event.step},{event.metrics['train/loss']}\\n")

    Its name is the name of its entry point: that is also its config table and the key of its state.
    """

    Config: ClassVar[type] = NoConfig
    """Frozen attrs class with a default for every field; ``[plugins.NAME]`` is structured into it."""

    ranks: ClassVar[Ranks] = "main"
    """Where hooks whose ranks are the plugin's choice run: on the main process, or on all of them."""

    on_error: ClassVar[OnError | None] = None
    """What an exception in a hook does: end the run, or switch the plugin off with one warning.

    Unset: ``disable`` for plugins on the main process, ``abort`` for plugins on all of them.
    """

    before: ClassVar[tuple[str, ...]] = ()
    """Names of plugins that are called after this one."""

    after: ClassVar[tuple[str, ...]] = ()
    """Names of plugins that are called before this one."""

    state_version: ClassVar[int] = 1
    """Stored with the state and handed back to ``load_state_dict``."""

    state_required: ClassVar[bool] = False
    """A checkpoint with this plugin's state is refused when the plugin is missing at resume."""

    aliases: ClassVar[tuple[str, ...]] = ()
    """Names that this plugin had before: state stored under one of them is its own."""

    def __init__(self, config: C) -> None:
        self.config = config

    def state_dict(self) -> dict[str, Any]:
        """What the plugin needs at resume: JSON values and tensors. Taken on the main process."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any], version: int) -> None:
        """Take back what ``state_dict`` returned, on every process where the plugin runs."""

    def describe(self) -> dict[str, Any]:
        """Facts for the end-of-run summary and summary.json, JSON values under names for people.

        Anything else counts as the plugin's failure.
        """
        return {}
