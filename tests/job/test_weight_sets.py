"""Sets of weights that plugins keep: in every checkpoint, back after a resume, evaluated and sampled by their names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import frozen
from safetensors.torch import load_file
from torch import Tensor

from gpt_simple import CheckpointError, ConfigError, Metric, Plugin, PluginError, hookimpl
from gpt_simple.checkpoint.store import Checkpoint, Store
from gpt_simple.job.model import restore
from gpt_simple.plugin_host.lint import lint
from gpt_simple.run_dir.layout import RunDir
from gpt_simple.testing import Trained, train
from gpt_simple.testing.ranks import train_on_ranks
from tests.children import stops_at
from tests.conftest import Shell

CPU = torch.device("cpu")


class Average(Plugin[Any]):
    """The mean of all weights so far."""

    ranks = "all"
    set_name = "mean"

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.tensors: dict[str, Tensor] = {}
        self.restored: tuple[str, ...] | None = None
        self.values: dict[str, Tensor] = {}

    @hookimpl
    def on_model_built(self, run: Any, event: Any) -> None:
        self.tensors = {name: torch.full_like(p, torch.nan) for name, p in event.model.named_parameters()}

    @hookimpl
    def on_checkpoint_loaded(self, run: Any, event: Any) -> None:
        self.restored = event.weight_sets
        self.values = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}

    @hookimpl
    def on_run_start(self, run: Any, event: Any) -> None:
        if not self.restored:
            self._update(run, 1.0)

    @hookimpl
    def on_step_end(self, run: Any, event: Any) -> None:
        self._update(run, 1 / (event.step + 1))

    @torch.no_grad()
    def _update(self, run: Any, weight: float) -> None:
        for name, parameter in run.model.named_parameters():
            self.tensors[name].copy_(
                self.tensors[name] * (1 - weight) + parameter * weight if weight < 1 else parameter
            )

    def weight_sets(self) -> Mapping[str, Mapping[str, Tensor]]:
        return {self.set_name: self.tensors}


def newest(out: Path) -> Path:
    return sorted((out / "checkpoints").glob("step-*"))[-1]


def saved(out: Path, name: str = "mean") -> dict[str, Tensor]:
    return load_file(newest(out) / f"weights-{name}.safetensors")


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def warnings(trained: Trained) -> list[str]:
    return [event.message for event in trained.recorder.events("on_log") if event.name == "weights_left_out"]


@pytest.mark.parametrize("background", [False, True])
def test_a_set_is_in_every_checkpoint_and_comes_back(tmp_path: Path, background: bool) -> None:
    options: dict[str, Any] = {"overrides": {"training.background_save": background, "training.save_steps": 1}}
    whole = Average()
    train(whole, output_dir=tmp_path / "whole", max_steps=5, **options)
    train(Average(), stops_at(2), output_dir=tmp_path / "parts", max_steps=5, **options)
    path, before = newest(tmp_path / "parts"), saved(tmp_path / "parts")
    Store(path.parent).verify(Checkpoint.open(path))
    manifest = json.loads((path / "MANIFEST.json").read_text())
    layouts = manifest["files"]["weights-mean.safetensors"]["tensors"]
    assert layouts.keys() == before.keys() == {name for name, _ in whole.tensors.items()}
    rest = Average()
    train(rest, output_dir=tmp_path / "parts", max_steps=5, **options)
    assert rest.restored == ("mean",)
    assert equal(rest.values, before)  # before on_checkpoint_loaded
    assert equal(saved(tmp_path / "parts"), saved(tmp_path / "whole"))
    assert equal(saved(tmp_path / "whole"), whole.tensors)


def test_a_flipped_bit_in_a_set_is_found(tmp_path: Path) -> None:
    train(Average(), stops_at(2), output_dir=tmp_path, max_steps=4)
    path = newest(tmp_path) / "weights-mean.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"weights-mean\.safetensors is damaged: its SHA-256"):
        train(Average(), output_dir=tmp_path, max_steps=4)


def test_two_processes_restore_it_to_the_bit(tmp_path: Path) -> None:
    def run(out: str, *plugins: Any) -> None:
        outcomes = train_on_ranks(Average, *plugins, output_dir=tmp_path / out, max_steps=4)
        assert not any(outcome.error for outcome in outcomes)

    run("whole")
    run("parts", stops_at(2))
    run("parts")
    assert equal(saved(tmp_path / "parts"), saved(tmp_path / "whole"))


def test_a_plugin_that_is_added_later_makes_its_own_set(tmp_path: Path) -> None:
    train(stops_at(2), output_dir=tmp_path, max_steps=4)
    added = Average()
    train(added, output_dir=tmp_path, max_steps=4)
    assert added.restored == ()
    assert not any(tensor.isnan().any() for tensor in saved(tmp_path).values())


def test_a_set_without_its_plugin_is_left_behind_with_a_note(tmp_path: Path) -> None:
    train(Average(), stops_at(2), output_dir=tmp_path, max_steps=4)
    without = train(output_dir=tmp_path, max_steps=4)
    assert warnings(without) == [
        "no plugin here keeps the weights 'mean' of step-00000002: later checkpoints will not have them"
    ]
    assert not (newest(tmp_path) / "weights-mean.safetensors").exists()
    assert "average" not in json.loads((newest(tmp_path) / "plugins.json").read_text())


def test_a_set_that_is_required_is_not_left_behind(tmp_path: Path) -> None:
    required = type("Average", (Average,), {"state_required": True})
    train(required(), stops_at(2), output_dir=tmp_path, max_steps=4)
    with pytest.raises(CheckpointError, match="holds state of plugin 'average', without which the run must not go on"):
        train(output_dir=tmp_path, max_steps=4)


def test_a_run_without_sets_has_the_files_that_it_had(tmp_path: Path) -> None:
    train(output_dir=tmp_path)
    assert sorted(path.name for path in newest(tmp_path).iterdir()) == [
        "MANIFEST.json",
        "model.safetensors",
        "optimizer.safetensors",
        "plugins.json",
        "plugins.safetensors",
        "state.json",
    ]


def broken(**made: Any) -> type[Plugin[Any]]:
    """The set, with some tensors replaced when it is asked for."""

    def weight_sets(self: Any) -> Any:
        return {"mean": {**self.tensors, **made}}

    return type("Broken", (Average,), {"weight_sets": weight_sets})


def returning(value: Any) -> type[Plugin[Any]]:
    return type("Returning", (Average,), {"weight_sets": lambda self: value(self)})


def late(self: Any) -> Any:
    self.asked = getattr(self, "asked", 0) + 1
    return {"mean": self.tensors} if self.asked > 1 else {}


MISTAKES: dict[str, tuple[type[Plugin[Any]], str]] = {
    "no mapping": (returning(lambda self: [1]), "it returned a list; expected a mapping of names to sets"),
    "upper case": (returning(lambda self: {"Mean": self.tensors}), "weights of the name 'Mean'.*lower-case"),
    "a path": (returning(lambda self: {"a/b": self.tensors}), "weights of the name 'a/b'"),
    "a number": (returning(lambda self: {1: self.tensors}), "weights of the name 1"),
    "live": (returning(lambda self: {"live": self.tensors}), "weights of the name 'live'.*and not live"),
    "no tensors": (returning(lambda self: {"mean": {}}), "its weights 'mean': .*missing"),
    "no set": (returning(lambda self: {"mean": None}), "its weights 'mean': expected a mapping of parameter names"),
    "another shape": (broken(**{"norm.weight": torch.ones(3)}), r"norm.weight: \[3\] float32"),
    "an unknown name": (broken(extra=torch.ones(3)), "extra: the model has no parameter of this name"),
    "made too late": (returning(late), "has the weights mean now, and had none when the run was built.*on_model_built"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_set_that_does_not_fit_is_the_plugins_failure(mistake: str) -> None:
    plugin, message = MISTAKES[mistake]
    with pytest.raises(PluginError, match=f"(?s)plugin {plugin.__name__.lower()} .*failed in weight_sets: .*{message}"):
        train(plugin)


def test_two_plugins_cannot_have_one_name() -> None:
    with pytest.raises(PluginError, match=r"plugins average \(.*\) and second \(.*\) both have weights .* 'mean'"):
        train(Average, type("Second", (Average,), {}))


def test_sets_need_a_plugin_of_all_processes() -> None:
    mistakes = lint(type("Mine", (Average,), {"ranks": "main"}))
    assert [str(mistake) for mistake in mistakes] == ['weight_sets is called on every process; write ranks = "all"']


def test_another_shape_in_the_checkpoint_is_an_error(tmp_path: Path) -> None:
    train(Average(), stops_at(2), output_dir=tmp_path, max_steps=4)
    path = newest(tmp_path)
    store, checkpoint = Store(path.parent), Checkpoint.open(path)
    groups = {stem: store.load_tensors(checkpoint, stem) for stem in ("model", "optimizer", "plugins")}
    other = saved(tmp_path) | {"norm.weight": torch.ones(3)}
    documents = {stem: store.load_document(checkpoint, stem) for stem in ("state", "plugins")}
    store.publish(2, tensors={**groups, "weights-mean": other}, documents=documents)
    with pytest.raises(CheckpointError, match=r"'mean' do not fit .*\n  norm.weight: checkpoint \[3\]"):
        train(Average(), output_dir=tmp_path, max_steps=4)


class EvaluatesAlone(Plugin[Any]):
    """The loss of the set, computed by hand."""

    ranks = "all"
    after = ("average",)

    @hookimpl
    def evaluate(self, run: Any, event: Any) -> dict[str, Metric]:
        own = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
        average = next(plugin for plugin in AVERAGES if plugin.tensors)
        metrics = {}
        for name, tensors in (("mean", average.tensors), ("live", own)):
            run.model.load_state_dict(tensors, strict=False)
            nats = targets = 0
            for batch in run.val_batches(1):
                nats, targets = nats + run.loss(batch), targets + batch.targets
            metrics[f"hand/{name}"] = Metric(nats / targets)
        run.model.load_state_dict(own, strict=False)
        return metrics


AVERAGES: list[Average] = []


@pytest.mark.parametrize("names", [("live", "mean"), ("mean", "live"), ("mean",)])
def test_evaluations_are_of_the_weights_that_are_named(names: tuple[str, ...]) -> None:
    AVERAGES[:] = [Average()]
    trained = train(AVERAGES[0], EvaluatesAlone, overrides={"plugins.evaluate.weights": names}, max_steps=4)
    evaluations = [event.metrics for event in trained.recorder.events("on_eval_end")]
    assert len(evaluations) == 2
    for metrics in evaluations:
        assert metrics["eval/loss"] == pytest.approx(metrics[f"hand/{names[0]}"])
        for name in names[1:]:
            assert metrics[f"eval/{name}/loss"] == pytest.approx(metrics[f"hand/{name}"])
            assert f"eval/{name}/bits_per_byte" in metrics
        assert f"eval/{names[0]}/loss" not in metrics
        assert metrics["hand/mean"] != metrics["hand/live"]
    assert trained.result.best_val_loss == min(metrics["eval/loss"] for metrics in evaluations)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "expected one or more names of weights, each once; found none"),
        (("live", "live"), "each once; found live, live"),
        (("emma",), "no weights of the name 'emma'; expected one of live, mean"),
    ],
)
def test_names_that_cannot_be_evaluated_end_the_run_early(names: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        train(Average, overrides={"plugins.evaluate.weights": names}, output_dir=tmp_path)
    assert not (tmp_path / "checkpoints").exists() or not list((tmp_path / "checkpoints").glob("step-*"))


@frozen
class UsesConfig:
    several: tuple[str, ...] = ("mean", "live")
    one: str = "mean"


class Uses(Plugin[UsesConfig]):
    """Another plugin with options that name weights, on the main process alone."""

    Config = UsesConfig

    def used_weights(self) -> Mapping[str, str | Sequence[str]]:
        return {"several": self.config.several, "one": self.config.one}


def test_names_that_are_there_are_accepted() -> None:
    assert not train(Average, Uses).failed


def test_every_unknown_name_is_reported_with_its_option() -> None:
    wrong = {"plugins.evaluate.weights": ["meam"], "plugins.uses.several": ["mean", "x"], "plugins.uses.one": "Live"}
    with pytest.raises(ConfigError) as raised:
        train(Average, Uses, overrides=wrong)
    hint = "expected one of live, mean; others come with the plugin that keeps them"
    assert [(problem.key, problem.message) for problem in raised.value.problems] == [
        ("plugins.evaluate.weights", "there are no weights of the name 'meam' (did you mean 'mean'?)"),
        ("plugins.uses.several", "there are no weights of the name 'x'"),
        ("plugins.uses.one", "there are no weights of the name 'Live' (did you mean 'live'?)"),
    ]
    assert {problem.hint for problem in raised.value.problems} == {hint}
    assert {problem.location for problem in raised.value.problems} == {"train(...)"}


@pytest.mark.parametrize("used", [["weights"], lambda: None])
def test_a_wrong_declaration_is_the_plugins_failure(used: Any) -> None:
    plugin = type("Wrong", (Uses,), {"used_weights": lambda self: used, "on_error": "abort"})
    with pytest.raises(PluginError, match=r"plugin wrong .*failed in used_weights: .*expected a mapping of options"):
        train(plugin)


def test_an_unknown_name_leaves_the_run_that_is_there(here: Path, shell: Shell) -> None:
    assert shell("run", "config.toml").code == 0
    record = (here / "out/run.json").read_bytes()
    with (here / "config.toml").open("a") as file:
        file.write('\n[plugins.evaluate]\nweights = ["liv"]\n')
    line = len((here / "config.toml").read_text().splitlines())
    refused = shell("run", "config.toml", "--force")
    assert refused.code == 2
    assert f"config.toml:{line}: plugins.evaluate.weights: there are no weights of the name 'liv'" in refused.err
    assert "(did you mean 'live'?); expected one of live" in refused.err
    assert (here / "out/run.json").read_bytes() == record
    assert newest(here / "out").exists()


def test_a_model_can_be_restored_with_a_set(tmp_path: Path) -> None:
    train(Average, output_dir=tmp_path)
    model, _ = restore(RunDir(tmp_path), CPU, weights="mean")
    live, _ = restore(RunDir(tmp_path), CPU)
    assert equal(dict(model.named_parameters()), saved(tmp_path))
    assert not equal(dict(live.named_parameters()), saved(tmp_path))
    with pytest.raises(CheckpointError, match=r"no weights of the name 'men' \(did you mean 'mean'\?\); expected"):
        restore(RunDir(tmp_path), CPU, weights="men")


def test_a_set_can_be_sampled(tmp_path: Path, shell: Shell) -> None:
    train(Average, output_dir=tmp_path / "run", overrides={"optimizer.learning_rate": 0.3}, max_steps=8)
    options = ("sample", str(tmp_path / "run"), "--temperature", "0", "--tokens", "30", "--prompt", "a")
    live, mean = shell(*options), shell(*options, "--weights", "mean")
    assert (live.code, mean.code) == (0, 0), mean.err
    assert shell(*options, "--weights", "live").out == live.out != mean.out
    unknown = shell(*options, "--weights", "emma")
    assert unknown.code == 4
    assert "has no weights of the name 'emma'" in unknown.err
    assert "expected one of live, mean" in unknown.err
