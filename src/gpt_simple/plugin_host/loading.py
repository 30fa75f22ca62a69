"""From a name to a checked class: import one plugin, and attribute every failure to it."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from graphlib import CycleError, TopologicalSorter
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any

from attrs import define, field

from gpt_simple.errors import PASSING, ConfigError, PluginError, Problem, describe
from gpt_simple.hooks.plugin import OnError, Plugin
from gpt_simple.hooks.specs import HOOKS
from gpt_simple.machine_failures import is_of_machine
from gpt_simple.plugin_host.discovery import PluginRecord, name_problem
from gpt_simple.plugin_host.lint import lint

if TYPE_CHECKING:
    from gpt_simple.hooks.components import Registry

PassedPlugin = Plugin[Any] | type[Plugin[Any]]


@define(eq=False)
class LoadedPlugin:
    """An active plugin: its class, its distribution (empty if it has none), its failures and its time in seconds.

    ``instance`` is None until the host makes the plugin. ``failed``: a failure has switched it off.
    """

    name: str
    cls: type[Plugin[Any]]
    distribution: str
    version: str
    instance: Any = None
    failed: bool = False
    failures: list[str] = field(factory=list)
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
        return _label(self.name, self.distribution, self.version, self.file)

    def names(self, attribute: str) -> bool:
        """Whether the code of the plugin's class has this name, as an attribute or a text."""
        functions = (inspect.unwrap(member) for cls in self.cls.__mro__ for member in vars(cls).values())
        return any(_has_name(getattr(member, "__code__", None), attribute) for member in functions)

    def register_components(self, registry: Registry) -> None:
        """Call the plugin's hook of this name. Its failure is a PluginError that names it."""
        try:
            if (register := getattr(self.cls, "register_components", None)) is not None:
                taken = inspect.signature(register).parameters
                taking_all(register, taken, HOOKS["register_components"].arguments)(registry.owned_by(self.label))
        except PluginError:
            raise
        except BaseException as error:
            raise self.failure("register_components", error) from error

    def failure(self, where: str, error: BaseException, step: int | None = None) -> PluginError:
        """The PluginError for an exception in a hook or method of this plugin; one made here before stays as it is.

        Raises ``error`` itself if it only passes through the plugin, as Ctrl-C and a failure of the machine do.
        """
        if isinstance(error, PASSING) or is_of_machine(error):
            raise error
        return self.own_failure(where, error, step)

    def own_failure(self, where: str, error: BaseException, step: int | None = None) -> PluginError:
        """``failure`` for a plugin that the run goes on without, also where the machine failed."""
        if isinstance(error, PASSING):
            raise error
        if isinstance(error, PluginError) and error.blamed:
            return error
        at = "" if step is None else f" at step {step}"
        failure = PluginError(f"plugin {self.label} failed in {where}{at}: {_cause(error)}")
        failure.blamed = True
        # Its text alone: the traceback of the error has the frames of the run, and these have its weights.
        self.failures.append(str(failure))
        return failure


def load_plugin(name: str, passed: object | None, record: PluginRecord | None) -> LoadedPlugin:
    """The plugin of a name: passed from Python or read from a file, else imported from its entry point.

    Raises PluginError with one problem for each mistake that the lint finds in the class.
    """
    found = load_record(record) if passed is None and record is not None else passed
    instance = found if passed is not None and isinstance(found, Plugin) else None
    cls: Any = type(instance) if instance is not None else found
    own = record if record is not None and (passed is None or record.value == _path_of(cls)) else None
    distribution, version = (own.distribution, own.version) if own else ("", "")
    try:
        mistakes = lint(cls, has_instance=instance is not None)
    except Exception as error:
        mistakes = [Problem(None, "", f"the class cannot be inspected: {_cause(error)}")]
    if own is None and (problem := name_problem(name)):
        mistakes.append(Problem(None, "", problem))
    if own is None and record is not None and record.origin == "builtin":
        mistakes.append(Problem(None, "", f"{name!r} is the name of a built-in plugin", "rename it"))
    if mistakes:
        raise refused(_label(name, distribution, version, _source_file(cls)), mistakes)
    return LoadedPlugin(name, cls, distribution, version, instance)


def refused(label: str, mistakes: Sequence[Problem]) -> PluginError:
    """The error of a plugin that does not keep the contract, with a problem for each mistake."""
    return PluginError(*(mistake._replace(message=f"plugin {label}: {mistake.message}") for mistake in mistakes))


def load_record(record: PluginRecord, kind: str = "plugin") -> object:
    """The object that an entry point names. Any failure on the way is a PluginError that names the package."""
    if record.problem:
        raise PluginError(f"{kind} {record.detail}")
    module_name, _, attribute = record.value.partition(":")
    subject = f"{kind} {record.label}"
    if not attribute:
        raise PluginError(f"{subject}: its entry point is {record.value!r}", hint="expected MODULE:NAME")
    with _foreign_code(f"{subject}: importing {module_name} failed"):
        found: object = importlib.import_module(module_name)
    try:
        for part in attribute.split("."):
            found = getattr(found, part)
    except AttributeError as error:
        raise PluginError(f"{subject}: module {module_name} has no {attribute!r}") from error
    return found


@contextmanager
def _foreign_code(failure: str) -> Iterator[None]:
    """Run a plugin's module: any exception but Ctrl-C becomes a PluginError that begins with ``failure``.

    Its output goes to stderr, because stdout belongs to the command.
    """
    try:
        with redirect_stdout(sys.stderr):
            yield
    except PASSING:
        raise
    except BaseException as error:  # test frameworks skip a module with one that is not an Exception
        if is_of_machine(error):
            raise
        raise PluginError(f"{failure}: {_cause(error)}") from error


def load_file(path: str) -> tuple[str, object]:
    """The one plugin class of a Python file, under the name of the file."""
    file = Path(os.path.expanduser(path))
    if not os.path.isfile(file) or file.suffix != ".py":
        raise ConfigError("expected the path of a Python file", location=f"-p {path}")
    if problem := name_problem(file.stem):
        raise ConfigError(f"a plugin is named after its file, and {problem}: rename the file", location=f"-p {path}")
    spec = spec_from_file_location(f"gpt_simple_plugin_file_{file.stem}", file)
    assert spec, "a .py file has a spec"
    assert spec.loader, "and a loader"
    module = module_from_spec(spec)
    # Registered before it is executed: attrs and typing look it up while they make classes.
    sys.modules[module.__name__] = module
    try:
        with _foreign_code(f"plugin {file.stem} ({path}): running the file failed"):
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
    """Names for plugins passed from Python: that of the class's entry point, else the class name in lower case."""
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
    """Call order: by ``before``, ``after``, ``requires`` and ``uses``, then by name.

    A cycle is a PluginError with its members.
    """
    by_name = {plugin.name: plugin for plugin in plugins}
    sorter = TopologicalSorter(dict.fromkeys(by_name, ()))
    for name, plugin in by_name.items():
        earlier = (*plugin.cls.after, *plugin.cls.requires, *plugin.cls.uses)
        sorter.add(name, *(other for other in earlier if other in by_name))
        for other in plugin.cls.before:
            if other in by_name:
                sorter.add(other, name)
    try:
        sorter.prepare()
    except CycleError as error:
        members = ", ".join(by_name[name].label for name in sorted(set(error.args[1])))
        what = "before, after, requires and uses"
        raise PluginError(f"the {what} of these plugins contradict each other: {members}") from error
    result: list[LoadedPlugin] = []
    ready: list[str] = []
    while sorter.is_active():
        ready = sorted([*ready, *sorter.get_ready()])
        result.append(by_name[name := ready.pop(0)])
        sorter.done(name)
    return result


def taking_all(
    implementation: Callable[..., Any], taken: Iterable[str], arguments: tuple[str, ...]
) -> Callable[..., Any]:
    """An implementation that takes some of a hook's arguments, as a function of all of them in the hook's order.

    One that takes them all is returned unchanged and costs nothing more.
    """
    if (taken := tuple(taken)) == arguments:
        return implementation
    places = [arguments.index(name) for name in taken]
    return lambda *given: implementation(*[given[place] for place in places])


def _has_name(value: object, name: str) -> bool:
    """Whether a function's code, its constants or the functions inside it have the name."""
    if isinstance(value, CodeType):
        return name in value.co_names or _has_name(value.co_consts, name)
    if isinstance(value, tuple | frozenset):
        return any(_has_name(each, name) for each in value)
    return isinstance(value, str) and value == name


def _cause(error: BaseException) -> str:
    return str(error) if isinstance(error, PluginError) else describe(error)


def _label(name: str, distribution: str, version: str, file: str) -> str:
    origin = ", ".join(part for part in (f"{distribution} {version}".strip(), file) if part)
    return f"{name} ({origin})" if origin else name


def _path_of(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _source_file(obj: object) -> str:
    """The file that a class comes from; empty if it has none, as in an interactive session."""
    for candidate in (obj, type(obj)):
        with suppress(TypeError, OSError):
            return inspect.getsourcefile(candidate) or ""  # type: ignore[arg-type]
    return ""
