"""The optimizer follows the paper, keeps the contract, and an evaluation at the average changes no bit of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gpt_simple_schedule_free import ScheduleFree
from gpt_simple_schedule_free.optimizer import ScheduleFreeAdamW
from safetensors.torch import load_file

from gpt_simple import ConfigError, Plugin, hookimpl
from gpt_simple.testing import Trained, check_contract, train, train_on_ranks

OVERRIDES: dict[str, Any] = {"optimizer.name": "schedule_free"}


def run(*plugins: type[Plugin[Any]], output_dir: Path | None = None, max_steps: int = 4, **options: Any) -> Trained:
    overrides = OVERRIDES | {f"training.{key}": value for key, value in options.items()}
    return train(ScheduleFree, *plugins, output_dir=output_dir, max_steps=max_steps, overrides=overrides)


def equal(one: Trained, other: Trained) -> bool:
    return all(torch.equal(tensor, other.weights[name]) for name, tensor in one.weights.items())


def test_keeps_the_contract() -> None:
    check_contract(ScheduleFree, overrides=OVERRIDES, observes=False)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_equals_the_algorithm_of_the_paper(decay: float) -> None:
    """With x, y and z apart, a warm-up of three steps, and a gradient that depends on y."""
    torch.manual_seed(0)
    beta1, beta2, eps, peak = 0.9, 0.99, 1e-8, 0.1
    target = torch.randn(5, 3, dtype=torch.float64)
    parameter = torch.nn.Parameter(torch.randn(5, 3, dtype=torch.float64))
    optimizer = ScheduleFreeAdamW([{"params": [parameter], "weight_decay": decay}], peak, (beta1, beta2), eps)
    x = z = parameter.detach().clone()
    v, total = torch.zeros_like(x), 0.0
    for step in range(1, 21):
        y = (1 - beta1) * z + beta1 * x
        torch.testing.assert_close(parameter.detach(), y, rtol=0, atol=1e-12)
        gradient = (y - target) ** 3
        v = beta2 * v + (1 - beta2) * gradient**2
        warm_up = min(1.0, step / 3)
        rate = peak * warm_up * (1 - beta2**step) ** 0.5
        z = z - rate * gradient / (v.sqrt() + eps) - rate * decay * y
        total += rate**2
        x = (1 - rate**2 / total) * x + rate**2 / total * z
        parameter.grad = (parameter.detach() - target) ** 3
        optimizer.param_groups[0]["lr"] = peak * warm_up
        optimizer.step()
        optimizer.eval()
        torch.testing.assert_close(parameter.detach(), x, rtol=0, atol=1e-12)
        optimizer.train()


def test_a_step_in_eval_mode_is_refused() -> None:
    optimizer = ScheduleFreeAdamW([torch.nn.Parameter(torch.ones(2))], 0.1, (0.9, 0.99))
    optimizer.eval()
    with pytest.raises(RuntimeError, match="in eval mode"):
        optimizer.step()


def test_evaluations_change_no_bit_of_training() -> None:
    assert equal(run(eval_steps=1, save_steps=1), run(eval_steps=None, save_steps=None))


def test_evaluations_and_checkpoints_have_the_average(tmp_path: Path) -> None:
    seen = {}

    class Reads(Plugin[Any]):
        on_error = "abort"

        @hookimpl
        def on_run_end(self, run: Any) -> None:  # type: ignore[override]
            with run.evaluating():
                seen.update({name: p.detach().clone() for name, p in run.model.named_parameters()})

    trained = run(Reads, output_dir=tmp_path)
    folder = tmp_path / "checkpoints" / "step-00000004"
    saved, z = load_file(folder / "weights-eval.safetensors"), load_file(folder / "optimizer.safetensors")
    assert saved.keys() == seen.keys()
    for name, average in saved.items():
        assert torch.equal(average, seen[name])
        torch.testing.assert_close(0.1 * z[f"z.{name}"] + 0.9 * average, trained.weights[name])
    assert any(not torch.equal(average, trained.weights[name]) for name, average in saved.items())


class Thaws(Plugin[Any]):
    """The embedding is trained from after step 2 on."""

    ranks = "all"

    @hookimpl
    def on_model_built(self, event: Any) -> None:  # type: ignore[override]
        event.model.token_embedding.weight.requires_grad_(False)

    @hookimpl
    def on_step_end(self, run: Any, event: Any) -> None:
        if event.step == 2:
            run.model.token_embedding.weight.requires_grad_(True)
            run.control.rebuild_optimizer("the embedding is trained")


def test_parameters_that_are_unfrozen_begin_their_own_average(tmp_path: Path) -> None:
    run(Thaws, output_dir=tmp_path)
    state = json.loads((tmp_path / "checkpoints" / "step-00000004" / "state.json").read_text())
    steps = {name: record["values"]["step"] for name, record in state["optimizer"]["parameters"].items()}
    assert steps.pop("token_embedding.weight") == 2
    assert set(steps.values()) == {4}


def test_two_processes_have_the_same_weights() -> None:
    outcomes = train_on_ranks(ScheduleFree, Thaws, overrides={**OVERRIDES, "training.eval_steps": 1})
    assert [outcome.error for outcome in outcomes] == ["", ""]
    assert len({outcome.weights for outcome in outcomes}) == 1


def test_a_schedule_that_decays_is_warned_of() -> None:
    trained = train(ScheduleFree, overrides={**OVERRIDES, "optimizer.schedule": "cosine"})
    (message,) = [e.message for e in trained.recorder.events("on_log") if e.name == "schedule-not-free"]
    assert 'set it to "constant"' in message


def test_beta1_of_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="beta1"):
        train(ScheduleFree, overrides={**OVERRIDES, "optimizer.beta1": 0.0})
