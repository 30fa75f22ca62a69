"""The compile plan and its note."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt_simple.config.schema import Config, DataConfig, ModelConfig, TrainingConfig
from gpt_simple.engine import compile as compile_module
from gpt_simple.engine.compile import CompilePlan, compile_flags, compile_model, plan, refuse_graphs
from gpt_simple.engine.determinism import deterministic_kernels
from gpt_simple.engine.precision import resolve
from gpt_simple.errors import ConfigError
from gpt_simple.hooks import Plugin, hookimpl
from gpt_simple.hooks.components import builtin_registry
from gpt_simple.model.gpt import build
from gpt_simple.preflight.dry_run import DryRun, synthetic_batch
from tests.tiny import TinyRun, state_bytes


def note(processes: int, **changes: Any) -> str:
    config = TrainingConfig(compile=True, compile_backend="eager", **changes)
    return plan(config, torch.device("cpu"), processes, explicit=True).note


def test_the_note_names_the_setting_of_the_graph_splitter() -> None:
    flag = "torch._dynamo.config.optimize_ddp is"
    assert note(2) == (
        f"{flag} False until the run ends (compile, DDP and gradient checkpointing together): gradients are reduced"
        ' after the backward pass; training.ddp_optimizer = "split" reduces them during most of it'
    )
    assert note(2, ddp_optimizer="split") == f"{flag} True until the run ends (training.ddp_optimizer)"
    assert note(2, gradient_checkpointing=False) == note(1) == ""
    assert note(1, ddp_optimizer="off") == 'training.ddp_optimizer "off" changes nothing: there is one process'
    assert note(2, ddp_optimizer="off", compile_scope="blocks").endswith('training.compile_scope is "blocks"')


def test_a_sharded_model_is_compiled_block_by_block() -> None:
    """With one line, unless that was configured. One process is not sharded."""
    assert note(2, parallel="fsdp").endswith("gathers one block after another: each block is compiled")
    assert note(2, parallel="fsdp", compile_scope="blocks") == note(1, parallel="fsdp") == ""
    config = TrainingConfig(compile=True, compile_backend="eager", parallel="fsdp")
    scopes = [plan(config, torch.device("cpu"), count, explicit=True).scope for count in (1, 2)]
    assert scopes == ["model", "blocks"]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A machine with these programs on its PATH, and a GPU of this compute capability."""

    def make(*programs: str, capability: tuple[int, int] = (9, 0), headers: bool = True, triton: bool = True) -> None:
        for variable in ("CC", "CXX", "TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"):
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.setattr("shutil.which", lambda name: name if name in programs else None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if triton else None)
        monkeypatch.setattr("sysconfig.get_path", lambda name: str(Path(__file__).parent / "headers"))
        monkeypatch.setattr(Path, "exists", lambda path: headers)

    return make


@pytest.mark.parametrize(
    ("device", "facts", "missing"),
    [
        ("cpu", {"programs": ("g++",)}, ""),
        ("cpu", {"programs": ("gcc",)}, "needs a C++ compiler and none was found: install g++"),
        ("cuda", {"programs": ("gcc",)}, ""),
        ("cuda", {"programs": ("clang",)}, ""),
        ("cuda", {"programs": ("g++",)}, "needs a C compiler and none was found: install gcc"),
        ("cuda", {"programs": ("gcc",), "capability": (6, 1)}, "compute capability 7.0, and this one has 6.1"),
        ("cuda", {"programs": ("gcc",), "headers": False}, "needs Python.h on a GPU: install python3-dev"),
        ("cuda", {"programs": ("gcc",), "triton": False}, "needs triton on a GPU"),
    ],
)
def test_each_device_asks_for_what_its_code_is_built_with(
    device: str, facts: dict[str, Any], missing: str, machine: Callable[..., None]
) -> None:
    machine(*facts.pop("programs"), **facts)
    defaulted = plan(TrainingConfig(), torch.device(device, 0), 1, explicit=False)
    assert (defaulted.enabled, missing in defaulted.warning) == (not missing, True)
    if missing:
        with pytest.raises(ConfigError, match=re.escape(missing)):
            plan(TrainingConfig(), torch.device(device, 0), 1, explicit=True)


@pytest.mark.parametrize(("device", "variable"), [("cpu", "CXX"), ("cuda", "CC")])
def test_a_variable_that_names_no_compiler(
    device: str, variable: str, machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine("gcc", "g++")
    monkeypatch.setenv(variable, "/nonexistent")
    assert (
        f"${variable}, /nonexistent, is none"
        in plan(TrainingConfig(), torch.device(device, 0), 1, explicit=False).warning
    )


@pytest.mark.parametrize("variable", ["TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"])
@pytest.mark.parametrize("backend", ["inductor", "eager"])
def test_a_variable_that_switches_the_compiler_off(
    variable: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "1")
    config = TrainingConfig(compile_backend=backend)
    made = plan(config, torch.device("cpu"), 1, explicit=False)
    assert not made.enabled
    assert f"${variable} switches torch.compile off: unset it" in made.warning
    with pytest.raises(ConfigError, match=variable):
        plan(config, torch.device("cpu"), 1, explicit=True)


class CountsGraphs(Plugin[Any]):
    """The graphs that Dynamo has compiled after each step."""

    ranks = "all"
    on_error = "abort"

    def __init__(self) -> None:
        super().__init__(None)
        self.after: list[int] = []

    @hookimpl
    def on_run_start(self, run: Any, event: Any) -> None:
        from torch._dynamo.utils import counters

        counters.clear()

    @hookimpl
    def on_step_end(self, run: Any, event: Any) -> None:
        from torch._dynamo.utils import counters

        self.after.append(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("scope", ["model", "blocks"])
def test_each_length_of_rows_is_compiled_once(tiny: TinyRun, scope: str) -> None:
    """Also where there are more lengths than Dynamo compiles by default, and where they alternate."""
    lengths = [32, 2, 3, 4, 6, 8, 12, 16, 24, 48, 2, 96, 4]
    assert len(set(lengths)) > torch._dynamo.config.recompile_limit
    counts, eager = CountsGraphs(), CountsGraphs()
    options: dict[str, Any] = {
        "data__max_length": 96,
        "model__n_layer": 1,
        "training__warmup_stages": [
            {"steps": 1, "length": length, "gradient_accumulation_steps": 1 + number % 2}
            for number, length in enumerate(lengths)
        ],
        "training__max_steps": len(lengths) + 2,
    }
    compiled = tiny(
        "compiled",
        plugins=[counts],
        training__compile=True,
        training__compile_scope=scope,
        training__compile_backend="eager",
        **options,
    )
    seen = [len(set(lengths[: step + 1])) for step in range(options["training__max_steps"])]
    assert counts.after == [count * counts.after[0] for count in seen]
    assert counts.after[0] >= 1
    assert compiled.final_loss == pytest.approx(tiny("eager", plugins=[eager], **options).final_loss, rel=1e-5)
    assert set(eager.after) == {0}
    assert torch._dynamo.config.recompile_limit < len(set(lengths))


def test_recomputed_dropout_follows_the_device_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    """The generators that torch would take on CUDA are seeded by chance, where no seed of a run reaches them."""
    compiled = plan(TrainingConfig(compile=True, compile_backend="eager"), torch.device("cpu"), 1, explicit=True)
    config: Any = torch._functorch.config
    before = config.graphsafe_rng_functionalization
    with compile_flags(compiled):
        assert not config.graphsafe_rng_functionalization
    assert config.graphsafe_rng_functionalization == before
    # A torch that has no such generators has no such setting.
    monkeypatch.setattr(compile_module, "_OWN_GENERATORS", "none_of_these")
    with compile_flags(compiled):
        assert config.graphsafe_rng_functionalization == before


@pytest.mark.parametrize("deterministic", [False, True])
def test_kernels_are_not_chosen_by_time_if_they_must_repeat(deterministic: bool) -> None:
    compiled = plan(TrainingConfig(compile=True, compile_backend="eager"), torch.device("cpu"), 1, explicit=True)
    with deterministic_kernels(deterministic), compile_flags(compiled):
        assert torch._inductor.config.deterministic is deterministic
    assert torch._inductor.config.deterministic is False


class StaticMemory:
    """A backend of torch whose results lie at one place, where its next call writes: as CUDA graphs, without a GPU."""

    def __call__(self, module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        from torch._dynamo.backends.common import aot_autograd
        from torch._functorch.aot_autograd import make_boxed_compiler

        return aot_autograd(fw_compiler=make_boxed_compiler(self.overwriting))(module, inputs)

    @staticmethod
    def overwriting(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., list[Any]]:
        places: dict[int, torch.Tensor] = {}

        def replay(*args: Any) -> list[Any]:
            results = list(module(*args))
            for index, result in enumerate(results):
                if isinstance(result, torch.Tensor):
                    results[index] = places.setdefault(index, torch.empty_like(result)).copy_(result).detach()
            return results

        return replay


def trained_weights(plan: CompilePlan) -> tuple[list[float], list[torch.Tensor]]:
    """The losses and the weights after three steps of three micro-batches, with an evaluation in between."""
    precision = resolve("no", torch.device("cpu"))
    torch.manual_seed(0)
    config = Config(ModelConfig(n_embd=32, n_layer=2, n_head=2), DataConfig(max_length=32))
    run = DryRun.prepare(config, builtin_registry(), precision, vocab_size=64, compile_plan=plan)
    batches = [synthetic_batch(64, precision.device, 1, 32, masked=False) for _ in range(9)]
    with compile_flags(plan):
        losses = []
        for step in range(3):
            micro = batches[3 * step : 3 * step + 3]
            losses += [run.train_step(step + 1, micro, 96).loss, run.evaluate()]
    return [loss.item() for loss in losses], list(run.train_step.model.parameters())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_results_of_graphs_are_copied_before_the_next_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.backends.registry import register_backend

    register_backend(StaticMemory(), name="static_memory")
    losses, weights = trained_weights(CompilePlan(False, "model", ""))
    graphs = trained_weights(CompilePlan(True, "model", "static_memory", graphs=True))
    torch.testing.assert_close(graphs[0], losses)
    torch.testing.assert_close(graphs[1], weights)
    overwritten = trained_weights(CompilePlan(True, "model", "static_memory"))
    assert overwritten[0] != pytest.approx(losses), "this test could not fail"


@pytest.mark.parametrize("variable", [False, True])
@pytest.mark.parametrize("backend", ["inductor", "cudagraphs", "aot_eager"])
def test_graphs_are_those_of_the_backend_or_the_variable(
    backend: str, variable: bool, machine: Callable[..., None]
) -> None:
    machine("gcc")
    config = TrainingConfig(compile_backend=backend)
    with torch._inductor.config.patch({"triton.cudagraphs": variable}):
        made = plan(config, torch.device("cuda", 0), 1, explicit=True)
    assert made.graphs is (backend == "cudagraphs" or (backend == "inductor" and variable))
    assert not plan(config, torch.device("cpu"), 1, explicit=False).graphs


@pytest.mark.parametrize(
    ("backend", "scope", "document_mask", "checkpointing", "refused"),
    [
        ("inductor", "model", True, True, ""),
        ("cudagraphs", "model", True, True, "generates no kernel that keeps documents apart"),
        ("inductor", "blocks", False, False, ""),
        ("inductor", "blocks", False, True, "while the gradient of another is on its way"),
        ("cudagraphs", "blocks", False, 2, "while the gradient of another is on its way"),
    ],
)
def test_what_no_cuda_graph_can_hold_is_refused(
    backend: str, scope: Any, document_mask: bool, checkpointing: Any, refused: str
) -> None:
    training = TrainingConfig(compile_backend=backend, compile_scope=scope, gradient_checkpointing=checkpointing)
    config = Config(data=DataConfig(document_mask=document_mask), training=training)
    refuse_graphs(config, CompilePlan(True, scope, backend))
    with pytest.raises(ConfigError, match=refused) if refused else nullcontext():
        refuse_graphs(config, CompilePlan(True, scope, backend, graphs=True))


BUDGETS = (None, 1.0, 0.5, 0.0)


def saved_bytes(budget: float | None) -> int:
    """What a compiled model keeps for its backward pass, beside its parameters."""
    config = TrainingConfig(compile_backend="aot_eager", gradient_checkpointing=False, activation_memory_budget=budget)
    made = plan(config, torch.device("cpu"), 1, explicit=True)
    model = build(ModelConfig(n_embd=32, n_layer=3, n_head=2), vocab_size=128, max_length=32)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.zeros(2, 32, dtype=torch.int64)
    with compile_flags(made):
        compile_model(model, made)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(ids, ids)
        loss.backward()
    return sum(size for place, size in kept.items() if place not in own)


def test_a_budget_divides_what_is_kept_and_what_is_recomputed() -> None:
    from torch._functorch import config

    before = config.activation_memory_budget
    whole, one, half, none = map(saved_bytes, BUDGETS)
    assert whole == one > half > none
    assert config.activation_memory_budget == before


def test_a_budget_changes_no_loss(tiny: TinyRun) -> None:
    compiled = {"training__compile": True, "training__compile_backend": "aot_eager"}
    runs = [tiny(str(budget), training__activation_memory_budget=budget, **compiled) for budget in BUDGETS]
    assert len({run.final_loss for run in runs}) == 1
    assert len({state_bytes(run) for run in runs}) == 1


def test_a_budget_needs_the_compiler_that_it_is_for(machine: Callable[..., None]) -> None:
    machine("gcc")
    budgeted = TrainingConfig(gradient_checkpointing=False, activation_memory_budget=0.5)
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler and none was found"):
        plan(budgeted, torch.device("cpu"), 1, explicit=False)
