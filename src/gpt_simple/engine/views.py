"""``run`` as plugins see it: the engine's side of ``gpt_simple.hooks.run``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from attrs import define, field
from attrs.setters import frozen

from gpt_simple.checkpoint.store import Store
from gpt_simple.config.schema import Config
from gpt_simple.distributed.process_group import World
from gpt_simple.engine.control import Control
from gpt_simple.engine.evaluation import evaluation_mode
from gpt_simple.engine.memory import peak_bytes
from gpt_simple.engine.precision import Precision
from gpt_simple.engine.rng import stream
from gpt_simple.engine.step import summed_loss
from gpt_simple.errors import PluginError
from gpt_simple.hooks.events import LogRecord
from gpt_simple.hooks.run import CheckpointInfo
from gpt_simple.model.generate import generate

if TYPE_CHECKING:
    from gpt_simple.data.loader import Loader
    from gpt_simple.hooks.batch import Batch, Tokenizer
    from gpt_simple.plugin_host.dispatch import Calls


T = TypeVar("T")


class EvaluationAbandoned(BaseException):
    """A stop arrived during an evaluation and all processes agreed to leave it.

    No Exception: a plugin that is being evaluated must not take it for its own failure.
    """


@define
class EngineLog:
    """Lines for people and facts for machines; implements ``gpt_simple.hooks.run.Log``."""

    _run: EngineRun

    def info(self, message: str, *, name: str = "info", **fields: Any) -> None:
        self._emit("info", message, name, fields)

    def warning(self, message: str, *, name: str = "warning", **fields: Any) -> None:
        self._emit("warning", message, name, fields)

    def error(self, message: str, *, name: str = "error", **fields: Any) -> None:
        self._emit("error", message, name, fields)

    def _emit(
        self, level: Literal["info", "warning", "error"], message: str, name: str, fields: dict[str, Any]
    ) -> None:
        run = self._run
        if run.is_main and run.calls is not None and run.calls.on_log is not None:
            with run.comm.during(""):
                run.calls.on_log(run, LogRecord(level, message, run.step, name, fields))


@define
class EngineComm:
    """Collectives that are open only during hooks of all processes; implements ``gpt_simple.hooks.run.Comm``."""

    _world: World
    _hook: str = ""

    @contextmanager
    def during(self, hook: str) -> Iterator[None]:
        """Open for the time of a hook that every process runs; closed with an empty name."""
        outer, self._hook = self._hook, hook
        try:
            yield
        finally:
            self._hook = outer

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        self.check("run.comm")
        return self._world.sum(value)

    def barrier(self) -> None:
        self.check("run.comm")
        self._world.barrier()

    def check(self, what: str) -> None:
        """Raise PluginError where a collective would wait for processes that never come; with one process too."""
        if not self._hook:
            raise PluginError(f"{what} was used in a hook that not every process runs at once, where it would hang")


@define
class EngineCheckpoints:
    """The run's checkpoints; implements ``gpt_simple.hooks.run.Checkpoints``."""

    _store: Store

    def list(self) -> Sequence[CheckpointInfo]:
        return [CheckpointInfo(found.step, found.path) for found in self._store.list()]

    def prune(
        self, *, keep_last: int | None, keep_every: int | None = None, protect: Iterable[int] = ()
    ) -> Sequence[CheckpointInfo]:
        # Giving back the room of large files takes a while, for which training need not wait.
        gone = self._store.prune(keep_last, keep_every, set(protect), wait=False)
        return [CheckpointInfo(found.step, found.path) for found in gone]


@define(slots=False, eq=False)
class EngineRun:
    """State of a run that plugins may read. The trainer writes it; parts appear as they are built.

    What a plugin might want to write, it cannot: the configuration, and where the run is in its steps and data.
    """

    config: Config = field(on_setattr=frozen)
    output_dir: Path = field(on_setattr=frozen)
    world: World = field(on_setattr=frozen)
    precision: Precision = field(on_setattr=frozen)
    control: Control = field(factory=Control)
    calls: Calls | None = None
    run_id: str = ""
    known: dict[str, Any] = field(factory=dict)
    checkpoints: EngineCheckpoints = field(
        init=False, default=None, repr=False
    )  # set by the trainer once the store exists
    log: EngineLog = field(init=False)
    comm: EngineComm = field(init=False)
    _step: int = 0
    _tokens: int = 0
    _target_tokens: int = 0
    _model: torch.nn.Module | None = None
    _wrapped: torch.nn.Module | None = None
    _tokenizer: Tokenizer | None = None
    _loader: Loader | None = None

    def __attrs_post_init__(self) -> None:
        self.log = EngineLog(self)
        self.comm = EngineComm(self.world)

    def moved_to(self, step: int, tokens: int, target_tokens: int) -> None:
        """The run stands here now: a step is made, or a checkpoint is restored."""
        self._step, self._tokens, self._target_tokens = step, tokens, target_tokens

    @property
    def step(self) -> int:
        return self._step

    @property
    def tokens(self) -> int:
        return self._tokens

    @property
    def target_tokens(self) -> int:
        return self._target_tokens

    @property
    def rank(self) -> int:
        return self.world.rank

    @property
    def world_size(self) -> int:
        return self.world.size

    @property
    def is_main(self) -> bool:
        return self.world.is_main

    @property
    def device(self) -> torch.device:
        return self.world.device

    @property
    def model(self) -> torch.nn.Module:
        return _built(self._model, "model")

    @property
    def tokenizer(self) -> Tokenizer:
        return _built(self._tokenizer, "tokenizer")

    def facts(self) -> dict[str, Any]:
        return deepcopy(self.known)

    def val_batches(self, max_batches: int | None = None) -> Iterator[Batch]:
        self.comm.check("run.val_batches")
        for batch in _built(self._loader, "loader").val_batches(max_batches):
            leaving = self.control.is_leaving()
            if self.world.size > 1:
                leaving = bool(self.world.agree([leaving])[0])
            if leaving:
                raise EvaluationAbandoned
            yield batch

    def loss(self, batch: Batch) -> torch.Tensor:
        return summed_loss(_built(self._wrapped, "model"), batch)

    def generate(
        self,
        prompt: str = "",
        *,
        max_new_tokens: int = 100,
        temperature: float = 0.8,
        top_k: int | None = 50,
        seed: int = 0,
    ) -> str:
        # Lengths grow token by token: every one of them would be compiled anew.
        with self.evaluating(), torch.compiler.set_stance("force_eager"):
            return generate(
                self.model,
                self.tokenizer,
                prompt,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                seed=seed,
            )

    def peak_memory(self) -> int:
        return peak_bytes(self.device)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        with evaluation_mode(self.model, self.precision, stream(self.config.training.seed, self.step)):
            yield


def _built(part: T | None, name: str) -> T:
    if part is None:
        raise PluginError(f"run.{name} does not exist yet: it is there from on_model_built or on_run_start on")
    return part
