"""Write hooks.md, run.md and components.md in plugins/ from the contract: `python docs/build_hook_reference.py`."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import attrs

from gpt_simple.data import sources
from gpt_simple.hooks import HOOKS, Batch, HookInfo, parts
from gpt_simple.hooks.batch import Tokenizer
from gpt_simple.hooks.components import CONFIG_KEY, KINDS, SCHEDULE_FIELDS, SECTION_FIELDS, Kind, builtin_registry
from gpt_simple.hooks.losses import Loss, Losses
from gpt_simple.hooks.run import (
    CHECKED,
    ONLY_IN,
    SINCE,
    TOGETHER,
    CheckpointInfo,
    Checkpoints,
    Comm,
    Control,
    Log,
    Run,
)
from gpt_simple.hooks.specs import HookSpecs
from gpt_simple.hooks.step import Backward, Step, accumulate
from gpt_simple.hooks.store import CheckpointStore

FOLDER = Path(__file__).with_name("plugins")

HOOKS_HEAD = """# Hooks

This page lists all hooks, in the order in which a run first calls them. `docs/build_hook_reference.py` generates it
from `gpt_simple/hooks/specs.py`, which is the contract. [policy.md](policy.md) describes the rules, and
[run.md](run.md) the argument `run`.

A hook named `on_*` is a notification and returns nothing. Any other name is a verb, and its result is used. An
implementation may take [fewer arguments](policy.md#arguments-of-a-hook) than its hook has. All examples are methods of
a plugin class:

```python
import time
from gpt_simple import Finding, Metric, Plugin, hookimpl
```
"""

RANKS = {
    "all": "every process",
    "main": "the main process",
    "plugin": "the plugin's `ranks`: the main process, or all of them",
}

RUN_HEAD = """# run

This page lists all members of `run`, which hooks get as their argument. `docs/build_hook_reference.py` generates it
from `gpt_simple/hooks/run.py`. Anything else of a run is private to the engine.

The tables have the first hook in which a member is there, in the order of [hooks.md](hooks.md). A member that is used
earlier raises PluginError, which names that hook. `on_log`, `on_run_error` and `on_close` have what there is at that
moment.

A member that is used by *any* process makes no process wait for another. One for *all together* is a collective. It is
used in hooks that all processes run at once: TOGETHER. In any other hook it raises PluginError instead of hanging, with
one process, too.
"""

COMPONENTS_HEAD = """# Components

This page describes the replaceable parts of a run. `docs/build_hook_reference.py` generates it from
`gpt_simple/hooks/parts.py` and the protocols beside it. The configuration chooses each part by its name, and an
installed package changes nothing:

TABLE

## Bring a component

A plugin adds a part in `register_components`. The plugin must be active, as
[policy.md](policy.md#which-plugins-a-run-has) describes. A part is a factory, or its place as `"module:attribute"`,
which is imported when the part is used. The names of a factory's arguments are free, but for those after `*`.

```python
# file: halving.py
from gpt_simple import Plugin, hookimpl


def halving(config, max_steps):
    return lambda step: config.learning_rate * 0.5 ** (step // 10)


class Halving(Plugin):
    @classmethod
    @hookimpl
    def register_components(cls, registry):
        registry.add("schedule", "halving", halving)
```

It trains with the same engine, checkpoints and resume as a built-in part:

```bash
options="-p ./halving.py --optimizer.schedule halving --data.source stories --data.max_documents 100
  --data.tokenizer bytes --data.max_length 32 --model.n_embd 16 --model.n_head 2 --model.n_layer 1
  --training.compile false --training.output_dir run"
gpt-simple run $options --training.max_steps 3
gpt-simple run $options --training.max_steps 6 | grep "resumed from step 3"
```

## The class of a section

A model, an optimizer or a source may bring the class of its section (`[model]`, `[optimizer]`, `[data]`):
`registry.add(kind, name, factory, config=SomeClass)`. It is a frozen attrs class like the
[configuration of a plugin](policy.md#configuration), and gets the same validation, help and JSON Schema as a built-in
section. It must have the fields that the engine reads, which are listed below. It may inherit from
`gpt_simple.ModelConfig`, `OptimizerConfig` or `DataConfig`.

## Other options

The options of a step, a loss, a store or a schedule are its plugin's own, in the table `[plugins.NAME]`. The factory
finds them in the whole configuration, as `plugins.tables["NAME"]`. A schedule gets that as `run_config`, if its factory
has a parameter of this name. A tokenizer gets the section `[data]` alone, because prepared data are found again by it:

```python
# file: halving.py
from attrs import frozen
from gpt_simple import Plugin, hookimpl


@frozen
class HalvingConfig:
    every: int = 10


def halving(config, max_steps, *, run_config):
    every = run_config.plugins.tables["halving"].every
    return lambda step: config.learning_rate * 0.5 ** (step // every)


class Halving(Plugin):
    Config = HalvingConfig

    @classmethod
    @hookimpl
    def register_components(cls, registry):
        registry.add("schedule", "halving", halving)
```

```bash
gpt-simple run -p ./halving.py --optimizer.schedule halving --data.source stories --data.max_documents 100 \\
  --data.tokenizer bytes --data.max_length 32 --model.n_embd 16 --model.n_head 2 --model.n_layer 1 \\
  --training.compile false --training.output_dir run2 --training.max_steps 3 --plugins.halving.every 2
```

## Mistakes

A mistake of a part ends the run with exit code 5 and the name and file of its plugin:

- a class of a section that lacks a field
- a factory that fails, or makes something without the required members
- a method or a property that fails when the engine calls it, in the backward pass, too
- a rate that is not a finite number, a loss that returns no `Losses`, a step that returns no 0-d tensor or leaves
  gradients that are not reduced

A part refuses a value of the configuration with `ConfigError("expected an even number", key="model.n_embd", hint="write
64")`. The user sees the file and the line of that key. A source refuses bad data with `DataError`. Both keep their exit
codes. `plugins check` and [`check_contract`](testing.md#the-contract) train and resume every part of a
plugin but a store.

The examples below train a tiny model with a part alone:

```python
import itertools
import shutil
from pathlib import Path
from typing import Annotated

import tokenizers
import torch
import torch.nn.functional as F
from annotated_types import Ge
from attrs import frozen
from torch import nn
from typing_extensions import Doc

from gpt_simple import Document
from gpt_simple.data.tokenizer import JsonTokenizer
from gpt_simple.hooks import Component, Losses, accumulate
from gpt_simple.testing import train
```
"""

PARTS: dict[Kind, tuple[type, Sequence[type], Sequence[type]]] = {
    "model": (parts.ModelFactory, (parts.Model, Losses), (parts.ModelExtras,)),
    "optimizer": (parts.OptimizerFactory, (parts.Optimizer,), (parts.OptimizerExtras,)),
    "schedule": (parts.ScheduleFactory, (parts.Schedule,), ()),
    "tokenizer": (parts.TokenizerFactory, (Tokenizer,), (parts.TokenizerExtras,)),
    "source": (parts.SourceFactory, (sources.Source, sources.Stream, sources.Document), (sources.WeighsTargets,)),
    "store": (parts.StoreFactory, (CheckpointStore,), (parts.StoreExtras,)),
    "step": (parts.StepFactory, (Step, Backward, Batch), ()),
    "loss": (parts.LossFactory, (Loss,), ()),
}
"""Of each kind the factory, what it makes and that needs, and the optional members."""


def hooks_page() -> str:
    return HOOKS_HEAD + "\n" + _hook_table() + "".join(_joined(_hook_section(info)) for info in HOOKS.values())


def run_page() -> str:
    together = ", ".join(f"`{name}`" for name, info in HOOKS.items() if info.together)
    sections = [("run", Run), ("run.log", Log), ("run.control", Control)]
    sections += [("run.comm", Comm), ("run.checkpoints", Checkpoints)]
    head = _prose(RUN_HEAD.replace("TOGETHER", together)) + "\n"
    return head + "".join(_joined(_run_section(*section)) for section in sections)


def components_page() -> str:
    registry = builtin_registry()
    rows = ["| kind | chosen by | built in |", "|---|---|---|"]
    for kind in KINDS:
        names = ", ".join(f"`{name}`" for name in registry.names(kind))
        rows.append(f"| [`{kind}`](#{kind}) | `{CONFIG_KEY[kind]}` | {names} |")
    return COMPONENTS_HEAD.replace("TABLE", "\n".join(rows)) + "".join(_joined(_kind_section(kind)) for kind in KINDS)


PAGES: dict[Path, Callable[[], str]] = {
    FOLDER / "hooks.md": hooks_page,
    FOLDER / "run.md": run_page,
    FOLDER / "components.md": components_page,
}


def _joined(lines: Iterator[str]) -> str:
    return "\n" + "\n".join(lines) + "\n"


def _hook_table() -> str:
    rows = ["| hook | event | processes | returns |", "|---|---|---|---|"]
    for info in HOOKS.values():
        event = f"`{info.event.__name__}`" if info.event else f"`{', '.join(info.arguments)}`"
        returns = "" if info.returns == "none" else info.returns
        rows.append(f"| [`{info.name}`](#{info.name}) | {event} | {info.ranks} | {returns} |")
    return "\n".join(rows) + "\n"


def _hook_section(info: HookInfo) -> Iterator[str]:
    text, example = _document(getattr(HookSpecs, info.name))
    summary, _, prose = text.partition("\n\n")
    order = ", in reverse order" if info.order == "reverse" else ""
    yield f"## {info.name}\n"
    yield f"{summary}\n"
    yield f"Called on {RANKS[info.ranks]}{order}.\n"
    if info.event is not None:
        yield f"{_prose(f'`{info.event.__name__}`: {_document(info.event)[0]}')}\n"
        yield from (_item(f"`{name}`: `{kind}`{about}") for name, kind, about in _fields(info.event))
        yield ""
    if prose:
        yield f"{prose}:\n"
    yield f"```python\n{example}\n```"


def _fields(event: type) -> Iterator[tuple[str, str, str]]:
    """Name and type of each field, and of each property what it is."""
    for field in attrs.fields(event):
        computed = getattr(event, field.alias, None)
        if isinstance(computed, property):
            yield field.alias, inspect.signature(computed.fget).return_annotation, f". {_document(computed)[0]}"
        else:
            yield field.name, field.type, ""


def _run_section(owner: str, cls: type) -> Iterator[str]:
    members = {f"{owner}.{member.name}": member for member in _members(cls)}
    yield f"## Members of {owner}\n"
    yield f"{_prose(_document(cls)[0])}\n"
    yield "| member | from | processes |\n|---|---|---|"
    for name in members:
        key = name.removeprefix("run.")
        processes = "all together" if key in TOGETHER else "any"
        yield f"| [`{name}`](#{name.replace('.', '')}) | {_since(key)} | {processes} |"
    for name, member in members.items():
        yield f"\n### {name}\n"
        yield _wrapped(f"`{name}{member.signature}`") + "\n"
        yield _prose(member.about) + (f":\n\n```\n{member.example}\n```" if member.example else "")
    if cls is Checkpoints:
        yield f"\n`CheckpointInfo`: {_document(CheckpointInfo)[0]}\n"
        yield from (_item(f"`{member.name}{member.signature}`") for member in _members(CheckpointInfo))


def _since(key: str) -> str:
    if key in ONLY_IN:
        return f"only in `{ONLY_IN[key]}`"
    member = key.partition(".")[0]
    first = f"`{SINCE[member]}`" if member in SINCE else "always"
    return f"{first}, and in `check_runtime`" if member in CHECKED else first


def _kind_section(kind: Kind) -> Iterator[str]:
    factory, protocols, extras = PARTS[kind]
    text, example = _document(factory)
    (call,) = _members(factory)
    yield f"## {kind}\n"
    yield f"Chosen by `{CONFIG_KEY[kind]}`. The factory is called as:\n"
    yield f"```\nfactory{call.signature}\n```\n"
    yield f"{_prose(text)}\n"
    if kind in SECTION_FIELDS:
        section = CONFIG_KEY[kind].partition(".")[0]
        fields = ", ".join(f"`{name}`" for name in SECTION_FIELDS[kind])
        schedules = ", ".join(f"`{name}`" for name in SCHEDULE_FIELDS)
        more = f" With a built-in schedule: {schedules}, too." if kind == "optimizer" else ""
        yield f"{_prose(f'A class of `[{section}]` must have: {fields}.{more}')}\n"
    for protocol in (*protocols, *extras):
        optional = "Optional: " if protocol in extras else ""
        yield f"### {protocol.__name__}\n"
        yield f"{_prose(optional + _document(protocol)[0])}\n"
        for member in _members(protocol):
            about = f": {' '.join(member.about.split())}" if member.about else ""
            name = protocol.__name__.lower() if member.name == "__call__" else member.name
            yield _item(f"`{name}{member.signature}`{about}")
        yield ""
    if kind == "step":
        yield f"### accumulate\n\n{_prose(_document(accumulate)[0])}\n"
    yield f"### Example: {kind}\n"
    yield f"```python\n{example}\n```"


@attrs.frozen
class _Member:
    """A method, a property or an attribute of a class as its source has it."""

    name: str
    signature: str
    about: str
    example: str


def _members(cls: type) -> Iterator[_Member]:
    """The public members of a class in the order of its source."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    for node, following in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(node, ast.FunctionDef):
            decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
            arguments = _code(node.args).partition("self")[2].removeprefix(", ")
            returns = _code(node.returns) if node.returns is not None else "None"
            text, example = _split(ast.get_docstring(node) or "")
            signature = f": {returns}" if "property" in decorators else f"({arguments}) -> {returns}"
            yield _Member(node.name, signature, text, example)
        elif isinstance(node, ast.AnnAssign):
            document = getattr(getattr(following, "value", None), "value", "") if following is not None else ""
            text, example = _split(inspect.cleandoc(document if isinstance(following, ast.Expr) else ""))
            default = f" = {_code(node.value)}" if node.value is not None else ""
            yield _Member(_code(node.target), f": {_code(node.annotation)}{default}", text, example)


def _code(node: ast.AST) -> str:
    return ast.unparse(node).replace("=", " = ").replace("'", '"')


def _document(thing: object) -> tuple[str, str]:
    """The text of a docstring as Markdown, and its example."""
    return _split(inspect.getdoc(thing) or "")


def _split(document: str) -> tuple[str, str]:
    text, _, example = document.partition("::\n")
    return text.removesuffix("Example").strip().replace("``", "`"), textwrap.dedent(example).strip("\n")


def _prose(text: str) -> str:
    """Paragraphs in lines of 120 columns; a heading or a fence stays as it is."""
    return "\n\n".join(_wrapped(paragraph) for paragraph in text.strip().split("\n\n"))


def _item(text: str) -> str:
    return _wrapped(f"- {text}", indent="  ")


def _wrapped(text: str, indent: str = "") -> str:
    # A line must not begin with what Markdown reads as a list.
    joined = re.sub(r" ([-+*]|\d+[.)]) ", "\N{NO-BREAK SPACE}\\1 ", " ".join(text.split()))
    return textwrap.fill(joined, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False).replace(
        "\N{NO-BREAK SPACE}", " "
    )


if __name__ == "__main__":
    for path, page in PAGES.items():
        path.write_text(page(), encoding="utf-8")
