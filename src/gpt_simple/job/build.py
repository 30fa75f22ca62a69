"""From a claimed run directory to a Trainer: allocate everything, and restore the state to start from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from typing import Any

import torch

from gpt_simple._names import __version__
from gpt_simple.checkpoint.state import (
    OptimizerAsBuilt,
    flatten_optimizer,
    load_model,
    model_tensors,
    restore_optimizer,
)
from gpt_simple.data.dataset import Dataset
from gpt_simple.data.loader import Loader
from gpt_simple.engine.checkpointer import Checkpointer, Snapshot
from gpt_simple.engine.compile import compile_model
from gpt_simple.engine.control import throttled
from gpt_simple.engine.losses import TrainedLoss, summed_loss
from gpt_simple.engine.optimizers import skips_on_device
from gpt_simple.engine.resume import ResumePlan
from gpt_simple.engine.rng import derive_seed, isolated_rng
from gpt_simple.engine.step import TrainStep, step_optimizer
from gpt_simple.engine.time_budget import TimeBudget
from gpt_simple.engine.trainer import Trainer
from gpt_simple.engine.views import RunView
from gpt_simple.errors import CheckpointError, PluginError
from gpt_simple.hardware import peak_flops
from gpt_simple.hooks.events import CheckpointLoaded, ModelBuilt
from gpt_simple.hooks.results import VAL_LOSS
from gpt_simple.job.claim import ClaimedRunDir
from gpt_simple.job.job import Job
from gpt_simple.job.model import checkpoint_activations, new_model
from gpt_simple.job.stages import model_view
from gpt_simple.run_dir.layout import RunDir
from gpt_simple.run_dir.lineage import RunRecord, read_metrics

OptimizerState = Callable[[], tuple[dict[str, torch.Tensor], dict[str, Any]]]

_MODEL_STREAM = 0x6D6F64656C  # differs from the streams of micro-batches, which count samples from 0


@contextmanager
def build_trainer(
    job: Job, data: Dataset, plan: ResumePlan, time_budget: TimeBudget | None, run_dir: ClaimedRunDir
) -> Iterator[Trainer]:
    """Build what trains, in an order that checkpoints, hooks and torch depend on.

    Until the first update a signal unwinds. Not wrapped in ``all_or_none``: hooks and DDP have their own collectives.
    """
    job.leave_if_requested()
    config, dist = job.config, job.dist
    with job.signals.interrupting(dist.size == 1):
        model = _build_model(job, data, plan)
        optimizer = _build_optimizer(job, model)
        optimizer_state = partial(_optimizer_state, job, model, optimizer, OptimizerAsBuilt.of(optimizer))
        _restore(job, plan, model, optimizer)
        get = job.spec.registry.get
        schedule = get("schedule", config.optimizer.schedule).build(config.optimizer, config.training.max_steps)
        schedule(job.state.step + 1)  # a rate that cannot be used is found before an earlier run is discarded
        step, loss = get("step", config.training.step), TrainedLoss.build(job.spec.registry, config, model)
        train_step = TrainStep(
            model=model,
            wrapped=dist.wrap(loss.module),
            optimizer=optimizer,
            schedule=schedule,
            precision=job.runtime.precision,
            dist=dist,
            seed=config.training.seed,
            max_grad_norm=config.optimizer.max_grad_norm,
            losses_of=loss.of,
            step_optimizer=get("optimizer", config.optimizer.name).attributed(step_optimizer, "failed in step"),
            compute=step.attributed(step.build(model, config), "failed"),
            compute_label=step.label,
        )
        compile_model(model, job.runtime.compile_plan)
        loader = Loader(
            data,
            config,
            world_size=dist.size,
            rank=dist.rank,
            device=dist.device,
            consumed=plan.samples,
        )
        with closing(loader):
            _warn_of_early_end(job, loader, plan.samples)
            evaluated = train_step.wrapped if loss.is_own else model
            yield _trainer(job, data, plan, time_budget, run_dir, train_step, evaluated, loader, optimizer_state)


def _build_model(job: Job, data: Dataset, plan: ResumePlan) -> torch.nn.Module:
    with isolated_rng(derive_seed(job.config.training.seed, _MODEL_STREAM), torch.device("cpu")):
        model = new_model(job.spec, data.tokenizer)
    model.to(job.dist.device)
    plugins = job.plugins
    plugins.adopt(model_view(job, data, plan, model))
    if plugins.calls.on_model_built is not None:
        with plugins.comm.during("on_model_built"):
            plugins.calls.on_model_built(plugins.view, ModelBuilt(model))
    checkpoint_activations(job.spec, model)
    return model


def _build_optimizer(job: Job, model: torch.nn.Module) -> torch.optim.Optimizer:
    config = job.config.optimizer
    part = job.spec.registry.get("optimizer", config.name)
    optimizer: torch.optim.Optimizer = part.build(model, config, job.dist.device)
    if not skips_on_device(optimizer):
        job.plugins.log.info(
            f"optimizer {config.name} has no found_inf, with which it would skip a non-finite step by itself: the host"
            " reads one value a step",
            name="host_read",
        )
    return optimizer


def _restore(job: Job, plan: ResumePlan, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    checkpoint, state, store = plan.found.checkpoint, plan.found.state, plan.found.store
    if checkpoint is None:
        return
    load_model(model, store.load_tensors(checkpoint, "model"))
    restore_optimizer(optimizer, model, store.load_tensors(checkpoint, "optimizer"), state["optimizer"])
    if state["scaler"]:
        job.runtime.precision.scaler.load_state_dict(state["scaler"])
    job.spec.host.load_state(
        store.load_document(checkpoint, "plugins"),
        store.load_tensors(checkpoint, "plugins"),
        is_main=job.dist.is_main,
    )
    job.state.load_state_dict({**state, "best_val_loss": _best_val_loss(plan)})
    plugins = job.plugins
    if plugins.calls.on_checkpoint_loaded is not None:
        plugins.calls.on_checkpoint_loaded(plugins.view, CheckpointLoaded(job.state.step, checkpoint.path))


def _best_val_loss(plan: ResumePlan) -> float | None:
    """The lowest validation loss up to the checkpoint's step.

    A checkpoint is saved before its step is evaluated: that loss is in run.json, in older runs in metrics.jsonl.
    """
    found = plan.found
    if found.checkpoint is None:
        return None
    step, run_dir = found.checkpoint.step, RunDir(found.checkpoint.path.absolute().parent.parent)
    losses = [found.state["best_val_loss"], *_val_losses(run_dir, step)]
    return min((loss for loss in losses if loss is not None), default=None)


def _val_losses(run_dir: RunDir, step: int) -> list[float | None]:
    with suppress(CheckpointError):
        if (loss := RunRecord.load(run_dir).val_losses.get(str(step))) is not None:
            return [loss]
    rows = read_metrics(run_dir.metrics_jsonl, "eval") if run_dir.metrics_jsonl.exists() else []
    return [row.get(VAL_LOSS) for row in rows if row["step"] == step]


def _trainer(
    job: Job,
    data: Dataset,
    plan: ResumePlan,
    time_budget: TimeBudget | None,
    run_dir: ClaimedRunDir,
    train_step: TrainStep,
    evaluated: torch.nn.Module,
    loader: Loader,
    optimizer_state: OptimizerState,
) -> Trainer:
    plugins, model = job.plugins, train_step.model
    conditions = [] if time_budget is None else [time_budget.reason_to_stop]
    control = job.control(*conditions, throttled(run_dir.take_stop_request))
    run = plugins.extended_view(
        RunView,
        run_id=run_dir.run_id,
        wrapped=evaluated,
        summed_loss=job.spec.registry.get("model", job.config.model.name).attributed(summed_loss, "failed in forward"),
        loader=loader,
        known=_run_info(job, data, model),
        sync=control,
    )
    plugins.adopt(run)
    checkpointer = Checkpointer(
        run=run,
        calls=plugins.calls,
        run_dir=run_dir,
        snapshot=partial(_snapshot, job, plan, model, optimizer_state),
        must_be_finite=model.state_dict().keys() - dict(model.named_buffers()).keys(),
        time_budget=time_budget,
    )
    return Trainer(
        run=run,
        calls=plugins.calls,
        train_step=train_step,
        control=control,
        checkpointer=checkpointer,
        signals=job.signals,
        time_budget=time_budget,
        after_first_update=optimizer_state,
    )


def _warn_of_early_end(job: Job, loader: Loader, consumed: int) -> None:
    left, steps = loader.steps_after(consumed), job.config.training.max_steps
    if left is not None and job.state.step + left < steps:
        job.plugins.log.warning(
            f"the data end after step {job.state.step + left:,} of {steps:,}, and the run with them"
            f' (data.on_exhaustion = "{job.config.data.on_exhaustion}")',
            name="data_end_early",
        )


def _optimizer_state(
    job: Job, model: torch.nn.Module, optimizer: torch.optim.Optimizer, built: OptimizerAsBuilt
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The optimizer's part of a checkpoint. Raises PluginError, naming the component, for state that cannot be saved.

    The run ends with it: a save that is tried again fails again.
    """
    label = job.spec.registry.get("optimizer", job.config.optimizer.name).label
    try:
        return flatten_optimizer(optimizer, model, built)
    except CheckpointError as error:
        raise PluginError(*(p._replace(message=f"{label}: {p.message}") for p in error.problems)) from error
    except Exception as error:
        raise PluginError(f"{label}: its state cannot be read: {type(error).__name__}: {error}") from error


def _snapshot(job: Job, plan: ResumePlan, model: torch.nn.Module, optimizer_state: OptimizerState) -> Snapshot:
    """The content of a checkpoint: tensors and JSON documents by file stem."""
    moments, optimizer_document = optimizer_state()
    plugin_records, plugin_tensors = job.spec.host.state()
    state = {
        "version": __version__,
        **job.state.state_dict(),
        "samples": job.state.tokens // job.config.data.max_length,
        "optimizer": optimizer_document,
        "scaler": job.runtime.precision.scaler.state_dict(),
        "run": plan.fingerprint,
    }
    tensors = {"model": model_tensors(model), "optimizer": moments, "plugins": plugin_tensors}
    return tensors, {"state": state, "plugins": plugin_records}


def _run_info(job: Job, data: Dataset, model: torch.nn.Module) -> dict[str, Any]:
    """The result of ``run.facts()``. Comes after ``on_model_built``, which may have added parameters."""
    config, device = job.config, job.dist.device
    flops: Callable[[int], float] | None = getattr(model, "flops_per_token", None)
    kernel: Callable[[torch.device], str] | None = getattr(model, "document_kernel", None)
    precision, compile_plan, training = job.runtime.precision, job.runtime.compile_plan, config.training
    rows = training.per_device_batch_size * training.gradient_accumulation_steps * job.dist.size
    return {
        "device": _device_name(device),
        "precision": precision.name,
        "precision_why": precision.why,
        "compile": compile_plan.scope if compile_plan.enabled else "off",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "flops_per_token": flops(config.data.max_length) if flops is not None else None,
        "peak_flops": peak_flops(_device_name(device), precision.name),
        "tokens_per_step": rows * config.data.max_length,
        "document_kernel": kernel(device) if kernel and config.data.document_mask else None,
        "floor": data.floor,
        "data": data.describe(),
        "plugins": [plugin.name for plugin in job.spec.host.plugins],
        "config_path": str(job.spec.source) if job.spec.source else None,
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"
