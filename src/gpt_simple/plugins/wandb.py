"""Sends metrics to Weights & Biases. Set ``training.wandb_project`` to switch it on.

A failure of W&B never ends the run: every call is guarded, and a service that cannot be reached or dies costs one
warning. The run has one id, kept in the checkpoint and in the run directory, so that stops, crashes and resumes report
as one run. The x axis is a metric of its own, ``step``, because W&B drops what is logged below its own last step: after
a resume from an older checkpoint the points of repeated steps would vanish.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from attrs import asdict, evolve, frozen
from typing_extensions import Doc

from gpt_simple import redacted
from gpt_simple.hooks import Finding, Plugin, hookimpl

if TYPE_CHECKING:
    from gpt_simple import Config as RunConfig
    from gpt_simple.hooks import Preflight, Run
    from gpt_simple.hooks import events as ev

Mode = Literal["online", "offline"]

_INSTALL = 'pip install "wandb>=0.31"'
_INIT_SECONDS, _FINISH_SECONDS = 30.0, 60.0
_MODES = ("online", "offline", "disabled", "shared", "dryrun", "run")
_SHOWN_INFO = ("device", "precision", "compile", "parameters", "flops_per_token", "tokens_per_step", "floor", "data")


@frozen
class WandbConfig:
    """``[plugins.wandb]``. Switched on by ``training.wandb_project``, not by this table."""

    entity: Annotated[str | None, Doc("user or team that owns the run; unset: W&B's default")] = None
    name: Annotated[str | None, Doc("name of the run; unset: training.wandb_run_name, else W&B makes one up")] = None
    group: Annotated[str | None, Doc("group that the run belongs to")] = None
    tags: Annotated[tuple[str, ...], Doc("tags of the run")] = ()
    notes: Annotated[str | None, Doc("a description of the run")] = None
    mode: Annotated[Mode | None, Doc("online or offline; unset: $WANDB_MODE, else online if W&B knows an API key")] = (
        None
    )


class Wandb(Plugin[WandbConfig]):
    """Runs on the main process."""

    Config = WandbConfig

    def __init__(self, config: WandbConfig) -> None:
        super().__init__(config)
        self._wandb: Any = None
        self._id = ""

    @hookimpl
    def check_config(self, config: RunConfig, preflight: Preflight) -> Sequence[Finding]:
        key, project = "training.wandb_project", config.training.wandb_project
        if not is_installed():
            message = "Weights & Biases is asked for, but the package wandb is not installed"
            return [Finding("error", "wandb-missing", message, key, f"install it: {_INSTALL}")]
        if (mode := os.environ.get("WANDB_MODE", "online")) not in _MODES:
            message = f"expected online, offline or disabled, got {mode!r}"
            return [Finding("error", "wandb-mode", message, "WANDB_MODE", "unset this environment variable")]
        findings = []
        refused = _refused(project=project) if project else "expected the name of a W&B project, and there is none"
        if refused:
            findings.append(Finding("error", "wandb-project", refused, key))
        if refused := _refused(run_tags=self.config.tags):
            findings.append(Finding("error", "wandb-tags", refused, "plugins.wandb.tags"))
        return findings

    @hookimpl
    def on_run_start(self, run: Run, event: ev.RunStart) -> None:
        # A branch, which starts from a checkpoint of another directory, is a run of its own.
        is_branch = event.resumed_from is not None and not _is_inside(event.resumed_from, run.output_dir)
        if is_branch or not self._id:
            self._id = run.run_id
        training, shown = run.config.training, {name: event.facts[name] for name in _SHOWN_INFO}
        try:
            self._wandb = open_run(
                evolve(self.config, name=self.config.name or training.wandb_run_name),
                project=str(training.wandb_project),
                run_id=self._id,
                directory=run.output_dir,
                values={**redacted(run.config), "facts": shown},
            )
        except Exception as error:
            self._give_up(run, error)
            return
        run.log.info(_where(self._wandb, run.output_dir, asked=self.config.mode), name="wandb", run_id=self._id)

    @hookimpl
    def on_metrics(self, run: Run, event: ev.MetricsReady) -> None:
        self._call(run, lambda wandb: wandb.log({**event.metrics, "step": event.step, "tokens": event.tokens}))

    @hookimpl
    def on_eval_end(self, run: Run, event: ev.EvalEnd) -> None:
        self._call(run, lambda wandb: wandb.log({**event.metrics, "step": event.step, "tokens": event.tokens}))

    @hookimpl
    def on_run_end(self, run: Run, event: ev.RunEnd) -> None:
        self._call(run, lambda wandb: wandb.summary.update(figures(event.summary)))

    @hookimpl
    def on_close(self, run: Run, event: ev.Close) -> None:
        self._call(run, lambda wandb: wandb.finish(exit_code=int(not event.ok)))
        self._wandb = None

    def state_dict(self) -> dict[str, Any]:
        return {"run_id": self._id} if self._id else {}

    def load_state_dict(self, state: Mapping[str, Any], version: int) -> None:
        self._id = state["run_id"]

    def _call(self, run: Run, call: Callable[[Any], object]) -> None:
        if self._wandb is None:
            return
        try:
            call(self._wandb)
        except Exception as error:
            self._give_up(run, error)

    def _give_up(self, run: Run, error: Exception) -> None:
        has_part, self._wandb = self._wandb is not None and not self._wandb.offline, None
        if _is_dead(error):
            # Without this W&B's handler at exit prints a traceback.
            import wandb

            with suppress(Exception):
                wandb.teardown()
        upload = f"`gpt-simple wandb upload {run.output_dir}` sends them"
        if has_part:
            upload = (
                f"`gpt-simple wandb upload {run.output_dir} --id {another(self._id)}`"
                " sends all of it as another run, for W&B has a part"
            )
        run.log.warning(
            f"W&B does not work ({_first_line(error)}); training goes on without it, the"
            f" metrics are in {run.output_dir / 'metrics.jsonl'}: later {upload}",
            name="wandb_failed",
        )


def is_installed() -> bool:
    """Whether the package is installed. A directory ``wandb`` with files of W&B, importable as well, is not it."""
    spec = find_spec("wandb")
    return spec is not None and spec.origin is not None


def _refused(**setting: Any) -> str | None:
    """Why W&B refuses the value of a setting; None if it does not."""
    import wandb

    try:
        wandb.Settings(**setting)
    except wandb.errors.UsageError as error:
        return _first_line(error)
    except ValueError as error:
        problems: Callable[[], list[dict[str, Any]]] = getattr(error, "errors", list)  # pydantic has them
        return problems()[0]["msg"] if problems() else _first_line(error)
    return None


def open_run(
    config: WandbConfig,
    *,
    project: str,
    run_id: str,
    directory: Path,
    values: Mapping[str, Any],
    resume: Literal["allow", "never"] = "allow",
) -> Any:
    """A W&B run whose x axis is ``step``. Its files are in ``directory / "wandb"``.

    Never prompts at the terminal: without an API key it is offline. Git, code, command line and standard output are not
    captured, because any of them may hold secrets. Raises whatever W&B raises.
    """
    import wandb

    options: dict[str, Any] = {name: value or None for name, value in asdict(config).items()}
    with _interpreter_hooks_kept():
        options["mode"] = options["mode"] or _default_mode()
        run = wandb.init(
            **options,
            project=project,
            id=run_id,
            resume=resume,
            # Absolute: W&B has one process for all runs, perhaps with another working directory.
            dir=directory.resolve(),
            settings=wandb.Settings(
                console="off",
                silent=True,
                disable_git=True,
                disable_code=True,
                save_code=False,
                x_disable_meta=True,
                x_save_requirements=False,
                symlink=False,
                # Leaves another W&B run of this process, say in a notebook, alone.
                reinit="create_new",
                init_timeout=_INIT_SECONDS,
                finish_timeout=_FINISH_SECONDS,
                finish_timeout_raises=True,
            ),
        )
    run.config.update(dict(values), allow_val_change=True)  # type: ignore[no-untyped-call]
    for axis in ("step", "tokens"):
        run.define_metric(axis)
    run.define_metric("*", step_metric="step")
    return run


def another(run_id: str) -> str:
    """An id to upload a run under if W&B has a part of it already: it never replaces points."""
    return f"{run_id}-upload"


def figures(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a run's summary that become columns in W&B's table of runs."""
    return {name: value for name, value in summary.items() if name == "status" or isinstance(value, (int, float))}


def _default_mode() -> str | None:
    import wandb

    # Passed explicitly, because W&B reads its variables only once in a process.
    if (mode := os.environ.get("WANDB_MODE")) or wandb.login(prompt=False, verify=False):
        return mode
    return "offline"


@contextmanager
def _interpreter_hooks_kept() -> Iterator[None]:
    """Undo that W&B replaces ``sys.exit`` and ``sys.excepthook``: it gets the exit code from ``on_close``."""
    leave, hook = sys.exit, sys.excepthook
    try:
        yield
    finally:
        sys.exit, sys.excepthook = leave, hook


def _where(wandb: Any, output_dir: Path, *, asked: Mode | None) -> str:
    if not wandb.offline and not wandb.disabled:
        return f"W&B: {wandb.url}"
    what, mode = "disabled" if wandb.disabled else "offline", os.environ.get("WANDB_MODE")
    why = "because it knows no API key (`wandb login` stores one)" if mode is None else f"by WANDB_MODE={mode}"
    return f"W&B is {what}{'' if asked else f' {why}'}: later `gpt-simple wandb upload {output_dir}` sends the run"


def _is_dead(error: Exception) -> bool:
    """Whether W&B's process is gone: an error of its socket, or of its mailbox if that noticed first."""
    return isinstance(error, ConnectionError) or type(error).__name__ in ("HandleAbandonedError", "MailboxClosedError")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip(": \n").partition("\n")[0]


def _is_inside(path: Path, directory: Path) -> bool:
    return path.resolve().is_relative_to(directory.resolve())
