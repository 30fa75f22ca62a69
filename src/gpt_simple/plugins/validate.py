"""Finds what would go wrong, or surprise, before a run: configuration, data, resume, output, environment.

``gpt-simple validate`` runs all checks. The start of a run leaves out the data and the checkpoints, because the engine
reads them itself a moment later. Errors keep the exit code with which the run would have ended.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from attrs import asdict

from gpt_simple import CheckpointError, Finding, GptSimpleError, ModelConfig, OptimizerConfig
from gpt_simple.hooks import NoConfig, Plugin, hookimpl
from gpt_simple.plugins.validate_data import data_findings

if TYPE_CHECKING:
    from gpt_simple import Config
    from gpt_simple.hooks import Preflight, Run

_MIB, _GIB = 2**20, 2**30
_DATA, _CHECKPOINT, _PLUGIN = 3, 4, 5
_WITHOUT_FILES = ("stories", "python_stdlib")
"""Sources that read neither data.path nor data.format."""

Check = Callable[["Preflight"], Iterator[Finding]]


class Validate(Plugin[NoConfig]):
    """Runs on the main process; its findings on devices are the same on every process."""

    on_error = "abort"

    @hookimpl
    def check_config(self, config: Config, preflight: Preflight) -> list[Finding]:
        findings = [*_steps(preflight), *_schedule(preflight), *_checkpoints(preflight)]
        findings += [*_idle(preflight), *_cuda(preflight)]
        if not preflight.options.launching:
            findings += [*_components(preflight), *_summary(preflight)]
            findings += [*_guarded("data", "data.path", data_findings, preflight)]
            findings += [*_guarded("resume", "training.resume", _resume, preflight), *_environment(preflight)]
            findings += _guarded("budget", "", _budget, preflight)
            if preflight.options.probe or preflight.options.device:
                findings += _guarded("runtime", "training", _runtime, preflight)
        return [*findings, *_guarded("output", "training.output_dir", _output, preflight)]

    @hookimpl
    def check_runtime(self, run: Run, preflight: Preflight) -> list[Finding]:
        return [*_device(run), *(_prepared(preflight) if run.is_main else ())]


def _guarded(subject: str, key: str, check: Check, preflight: Preflight) -> Iterator[Finding]:
    """The findings of a check. What the run would refuse is an error with the run's own message and exit code."""
    try:
        yield from check(preflight)
    except GptSimpleError as error:
        yield from Finding.of_error(error, f"{subject}-refused", key)


def _steps(preflight: Preflight) -> Iterator[Finding]:
    training = preflight.config.training
    for name, what in (
        ("logging_steps", "nothing is logged before the end"),
        ("eval_steps", "it is evaluated only at the end"),
        ("save_steps", "a checkpoint is written only at the end"),
    ):
        every = getattr(training, name)
        if every and every > training.max_steps and not preflight.is_default(f"training.{name}"):
            message = f"{name} {every} is more than max_steps {training.max_steps}: {what}"
            yield Finding("warning", "interval-beyond-run", message, f"training.{name}")
    warmup = sum(stage.steps for stage in training.warmup_stages)
    if training.warmup_stages and warmup >= training.max_steps:
        reached = len(preflight.stages)
        message = (
            f"the warm-up stages last {warmup:,} steps, and max_steps is {training.max_steps:,}: the run ends in stage"
            f" {reached} of {len(training.warmup_stages)}"
        )
        hint = "shorten them or raise max_steps"
        yield Finding("warning", "warmup-stages-beyond-run", message, "training.warmup_stages", hint)
    if training.max_runtime_seconds is not None and training.resume == "scratch":
        message = 'the run stops after max_runtime_seconds, and resume "scratch" will not let it go on'
        yield Finding("warning", "stops-for-good", message, "training.resume", 'use "auto"')


def _schedule(preflight: Preflight) -> Iterator[Finding]:
    optimizer, steps = preflight.config.optimizer, preflight.config.training.max_steps
    if type(optimizer) is not OptimizerConfig:
        return
    warmup, decay = optimizer.warmup_steps, optimizer.decay_steps
    hint = f"{max(1, steps // 10)} is a tenth of the run"
    if steps / 2 < warmup < steps:
        message = f"warmup_steps {warmup} is {warmup / steps:.0%} of max_steps {steps}: the rate rises most of the run"
        yield Finding("warning", "warmup-long", message, "optimizer.warmup_steps", hint)
    if warmup >= steps:
        message = f"warmup_steps {warmup} is not less than max_steps {steps}: the rate only rises"
        yield Finding("warning", "warmup-beyond-run", message, "optimizer.warmup_steps", hint)
    elif optimizer.schedule in ("cosine", "linear") and decay is not None and warmup + decay > steps:
        message = f"the decay of {decay} steps after {warmup} of warm-up never ends within max_steps {steps}"
        yield Finding(
            "warning", "decay-beyond-run", message, "optimizer.decay_steps", "leave it out to end with the run"
        )
    elif optimizer.schedule == "wsd" and (decay or 0) >= steps - warmup:
        message = f"decay_steps {decay} leaves no stable phase between warm-up and max_steps {steps}"
        yield Finding("warning", "no-stable-phase", message, "optimizer.decay_steps")
    if optimizer.name == "adamw" and optimizer.learning_rate > 0.02:
        message = f"learning_rate {optimizer.learning_rate:g} is far above what AdamW is trained with (1e-4 to 1e-2)"
        yield Finding("warning", "learning-rate-high", message, "optimizer.learning_rate")


def _checkpoints(preflight: Preflight) -> Iterator[Finding]:
    training = preflight.config.training
    every, milestone = training.save_steps, training.keep_milestone_every
    if every and milestone and milestone % every:
        message = (
            f"keep_milestone_every {milestone} is no multiple of save_steps {every}: most milestones are not saved"
        )
        yield Finding("warning", "milestones-missed", message, "training.keep_milestone_every")
    if every and training.max_steps / every > 50 and training.keep_last_k is None:
        message = f"keep_last_k null keeps all {training.max_steps // every} checkpoints"
        yield Finding("warning", "keeps-everything", message, "training.keep_last_k")


def _idle(preflight: Preflight) -> Iterator[Finding]:
    """Fields that were set and have no effect."""
    model, data = preflight.config.model, preflight.config.data
    idle: dict[str, str] = {}
    if type(model) is ModelConfig:
        if model.rope_scaling_type is not None and model.rope_scaling_factor == 1:
            idle["model.rope_scaling_type"] = "rope_scaling_factor is 1"
        if model.position == "learned" and not preflight.is_default("model.rope_base"):
            idle["model.rope_base"] = 'position is "learned"'
    if data.source in _WITHOUT_FILES:
        for name in ("path", "format"):
            if getattr(data, name, None) is not None:
                idle[f"data.{name}"] = f"the source {data.source} brings its own text"
    for key, why in idle.items():
        yield Finding("warning", "without-effect", f"{key.partition('.')[2]} has no effect: {why}", key)


def _components(preflight: Preflight) -> Iterator[Finding]:
    """Import the components of plugins, as only this check does before a run. The data check imports the source."""
    for part in preflight.components:
        try:
            if part.kind != "source":
                part.load()
        except GptSimpleError as error:
            yield from Finding.of_error(error, "component-refused", part.key)


def _summary(preflight: Preflight) -> Iterator[Finding]:
    steps, stages = preflight.config.training.max_steps, preflight.stages
    sizes = [f"{stage.tokens:,} tokens ({stage.tokens // stage.length} rows of {stage.length})" for stage in stages]
    ends = [*(stage.first_step - 1 for stage in stages[1:]), steps]
    spans = [f"{stage.first_step:,} to {end:,} of {size}" for stage, end, size in zip(stages, ends, sizes, strict=True)]
    made = f"{steps:,} steps of {sizes[0]}" if len(stages) == 1 else f"{steps:,} steps, {', '.join(spans)}"
    message = f"{made}: {preflight.samples * preflight.config.data.max_length:,} tokens"
    tokens = preflight.rows_per_step * preflight.config.data.max_length
    fields = {"steps": steps, "tokens_per_step": tokens, "stages": [asdict(stage) for stage in stages]}
    yield Finding("info", "config", message, fields=fields)


def _resume(preflight: Preflight) -> Iterator[Finding]:
    resume, steps = preflight.resume, preflight.config.training.max_steps
    for path, reason in resume.skipped:
        yield Finding("warning", "checkpoint-damaged", f"{reason}; the one before it is used", str(path))
    # More steps are the usual reason to resume.
    changed = resume.changes is not None and resume.changes.lines.keys() != {"training.max_steps"}
    differs = resume.kind == "resume" and changed
    fields = {"kind": resume.kind, "step": resume.step, "promise": resume.guarantee}
    if resume.store:
        message = f"the {resume.store} holds step {resume.step} of {steps}, which the run fetches and goes on from"
    elif resume.kind == "scratch":
        message = "starts from scratch"
    elif resume.kind == "finished":
        message = f"{resume.path}: there is nothing to do, {resume.finished}"
    else:
        message = f"goes on from {resume.path}, step {resume.step} of {steps}"
        message += "" if differs else f": {resume.guarantee}"
    yield Finding("info", "resume", message, fields=fields)
    if differs:
        message = f"the run that goes on was configured differently: {resume.changes}"
        yield Finding("warning", "resume-changed", message, "training.resume", exit_code=_CHECKPOINT)


def _budget(preflight: Preflight) -> Iterator[Finding]:
    preflight.check_time_budget()
    yield from ()


def _output(preflight: Preflight) -> Iterator[Finding]:
    output = preflight.output
    if output.checkpoint_bytes is None or output.needed is None:
        return
    size, free = _size(output.checkpoint_bytes), _size(output.free)
    sizes = f"{_size(output.needed)} for up to {_count(output.most, 'checkpoint')} of at most {size}"
    fields = {"checkpoint_bytes": output.checkpoint_bytes, "needed": output.needed, "free": output.free}
    hint = "choose another output_dir, or make room"
    if not output.holds_one:
        message = f"a checkpoint has {size}, and {free} are free: the run could save nothing"
        yield Finding("error", "space-short", message, "training.output_dir", hint, _CHECKPOINT, fields)
    elif output.needed > output.free:
        message = f"the run writes {sizes}, and {free} are free"
        # No error: a run that prunes, or that is stopped in time, may need less.
        hint = f"lower keep_last_k, {hint}"
        yield Finding("warning", "space-short", message, "training.output_dir", hint, _CHECKPOINT, fields)
    elif not preflight.options.launching:
        message = f"{output.directory}: {sizes}; {free} are free"
        yield Finding("info", "output", message, fields=fields)


def _environment(preflight: Preflight) -> Iterator[Finding]:
    here, training = preflight.environment, preflight.config.training
    gpus = f"{len(here.gpus)} x {here.gpus[0]}, driver {here.driver}" if here.gpus else "no NVIDIA GPU"
    torch = here.packages.get("torch", "missing")
    fields = {"python": here.python, "packages": dict(here.packages), "gpus": list(here.gpus), "driver": here.driver}
    yield Finding("info", "environment", f"Python {here.python}, torch {torch}, {gpus}", fields=fields)
    if training.compile and training.compile_backend == "inductor" and not here.compiler:
        severity: Any = "warning" if preflight.is_default("training.compile") else "error"
        language, variable = ("C", "$CC") if here.gpus else ("C++", "$CXX")
        message = f"torch.compile needs a {language} compiler, and there is no {here.missing_compiler} here"
        compiler = here.missing_compiler.partition(" ")[0]
        hint = f"install {compiler}, correct {variable} if it is set, or set training.compile to false"
        yield Finding(severity, "compiler-missing", message, "training.compile", hint)
    yield from _backend(preflight)
    if training.mixed_precision == "fp16" and not here.gpus and not preflight.options.device:
        message = "fp16 does not train on a CPU, and no GPU is seen here"
        yield Finding(
            "warning", "precision-needs-gpu", message, "training.mixed_precision", 'use "bf16", "no" or "auto"'
        )
    if training.wandb_project is not None:
        yield from _wandb(preflight)
    plugins = dict(preflight.plugins)
    if preflight.options.memory and preflight.is_default("plugins.memory"):
        plugins.pop("memory", None)  # --memory switched it on, and the run will not have it
    yield Finding("info", "plugins", ", ".join(plugins), fields={"plugins": plugins})
    for sentence in here.broken:
        yield Finding("warning", "plugin-broken", sentence, exit_code=_PLUGIN)


def _cuda(preflight: Preflight) -> Iterator[Finding]:
    here = preflight.environment
    if here.gpus and not here.torch_has_cuda:
        torch = here.packages.get("torch", "missing")
        message = f"this machine has a GPU and torch {torch} was built without CUDA: the run would use the CPU"
        yield Finding("warning", "torch-without-cuda", message, hint="install a CUDA build of torch")


def _backend(preflight: Preflight) -> Iterator[Finding]:
    """Backends of torch. Other packages and plugins may register more, which only torch would list."""
    training = preflight.config.training
    if training.compile and training.compile_backend not in preflight.environment.backends:
        known = ", ".join(preflight.environment.backends)
        third_party = any(not label.startswith("gpt-simple-trainer ") for label in preflight.plugins.values())
        severity: Any = "warning" if third_party else "error"
        message = f"torch has no backend {training.compile_backend!r} that is known here"
        yield Finding(severity, "backend-unknown", message, "training.compile_backend", f"expected one of {known}")


def _wandb(preflight: Preflight) -> Iterator[Finding]:
    here, table = preflight.environment, preflight.config.plugins.tables.get("wandb")
    mode = getattr(table, "mode", None) or ("offline" if here.wandb_offline else None)
    if "wandb" not in here.packages:
        return  # the plugin wandb reports it
    if here.wandb_key or mode == "offline":
        message = "W&B works offline" if mode == "offline" else "a W&B key is at hand"
        yield Finding("info", "wandb", message)
        return
    how, hint = "would be logged offline", "wandb login, or WANDB_MODE=offline"
    if mode == "online":
        how, hint = "could not be logged", "wandb login"
    message = f"there is no W&B key here: the run {how}"
    yield Finding("warning", "wandb-offline", message, "training.wandb_project", hint)


def _runtime(preflight: Preflight) -> Iterator[Finding]:
    estimate = preflight.runtime
    if estimate is None:
        yield Finding("info", "runtime", "how long the run takes is unknown without --probe")
        return
    training, total = preflight.config.training, estimate.total_seconds
    evaluating = "unknown" if estimate.evaluation_seconds is None else _duration(estimate.evaluation_seconds)
    message = (
        f"{_duration(total)} for {_count(estimate.steps_left, 'step')} (evaluation {evaluating},"
        f" saving {_duration(estimate.saving_seconds)}),"
        f" {estimate.tokens_per_second:,.0f} tokens/s, {estimate.step_seconds:.4g} s a step: {estimate.basis}"
    )
    yield Finding("info", "runtime", message, fields=estimate.fields())
    budgets = {"max_runtime_seconds": training.max_runtime_seconds, "SLURM": preflight.environment.seconds_left}
    for name, seconds in budgets.items():
        if seconds is not None and total > seconds:
            message = f"the run takes about {_duration(total)} and {name} grants {_duration(seconds)}"
            hint = "it stops with a checkpoint if max_runtime_seconds says when; the same command goes on"
            yield Finding("warning", "time-short", message, "training.max_runtime_seconds", hint)


def _device(run: Run) -> Iterator[Finding]:
    """The device against what the model needs even without activations, and against the precision."""
    if run.device.type != "cuda":
        return
    import torch

    # Weights, gradients and two moments in fp32, of which each process may have its part.
    needed = sum(16 * parameter.numel() for parameter in run.model.parameters() if parameter.requires_grad)
    if run.config.training.parallel == "fsdp":
        needed //= min(run.config.training.shard_size or run.world_size, run.world_size)
    free, memory = torch.cuda.mem_get_info(run.device)
    # What torch holds and no tensor takes is free, too.
    free += torch.cuda.memory_reserved(run.device) - torch.cuda.memory_allocated(run.device)
    if needed > free:
        message = (
            f"weights, gradients and optimizer state alone take {needed / _GIB:.1f} GiB, and {run.device} has"
            f" {memory / _GIB:.1f} GiB"
        )
        hint = "make the model smaller"
        if needed <= memory:
            message, hint = f"{message}, of which {free / _GIB:.1f} GiB are free", "end what uses the device"
        yield Finding("error", "memory-too-small", message, "model", hint)
    if run.config.training.mixed_precision == "no":
        message = 'mixed_precision "no" leaves the matrix units of the GPU to TF32: bf16 is about twice as fast'
        yield Finding("warning", "precision-slow", message, "training.mixed_precision", 'use "auto"')


def _prepared(preflight: Preflight) -> Iterator[Finding]:
    """Warnings that need the data, which a launch has by now. It reports itself what it refuses or shortens."""
    # preflight.resume checks only the sizes of the checkpoints, whose content the launch has verified before.
    with suppress(CheckpointError):
        if preflight.resume.kind != "finished":
            found = _guarded("data", "data.path", data_findings, preflight)
            yield from (finding for finding in found if finding.code in ("phase-never-reached", "evaluation-heavy"))


def _size(size: int) -> str:
    return f"{size / _GIB:.2f} GiB" if size >= _GIB else f"{size / _MIB:.2f} MiB"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))
