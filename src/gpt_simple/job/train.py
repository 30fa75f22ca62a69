"""One launch from start to end: join, check, claim, build, train, and leave everything as it was found."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from gpt_simple._names import __version__
from gpt_simple.checkpoint.store import Store
from gpt_simple.config.schema import TrainingConfig
from gpt_simple.distributed.process_group import World
from gpt_simple.engine.compile import compile_flags, plan
from gpt_simple.engine.precision import resolve
from gpt_simple.engine.process_state import TORCH_STATE, process_as_found
from gpt_simple.engine.resume import ResumePlan, flat, look
from gpt_simple.engine.time_budget import Outside, StopNow, Walltime
from gpt_simple.engine.trainer import Trainer
from gpt_simple.engine.views import EngineRun
from gpt_simple.errors import ExitCode, PluginError
from gpt_simple.hooks.events import Close, RunEnd, RunError, RunStart
from gpt_simple.hooks.preflight import PreflightOptions
from gpt_simple.job.claim import Ownership
from gpt_simple.job.result import TrainResult
from gpt_simple.job.stages import Setup, report
from gpt_simple.job.summary import as_result, finished, stopped_early, summarise
from gpt_simple.launch.member import owns_run
from gpt_simple.launch.signals import stop_on_signals
from gpt_simple.plugin_host.dispatch import Calls
from gpt_simple.plugin_host.loading import LoadedPlugin
from gpt_simple.preflight.preflight import RunPreflight
from gpt_simple.run_dir.layout import RunDir, write_json
from gpt_simple.spec import Assembly


@contextmanager
def closing_plugins(run: EngineRun, calls: Calls) -> Iterator[None]:
    """``on_run_error`` if the run fails, and ``on_close`` however it ends."""
    failures: list[PluginError] = []
    ok = False
    try:
        yield
        ok = True
    except BaseException as error:
        if calls.on_run_error is not None:
            failures += calls.on_run_error(run, RunError(error, run.step))
        raise
    finally:
        if calls.on_close is not None:
            failures += calls.on_close(run, Close(ok))
        for failure in failures:
            # The sinks are closed: nobody else could say it. Nor can we if the terminal is gone.
            with suppress(OSError):
                print(f"warning: {failure}", file=sys.stderr)


def train(
    assembly: Assembly, *, force: bool = False, asked: Sequence[str] = (), began: float | None = None
) -> TrainResult:
    """Train as configured. Errors leave as GptSimpleError; how a run ended is in the result's ``status``.

    ``asked``: names of signals that came while the program was loading, which ``began`` at this moment of
    ``time.monotonic`` (None: now).
    """
    started = time.monotonic() if began is None else began
    config, training = assembly.config, assembly.config.training
    with ExitStack() as stack:
        stack.enter_context(process_as_found())
        world = World.join(training.peer_timeout_seconds)
        stack.callback(world.leave)
        world.compare(lambda: _launched(assembly), "start the same command with the same packages everywhere")
        places = assembly.origins
        precision = world.together(
            lambda: resolve(training.mixed_precision, world.device, places.place("training.mixed_precision"))
        )
        compiling = world.together(
            lambda: plan(
                training,
                world.device,
                world.size,
                wished=not places.is_default("training.compile"),
                place=places.place("training.compile"),
                backend_place=places.place("training.compile_backend"),
            )
        )
        stack.enter_context(compile_flags(compiling))
        run_dir = RunDir(Path(training.output_dir))
        run = EngineRun(config, run_dir.root, world, precision)
        stack.enter_context(world.telling_peers(lambda: run.step))
        stack.enter_context(stop_on_signals(run.control.signalled, lambda: run.control.parting()))
        for name in asked:
            run.control.stop(name)
        walltime = world.together(lambda: _walltime(training, started))

        def plugin_failed(plugin: LoadedPlugin, hook: str, error: PluginError) -> None:
            run.log.warning(f"{error}; it is switched off", name="plugin_failed", plugin=plugin.name, hook=hook)
            run.control.switch_off(plugin.name)

        run.control.plugins = assembly.host.names
        assembly.host.guard = TORCH_STATE
        calls = run.calls = assembly.host.calls(world.is_main, plugin_failed, world_size=world.size)
        stack.enter_context(closing_plugins(run, calls))
        for note in (*assembly.notes, *assembly.host.notes, *filter(None, [compiling.warning])):
            run.log.warning(note)
        if compiling.note:
            run.log.info(compiling.note, name="ddp_optimizer")
        options = PreflightOptions(launching=True, force=force, world_size=world.size)
        world.main_only(lambda: report(assembly.check_config(RunPreflight(assembly, options)), run.log.warning))

        # One store for the whole launch: what it has verified once it need not hash again.
        store = Store(run_dir.checkpoints)
        setup = Setup(assembly, run, calls, compiling, run_dir, store)
        owner = Ownership(setup)
        stack.callback(owner.release)
        run.control.outside, run.control.parting = Outside(walltime, owner.asked_to_stop), owner.forced
        world.together(run_dir.check)
        resume = world.together(lambda: look(config, run_dir, force=force, store=store))
        try:
            with _leaving_at_once(run):
                setup.read_data()
            world.compare(lambda: _found(setup, resume), "all of them must reach the same files")
            world.together(lambda: setup.check(resume, walltime, options))
            if resume.kind == "finished":
                return finished(run, run_dir, resume)
            _leave_if_asked(run)
            world.main_only(lambda: owner.claim(resume, force=force))
            return _own(stack, setup, owner, resume, walltime, started)
        except StopNow as stop:
            return stopped_early(run, store, resume, str(stop), time.monotonic() - started)


def _own(
    stack: ExitStack, setup: Setup, owner: Ownership, resume: ResumePlan, walltime: Walltime | None, started: float
) -> TrainResult:
    """Build and train, as the owner of the run directory, and leave a status that tells how it ended."""
    run, world, training = setup.run, setup.run.world, setup.run.config.training
    status, begun = owner.status, resume.state.get("step", 0)
    try:
        status.update(state="running", step=begun, max_steps=training.max_steps, force=True)
        with world.telling_peers(lambda: run.step), _leaving_at_once(run):
            trainer = setup.build(resume, owner, walltime=walltime)
            stack.callback(trainer.close)
            run.run_id = world.main_only(lambda: owner.record(resume))
            owns_run()
            return _train(trainer, setup, resume, setup.calls, started)
    except BaseException as error:
        step = max(begun, run.step)
        if isinstance(error, StopNow):
            status.update(state="stopped", step=step, reason=str(error), force=True)
        else:
            state = "halted" if getattr(error, "exit_code", None) == ExitCode.HALTED else "failed"
            status.update(state=state, step=step, error=f"{type(error).__name__}: {error}", force=True)
        raise


@contextmanager
def _leaving_at_once(run: EngineRun) -> Iterator[None]:
    """A signal unwinds from here, as no step is made yet; with several processes they agree before it instead."""
    _leave_if_asked(run)
    run.control.at_once = run.world.size == 1
    try:
        yield
    finally:
        run.control.at_once = False


def _leave_if_asked(run: EngineRun) -> None:
    leaving = run.control.is_leaving()
    if run.world.size > 1:
        leaving = bool(run.world.agree([leaving])[0])
    if leaving:
        raise StopNow(run.control.stop_reason or "another process was asked to stop")


def _walltime(training: TrainingConfig, started: float) -> Walltime | None:
    return Walltime.of_launch(training, os.environ, started=started, now=time.monotonic(), clock=time.time())


def _launched(assembly: Assembly) -> dict[str, Any]:
    """What must be the same in every process before any of them looks at a file."""
    plugins = [f"{plugin.name} {plugin.version}" for plugin in assembly.host.plugins]
    versions = {"gpt-simple": __version__, "torch": torch.__version__, "python": platform.python_version()}
    return {**flat(assembly.config), "plugins": plugins, "their code": assembly.host.order_hash(), **versions}


def _found(setup: Setup, resume: ResumePlan) -> dict[str, Any]:
    """What every process must find on disk."""
    return {**setup.identity["data"], "checkpoint": resume.checkpoint.path.name if resume.checkpoint else None}


def _train(trainer: Trainer, setup: Setup, resume: ResumePlan, calls: Calls, started: float) -> TrainResult:
    run = trainer.run
    if calls.on_run_start is not None:
        source = resume.checkpoint.path if resume.checkpoint else None
        calls.on_run_start(
            run,
            RunStart(
                step=run.step,
                max_steps=run.config.training.max_steps,
                tokens=run.tokens,
                resumed_from=source,
                promise=setup.promise,
                best_val_loss=trainer.best_val_loss,
                facts=run.facts(),
            ),
        )
    status, reason = trainer.train()
    summary = summarise(trainer, setup, status, reason, time.monotonic() - started)
    if calls.on_run_end is not None:
        calls.on_run_end(run, RunEnd(status, run.step, run.tokens, reason, summary))
    if run.is_main:
        _write_summary(setup, summary)
    trainer.owner.status.update(state=status, step=run.step, reason=reason, force=True)
    return as_result(summary, run.output_dir)


def _write_summary(setup: Setup, summary: dict[str, Any]) -> None:
    try:
        write_json(setup.run_dir.summary_json, summary)
    except OSError as error:
        # The weights are saved: a disk that is full now is no reason to call the run failed.
        setup.run.log.error(f"{setup.run_dir.summary_json} was not written: {error.strerror}", name="output_failed")
