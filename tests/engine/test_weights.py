"""``run.weights``: other weights in place, one parameter at a time, and always the same bits back."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gpt_simple import Metric, Plugin, PluginError, hookimpl
from gpt_simple.engine.views import EvaluationAbandoned
from gpt_simple.engine.weights import OPEN, Exchange, paired, undo_exchanges
from gpt_simple.testing import train
from gpt_simple.testing.ranks import train_on_ranks
from tests.tiny import TinyRun, state_bytes

Weights = dict[str, Tensor]


class Tied(nn.Module):
    """Two names for one parameter, and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.body.bias.requires_grad_(False)


@pytest.fixture
def model() -> Tied:
    return Tied()


def others(model: nn.Module) -> Weights:
    return {name: torch.randn_like(parameter) for name, parameter in model.named_parameters()}


def copied(tensors: Mapping[str, Tensor]) -> Weights:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def current(model: nn.Module) -> Weights:
    return copied(dict(model.named_parameters()))


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def exchange(model: nn.Module, weights: Any) -> AbstractContextManager[None]:
    return Exchange(paired(model, weights))


def test_contents_are_exchanged_in_place_and_back(model: Tied) -> None:
    own, given = current(model), others(model)
    kept, places = copied(given), [parameter.data_ptr() for parameter in model.parameters()]
    with exchange(model, given):
        assert equal(current(model), kept)
        assert equal(given, own)
        assert [parameter.data_ptr() for parameter in model.parameters()] == places
        assert model.head.weight is model.embedding.weight
    assert equal(current(model), own)
    assert equal(given, kept)
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, True, False]


def test_not_a_number_and_signed_zero_come_back_as_they_were(model: Tied) -> None:
    with torch.no_grad():
        model.body.bias.copy_(torch.tensor([float("nan"), -0.0, float("inf"), 1e-45]))
    bits = model.body.bias.view(torch.int32).clone()
    with exchange(model, others(model)):
        pass
    assert torch.equal(model.body.bias.view(torch.int32), bits)


def test_a_tied_weight_may_be_given_under_any_of_its_names(model: Tied) -> None:
    given = others(model)
    given["head.weight"] = given.pop("embedding.weight")
    kept, own = copied(given), current(model)
    with exchange(model, given):
        assert torch.equal(model.embedding.weight, kept["head.weight"])
    assert equal(current(model), own)
    both = others(model) | {"head.weight": torch.zeros(5, 4)}
    with exchange(model, both):
        assert torch.equal(both["head.weight"], torch.zeros(5, 4))
    assert equal(current(model), own)


def by_exception(model: Tied, given: Weights) -> None:
    with suppress(ValueError), exchange(model, given):
        raise ValueError


def by_leaving(model: Tied, given: Weights) -> None:
    with suppress(EvaluationAbandoned), exchange(model, given):
        raise EvaluationAbandoned


def by_closing(model: Tied, given: Weights) -> None:
    def steps() -> Iterator[int]:
        with exchange(model, given):
            yield 1

    running = steps()
    next(running)
    running.close()  # type: ignore[attr-defined]


def by_dropping(model: Tied, given: Weights) -> None:
    def steps() -> Iterator[int]:
        with exchange(model, given):
            yield 1

    next(steps())
    gc.collect()


def by_nesting_the_same(model: Tied, given: Weights) -> None:
    kept, own = copied(given), current(model)
    with exchange(model, given):
        with exchange(model, given):
            assert equal(current(model), kept)
        assert equal(current(model), kept)
        with Exchange(()):
            assert equal(current(model), own)
        assert equal(current(model), kept)


def by_nesting_another(model: Tied, given: Weights) -> None:
    other = others(model)
    kept, own = copied(other), current(model)
    with exchange(model, given), exchange(model, other):
        assert equal(current(model), kept)
        assert equal(other, own)
    assert equal(other, kept)


def by_leaving_in_another_order(model: Tied, given: Weights) -> None:
    first, second = exchange(model, given), exchange(model, other := others(model))
    kept = copied(other)
    with ExitStack() as stack:
        stack.enter_context(first)
        second.__enter__()
        stack.close()
        assert equal(current(model), kept)
        second.__exit__(None, None, None)


def by_undoing(model: Tied, given: Weights) -> None:
    left = exchange(model, given)
    left.__enter__()
    assert undo_exchanges(0)
    left.__exit__(None, None, None)  # of a generator that is collected later


ENDS: list[Callable[[Tied, Weights], None]] = [
    by_exception,
    by_leaving,
    by_closing,
    by_dropping,
    by_nesting_the_same,
    by_nesting_another,
    by_leaving_in_another_order,
    by_undoing,
]


@pytest.mark.parametrize("end", ENDS)
def test_however_it_ends_everything_is_back(end: Callable[[Tied, Weights], None], model: Tied) -> None:
    given = others(model)
    own, kept = current(model), copied(given)
    end(model, given)
    assert equal(current(model), own)
    assert equal(given, kept)
    assert not OPEN


class Interrupting(TorchDispatchMode):
    """Ctrl-C just before or just after the given copy."""

    def __init__(self, at: int, *, after: bool) -> None:
        super().__init__()
        self.left, self.after = at, after

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == 0 and not self.after:
            signal.raise_signal(signal.SIGINT)
        result = function(*args, **(kwargs or {}))
        if self.left == 0 and self.after:
            signal.raise_signal(signal.SIGINT)
        return result


@pytest.mark.parametrize("after", [False, True])
def test_an_interrupt_in_the_middle_of_an_exchange_is_undone(model: Tied, after: bool) -> None:
    given = others(model)
    own, kept = current(model), copied(given)
    interrupted = 0
    for at in range(1, 60):
        try:
            with Interrupting(at, after=after), exchange(model, given):
                pass
        except KeyboardInterrupt:
            interrupted += 1
            undo_exchanges(0)  # as the guard does around a plugin's hook
        assert equal(current(model), own)
        assert equal(given, kept)
    assert interrupted >= 2 * 3 * 3  # three copies for each of three parameters, there and back


class Storages(TorchDispatchMode):
    """The most bytes of results of operations that are alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        import weakref

        result = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten._to_copy.default, torch.ops.aten.clone.default):
            storage = result.untyped_storage()
            key = storage.data_ptr()
            self.alive[key] = storage.nbytes()
            weakref.finalize(result, self.alive.pop, key, None)
            self.most = max(self.most, sum(self.alive.values()))
        return result


def test_an_exchange_takes_the_memory_of_one_parameter() -> None:
    model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(8)))
    given = others(model)
    with Storages() as storages, exchange(model, given):
        pass
    assert storages.most == 32 * 32 * 4


UNFIT: dict[str, tuple[Callable[[Weights], Any], str]] = {
    "a list": (lambda given: list(given), "expected a mapping of parameter names to tensors"),
    "an unknown name": (lambda given: given | {"extra": torch.ones(1)}, "extra: the model has no parameter"),
    "a missing name": (lambda given: {n: t for n, t in given.items() if n != "body.bias"}, "body.bias: missing"),
    "a shape": (
        lambda given: given | {"body.bias": torch.ones(5)},
        r"body.bias: \[5\] float32; the parameter is \[4\] float32",
    ),
    "a dtype": (lambda given: given | {"body.bias": torch.ones(4).half()}, r"body.bias: \[4\] float16; the parameter"),
    "a number": (lambda given: given | {"body.bias": 1.0}, "body.bias: a float; expected a tensor"),
    "nothing": (lambda given: given | {"body.bias": None}, "body.bias: a NoneType; expected a tensor"),
    "on meta": (lambda given: given | {"body.bias": torch.ones(4, device="meta")}, "body.bias: .*on meta"),
    "sparse": (lambda given: given | {"body.bias": torch.ones(4).to_sparse()}, "body.bias: .*sparse_coo"),
    "expanded": (lambda given: given | {"body.bias": torch.ones(1).expand(4)}, "body.bias: an expanded tensor"),
    "shared": (
        lambda given: given | {"body.bias": given["body.weight"][0]},
        "body.bias: shares its memory with body.weight",
    ),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_what_does_not_fit_is_refused_before_any_exchange(kind: str, model: Tied) -> None:
    make, message = UNFIT[kind]
    own = current(model)
    with pytest.raises(PluginError, match=message):
        exchange(model, make(others(model)))
    assert equal(current(model), own)


def test_an_error_names_all_that_does_not_fit(model: Tied) -> None:
    with torch.inference_mode():
        made = torch.ones(4)
    with pytest.raises(PluginError) as caught:
        exchange(model, {"extra": 1, "body.weight": torch.ones(2), "body.bias": made})
    lines = str(caught.value).splitlines()
    assert lines[1:] == [
        "  extra: the model has no parameter of this name",
        "  embedding.weight: missing",
        "  body.weight: [2] float32; the parameter is [4, 4] float32",
        "  body.bias: made in inference mode, so it cannot be changed outside of it",
    ]


def test_casts_of_the_weights_before_are_not_used_again(model: Tied) -> None:
    inputs, given = torch.ones(1, 4), others(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model.body(inputs)
        with exchange(model, given):
            inside = model.body(inputs)
        after = model.body(inputs)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(after, model.body(inputs))
        assert not torch.equal(after, inside)


def test_compiled_code_uses_the_weights_that_are_there(model: Tied) -> None:
    compiled = torch.compile(model.body, backend="aot_eager")
    inputs, given = torch.ones(1, 4), others(model)
    before = compiled(inputs)
    with exchange(model, given):
        assert torch.equal(compiled(inputs), model.body(inputs))
    assert torch.equal(compiled(inputs), before)


SHARDED = """
import torch
from torch import distributed, nn
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

from gpt_simple import PluginError
from gpt_simple.engine.weights import Exchange, WeightWatch, paired

distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
model = nn.Linear(4, 4)
for name, parameter in list(model.named_parameters()):
    setattr(model, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)])))
given = {name: torch.ones_like(parameter) for name, parameter in model.named_parameters()}
own = {name: parameter.full_tensor().clone() for name, parameter in model.named_parameters()}
with Exchange(paired(model, given)):
    assert all(bool((parameter.full_tensor() == 1).all()) for parameter in model.parameters())
assert all(torch.equal(parameter.full_tensor(), own[name]) for name, parameter in model.named_parameters())
try:
    paired(model, {**given, "bias": torch.ones(4)})
except PluginError as error:
    assert "bias: [4] float32; the parameter is [4] float32 (Shard(dim=0),)" in str(error), error
else:
    raise AssertionError("an unsharded tensor was accepted")
run, watch = type("Run", (), {"raw": model, "step": 0}), WeightWatch()
watch.start(run)
watch.mark()
assert not watch.changed()
model.bias.data.add_(1)
assert watch.changed()
distributed.destroy_process_group()
"""


def test_parameters_sharded_over_processes_are_exchanged_too() -> None:
    ended = subprocess.run([sys.executable, "-c", SHARDED], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


class Everywhere(Plugin[Any]):
    """A plugin of a test: whatever goes wrong in it ends the run."""

    ranks = "all"
    on_error = "abort"

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)


class Averages(Everywhere):
    """Keeps an average, and evaluates it at each step while hooks on gradients are there."""

    @hookimpl
    def on_run_start(self, run: Any, event: Any) -> None:
        self.average = copied(dict(run.model.named_parameters()))
        self.seen = 0
        for parameter in run.model.parameters():
            parameter.register_post_accumulate_grad_hook(self._count)

    def _count(self, parameter: Tensor) -> None:
        self.seen += 1

    @hookimpl
    def on_step_end(self, run: Any, event: Any) -> None:
        for name, parameter in run.model.named_parameters():
            self.average[name].lerp_(parameter.detach(), 0.1)
        run.control.evaluate("each step")

    @hookimpl
    def evaluate(self, run: Any, event: Any) -> dict[str, Metric]:
        with run.weights(self.average):
            nats = sum(run.loss(batch) for batch in run.val_batches(1))
        return {"eval/average_nats": Metric(nats)}

    @hookimpl
    def on_eval_end(self, run: Any, event: Any) -> None:
        with run.weights(self.average):
            run.generate("a", max_new_tokens=2)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_training_goes_on_as_if_nothing_had_been_exchanged(tiny: TinyRun, dropout: float) -> None:
    plain = tiny("plain", model__dropout=dropout)
    busy = tiny("busy", model__dropout=dropout, plugins=[Averages()])
    assert state_bytes(busy) == state_bytes(plain)


def test_training_on_two_processes_is_not_changed_either() -> None:
    def trained(*plugins: Any) -> set[str]:
        outcomes = train_on_ranks(*plugins)
        assert not any(outcome.error for outcome in outcomes)
        return {outcome.weights for outcome in outcomes}

    assert trained() == trained(Averages)


def entered(run: Any, weights: Weights) -> None:
    run.weights(weights).__enter__()


def failing(run: Any, weights: Weights) -> None:
    run.weights(weights).__enter__()
    raise ValueError("in the middle")


def leaves_open(act: Callable[[Any, Weights], None], hook: str) -> type[Plugin[Any]]:
    """Enters an exchange in a hook, or in a plain method, and does not leave it."""

    class LeavesOpen(Plugin[Any]):
        @hookimpl
        def on_run_start(self, run: Any, event: Any) -> None:
            self.run, self.given = run, {n: torch.zeros_like(p) for n, p in run.model.named_parameters()}

        @hookimpl
        def on_step_end(self, run: Any, event: Any) -> None:
            self._act("on_step_end")

        @hookimpl
        def on_eval_end(self, run: Any, event: Any) -> None:
            self._act("on_eval_end")

        @hookimpl
        def on_metrics(self, run: Any, event: Any) -> None:
            self._act("on_metrics")

        def state_dict(self) -> dict[str, Any]:
            self._act("state_dict")
            return {}

        def _act(self, name: str) -> None:
            if name == hook:
                act(self.run, self.given)

    return LeavesOpen


@pytest.mark.parametrize("hook", ["on_step_end", "on_metrics", "on_eval_end", "state_dict"])
@pytest.mark.parametrize("act", [entered, failing])
def test_an_exchange_that_is_left_open_is_the_plugins_failure(act: Callable[[Any, Weights], None], hook: str) -> None:
    plain, trained = train(), train(leaves_open(act, hook))
    assert trained.failed == ["leavesopen"]
    assert equal(trained.weights, plain.weights)
    (message,) = [event.message for event in trained.recorder.events("on_log") if event.name == "plugin_failed"]
    expected = "other weights in the model (run.weights was entered and not left)"
    assert (expected if act is entered else "in the middle") in message
    assert f"failed in {hook}" in message
    assert not OPEN


def test_there_are_no_weights_before_a_run_starts() -> None:
    class TooEarly(Everywhere):
        @hookimpl
        def on_model_built(self, run: Any, event: Any) -> None:
            run.weights({})

    with pytest.raises(PluginError, match=r"run\.weights does not exist yet: it is there from on_run_start on"):
        train(TooEarly)


def test_an_unknown_name_lists_those_there_are() -> None:
    class Asks(Everywhere):
        @hookimpl
        def on_run_start(self, run: Any, event: Any) -> None:
            with run.weights("live"):
                run.weights("emma")

    with pytest.raises(PluginError, match=r"no weights of the name 'emma'.*expected one of live"):
        train(Asks)
