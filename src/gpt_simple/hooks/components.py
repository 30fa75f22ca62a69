"""Replaceable parts, by name: model, optimizer, schedule, tokenizer, data source.

A component is chosen in the configuration (``model.name = "gpt"``) and never by what happens to be installed.
The built-in ones are given as ``module:attribute`` and imported when they are used, so that this module needs
no torch.
"""

from __future__ import annotations

import difflib
import importlib
import traceback
from collections.abc import Callable
from typing import Any, Literal

from attrs import evolve, field, frozen

from gpt_simple.config.schema import DataConfig, ModelConfig, OptimizerConfig
from gpt_simple.errors import ConfigError, GptSimpleError, PluginError

Kind = Literal["model", "optimizer", "schedule", "tokenizer", "source"]

KINDS: tuple[Kind, ...] = ("model", "optimizer", "schedule", "tokenizer", "source")
CONFIG_KEY: dict[Kind, str] = {
    "model": "model.name",
    "optimizer": "optimizer.name",
    "schedule": "optimizer.schedule",
    "tokenizer": "data.tokenizer",
    "source": "data.source",
}

BUILTIN = "gpt-simple"
"""The owner of the parts that are always there."""

_NEEDED: dict[Kind, tuple[str, ...]] = {
    "model": ("forward", "parameters", "state_dict"),
    "optimizer": ("param_groups", "step", "zero_grad"),
    "schedule": ("__call__",),
    "tokenizer": ("vocab_size", "eod_id", "fingerprint", "encode_batch", "decode", "save"),
    "source": ("fingerprint",),
}


@frozen
class Component:
    """A named part: how it is built, the class that its section is structured into, and who brought it."""

    kind: Kind
    name: str
    target: str | Callable[..., Any]
    config: type | None = None
    owner: str = BUILTIN

    def load(self) -> Callable[..., Any]:
        """The factory, imported now if it was given as ``module:attribute``."""
        if not isinstance(self.target, str):
            return self.target
        module, _, attribute = self.target.partition(":")
        factory: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
        return factory

    def build(self, *arguments: Any, **named: Any) -> Any:
        """The part itself. A defect in a plugin's factory is a PluginError that names it; a user's mistake passes."""
        if self.owner == BUILTIN:
            return self.load()(*arguments, **named)
        try:
            part = self.load()(*arguments, **named)
        except GptSimpleError:
            raise
        except Exception as error:
            *_, last = traceback.extract_tb(error.__traceback__)
            place = f"{last.filename}:{last.lineno}"
            raise PluginError(f"{self._label} could not be made: {type(error).__name__}: {error} ({place})") from error
        if missing := [name for name in _NEEDED[self.kind] if not hasattr(part, name)]:
            raise PluginError(f"{self._label} is made as a {type(part).__name__}, which has no {', '.join(missing)}")
        return part

    @property
    def _label(self) -> str:
        return f"{self.kind} {self.name!r} of the plugin {self.owner}"


@frozen
class Registry:
    """The parts that a configuration can choose from."""

    parts: dict[tuple[Kind, str], Component] = field(factory=dict)
    owner: str = BUILTIN

    def owned_by(self, owner: str) -> Registry:
        """The same parts; what is added through the result belongs to ``owner``."""
        return evolve(self, owner=owner)

    def add(self, kind: Kind, name: str, target: str | Callable[..., Any], *, config: type | None = None) -> None:
        """Register a part. Two parts of one kind and name are an error that names both owners."""
        if kind not in KINDS:
            raise PluginError(
                f"{self.owner} registers a component of kind {kind!r}; expected one of {', '.join(KINDS)}"
            )
        if (known := self.parts.get((kind, name))) is not None:
            raise PluginError(
                f"{kind} {name!r} is registered by both {known.owner} and {self.owner}: disable one of them"
            )
        self.parts[kind, name] = Component(kind, name, target, config, self.owner)

    def names(self, kind: Kind) -> list[str]:
        """The names of a kind, sorted."""
        return sorted(name for part_kind, name in self.parts if part_kind == kind)

    def get(self, kind: Kind, name: str, place: str = "") -> Component:
        """The part, or a ConfigError with the names that exist; ``place`` is where the name was written."""
        if (part := self.parts.get((kind, name))) is not None:
            return part
        names = self.names(kind)
        close = difflib.get_close_matches(name, names, 1)
        meant = f" (did you mean {close[0]!r}?)" if close else ""
        where = place or CONFIG_KEY[kind]
        raise ConfigError(f"{where}: there is no {kind} {name!r}{meant}; expected one of {', '.join(names)}")


def builtin_registry() -> Registry:
    """A new registry with the built-in parts."""
    registry = Registry()
    registry.add("model", "gpt", "gpt_simple.model.gpt:build", config=ModelConfig)
    registry.add("optimizer", "adamw", "gpt_simple.engine.optimizer:adamw", config=OptimizerConfig)
    for name in ("cosine", "linear", "wsd", "constant"):
        registry.add("schedule", name, f"gpt_simple.engine.schedule:{name}")
    for name in ("bpe", "bytes"):
        registry.add("tokenizer", name, f"gpt_simple.data.tokenizer:{name}")
    for name in ("files", "stories", "python_stdlib", "shards"):
        registry.add("source", name, f"gpt_simple.data.sources.{name}:build", config=DataConfig)
    return registry
