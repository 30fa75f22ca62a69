"""Calling plugins: one compiled closure per hook, with attribution, timing, result checks and the failure
policy.

pluggy validates and keeps the implementations. Calling through this table costs about half of a pluggy call,
keeps the declared order, and leaves a hook that nobody implements as None, so that its event need not even be
built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Real
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

from attrs import define, field, frozen

from gpt_simple.errors import GptSimpleError, PluginError
from gpt_simple.hooks.results import REDUCTIONS, Finding, Metric
from gpt_simple.hooks.specs import HOOKS, HookInfo
from gpt_simple.plugin_host.loading import FAILURES, LoadedPlugin

if TYPE_CHECKING:
    from gpt_simple.hooks import events
    from gpt_simple.hooks.preflight import Preflight
    from gpt_simple.hooks.run import Run

    Metrics = list[tuple[str, Mapping[str, Metric]]]
    Findings = list[tuple[str, Sequence[Finding]]]

Implementation = Callable[..., Any]
Listener = tuple[Implementation, LoadedPlugin]
OnFailure = Callable[[LoadedPlugin, str, PluginError], None]
T = TypeVar("T")

DISPATCHED = tuple(name for name in HOOKS if name not in ("register_components", "check_config"))
"""Hooks of a running engine; the other two are called by the host itself, before there is one."""


class LeftChanged(Exception):
    """A hook or method returned with another state of the process than it was called with."""


@frozen
class Guard:
    """State that all share, which every plugin must leave as it found it; ``engine/process_state.py`` has torch's.

    ``look(run)`` is that state now, something to compare; ``run`` is None where there is none. ``put_back(run,
    before)`` restores what is another one and says in words what that was; empty if nothing is.
    """

    look: Callable[[Any], Any] = lambda run: None
    put_back: Callable[[Any, Any], str] = lambda run, before: ""

    def call(self, run: Any, work: Callable[[], T]) -> T:
        """``work()``, which raises LeftChanged after restoring what it left changed."""
        before = self.look(run)
        try:
            result = work()
        except BaseException:
            self.put_back(run, before)
            raise  # what went wrong first is what is told
        self.check(run, before)
        return result

    def check(self, run: Any, before: Any) -> None:
        """Raise LeftChanged, after restoring it, if the state is no longer what it was ``before``."""
        if self.look(run) != before and (left := self.put_back(run, before)):
            raise LeftChanged(f"the process was left with {left}: put back what is changed")


@frozen
class Policy:
    """What happens when a hook fails, on this process.

    ``alone``: there is no other process that could be waiting for this one in a collective. ``strict``: every
    failure ends the run.
    """

    on_failure: OnFailure
    alone: bool = True
    strict: bool = False

    def disables(self, plugin: LoadedPlugin, hook: str) -> bool:
        """Whether a failure in this hook or plain method switches the plugin off; otherwise it ends the run.

        A hook that all processes run may meet in a collective: there a process that drops out would leave the
        others waiting, so with several processes the run ends whatever the plugin prefers.
        """
        if self.strict or plugin.on_error == "abort":
            return False
        return self.alone or hook not in HOOKS or HOOKS[hook].ranks != "all"


@define(eq=False)
class Calls:
    """The hooks on this process. An attribute is None when nobody listens, else a callable ``(run, event)``.

    Notifying hooks return None. The others return ``[(plugin, result), ...]`` in call order, with checked
    types. ``on_run_error`` and ``on_close`` call everybody and return what failed, as PluginErrors, instead
    of raising.
    """

    policy: Policy
    guard: Guard = field(factory=Guard)
    _listeners: dict[str, list[tuple[Listener, ...]]] = field(factory=dict)
    check_runtime: Callable[[Run, Preflight], Findings] | None = None
    on_model_built: Callable[[Run, events.ModelBuilt], None] | None = None
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

    def listen(self, hook: str, listeners: Sequence[Listener]) -> None:
        """Compile the call of one hook; listeners come in plugin order."""
        if not listeners:
            return
        info = HOOKS[hook]
        # A cell and not an attribute: a caller may keep the closure, and must still see that a plugin was
        # dropped.
        cell = [tuple(reversed(listeners)) if info.order == "reverse" else tuple(listeners)]
        self._listeners[hook] = cell
        setattr(self, hook, _compile(info, cell, self))

    def disable(self, name: str) -> None:
        """Switch a plugin off in every hook but ``on_close``: what a vote of all processes ends in."""
        for hook in DISPATCHED:
            self._drop(hook, name)

    def fail(self, plugin: LoadedPlugin, hook: str, event: object, error: BaseException) -> None:
        """Apply the policy to a failure: switch the plugin off and go on, or raise what ends the run."""
        failure = plugin.failure(hook, error, getattr(event, "step", None))
        if failure is error:
            raise error  # another plugin's, called from this hook, that was to end the run
        if not self.policy.disables(plugin, hook):
            if isinstance(error, GptSimpleError) and not isinstance(error, PluginError):
                raise error
            raise failure from error
        plugin.failed = True
        for name in DISPATCHED:
            # Where other processes may be waiting the plugin goes on until all of them have agreed
            # (``disable``).
            if self.policy.alone or HOOKS[name].ranks != "all":
                self._drop(name, plugin.name)
        self.policy.on_failure(plugin, hook, failure)

    def _drop(self, hook: str, name: str) -> None:
        cell = self._listeners.get(hook)
        if cell is None or hook == "on_close":
            return
        cell[0] = tuple(listener for listener in cell[0] if listener[1].name != name)
        if not cell[0]:
            setattr(self, hook, None)


def checked(info: HookInfo, result: Any) -> Any:
    """The result of a hook, or a PluginError when it is not what the hook promises."""
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
            f"a mapping of names to Metric, each with a number or a 0-d tensor and one of {', '.join(REDUCTIONS)}"
        )
    elif info.returns == "findings":
        if isinstance(result, (list, tuple)) and all(isinstance(item, Finding) for item in result):
            return result
        expected = "a list of Finding"
    else:
        if result is None:
            return None
        expected = "None, since a hook named on_* only notifies"
    raise PluginError(f"it returned {_describe(result)}; expected {expected}")


def _compile(info: HookInfo, cell: list[tuple[Listener, ...]], calls: Calls) -> Callable[..., Any]:
    if info.order == "reverse":
        return _compile_last_words(info, cell, calls.guard)
    if info.returns == "none":
        return _compile_notification(info, cell, calls)
    return _compile_question(info, cell, calls)


def _compile_notification(info: HookInfo, cell: list[tuple[Listener, ...]], calls: Calls) -> Callable[..., None]:
    hook, guard = info.name, calls.guard
    look = guard.look

    # Called in every step. What one plugin leaves is what the next one finds: the state is asked for once between them.
    def notify(run: Run, event: object) -> None:
        before, start = look(run), perf_counter()
        for implementation, plugin in cell[0]:
            try:
                if (result := implementation(run, event)) is not None:
                    checked(info, result)
                if look(run) != before:
                    guard.check(run, before)
            except BaseException as error:
                guard.put_back(run, before)
                if not isinstance(error, FAILURES):
                    raise
                calls.fail(plugin, hook, event, error)
            # One clock reading serves as the end of this plugin and the start of the next.
            end = perf_counter()
            plugin.seconds += end - start
            plugin.calls += 1
            start = end

    return notify


def _compile_question(
    info: HookInfo, cell: list[tuple[Listener, ...]], calls: Calls
) -> Callable[..., list[tuple[str, Any]]]:
    hook, has_event, guard = info.name, "event" in info.arguments, calls.guard

    def ask(*arguments: Any) -> list[tuple[str, Any]]:
        answers = []
        for implementation, plugin in cell[0]:
            start = perf_counter()
            try:
                answer = guard.call(arguments[0], partial(implementation, *arguments))
                answers.append((plugin.name, checked(info, answer)))
            except FAILURES as error:
                calls.fail(plugin, hook, arguments[-1] if has_event else None, error)
            plugin.seconds += perf_counter() - start
            plugin.calls += 1
        return answers

    return ask


def _compile_last_words(
    info: HookInfo, cell: list[tuple[Listener, ...]], guard: Guard
) -> Callable[..., list[PluginError]]:
    def call_everybody(run: Run, event: object) -> list[PluginError]:
        failures: list[PluginError] = []
        for implementation, plugin in cell[0]:
            start = perf_counter()
            try:
                checked(info, guard.call(run, partial(implementation, run, event)))
            except FAILURES as error:
                failures.append(plugin.failure(info.name, error, getattr(event, "step", None)))
            plugin.seconds += perf_counter() - start
            plugin.calls += 1
        if info.name == "on_close":
            cell[0] = ()
        return failures

    return call_everybody


def _is_number(value: object) -> bool:
    """A number, or a tensor with one; told by its attributes, because torch is not imported here."""
    if isinstance(value, Real):
        return True
    return getattr(value, "ndim", None) == 0 and hasattr(value, "detach") and not getattr(value, "is_meta", False)


def _describe(result: object) -> str:
    if isinstance(result, (Mapping, list, tuple)):
        return f"a {type(result).__name__} with other things in it"
    return f"a {type(result).__name__}"
