"""Weights that are cast once a step: every bit is as with the casts of autocast, and none is older than its weight."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from attrs import evolve
from torch.utils._python_dispatch import TorchDispatchMode

from gpt_simple.config.schema import Config
from gpt_simple.engine import precision
from gpt_simple.engine.casts import WeightCasts
from gpt_simple.engine.compile import CompilePlan, compile_flags
from gpt_simple.hooks.batch import Batch
from gpt_simple.hooks.components import builtin_registry
from gpt_simple.hooks.step import Backward, accumulate
from gpt_simple.model.linear import Linear
from gpt_simple.preflight.dry_run import EAGER, DryRun

CPU = torch.device("cpu")
WHOLE, BLOCKS = (CompilePlan(True, scope, "aot_eager") for scope in ("model", "blocks"))


@pytest.fixture(autouse=True)
def no_compiled_code() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def prepared(*, casts_ahead: bool, compiled: CompilePlan = EAGER, checkpointing: bool = True) -> DryRun:
    """Three micro-batches of a small model in bf16."""
    base = Config()
    config = evolve(
        base,
        model=evolve(base.model, n_embd=32, n_head=2, n_layer=2),
        data=evolve(base.data, max_length=16),
        training=evolve(
            base.training,
            per_device_batch_size=2,
            gradient_accumulation_steps=3,
            gradient_checkpointing=checkpointing,
        ),
    )
    torch.manual_seed(0)
    run = DryRun.prepare(
        config, builtin_registry(), precision.resolve("bf16", CPU), vocab_size=64, compile_plan=compiled
    )
    if not casts_ahead:
        run.train_step.casts = WeightCasts([], torch.bfloat16)
    return run


def two_steps(run: DryRun, **listeners: Any) -> list[torch.Tensor]:
    """The gradients of both steps, and the weights after them."""
    parameters, seen = list(run.train_step.model.parameters()), []
    for _ in range(2):
        run.step(on_gradients=lambda *_: seen.extend(p.grad.clone() for p in parameters), **listeners)  # type: ignore[union-attr]
    return seen + [parameter.detach().clone() for parameter in parameters]


def assert_same_bits(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> None:
    assert [torch.equal(a, b) for a, b in zip(first, second, strict=True)] == [True] * len(first)


@pytest.mark.parametrize(
    ("compiled", "checkpointing"),
    [(EAGER, True), (WHOLE, True), (BLOCKS, True), pytest.param(WHOLE, False, marks=pytest.mark.slow)],
    ids=["eager", "model", "blocks", "model, no checkpointing"],
)
def test_gradients_and_weights_have_the_bits_of_autocast(compiled: CompilePlan, checkpointing: bool) -> None:
    answers = []
    for casts_ahead in (False, True):
        with compile_flags(compiled):
            run = prepared(casts_ahead=casts_ahead, compiled=compiled, checkpointing=checkpointing)
            answers.append(two_steps(run))
            assert bool(run.train_step.casts.layers) is casts_ahead
    assert_same_bits(*answers)


class Casts(TorchDispatchMode):
    """Counts casts of weights one by one, and of all together."""

    def __init__(self, run: DryRun) -> None:
        super().__init__()
        layers = [module for module in run.train_step.model.modules() if isinstance(module, Linear)]
        self.weights = {layer.weight.data_ptr() for layer in layers}
        self.single = self.together = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default:
            self.single += args[0].data_ptr() in self.weights
        self.together += func is torch.ops.aten._foreach_copy_.default
        return func(*args, **(kwargs or {}))


def test_all_weights_are_cast_together_and_once_a_step() -> None:
    counts = []
    for casts_ahead in (False, True):
        run = prepared(casts_ahead=casts_ahead)
        with Casts(run) as casts:
            run.step()
        counts.append((casts.single, casts.together))
    # Two blocks of seven projections, three micro-batches, and all of it again for the backward pass.
    assert counts == [(2 * 7 * 3 * 2, 0), (0, 1)]


def test_what_a_hook_makes_of_the_weights_is_trained_on() -> None:
    answers = []
    for casts_ahead in (False, True):
        run = prepared(casts_ahead=casts_ahead)
        parameters = list(run.train_step.model.parameters())

        def shrink(index: int, batch: Batch, parameters: list[torch.nn.Parameter] = parameters) -> None:
            for parameter in parameters:
                parameter.data.mul_(0.5 + index)  # a change that torch does not count

        answers.append(two_steps(run, on_batch=shrink))
    assert_same_bits(*answers)


def test_a_hook_before_a_micro_batch_sees_the_weights_alone() -> None:
    run = prepared(casts_ahead=True)
    layers, seen = run.train_step.casts.layers, []
    run.step(on_batch=lambda *_: seen.extend(layer.cast_weight for layer in layers))
    assert len(seen) == 3 * 14
    assert set(seen) == {None} == {layer.cast_weight for layer in layers}


def test_a_step_that_fails_leaves_no_casts() -> None:
    run = prepared(casts_ahead=True)

    def fail(loss: torch.Tensor) -> None:
        raise ZeroDivisionError

    run.train_step.backward = fail
    with pytest.raises(ZeroDivisionError):
        run.step()
    assert {layer.cast_weight for layer in run.train_step.casts.layers} == {None}


@pytest.mark.parametrize("part", ["step", "loss"])
def test_weights_of_other_components_are_not_cast_ahead(part: str) -> None:
    def twice(batches: Sequence[Batch], backward: Backward) -> torch.Tensor:
        accumulate(batches, backward)
        return accumulate(batches, backward)

    step = prepared(casts_ahead=True).train_step
    if part == "loss":
        step = evolve(step, module=torch.nn.Sequential(step.model))
    else:
        step.renew(step.optimizer, step.wrapped, twice)
    assert step.casts.layers == []


@pytest.mark.parametrize("keeps", [False, True])
def test_kept_casts_are_at_one_place_in_all_steps(keeps: bool) -> None:
    """torch records a CUDA graph for the places that it reads. Without graphs the memory is free between steps."""
    casts = WeightCasts.of(prepared(casts_ahead=True).train_step.model, torch.bfloat16, keeps=keeps)
    layer, seen = casts.layers[0], []
    for _ in range(2):
        with casts.ahead():
            assert layer.cast_weight is not None
            assert torch.equal(layer.cast_weight, layer.weight.bfloat16())
            seen.append(weakref.ref(layer.cast_weight))
        with torch.no_grad():
            layer.weight.mul_(2.0)
    first, second = (reference() for reference in seen)
    assert first is second
    assert (first is not None) is keeps
