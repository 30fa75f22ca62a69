"""The plugins of one launch: their hooks, their requests, and the view of the run that they get."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import attrs

from gpt_simple.config.mistakes import printable
from gpt_simple.distributed.process_group import ProcessGroup
from gpt_simple.engine.control import Requests
from gpt_simple.engine.precision import Precision
from gpt_simple.engine.process_state import TORCH_STATE
from gpt_simple.engine.state import TrainState
from gpt_simple.engine.views import EngineComm, EngineLog, LaunchView
from gpt_simple.engine.weights import WeightWatch
from gpt_simple.errors import PluginError
from gpt_simple.hooks.events import Close, LogRecord, RunError
from gpt_simple.hooks.run import ONLY_IN
from gpt_simple.plugin_host.loading import LoadedPlugin
from gpt_simple.spec import RunSpec

View = TypeVar("View", bound=LaunchView)


class PluginCalls:
    """The compiled hooks of this rank, and the newest view of the run, which ``adopt`` replaces."""

    def __init__(self, spec: RunSpec, dist: ProcessGroup, precision: Precision, state: TrainState) -> None:
        self._spec = spec
        self.requests = Requests()
        self.log = EngineLog(self._publish, state)
        self.comm = EngineComm(dist)
        watch = WeightWatch()
        self._launch_view = LaunchView(
            spec.config,
            Path(spec.config.training.output_dir),
            dist,
            precision,
            state,
            self.requests,
            self.log,
            self.comm,
            spec.host.active,
            watch,
        )
        self.view = self._launch_view
        self.calls = spec.host.calls(
            dist.is_main,
            self._plugin_failed,
            world_size=dist.size,
            guard=attrs.evolve(TORCH_STATE, watch=watch),
            around={ONLY_IN["control.skip_step"]: self.requests.allow_skips},
        )

    def extended_view(self, kind: type[View], **fields: Any) -> View:
        """A later view: what the newest one has, and ``fields``."""
        return kind(**attrs.asdict(self.view, recurse=False), **fields)

    def adopt(self, view: LaunchView) -> None:
        """Hand ``view`` to the hooks from now on."""
        self.view = view

    def close(self, error: BaseException | None) -> None:
        """Call ``on_run_error`` if there is an error, and ``on_close``. Their own failures are printed."""
        failures: list[object] = []
        if error is not None and self.calls.on_run_error is not None:
            failures += self.calls.on_run_error(self.view, RunError(error, self.view.step))
        if self.calls.on_close is not None:
            failures += self.calls.on_close(self.view, Close(error is None))
        # A failure of this rank after the last decision of the run has reached no log.
        late = [message for message in self.requests.failed_plugins.values() if message]
        for failure in [*late, *failures]:
            # The loggers are closed, and the terminal may be gone.
            with suppress(OSError):
                print(printable(self._spec.without_secrets(f"warning: {failure}")), file=sys.stderr)
        # The view, the log and the calls refer to each other: the weights would stay until Python looks for cycles.
        self.view = self._launch_view
        self.log.close()
        self.view.watch.close()
        self._spec.host.close()

    def _publish(self, record: LogRecord) -> None:
        if self.view.is_main and self.calls.on_log is not None:
            with self.comm.during(""):
                message, fields = self._spec.without_secrets([record.message, record.fields])
                self.calls.on_log(self.view, attrs.evolve(record, message=message, fields=fields))

    def _plugin_failed(self, plugin: LoadedPlugin, hook: str, error: PluginError) -> None:
        message = f"{error}; it is switched off"
        if self.view.is_main:
            self.log.warning(message, name="plugin_failed", plugin=plugin.name, hook=hook)
            self.requests.disable(plugin.name)
        else:
            self.requests.disable(plugin.name, f"process {self.view.rank}: {message}")


@contextmanager
def plugin_calls(spec: RunSpec, dist: ProcessGroup, precision: Precision, state: TrainState) -> Iterator[PluginCalls]:
    """The plugins' calls. On the way out ``on_run_error`` if an error leaves, and ``on_close`` in any case, once."""
    plugins = PluginCalls(spec, dist, precision, state)
    try:
        yield plugins
    except BaseException as error:
        plugins.close(error)
        raise
    else:
        plugins.close(None)
