"""``torch.compile``: whether it can run here, which scope, and the flags it needs under DDP."""

from __future__ import annotations

import importlib.util
import os
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from attrs import evolve, frozen

from gpt_simple.config.schema import Config, TrainingConfig
from gpt_simple.engine.determinism import repeats_bits
from gpt_simple.errors import ConfigError
from gpt_simple.hardware import find_compiler

_DISABLING = ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE")
"""Variables with which torch compiles nothing, without a word."""

_OWN_GENERATORS = "graphsafe_rng_functionalization"
"""On CUDA torch gives what is recomputed generators of its own, seeded once by chance: attention's dropout would follow
neither training.seed nor the sample. Without them it saves and restores the device's, which the engine seeds."""

_SPLIT = (
    ': gradients are reduced after the backward pass; training.ddp_optimizer = "split" reduces them during most of it'
)
"""What the default leaves out. A test of the processes holds that the installed torch can do it."""

DdpOptimizer = bool | Literal["python_reducer"]


@frozen
class CompilePlan:
    """What will be compiled. ``ddp_optimizer`` is the value for torch's flag, None to leave torch's own."""

    enabled: bool
    scope: str
    backend: str
    ddp_optimizer: DdpOptimizer | None = None
    activation_memory_budget: float | None = None
    """The share of the activations that are kept, None to leave torch's own."""
    lengths: int = 1
    """Lengths of rows that are compiled for: by the model, or by flex attention in a model that runs eager."""
    graphs: bool = False
    """Whether kernels are replayed as CUDA graphs, whose outputs lie where the next replay writes."""
    warning: str = ""
    """Why nothing is compiled although the configuration has it."""
    note: str = ""
    """How torch's DDP graph splitter is set, or why it is not."""


def plan(config: TrainingConfig, device: torch.device, world_size: int, *, explicit: bool) -> CompilePlan:
    """Decide about compilation.

    ``explicit``: the user set ``compile = true``. Then, and with a budget for activations, a missing compiler is a
    ConfigError; the default ``true`` runs eager with a warning. A backend that torch does not have is a ConfigError.
    """
    lengths = len({stage.length for stage in config.warmup_stages} | {None})
    shards = config.parallel == "fsdp" and world_size > 1
    scope = "blocks" if shards else config.compile_scope
    eager = CompilePlan(False, scope, config.compile_backend, lengths=lengths)
    if not config.compile:
        return eager
    _refuse_unknown(config.compile_backend)
    missing = _disabled() or (_missing_compiler(device) if config.compile_backend == "inductor" else "")
    budget = config.activation_memory_budget
    if missing and (explicit or budget is not None):
        raise ConfigError(f"{missing}, or set training.compile to false", key="training.compile")
    if missing:
        return evolve(eager, warning=f"running eager: {missing}")
    if shards:
        note = 'training.parallel "fsdp" gathers one block after another: each block is compiled'
        return evolve(eager, enabled=True, note=note if config.compile_scope != scope else "")
    flag = _ddp_optimizer(config, world_size)
    note = ""
    if flag is not None:
        by_default = config.ddp_optimizer == "auto"
        why = "compile, DDP and gradient checkpointing together" if by_default else "training.ddp_optimizer"
        note = f"torch._dynamo.config.optimize_ddp is {flag!r} until the run ends ({why})"
        if by_default:
            note += _SPLIT
    elif config.ddp_optimizer != "auto":
        why = "there is one process" if world_size == 1 else 'training.compile_scope is "blocks"'
        note = f'training.ddp_optimizer "{config.ddp_optimizer}" changes nothing: {why}'
    graphs = device.type == "cuda" and _captures_graphs(config.compile_backend)
    return evolve(
        eager,
        enabled=True,
        ddp_optimizer=flag,
        activation_memory_budget=budget,
        note=note,
        graphs=graphs,
    )


def _refuse_unknown(backend: str) -> None:
    import torch._dynamo  # the run compiles and needs it anyway

    known = [name for name in torch._dynamo.list_backends(exclude_tags=()) if "TESTING" not in name]
    if backend not in known:
        hint = f"expected one of {', '.join(known)}"
        raise ConfigError(f"torch has no backend {backend!r}", key="training.compile_backend", hint=hint)


def _captures_graphs(backend: str) -> bool:
    import torch._inductor.config

    # The flag is torch's own; $TORCHINDUCTOR_CUDAGRAPHS sets it.
    return backend == "cudagraphs" or (backend == "inductor" and torch._inductor.config.triton.cudagraphs)


def _disabled() -> str:
    name = next((name for name in _DISABLING if os.environ.get(name) == "1"), "")
    return f"${name} switches torch.compile off: unset it" if name else ""


def _missing_compiler(device: torch.device) -> str:
    """Empty if code can be generated and built for ``device``, else what is missing and what to do."""
    gpu = device.type == "cuda"
    path, searched = find_compiler(gpu=gpu)
    variable, language = ("CC", "C") if gpu else ("CXX", "C++")
    if not path and os.environ.get(variable):
        return f"torch.compile needs a {language} compiler and ${variable}, {searched}, is none: unset it or correct it"
    if not path:
        install = searched.partition(" ")[0]
        how = f"install {install} (Debian: apt-get install {install})"
        return f"torch.compile needs a {language} compiler and none was found: {how}"
    if not gpu:
        return ""
    if importlib.util.find_spec("triton") is None:
        return "torch.compile needs triton on a GPU and it is not installed: pip install triton"
    if torch.version.hip is None and (capability := torch.cuda.get_device_capability(device)) < (7, 0):
        return f"torch.compile needs a GPU of compute capability 7.0, and this one has {capability[0]}.{capability[1]}"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "torch.compile needs Python.h on a GPU: install python3-dev (Debian: apt-get install python3-dev)"
    return ""


def _ddp_optimizer(config: TrainingConfig, world_size: int) -> DdpOptimizer | None:
    """The value for ``torch._dynamo.config.optimize_ddp``, or None to leave torch's own.

    Dynamo's DDP graph splitter could not split the higher-order operators of activation checkpointing in older torch,
    which stopped with an error (pytorch/pytorch#104674). Per-block compilation has no graph to split.
    """
    if world_size == 1 or config.compile_scope == "blocks":
        return None
    if config.ddp_optimizer == "auto":
        return False if config.gradient_checkpointing else None
    if config.ddp_optimizer == "python_reducer":
        return "python_reducer"
    return config.ddp_optimizer == "split"


@contextmanager
def compile_flags(plan: CompilePlan) -> Iterator[None]:
    """Dynamo's flags for the whole run: compilation is lazy and reads them per frame, so they stay until the end."""
    deterministic = repeats_bits()
    if not plan.enabled and plan.lengths == 1 and not deterministic:
        yield
        return
    import torch._dynamo
    import torch._functorch.config
    import torch._inductor.config

    flags: dict[str, Any] = {} if plan.ddp_optimizer is None else {"optimize_ddp": plan.ddp_optimizer}
    # Dynamo's limit is for one shape. Beyond it a model runs eager, or fails in a full graph.
    flags["recompile_limit"] = torch._dynamo.config.recompile_limit + plan.lengths - 1
    try:
        with ExitStack() as patches:
            patches.enter_context(torch._dynamo.config.patch(flags))
            if hasattr(torch._functorch.config, _OWN_GENERATORS):
                patches.enter_context(torch._functorch.config.patch({_OWN_GENERATORS: False}))
            if (budget := plan.activation_memory_budget) is not None:
                patches.enter_context(torch._functorch.config.patch(activation_memory_budget=budget))
            if deterministic and hasattr(torch._inductor.config, "deterministic"):
                # Else it chooses among kernels by their time, in every launch anew.
                patches.enter_context(torch._inductor.config.patch(deterministic=True))
            yield
    finally:
        # The cache is per code object and small: a second run in this process would otherwise fall back to eager.
        torch._dynamo.reset()


def compile_model(model: torch.nn.Module, plan: CompilePlan) -> None:
    """Compile in place, so that the names of the parameters stay the raw module's."""
    refuse_uncompilable(model, plan)
    backend = _CopiesOutputs(plan.backend) if plan.graphs else plan.backend
    if plan.enabled and plan.scope == "model":
        model.compile(backend=backend, dynamic=False)
    elif plan.enabled:
        for block in model.blocks:  # type: ignore[union-attr]
            block.compile(backend=backend, dynamic=False, fullgraph=True)


@frozen(eq=False)
class _CopiesOutputs:
    """A backend of torch whose results are the caller's: the loss is kept while later replays write over the graph's.

    Gradients are the step's to copy: autograd takes a graph's own memory as ``p.grad``.
    """

    backend: str

    def __call__(self, module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., list[Any]]:
        compiled = torch._dynamo.lookup_backend(self.backend)(module, inputs)

        def run(*args: Any) -> list[Any]:
            return [each.clone() if isinstance(each, torch.Tensor) else each for each in compiled(*args)]

        return run

    def reset(self) -> None:
        """Free the graphs; called by ``torch._dynamo.reset``."""
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees

        reset_cudagraph_trees()


def recompile_model(model: torch.nn.Module, plan: CompilePlan) -> None:
    """Compile a model that was changed since it was compiled, as one that is new."""
    if plan.enabled:
        torch._dynamo.reset()
    compile_model(model, plan)


def refuse_graphs(config: Config, plan: CompilePlan) -> None:
    """Raise ConfigError if a step of ``config`` cannot be captured in CUDA graphs, though the plan has them."""
    if not plan.graphs:
        return
    if plan.backend == "cudagraphs" and config.data.document_mask:
        raise ConfigError(
            'the backend "cudagraphs" generates no kernel that keeps documents apart (data.document_mask)',
            key="training.compile_backend",
            hint='use "inductor", with TORCHINDUCTOR_CUDAGRAPHS=1 in the environment for CUDA graphs',
        )
    if plan.scope == "blocks" and config.training.gradient_checkpointing:
        raise ConfigError(
            "torch cannot replay a CUDA graph of a block while the gradient of another is on its way, as it is where"
            " blocks are recomputed",
            key="training.compile_scope",
            hint='use "model", set training.gradient_checkpointing to false, or train without CUDA graphs'
            " (training.compile_backend, $TORCHINDUCTOR_CUDAGRAPHS)",
        )


def refuse_uncompilable(model: torch.nn.Module, plan: CompilePlan) -> None:
    """Raise ConfigError if blocks are to be compiled and the model has none."""
    by_block = plan.enabled and plan.scope == "blocks"
    if by_block and not isinstance(getattr(model, "blocks", None), torch.nn.ModuleList):
        raise ConfigError(
            f'{type(model).__name__} has no "blocks" (a ModuleList) to compile',
            key="training.compile_scope",
            hint='use "model"',
        )
