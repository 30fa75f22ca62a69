"""All mistakes of a plugin class at once, in the author's terms, before any of its methods runs.

pluggy does not report a misspelt hook, a forgotten decorator or a class in the place of an instance, and its versions
differ in what they pass to an argument with a default.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from enum import Enum
from functools import partial, partialmethod
from pathlib import Path
from typing import Any, get_type_hints

import attrs
from attrs import NOTHING

from gpt_simple.config.types import SUPPORTED_TYPES, UnsupportedType, default_of, key_problem, parse_type
from gpt_simple.errors import PluginError, Problem
from gpt_simple.hooks.plugin import Plugin
from gpt_simple.hooks.specs import HOOKS, PROJECT

MARK = f"{PROJECT}_impl"
"""The attribute in which ``@hookimpl`` keeps its options."""

PLAIN_METHODS = frozenset({"describe", "load_state_dict", "state_dict", "used_weights", "weight_sets"})
FORBIDDEN_OPTIONS = ("wrapper", "hookwrapper", "tryfirst", "trylast", "specname")
CLASS_HOOKS = frozenset({"register_components"})


def lint(cls: object, *, has_instance: bool = False) -> list[Problem]:
    """All mistakes; an empty list means that the class keeps the contract.

    ``has_instance``: the plugin was passed as an instance, so its ``__init__`` may take any arguments.
    """
    if not isinstance(cls, type):
        is_plugin = isinstance(cls, Plugin)
        hint = "name the class, not an instance of it" if is_plugin else f"found a {type(cls).__name__}"
        return [_problem("expected a subclass of gpt_simple.Plugin", hint)]
    if not issubclass(cls, Plugin):
        return [_problem(f"{cls.__name__} is not a subclass of gpt_simple.Plugin")]
    return [*_hook_mistakes(cls), *_class_mistakes(cls, has_instance), *_config_mistakes(cls)]


def lint_instance(instance: object) -> list[Problem]:
    """The mistakes of hooks that a plugin sets on itself, where each replaces the one of its class."""
    mistakes: list[Problem] = []
    for name, member in getattr(instance, "__dict__", {}).items():
        options = _options(member)
        if name in HOOKS and options is None:
            message = f"{name} is set on the instance without @hookimpl, so it is never called"
            mistakes.append(_problem(message, f"write it as a method of {type(instance).__name__} with @hookimpl"))
        elif name in HOOKS and options is not None:
            mistakes += _implementation_mistakes(name, member, options, bound=True)
        elif options is not None and not options.get("optionalhook"):
            mistakes.append(_problem(f"there is no hook {name}", _did_you_mean(name, HOOKS)))
    return mistakes


def hooks_of(cls: type) -> list[str]:
    """Names of the hooks that a class implements, in the order of the catalogue."""
    return [name for name in HOOKS if _options(inspect.getattr_static(cls, name, None)) is not None]


def _hook_mistakes(cls: type) -> Iterator[Problem]:
    names = dict.fromkeys(name for owner in cls.__mro__ if owner not in Plugin.__mro__ for name in vars(owner))
    for name in names:
        member = inspect.getattr_static(cls, name)
        options = _options(member)
        if options is None:
            if name in HOOKS:
                is_method = callable(getattr(cls, name)) and not isinstance(member, (partial, partialmethod))
                how = "write @hookimpl above it" if is_method else "make it a method with @hookimpl"
                yield _problem(f"{name} is the name of a hook but is not marked", how)
            elif meant := _probably_a_hook(name, member):
                message = f"{name} looks like {meant} misspelt, and without @hookimpl"
                yield _problem(message, f"if it is no hook, call it _{name}")
        elif name in HOOKS:
            yield from _implementation_mistakes(name, member, options)
        elif name in PLAIN_METHODS:
            yield _problem(f"{name} is a plain method, not a hook", "remove @hookimpl")
        elif not options.get("optionalhook"):
            yield _problem(f"there is no hook {name}", _did_you_mean(name, HOOKS))


def _probably_a_hook(name: str, member: object) -> str | None:
    """The hook that an unmarked method has almost the name and some arguments of.

    A name without the ``on_`` of a hook, or with another word beside the hook's name, is that of a helper.
    """
    close = None if name.startswith("_") else next(iter(difflib.get_close_matches(name, HOOKS, 1, 0.8)), None)
    function = getattr(member, "__func__", member)
    if close is None or not inspect.isfunction(function):
        return None
    is_helper = close in name.rsplit("_", 1) or close in name.split("_", 1)
    if is_helper or (close.startswith("on_") and not name.startswith("on")):
        return None
    arguments = list(inspect.signature(function).parameters)[1:]
    return close if arguments and {*arguments} <= {*HOOKS[close].arguments} else None


def _implementation_mistakes(
    name: str, member: object, options: Mapping[str, Any], *, bound: bool = False
) -> Iterator[Problem]:
    """``bound``: the member is called as it is, without ``self``."""
    if isinstance(member, (partial, partialmethod)):
        yield _problem(f"{name} is a functools.{type(member).__name__}", "write a method that calls the function")
        return
    if used := [option for option in FORBIDDEN_OPTIONS if options.get(option)]:
        yield _problem(f"{name}: @hookimpl takes no {', '.join(used)}", "declare the order by before and after")
    if name in CLASS_HOOKS and not isinstance(member, classmethod):
        yield _problem(f"{name} is called before there is an instance", "write @classmethod above @hookimpl")
    if name not in CLASS_HOOKS and isinstance(member, (classmethod, staticmethod)):
        yield _problem(f"{name} must be an ordinary method")
        return
    function: Any = getattr(member, "__func__", member)
    if not hasattr(function, MARK):
        yield _problem(f"{name}: @classmethod is below @hookimpl", "write @classmethod above @hookimpl, not below it")
    function = inspect.unwrap(function)
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        yield _problem(f"{name} is async", "hooks are called and not awaited")
    elif inspect.isgeneratorfunction(function):
        yield _problem(f"{name} has a yield, so calling it would run nothing", "return the result instead")
    if bound and not inspect.ismethod(member):
        yield from _signature_mistakes(name, inspect.signature(function), first="")
    else:
        yield from _signature_mistakes(name, inspect.signature(function), "cls" if name in CLASS_HOOKS else "self")


def _signature_mistakes(name: str, signature: inspect.Signature, first: str) -> Iterator[Problem]:
    """An implementation takes any of its hook's arguments, in any order: each is found by its name.

    ``first`` is the usual name of the argument before them; empty if there is none.
    """
    parameters = list(signature.parameters.values())
    expected = HOOKS[name].arguments
    plain = [p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty for p in parameters]
    has_first = not first or (bool(parameters) and parameters[0].name not in expected)
    if not all(plain) or not has_first:
        given = inspect.Signature([p.replace(annotation=p.empty) for p in parameters])
        all_of_them = ", ".join((first, *expected) if first else expected)
        message = f"{name} must take ({all_of_them}) or fewer of these, without defaults, * or keyword-only arguments"
        yield _problem(message, f"it takes {given}")
    for p in parameters[bool(first) :]:
        if p.name not in expected and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            hint = _did_you_mean(p.name, expected) or f"it has {', '.join(expected)}"
            yield _problem(f"{name} has no argument {p.name}", hint)


def _class_mistakes(cls: type[Plugin[Any]], has_instance: bool) -> Iterator[Problem]:
    if cls.__eq__ is not object.__eq__ or cls.__hash__ is not object.__hash__:
        message = "the class has an __eq__ of its own (attrs.define makes one)"
        yield _problem(message, "use @attrs.define(eq=False)")
    if inspect.isabstract(cls):
        yield _problem(f"{cls.__name__} is abstract and cannot be made")
    try:
        inspect.signature(cls.__init__).bind(None, None)
    except TypeError:
        if not has_instance:
            yield _problem("__init__ must take exactly (self, config)")
    if cls.ranks not in ("main", "all"):
        yield _problem(f"ranks is {cls.ranks!r}", 'expected "main" or "all"')
    if cls.ranks != "all" and cls.weight_sets is not Plugin.weight_sets:
        yield _problem("weight_sets is called on every process", 'write ranks = "all"')
    if cls.on_error not in (None, "abort", "disable"):
        yield _problem(f"on_error is {cls.on_error!r}", 'expected "abort", "disable" or None')
    for name in ("before", "after", "requires", "uses", "aliases"):
        value: object = getattr(cls, name)
        if not isinstance(value, tuple) or not all(isinstance(item, str) for item in value):
            yield _problem(f"{name} is {value!r}", f"expected a tuple of plugin names, such as ({str(value)!r},)")
    if not isinstance(cls.state_version, int) or cls.state_version < 1:
        yield _problem(f"state_version is {cls.state_version!r}", "expected a whole number from 1")


def _config_mistakes(cls: type[Plugin[Any]]) -> Iterator[Problem]:
    config: Any = cls.Config
    if not isinstance(config, type) or not attrs.has(config):
        yield _problem("Config must be a frozen attrs class", "write @attrs.frozen above it")
        return
    yield from _table_mistakes(config, "Config")
    for a in attrs.fields(config):
        if a.default is NOTHING:
            message = f"Config.{a.name} has no default"
            yield _problem(message, "a plugin must work without a table in the configuration")


def _table_mistakes(table: type, path: str, outer: tuple[type, ...] = ()) -> Iterator[Problem]:
    """Mistakes in a configuration class and the classes of its fields. ``outer``: the enclosing classes."""
    if table in outer:
        yield _problem(f"{path} is a {table.__name__} inside a {table.__name__}, which has no end")
        return
    if not attrs.inspect(table).is_frozen:
        yield _problem(f"{path} can be changed after it is made", "write @attrs.frozen above it")
    known = {a.name for a in attrs.fields(table)}
    for name, value in vars(table).items():
        if not (name.startswith("_") or name in known or callable(value) or hasattr(type(value), "__get__")):
            yield _problem(f"{path}.{name} has no type annotation, so it is not a field")
    try:
        hints = get_type_hints(table, include_extras=True)
    except Exception as error:
        yield _problem(f"{path} has an annotation that cannot be read: {error}")
        return
    for a in attrs.fields(table):
        annotation = hints.get(a.name, a.type)
        if problem := key_problem(a):
            yield _problem(f"{path}.{a.name} {problem}")
        try:
            type_ = parse_type(annotation)
        except UnsupportedType as error:
            name = error.part.__name__ if isinstance(error.part, type) else str(error.part)
            yield _problem(f"{path}.{a.name} has the type {name}", SUPPORTED_TYPES)
            continue
        try:
            default = default_of(table, a)
        except PluginError as error:
            yield _problem(str(error))
            continue
        if problem := _default_problem(default, annotation):
            yield _problem(f"{path}.{a.name} has a default that it could not be set to: {problem}")
        for inner in type_.tables:
            yield from _table_mistakes(inner, f"{path}.{a.name}", (*outer, table))


def _default_problem(default: object, kind: Any) -> str:
    """Why a plain value cannot be the default of a field; empty if it can. Other values are not checked."""
    from gpt_simple.config.convert import convert  # slow to import, and only active plugins need it

    if default is None or (isinstance(default, (bool, int, float, str, Path, Enum)) and default is not NOTHING):
        with suppress(PluginError):  # a nested field of an unsupported type has a mistake of its own
            return "; ".join(str(error) for _, error in convert(kind, default)[1])
    return ""


def _options(member: Any) -> dict[str, Any] | None:
    """The options of ``@hookimpl``, above or below another decorator."""
    for candidate in (member, getattr(member, "__func__", None)):
        options: object = getattr(candidate, MARK, None)
        if isinstance(options, dict):
            return options
    return None


def _did_you_mean(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, names, 1)
    return f"did you mean {close[0]}?" if close else ""


def _problem(message: str, hint: str = "") -> Problem:
    return Problem(None, "", message, hint)
