"""Where a run goes on, and what that can promise.

Looking changes nothing. A checkpoint is refused if it is of another model, tokenizer or data set; any other difference
is told: ``bit-exact``, ``order-exact`` or ``changed: ...``.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import attrs
from attrs import define, evolve, field, frozen

from gpt_simple._names import DISTRIBUTION
from gpt_simple.checkpoint.manifest import Manifest, check_file
from gpt_simple.checkpoint.store import Checkpoint, Store
from gpt_simple.config.redact import redacted
from gpt_simple.config.schema import Config
from gpt_simple.engine.compatibility import changed_defaults, leaves, with_legacy_options, with_legacy_values
from gpt_simple.errors import CheckpointError, GptSimpleError
from gpt_simple.hooks.preflight import ConfigChanges
from gpt_simple.run_dir.layout import RunDir
from gpt_simple.run_dir.lineage import RunRecord
from gpt_simple.spec import RunSpec

# Fields that cannot change what is learned: when things are reported and kept, and where.
_NEUTRAL = (
    "data.path",
    "data.num_workers",
    "training.logging_steps",
    "training.eval_steps",
    "training.max_eval_batches",
    "training.save_steps",
    "training.max_skipped_steps",
    "training.background_save",
    "training.keep_last_k",
    "training.keep_milestone_every",
    "training.output_dir",
    "training.resume",
    "training.max_runtime_seconds",
    "training.walltime_reserve_seconds",
    "training.peer_timeout_seconds",
    "training.wandb_project",
    "training.wandb_run_name",
    "plugins.",  # those of other packages are compared apart
)
# Fields that decide what a row of the data is: with another value the position means something else.
_ROWS = ("data.max_length", "data.packing", "data.overlap_size", "data.document_mask")
_ORDER = " (the order of samples is another from here on: some come twice, others not at all)"
_AHEAD = " (the curriculum up to here is the same: nothing comes twice or is left out)"
_READ = " (where a bucket has been read to its end before, the order of samples is another from here on)"
# Fields of the model that can differ between two launches of one run.
_MODEL_FREE = ("model.dropout",)


@define
class SizeCheckingStore(Store):
    """A store that compares the sizes of files, and a checksum only of state.json, the one file that is read here."""

    def verify(self, checkpoint: Checkpoint, *, full: bool = True) -> None:
        super().verify(checkpoint, full=False)
        check_file(checkpoint.path / "state.json", Manifest.read(checkpoint.path).files["state.json"], full=True)
        self._verified.add(checkpoint.path)


@frozen
class FoundCheckpoint:
    """What the run directory says: start from scratch, resume from ``checkpoint``, or all steps are finished."""

    store: Store
    kind: Literal["scratch", "resume", "finished"]
    checkpoint: Checkpoint | None = None
    state: Mapping[str, Any] = field(factory=dict)
    skipped: Sequence[tuple[Path, str]] = ()
    seen: Sequence[Path] = ()
    """The checkpoints that were there, to notice when somebody else writes one before this launch owns the place."""


def find_checkpoint(config: Config, run_dir: RunDir, *, force: bool, store: Store | None = None) -> FoundCheckpoint:
    """Decide from what is on disk. Reads only; raises CheckpointError (exit code 4) for what must not go on.

    ``store`` may be one that verifies less than everything, for who only wants to know.
    """
    store, wish = store or Store(run_dir.checkpoints), config.training.resume
    if force:
        return FoundCheckpoint(store, "scratch")
    if wish == "scratch":
        if existing := store.list():
            raise CheckpointError(
                f'training.resume is "scratch" but {run_dir.checkpoints} holds {len(existing)} checkpoint(s), the'
                f" newest of step {existing[-1].step}: add --force to discard them, or choose another"
                " training.output_dir"
            )
        return FoundCheckpoint(store, "scratch")
    seen = [checkpoint.path for checkpoint in store.list()]
    found, skipped = store.newest_valid()
    inside = wish != "auto" and Path(wish).resolve().parent == run_dir.checkpoints.resolve()
    if found is None and skipped and not inside:
        reasons = "".join(f"\n  {path}: {reason}" for path, reason in skipped)
        raise CheckpointError(
            f"no checkpoint in {run_dir.checkpoints} can be used:{reasons}\n"
            "add --force to discard them and start from scratch, or choose another training.output_dir"
        )
    if wish != "auto" and (found is None or inside):
        return evolve(_from_path(config, Path(wish), store, found), seen=seen, skipped=skipped)
    if found is None:
        return FoundCheckpoint(store, "scratch")
    return evolve(_plan(config, store, found), seen=seen, skipped=skipped)


def _from_path(config: Config, path: Path, store: Store, newest: Checkpoint | None) -> FoundCheckpoint:
    try:
        checkpoint = Checkpoint.open(path)
        store.verify(checkpoint)
    except CheckpointError as error:
        error.replace_problems(problem._replace(key="training.resume") for problem in error.problems)
        raise
    if newest is not None and newest.path.resolve() != path.resolve():
        raise CheckpointError(
            f"training.resume names {path}, but {newest.path} is newer in the same run: name another"
            " training.output_dir for the branch"
        )
    return _plan(config, store, checkpoint)


def _plan(config: Config, store: Store, checkpoint: Checkpoint) -> FoundCheckpoint:
    state = store.load_document(checkpoint, "state")
    saved = state["run"]
    values, options = with_legacy_values(saved["config"], config), with_legacy_options(saved.get("plugins", {}), config)
    state["run"] = saved | {"config": values, "plugins": options}
    done = checkpoint.step >= config.training.max_steps
    return FoundCheckpoint(store, "finished" if done else "resume", checkpoint, state)


def keep_values_of_run(spec: RunSpec, *, force: bool) -> RunSpec:
    """The configuration of a launch: what nobody set, now or when the run began, stays as the run began.

    Refuses nothing: what cannot be resumed ``find_checkpoint`` refuses later.
    """
    run_dir = RunDir(Path(spec.config.training.output_dir))
    try:
        run_dir.check()
        found = find_checkpoint(spec.config, run_dir, force=force, store=SizeCheckingStore(run_dir.checkpoints))
        if found.checkpoint is None:
            return spec
        explicit = RunRecord.load(RunDir(found.checkpoint.path.absolute().parent.parent)).facts["origins"]
    except (GptSimpleError, KeyError):
        return spec
    return keep_values(spec, found.state["run"]["config"], explicit)


def keep_values(spec: RunSpec, saved: Mapping[str, Any], explicit: Collection[str] = ()) -> RunSpec:
    """``spec`` with the saved values of fields whose defaults have changed, and a note that names them.

    ``explicit``: the fields that were set when ``saved`` was.
    """
    kept: dict[str, str] = {}
    for _ in ("components", "their fields"):
        now, began = flat(spec.config), with_legacy_values(saved, spec.config)
        values = changed_defaults(began, now, explicit, spec.origins.is_default)
        kept |= {key: f"{key} {json.dumps(value)} (now {json.dumps(now[key])})" for key, value in values.items()}
        spec = spec.with_defaults(values) if values else spec
    if not kept:
        return spec
    return evolve(
        spec, notes=[*spec.notes, f"the run keeps the defaults that it began with: {', '.join(kept.values())}"]
    )


@frozen
class ResumePlan:
    """How a launch continues: the checkpoint found, the run's fingerprint now, and what resuming guarantees."""

    found: FoundCheckpoint
    fingerprint: Mapping[str, Any]
    guarantee: str

    @property
    def is_finished(self) -> bool:
        """Whether the checkpoint has all steps."""
        return self.found.kind == "finished"

    @property
    def source(self) -> Path | None:
        """The checkpoint's path, None from scratch."""
        return self.found.checkpoint.path if self.found.checkpoint else None

    @property
    def samples(self) -> int:
        """Samples consumed before this launch."""
        return int(self.found.state["samples"]) if self.found.checkpoint else 0


def plan_resume(found: FoundCheckpoint, fingerprint: Mapping[str, Any]) -> ResumePlan:
    """Compare the run with its checkpoint. Raises CheckpointError if model, tokenizer or data set differ."""
    if found.checkpoint is None:
        return ResumePlan(found, fingerprint, "from scratch")
    kept = resume_guarantee(found.state["run"], fingerprint, found.state["samples"])
    return ResumePlan(found, fingerprint, f"resumed from step {found.state['step']}: {kept}")


def run_fingerprint(
    config: Config, *, data: Mapping[str, Any], numerics: Mapping[str, Any], plugins: Mapping[str, str]
) -> dict[str, Any]:
    """What a checkpoint remembers of its run, to be compared with a later one. JSON values.

    ``plugins``: name -> distribution and version of the active ones. The built-in ones cannot change what is learned.
    """
    fields, others = flat(config), {}
    for name, origin in plugins.items():
        if origin.partition(" ")[0] != DISTRIBUTION:
            table = f"plugins.tables.{name}."
            others[f"plugins.{name}"] = origin or "on"
            others |= {key.replace(".tables.", ".", 1): fields[key] for key in fields if key.startswith(table)}
    return {"config": fields, "data": dict(data), "numerics": dict(numerics), "plugins": others}


def flat(config: Config) -> dict[str, Any]:
    """Dotted path -> JSON value, for every field that is set or defaulted, without secrets: it is written down.

    ``[model]`` holds none, and is needed as it is to build the model again.
    """
    # As it will come back from a file: tuples become lists.
    values = json.loads(json.dumps(attrs.asdict(config), default=str))
    return dict(leaves("", {**redacted(values), "model": values["model"]}))


def resume_guarantee(saved: Mapping[str, Any], now: Mapping[str, Any], samples: int) -> str:
    """What continuing as ``now`` from ``saved`` after ``samples`` samples keeps, in a phrase (two fingerprints).

    Raises CheckpointError with every difference if the model, the tokenizer or the data are others.
    """
    changed = _differences(saved["config"], now["config"])
    fatal = [
        line for key, line in changed.items() if key in _ROWS or (key.startswith("model.") and key not in _MODEL_FREE)
    ]
    if other := _differences(_short(saved["data"]), _short(now["data"])):
        # What was asked for says more than that something else came of it.
        asked = [
            line for key, line in changed.items() if key.startswith("data.") and key not in (*_ROWS, "data.num_workers")
        ]
        fatal += [*asked, *other.values(), *([] if asked else ["the configuration is the same: the files are others"])]
    if fatal:
        listing = "".join(f"\n  {line}" for line in fatal)
        raise CheckpointError(
            f"the checkpoint is of another model, tokenizer or data set:{listing}\n"
            "go back to its configuration, choose another training.output_dir, or add --force to start anew"
        )
    if (reconfigured := changes(saved, now, samples)) is not None:
        return f"changed: {reconfigured}"
    if numerics := _differences(saved["numerics"], now["numerics"]):
        return f"order-exact: same samples, other last digits ({'; '.join(numerics.values())})"
    return "bit-exact"


def changes(saved: Mapping[str, Any], now: Mapping[str, Any], samples: int) -> ConfigChanges | None:
    """What ``now`` has changed on purpose, with other numerics that come with it; None if nothing."""
    changed = _differences(saved["config"], now["config"])
    free = {key: line for key, line in changed.items() if not key.startswith(_NEUTRAL)}
    free |= _differences(saved.get("plugins", {}), now["plugins"])
    if not free:
        return None
    numerics = _differences(saved["numerics"], now["numerics"])
    return ConfigChanges({**free, **numerics}, _order_kept(saved["config"], now["config"], samples))


def _order_kept(saved: Mapping[str, Any], now: Mapping[str, Any], samples: int) -> str:
    """What becomes of the order of samples, where something that decides it is another."""
    if _past(saved, samples) != _past(now, samples):
        return _ORDER
    if now.get("data.curriculum") and {saved["data.on_exhaustion"], now["data.on_exhaustion"]} == {
        "repeat",
        "renormalise",
    }:
        return _READ
    return _AHEAD if saved.get("data.curriculum") != now.get("data.curriculum") else ""


def _past(config: Mapping[str, Any], samples: int) -> tuple[Any, ...]:
    """What has decided which samples came first: the seed, and the phases so far, each with its end."""
    seed, phases, begin = config.get("data.seed"), [], 0
    curriculum = config.get("data.curriculum") or []
    for number, phase in enumerate(curriculum, 1):
        if begin < samples:
            # The last phase has no end; see data/mixture.py.
            length = round(phase["duration_tokens"] / config["data.max_length"])
            begin = samples if number == len(curriculum) else min(begin + length, samples)
            phases.append((phase["mix"], begin))
    return config.get("training.seed") if seed is None else seed, phases


def _short(fingerprints: Mapping[str, str]) -> dict[str, str]:
    return {f"{name} fingerprint": text[:12] for name, text in fingerprints.items()}


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    keys = [*old, *(key for key in new if key not in old)]
    return {key: f"{key} {old.get(key)} -> {new.get(key)}" for key in keys if old.get(key) != new.get(key)}
