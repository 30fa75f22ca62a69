"""The base class of every plugin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

from attrs import frozen

if TYPE_CHECKING:
    import torch

    # For a type checker a plugin inherits every hook, so that it reports a wrong event, arity or result. At run time a
    # plugin inherits none, because a hook that it does not implement is never called.
    from gpt_simple.hooks.specs import HookSpecs as Hooks
else:
    Hooks = object

LIVE = "live"
"""The model's own weights, where sets of weights are named."""

EVAL = "eval"
"""The weights of a checkpoint that an optimizer with ``eval()`` evaluates with. No plugin's set has this name."""

Ranks = Literal["main", "all"]
OnError = Literal["abort", "disable"]


@frozen
class NoConfig:
    """The configuration of a plugin without options."""


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

    A plugin's name is that of its entry point, and also that of its config table and the key of its state.
    """

    Config: ClassVar[type] = NoConfig
    """Frozen attrs class with a default for every field; ``[plugins.NAME]`` is structured into it."""

    ranks: ClassVar[Ranks] = "main"
    """The processes of the hooks whose ranks are the plugin's choice: the main one, or all."""

    on_error: ClassVar[OnError | None] = None
    """What an exception in a hook does: ``abort`` the run, or ``disable`` the plugin with one warning.

    Unset: ``disable`` for plugins on the main process, ``abort`` for plugins on all processes.
    """

    before: ClassVar[tuple[str, ...]] = ()
    """Names of plugins that are called after this one."""

    after: ClassVar[tuple[str, ...]] = ()
    """Names of plugins that are called before this one."""

    requires: ClassVar[tuple[str, ...]] = ()
    """Names of plugins without which this one does not work. They are called before it.

    A run without one of them is refused before it starts. Requiring a plugin does not activate it.
    """

    uses: ClassVar[tuple[str, ...]] = ()
    """Names of plugins that this one uses where they are active. They are called before it."""

    state_version: ClassVar[int] = 1
    """Stored with the state and handed back to ``load_state_dict``."""

    state_required: ClassVar[bool] = False
    """A checkpoint with this plugin's state is refused when the plugin is missing at resume."""

    aliases: ClassVar[tuple[str, ...]] = ()
    """Former names of this plugin: it also gets the state stored under one of them."""

    def __init__(self, config: C) -> None:
        self.config = config

    def state_dict(self) -> dict[str, Any]:
        """The state that a resume needs: JSON values and tensors. Called on the main process."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any], version: int) -> None:
        """Restore what ``state_dict`` returned. Called on every process where the plugin runs.

        A tensor that was on a GPU is on the device of the run, and every other one in host memory.
        """

    def weight_sets(self) -> Mapping[str, Mapping[str, torch.Tensor]]:
        """Further weights that this plugin keeps, such as a moving average, by the name of each set.

        A set has one tensor for each parameter, of its shape and dtype, under the name in ``model.named_parameters()``.
        A name has lower-case letters, digits, ``_`` and ``-``, begins with a letter and is not ``live``. The sets are
        made in ``on_model_built``, or in ``on_optimizer_built``, which is called again after a change of the model.
        They keep their names. Their values count from ``on_run_start`` on, which sets those of a new set. Each is a
        file of every checkpoint, and a resume restores its tensors in place before ``on_checkpoint_loaded``.
        ``run.weights(name)`` and evaluations use it. Called on every process, so the plugin has ``ranks = "all"``.
        """
        return {}

    def used_weights(self) -> Mapping[str, str | Sequence[str]]:
        """The names of weights that this plugin gives to ``run.weights``, by the option that has them.

        For example ``{"weights": self.config.weights}``. A name that is neither ``live`` nor that of a set ends the
        launch with exit code 2 and the line of the option. This is found when all sets are made, before ``--force``
        discards an earlier run. Called on the main process.
        """
        return {}

    def describe(self) -> dict[str, Any]:
        """Facts for the end-of-run summary and summary.json: a mapping of readable names to JSON values.

        Any other result is a failure of the plugin.
        """
        return {}
