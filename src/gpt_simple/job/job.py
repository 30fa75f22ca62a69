"""What every stage of a launch works with."""

from __future__ import annotations

from pathlib import Path

from attrs import frozen

from gpt_simple.config.schema import Config
from gpt_simple.distributed.process_group import ProcessGroup
from gpt_simple.engine.control import Control, StopCondition
from gpt_simple.engine.state import TrainState
from gpt_simple.engine.stop_signals import StopNow, StopSignals
from gpt_simple.errors import Halted
from gpt_simple.hooks.components import LOCAL
from gpt_simple.job.plugin_calls import PluginCalls
from gpt_simple.job.runtime import Runtime
from gpt_simple.run_dir.layout import RunDir
from gpt_simple.spec import RunSpec


@frozen(eq=False)
class Job:
    """One launch. ``began`` is its start, a moment of ``time.monotonic``."""

    spec: RunSpec
    force: bool
    began: float
    dist: ProcessGroup
    runtime: Runtime
    signals: StopSignals
    plugins: PluginCalls
    state: TrainState

    @property
    def config(self) -> Config:
        return self.spec.config

    @property
    def run_dir(self) -> RunDir:
        return RunDir(Path(self.config.training.output_dir))

    @property
    def has_store(self) -> bool:
        """Whether checkpoints are kept elsewhere, too."""
        return self.config.training.checkpoint_store != LOCAL

    def control(self, *stop_conditions: StopCondition) -> Control:
        """Decisions of all ranks on a signal, the plugins' requests and ``stop_conditions``."""
        conditions = (lambda: self.signals.reason, *stop_conditions)
        return Control(self.dist, self.plugins.requests, conditions, self.spec.host.names)

    def leave_if_requested(self) -> None:
        """Raise StopNow, or Halted, on all ranks if any of them was asked to leave. For use before the loop."""
        reasons, deadline = self.plugins.requests.reasons, self.runtime.deadline
        control = self.control(*([deadline.reason_to_stop] if deadline is not None else []))
        leave, halt = self.dist.all_reduce_max([control.is_leaving(), "halt" in reasons])
        if halt:
            raise Halted(next(filter(None, self.dist.gather(reasons.get("halt", "")))))
        if leave:
            raise StopNow(reasons.get("stop", "another process was asked to stop"))
