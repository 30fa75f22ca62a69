"""Calling plugins: one caller per hook, with attribution, timing, result checks and the failure policy.

pluggy keeps and validates the implementations; this module calls them. A call costs about half of pluggy's and follows
the declared order. A hook without implementations is None, so that its event is not built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from numbers import Real
from time import perf_counter
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from attrs import define, field, frozen

from gpt_simple.errors import ConfigError, GptSimpleError, PluginError
from gpt_simple.hooks.results import REDUCTIONS, SEVERITIES, Finding, Metric
from gpt_simple.hooks.specs import HOOKS, HookInfo
from gpt_simple.machine_failures import is_device_lost
from gpt_simple.plugin_host.loading import LoadedPlugin

if TYPE_CHECKING:
    from gpt_simple.hooks import events
    from gpt_simple.hooks.preflight import Preflight
    from gpt_simple.hooks.run import Run

    Metrics = list[tuple[str, Mapping[str, Metric]]]
    Findings = list[tuple[str, Sequence[Finding]]]

Implementation = Callable[..., Any]
Impl = tuple[Implementation, LoadedPlugin]
Around = Callable[[str, Implementation], Implementation]
"""Makes an implementation from a plugin's name and its own implementation."""
OnFailure = Callable[[LoadedPlugin, str, PluginError], None]
T = TypeVar("T")

DISPATCHED = tuple(name for name in HOOKS if name not in ("register_components", "check_config"))
"""The hooks that the engine calls. The host calls the other two itself, before there is an engine."""


class LeftChanged(Exception):
    """A hook or method returned with the state of the process changed."""


@frozen
class Copies:
    """How plugins get a copy of what an event holds, so that they cannot change what the engine goes on with.

    ``make(event)`` returns the event with copies; ``edited(event)`` is what a plugin has edited of them, or empty.
    """

    make: Callable[[Any], Any]
    edited: Callable[[Any], str]


@define(eq=False)
class Watch:
    """Finds weights of the model that a plugin has changed by hand; ``engine/weights.py`` has one that does.

    ``caller`` is the plugin that is called now. ``holders`` are those that got the model: only they are watched.
    """

    caller: LoadedPlugin | None = field(default=None, init=False)
    holders: set[LoadedPlugin] = field(factory=set, init=False)

    def mark(self) -> None:
        """A holder is called next: keep what shows a change of the weights, once for each step."""

    def changed(self) -> bool:
        """Whether the weights are others than when this step was marked."""
        return False


@frozen
class Guard:
    """State of the process that every plugin must leave unchanged; ``engine/process_state.py`` has torch's.

    ``state(run)`` returns the current state, to be compared; ``run`` is None in a plain method.
    ``restore(run, before)`` restores the state and returns a description of what was changed, empty if nothing was.
    ``copies``: of the events of some hooks. ``watch``: over the weights of the model.
    """

    copies: Mapping[str, Copies] = field(factory=dict, kw_only=True)
    watch: Watch = field(factory=Watch, kw_only=True)

    state: Callable[[Any], Any] = lambda run: None
    restore: Callable[[Any, Any], str] = lambda run, before: ""

    def call(self, work: Callable[[], T]) -> T:
        """Return ``work()``. Raises LeftChanged if that changed the state; the state is restored in any case."""
        before = self.state(None)
        try:
            result = work()
            if self.state(None) != before:
                self.refuse(None, before)
        except BaseException:
            self.restore(None, before)
            raise
        return result

    def refuse(self, run: Any, before: Any) -> NoReturn:
        """Restore the state and raise LeftChanged, which says what was changed."""
        raise LeftChanged(f"the process was left with {self.restore(run, before)}: put back what is changed")


@define(eq=False)
class HookCaller:
    """One hook on this process: calls its implementations in order and charges each with its time and its failures.

    Dropping a plugin replaces ``impls``, so a kept ``call`` no longer reaches that plugin.
    """

    info: HookInfo
    impls: tuple[Impl, ...]
    guard: Guard
    fail: Callable[[LoadedPlugin, str, object, BaseException], PluginError]
    returns_results: bool = field(init=False)
    ends_run: bool = field(init=False)
    copies: Copies | None = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.returns_results = self.info.returns != "none"
        self.ends_run = self.info.order == "reverse"
        self.copies = self.guard.copies.get(self.info.name)

    def call(self, run: Any, event: Any) -> Any:
        """``[(plugin, result), ...]`` with checked types; the failures if the hook ends a run; else None.

        Called in every step. The state and the time after one plugin are those before the next, so each is read once.
        """
        state, copies, watch = self.guard.state, self.copies, self.guard.watch
        given = event if copies is None else copies.make(event)
        outcomes: list[Any] = []
        before, start = state(run), perf_counter()
        outer, holders = watch.caller, watch.holders
        for implementation, plugin in self.impls:
            watch.caller = plugin
            try:
                if holders and plugin in holders:
                    watch.mark()
                result = implementation(run, given)
                if state(run) != before:
                    self.guard.refuse(run, before)
                if copies is not None and (edited := copies.edited(given)):
                    raise LeftChanged(f"it edited {edited}, which is a copy: training does not see the change")
                if result is not None or self.returns_results:
                    outcomes.append((plugin.name, checked(self.info, result)))
            except BaseException as error:
                self.guard.restore(run, before)
                failure = self.fail(plugin, self.info.name, event, error)
                if copies is not None:
                    given = copies.make(event)  # the next plugin must not see an edit
                if self.ends_run:
                    outcomes.append(failure)
            end = perf_counter()
            plugin.seconds += end - start
            start = end
        watch.caller = outer
        if self.ends_run:
            self.impls = ()  # called once only
            return outcomes
        return outcomes if self.returns_results else None


@define(eq=False)
class Calls:
    """The hooks on this process. An attribute is None if no plugin listens, else a callable ``(run, event)``.

    Notifying hooks return None. The others return ``[(plugin, result), ...]`` in call order, with checked types.
    ``on_run_error`` and ``on_close`` call every plugin and return the failures as PluginErrors.

    ``on_failure`` is called for each plugin that is switched off. ``alone``: there is one process, so no other can wait
    for this one in a collective. ``strict``: every failure ends the run.
    """

    on_failure: OnFailure
    alone: bool = True
    strict: bool = False
    guard: Guard = field(factory=Guard)
    switched_off: set[str] = field(factory=set)
    """The plugins that are no longer called on this process."""
    _callers: dict[str, HookCaller] = field(factory=dict)
    check_runtime: Callable[[Run, Preflight], Findings] | None = None
    on_model_built: Callable[[Run, events.ModelBuilt], None] | None = None
    on_optimizer_built: Callable[[Run, events.OptimizerBuilt], None] | None = None
    on_checkpoint_loaded: Callable[[Run, events.CheckpointLoaded], None] | None = None
    on_run_start: Callable[[Run, events.RunStart], None] | None = None
    on_step_start: Callable[[Run, events.StepStart], None] | None = None
    on_batch: Callable[[Run, events.BatchReady], None] | None = None
    on_gradients: Callable[[Run, events.GradientsReady], None] | None = None
    on_step_end: Callable[[Run, events.StepEnd], None] | None = None
    collect_metrics: Callable[[Run, events.CollectMetrics], Metrics] | None = None
    on_metrics: Callable[[Run, events.MetricsReady], None] | None = None
    on_checkpoint_saving: Callable[[Run, events.CheckpointSaving], None] | None = None
    on_checkpoint_saved: Callable[[Run, events.CheckpointSaved], None] | None = None
    evaluate: Callable[[Run, events.Evaluate], Metrics] | None = None
    on_eval_end: Callable[[Run, events.EvalEnd], None] | None = None
    on_log: Callable[[Run, events.LogRecord], None] | None = None
    on_run_end: Callable[[Run, events.RunEnd], None] | None = None
    on_run_error: Callable[[Run, events.RunError], list[PluginError]] | None = None
    on_close: Callable[[Run, events.Close], list[PluginError]] | None = None

    def listen(self, hook: str, impls: Sequence[Impl]) -> None:
        """Make the caller of one hook; ``impls`` are in plugin order."""
        info = HOOKS[hook]
        ordered = tuple(reversed(impls)) if info.order == "reverse" else tuple(impls)
        self._callers[hook] = HookCaller(info, ordered, self.guard, self.fail)
        if hook == "on_model_built":
            self.guard.watch.holders.update(plugin for _, plugin in impls)
        self._publish(hook)

    def plugins(self, hook: str) -> tuple[LoadedPlugin, ...]:
        """The plugins whose implementation of this hook is called on this process, in call order."""
        return tuple(plugin for _, plugin in self._callers[hook].impls) if hook in self._callers else ()

    def disable(self, name: str) -> None:
        """Switch a plugin off in every hook but ``on_close``, once all processes have agreed to that."""
        self.switched_off.add(name)
        for hook in self._callers:
            self._drop(hook, name)

    def close(self) -> None:
        """Call no plugin any more. The objects here refer to each other, and would keep what the plugins hold."""
        self.on_failure = lambda *_: None
        for hook, caller in self._callers.items():
            caller.impls = ()
            self._publish(hook)
        self._callers.clear()

    def fail(self, plugin: LoadedPlugin, hook: str, event: object, error: BaseException) -> PluginError:
        """Apply the policy to a failure in a hook or plain method: switch the plugin off or raise."""
        at_end = hook in HOOKS and HOOKS[hook].order == "reverse"
        ends_run = not at_end and (not self._disables(plugin, hook) or is_device_lost(error))
        failure = (plugin.failure if ends_run else plugin.own_failure)(hook, error, getattr(event, "step", None))
        if at_end:
            return failure  # the run ends anyway
        if failure is error:
            raise error  # of another plugin, which this hook called: it already ends the run
        if ends_run:
            # An error of the data or a checkpoint, which the plugin has met, keeps its exit code. The configuration was
            # checked before any hook, so a ConfigError is the plugin's own.
            if isinstance(error, GptSimpleError) and not isinstance(error, (PluginError, ConfigError)):
                raise error
            raise failure from error
        if plugin in self.guard.watch.holders and self.guard.watch.changed():
            raise _with_changed_weights(failure) from error
        plugin.failed = True
        self.switched_off.add(plugin.name)
        for name in self._callers:
            if self._can_drop_out(name):
                self._drop(name, plugin.name)
        self.on_failure(plugin, hook, failure)
        return failure

    def _disables(self, plugin: LoadedPlugin, hook: str) -> bool:
        """Whether a failure in this hook or plain method switches the plugin off; otherwise it ends the run."""
        return not self.strict and plugin.on_error == "disable" and self._can_drop_out(hook)

    def _can_drop_out(self, hook: str) -> bool:
        """Whether this process may skip the plugin alone. In a hook of all processes others may wait in a collective.

        There the plugin stays until all processes have agreed (``disable``), and its failure ends the run.
        """
        return self.alone or hook not in HOOKS or HOOKS[hook].ranks != "all"

    def _drop(self, hook: str, name: str) -> None:
        if hook != "on_close":
            caller = self._callers[hook]
            caller.impls = tuple(impl for impl in caller.impls if impl[1].name != name)
            self._publish(hook)

    def _publish(self, hook: str) -> None:
        caller = self._callers[hook]
        setattr(self, hook, caller.call if caller.impls else None)


def _with_changed_weights(failure: PluginError) -> PluginError:
    note = "the model's weights are changed and nobody can put them back, so the run ends; its last checkpoint stays"
    hint = "change weights with run.weights, which puts them back"
    return failure.replace_problems(p._replace(message=f"{p.message}; {note}", hint=hint) for p in failure.problems)


def checked(info: HookInfo, result: Any) -> Any:
    """The result of a hook. Raises PluginError if it is not of the type that the hook returns."""
    if info.returns == "metrics":
        if isinstance(result, Mapping) and all(
            isinstance(name, str)
            and isinstance(metric, Metric)
            and _is_number(metric.value)
            and _is_number(metric.weight)
            and metric.reduce in REDUCTIONS
            for name, metric in result.items()
        ):
            return result
        expected = (
            "a mapping of names to Metric, each with a number that a float can hold or a dense, real 0-d tensor, and "
            f"one of {', '.join(REDUCTIONS)}"
        )
    elif info.returns == "findings":
        if isinstance(result, (list, tuple)) and all(map(_is_finding, result)):
            return result
        expected = f"a list of Finding, each with text, one of {', '.join(SEVERITIES)} and an exit code from 1 to 255"
    else:
        if result is None:
            return None
        expected = "None, since a hook named on_* only notifies"
    raise PluginError(f"it returned {_describe(result)}; expected {expected}")


def _is_finding(item: object) -> bool:
    if not isinstance(item, Finding):
        return False
    texts = (item.code, item.message, item.place, item.hint)
    return (
        item.severity in SEVERITIES
        and all(isinstance(text, str) for text in texts)
        and isinstance(item.exit_code, int)
        and 0 < item.exit_code < 256
    )


def _is_number(value: Any) -> bool:
    """A number that a float can hold or a 0-d tensor of one."""
    if isinstance(value, Real):
        with suppress(OverflowError):
            float(value)
            return True
    return getattr(value, "ndim", None) == 0 and is_dense(value) and not value.is_complex()


def is_dense(value: Any) -> bool:
    """Whether ``value`` is a tensor with values of its own, one after another in memory.

    Recognised by its attributes, because this package does not import torch.
    """
    if not hasattr(value, "untyped_storage"):
        return False
    is_strided = str(value.layout) == "torch.strided" and not value.is_nested
    return is_strided and not (value.is_meta or value.is_quantized)


def _describe(result: object) -> str:
    if isinstance(result, (Mapping, list, tuple)):
        return f"a {type(result).__name__} with other things in it"
    return f"a {type(result).__name__}"
