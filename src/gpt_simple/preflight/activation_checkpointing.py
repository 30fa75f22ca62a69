"""``training.gradient_checkpointing = "auto"``: off where the run is predicted to fit into memory without it.

The prediction is that of a model of one block, to which the other blocks add their state and what they keep for the
backward pass. It takes a quarter of a second for any depth of the built-in family. A model of a plugin is predicted
with all of its blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import attrgetter

import torch
from attrs import evolve, frozen

from gpt_simple.config.schema import Config
from gpt_simple.data.plan import BatchPlan
from gpt_simple.engine.activation_checkpointing import ActivationCheckpointing
from gpt_simple.hardware import free_memory
from gpt_simple.hooks.components import BUILTIN, CONFIG_KEY, Kind, Registry
from gpt_simple.hooks.preflight import MemoryPrediction, PreflightOptions
from gpt_simple.model.flops import parameter_count
from gpt_simple.model.shape import padded, resolve
from gpt_simple.preflight.memory import gpu_and_precision, gpu_here, predict_memory

_SHARE_OF_GPU, _SHARE_OF_HOST = 0.95, 0.75
"""The share of the free memory that a run may be predicted to take. A host's has the program and data beside it."""

_PARTS_OF_A_STEP: tuple[Kind, ...] = ("model", "optimizer", "step", "loss")
_FP32 = 4


@frozen
class Memory:
    """What one process may take: ``free`` bytes of ``name``, None if they are unknown."""

    name: str
    is_cuda: bool
    free: int | None

    @classmethod
    def here(cls, device: torch.device) -> Memory:
        """That of a GPU, or of the whole machine or container."""
        if device.type == "cuda":
            gpu = gpu_here(device)
            return cls(gpu.name, True, gpu.usable)
        return cls("this machine", False, free_memory())

    def shared(self, processes: int) -> Memory:
        """The share of one of so many processes. A GPU belongs to one."""
        return self if self.is_cuda or self.free is None else evolve(self, free=self.free // processes)

    @property
    def limit(self) -> int:
        """The highest peak that fits."""
        return int((self.free or 0) * (_SHARE_OF_GPU if self.is_cuda else _SHARE_OF_HOST))

    def __str__(self) -> str:
        if self.free is None:
            return f"the free memory of {self.name} is unknown"
        return f"{_size(self.limit)} fit into {self.name}"


def decide(
    config: Config,
    registry: Registry,
    memory: Memory,
    *,
    vocab_size: int,
    precision: str,
    compiled: bool,
    world_size: int,
    workspaces: int | None = None,
) -> ActivationCheckpointing:
    """Decide ``"auto"`` for a run that begins, or say whether the run would fit without what is set.

    The arguments are those of ``predict_memory``.
    """
    checkpointing = ActivationCheckpointing.of(config)
    is_builtin = all(
        registry.get(kind, attrgetter(CONFIG_KEY[kind])(config)).owner == BUILTIN for kind in _PARTS_OF_A_STEP
    )
    if not checkpointing.setting or not (checkpointing.is_undecided or is_builtin):
        return checkpointing
    predict = partial(
        predict_memory,
        vocab_size=vocab_size,
        precision=precision,
        compiled=compiled,
        world_size=world_size,
        cuda=memory.is_cuda,
        registry=registry,
        workspaces=workspaces,
    )
    if not is_builtin and not _can_checkpoint(config, registry, vocab_size):
        return ActivationCheckpointing(False, "auto: the model has no set_activation_checkpointing")
    bare = evolve(checkpointing, setting=False).applied(config)
    try:
        needed = (
            _quick_peak(bare, predict, vocab_size, world_size, casts=precision != "no")
            if is_builtin
            else predict(bare).peak
        )
    except Exception as error:  # a part of a plugin need not work on tensors without values
        why = f"auto: the memory without it cannot be predicted: {error}"
        return evolve(checkpointing, why=why) if checkpointing.is_undecided else checkpointing
    compared, limit = f"without it {_size(needed)} are predicted, and {memory}", memory.limit
    if checkpointing.is_undecided:
        return ActivationCheckpointing(needed > limit, f"auto: {compared}", limit)
    if needed > limit:
        return checkpointing
    return evolve(checkpointing, why=f'{checkpointing.why}; "auto" or false saves the time: {compared}')


def decide_for(
    config: Config, registry: Registry, options: PreflightOptions, vocab_size: int
) -> ActivationCheckpointing:
    """What a run would decide on the device that ``options`` name, or on this machine. ConfigError as it raises."""
    gpu, precision = gpu_and_precision(config, options)
    if gpu is not None:
        memory, workspaces = Memory(gpu.name, True, gpu.usable), gpu.workspaces
    else:
        memory, workspaces = Memory.here(torch.device("cpu")).shared(options.world_size), 0
    return decide(
        config,
        registry,
        memory,
        vocab_size=vocab_size,
        precision=precision,
        compiled=config.training.compile,
        world_size=options.world_size,
        workspaces=workspaces,
    )


def _can_checkpoint(config: Config, registry: Registry, vocab_size: int) -> bool:
    rows = getattr(config.model, "vocab_size", None) or padded(vocab_size)
    build = registry.get("model", config.model.name).build
    with torch.device("meta"):
        model = build(config.model, vocab_size=rows, max_length=config.data.max_length)
    return hasattr(model, "set_activation_checkpointing")


def _quick_peak(
    config: Config, predict: Callable[[Config], MemoryPrediction], vocab_size: int, world_size: int, *, casts: bool
) -> int:
    """The peak of a run of built-in parts without gradient checkpointing, from the prediction for its first block.

    ``casts``: the weights are cast to 16 bits for the passes of a step.

    Left out: the rows that the loader holds for further micro-batches, 32 bytes a token and less.
    """
    model, training = config.model, config.training
    one = evolve(
        config,
        model=evolve(model, n_layer=1),
        training=evolve(training, gradient_accumulation_steps=1, warmup_stages=(), eval_steps=None),
    )
    found = predict(one)
    rows = model.vocab_size or padded(vocab_size)
    weights, first = (
        _FP32 * parameter_count(resolve(part.model, vocab_size=rows, max_length=config.data.max_length))
        for part in (config, one)
    )
    more = weights - first
    state = more * (1 + found.by_category["optimizer"] / first)
    activations = (model.n_layer - 1) * found.block_activations
    peak = found.peak + (2 * state if found.by_category["copies"] else state) + (more / 2 if casts else 0)
    accumulates = any(stage.accumulation > 1 for stage in BatchPlan.of(config).stages)
    if world_size > 1:  # the buckets of DistributedDataParallel are there all the time
        return int(peak + activations + more + (weights if accumulates else 0))
    if accumulates:  # the gradients of the first micro-batch are there while another one is made
        return int(peak + activations + weights - min(first, found.by_category["gradients"]))
    return int(peak + max(activations, more))  # each gradient takes the place of what its block has kept


def _size(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
