"""The stages of a launch before there is anything to train: each returns a frozen value that the next ones need.

A stage runs on every rank or fails on every rank. Everything that can be refused is refused here, before the run
directory is touched.
"""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from attrs import evolve

from gpt_simple._names import __version__
from gpt_simple.checkpoint.store import Store
from gpt_simple.data.dataset import Dataset
from gpt_simple.data.prepare import prepare
from gpt_simple.distributed.process_group import ProcessGroup
from gpt_simple.distributed.start_up import start_up
from gpt_simple.engine.activation_checkpointing import ActivationCheckpointing
from gpt_simple.engine.compatibility import flatten
from gpt_simple.engine.compile import refuse_uncompilable
from gpt_simple.engine.mirror import Mirror
from gpt_simple.engine.resume import FoundCheckpoint, ResumePlan, load_state, run_fingerprint
from gpt_simple.engine.resume import find_checkpoint as search_checkpoint
from gpt_simple.engine.resume import plan_resume as compare_with_checkpoint
from gpt_simple.engine.stop_signals import StopSignals
from gpt_simple.engine.time_budget import TimeBudget
from gpt_simple.engine.views import EngineCheckpoints, ModelView
from gpt_simple.errors import CheckpointError, ConfigError, DataError, GptSimpleError, PluginError, system_errors
from gpt_simple.hardware import why_no_gpu
from gpt_simple.hooks.preflight import PreflightOptions
from gpt_simple.hooks.results import Finding
from gpt_simple.job.job import Job
from gpt_simple.job.model import (
    checkpoint_activations,
    new_model,
    refuse_shared_documents,
    refuse_unshardable,
    refuse_weights,
)
from gpt_simple.job.runtime import with_checkpointing
from gpt_simple.launch.member import processes
from gpt_simple.preflight.activation_checkpointing import Memory, decide
from gpt_simple.preflight.preflight import RunPreflight
from gpt_simple.run_dir.lock import RunLock
from gpt_simple.spec import RunSpec


@contextmanager
def init_distributed(spec: RunSpec, signals: StopSignals) -> Iterator[ProcessGroup]:
    """Join the other ranks, and raise ConfigError if they were not started with the same configuration.

    Until ``started`` is called on the group, a stop of any rank raises StopNow on all that wait for another.
    """
    timeout = spec.config.training.peer_timeout_seconds
    with start_up(signals, processes(os.environ), timeout) as starting:
        dist = ProcessGroup.join(timeout, starting)
        try:
            dist.assert_same_on_all_ranks(
                lambda: {**_launch_info(spec), "type of device": dist.device.type},
                "start the same command with the same packages everywhere",
            )
            dist.assert_own_gpus()
            if spec.config.training.parallel == "fsdp":
                dist = dist.sharding(spec.config.training.shard_size, timeout)
            yield dist
        finally:
            dist.leave()


def _launch_info(spec: RunSpec) -> dict[str, Any]:
    """What must be the same on every rank before any of them reads a file."""
    plugins = [f"{plugin.name} {plugin.version}" for plugin in spec.host.plugins]
    versions = {"gpt-simple": __version__, "torch": torch.__version__, "python": platform.python_version()}
    return {**flatten(spec.config), "plugins": plugins, "their code": spec.host.order_hash(), **versions}


def check_config(job: Job) -> None:
    """Log the notes of the configuration, and raise the errors that the plugins' ``check_config`` finds."""
    spec, log, compile_plan = job.spec, job.plugins.log, job.runtime.compile_plan
    for note in (*spec.notes, *spec.host.notes, *filter(None, [compile_plan.warning])):
        log.warning(note)
    _note_unused_gpus(job)
    job.dist.on_main(lambda: report(spec.check_config(_preflight_of(job)), log.warning))


def _note_unused_gpus(job: Job) -> None:
    """Log which GPUs of this machine the run leaves out: all, because torch cannot use them, or all but one."""
    device, log = job.dist.device, job.plugins.log
    if device.type == "cpu" and not torch.cuda.is_available():
        why, remedy = why_no_gpu(torch.__version__, torch.version.cuda)
        if why:
            log.warning(f"the run takes the CPU: {why}; {remedy}", name="gpu_unusable")
        elif torch.accelerator.is_available():
            kind = torch.accelerator.current_accelerator()
            log.info(f"the run takes the CPU: devices of type {kind} are untested", name="device_untested")
    elif device.type == "cuda" and job.dist.size == 1 and (count := torch.cuda.device_count()) > 1:
        log.info(f"the run takes one of {count} GPUs: --nproc_per_node auto takes all of them", name="gpus_unused")


def find_checkpoint(job: Job) -> FoundCheckpoint:
    """Find where the run continues. Comes before the data are prepared, which may take hours."""
    # One store for the whole launch, so that a checkpoint is verified once.
    store = Store(job.run_dir.checkpoints)

    def open_mirror() -> Mirror | None:
        with system_errors(CheckpointError):
            job.run_dir.check()
            return _open_mirror(job, store) if job.has_store and job.dist.is_main else None

    def search() -> FoundCheckpoint:
        with system_errors(CheckpointError):
            return search_checkpoint(job.config, store, force=job.force)

    mirror = job.dist.all_or_none(open_mirror)  # the other ranks search what the main one has fetched
    return evolve(job.dist.all_or_none(search), mirror=mirror)


def _open_mirror(job: Job, store: Store) -> Mirror:
    """The run's checkpoints in the store of the configuration, the newest of which is then in the run directory."""
    config, log = job.config, job.plugins.log
    part = job.spec.registry.get("store", config.training.checkpoint_store)
    mirror = Mirror.open(part, config, store, force=job.force)
    if job.force or config.training.resume == "scratch":
        return mirror
    check = partial(load_state, config, store)
    newest, _ = store.newest_valid(check)
    if mirror.newer_than(newest):
        job.run_dir.create()
        with RunLock(job.run_dir, log.info):
            mirror.fetch_newer(newest, job.run_dir, check, log)
    return mirror


def prepare_data(job: Job, found: FoundCheckpoint) -> Dataset:
    """Prepare the data, or load them from the cache: the main rank first. Only the cache is written."""
    job.leave_if_requested()
    with job.signals.interrupting(True):
        dataset = job.dist.main_rank_first(lambda: _prepare(job))
    checkpoint = found.checkpoint.path.name if found.checkpoint else None
    job.dist.assert_same_on_all_ranks(
        lambda: {**_fingerprints(dataset), "checkpoint": checkpoint}, "all of them must reach the same files"
    )
    return dataset


def _prepare(job: Job) -> Dataset:
    config, log = job.config, job.plugins.log.info
    with system_errors(DataError):
        return prepare(config, job.spec.registry, log=log, require_val=bool(config.training.eval_steps))


def _fingerprints(data: Dataset) -> dict[str, str]:
    return {"dataset": data.fingerprint, "tokenizer": data.tokenizer.fingerprint}


def decide_checkpointing(job: Job, found: FoundCheckpoint, data: Dataset) -> Job:
    """The job with ``training.gradient_checkpointing`` decided if that is "auto": on the main rank, for all of them.

    A run that is resumed keeps its choice. A run that begins compares the predicted memory with that of all ranks.
    """
    dist, config = job.dist, job.config
    checkpointing = ActivationCheckpointing.of(config, found.gradient_checkpointing)
    if found.checkpoint is None and checkpointing.setting:
        places = dist.gather(dist.all_or_none(lambda: (socket.gethostname(), Memory.here(dist.device))))
        machines = [machine for machine, _ in places]
        memories = [memory.shared(machines.count(machine)) for machine, memory in places]
        checkpointing = dist.on_main(lambda: _decide(job, data, min(memories, key=lambda memory: memory.limit)))
    runtime = dist.all_or_none(lambda: with_checkpointing(job.runtime, job.spec, dist, checkpointing))
    if runtime.compile_plan.note:
        job.plugins.log.info(runtime.compile_plan.note, name="ddp_optimizer")
    return evolve(job, runtime=runtime)


def _decide(job: Job, data: Dataset, memory: Memory) -> ActivationCheckpointing:
    return decide(
        job.config,
        job.spec.registry,
        memory,
        vocab_size=data.tokenizer.vocab_size,
        precision=job.runtime.precision.name,
        compiled=job.runtime.compile_plan.enabled,
        world_size=job.dist.size,
    )


def plan_resume(job: Job, found: FoundCheckpoint, data: Dataset) -> ResumePlan:
    """Compare the launch with the checkpoint that it resumes from."""
    origins = {plugin.name: f"{plugin.distribution} {plugin.version}".strip() for plugin in job.spec.host.plugins}
    config = job.runtime.checkpointing.applied(job.config)
    fingerprint = run_fingerprint(config, data=_fingerprints(data), numerics=job.runtime.numerics, plugins=origins)
    return job.dist.all_or_none(lambda: compare_with_checkpoint(found, fingerprint))


def preflight(job: Job, data: Dataset, plan: ResumePlan) -> TimeBudget | None:
    """Refuse what cannot work, with the model on the meta device: nothing is allocated and nothing deleted yet.

    Returns the time budget, None without a deadline.
    """
    time_budget = job.dist.all_or_none(lambda: _preflight(job, data, plan))
    if not plan.is_finished:
        job.leave_if_requested()
    return time_budget


def _preflight(job: Job, data: Dataset, plan: ResumePlan) -> TimeBudget | None:
    for part in job.spec.components:
        part.load()
    with torch.device("meta"):
        model = new_model(job.spec, data.tokenizer)
    refuse_shared_documents(job.spec, model)
    refuse_weights(job.spec, data, model)
    checkpoint_activations(job.spec, model, job.runtime.checkpointing)
    refuse_uncompilable(model, job.runtime.compile_plan)
    if job.dist.shards:
        refuse_unshardable(job.spec, model)
    time_budget = None
    if job.runtime.deadline is not None:
        size = sum(parameter.nbytes for parameter in model.parameters())
        time_budget = TimeBudget(job.runtime.deadline, first_save_bytes=3 * size)  # weights and two moments
    if (check_runtime := job.plugins.calls.check_runtime) is not None:
        found = check_runtime(model_view(job, data, plan, model), _preflight_of(job))
        findings = [job.spec.with_location(finding) for _, answers in found for finding in answers]
        report(findings, job.plugins.log.warning)
    return time_budget


def model_view(job: Job, data: Dataset, plan: ResumePlan, model: torch.nn.Module) -> ModelView:
    """The plugins' view of the run with ``model``."""
    part = job.spec.registry.get("model", job.config.model.name)
    return job.plugins.extended_view(
        ModelView,
        raw=model,
        guarded=part.guarded(model),
        forward=part.attributed(model, "failed in forward"),
        tokenizer=data.tokenizer,
        checkpoints=EngineCheckpoints(plan.found.store, plan.found.mirror),
    )


def report(findings: list[Finding], warn: Callable[..., None]) -> None:
    """Log the warnings; raise all errors as one, with the exit code of the worst."""
    errors = [finding for finding in findings if finding.severity == "error"]
    for finding in findings:
        if finding.severity == "warning":
            warn(str(finding.problem), name=finding.code)
    if errors:
        worst = max(finding.exit_code for finding in errors)
        kinds = (ConfigError, DataError, CheckpointError, PluginError)
        kind = next((kind for kind in kinds if kind.exit_code == worst), GptSimpleError)
        raise kind(*(finding.problem for finding in errors), exit_code=worst)


def _preflight_of(job: Job) -> RunPreflight:
    return RunPreflight(job.spec, PreflightOptions(launching=True, force=job.force, world_size=job.dist.size))
