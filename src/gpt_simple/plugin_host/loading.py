"""From a name to a checked class: import one plugin, and say whose fault it is when that fails."""

from __future__ import annotations

import heapq
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import define, field

from gpt_simple.errors import ConfigError, GptSimpleError, PluginError, Problem
from gpt_simple.hooks.plugin import OnError, Plugin
from gpt_simple.hooks.specs import HOOKS
from gpt_simple.plugin_host.discovery import PluginRecord, name_problem
from gpt_simple.plugin_host.lint import lint

if TYPE_CHECKING:
    from gpt_simple.hooks.components import Registry

PassedPlugin = Plugin[Any] | type[Plugin[Any]]

FAILURES = (Exception, SystemExit)
"""What counts as a plugin's failure. Ctrl-C and the engine's own BaseExceptions pass through a hook."""


@define(eq=False)
class LoadedPlugin:
    """An active plugin: its class, who brought it, why it is on, and what it has cost so far."""

    name: str
    cls: type[Plugin[Any]]
    distribution: str
    version: str
    why: str
    instance: Plugin[Any] | None = None
    failed: bool = False
    seconds: float = 0.0
    file: str = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.file = _source_file(self.cls)

    @property
    def ranks(self) -> str:
        return self.cls.ranks

    @property
    def on_error(self) -> OnError:
        """The declared policy, else ``disable`` on the main process and ``abort`` on all of them."""
        return self.cls.on_error or ("disable" if self.cls.ranks == "main" else "abort")

    @property
    def label(self) -> str:
        """``csvlog (gpt-simple-csvlog 0.1.0, .../csvlog.py)``: the attribution in every message."""
        package = f"{self.distribution} {self.version}".strip()
        origin = ", ".join(part for part in (package, self.file) if part)
        return f"{self.name} ({origin})" if origin else self.name

    @property
    def active(self) -> Plugin[Any]:
        """The instance, once there is one."""
        if self.instance is None:
            raise RuntimeError(f"plugin {self.name} is used before it was made")
        return self.instance

    def register_components(self, registry: Registry) -> None:
        """Let the plugin add its parts. What it does wrong there is a PluginError that names it."""
        try:
            if (register := getattr(self.cls, "register_components", None)) is not None:
                taken = inspect.signature(register).parameters
                taking_all(register, taken, HOOKS["register_components"].arguments)(registry.owned_by(self.label))
        except GptSimpleError:
            raise
        except FAILURES as error:
            raise self.failure("register_components", error) from error

    def failure(self, where: str, error: BaseException, step: int | None = None) -> PluginError:
        """The sentence for an exception in a hook or method of this plugin; what is such a sentence stays as it is."""
        if isinstance(error, PluginError) and error.blamed:
            return error
        at = "" if step is None else f" at step {step}"
        failure = PluginError(f"plugin {self.label} failed in {where}{at}: {_cause(error)}")
        failure.blamed = True
        return failure


def load_plugin(name: str, passed: object | None, record: PluginRecord | None, why: str) -> LoadedPlugin:
    """The plugin behind a name: passed from Python or read from a file, else imported from its entry point.

    Raises PluginError with one line for each mistake that the lint finds in the class.
    """
    found = load_record(record) if passed is None and record is not None else passed
    instance = found if passed is not None and isinstance(found, Plugin) else None
    cls: Any = type(instance) if instance is not None else found
    own = record if record is not None and (passed is None or record.value == _path_of(cls)) else None
    distribution, version = (own.distribution, own.version) if own else ("", "")
    try:
        mistakes = lint(cls, made=instance is not None)
    except Exception as error:
        mistakes = [f"the class cannot be looked at: {_cause(error)}"]
    if own is None and (problem := name_problem(name)):
        mistakes.append(problem)
    if own is None and record is not None and record.origin == "builtin":
        mistakes.append(f"{name!r} is the name of a built-in plugin: rename it")
    if mistakes:
        package = f"{distribution} {version}".strip()
        origin = ", ".join(part for part in (package, _source_file(cls)) if part)
        subject = f"plugin {name} ({origin})" if origin else f"plugin {name}"
        raise PluginError(*(Problem(None, "", f"{subject}: {mistake}") for mistake in mistakes))
    return LoadedPlugin(name, cls, distribution, version, why, instance)


def load_record(record: PluginRecord, kind: str = "plugin") -> object:
    """What an entry point points to. Anything that goes wrong in it is a PluginError that names the package."""
    if record.problem:
        raise PluginError(f"{kind} {record.detail}")
    module_name, _, attribute = record.value.partition(":")
    subject = f"{kind} {record.label}"
    if not attribute:
        raise PluginError(f"{subject}: its entry point is {record.value!r}", hint="expected MODULE:NAME")
    with _foreign(f"{subject}: importing {module_name} failed"):
        found: object = importlib.import_module(module_name)
    try:
        for part in attribute.split("."):
            found = getattr(found, part)
    except AttributeError as error:
        raise PluginError(f"{subject}: module {module_name} has no {attribute!r}") from error
    return found


@contextmanager
def _foreign(failure: str) -> Iterator[None]:
    """Code of others is run for the first time: whatever it raises but Ctrl-C is a PluginError that begins so.

    What it prints goes to stderr: stdout belongs to the command that was typed.
    """
    try:
        with redirect_stdout(sys.stderr):
            yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # test frameworks skip a module with one that is no Exception
        raise PluginError(f"{failure}: {_cause(error)}") from error


def load_file(path: str) -> tuple[str, object]:
    """The one plugin class of a Python file, under the name of the file."""
    file = Path(path)
    if not file.is_file() or file.suffix != ".py":
        raise ConfigError("expected the path of a Python file", location=f"-p {path}")
    if problem := name_problem(file.stem):
        raise ConfigError(f"a plugin is named after its file, and {problem}: rename the file", location=f"-p {path}")
    spec = spec_from_file_location(f"gpt_simple_plugin_file_{file.stem}", file)
    assert spec, "a .py file has a spec"
    assert spec.loader, "and a loader"
    module = module_from_spec(spec)
    # Registered before it is executed: attrs and typing look the module up while classes are made.
    sys.modules[module.__name__] = module
    try:
        with _foreign(f"plugin {file.stem} ({path}): running the file failed"):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module.__name__]
        raise
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Plugin) and value.__module__ == module.__name__
    ]
    if len(classes) != 1:
        names = ", ".join(cls.__name__ for cls in classes) or "none"
        raise PluginError(f"plugin {file.stem} ({path}): expected one subclass of Plugin; found {names}")
    return file.stem, classes[0]


def name_passed(
    extra: Sequence[PassedPlugin], records: Mapping[str, PluginRecord], tables: Iterable[str]
) -> dict[str, object]:
    """Names for plugins passed from Python: of the class's entry point, else the class's in lower case."""
    by_value = {record.value: name for name, record in records.items()}
    given: dict[str, object] = {}
    for plugin in extra:
        cls = plugin if isinstance(plugin, type) else type(plugin)
        name = by_value.get(_path_of(cls), cls.__name__.lower())
        if name in given:
            raise ConfigError(
                f"two plugins named {name!r} were passed", key="plugins", hint="a name is that of the class"
            )
        if isinstance(plugin, Plugin) and name in tables:
            raise ConfigError(
                "the plugin was passed as an instance, which has its configuration already",
                key=f"plugins.{name}",
                hint="remove the table or pass the class",
            )
        given[name] = plugin
    return given


def ordered(plugins: Iterable[LoadedPlugin]) -> list[LoadedPlugin]:
    """Call order: by ``before`` and ``after``, then by name. A cycle is a PluginError with its members."""
    by_name = {plugin.name: plugin for plugin in plugins}
    waits_for: dict[str, set[str]] = {name: set() for name in by_name}
    for name, plugin in by_name.items():
        waits_for[name].update(other for other in plugin.cls.after if other in by_name)
        for other in plugin.cls.before:
            if other in by_name:
                waits_for[other].add(name)
    ready = [name for name, others in waits_for.items() if not others]
    heapq.heapify(ready)
    result: list[LoadedPlugin] = []
    while ready:
        done = heapq.heappop(ready)
        result.append(by_name[done])
        for name, others in waits_for.items():
            if done in others:
                others.remove(done)
                if not others:
                    heapq.heappush(ready, name)
    if len(result) < len(by_name):
        stuck = ", ".join(by_name[name].label for name in sorted(name for name, others in waits_for.items() if others))
        raise PluginError(f"the before and after of these plugins contradict each other: {stuck}")
    return result


def taking_all(
    implementation: Callable[..., Any], taken: Iterable[str], arguments: tuple[str, ...]
) -> Callable[..., Any]:
    """An implementation that takes some of a hook's arguments, as a function of all of them in the hook's order.

    One that takes them all is returned as it is, so only those that take fewer pay for it.
    """
    if (taken := tuple(taken)) == arguments:
        return implementation
    places = [arguments.index(name) for name in taken]
    return lambda *given: implementation(*[given[place] for place in places])


def way_back(name: str, distribution: str, version: str) -> str:
    """How to get this very plugin back into a run."""
    if not distribution:
        return f"pass it again, with -p ./{name}.py or plugins=[...]"
    return f"activate it with -p {name} (to install it: pip install {distribution}=={version})"


def _cause(error: BaseException) -> str:
    if isinstance(error, PluginError):  # a sentence already
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _path_of(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _source_file(obj: object) -> str:
    """The file that a class comes from; empty if it has none (typed into a prompt)."""
    for candidate in (obj, type(obj)):
        with suppress(TypeError, OSError):
            return inspect.getsourcefile(candidate) or ""  # type: ignore[arg-type]
    return ""
