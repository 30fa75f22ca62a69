"""How much memory a run needs, without using it: the engine's own step on fake tensors.

Eager runs are predicted as they are. Compiled ones have a bound from above: on a GPU compiled.py says what Inductor
keeps; on a CPU, and for a model of a plugin, operations count without fusion.
With several processes the buckets of DistributedDataParallel hold the gradients all the time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from attrs import evolve, field, frozen
from torch._subclasses.fake_tensor import FakeTensorMode

from gpt_simple.config.schema import Config
from gpt_simple.data.loader import steps_per_chunk
from gpt_simple.data.plan import BatchPlan
from gpt_simple.distributed.process_group import ProcessGroup
from gpt_simple.engine.activation_checkpointing import ActivationCheckpointing
from gpt_simple.engine.memory import optimizer_tensors, state_bytes
from gpt_simple.engine.precision import Precision
from gpt_simple.engine.process_state import preserved_process_state
from gpt_simple.engine.step import StepResult
from gpt_simple.errors import ConfigError
from gpt_simple.hardware import GpuSpec, cublas_workspaces, find_gpu
from gpt_simple.hooks.components import Registry, builtin_registry
from gpt_simple.hooks.preflight import BatchStage, MemoryForecast, MemoryPrediction, PreflightOptions
from gpt_simple.model.loss import ROWS_PER_CHUNK, summed_cross_entropy
from gpt_simple.preflight.compiled import stand_in
from gpt_simple.preflight.dry_run import DryRun
from gpt_simple.preflight.memory_tracker import CATEGORIES, MemoryTracker

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": None}
_CUDA_BLOCK = 512
_CUDA_SMALL = 2**20
"""Larger tensors may get a free block that is up to this much too large. Half of it is assumed for gradients."""
LARGEST_BATCH = 4096
"""The largest batch that is tried."""


def predict_memory(
    config: Config,
    *,
    vocab_size: int,
    precision: str = "no",
    compiled: bool = False,
    world_size: int = 1,
    cuda: bool = False,
    registry: Registry | None = None,
    steps: tuple[int, int] | None = None,
    workspaces: int | None = None,
) -> MemoryPrediction:
    """Predict for ``vocab_size`` tokens of the tokenizer and precision ``bf16``, ``fp16`` or ``no``.

    ``cuda``: as on a GPU, with its allocator's blocks and its rows in a chunk of the loss. ``steps``: the first and the
    last step, None for all. ``workspaces``: bytes that cuBLAS holds on the GPU, None for those of the GPU here. Of
    several stages the largest counts. Takes seconds, and no memory for tensors. What plugins allocate is left out.
    """
    stages = BatchPlan.of(config).between(*(steps or (1, config.training.max_steps)))
    predict = partial(
        _predict,
        config,
        stages,
        vocab_size=vocab_size,
        precision=precision,
        compiled=compiled,
        world_size=world_size,
        cuda=cuda,
        registry=registry or builtin_registry(),
        workspaces=_workspaces_here() if cuda and workspaces is None else workspaces or 0,
    )
    return max(map(predict, _largest(stages)), key=lambda prediction: prediction.peak)


def _largest(stages: Sequence[BatchStage]) -> list[BatchStage]:
    """The stages one of which has the peak: none has longer rows and as many micro-batches, of which two count."""
    sizes = {(stage.length, min(2, stage.accumulation)): stage for stage in stages}
    return [
        stage
        for (length, count), stage in sizes.items()
        if not any((length, count) != other and length <= other[0] and count <= other[1] for other in sizes)
    ]


def _predict(
    config: Config,
    stages: Sequence[BatchStage],
    stage: BatchStage,
    *,
    vocab_size: int,
    precision: str,
    compiled: bool,
    world_size: int,
    cuda: bool,
    registry: Registry,
    workspaces: int,
) -> MemoryPrediction:
    """The prediction for the batches of ``stage``, with the largest chunk of all ``stages``."""
    # Fake tensors of a device that this torch was not built for cannot be differentiated: the CPU stands in for it.
    device = torch.device("cpu")
    dtype = _DTYPES[precision]
    setting = Precision(precision, "", device, dtype, torch.amp.GradScaler("cpu", enabled=False))
    tracker = MemoryTracker(_CUDA_BLOCK if cuda else 1)
    whole = compiled and config.training.compile_scope == "model"
    # On a CPU Inductor fuses less, and dropout needs all scores.
    fuses = compiled and cuda and config.training.compile_backend == "inductor"
    loss_function = partial(summed_cross_entropy, fused=whole, rows_per_chunk=ROWS_PER_CHUNK["cuda" if cuda else "cpu"])
    with preserved_process_state(), _FakeTensors(), tracker:
        held = torch.empty(workspaces, dtype=torch.uint8)
        tracker.name([held], "workspaces")
        dry_run = DryRun.prepare(
            config,
            registry,
            setting,
            vocab_size=vocab_size,
            stage=stage,
            loss_function=loss_function,
            fake_tensors=True,
            dist=(watched := _Watched(0, 1, device)),
            stand_in=partial(stand_in, whole=whole) if fuses else None,
        )
        _make_steps(dry_run, watched, tracker, config, stages, world_size, cuda, compiled)
    copied = config.training.save_steps and config.training.saves_in_background("cuda" if cuda else "cpu")
    copy = state_bytes(dry_run.train_step.model, dry_run.train_step.optimizer) if copied else 0
    here = 0 if cuda else copy
    by_category = {**{name: tracker.peak_by.get(name, 0) for name in CATEGORIES}, "copies": here}
    by_phase = {phase: size for phase, size in tracker.peaks.items() if phase != "data"}
    place, phase = tracker.peak_place, tracker.peak_phase
    return MemoryPrediction(tracker.peak + here, by_category, phase, place, by_phase, compiled, copy, tracker.kept)


class _FakeTensors(FakeTensorMode):  # type: ignore[no-untyped-call]
    """A copy of a fake tensor belongs to the same mode: a loss may copy the model."""

    def __deepcopy__(self, memo: object) -> _FakeTensors:
        return self


@frozen(eq=False)
class _Watched(ProcessGroup):
    """One process. ``listeners`` are called before each forward pass, with whether its gradients are reduced."""

    listeners: list[Callable[[bool], None]] = field(factory=list, kw_only=True)

    def accumulating(self, wrapped: torch.nn.Module, is_last: bool) -> AbstractContextManager[Any]:
        for listener in self.listeners:
            listener(is_last)
        return super().accumulating(wrapped, is_last)


def _make_steps(
    dry_run: DryRun,
    dist: _Watched,
    tracker: MemoryTracker,
    config: Config,
    stages: Sequence[BatchStage],
    world_size: int,
    cuda: bool,
    compiled: bool,
) -> None:
    """A step that creates the optimizer's state, one that has it from its start, and an evaluation.

    The second micro-batch of a step meets the gradients of the first; more of them need no more. Hooks of torch and of
    the step keep the tracker's phase and place up to date. The buckets of DistributedDataParallel take the gradients of
    a step's last micro-batch; the gradients of the others are kept beside them. The graph of a compiled model returns
    all gradients at its end, so that none is added and freed before.
    """
    step, batch = dry_run.train_step, dry_run.batch
    model, optimizer = step.model, step.optimizer
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    rows = (batch.input_ids, batch.labels, batch.position_ids, batch.document_ids)
    tracker.name((tensor for tensor in rows if tensor is not None), "data")
    tracker.enter("data")
    held = _chunks(config, stages, cuda)
    if compiled and cuda:
        large = sum(parameter.nbytes > _CUDA_SMALL for parameter in trained.values())
        held.append(slack := torch.empty(large * _CUDA_SMALL // 2, dtype=torch.uint8))
        tracker.name([slack], "gradients")
    buckets = {name: torch.zeros_like(parameter) for name, parameter in trained.items()} if world_size > 1 else {}
    tracker.name(buckets.values(), "gradients")
    reduced = False
    returned: list[torch.Tensor] = []

    def on_forward(is_last: bool) -> None:
        nonlocal reduced
        reduced = is_last
        returned.clear()
        tracker.enter("forward")

    def on_gradients(*_: object) -> None:
        returned.clear()
        tracker.enter("clipping")

    def on_new_gradient(parameter: torch.Tensor, gradient: torch.Tensor) -> None:
        if parameter.grad is not None or buckets:
            returned.append(gradient)

    def on_gradient(name: str, parameter: torch.Tensor) -> None:
        tracker.move_to(name)
        if parameter.grad is not None:
            tracker.name([parameter.grad], "gradients")
        if reduced and buckets:
            parameter.grad = buckets[name]

    dist.listeners.append(on_forward)
    model.register_forward_hook(lambda module, *_: tracker.enter("backward") if module.training else None)
    optimizer.register_step_pre_hook(lambda *_: tracker.enter("optimizer"))
    for name, module in model.named_modules():
        if name:
            module.register_forward_pre_hook(lambda *_, name=name: tracker.move_to(name))
    if isinstance(blocks := getattr(model, "blocks", None), torch.nn.ModuleList) and len(blocks):
        tracker.measure_kept(blocks[0])
    for name, parameter in trained.items():
        if compiled and config.training.compile_scope == "model":
            parameter.register_hook(partial(on_new_gradient, parameter))  # type: ignore[no-untyped-call]
        parameter.register_post_accumulate_grad_hook(partial(on_gradient, name))  # type: ignore[no-untyped-call]
    results: list[StepResult] = []  # the trainer keeps them until it logs
    for micro_batches in (1, min(2, dry_run.micro_batches)):
        results.append(dry_run.step(micro_batches, on_gradients=on_gradients))
        tracker.name(optimizer_tensors(dry_run.train_step.optimizer), "optimizer")
    if config.training.eval_steps:
        tracker.enter("evaluation")
        dry_run.evaluate()
    del held, results


def _chunks(config: Config, stages: Sequence[BatchStage], cuda: bool) -> list[torch.Tensor]:
    """The rows that the loader keeps on the device: on a GPU two chunks while it changes from one to the next.

    On a CPU the training thread has a chunk of its own without ``data.num_workers``; what other threads read does not
    count.
    """
    tokens = max(steps_per_chunk(stage.tokens) * stage.tokens for stage in stages)
    tensors = 4 if config.data.document_mask else 2
    chunks = 2 if cuda else 0 if config.data.num_workers else 1
    return [torch.empty(tokens, dtype=torch.int64) for _ in range(chunks * tensors)]


def gpu_and_precision(config: Config, options: PreflightOptions) -> tuple[GpuSpec | None, str]:
    """The GPU that ``options`` name, else that of this machine, if any, and the precision of a run on it.

    ConfigError for an unknown GPU, and for a precision that it does not have.
    """
    gpu = find_gpu(options.device) if options.device else None
    if gpu is None and torch.cuda.is_available():
        gpu = gpu_here(torch.device("cuda", 0))
    precision: str = config.training.mixed_precision or "auto"
    if precision == "auto":
        precision = gpu.precision if gpu is not None else "no"
    if gpu is not None and (precision, gpu.precision) == ("bf16", "fp16"):
        raise ConfigError(
            f"a {gpu.name} only emulates bf16",
            key="training.mixed_precision",
            hint='use "fp16", "no", or leave it out',
        )
    return gpu, precision


def forecast_memory(
    config: Config,
    registry: Registry,
    options: PreflightOptions,
    vocab_size: int,
    checkpointing: ActivationCheckpointing,
) -> MemoryForecast:
    """The prediction, with the largest batches if ``options`` ask for them. ConfigError for an unknown device."""
    gpu, precision = gpu_and_precision(config, options)
    predict = partial(
        predict_memory,
        vocab_size=vocab_size,
        precision=precision,
        compiled=config.training.compile,
        world_size=options.world_size,
        cuda=gpu is not None,
        registry=registry,
        workspaces=gpu.workspaces if gpu is not None else 0,
    )
    setting, limit = checkpointing.setting, checkpointing.limit
    prediction = predict(checkpointing.applied(config))
    result = MemoryForecast(prediction, precision, gpu, LARGEST_BATCH)
    result = evolve(result, gradient_checkpointing=setting, gradient_checkpointing_why=checkpointing.why)
    if not options.fit:
        return result
    if gpu is None:
        raise ConfigError("--fit needs a GPU whose memory it fits: name one with --device")
    if limit is not None:
        setting = True  # "auto" decides for every batch anew
    batch = largest_batch(evolve(checkpointing, setting=setting).applied(config), gpu.usable, predict)
    bare = evolve(checkpointing, setting=False).applied(config)
    without = largest_batch(bare, gpu.usable if limit is None else limit, predict) if setting else batch
    return evolve(result, batch=batch, batch_without_checkpointing=without)


def largest_batch(config: Config, room: int, predict: Any) -> int:
    """The largest per_device_batch_size, up to 4,096, whose peak is at most ``room`` bytes; 0 if not even one row fits.

    The peak grows by about as much for each row, so two points give a guess that a few more correct.
    """

    def peak(rows: int) -> int:
        size: int = predict(evolve(config, training=evolve(config.training, per_device_batch_size=rows))).peak
        return size

    known = {rows: peak(rows) for rows in (1, 2)}
    fits = max((rows for rows, size in known.items() if size <= room), default=0)
    over = min((rows for rows, size in known.items() if size > room), default=LARGEST_BATCH + 1)
    while over - fits > 1:
        low, high = (fits, over) if over in known else sorted(known)[-2:]
        slope = max(1.0, (known[high] - known[low]) / (high - low))
        guess = min(max(int(low + (room - known[low]) / slope), fits + 1), over - 1)
        known[guess] = peak(guess)
        fits, over = (guess, over) if known[guess] <= room else (fits, guess)
    return fits


def gpu_here(device: torch.device) -> GpuSpec:
    """The GPU ``device``, with the bytes that are free on it."""
    properties = torch.cuda.get_device_properties(device)
    modern = torch.cuda.get_device_capability(device) >= (8, 0)
    free, total = torch.cuda.mem_get_info(device)
    # What torch holds and no tensor takes is free, too.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    precision = "bf16" if modern else "fp16"
    return GpuSpec(properties.name, total, precision, workspaces=_workspaces_here(), free=free)


def _workspaces_here() -> int:
    """What cuBLAS holds on this machine's GPU, or at most on a GPU elsewhere."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return GpuSpec("", 0, "bf16").workspaces
    return cublas_workspaces(torch.cuda.get_device_capability(0))
