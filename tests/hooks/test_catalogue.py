"""The contract itself: every hook is documented with an example that keeps the rules, and no change goes unseen."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import attrs
import pytest

import gpt_simple
from gpt_simple import Plugin, hookimpl, hooks, testing
from gpt_simple.hooks import HOOKS, Registry, batch, events, losses, parts, preflight, results, run, step, store
from gpt_simple.hooks.specs import HookSpecs
from gpt_simple.plugin_host.dispatch import DISPATCHED, Calls
from gpt_simple.plugin_host.lint import hooks_of, lint

GOLDEN = Path(__file__).with_name("catalogue.json")


def catalogue() -> dict[str, object]:
    """The contract as plain data: any change to it shows in the diff of the golden file."""
    return {
        "hooks": {
            name: {
                "arguments": list(info.arguments),
                "event": info.event.__name__ if info.event else None,
                "ranks": info.ranks,
                "returns": info.returns,
                "order": info.order,
                "signature": str(inspect.signature(getattr(HookSpecs, name))),
            }
            for name, info in HOOKS.items()
        },
        "events": {
            name: {
                field.alias: str(field.type) if field.alias == field.name else _signature(getattr(value, field.alias))
                for field in attrs.fields(value)
            }
            for name, value in sorted({**vars(events), **vars(results)}.items())
            if isinstance(value, type) and attrs.has(value) and value.__module__ in (events.__name__, results.__name__)
        },
        "preflight": {
            name: {field.name: str(field.type) for field in attrs.fields(value)}
            if attrs.has(value)
            else {member: _signature(item) for member, item in vars(value).items() if not member.startswith("_")}
            for name, value in sorted(vars(preflight).items())
            if isinstance(value, type) and value.__module__ == preflight.__name__
        },
        "plugin": {name: _signature(member) for name, member in vars(Plugin).items() if not name.startswith("_")},
        "run": {
            f"{name}.{member}": _signature(value)
            for name, cls in sorted({**vars(run), **vars(store), "Registry": Registry}.items())
            if isinstance(cls, type) and cls.__module__ in (run.__name__, store.__name__, Registry.__module__)
            for member, value in vars(cls).items()
            if not member.startswith("_")
        },
        "step": {
            name: _signature(value.__call__) if inspect.isclass(value) else _signature(value)
            for name, value in sorted(vars(step).items())
            if getattr(value, "__module__", "") == step.__name__
        },
        "parts": {
            name: {**inspect.get_annotations(value), **_methods(value)}
            for name, value in sorted({**vars(parts), **vars(batch)}.items())
            if inspect.isclass(value) and value.__module__ in (parts.__name__, batch.__name__)
        },
        "losses": {name: str(kind) for name, kind in losses.Losses.__annotations__.items()},
        "names": {module.__name__: sorted(module.__all__) for module in (gpt_simple, hooks, testing)},
    }


def _methods(cls: type) -> dict[str, str]:
    public = {name: item for name, item in vars(cls).items() if name == "__call__" or not name.startswith("_")}
    return {name: _signature(item) for name, item in public.items() if callable(item) or isinstance(item, property)}


def _signature(member: object) -> str:
    function = member.fget if isinstance(member, property) else member
    if not inspect.isfunction(function):
        return repr(member) if isinstance(member, (str, int, tuple, type, type(None))) else type(member).__name__
    return f"{'property ' if isinstance(member, property) else ''}{inspect.signature(function)}"


def test_the_contract_is_the_one_that_was_published() -> None:
    assert catalogue() == json.loads(GOLDEN.read_text()), f"write the new contract: python {Path(__file__).name}"


@pytest.mark.parametrize("hook", HOOKS)
def test_the_worked_example_of_a_hook_keeps_the_contract(hook: str) -> None:
    document = inspect.getdoc(getattr(HookSpecs, hook)) or ""
    assert "::\n" in document
    example = textwrap.indent(textwrap.dedent(document.partition("::\n")[2]), "    ")
    space = {"Plugin": Plugin, "hookimpl": hookimpl}
    exec(f"class P(Plugin):\n{example}", space)
    assert lint(space["P"]) == []
    assert hooks_of(space["P"]) == [hook]


def test_every_event_is_frozen_and_every_hook_can_be_called() -> None:
    for info in HOOKS.values():
        assert info.event is None or attrs.inspect(info.event).is_frozen
    own = {"on_failure", "alone", "strict", "guard", "switched_off", "_callers"}
    assert {field.name for field in attrs.fields(Calls)} == {*DISPATCHED, *own}


def test_the_contract_is_light_and_free_of_torch() -> None:
    code = (
        "import sys, gpt_simple.hooks, gpt_simple.plugin_host.host\n"
        "print(*(m for m in ('torch', 'accelerate', 'click', 'rich') if m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(catalogue(), indent=2) + "\n")
