"""All mistakes of a plugin at once, each in the author's terms."""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping
from enum import Enum
from functools import partial, partialmethod
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import attrs
import pytest
from annotated_types import Ge
from attrs import define, frozen
from typing_extensions import Doc

from gpt_simple import Plugin, hookimpl
from gpt_simple.config.convert import convert
from gpt_simple.config.types import fields_of
from gpt_simple.errors import PluginError
from gpt_simple.hooks.specs import HOOKS
from gpt_simple.plugin_host.lint import hooks_of, lint, lint_instance
from gpt_simple.spec import resolve_spec


class Color(Enum):
    RED = "red"
    BLUE = "blue"


class Odd(Enum):
    """A configuration file cannot say which one is meant."""

    ONE = object()


def shown(plugin: object) -> list[str]:
    """What the lint finds, as it is shown."""
    return [str(problem) for problem in lint(plugin)]


class Good(Plugin):
    """Keeps every rule, also with an inherited hook, a helper and a hook of a newer version."""

    @hookimpl
    def on_metrics(self, run, event):
        self.helper()

    @classmethod
    @hookimpl
    def register_components(cls, registry):
        pass

    @hookimpl(optionalhook=True)
    def on_something_of_the_future(self, run, event):
        pass

    def helper(self):
        pass


class Better(Good):
    @hookimpl
    def on_close(self, run, event):
        pass


def test_a_good_plugin_has_no_mistakes() -> None:
    assert shown(Good) == shown(Better) == []
    assert hooks_of(Better) == ["register_components", "on_metrics", "on_close"]


def test_every_mistake_is_reported_at_once() -> None:
    class Bad(Plugin):
        ranks = "some"

        @hookimpl
        def on_metrcs(self, run, event):
            pass

        def on_log(self, run, event):
            pass

        @hookimpl
        async def on_step_end(self, run, event=None):
            pass

    mistakes = "\n".join(shown(Bad))
    for part in (
        "no hook on_metrcs; did you mean on_metrics?",
        "on_log is the name of a hook but is not marked",
        "on_step_end is async",
        "on_step_end must take (self, run, event) or fewer of these",
        "ranks is 'some'",
    ):
        assert part in mistakes


def hook_with(signature: str, hook: str = "on_metrics", decorators: str = "@hookimpl") -> type[Plugin]:
    space: dict[str, object] = {"Plugin": Plugin, "hookimpl": hookimpl}
    source = f"class P(Plugin):\n    {decorators}\n    def {hook}({signature}):\n        pass\n"
    exec(source, space)
    return space["P"]  # type: ignore[return-value]


@pytest.mark.parametrize(
    "signature",
    [
        "",
        "run, event",
        "self, run, event, extra",
        "self, run, event=None",
        "self, run, *, event",
        "self, run, event, *rest",
        "self, run, event, **rest",
        "self, *arguments",
        "self, run, event, /",
    ],
)
def test_a_hook_takes_self_and_its_arguments_without_defaults(signature: str) -> None:
    assert len(shown(hook_with(signature))) == 1


@pytest.mark.parametrize(
    ("hook", "signature"),
    [
        ("on_metrics", "self"),
        ("on_metrics", "self, run"),
        ("on_metrics", "self, event"),
        ("on_metrics", "self, event, run"),
        ("evaluate", "self, event"),
        ("collect_metrics", "self"),
        ("check_config", "self"),
    ],
)
def test_an_implementation_may_take_fewer_arguments_in_any_order(hook: str, signature: str) -> None:
    assert shown(hook_with(signature, hook)) == []


def test_a_class_method_may_take_fewer_arguments_too() -> None:
    assert shown(hook_with("cls", "register_components", "@classmethod\n    @hookimpl")) == []


def test_an_unknown_argument_is_named_with_the_similar_one() -> None:
    assert shown(hook_with("self, run, evnt, trainer")) == [
        "on_metrics has no argument evnt; did you mean event?",
        "on_metrics has no argument trainer; it has run, event",
    ]
    assert shown(hook_with("self, cfg", "check_config"))[0].startswith("check_config has no argument cfg; ")
    assert len(shown(hook_with("self, run, evnt=None"))) == 2


def test_the_message_shows_the_signature_as_it_was_written() -> None:
    assert shown(hook_with("self, run, *, event"))[0].endswith("it takes (self, run, *, event)")
    assert shown(hook_with("self, run, event, /"))[0].endswith("it takes (self, run, event, /)")


def test_a_misspelt_hook_is_found_without_its_decorator() -> None:
    class P(Plugin):
        def on_metrcs(self, run, event):
            pass

        def on_metric(self, value):
            pass

        def on_step_ends(self):
            pass

        def on_evl_end(self, event):
            pass

        def _on_metrics(self, run, event):
            pass

        def render(self, run, event):
            pass

    assert shown(P) == [
        "on_metrcs looks like on_metrics misspelt, and without @hookimpl; if it is no hook, call it _on_metrcs",
        "on_evl_end looks like on_eval_end misspelt, and without @hookimpl; if it is no hook, call it _on_evl_end",
    ]


HELPERS = [hook.removeprefix("on_") for hook in HOOKS if hook.startswith("on_")]
HELPERS += [f"{hook}_{word}" for hook in HOOKS for word in ("one", "to")]
HELPERS += [f"{word}_{hook}" for hook in HOOKS for word in ("re", "do")]


@pytest.mark.parametrize("helper", HELPERS)
def test_a_helper_named_after_a_hook_is_no_misspelt_hook(helper: str) -> None:
    arguments = {argument: None for hook in HOOKS.values() if hook.name in helper for argument in hook.arguments}
    for taken in (["run"], ["run", "event"], list(arguments)):
        space: dict[str, Any] = {}
        exec(f"def {helper}(self, {', '.join(taken)}):\n    pass", space)
        assert shown(type("P", (Plugin,), {helper: space[helper]})) == []


TYPOS = {hook: hook[:4] + hook[5:] for hook in HOOKS if len(hook) > 8}


@pytest.mark.parametrize("hook", TYPOS)
def test_a_hook_without_one_letter_is_misspelt(hook: str) -> None:
    space: dict[str, Any] = {}
    exec(f"def {TYPOS[hook]}(self, {HOOKS[hook].arguments[0]}):\n    pass", space)
    (problem,) = shown(type("P", (Plugin,), {TYPOS[hook]: space[TYPOS[hook]]}))
    assert problem.startswith(f"{TYPOS[hook]} looks like {hook} misspelt")


@pytest.mark.parametrize("option", ["wrapper", "hookwrapper", "tryfirst", "trylast"])
def test_order_is_no_matter_of_a_single_hook(option: str) -> None:
    class P(Plugin):
        @hookimpl(**{option: True})
        def on_metrics(self, run, event):
            pass

    assert [option in mistake for mistake in shown(P)] == [True]


def test_a_hook_under_another_name_is_refused() -> None:
    class P(Plugin):
        @hookimpl(specname="on_metrics")
        def on_step_end(self, run, event):
            pass

    assert "specname" in shown(P)[0]


def test_a_generator_would_never_run() -> None:
    class P(Plugin):
        @hookimpl
        def on_metrics(self, run, event):
            yield

    assert "yield" in shown(P)[0]


def test_components_are_registered_by_the_class() -> None:
    class OnInstance(Plugin):
        @hookimpl
        def register_components(self, registry):
            pass

    class WrongWayRound(Plugin):
        @hookimpl
        @classmethod
        def register_components(cls, registry):
            pass

    class OtherOnClass(Plugin):
        @classmethod
        @hookimpl
        def on_metrics(cls, run, event):
            pass

    assert "write @classmethod above @hookimpl" in shown(OnInstance)[0]
    assert "above @hookimpl, not below" in shown(WrongWayRound)[0]
    assert "ordinary method" in shown(OtherOnClass)[0]


def test_plain_methods_are_no_hooks() -> None:
    class P(Plugin):
        @hookimpl
        def state_dict(self):
            return {}

    assert "remove @hookimpl" in shown(P)[0]


@pytest.mark.parametrize(("thing", "part"), [(Good(None), "not an instance"), (print, "found a"), (dict, "subclass")])
def test_an_entry_point_names_a_plugin_class(thing: object, part: str) -> None:
    assert part in shown(thing)[0]


def test_a_generated_eq_is_refused() -> None:
    @define
    class P(Plugin):
        config: object

    @define(eq=False)
    class Q(Plugin):
        config: object

    assert "eq=False" in shown(P)[0]
    assert shown(Q) == []


def test_the_constructor_takes_the_configuration() -> None:
    class P(Plugin):
        def __init__(self) -> None:
            pass

    assert shown(P) == ["__init__ must take exactly (self, config)"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("on_error", "ignore"),
        ("before", "metrics"),
        ("after", ["metrics"]),
        ("requires", "metrics"),
        ("uses", [1]),
        ("aliases", (1,)),
        ("state_version", 0),
        ("state_version", "1"),
    ],
)
def test_declarations_have_their_types(name: str, value: object) -> None:
    mistakes = shown(type("P", (Plugin,), {name: value}))
    assert len(mistakes) == 1
    assert mistakes[0].startswith(name)


def config_of(**fields: object) -> type[Plugin]:
    return type("P", (Plugin,), {"Config": attrs.make_class("Config", fields, frozen=True)})


def test_configuration_is_frozen_attrs_with_defaults() -> None:
    class Bare:
        path: str = "x"

    @define
    class Mutable:
        path: str = "x"

    @frozen
    class NoDefault:
        path: str
        size: int

    @frozen
    class Forgotten:
        path = "x"

    parts = {
        Bare: ["frozen attrs class"],
        Mutable: ["can be changed"],
        NoDefault: ["Config.path has no default", "Config.size has no default"],
        Forgotten: ["Config.path has no type annotation"],
    }
    for config, expected in parts.items():
        mistakes = shown(type("P", (Plugin,), {"Config": config}))
        assert len(mistakes) == len(expected)
        assert all(part in mistake for part, mistake in zip(expected, mistakes, strict=True))


@pytest.mark.parametrize(
    ("kind", "default"),
    [
        (bool, True),
        (int, 1),
        (float, 1),
        (str, "a"),
        (str | None, None),
        (tuple[int, ...], ()),
        (Mapping[str, float], {}),
        (Literal["a"], "a"),
        (str | tuple[str, ...], "a"),
        (Annotated[int, Ge(1), Doc("x")], 1),
        (tuple[Annotated[int, Ge(1)], ...], ()),
        (tuple[float, int], (0.5, 1)),
        (Path, Path("a")),
        (Path | None, None),
        (Color, Color.RED),
    ],
)
def test_supported_types(kind: object, default: object) -> None:
    plugin = config_of(value=attrs.field(default=default, type=kind))
    assert shown(plugin) == []
    assert fields_of(plugin.Config)


@pytest.mark.parametrize(
    ("kind", "default", "problem"),
    [
        (str, None, "expected text, got null"),
        (int, "5", "expected an integer, got"),
        (bool, 1, "got 1"),
        (Literal["a", "b"], "c", "expected one of"),
        (Annotated[int, Ge(1)], 0, "expected an integer >= 1, got 0"),
        (Color, "green", 'expected one of "red", "blue", got "green"'),
        (Path, "", "expected a path"),
        (tuple[float, float], 1, "expected a list of 2 numbers, got 1"),
        (tuple[float, str], 1, "expected a list of 2 values (a number, text), got 1"),
    ],
)
def test_a_default_that_the_field_could_not_be_set_to(kind: object, default: object, problem: str) -> None:
    (mistake,) = shown(config_of(value=attrs.field(default=default, type=kind)))
    assert mistake.startswith("Config.value has a default that it could not be set to: ")
    assert problem in mistake


@define
class Inner:
    numbers: list[int]
    forgotten = 3


def test_a_table_in_a_table_keeps_the_same_rules() -> None:
    @frozen
    class Outer:
        inner: Inner | None = None
        rows: tuple[Inner, ...] = ()

    mistakes = shown(type("P", (Plugin,), {"Config": Outer}))
    for path in ("Config.inner", "Config.rows"):
        assert f"{path} can be changed after it is made; write @attrs.frozen above it" in mistakes
        assert f"{path}.forgotten has no type annotation, so it is not a field" in mistakes
        assert any(mistake.startswith(f"{path}.numbers has the type list[int]; supported are") for mistake in mistakes)


def test_what_has_the_name_of_a_hook_and_is_no_method() -> None:
    class P(Plugin):
        @property
        def on_metrics(self):
            return 1

    assert shown(P) == ["on_metrics is the name of a hook but is not marked; make it a method with @hookimpl"]


@pytest.mark.parametrize(
    "kind",
    [
        list[int], dict[str, int], set[str], bytes, object, tuple[int, bytes], tuple[()], Odd, Mapping[int, str],
        list, complex, str | bytes, Final[int], typing.Mapping,
    ],
)  # fmt: skip
def test_what_a_configuration_file_cannot_hold(kind: object) -> None:
    plugin = config_of(value=attrs.field(default=None, type=kind), other=attrs.field(default=None, type=list))
    assert ["Config.value" in mistake for mistake in shown(plugin)] == [True, False]
    with pytest.raises(PluginError):
        fields_of(plugin.Config)


def test_an_annotation_that_does_not_exist() -> None:
    plugin = config_of(value=attrs.field(default=None, type="Nonsense"))
    assert "cannot be read" in shown(plugin)[0]


def test_a_key_and_its_field_have_one_name() -> None:
    plugin = config_of(_hidden=attrs.field(default=1, type=int), value=attrs.field(default=1, type=int, alias="other"))
    assert shown(plugin) == [
        "Config._hidden begins with an underscore, which no key of a configuration does: call it hidden",
        "Config.value has the alias 'other': a key and its field have one name",
    ]
    with pytest.raises(PluginError, match="_hidden begins with an underscore"):
        fields_of(plugin.Config)


def test_a_default_may_follow_from_other_fields() -> None:
    @frozen
    class Table:
        every: int = 3
        window: int = attrs.field()

        @window.default
        def _twice(self):
            return 2 * self.every

    assert shown(type("P", (Plugin,), {"Config": Table})) == []
    assert {spec.name: spec.default for spec in fields_of(Table)} == {"every": 3, "window": 6}
    assert convert(Table, {"every": 5}) == (Table(5, 10), [])


def test_a_default_that_cannot_be_computed_is_named() -> None:
    def fails():
        raise RuntimeError("no default today")

    plugin = config_of(value=attrs.field(factory=fails, type=int))
    (mistake,) = shown(plugin)
    assert mistake.endswith("value has a default that cannot be computed: RuntimeError: no default today")


def call(run, event, other=None):
    """A function for a partial."""


@pytest.mark.parametrize(
    ("member", "expected"),
    [
        (hookimpl(partial(call, other=1)), "is a functools.partial; write a method that calls the function"),
        (hookimpl(partialmethod(call, other=1)), "is a functools.partialmethod; write a method that calls"),
        (partial(call, other=1), "is the name of a hook but is not marked; make it a method with @hookimpl"),
        (partialmethod(call, other=1), "is the name of a hook but is not marked; make it a method with @hookimpl"),
    ],
)
def test_a_partial_is_no_method(member: object, expected: str) -> None:
    (mistake,) = shown(type("P", (Plugin,), {"on_metrics": member}))
    assert mistake.startswith(f"on_metrics {expected}")


@pytest.mark.parametrize(
    ("name", "member", "expected"),
    [
        ("on_metrics", call, "on_metrics is set on the instance without @hookimpl, so it is never called"),
        ("on_metrics", hookimpl(partial(call, other=1)), "on_metrics is a functools.partial"),
        ("on_metrics", hookimpl(lambda run, evnt: None), "on_metrics has no argument evnt; did you mean event?"),
        ("on_metric", hookimpl(lambda run, event: None), "there is no hook on_metric; did you mean on_metrics?"),
    ],
)
def test_a_hook_replaced_on_the_instance(name: str, member: object, expected: str) -> None:
    class Replaces(Plugin):
        def __init__(self, config):
            setattr(self, name, member)

        @hookimpl
        def on_metrics(self, run, event):
            pass

    assert shown(Replaces) == []
    (mistake,) = map(str, lint_instance(Replaces(None)))
    assert mistake.startswith(expected)
    with pytest.raises(PluginError, match=re.escape(expected)):
        resolve_spec(None, plugins=[Replaces])


def test_a_marked_hook_may_be_set_on_the_instance() -> None:
    class Sets(Plugin):
        def __init__(self, config):
            self.on_metrics = hookimpl(lambda event: None)
            self.on_close = self._close

        @hookimpl(optionalhook=True)
        def _close(self, run):
            pass

    assert lint_instance(Sets(None)) == []
