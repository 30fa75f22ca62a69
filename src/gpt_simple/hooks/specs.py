"""All hooks: when each is called, on which processes, and how its result is used.

This file is the contract with plugin authors and the only list of hooks: the host, the lint, the documentation and the
type checker read it. A hook named ``on_*`` notifies and returns nothing; any other name is a verb whose result is used.
An implementation takes any of its hook's arguments by their names, so that a hook can get another one later. ``HOOKS``
has the same facts as data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from attrs import frozen
from pluggy import HookimplMarker, HookspecMarker

if TYPE_CHECKING:
    from gpt_simple.config.schema import Config
    from gpt_simple.hooks import events
    from gpt_simple.hooks.components import Registry
    from gpt_simple.hooks.preflight import Preflight
    from gpt_simple.hooks.results import Finding, Metric
    from gpt_simple.hooks.run import Run

PROJECT = "gpt_simple"

hookimpl = HookimplMarker(PROJECT)
"""Marks a method of a plugin as its implementation of the hook of the same name."""

hookspec = HookspecMarker(PROJECT)

HookRanks = Literal["all", "main", "plugin"]
Returns = Literal["none", "metrics", "findings"]
Order = Literal["forward", "reverse"]
F = TypeVar("F", bound=Callable[..., Any])


@frozen
class HookInfo:
    """The facts of one hook.

    ``ranks``: ``all`` processes, the ``main`` one, or those that the ``plugin`` declares. ``event_name`` is None
    if the hook does not take ``(run, event)``. ``arguments`` are the names that an implementation may take after
    ``self``. ``hot``: it is called in every step, where reading a tensor would make the host wait for the device.
    """

    name: str
    event_name: str | None
    arguments: tuple[str, ...]
    ranks: HookRanks
    returns: Returns
    order: Order
    hot: bool = False

    @property
    def event(self) -> type | None:
        """The class of the event. Imported here, because the commands about plugins do not need events."""
        if self.event_name is None:
            return None
        from gpt_simple.hooks import events

        found: type = getattr(events, self.event_name)
        return found

    @property
    def together(self) -> bool:
        """Whether every process runs it at once, so that ``run.comm`` may be used in it. The checks run alone."""
        return self.ranks == "all" and self.event_name is not None


HOOKS: dict[str, HookInfo] = {}
"""The catalogue, in the order in which a run first calls each hook."""


def _hook(
    *, ranks: HookRanks = "plugin", returns: Returns = "none", order: Order = "forward", hot: bool = False
) -> Callable[[F], F]:
    """Put a hook into the catalogue; its arguments and its event are read from its signature."""

    def mark(function: F) -> F:
        name, annotations = function.__name__, function.__annotations__
        arguments = tuple(argument for argument in annotations if argument != "return")
        event = annotations["event"].removeprefix("events.") if "event" in annotations else None
        HOOKS[name] = HookInfo(name, event, arguments, ranks, returns, order, hot)
        return hookspec(function)

    return mark


class HookSpecs:
    """The hooks, of which a plugin implements any subset. ``Plugin`` has these signatures for the type checker."""

    @classmethod
    @_hook(ranks="all")
    def register_components(cls, registry: Registry) -> None:
        """Add named parts, such as a model, an optimizer or a loss, that a configuration can choose.

        Called right after the plugin is imported and before its configuration exists, so it is a class method. Give the
        part as ``module:attribute``: it is imported when it is used, and the hook itself imports nothing slow::

            @classmethod
            @hookimpl
            def register_components(cls, registry):
                registry.add("optimizer", "lion", "lion_plugin.lion:build", config=LionConfig)
        """

    @_hook(ranks="main", returns="findings")
    def check_config(self, config: Config, preflight: Preflight) -> Sequence[Finding]:
        """Check the configuration, in ``gpt-simple validate`` and before every run. No device is used yet.

        ``preflight`` has the facts of the run beyond its configuration: data, checkpoints, output, this machine. Return
        findings; one of severity ``error`` stops the run before anything is created::

            @hookimpl
            def check_config(self, config, preflight):
                if preflight.is_default("training.max_steps"):
                    return []
                if config.training.max_steps < self.config.every:
                    return [Finding("warning", "never-due", "every is larger than training.max_steps")]
                return []
        """
        return ()

    @_hook(ranks="all", returns="findings")
    def check_runtime(self, run: Run, preflight: Preflight) -> Sequence[Finding]:
        """Check the devices and the model, which is on the meta device: it has shapes and allocates nothing.

        The data of ``preflight`` are prepared. Return findings, as for ``check_config``::

            @hookimpl
            def check_runtime(self, run):
                if run.device.type == "cpu":
                    return [Finding("warning", "slow", "this plugin expects an accelerator")]
                return []
        """
        return ()

    @_hook(ranks="all")
    def on_model_built(self, run: Run, event: events.ModelBuilt) -> None:
        """The raw module is on its device; restoring, checkpointing, compilation and wrapping come next.

        Change its structure in place here, in the same way on every process. ``event.step`` is the step that a run
        resumes from: repeat a change of the structure that was made before it with ``run.control.rebuild_optimizer``.
        Values are not final: a resumed run restores them afterwards, and a model that is sharded over processes is on
        the meta device here and gets them later. What a hook adds with values keeps those of the main process. They are
        there from ``on_run_start`` on::

            @hookimpl
            def on_model_built(self, run, event):
                event.model.token_embedding.weight.requires_grad_(False)
        """

    @_hook(ranks="all")
    def on_optimizer_built(self, run: Run, event: events.OptimizerBuilt) -> None:
        """The optimizer is built for the model's trained parameters; its state is not yet restored.

        Called again whenever it is built again, for ``run.control.rebuild_optimizer``.
        Change the options of its groups here, in the same way on every process. ``lr_scale`` (1.0 where it is missing)
        multiplies the schedule's rate of a group. What is set here is set again at a resume, and is not saved; an
        option that changes later is state, which a checkpoint keeps::

            @hookimpl
            def on_optimizer_built(self, run, event):
                for group in event.optimizer.param_groups:
                    if group["weight_decay"] == 0.0:
                        group["lr_scale"] = 0.5
        """

    @_hook()
    def on_checkpoint_loaded(self, run: Run, event: events.CheckpointLoaded) -> None:
        """All state, including this plugin's, is restored from a checkpoint. Called only in a run that resumes.

        Example::

            @hookimpl
            def on_checkpoint_loaded(self, run, event):
                run.log.info(f"continuing from {event.path.name}")
        """

    @_hook()
    def on_run_start(self, run: Run, event: events.RunStart) -> None:
        """Everything is prepared and restored; step ``event.step + 1`` comes next.

        Example::

            @hookimpl
            def on_run_start(self, run, event):
                self.file = open(run.output_dir / self.config.path, "a")
        """

    @_hook(hot=True)
    def on_step_start(self, run: Run, event: events.StepStart) -> None:
        """An optimizer step comes next.

        Example::

            @hookimpl
            def on_step_start(self, run, event):
                self.started = time.perf_counter()
        """

    @_hook(hot=True)
    def on_batch(self, run: Run, event: events.BatchReady) -> None:
        """A micro-batch is on the device, before its forward pass. Called many times in a step.

        The batch is a copy that the listening plugins share: an edit does not reach training, and is a failure of the
        plugin. In the step ``standard`` ``p.grad`` has the sum over the earlier micro-batches of this process, not yet
        reduced over processes: the gradient of their summed loss, times ``world_size`` and divided by the target tokens
        of the whole step. In fp16 it is scaled. Read it only. Never read a tensor on the host here, because ``.item()``
        waits for the device::

            @hookimpl
            def on_batch(self, run, event):
                self.rows += event.batch.input_ids.shape[0]
        """

    @_hook(ranks="all", hot=True)
    def on_gradients(self, run: Run, event: events.GradientsReady) -> None:
        """Gradients are reduced over processes and unscaled; clipping and the optimizer come next.

        ``p.grad`` may be changed, in the same way on every process. ``event.grad_norm`` is the norm before the edits of
        all plugins. It is computed in the first read, or before the first plugin if the code of a later one has this
        name. A read after an edit that comes before all that is a failure. A flag on the device can skip the step; the
        log names the plugins that asked for it::

            @hookimpl
            def on_gradients(self, run, event):
                run.control.skip_step(event.grad_norm > self.config.limit)
        """

    @_hook(hot=True)
    def on_step_end(self, run: Run, event: events.StepEnd) -> None:
        """The step is finished and its position in the data is committed. Requests made here are decided on next.

        Add up the tensors of the event on the device and read them in ``on_metrics`` or ``collect_metrics``::

            @hookimpl
            def on_step_end(self, run, event):
                self.skipped += event.skipped
                if event.tokens >= self.config.token_budget:
                    run.control.finish("the token budget is spent")
        """

    @_hook(ranks="all", returns="metrics")
    def collect_metrics(self, run: Run, event: events.CollectMetrics) -> Mapping[str, Metric]:
        """Contribute to the log, every ``training.logging_steps``.

        All values are reduced in one collective, each over the processes that return its name. If several plugins
        return a name, the first keeps it (the engine, then built-in plugins, then the others in call order) and the
        others become ``name@plugin``. Values may stay 0-d tensors on the device::

            @hookimpl
            def collect_metrics(self, run, event):
                return {"data/rows_per_step": Metric(self.rows / event.steps, reduce="sum")}
        """
        return {}

    @_hook(ranks="main")
    def on_metrics(self, run: Run, event: events.MetricsReady) -> None:
        """The metrics of a logging boundary are ready as plain floats, for a logger to write.

        Example::

            @hookimpl
            def on_metrics(self, run, event):
                print(event.step, event.metrics["train/loss"])
        """

    @_hook(ranks="all")
    def on_checkpoint_saving(self, run: Run, event: events.CheckpointSaving) -> None:
        """A checkpoint of this step comes next; ``state_dict`` is called after this hook.

        Example::

            @hookimpl
            def on_checkpoint_saving(self, run, event):
                self.pending.flush()
        """

    @_hook()
    def on_checkpoint_saved(self, run: Run, event: events.CheckpointSaved) -> None:
        """The checkpoint is durable: it survives a crash from here on.

        Example::

            @hookimpl
            def on_checkpoint_saved(self, run, event):
                self.uploads.put(event.path)
        """

    @_hook(ranks="all", returns="metrics")
    def evaluate(self, run: Run, event: events.Evaluate) -> Mapping[str, Metric]:
        """Contribute to an evaluation, which is due or was requested.

        The engine has set eval mode, no_grad, autocast and a separate RNG. Names are shared as in ``collect_metrics``.
        Collectives (``run.comm``) are allowed if all processes take part::

            @hookimpl
            def evaluate(self, run, event):
                nats = tokens = 0
                for batch in run.val_batches(max_batches=10):
                    nats, tokens = nats + run.loss(batch), tokens + batch.targets
                return {"eval/short_loss": Metric(nats / tokens, weight=tokens)}
        """
        return {}

    @_hook()
    def on_eval_end(self, run: Run, event: events.EvalEnd) -> None:
        """The metrics of an evaluation are ready as plain floats.

        A request to finish takes effect right after this hook. Any other request holds for the end of the next step.
        With ``training.save_after_eval`` it holds for this one. Then the checkpoint of the step comes after this hook
        and has the state that the plugin decides on here::

            @hookimpl
            def on_eval_end(self, run, event):
                self.best = min(self.best, event.metrics["eval/loss"])
        """

    @_hook(ranks="main")
    def on_log(self, run: Run, event: events.LogRecord) -> None:
        """A line for the log: a warning, a resume, a plugin that was switched off.

        Example::

            @hookimpl
            def on_log(self, run, event):
                self.file.write(f"{event.level} step {event.step}: {event.message}\\n")
        """

    @_hook()
    def on_run_end(self, run: Run, event: events.RunEnd) -> None:
        """The run has ended without an error: completed, stopped (resumable) or halted (a person must act).

        Example::

            @hookimpl
            def on_run_end(self, run, event):
                notify(f"{event.status} after {event.tokens:,} tokens")
        """

    @_hook(order="reverse")
    def on_run_error(self, run: Run, event: events.RunError) -> None:
        """The run ends with an exception. Use no collectives: other processes may have ended.

        Example::

            @hookimpl
            def on_run_error(self, run, event):
                notify(f"failed at step {event.step}: {event.error}")
        """

    @_hook(order="reverse")
    def on_close(self, run: Run, event: events.Close) -> None:
        """Release what the plugin holds. Always called once. Use no collectives.

        Example::

            @hookimpl
            def on_close(self, run, event):
                self.file.close()
        """
