"""A later version has more fields and other defaults. Runs that this version began keep their values."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from attrs import field, frozen
from typing_extensions import Doc

from gpt_simple import (
    Config,
    ConfigError,
    DataConfig,
    LegacyDefault,
    ModelConfig,
    OptimizerConfig,
    PluginsConfig,
    TrainingConfig,
)
from gpt_simple.config import structure
from gpt_simple.config.schema import Phase
from gpt_simple.engine.compatibility import flatten, keep_values, with_legacy_options, with_legacy_values
from gpt_simple.hooks import components
from gpt_simple.job.model import restore
from gpt_simple.run_dir.layout import RunDir
from gpt_simple.spec import resolve_spec
from tests.compatibility.make_example import PLUGIN, outcome
from tests.conftest import Ended, Shell

KEPT = Path(__file__).with_name("v0_1_0")


@frozen
class LaterModel(ModelConfig):
    norm_eps: Annotated[float, Doc("another default")] = 1e-2
    later: Annotated[bool, Doc("a new field")] = False
    widths: Annotated[Mapping[str, float], Doc("a new field")] = field(factory=lambda: {"a": 1.0})


@frozen
class LaterPhase(Phase):
    weight: float = 1.0


@frozen
class LaterData(DataConfig):
    curriculum: Annotated[tuple[LaterPhase, ...], Doc("with a new field")] = ()
    later: Annotated[int, Doc("a new field")] = 1


@frozen
class LaterOptimizer(OptimizerConfig):
    weight_decay: Annotated[float, Doc("another default")] = 0.5
    later: Annotated[int | None, Doc("a new field that changes what is learned"), LegacyDefault(None)] = 3


@frozen
class LaterTraining(TrainingConfig):
    seed: Annotated[int, Doc("another default")] = 7
    mixed_precision: Annotated[str | None, Doc("another default")] = "bf16"
    later: Annotated[int, Doc("a new field")] = 1


LATER = {"model": LaterModel, "data": LaterData, "optimizer": LaterOptimizer, "training": LaterTraining}

NOTE = "the run keeps the defaults that it began with: "
SINCE = 'training.background_save false (now "auto")'  # this version's own change
CHANGED = [
    "model.norm_eps 1e-05 (now 0.01)",
    "optimizer.weight_decay 0.1 (now 0.5)",
    "optimizer.later null (now 3)",
    SINCE,
    "training.seed 42 (now 7)",
    'training.mixed_precision null (now "bf16")',
]


@pytest.fixture
def kept(here: Path) -> Path:
    """A run of this version, stopped at step 4, below the current directory."""
    shutil.copytree(KEPT, here, dirs_exist_ok=True)
    return here / "runs" / "stories"


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sections of a later version."""
    for name, section in LATER.items():
        monkeypatch.setitem(structure.SECTIONS, name, section)  # type: ignore[arg-type]
        if hasattr(components, base := section.__bases__[0].__name__):
            monkeypatch.setattr(components, base, section)


def notes(ended: Ended) -> list[str]:
    return [line.partition(NOTE)[2] for line in (ended.out + ended.err).splitlines() if NOTE in line]


@pytest.mark.parametrize("run", ["stories", "dataset"])
def test_later_fields_and_defaults_leave_a_run_as_it_is(
    run: str, kept: Path, shell: Shell, request: pytest.FixtureRequest
) -> None:
    shutil.copytree("runs", "copy")
    unchanged = shell("run", f"{run}.toml", *PLUGIN)
    expected = outcome(kept.with_name(run))
    shutil.rmtree("runs")
    Path("copy").rename("runs")

    request.getfixturevalue("later")
    ended = shell("run", f"{run}.toml", *PLUGIN)
    assert ended.code == 0, ended.err
    assert notes(ended) == [", ".join(CHANGED)]
    start = [line for line in unchanged.out.splitlines() if "resumed from step 4" in line]
    assert [line for line in ended.out.splitlines() if "resumed from step 4" in line] == start
    assert outcome(kept.with_name(run)) == expected


def test_a_value_that_is_set_now_is_not_kept(kept: Path, shell: Shell, later: None) -> None:
    ended = shell("run", "stories.toml", *PLUGIN, "--optimizer.weight_decay", "0.5", "--training.seed", "7")
    assert notes(ended) == [", ".join([CHANGED[0], CHANGED[2], SINCE, CHANGED[-1]])]
    assert "changed: optimizer.weight_decay 0.1 -> 0.5; training.seed 42 -> 7" in ended.out


def test_a_value_that_was_set_at_the_start_is_not_kept(kept: Path, shell: Shell) -> None:
    text = Path("stories.toml").read_text()
    Path("stories.toml").write_text(text.replace("warmup", "#").replace("learning_rate", "#"))
    ended = shell("run", "stories.toml", *PLUGIN)
    assert notes(ended) == [SINCE]
    assert "changed: optimizer.learning_rate 0.01 -> 0.0003" in ended.out


def test_a_kept_value_is_checked_with_those_set_now() -> None:
    spec = resolve_spec(None, sections={"model": {"n_head": 3}})
    with pytest.raises(ConfigError, match="n_embd 64 is not a multiple of n_head 3"):
        keep_values(spec, flatten(spec.config) | {"model.n_embd": 64})


def test_validate_reports_the_values_that_the_run_keeps(kept: Path, shell: Shell, later: None) -> None:
    ended = shell("validate", "stories.toml", *PLUGIN, "--json")
    findings = [finding["message"] for finding in json.loads(ended.out)["findings"]]
    assert NOTE + ", ".join(CHANGED) in findings
    assert any("step 4" in message and "-exact" in message for message in findings)
    assert not any("changed:" in message for message in findings)


def test_a_new_run_has_the_later_defaults(kept: Path, shell: Shell, later: None) -> None:
    ended = shell("run", "stories.toml", *PLUGIN, "--force")
    assert notes(ended) == []
    values = json.loads((kept / "run.json").read_text())["facts"]["config"]
    assert (values["training.seed"], values["optimizer.later"]) == (7, 3)


def test_a_model_is_restored_with_the_values_that_it_began_with(kept: Path, request: pytest.FixtureRequest) -> None:
    cpu, ids = torch.device("cpu"), torch.arange(8)[None]
    with torch.no_grad():
        expected = restore(RunDir(kept), cpu)[0](ids)
        request.getfixturevalue("later")
        restored = restore(RunDir(kept), cpu)[0](ids)
    assert torch.equal(torch.as_tensor(restored[0]), torch.as_tensor(expected[0]))


OWN = """
import torch
from attrs import frozen
from gpt_simple import Plugin, hookimpl

@frozen
class TableConfig:
    name: str = "gpt"
    width: int = 8
    scale: float = {scale}
    {field}

class Table(torch.nn.Module):
    def __init__(self, config, rows):
        super().__init__()
        self.inner, self.outer = torch.nn.Embedding(rows, config.width), torch.nn.Linear(config.width, rows)
        self.scale = config.scale

    def forward(self, input_ids, labels=None):
        logits = self.outer(self.inner(input_ids) * self.scale)
        if labels is None:
            return logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")

def build(config, vocab_size, max_length):
    return Table(config, vocab_size)

@frozen
class OwnConfig:
    level: int = 1
    {field}

class Own(Plugin[OwnConfig]):
    Config = OwnConfig

    @classmethod
    @hookimpl
    def register_components(cls, registry):
        registry.add("model", "table", build, config=TableConfig)
"""


def test_a_component_of_a_plugin_keeps_its_values(here: Path, shell: Shell) -> None:
    plugin = Path("own.py")
    arguments = ("-p", "./own.py", "--model.name", "table")
    text = Path("config.toml").read_text()
    Path("config.toml").write_text(text.replace("n_embd = 32\nn_layer = 1\nn_head = 2\n", ""))
    plugin.write_text(OWN.format(scale=1.0, field=""))
    begun = shell("run", "config.toml", *arguments)
    assert begun.code == 0, begun.err

    plugin.write_text(OWN.format(scale=2.0, field="later: bool = False"))
    ended = shell("run", "config.toml", *arguments, "--training.max_steps", "6", "--optimizer.schedule", "constant")
    assert notes(ended) == ["model.scale 1.0 (now 2.0)"]
    changes = "changed: optimizer.schedule cosine -> constant; training.max_steps 4 -> 6"
    assert changes in ended.out, ended.out + ended.err


@frozen
class Options:
    level: int = 1
    later: Annotated[bool, LegacyDefault(False)] = True


def test_missing_fields_have_their_legacy_defaults() -> None:
    config = Config(
        model=LaterModel(),
        data=LaterData(curriculum=(LaterPhase(8, {"a": 1.0}),)),
        optimizer=LaterOptimizer(),
        training=LaterTraining(),
        plugins=PluginsConfig(tables={"noise": Options(), "other": Options()}),
    )
    old = Config(data=DataConfig(curriculum=(Phase(8, {"a": 1.0}),)))
    added = {
        "model.later": False,
        "model.widths.a": 1.0,
        "data.later": 1,
        "optimizer.later": None,
        "training.later": 1,
        "data.curriculum": [{"duration_tokens": 8, "mix": {"a": 1.0}, "weight": 1.0}],
    }
    assert with_legacy_values(flatten(old), config) == flatten(old) | added
    assert with_legacy_values(flatten(config), config) == flatten(config)
    options = {"plugins.noise": "noise 1.0", "plugins.noise.level": 2}
    assert with_legacy_options(options, config) == options | {"plugins.noise.later": False}


def test_fields_of_another_component_are_not_added() -> None:
    saved = flatten(Config()) | {"model.name": "other"}
    config = Config(model=LaterModel(), data=LaterData(), optimizer=LaterOptimizer(), training=LaterTraining())
    assert not any(key.startswith("model.later") for key in with_legacy_values(saved, config))


def test_a_changed_default_component_is_kept_with_its_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    @frozen
    class Momentum(OptimizerConfig):
        name: str = "momentum"
        weight_decay: float = 0.5
        nesterov: bool = False

    def registry() -> Any:
        parts = original()
        parts.add("optimizer", "momentum", "gpt_simple.engine.optimizers:adamw", config=Momentum)
        return parts

    original = components.builtin_registry
    monkeypatch.setattr("gpt_simple.spec.builtin_registry", registry)
    began = flatten(resolve_spec(None).config)
    monkeypatch.setitem(structure.SECTIONS, "optimizer", Momentum)  # type: ignore[arg-type]
    spec = keep_values(resolve_spec(None, overrides=[("optimizer.beta1", "0.5")]), began)
    assert flatten(spec.config) == began | {"optimizer.beta1": 0.5}
    assert type(spec.config.optimizer) is OptimizerConfig
