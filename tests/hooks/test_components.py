"""Parts of other packages: a model with a configuration of its own, an optimizer, a schedule, a tokenizer, a source."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from inspect import isroutine
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from annotated_types import Ge
from attrs import frozen
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gpt_simple import Config, ConfigError, Document, Plugin, PluginError, hookimpl
from gpt_simple.config.schema import DataConfig, OptimizerConfig
from gpt_simple.config.types import fields_of
from gpt_simple.data.tokenizer import bytes as byte_tokenizer
from gpt_simple.hooks import Component, NoConfig, PreflightOptions, Registry
from gpt_simple.hooks.components import CONFIG_KEY, SECTION_FIELDS
from gpt_simple.preflight.preflight import RunPreflight
from gpt_simple.spec import resolve_spec
from gpt_simple.testing import Trained, train, train_on_ranks


@frozen
class BigramConfig:
    name: str = "bigram"
    width: Annotated[int, Ge(1)] = 8


class Bigram(nn.Module):
    """What follows a token depends on that token alone."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(vocab_size, width), nn.Linear(width, vocab_size)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        logits: Tensor = self.head(self.embedding(input_ids))
        if labels is None:
            return logits
        return cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


def bigram(config: BigramConfig, *, vocab_size: int, max_length: int) -> nn.Module:
    return Bigram(vocab_size, config.width)


def sgd(model: nn.Module, config: OptimizerConfig, device: torch.device) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=config.learning_rate, momentum=0.9)


def zigzag(config: OptimizerConfig, max_steps: int) -> Callable[[int], float]:
    return lambda step: config.learning_rate * (1.0 if step % 2 else 0.5)


class Counting:
    def fingerprint(self) -> str:
        return "counting 1"

    def documents(self) -> Iterator[Document]:
        for first in range(60):
            yield Document(" ".join(str(first + each) for each in range(9)), key=str(first))


class Parts(Plugin[NoConfig]):
    @classmethod
    @hookimpl
    def register_components(cls, registry: Registry) -> None:
        registry.add("model", "bigram", bigram, config=BigramConfig)
        registry.add("optimizer", "sgd", sgd)
        registry.add("schedule", "zigzag", zigzag)
        registry.add("tokenizer", "octets", byte_tokenizer)
        registry.add("source", "counting", lambda config, seed: Counting(), config=DataConfig)


CHOSEN = {
    "optimizer.name": "sgd",
    "optimizer.schedule": "zigzag",
    "data.tokenizer": "octets",
    "data.source": "counting",
}


def run(directory: Path, max_steps: int, **model: Any) -> Trained:
    """``model`` is the whole section: nothing of the tiny GPT's stays in it."""
    section = {"name": "bigram", "width": 4, **model}
    return train(Parts, output_dir=directory, max_steps=max_steps, overrides={**CHOSEN, "model": section})


def test_parts_of_a_plugin_train_and_resume_as_ours(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", 6)
    assert whole.weights["embedding.weight"].shape[1] == 4
    rates = [event.metrics["train/lr"] for event in whole.recorder.events("on_metrics")]
    assert rates == pytest.approx([1e-2, 5e-3] * 3)
    assert any("optimizer sgd has no found_inf" in event.message for event in whole.recorder.events("on_log"))
    first = run(tmp_path / "halves", 3)
    second = run(tmp_path / "halves", 6)
    assert second.recorder.events("on_run_start")[0].step == 3
    assert not any(torch.equal(value, second.weights[name]) for name, value in first.weights.items())
    assert all(torch.equal(value, second.weights[name]) for name, value in whole.weights.items())


@frozen
class HalvingConfig:
    every: int = 2


class Halving(Plugin[HalvingConfig]):
    Config = HalvingConfig

    @classmethod
    @hookimpl
    def register_components(cls, registry: Registry) -> None:
        def halving(config: OptimizerConfig, max_steps: int, *, run_config: Config) -> Callable[[int], float]:
            every = run_config.plugins.tables["halving"].every
            return lambda step: config.learning_rate * 0.5 ** ((step - 1) // every)

        registry.add("schedule", "halving", halving)


def test_a_schedule_has_the_options_of_its_plugin(tmp_path: Path) -> None:
    chosen = {"optimizer.schedule": "halving", "plugins.halving.every": 1}
    first = train(Halving, output_dir=tmp_path, max_steps=2, overrides=chosen)
    rates = [event.metrics["train/lr"] for event in first.recorder.events("on_metrics")]
    assert rates == pytest.approx([1e-2, 5e-3])
    longer = train(Halving, output_dir=tmp_path, max_steps=4, overrides={**chosen, "plugins.halving.every": 3})
    rates = [event.metrics["train/lr"] for event in longer.recorder.events("on_metrics")]
    assert rates == pytest.approx([1e-2, 5e-3])
    assert "plugins.halving.every 1 -> 3" in longer.recorder.events("on_run_start")[0].promise


class NotPython:
    """A factory that ``inspect`` cannot read, as one of a native library."""

    __signature__ = "unknown"

    def __call__(self, config: Any, max_steps: int) -> Callable[[int], float]:
        return lambda step: 0.5


@pytest.mark.parametrize("factory", [NotPython(), partial(zigzag), lambda *arguments: lambda step: 0.5])
def test_a_schedule_may_leave_out_the_whole_configuration(factory: Any) -> None:
    assert not train(component=Component("schedule", "mine", factory), max_steps=1).failed


def test_the_section_is_the_components_own(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        run(tmp_path, 1, width=0, widht=3, n_embd=16)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert re.search(r"model\.width: expected .*>= 1", str(caught.value))
    assert "model.widht: unknown key; did you mean model.width?" in str(caught.value)
    assert "model.n_embd: unknown key" in str(caught.value)


def test_a_model_that_cannot_keep_documents_apart_is_refused(tmp_path: Path) -> None:
    wanted = r"train\(\.\.\.\): data\.document_mask: the model 'bigram' takes no position_ids"
    with pytest.raises(ConfigError, match=wanted):
        train(
            Parts,
            output_dir=tmp_path,
            overrides={"data.document_mask": True, "model": {"name": "bigram"}},
        )


def boom(*arguments: Any, **named: Any) -> Any:
    raise ValueError("boom")


class Nameless:
    """A tokenizer but for its name."""

    vocab_size, eod_id, fingerprint = 257, 0, "f"
    encode = encode_batch = decode = token_bytes = save = boom


class Defects(Plugin[NoConfig]):
    @classmethod
    @hookimpl
    def register_components(cls, registry: Registry) -> None:
        registry.add("model", "boom", boom)
        registry.add("model", "lost", "no_such_module:build")
        registry.add("optimizer", "none", lambda model, config, device: None)
        registry.add("schedule", "none", lambda config, max_steps: None)
        registry.add("tokenizer", "none", lambda config, texts: None)
        registry.add("source", "empty", lambda config, seed: None)
        registry.add("tokenizer", "nameless", lambda config, texts: Nameless())
        registry.add("schedule", "raising", lambda config, max_steps: boom)
        registry.add("schedule", "text", lambda config, max_steps: lambda step: "0.1")
        registry.add("schedule", "nan", lambda config, max_steps: lambda step: float("nan"))


@pytest.mark.parametrize(
    ("key", "name", "message"),
    [
        (
            "model.name",
            "boom",
            r"model 'boom' of the plugin defects \(.*\.py\) could not be made: ValueError: boom \(.*\.py:\d+\)",
        ),
        ("model.name", "lost", "model 'lost' .* ModuleNotFoundError: No module named 'no_such_module'"),
        ("optimizer.name", "none", "optimizer 'none' .* a NoneType, which has no param_groups, step"),
        ("optimizer.schedule", "none", "schedule 'none' .* a NoneType, which has no __call__"),
        ("data.tokenizer", "none", "tokenizer 'none' .* a NoneType, which has no name, vocab_size"),
        ("data.source", "empty", "source 'empty' .* a NoneType, which has no fingerprint"),
        ("data.tokenizer", "nameless", "tokenizer 'nameless' .* a Nameless, which has no name"),
        (
            "optimizer.schedule",
            "raising",
            r"schedule 'raising' .* gives no rate for step 1: ValueError: boom \(.*:\d+\)",
        ),
        ("optimizer.schedule", "text", "schedule 'text' of the plugin defects .* gives the rate '0.1' for step 1"),
        ("optimizer.schedule", "nan", "schedule 'nan' .* gives the rate nan for step 1; expected a finite number"),
    ],
)
def test_a_part_that_cannot_be_made_is_its_plugins_defect(tmp_path: Path, key: str, name: str, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        train(Defects, output_dir=tmp_path, overrides={key: name})


@frozen
class Bare:
    width: int = 1


@frozen
class LionConfig:
    name: str = "lion"
    schedule: str = "flat"
    max_grad_norm: float | None = 1.0
    learning_rate: float = 1e-3


@frozen
class ComplexConfig(LionConfig):
    beta: complex = 0j


def brings(kind: Any, config: Any) -> type[Plugin[NoConfig]]:
    class Lion(Plugin[NoConfig]):
        @classmethod
        @hookimpl
        def register_components(cls, registry: Registry) -> None:
            registry.add("schedule", "flat", lambda config, max_steps: lambda step: config.learning_rate)
            registry.add(kind, "lion", sgd, config=config)

    return Lion


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("model", Bare, "Bare has no field name, which the engine reads"),
        ("optimizer", Bare, "Bare has no field name, schedule, max_grad_norm, which the engine reads"),
        ("source", BigramConfig, "BigramConfig has no field source, tokenizer, .* overlap_size, "),
        ("optimizer", ComplexConfig, r"ComplexConfig\.beta: a configuration cannot hold"),
        ("optimizer", {"name": "lion"}, "config= must be a frozen attrs class, not {'name': 'lion'}"),
        ("schedule", OptimizerConfig, r"takes no config=: only the optimizer brings the class of \[optimizer\]"),
        ("tokenizer", DataConfig, r"takes no config=: only the source brings the class of \[data\]"),
        ("store", DataConfig, "takes no config=: its options are the plugin's own"),
    ],
)
def test_a_class_that_cannot_be_a_section_is_refused(kind: str, config: Any, message: str) -> None:
    with pytest.raises(PluginError, match=rf"{kind} 'lion' of the plugin lion \(.*\.py\):? .*{message}"):
        train(brings(kind, config))


def test_a_built_in_schedule_needs_its_fields_once_chosen(tmp_path: Path) -> None:
    plugin, lion = brings("optimizer", LionConfig), {"name": "lion"}
    done = train(plugin, output_dir=tmp_path, max_steps=1, overrides={"optimizer": lion})
    assert done.recorder.events("on_metrics")[0].metrics["train/lr"] == 1e-3
    wanted = r"lion \(.*\.py\): LionConfig has no field warmup_steps, decay_steps, min_lr_ratio, .* schedule 'wsd'"
    with pytest.raises(PluginError, match=wanted):
        train(plugin, overrides={"optimizer": {**lion, "schedule": "wsd"}})


@frozen
class WebConfig(DataConfig):
    source: str = "web"
    url: str = "example.org"


def test_a_source_may_inherit_the_section_and_add_to_it(tmp_path: Path) -> None:
    class Web(Plugin[NoConfig]):
        @classmethod
        @hookimpl
        def register_components(cls, registry: Registry) -> None:
            registry.add("source", "web", lambda config, seed: Counting(), config=WebConfig)

    data = {"source": "web", "url": "there", "tokenizer": "bytes", "max_length": 32, "val_fraction": 0.3}
    assert train(Web, output_dir=tmp_path, max_steps=1, overrides={"data": data}).result.steps == 1


def least(kind: Any, base: type, **own: str) -> type:
    """A class with the fields that the engine reads of a section, and no other."""
    fields = {spec.name: spec for spec in fields_of(base) if spec.name in SECTION_FIELDS[kind]}
    values = {name: own.get(name, spec.default) for name, spec in fields.items()}
    return frozen(type("Least", (), {"__annotations__": {n: s.annotation for n, s in fields.items()}, **values}))


def test_a_run_and_its_checks_read_only_the_required_fields(tmp_path: Path) -> None:
    class Least(Plugin[NoConfig]):
        @classmethod
        @hookimpl
        def register_components(cls, registry: Registry) -> None:
            data = least("source", DataConfig, source="least")
            optimizer = least("optimizer", OptimizerConfig, name="least", schedule="flat")
            registry.add("source", "least", lambda config, seed: Counting(), config=data)
            registry.add(
                "optimizer",
                "least",
                lambda model, config, device: torch.optim.SGD(model.parameters()),
                config=optimizer,
            )
            registry.add("schedule", "flat", lambda config, max_steps: lambda step: 0.5)

    sections = {
        "data": {"source": "least", "tokenizer": "bytes", "max_length": 32, "val_fraction": 0.3},
        "optimizer": {"name": "least"},
    }
    assert train(Least, output_dir=tmp_path, max_steps=2, overrides=sections).result.steps == 2
    spec = resolve_spec(None, sections=sections, plugins=[Least])
    findings = spec.check_config(RunPreflight(spec, PreflightOptions()))
    assert {finding.code for finding in findings} >= {"data", "epochs", "config"}


class Fails(BaseException):
    """As a panic of a native library."""


def fails(*_: Any, **__: Any) -> Any:
    raise Fails("in a part")


class FailsLater(Bigram):
    """Fails in the call of its forward with or without labels, or in evaluation mode."""

    when = ""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        now = "sample" if labels is None else "train" if self.training else "evaluate"
        loss = super().forward(input_ids, labels)
        if self.when == "returns two":
            return loss, loss  # type: ignore[return-value]
        return loss[None] if self.when == "returns a row" else fails() if self.when == now else loss


class Endless(Counting):
    def documents(self) -> Iterator[Document]:
        yield from ()
        fails()


class Iterable(Counting):
    def documents(self) -> Any:
        return type("It", (), {"__iter__": fails})()


class Wrong(Counting):
    def documents(self) -> Any:
        return iter([{"text": "a"}])


class Streams:
    fingerprint = Counting.fingerprint

    def stream(self) -> Iterator[Document]:
        yield from islice(Counting().documents(), 20)
        fails()


class Unprinted(Counting):
    fingerprint = fails


def failing_sgd(model: nn.Module, config: OptimizerConfig, device: torch.device) -> torch.optim.Optimizer:
    return type("Failing", (torch.optim.SGD,), {"step": fails})(model.parameters(), lr=0.1)


def failing_model(when: str) -> Callable[..., nn.Module]:
    made = type("Failing", (FailsLater,), {"when": when})
    return lambda config, *, vocab_size, max_length: made(vocab_size, config.width)


class FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss * 1

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return fails()


class Backward(Bigram):
    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        return FailsBackward.apply(super().forward(input_ids, labels))


def model_without(method: str) -> Callable[..., nn.Module]:
    """A model with a method that fails."""
    made = type("Failing", (Bigram,), {method: fails})
    return lambda config, *, vocab_size, max_length: made(vocab_size, config.width)


def optimizer_without(method: str) -> Callable[..., torch.optim.Optimizer]:
    made = type("Failing", (torch.optim.SGD,), {method: fails})
    return lambda model, config, device: made(model.parameters(), lr=0.1)


def tokenizer_without(member: str) -> Callable[..., Any]:
    """The tokenizer of bytes with a method, or a property, that fails."""

    def build(config: Any, texts: Any) -> Any:
        tokenizer = byte_tokenizer(config, texts)
        own = getattr(type(tokenizer), member, None)
        broken = fails if isroutine(own) else property(fails)
        return type("Failing", (), {"__getattr__": lambda self, name: getattr(tokenizer, name), member: broken})()

    return build


MODEL_METHODS = ("state_dict", "set_activation_checkpointing", "flops_per_token", "to", "train")
TOKENIZER_MEMBERS = ("encode_batch", "save", "fingerprint", "eod_id", "vocab_size", "name")

FAILING: dict[str, tuple[Any, Any, str]] = {
    **{f"model.{name}": ("model", model_without(name), f"failed in {name}") for name in MODEL_METHODS},
    **{f"tokenizer.{name}": ("tokenizer", tokenizer_without(name), f"failed in {name}") for name in TOKENIZER_MEMBERS},
    "backward": ("model", lambda config, **sizes: Backward(sizes["vocab_size"], 8), "failed in backward"),
    "optimizer.state_dict": ("optimizer", optimizer_without("state_dict"), "has state that cannot be read"),
    **{f"forward in {when}": ("model", failing_model(when), "failed in forward") for when in ("train", "evaluate")},
    **{
        f"forward {what}": ("model", failing_model(what), "failed in forward: TypeError: the model returned")
        for what in ("returns two", "returns a row")
    },
    "forward in a sample": ("model", failing_model("sample"), "failed in forward"),
    "step": ("optimizer", failing_sgd, "failed in step"),
    "documents": ("source", lambda config, seed: Endless(), "failed in documents"),
    "iter of documents": ("source", lambda config, seed: Iterable(), "failed in documents"),
    "no documents": ("source", lambda config, seed: Wrong(), "yields a dict"),
    "stream": ("source", lambda config, seed: Streams(), "failed in stream"),
    "fingerprint": ("source", lambda config, seed: Unprinted(), "failed in fingerprint"),
    "a factory": ("source", fails, "could not be made"),
    "a rate": ("schedule", lambda config, max_steps: fails, "gives no rate for step 1"),
}


@pytest.mark.parametrize("what", FAILING)
def test_a_failure_of_a_part_names_the_part_and_its_plugin(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, factory, message = FAILING[what]
    if kind == "tokenizer":
        monkeypatch.setenv("GPT_SIMPLE_CACHE", str(tmp_path))  # with data in the cache it is not used

    class Owner(Plugin[NoConfig]):
        @classmethod
        @hookimpl
        def register_components(cls, registry: Registry) -> None:
            registry.add(kind, "failing", factory, config=BigramConfig if kind == "model" else None)

    class Samples(Plugin[NoConfig]):
        @hookimpl
        def on_step_end(self, run: Any) -> None:
            run.generate("a", max_new_tokens=1)

    overrides: dict[str, Any] = {CONFIG_KEY[kind]: "failing"}
    if kind == "model":
        overrides = {"model": {"name": "failing"}}
    wanted = rf"^{kind} 'failing' of the plugin owner \(.*\) {message}"
    with pytest.raises(PluginError, match=wanted) as caught:
        train(Owner, *([Samples] if "sample" in what else []), max_steps=2, overrides=overrides)
    assert caught.value.exit_code == 5


@pytest.mark.parametrize(
    ("kind", "method", "message"),
    [
        ("optimizer", "load_state_dict", "cannot restore its state"),
        ("model", "state_dict", "failed in state_dict"),
    ],
)
def test_a_failure_while_a_run_resumes_is_attributed(tmp_path: Path, kind: Any, method: str, message: str) -> None:
    broken: list[type] = []
    base = Bigram if kind == "model" else torch.optim.SGD

    class Part(base):  # type: ignore[misc, valid-type]
        def __getattribute__(self, name: str) -> Any:
            return fails if broken and name == method else super().__getattribute__(name)

    class Owner(Plugin[NoConfig]):
        @classmethod
        @hookimpl
        def register_components(cls, registry: Registry) -> None:
            if kind == "model":
                registry.add(kind, "part", lambda config, **sizes: Part(sizes["vocab_size"], 8), config=BigramConfig)
            else:
                registry.add(kind, "part", lambda model, config, device: Part(model.parameters(), lr=0.1))

    chosen = {"model": {"name": "part"}} if kind == "model" else {"optimizer.name": "part"}
    where = {"training.output_dir": str(tmp_path / "run")}
    train(Owner, max_steps=1, overrides=chosen | where)
    broken.append(Part)
    with pytest.raises(PluginError, match=rf"^{kind} 'part' of the plugin owner \(.*\) {message}"):
        train(Owner, max_steps=2, overrides=chosen | where)


def test_on_two_processes_both_end_with_the_part_that_failed() -> None:
    class OnOne(Bigram):
        def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
            return fails() if os.environ["RANK"] == "1" and self.training else super().forward(input_ids, labels)

    class Owner(Plugin[NoConfig]):
        @classmethod
        @hookimpl
        def register_components(cls, registry: Registry) -> None:
            registry.add("model", "failing", lambda config, **sizes: OnOne(sizes["vocab_size"], 8), config=BigramConfig)

    main, other = train_on_ranks(Owner, max_steps=2, overrides={"model": {"name": "failing"}})
    message = "model 'failing' of the plugin owner "
    assert other.error.startswith(f"PluginError: {message}")
    assert main.error.startswith(f"RankFailed: process 1 failed: {message}")
