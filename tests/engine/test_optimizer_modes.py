"""Optimizers with weights for evaluation: what an evaluation sees, and that it leaves every bit as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from gpt_simple import Plugin, PluginError, TrainResult, hookimpl
from gpt_simple.engine.optimizer_modes import enter_train_mode, evaluation_weights, has_modes
from tests.children import stops_at
from tests.tiny import TinyRun, state_bytes, weights


class Averages(SGD):
    """SGD with a running average ``x`` of the weights, which are 1.0 in evaluation mode at the start."""

    def __init__(self, parameters: Any, lr: float = 0.1) -> None:
        super().__init__(parameters, lr=lr)
        self.mode, self.buffer = "", torch.zeros(3)
        for group in self.param_groups:
            group["evaluations"] = 0
            for parameter in group["params"]:
                self.state[parameter]["x"] = torch.ones_like(parameter)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert self.mode == "train"
        super().step()
        for parameter in self.parameters():
            with torch.no_grad():
                self.state[parameter]["x"].lerp_(parameter, 0.3)

    def parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def train(self) -> None:
        if self.mode == "eval":
            self.exchange(back=True)
        self.mode = "train"

    def eval(self) -> None:
        if self.mode == "train":
            self.exchange(back=False)
        self.mode = "eval"

    def exchange(self, back: bool) -> None:
        raise NotImplementedError


class Rounds(Averages):
    """As schedule-free optimizers: there and back again rounds."""

    def exchange(self, back: bool) -> None:
        for parameter in self.parameters():
            x = self.state[parameter]["x"]
            parameter.data.mul_(0.1).add_(x, alpha=0.9) if not back else parameter.data.sub_(x, alpha=0.9).div_(0.1)


class Exchanges(Averages):
    """The average and the weights change places, and a moment of the state is lost."""

    def exchange(self, back: bool) -> None:
        for parameter in self.parameters():
            state = self.state[parameter]
            kept = parameter.data.clone()
            parameter.data.copy_(state["x"])
            state["x"].copy_(kept).mul_(1.1)


class ExchangesMany(Averages):
    """As ``Rounds``, in one operation on many tensors."""

    def exchange(self, back: bool) -> None:
        averages = [self.state[parameter]["x"] for parameter in self.parameters()]
        torch._foreach_lerp_([p.data for p in self.parameters()], averages, 0.9 if not back else -9.0)


class ExchangesMemory(Averages):
    """The parameter gets other memory."""

    def exchange(self, back: bool) -> None:
        for parameter in self.parameters():
            state = self.state[parameter]
            parameter.data, state["x"] = state["x"].clone(), parameter.data


class TakesOtherMemory(Averages):
    """The parameter does not get its own memory back."""

    def exchange(self, back: bool) -> None:
        for parameter in self.parameters():
            parameter.data = self.state[parameter]["x"].clone()


class WritesElsewhere(Averages):
    """Options, attributes, and state that did not exist before."""

    def exchange(self, back: bool) -> None:
        self.buffer += 1
        for group in self.param_groups:
            group["evaluations"] += 1
        for parameter in self.parameters():
            self.state[parameter]["seen"] = 1
            parameter.data.copy_(self.state[parameter]["x"])
        self.state["global"] = {"n": 1}  # type: ignore[index]


class Inside(Averages):
    """Another optimizer inside has the state."""

    def __init__(self, parameters: Any, lr: float = 0.1) -> None:
        super().__init__(parameters, lr)
        self.inner = Exchanges(self.parameters(), lr)

    def exchange(self, back: bool) -> None:
        self.inner.exchange(back)


class Holder:
    """No optimizer, and it holds one."""

    def __init__(self, base: Averages) -> None:
        self.base = base


class Wraps(Averages):
    """Groups and state are those of another optimizer, which hides in an object."""

    def __init__(self, parameters: Any, lr: float = 0.1) -> None:
        self.holder, self.mode, self.buffer = Holder(Exchanges(parameters, lr)), "", torch.zeros(3)

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.holder.base.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.holder.base.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.holder.base.mode = "train"
        self.holder.base.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.holder.base.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return self.holder.base.state_dict()

    def exchange(self, back: bool) -> None:
        self.holder.base.exchange(back)


KINDS: tuple[type[Averages], ...] = (
    Rounds,
    Exchanges,
    ExchangesMany,
    ExchangesMemory,
    TakesOtherMemory,
    WritesElsewhere,
    Inside,
    Wraps,
)


def trained(kind: type[Averages]) -> tuple[torch.nn.Module, Averages]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 3))
    optimizer = kind(model.parameters())
    enter_train_mode(optimizer)
    for _ in range(3):
        model(torch.rand(2, 5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def everything(model: torch.nn.Module, optimizer: Averages) -> Any:
    """A copy of weights and state, with the address of each weight's memory."""
    values = model.state_dict(), optimizer.state_dict(), optimizer.buffer, getattr(optimizer, "inner", None)
    inner = values[3].state_dict() if values[3] is not None else None
    return copy.deepcopy((*values[:3], inner)), [parameter.data_ptr() for parameter in model.parameters()]


def leaves(value: Any) -> list[Any]:
    flat: list[Any] = torch.utils._pytree.tree_leaves(value)
    return [leaf.tolist() if isinstance(leaf, Tensor) else leaf for leaf in flat]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fails", [False, True])
def test_an_evaluation_leaves_every_bit_as_it_was(kind: type[Averages], fails: bool) -> None:
    model, optimizer = trained(kind)
    before = everything(model, optimizer)
    for _ in range(2):
        try:
            with evaluation_weights(optimizer):
                assert optimizer.mode == "eval"
                assert leaves(model.state_dict()) != leaves(before[0][0])
                if fails:
                    raise KeyError
        except KeyError:
            assert fails
    assert optimizer.mode == "train"
    after = everything(model, optimizer)
    assert leaves(after) == leaves(before)
    assert after[0][1].keys() == before[0][1].keys()


def test_an_optimizer_without_modes_is_left_alone() -> None:
    optimizer = SGD([torch.zeros(1)], lr=0.1)
    assert not has_modes(optimizer)
    with evaluation_weights(optimizer):
        enter_train_mode(optimizer)


def builds(make: Callable[[Any], Optimizer]) -> type[Plugin[Any]]:
    class Brings(Plugin[Any]):
        @classmethod
        @hookimpl
        def register_components(cls, registry: Any) -> None:
            registry.add("optimizer", "own", lambda model, config, device: make(model.parameters()))

    return Brings


def run(
    tiny: TinyRun, out: str, *plugins: Any, make: Callable[[Any], Optimizer] = Rounds, **options: Any
) -> TrainResult:
    return tiny(out, plugins=[builds(make), *plugins], optimizer__name="own", **options)


@pytest.mark.parametrize("kind", [Rounds, Exchanges])
def test_evaluations_change_no_bit_of_training(tiny: TinyRun, kind: type[Averages]) -> None:
    often: dict[str, Any] = {"training__eval_steps": 1, "training__save_steps": 1, "make": kind}
    plain = run(tiny, "plain", make=kind)
    assert state_bytes(run(tiny, "often", **often)) == state_bytes(plain)
    run(tiny, "parts", stops_at(3), **often)
    assert state_bytes(run(tiny, "parts", **often)) == state_bytes(plain)


def test_evaluations_have_the_weights_for_evaluation(tiny: TinyRun) -> None:
    """At the start they are 1.0, whatever the weights are that are trained."""
    seen: dict[str, bool] = {}

    class Reads(Plugin[Any]):
        on_error = "abort"

        @hookimpl
        def on_run_start(self, run: Any, event: Any) -> None:
            def ones() -> bool:
                return all(torch.allclose(p, torch.ones(()), atol=0.2) for p in run.model.parameters())

            seen["trained"] = ones()
            with run.evaluating():
                seen["evaluated"] = ones()
                run.generate("a", max_new_tokens=1)
                seen["after another one inside"] = ones()
            seen["again"] = ones()

    run(tiny, "run", Reads)
    assert seen == {"trained": False, "evaluated": True, "after another one inside": True, "again": False}


def test_a_checkpoint_has_the_weights_for_evaluation_too(tiny: TinyRun) -> None:
    from safetensors.torch import load_file

    from gpt_simple.job.model import restore
    from gpt_simple.run_dir.layout import RunDir

    result = run(tiny, "run", training__background_save=False)
    assert result.checkpoint_path is not None
    live, optimizer = weights(result), load_file(result.checkpoint_path / "optimizer.safetensors")
    saved = load_file(result.checkpoint_path / "weights-eval.safetensors")
    expected = {name: live[name] * 0.1 + optimizer[f"x.{name}"] * 0.9 for name in saved}
    for name, value in expected.items():
        torch.testing.assert_close(saved[name], value)
    model, _ = restore(RunDir(result.output_dir), torch.device("cpu"), plugins=())
    assert all(torch.equal(parameter, saved[name]) for name, parameter in model.named_parameters())
    plain = tiny("plain").checkpoint_path
    assert plain is not None
    assert not (plain / "weights-eval.safetensors").exists()


def test_a_mode_that_fails_names_the_optimizer(tiny: TinyRun) -> None:
    with pytest.raises(PluginError, match=r"optimizer 'own' of the plugin .* failed in eval: NotImplementedError"):
        run(tiny, "run", make=Averages, training__eval_steps=1)
