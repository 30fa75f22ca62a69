"""``run`` as plugins see it: four complete views, each made once, of a run that is being built.

``LaunchView`` exists from the first log line, ``ModelView`` from the first model on, ``OptimizerView`` from the
optimizer on, ``RunView`` when all state is restored. They implement ``gpt_simple.hooks.run.Run``; a member that a view
does not have yet raises PluginError.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from attrs import define, field, frozen

from gpt_simple._documents import parse
from gpt_simple.checkpoint.store import Store
from gpt_simple.config.schema import Config
from gpt_simple.data.loader import Loader
from gpt_simple.data.order import I64
from gpt_simple.distributed.process_group import ProcessGroup
from gpt_simple.engine.control import Control, Requests
from gpt_simple.engine.evaluation import evaluation_mode
from gpt_simple.engine.memory import peak_bytes
from gpt_simple.engine.mirror import Mirror
from gpt_simple.engine.optimizers import CurrentOptimizer
from gpt_simple.engine.precision import Precision
from gpt_simple.engine.rng import derive_seed
from gpt_simple.engine.state import TrainState
from gpt_simple.engine.weights import Exchange, WeightWatch, paired
from gpt_simple.errors import Interruption, PluginError, describe, did_you_mean
from gpt_simple.hooks.batch import Batch, Tokenizer
from gpt_simple.hooks.events import LogRecord
from gpt_simple.hooks.plugin import LIVE
from gpt_simple.hooks.run import SINCE, CheckpointInfo
from gpt_simple.model.generate import generate


class EvaluationAbandoned(Interruption):
    """A stop arrived during an evaluation, and all ranks agreed to abandon it."""


@define(eq=False)
class EngineLog:
    """Publishes log records until it is closed; implements ``gpt_simple.hooks.run.Log``.

    Refuses a line that a logger could not write, so that the caller fails and not every logger.
    """

    _publish: Callable[[LogRecord], None] | None
    _state: TrainState

    def close(self) -> None:
        """Publish nothing any more: the loggers are closed."""
        self._publish = None

    def info(self, message: str, *, name: str = "info", **fields: Any) -> None:
        self._log("info", message, name, fields)

    def warning(self, message: str, *, name: str = "warning", **fields: Any) -> None:
        self._log("warning", message, name, fields)

    def error(self, message: str, *, name: str = "error", **fields: Any) -> None:
        self._log("error", message, name, fields)

    def _log(
        self, level: Literal["info", "warning", "error"], message: str, name: str, fields: Mapping[str, Any]
    ) -> None:
        for what, text in (("message", message), ("name", name)):
            if not isinstance(text, str):
                raise PluginError(f"run.log.{level} was given a {type(text).__name__} as its {what}; expected text")
        try:
            json.dumps(fields, default=str)
            record = LogRecord(level, _printable(message), self._state.step, _printable(name), fields)
        except Exception as error:
            reason = f"run.log.{level} was given fields that JSON cannot hold ({describe(error)})"
            raise PluginError(reason, hint="expected text, numbers, lists and mappings with text as keys") from error
        if self._publish is not None:
            self._publish(record)


def _printable(text: str) -> str:
    """``text`` with escapes for what UTF-8 cannot hold: the undecodable bytes of a file name."""
    return text.encode(errors="backslashreplace").decode()


@define(eq=False)
class EngineComm:
    """Collectives that are open only during hooks of all ranks; implements ``gpt_simple.hooks.run.Comm``."""

    _dist: ProcessGroup
    _hook: str = field(default="", init=False)

    @contextmanager
    def during(self, hook: str) -> Iterator[None]:
        """Open inside, for a hook that every rank runs; closed if ``hook`` is empty."""
        outer, self._hook = self._hook, hook
        try:
            yield
        finally:
            self._hook = outer

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        self.check("run.comm")
        return self._dist.sum(value)

    def barrier(self) -> None:
        self.check("run.comm")
        self._dist.barrier()

    def check(self, what: str) -> None:
        """Raise PluginError where a collective would hang because only some ranks call it; with one rank too."""
        if not self._hook:
            raise PluginError(f"{what} was used in a hook that not every process runs at once, where it would hang")


@frozen(eq=False)
class EngineCheckpoints:
    """The run's checkpoints; implements ``gpt_simple.hooks.run.Checkpoints``."""

    _store: Store
    _mirror: Mirror | None = None

    def list(self) -> Sequence[CheckpointInfo]:
        return [CheckpointInfo(found.step, found.path) for found in self._store.list()]

    def prune(
        self, *, keep_last: int | None, keep_every: int | None = None, protect: Iterable[int] = ()
    ) -> Sequence[CheckpointInfo]:
        # Training does not wait for the deletion of large files.
        gone = self._store.prune(keep_last, keep_every, set(protect), wait=False)
        if self._mirror is not None:
            self._mirror.removed(gone)
        return [CheckpointInfo(found.step, found.path) for found in gone]


@frozen(eq=False)
class LaunchView:
    """The run before there is a model."""

    config: Config
    output_dir: Path
    dist: ProcessGroup
    precision: Precision
    state: TrainState
    control: Requests
    log: EngineLog
    comm: EngineComm
    plugin: Callable[..., Any]
    watch: WeightWatch

    @property
    def step(self) -> int:
        return self.state.step

    @property
    def tokens(self) -> int:
        return self.state.tokens

    @property
    def rank(self) -> int:
        return self.dist.rank

    @property
    def world_size(self) -> int:
        return self.dist.size

    @property
    def is_main(self) -> bool:
        return self.dist.is_main

    @property
    def device(self) -> torch.device:
        return self.dist.device

    def peak_memory(self) -> int:
        return peak_bytes(self.device)

    def facts(self) -> dict[str, Any]:
        return {"precision": self.precision.name, "precision_why": self.precision.why}

    def val_batches(self, max_batches: int | None = None, bucket: str | None = None) -> Iterator[Batch]:
        self.comm.check("run.val_batches")
        raise _missing("val_batches")

    def __getattr__(self, name: str) -> Any:
        if name in SINCE:
            raise _missing(name)
        raise AttributeError(f"run has no attribute {name!r}")


def _missing(name: str) -> PluginError:
    return PluginError(f"run.{name} does not exist yet: it is there from {SINCE[name]} on")


@frozen(eq=False)
class ModelView(LaunchView):
    """The run with its model, raw and not yet prepared for training; in ``check_runtime`` without storage.

    ``raw`` is the model for the engine's own use. ``forward`` calls it, and attributes its failure to the component; so
    do the methods of ``guarded``.
    """

    raw: torch.nn.Module
    guarded: torch.nn.Module
    forward: Callable[..., torch.Tensor]
    tokenizer: Tokenizer
    checkpoints: EngineCheckpoints

    @property
    def model(self) -> torch.nn.Module:
        self.watch.taken()
        return self.raw

    def evaluating(self) -> AbstractContextManager[None]:
        return evaluation_mode(self.guarded, self.precision, derive_seed(self.config.training.seed, self.step))

    def generate(self, prompt: str = "", **options: Any) -> str:
        if any(parameter.is_meta for parameter in self.raw.parameters()):
            raise _missing("generate")
        self._check_together("run.generate")
        if self.dist.shards:
            options["agree"] = self.dist.of_main  # equal weights may give other digits on another machine
        # The length grows token by token: torch would compile for each.
        with self.evaluating(), torch.compiler.set_stance("force_eager"), self.dist.resharding(self.raw):
            return generate(self.guarded, self.tokenizer, prompt, forward=self.forward, **options)

    def _check_together(self, what: str) -> None:
        """Raise PluginError where only some ranks use a model of which each has a part."""
        if self.dist.shards and not (self.watch.caller is not None and self.watch.caller.ranks == "all"):
            self.comm.check(what)


@frozen(eq=False)
class OptimizerView(ModelView):
    """The run with its optimizer, whose state may not be restored yet."""

    current: CurrentOptimizer

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.current.optimizer

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        # Not super(): inside a decorator attrs cannot replace the class that it means.
        with self.current.evaluating(), ModelView.evaluating(self):
            yield


@frozen(eq=False)
class RunView(OptimizerView):
    """The whole run. ``summed_loss`` is that of a batch; ``known`` is what ``facts`` copies.

    ``weight_sets`` returns those of the plugins. ``kept`` is what plugins have recorded in run.json, and ``keep``
    records a value there.
    """

    run_id: str
    summed_loss: Callable[[Batch], torch.Tensor]
    loader: Loader
    known: Mapping[str, Any]
    weight_sets: Callable[[], Mapping[str, Mapping[str, torch.Tensor]]]
    sync: Control
    kept: Mapping[str, Any]
    keep: Callable[[str, Any], None]

    def facts(self) -> dict[str, Any]:
        return deepcopy(dict(self.known))

    def record(self, key: str, value: Any) -> None:
        if not isinstance(key, str) or not key:
            raise PluginError(
                f"run.record was given {key!r} as a key; expected text", hint="begin with the plugin's name"
            )
        try:
            # As a later launch reads it, at its place in run.json.
            as_read = parse(json.dumps({"recorded": {key: value}}, allow_nan=False))["recorded"][key]
        except Exception as error:
            reason = f"run.record was given a value for {key!r} that JSON cannot hold ({describe(error)})"
            raise PluginError(
                reason, hint="expected text, finite numbers, lists and mappings with text as keys"
            ) from error
        self.keep(key, as_read)

    def recorded(self, key: str, default: Any = None) -> Any:
        return deepcopy(self.kept.get(key, default))

    def loss(self, batch: Batch) -> torch.Tensor:
        self._check_together("run.loss")
        return self.summed_loss(batch)

    def weights(self, weights: Mapping[str, torch.Tensor] | str) -> Exchange:
        if weights == LIVE:
            return Exchange(())
        if isinstance(weights, str):
            sets = self.weight_sets()
            if weights not in sets:
                known = (LIVE, *sets)
                raise PluginError(
                    f"there are no weights of the name {weights!r}{did_you_mean(weights, known)}",
                    hint=f"expected one of {', '.join(known)}",
                )
            weights = sets[weights]
        return Exchange(paired(self.raw, weights))

    def val_batches(self, max_batches: int | None = None, bucket: str | None = None) -> Iterator[Batch]:
        self.comm.check("run.val_batches")
        buckets = self.loader.val_buckets
        if bucket is not None and not (isinstance(bucket, str) and bucket in buckets):
            raise PluginError(
                f"run.val_batches: the val split has no bucket {bucket!r}{did_you_mean(str(bucket), buckets)}",
                hint=f"it has {', '.join(buckets) or 'none'}",
            )
        return self._until_leaving(self.loader.val_batches(max_batches, bucket))

    def _until_leaving(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            if self.sync.any_leaving():
                raise EvaluationAbandoned
            yield batch

    def batches(self, sample_ids: Iterable[int]) -> Iterator[Batch]:
        if not self.loader.has_samples:
            raise PluginError(
                "run.batches: the data are a stream, of which no sample can be read again",
                hint='run.facts()["data"]["stream"] is true for such data',
            )
        return self.loader.batches(_checked_ids(sample_ids, self.loader.samples_total()))


def _checked_ids(sample_ids: Iterable[int], total: int | None) -> I64:
    """Ids of samples as an array [n]. Raises PluginError unless each is a sample of ``total`` (None: endless)."""
    expected = "expected integers from 0" + ("" if total is None else f" to {total - 1}")
    ids: list[int] = []
    for sample in sample_ids:
        try:
            number = operator.index(sample)
        except TypeError:
            raise PluginError(f"run.batches was given {sample!r} as a sample", hint=expected) from None
        if not 0 <= number < (2**62 if total is None else total) or isinstance(sample, bool):
            raise PluginError(f"run.batches was given {sample!r}, which is no sample of the order", hint=expected)
        ids.append(number)
    return np.array(ids, np.int64)
