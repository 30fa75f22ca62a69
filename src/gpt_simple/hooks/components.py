"""Replaceable parts, by name: model, optimizer, schedule, tokenizer, data source, checkpoint store, step, loss.

The configuration chooses a component (``model.name = "gpt"``); installing one changes nothing. Built-in components are
given as ``module:attribute`` and imported when they are used, so this module needs no torch.
"""

from __future__ import annotations

import difflib
import importlib
import math
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from inspect import isroutine, signature
from typing import Any, Literal, ParamSpec, TypeVar, get_args

import attrs
from attrs import evolve, field, frozen

from gpt_simple.config.schema import Config, DataConfig, ModelConfig, OptimizerConfig
from gpt_simple.config.types import fields_of
from gpt_simple.errors import PASSING, ConfigError, GptSimpleError, PluginError, describe, did_you_mean
from gpt_simple.machine_failures import is_of_machine

Kind = Literal["model", "optimizer", "schedule", "tokenizer", "source", "store", "step", "loss"]

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

KINDS: tuple[Kind, ...] = get_args(Kind)
CONFIG_KEY: dict[Kind, str] = {
    "model": "model.name",
    "optimizer": "optimizer.name",
    "schedule": "optimizer.schedule",
    "tokenizer": "data.tokenizer",
    "source": "data.source",
    "store": "training.checkpoint_store",
    "step": "training.step",
    "loss": "training.loss",
}

BUILTIN = "gpt-simple"
"""The owner of the built-in parts."""

LOCAL = "local"
"""The checkpoint store that is the run directory alone."""

SECTION_FIELDS: dict[Kind, tuple[str, ...]] = {
    "model": ("name",),
    "optimizer": ("name", "schedule", "max_grad_norm"),
    "source": (
        *("source", "tokenizer", "tokenizer_vocab_size", "max_documents", "max_length", "packing", "overlap_size"),
        *("document_mask", "val_fraction", "num_workers", "seed", "curriculum", "on_exhaustion"),
    ),
}
"""The fields that the engine reads of a section. A component's own class for that section must have them."""

SCHEDULE_FIELDS = ("learning_rate", "warmup_steps", "decay_steps", "min_lr_ratio")
"""The fields that a built-in schedule reads of ``[optimizer]``: with one, an optimizer's own class must have them."""

_BASE: dict[Kind, type] = {"model": ModelConfig, "optimizer": OptimizerConfig, "source": DataConfig}

NEEDED: dict[Kind, tuple[str, ...]] = {
    "model": ("forward", "parameters", "state_dict"),
    "optimizer": ("param_groups", "step", "zero_grad"),
    "schedule": ("__call__",),
    "tokenizer": (
        *("name", "vocab_size", "eod_id", "fingerprint"),
        *("encode", "encode_batch", "decode", "token_bytes", "save"),
    ),
    "source": ("fingerprint",),
    "store": ("find", "fetch", "published"),
    "step": ("__call__",),
    "loss": ("__call__", "needs"),
}
"""The members without which a part is refused. ``parts.py`` and the protocols describe them."""


class UnknownComponent(ConfigError):
    """No component has the name that the configuration chooses."""


@frozen
class Component:
    """A named part: its factory, the class of its configuration section if it brings one, and its owner.

    Raises PluginError for a class that the section of this kind cannot have.
    """

    kind: Kind
    name: str
    target: str | Callable[..., Any]
    config: type | None = None
    owner: str = BUILTIN

    def __attrs_post_init__(self) -> None:
        if self.config is None:
            return
        if self.kind not in SECTION_FIELDS:
            section = self.key.partition(".")[0]
            owners = [kind for kind in SECTION_FIELDS if CONFIG_KEY[kind].startswith(f"{section}.")]
            why = (
                f"only the {owners[0]} brings the class of [{section}]"
                if owners
                else "its options are the plugin's own"
            )
            raise PluginError(f"{self.label} takes no config=: {why}")
        if not (isinstance(self.config, type) and attrs.has(self.config)):
            raise PluginError(f"{self.label}: config= must be a frozen attrs class, not {self.config!r}")
        self.require(SECTION_FIELDS[self.kind], "the engine")

    @property
    def key(self) -> str:
        """The configuration field that chooses it: ``model.name``."""
        return CONFIG_KEY[self.kind]

    def require(self, fields: Sequence[str], reader: str) -> None:
        """Raise PluginError if the component's own class lacks one of these fields."""
        if self.config is None:
            return
        try:
            known = {spec.name for spec in fields_of(self.config)}
        except PluginError as error:
            raise PluginError(f"{self.label}: {error}") from error
        if missing := [name for name in fields if name not in known]:
            raise PluginError(
                f"{self.label}: {self.config.__qualname__} has no field {', '.join(missing)}, which {reader} reads",
                hint=f"inherit from gpt_simple.{_BASE[self.kind].__name__}, or declare it as there",
            )

    def load(self) -> Callable[..., Any]:
        """The factory, imported now if it was given as ``module:attribute``. PluginError if that fails in a plugin."""
        if not isinstance(self.target, str):
            return self.target
        module, _, attribute = self.target.partition(":")
        try:
            factory: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
        except PASSING:
            raise
        except BaseException as error:
            if self.owner == BUILTIN or is_of_machine(error):
                raise
            raise PluginError(f"{self.label} could not be imported: {describe(error)}") from error
        return factory

    def build(self, *arguments: Any, run_config: Config | None = None, **named: Any) -> Any:
        """The part itself. A defect in a plugin's factory is a PluginError that names it; a GptSimpleError passes.

        A factory with a parameter ``run_config`` also gets the whole configuration, if it is given here.
        """
        factory = self.load()
        if run_config is not None and _takes(factory, "run_config"):
            named["run_config"] = run_config
        part = self.attributed(factory, "could not be made")(*arguments, **named)
        if self.owner == BUILTIN:
            return part
        guarded = self.guarded(part)
        if missing := [name for name in NEEDED[self.kind] if not hasattr(guarded, name)]:
            raise PluginError(f"{self.label} is made as a {type(part).__name__}, which has no {', '.join(missing)}")
        if self.kind == "source":
            return self._attributed_source(part)
        if self.kind == "tokenizer":
            return guarded
        return self._checked(part) if self.kind == "schedule" else part

    def guarded(self, part: T) -> T:
        """``part``, this component's, as the engine calls it: a failure of a method or a property is attributed.

        A built-in part is returned as it is. Others keep their class and their attributes.
        """
        return part if self.owner == BUILTIN else _Guarded(part, self, {})  # type: ignore[return-value]

    def attributed(
        self, function: Callable[P, R], what: str, passing: tuple[type[BaseException], ...] = ()
    ) -> Callable[P, R]:
        """``function`` of the part, whose failure becomes a PluginError that names it and says ``what`` failed.

        A GptSimpleError passes, a failure of the machine, and what is ``passing``. A built-in part's function is
        returned as it is and costs nothing more.
        """
        if self.owner == BUILTIN:
            return function
        through: tuple[type[BaseException], ...] = (GptSimpleError, *PASSING, *passing)

        def call(*arguments: P.args, **named: P.kwargs) -> R:
            try:
                return function(*arguments, **named)
            except through:
                raise
            except BaseException as error:
                if is_of_machine(error):
                    raise
                raise self._failure(what, error) from error

        return call

    @property
    def label(self) -> str:
        """``model 'bigram' of the plugin bigram (./bigram.py)``: the component and its owner, for messages."""
        return f"{self.kind} {self.name!r} of the plugin {self.owner}"

    def _checked(self, rate: Callable[[int], Any]) -> Callable[[int], float]:
        """The schedule as a function that raises PluginError unless ``rate`` returns a finite number."""

        def checked(step: int) -> float:
            value = self.attributed(rate, f"gives no rate for step {step}")(step)
            with suppress(TypeError):
                if math.isfinite(value):
                    return float(value)
            raise PluginError(f"{self.label} gives the rate {value!r} for step {step}", hint="expected a finite number")

        return checked

    def _attributed_source(self, part: Any) -> Any:
        """The source, whose failures while it yields documents are attributed."""

        def attributed(name: str) -> Callable[[], Iterator[Any]]:
            begin = self.attributed(lambda: iter(getattr(part, name)()), f"failed in {name}")
            end = object()
            following = self.attributed(lambda iterator: next(iterator, end), f"failed in {name}")

            def documents() -> Iterator[Any]:
                iterator = begin()
                while (document := following(iterator)) is not end:
                    if not (hasattr(document, "text") and hasattr(document, "key")):
                        given = type(document).__name__
                        raise PluginError(f"{self.label} yields a {given}", hint="expected gpt_simple.Document")
                    yield document

            return documents

        def weights(input_ids: Any, labels: Any, tokenizer: Any) -> Any:
            import numpy as np  # only a run needs it

            factors = np.asarray(part.weights(input_ids, labels, tokenizer))
            if factors.shape != labels.shape or factors.dtype.kind not in "fiub" or not np.isfinite(factors).all():
                given = f"{factors.dtype} of shape {list(factors.shape)}"
                raise TypeError(f"it returned {given}; expected finite numbers of shape {list(labels.shape)}")
            return factors

        own = self.guarded(part)
        methods: dict[str, Callable[..., Any]] = {
            name: attributed(name) for name in ("documents", "stream") if hasattr(own, name)
        }
        if hasattr(own, "weights"):
            methods["weights"] = self.attributed(weights, "failed in weights")
        return _Guarded(part, self, methods) if methods else part  # else it is the directory of a dataset

    def _failure(self, what: str, error: BaseException) -> PluginError:
        *_, last = traceback.extract_tb(error.__traceback__)
        failure = PluginError(f"{self.label} {what}: {describe(error)} ({last.filename}:{last.lineno})")
        failure.blamed = True  # a hook that uses the part has not failed
        return failure


def _takes(factory: Callable[..., Any], name: str) -> bool:
    """Whether a factory has a parameter of this name; one without a signature, as of a native library, has none."""
    try:
        return name in signature(factory).parameters
    except (TypeError, ValueError):
        return False


class _Guarded:
    """A part of a plugin whose failures are attributed to its component. It has its class and its attributes.

    ``methods`` are replaced by others.
    """

    def __init__(self, part: Any, component: Component, methods: dict[str, Callable[..., Any]]) -> None:
        self.__dict__.update(methods, _part=part, _component=component)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._part)

    def __getattr__(self, name: str) -> Any:
        component: Component = self.__dict__["_component"]
        what = f"failed in {name}"
        value = component.attributed(getattr, what, (AttributeError,))(self.__dict__["_part"], name)
        # A file that cannot be written is no defect of the part that writes it.
        return component.attributed(value, what, (OSError,) if name == "save" else ()) if isroutine(value) else value


@frozen
class Registry:
    """The components that a configuration can choose from."""

    parts: dict[tuple[Kind, str], Component] = field(factory=dict)
    owner: str = BUILTIN

    def owned_by(self, owner: str) -> Registry:
        """A view of the same registry that adds parts under the name of ``owner``."""
        return evolve(self, owner=owner)

    def add(self, kind: Kind, name: str, target: str | Callable[..., Any], *, config: type | None = None) -> None:
        """Register a part.

        ``target`` is the factory or its ``module:attribute``; ``config`` is the frozen attrs class that the section of
        this kind is structured into. Raises PluginError for an unknown kind, a class that the section cannot have, and
        a name that is taken.
        """
        if kind not in KINDS:
            raise PluginError(
                f"{self.owner} registers a component of kind {kind!r}", hint=f"expected one of {', '.join(KINDS)}"
            )
        if (known := self.parts.get((kind, name))) is not None:
            raise PluginError(
                f"{kind} {name!r} is registered by both {known.owner} and {self.owner}: disable one of them"
            )
        self.parts[kind, name] = Component(kind, name, target, config, self.owner)

    def pair(self, optimizer: str, schedule: str) -> None:
        """Raise PluginError if the schedule is a built-in one and the optimizer's own class lacks a field it reads."""
        if self.get("schedule", schedule).owner == BUILTIN:
            self.get("optimizer", optimizer).require(SCHEDULE_FIELDS, f"the schedule {schedule!r}")

    def names(self, kind: Kind) -> list[str]:
        """The names of the parts of a kind, sorted."""
        return sorted(name for part_kind, name in self.parts if part_kind == kind)

    def closest(self, kind: Kind, name: str) -> Component | None:
        """The part with the most similar name, if one is similar."""
        close = difflib.get_close_matches(name, self.names(kind), 1)
        return self.parts[kind, close[0]] if close else None

    def get(self, kind: Kind, name: str, place: str = "") -> Component:
        """The part. Raises a ConfigError that lists the known names; ``place`` is where the name was written."""
        if (part := self.parts.get((kind, name))) is not None:
            return part
        names = self.names(kind)
        meant, hint = did_you_mean(name, names), f"expected one of {', '.join(names)}"
        key = "" if place else CONFIG_KEY[kind]
        raise UnknownComponent(f"there is no {kind} {name!r}{meant}", location=place or None, key=key, hint=hint)


def builtin_registry() -> Registry:
    """A new registry with the built-in parts."""
    registry = Registry()
    registry.add("model", "gpt", "gpt_simple.model.gpt:build", config=ModelConfig)
    registry.add("optimizer", "adamw", "gpt_simple.engine.optimizers:adamw", config=OptimizerConfig)
    for name in ("cosine", "linear", "wsd", "constant"):
        registry.add("schedule", name, f"gpt_simple.engine.schedules:{name}")
    for name in ("bpe", "bytes"):
        registry.add("tokenizer", name, f"gpt_simple.data.tokenizer:{name}")
    for name in ("files", "stories", "python_stdlib", "shards"):
        registry.add("source", name, f"gpt_simple.data.sources.{name}:build", config=DataConfig)
    registry.add("store", LOCAL, "gpt_simple.hooks.store:local")
    registry.add("step", "standard", "gpt_simple.engine.step:standard")
    registry.add("loss", "standard", "gpt_simple.engine.losses:standard")
    return registry
