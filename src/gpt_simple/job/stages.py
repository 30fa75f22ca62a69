"""The stages of a launch before there is anything to train: each returns a frozen value that the next ones need.

A stage runs on every rank or fails on every rank. Everything that can be refused is refused here, before the run
directory is touched.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from attrs import frozen

from gpt_simple.checkpoint.store import Store
from gpt_simple.data.dataset import Dataset
from gpt_simple.data.prepare import prepare
from gpt_simple.distributed.process_group import ProcessGroup
from gpt_simple.engine.compile import refuse_uncompilable
from gpt_simple.engine.resume import FoundCheckpoint, ResumePlan, keep_values_of_run, run_fingerprint
from gpt_simple.engine.resume import find_checkpoint as search_checkpoint
from gpt_simple.engine.resume import plan_resume as compare_with_checkpoint
from gpt_simple.engine.time_budget import TimeBudget
from gpt_simple.engine.views import EngineCheckpoints, ModelView
from gpt_simple.errors import CheckpointError, ConfigError, DataError, GptSimpleError, PluginError
from gpt_simple.hooks.batch import Tokenizer
from gpt_simple.hooks.preflight import PreflightOptions
from gpt_simple.hooks.results import Finding
from gpt_simple.job.job import Job
from gpt_simple.job.records import launch_facts
from gpt_simple.model.shape import padded
from gpt_simple.preflight.preflight import RunPreflight
from gpt_simple.spec import RunSpec


@frozen(eq=False)
class PreparedData:
    """The data set that the run trains on, and the fingerprints that a checkpoint is compared by."""

    dataset: Dataset
    fingerprints: Mapping[str, str]

    @property
    def tokenizer(self) -> Tokenizer:
        return self.dataset.tokenizer


@frozen
class Checked:
    """What the checks before a run have found out. ``time_budget`` is None without a deadline."""

    parameter_bytes: int
    time_budget: TimeBudget | None


@contextmanager
def init_distributed(spec: RunSpec) -> Iterator[ProcessGroup]:
    """Join the other ranks, and refuse what was not started alike everywhere."""
    dist = ProcessGroup.join(spec.config.training.peer_timeout_seconds)
    try:
        dist.assert_same_on_all_ranks(
            lambda: launch_facts(spec), "start the same command with the same packages everywhere"
        )
        yield dist
    finally:
        dist.leave()


def keep_values(spec: RunSpec, dist: ProcessGroup, *, force: bool) -> RunSpec:
    """The configuration with the defaults of the run that goes on. First of all stages: precision depends on it."""
    return dist.all_or_none(lambda: keep_values_of_run(spec, force=force))


def check_config(job: Job) -> None:
    """Log the notes of the configuration, and raise the errors that the plugins' ``check_config`` finds."""
    spec, log, compile_plan = job.spec, job.plugins.log, job.runtime.compile_plan
    for note in (*spec.notes, *spec.host.notes, *filter(None, [compile_plan.warning])):
        log.warning(note)
    if compile_plan.note:
        log.info(compile_plan.note, name="ddp_optimizer")
    job.dist.on_main(lambda: report(spec.check_config(_preflight_of(job)), log.warning))


def find_checkpoint(job: Job) -> FoundCheckpoint:
    """Where the run goes on. Before the data are prepared, which may take hours: a refusal must not cost them."""
    job.dist.all_or_none(job.run_dir.check)
    # One store for the whole launch: what it has verified once it need not hash again.
    store = Store(job.run_dir.checkpoints)
    return job.dist.all_or_none(lambda: search_checkpoint(job.config, job.run_dir, force=job.force, store=store))


def prepare_data(job: Job, found: FoundCheckpoint) -> PreparedData:
    """Prepare the data, or find them prepared: the main rank first. Only the cache is written."""
    job.leave_if_requested()
    with job.signals.interrupting(job.dist.size == 1):
        dataset = job.dist.main_rank_first(lambda: _prepare(job))
    fingerprints = {"dataset": dataset.fingerprint, "tokenizer": dataset.tokenizer.fingerprint}
    checkpoint = found.checkpoint.path.name if found.checkpoint else None
    job.dist.assert_same_on_all_ranks(
        lambda: {**fingerprints, "checkpoint": checkpoint}, "all of them must reach the same files"
    )
    return PreparedData(dataset, fingerprints)


def _prepare(job: Job) -> Dataset:
    config, log = job.config, job.plugins.log.info
    return prepare(config, job.spec.registry, log=log, require_val=bool(config.training.eval_steps))


def plan_resume(job: Job, found: FoundCheckpoint, data: PreparedData) -> ResumePlan:
    """Compare the launch with the checkpoint that it goes on from."""
    origins = {plugin.name: f"{plugin.distribution} {plugin.version}".strip() for plugin in job.spec.host.plugins}
    fingerprint = run_fingerprint(job.config, data=data.fingerprints, numerics=job.runtime.numerics, plugins=origins)
    return job.dist.all_or_none(lambda: compare_with_checkpoint(found, fingerprint))


def preflight(job: Job, data: PreparedData, plan: ResumePlan) -> Checked:
    """Refuse what cannot work, with the model on the meta device: nothing is allocated and nothing deleted yet."""
    checked = job.dist.all_or_none(lambda: _preflight(job, data, plan))
    if not plan.is_finished:
        job.leave_if_requested()
    return checked


def _preflight(job: Job, data: PreparedData, plan: ResumePlan) -> Checked:
    for part in job.spec.components:
        part.load()
    with torch.device("meta"):
        model = new_model(job.spec, data.tokenizer)
    checkpoint_activations(job.spec, model)
    refuse_uncompilable(model, job.runtime.compile_plan)
    size, deadline = sum(parameter.nbytes for parameter in model.parameters()), job.runtime.deadline
    # A checkpoint holds weights and two moments.
    time_budget = TimeBudget(deadline, first_save_bytes=3 * size) if deadline is not None else None
    if (check_runtime := job.plugins.calls.check_runtime) is not None:
        view = model_view(job, data, model, plan.found.store)
        found = check_runtime(view, _preflight_of(job))
        report(
            [job.spec.with_location(finding) for _, findings in found for finding in findings], job.plugins.log.warning
        )
    return Checked(size, time_budget)


def model_view(job: Job, data: PreparedData, model: torch.nn.Module, store: Store) -> ModelView:
    """The plugins' view of the run with ``model``."""
    return ModelView(**model_view_parts(job, data, model, store))


def model_view_parts(job: Job, data: PreparedData, model: torch.nn.Module, store: Store) -> dict[str, Any]:
    """The fields of a ModelView, which later views have as well."""
    parts: dict[str, Any] = attrs.asdict(job.plugins.launch_view, recurse=False)
    return {**parts, "model": model, "tokenizer": data.tokenizer, "checkpoints": EngineCheckpoints(store)}


def new_model(spec: RunSpec, tokenizer: Tokenizer) -> torch.nn.Module:
    """The configured model on torch's default device. ConfigError if tokenizer or document mask do not suit it."""
    config = spec.config
    vocab_size = getattr(config.model, "vocab_size", None)
    if vocab_size is not None and vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, more than {vocab_size}",
            key="model.vocab_size",
            hint="leave it out or raise it",
        )
    part = spec.registry.get("model", config.model.name)
    model: torch.nn.Module = part.build(
        config.model, vocab_size=vocab_size or padded(tokenizer.vocab_size), max_length=config.data.max_length
    )
    if config.data.document_mask and not _sees_documents(model):
        raise ConfigError(
            f"the model {config.model.name!r} takes no position_ids and document_ids, so its documents see each other",
            key="data.document_mask",
            hint="set it to false",
        )
    return model


def checkpoint_activations(spec: RunSpec, model: torch.nn.Module) -> None:
    """Apply ``training.gradient_checkpointing``. ConfigError if it was asked for and the model has none."""
    every = int(spec.config.training.gradient_checkpointing)
    apply = getattr(model, "set_activation_checkpointing", None)
    if apply is not None:
        apply(every)
    elif every and not spec.origins.is_default("training.gradient_checkpointing"):
        raise ConfigError(
            f"the model {spec.config.model.name!r} has no set_activation_checkpointing(every)",
            key="training.gradient_checkpointing",
            hint="set it to false",
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


def _sees_documents(model: torch.nn.Module) -> bool:
    """Whether ``forward`` takes (input_ids, labels, position_ids, document_ids)."""
    try:
        inspect.signature(model.forward).bind(None, None, None, None)
    except TypeError:
        return False
    return True
