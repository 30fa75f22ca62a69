"""From a checked configuration to a Trainer: data, model, optimizer, devices, and the state to start from.

Everything that can be refused is refused before the run directory is touched.
"""

from __future__ import annotations

import inspect
import platform
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from attrs import define, field

from gpt_simple._names import __version__
from gpt_simple.checkpoint.state import flatten_optimizer, load_model, model_tensors, restore_optimizer
from gpt_simple.checkpoint.store import Store
from gpt_simple.data.dataset import Dataset
from gpt_simple.data.loader import Loader
from gpt_simple.data.prepare import prepare
from gpt_simple.engine.compile import CompilePlan, compile_model
from gpt_simple.engine.optimizers import skips_on_device
from gpt_simple.engine.resume import ResumePlan, identity, promise
from gpt_simple.engine.rng import isolated_rng, stream
from gpt_simple.engine.step import TrainStep
from gpt_simple.engine.time_budget import Walltime
from gpt_simple.engine.trainer import Trainer
from gpt_simple.engine.views import EngineCheckpoints, EngineRun
from gpt_simple.errors import CheckpointError, ConfigError, DataError, GptSimpleError, PluginError
from gpt_simple.hardware import peak_flops
from gpt_simple.hooks.events import CheckpointLoaded, ModelBuilt
from gpt_simple.hooks.preflight import PreflightOptions
from gpt_simple.hooks.results import Finding
from gpt_simple.model.shape import padded
from gpt_simple.plugin_host.dispatch import Calls
from gpt_simple.preflight.preflight import RunPreflight
from gpt_simple.run_dir.layout import RunDir
from gpt_simple.run_dir.lineage import read_metrics
from gpt_simple.spec import Assembly

if TYPE_CHECKING:
    from gpt_simple.job.claim import Ownership

_MODEL_STREAM = 0x6D6F64656C  # apart from the streams of micro-batches, which count samples from 0


@define(slots=False)
class Setup:
    """The steps that lead to a Trainer, in the order in which a launch takes them."""

    assembly: Assembly
    run: EngineRun
    calls: Calls
    compiling: CompilePlan
    run_dir: RunDir
    store: Store
    dataset: Dataset = field(init=False)
    identity: dict[str, Any] = field(init=False)
    promise: str = field(init=False, default="from scratch")

    def read_data(self) -> None:
        """Prepare the data, or find them prepared; only the cache is written."""
        config, run = self.run.config, self.run
        self.dataset = run.world.main_first(self._prepare)
        run._tokenizer = self.dataset.tokenizer
        self.identity = identity(
            config,
            data={
                "dataset": self.dataset.fingerprint,
                "tokenizer": self.dataset.tokenizer.fingerprint,
            },
            numerics=_numerics(run, self.compiling),
            plugins={
                plugin.name: f"{plugin.distribution} {plugin.version}".strip() for plugin in self.assembly.host.plugins
            },
        )

    def _prepare(self) -> Dataset:
        config, log = self.run.config, self.run.log.info
        try:
            return prepare(config, self.assembly.registry, log=log, require_val=bool(config.training.eval_steps))
        except GptSimpleError as error:
            error.args = (self.assembly.origins.placed(str(error)),)
            raise

    def check(self, plan: ResumePlan, walltime: Walltime | None, options: PreflightOptions) -> None:
        """Refuse what cannot work, with the model known but nothing allocated."""
        for part in self.assembly.components:
            part.load()
        if plan.kind == "resume":
            kept = promise(plan.state["run"], self.identity, plan.state["samples"])
            self.promise = f"resumed from step {plan.state['step']}: {kept}"
        elif plan.kind == "finished":
            promise(plan.state["run"], self.identity, plan.state["samples"])
        if self.calls.check_runtime is None and walltime is None:
            return
        with torch.device("meta"):
            model = self._new_model()
        if walltime is not None:
            walltime.expect_save_of(3 * sum(parameter.nbytes for parameter in model.parameters()))
        if self.calls.check_runtime is not None:
            self.run._model = model
            found = self.calls.check_runtime(self.run, RunPreflight(self.assembly, options))
            self.run._model = None
            report(
                [self.assembly.shown(finding) for _, findings in found for finding in findings], self.run.log.warning
            )

    def build(self, plan: ResumePlan, owner: Ownership, *, walltime: Walltime | None) -> Trainer:
        """Allocate everything and restore the state of ``plan``."""
        assembly, run, config = self.assembly, self.run, self.run.config
        with isolated_rng(stream(config.training.seed, _MODEL_STREAM), torch.device("cpu")):
            model = self._new_model()
        run._model = model.to(run.device)
        if self.calls.on_model_built is not None:
            with run.comm.during("on_model_built"):
                self.calls.on_model_built(run, ModelBuilt(model))
        self._checkpoint_activations(model)
        optimizer = assembly.registry.get("optimizer", config.optimizer.name).build(model, config.optimizer, run.device)
        if not skips_on_device(optimizer):
            run.log.info(
                f"optimizer {config.optimizer.name} has no found_inf, with which it would skip a non-finite step by"
                " itself: the host reads one value a step",
                name="host_read",
            )
        run.checkpoints = EngineCheckpoints(self.store)
        self._restore(plan, model, optimizer)
        run._wrapped = run.world.wrap(model)
        compile_model(model, self.compiling)
        consumed = plan.state["samples"] if plan.checkpoint else 0
        run._loader = Loader(
            self.dataset, config, world_size=run.world_size, rank=run.rank, device=run.device, consumed=consumed
        )
        left, steps = run._loader.steps_after(consumed), config.training.max_steps
        if left is not None and run.step + left < steps:
            run.log.warning(
                f"the data end after step {run.step + left:,} of {steps:,}, and the run with them"
                f' (data.on_exhaustion = "{config.data.on_exhaustion}")',
                name="data_end_early",
            )
        self._gather_facts(model)
        schedule = assembly.registry.get("schedule", config.optimizer.schedule)
        return Trainer(
            run=run,
            calls=self.calls,
            train_step=TrainStep(
                model=model,
                wrapped=run._wrapped,
                optimizer=optimizer,
                schedule=schedule.build(config.optimizer, config.training.max_steps),
                precision=run.precision,
                world=run.world,
                seed=config.training.seed,
                max_grad_norm=config.optimizer.max_grad_norm,
            ),
            loader=run._loader,
            store=self.store,
            owner=owner,
            state=partial(self._state, model, optimizer),
            walltime=walltime,
            best_val_loss=_best_val_loss(plan),
        )

    def _new_model(self) -> torch.nn.Module:
        config, tokenizer = self.run.config, self.dataset.tokenizer
        wanted = getattr(config.model, "vocab_size", None)
        if wanted is not None and wanted < tokenizer.vocab_size:
            raise ConfigError(
                f"{self.assembly.origins.place('model.vocab_size')}: the tokenizer has {tokenizer.vocab_size} tokens,"
                f" more than {wanted}; leave it out or raise it"
            )
        rows = wanted or padded(tokenizer.vocab_size)
        part = self.assembly.registry.get("model", config.model.name)
        model: torch.nn.Module = part.build(config.model, vocab_size=rows, max_length=config.data.max_length)
        if config.data.document_mask and not _sees_documents(model):
            raise ConfigError(
                f"{self.assembly.origins.place('data.document_mask')}: the model {config.model.name!r} takes no"
                " position_ids and document_ids, so its documents see each other; set it to false"
            )
        return model

    def _checkpoint_activations(self, model: torch.nn.Module) -> None:
        every = int(self.run.config.training.gradient_checkpointing)
        apply = getattr(model, "set_activation_checkpointing", None)
        if apply is not None:
            apply(every)
        elif every and not self.assembly.origins.is_default("training.gradient_checkpointing"):
            raise ConfigError(
                f"training.gradient_checkpointing: the model {self.run.config.model.name!r} has no"
                " set_activation_checkpointing(every); set it to false"
            )

    def _restore(self, plan: ResumePlan, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if plan.checkpoint is None:
            return
        run, state, store = self.run, plan.state, self.store
        load_model(model, store.load_tensors(plan.checkpoint, "model"))
        restore_optimizer(optimizer, model, store.load_tensors(plan.checkpoint, "optimizer"), state["optimizer"])
        if state["scaler"]:
            run.precision.scaler.load_state_dict(state["scaler"])
        self.assembly.host.load_state(
            store.load_document(plan.checkpoint, "plugins"),
            store.load_tensors(plan.checkpoint, "plugins"),
            is_main=run.is_main,
        )
        run.moved_to(state["step"], state["tokens"], state["target_tokens"])
        if self.calls.on_checkpoint_loaded is not None:
            self.calls.on_checkpoint_loaded(run, CheckpointLoaded(run.step, plan.checkpoint.path))

    def _state(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, best_val_loss: float | None
    ) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
        """What a checkpoint holds: tensors and JSON documents by file stem."""
        run = self.run
        moments, optimizer_document = flatten_optimizer(optimizer, model)
        plugin_records, plugin_tensors = self.assembly.host.state()
        state = {
            "version": __version__,
            "step": run.step,
            "tokens": run.tokens,
            "target_tokens": run.target_tokens,
            "samples": run.tokens // run.config.data.max_length,
            "best_val_loss": best_val_loss,
            "optimizer": optimizer_document,
            "scaler": run.precision.scaler.state_dict(),
            "run": self.identity,
        }
        tensors = {"model": model_tensors(model), "optimizer": moments, "plugins": plugin_tensors}
        return tensors, {"state": state, "plugins": plugin_records}

    def _gather_facts(self, model: torch.nn.Module) -> None:
        run, training = self.run, self.run.config.training
        flops: Callable[[int], float] | None = getattr(model, "flops_per_token", None)
        kernel: Callable[[torch.device], str] | None = getattr(model, "document_kernel", None)
        rows = training.per_device_batch_size * training.gradient_accumulation_steps * run.world_size
        run.known |= {
            "device": _device_name(run.device),
            "precision": run.precision.name,
            "precision_why": run.precision.why,
            "compile": self.compiling.scope if self.compiling.enabled else "off",
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "flops_per_token": flops(run.config.data.max_length) if flops is not None else None,
            "peak_flops": peak_flops(_device_name(run.device), run.precision.name),
            "tokens_per_step": rows * run.config.data.max_length,
            "document_kernel": kernel(run.device) if kernel and run.config.data.document_mask else None,
            "floor": self.dataset.floor,
            "data": self.dataset.describe(),
            "plugins": [plugin.name for plugin in self.assembly.host.plugins],
            "config_path": str(self.assembly.source) if self.assembly.source else None,
        }


def _best_val_loss(plan: ResumePlan) -> float | None:
    """The lowest one so far. A checkpoint is written before its step is evaluated: that loss is in the metrics."""
    if plan.checkpoint is None:
        return None
    metrics = RunDir(plan.checkpoint.path.absolute().parent.parent).metrics_jsonl
    rows = read_metrics(metrics, "eval") if metrics.exists() else []
    losses = [row.get("eval/loss") for row in rows if row["step"] == plan.checkpoint.step]
    return min((loss for loss in (plan.state["best_val_loss"], *losses) if loss is not None), default=None)


def _sees_documents(model: torch.nn.Module) -> bool:
    """Whether ``forward`` takes (input_ids, labels, position_ids, document_ids)."""
    try:
        inspect.signature(model.forward).bind(None, None, None, None)
    except TypeError:
        return False
    return True


def report(findings: list[Finding], warn: Callable[..., None]) -> None:
    """Warn of what is only worth a warning; raise all errors as one, with the exit code of the worst."""
    errors = [finding for finding in findings if finding.severity == "error"]
    for finding in findings:
        if finding.severity == "warning":
            warn(_line(finding), name=finding.code)
    if errors:
        worst = max(finding.exit_code for finding in errors)
        kinds = (ConfigError, DataError, CheckpointError, PluginError)
        error = next((kind for kind in kinds if kind.exit_code == worst), GptSimpleError)(
            "\n".join(_line(finding) for finding in errors)
        )
        error.exit_code = worst  # type: ignore[assignment]
        raise error


def _line(finding: Finding) -> str:
    place = f"{finding.place}: " if finding.place else ""
    return f"{place}{finding.message}" + (f"; {finding.hint}" if finding.hint else "")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"


def _numerics(run: EngineRun, compiling: CompilePlan) -> Mapping[str, Any]:
    """What decides the last digits of a result."""
    return {
        "processes": run.world_size,
        "device": torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else run.device.type,
        "precision": run.precision.name,
        "compile": f"{compiling.scope}/{compiling.backend}" if compiling.enabled else "off",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }
