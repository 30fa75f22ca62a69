"""From a claimed run directory to a Trainer: allocate everything, and restore the state to start from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
from attrs import asdict, evolve

from gpt_simple._names import __version__
from gpt_simple.checkpoint.state import (
    layouts,
    load_model,
    load_weights,
    model_tensors,
    restore_optimizer,
)
from gpt_simple.checkpoint.store import weights_stem
from gpt_simple.data.dataset import Dataset
from gpt_simple.data.loader import Loader
from gpt_simple.data.plan import BatchPlan
from gpt_simple.engine.checkpointer import Checkpointer, Snapshot
from gpt_simple.engine.compile import compile_model
from gpt_simple.engine.components import attributed_calls, guarded
from gpt_simple.engine.control import throttled
from gpt_simple.engine.mirror import RECORD
from gpt_simple.engine.optimizers import CurrentOptimizer
from gpt_simple.engine.resume import ResumePlan
from gpt_simple.engine.rng import derive_seed, isolated_rng
from gpt_simple.engine.step import TrainStep
from gpt_simple.engine.time_budget import TimeBudget
from gpt_simple.engine.trainer import Trainer
from gpt_simple.engine.views import RunView
from gpt_simple.engine.weights import paired
from gpt_simple.errors import CheckpointError
from gpt_simple.hardware import peak_flops
from gpt_simple.hooks.events import CheckpointLoaded, ModelBuilt
from gpt_simple.hooks.plugin import EVAL
from gpt_simple.hooks.results import VAL_LOSS
from gpt_simple.job.claim import ClaimedRunDir
from gpt_simple.job.job import Job
from gpt_simple.job.model import checkpoint_activations, new_model
from gpt_simple.job.optimizer import TRAINED, build_optimizer, optimizer_state, rebuild_optimizer, restore_trained
from gpt_simple.job.stages import model_view
from gpt_simple.machine_failures import is_device_lost
from gpt_simple.run_dir.layout import RunDir, finite
from gpt_simple.run_dir.lineage import RunRecord, read_metrics

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
    dist.started()
    with job.signals.interrupting(dist.size == 1):
        model = _build_model(job, data, plan)
        restore_trained(plan, model)
        current = build_optimizer(job, model, plan)
        _restore(job, plan, model, current.optimizer)
        get = job.spec.registry.get
        schedule = get("schedule", config.optimizer.schedule).build(
            config.optimizer, config.training.max_steps, run_config=config
        )
        schedule(job.state.step + 1)  # a rate that cannot be used is found before an earlier run is discarded
        calls = attributed_calls(job.spec.registry, config, model)
        train_step = TrainStep(
            model=model,
            wrapped=dist.wrap(calls["module"]),
            optimizer=current.optimizer,
            schedule=schedule,
            precision=job.runtime.precision,
            dist=dist,
            seed=config.training.seed,
            max_grad_norm=config.optimizer.max_grad_norm,
            graphs=job.runtime.compile_plan.graphs,
            **calls,
        )
        compile_model(model, job.runtime.compile_plan)
        loader = Loader(
            data,
            config,
            world_size=dist.size,
            rank=dist.rank,
            device=dist.device,
            step=job.state.step,
            consumed=plan.samples,
        )
        with _closing(loader):
            _warn_of_early_end(job, loader)
            yield _trainer(job, data, plan, time_budget, run_dir, train_step, loader, current)


@contextmanager
def _closing(loader: Loader) -> Iterator[None]:
    """Close the loader at the end, unless the device is lost: freeing page-locked rows then makes torch abort."""
    is_kept = False
    try:
        yield
    except BaseException as error:
        is_kept = is_device_lost(error)
        raise
    finally:
        if not is_kept:
            loader.close()


def _build_model(job: Job, data: Dataset, plan: ResumePlan) -> torch.nn.Module:
    dist, plugins, seed = job.dist, job.plugins, derive_seed(job.config.training.seed, _MODEL_STREAM)
    host = torch.device("cpu")
    with isolated_rng(seed, host), torch.device("meta") if dist.shards else nullcontext():
        model = new_model(job.spec, data.tokenizer)
    calls = guarded(job.spec.registry, job.config, model)
    if not dist.shards:
        calls.to(dist.device)
    plugins.adopt(model_view(job, data, plan, model))
    if plugins.calls.on_model_built is not None:
        with plugins.comm.during("on_model_built"):
            plugins.calls.on_model_built(plugins.view, ModelBuilt(model, plan.step))
    checkpoint_activations(job.spec, model, job.runtime.checkpointing)
    if dist.mesh is not None:
        from gpt_simple.distributed.sharding import shard  # seconds, which other runs do not need

        init_weights: Callable[[], object] = calls.init_weights  # type: ignore[assignment]
        with isolated_rng(seed, host):
            shard(model, init_weights, dist.mesh, dist.device, job.runtime.precision.dtype)
    return model


def _restore(job: Job, plan: ResumePlan, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    checkpoint, state, store = plan.found.checkpoint, plan.found.state, plan.found.store
    sets = _weight_sets(job, model)  # also of a new run: what does not fit is found before the first step
    job.dist.on_main(lambda: job.spec.host.check_used_weights(sets))
    if checkpoint is None:
        return
    with store.mapped(checkpoint, "model") as tensors:
        load_model(guarded(job.spec.registry, job.config, model), tensors)
    restore = job.spec.registry.get("optimizer", job.config.optimizer.name).attributed(
        restore_optimizer, "cannot restore its state"
    )
    with store.mapped(checkpoint, "optimizer") as tensors:
        restore(optimizer, model, tensors, state["optimizer"])
    if state["scaler"]:
        job.runtime.precision.scaler.load_state_dict(state["scaler"])
    job.spec.host.load_state(
        store.load_document(checkpoint, "plugins"),
        store.load_tensors(checkpoint, "plugins"),
        is_main=job.dist.is_main,
        device=job.dist.device,
    )
    restored = []
    for name in store.weight_sets(checkpoint):
        if name == EVAL:
            continue  # the optimizer makes them from its own state
        if name in sets:
            with store.mapped(checkpoint, weights_stem(name)) as tensors:
                load_weights(name, sets[name], tensors)
            restored.append(name)
        else:
            job.plugins.log.warning(
                f"no plugin here keeps the weights {name!r} of {checkpoint.path.name}: later checkpoints will not have"
                " them",
                name="weights_left_out",
            )
    job.state.load_state_dict({**state, "best_val_loss": _best_val_loss(plan)})
    plugins = job.plugins
    if plugins.calls.on_checkpoint_loaded is not None:
        event = CheckpointLoaded(job.state.step, checkpoint.path, tuple(restored))
        plugins.calls.on_checkpoint_loaded(plugins.view, event)


def _weight_sets(job: Job, model: torch.nn.Module) -> Mapping[str, Mapping[str, torch.Tensor]]:
    """The plugins' sets of weights on this process."""
    return job.spec.host.weight_sets(partial(paired, model))


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
    loader: Loader,
    current: CurrentOptimizer,
) -> Trainer:
    plugins, model = job.plugins, train_step.model
    known = _run_info(job, data, model, loader.plan)
    conditions = [] if time_budget is None else [time_budget.reason_to_stop]
    control = job.control(*conditions, throttled(run_dir.take_stop_request))
    run = plugins.extended_view(
        RunView,
        run_id=run_dir.run_id,
        summed_loss=train_step.loss,
        loader=loader,
        known=known,
        weight_sets=partial(_weight_sets, job, model),
        sync=control,
        kept=run_dir.record.recorded,
        keep=lambda key, value: run_dir.record_value(key, job.spec.without_secrets(value)),
    )
    plugins.adopt(run)
    run.watch.start(run)

    def rebuild(reason: str) -> None:
        rebuild_optimizer(job, current, train_step, reason)
        known.update(_run_info(job, data, model, loader.plan))

    checkpointer = Checkpointer(
        run=run,
        calls=plugins.calls,
        run_dir=run_dir,
        collect=partial(_collect, job, plan, model, current, run_dir.record, loader.plan),
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
        rebuild=rebuild,
        after_first_update=partial(optimizer_state, job, current),
    )


def _warn_of_early_end(job: Job, loader: Loader) -> None:
    last, steps = loader.last_step(), job.config.training.max_steps
    if last is not None and last < steps:
        job.plugins.log.warning(
            f"the data end after step {last:,} of {steps:,}, and the run with them"
            f' (data.on_exhaustion = "{job.config.data.on_exhaustion}")',
            name="data_end_early",
        )


def _collect(job: Job, *parts: Any) -> Snapshot:
    """The content of a checkpoint on the main process; where the model is sharded, of the parts of all of them."""
    dist = job.dist
    dist.barrier()  # one that does not come is named; what follows may take longer
    tensors, documents = dist.all_or_none(lambda: _snapshot(job, *parts) if dist.is_main or dist.shards else ({}, {}))
    if dist.shards:
        from gpt_simple.distributed.state_gathering import gather_state

        tensors = gather_state(dist, tensors)
    return tensors, documents


def _snapshot(
    job: Job,
    plan: ResumePlan,
    model: torch.nn.Module,
    current: CurrentOptimizer,
    record: RunRecord,
    batch_plan: BatchPlan,
) -> Snapshot:
    """The content of a checkpoint, as far as this process has it: tensors and JSON documents by file stem."""
    moments, optimizer_document = optimizer_state(job, current)
    plugin_records, plugin_tensors = job.spec.host.state()
    weights = model_tensors(guarded(job.spec.registry, job.config, model))
    tensors = {"model": weights, "optimizer": moments, "plugins": plugin_tensors}
    state = {
        "version": __version__,
        **job.state.state_dict(),
        "finished": job.spec.without_secrets(job.state.finished),
        "samples": batch_plan.samples_after(job.state.step),
        "model": layouts(weights),
        "optimizer": optimizer_document,
        "scaler": job.runtime.precision.scaler.state_dict(),
        "run": plan.fingerprint,
    }
    if current.was_rebuilt:
        state[TRAINED] = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if (for_evaluation := current.weights_for_evaluation()) is not None:
        tensors[weights_stem(EVAL)] = for_evaluation
    tensors |= {weights_stem(name): dict(weights) for name, weights in _weight_sets(job, model).items()}
    documents = {"state": state, "plugins": plugin_records}
    # Another machine, which finds the checkpoint in the store, has no run.json.
    return tensors, documents | ({RECORD: finite(record.document())} if job.has_store else {})


def _run_info(job: Job, data: Dataset, model: torch.nn.Module, batch_plan: BatchPlan) -> dict[str, Any]:
    """The result of ``run.facts()``. Comes after ``on_model_built``, which may have added parameters."""
    config, device, model = job.config, job.dist.device, guarded(job.spec.registry, job.config, model)
    flops: Callable[[int], float] | None = getattr(model, "flops_per_token", None)
    document_kernel: Callable[[torch.device], str] | None = getattr(model, "document_kernel", None)
    precision, compile_plan = job.runtime.precision, job.runtime.compile_plan
    with evolve(precision, of_weights=False).autocast():
        kernel = document_kernel(device) if document_kernel and config.data.document_mask else None
    return {
        "device": _device_name(device),
        "precision": precision.name,
        "precision_why": precision.why,
        "compile": compile_plan.scope if compile_plan.enabled else "off",
        "parallel": "fsdp" if job.dist.shards else "ddp" if job.dist.size > 1 else None,
        "gradient_checkpointing": job.runtime.checkpointing.setting,
        "gradient_checkpointing_why": job.runtime.checkpointing.why,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "flops_per_token": flops(config.data.max_length) if flops is not None else None,
        "peak_flops": config.training.peak_flops or peak_flops(_device_name(device), precision.name),
        "tokens_per_step": batch_plan.stages[-1].tokens,
        "stages": [asdict(stage) for stage in batch_plan.between(1, config.training.max_steps)],
        "document_kernel": kernel,
        "floor": data.floor,
        "data": data.describe(),
        "plugins": [plugin.name for plugin in job.spec.host.plugins],
        "config_path": str(job.spec.source) if job.spec.source else None,
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"
