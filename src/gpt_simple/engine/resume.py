"""The checkpoint that a launch continues from, and what the resume guarantees.

A checkpoint of another model, tokenizer or data set is refused. Any other difference is part of the guarantee:
``bit-exact``, ``order-exact`` or ``changed: ...``. Nothing here writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import field, frozen

from gpt_simple._documents import COUNT, check
from gpt_simple._names import DISTRIBUTION
from gpt_simple.checkpoint.store import Checkpoint, Store
from gpt_simple.checkpoint.tensor_names import as_text, optimizer_tensors
from gpt_simple.config.schema import Config
from gpt_simple.engine import activation_checkpointing
from gpt_simple.engine.compatibility import flatten, with_legacy_options, with_legacy_values
from gpt_simple.engine.mirror import Mirror
from gpt_simple.errors import CheckpointError
from gpt_simple.hooks.preflight import ConfigChanges
from gpt_simple.plugin_host.state import unpack

# Fields that do not affect training: when things are reported and kept, and where.
_NEUTRAL = (
    "data.path",
    "data.num_workers",
    "training.logging_steps",
    "training.eval_steps",
    "training.max_eval_batches",
    "training.save_steps",
    "training.max_skipped_steps",
    "training.save_after_eval",
    "training.checkpoint_store",
    "training.background_save",
    "training.keep_last_k",
    "training.keep_milestone_every",
    "training.output_dir",
    "training.resume",
    "training.max_runtime_seconds",
    "training.walltime_reserve_seconds",
    "training.peer_timeout_seconds",
    "training.peak_flops",
    "training.wandb_project",
    "training.wandb_run_name",
    "training.deterministic",  # the numerics have it, and the next
    "training.parallel",
    "training.shard_size",
    "plugins.",  # those of other packages are compared separately
)
_DETERMINISTIC = "deterministic"  # in the numerics
# Fields that define a row of the data: with another value the position in the data has another meaning.
_ROWS = ("data.max_length", "data.packing", "data.overlap_size", "data.document_mask")
_ORDER = " (the order of samples is another from here on: some come twice, others not at all)"
_AHEAD = " (the curriculum up to here is the same: nothing comes twice or is left out)"
_READ = " (where a bucket has been read to its end before, the order of samples is another from here on)"
# Fields of the model that can differ between two launches of one run.
_MODEL_FREE = ("model.dropout",)

_PARAMETER = {"layout": str, "tensors": [str], "values": dict}
_PHASE = {"duration_tokens": COUNT, "mix": dict}
_CONFIG = {"data.max_length": range(1, 2**63), "data.on_exhaustion": object, "data.curriculum?": (None, [_PHASE])}
_STATE = {
    **dict.fromkeys(("step", "tokens", "target_tokens", "samples"), COUNT),
    "best_val_loss": (None, float),
    "finished?": str,
    "evaluation_due?": bool,
    "optimizer": {"optimizer": str, "parameters": {...: _PARAMETER}},
    "scaler": {...: float},
    "model?": {...: str},
    "trained?": [str],
    "run": {"config": _CONFIG, "data": {...: str}, "numerics": dict, "plugins?": dict},
}
"""state.json; job/build.py writes it."""
_RECORD = {
    "version": int,
    "required": bool,
    "distribution": str,
    "distribution_version": str,
    "state": dict,
    "weights?": [str],
    "on_device?": [str],
}
"""The state of a plugin in plugins.json, the names of its sets of weights, and its tensors that were on a GPU."""


@frozen
class FoundCheckpoint:
    """What the run directory holds. Without a ``checkpoint`` the run starts from scratch."""

    store: Store
    checkpoint: Checkpoint | None = None
    state: Mapping[str, Any] = field(factory=dict)
    skipped: Sequence[tuple[Path, str]] = ()
    """Damaged checkpoints that are newer, each with a reason."""
    seen: Sequence[Path] = ()
    """All checkpoints of the run, to notice if another run writes one before this launch has locked the directory."""
    mirror: Mirror | None = None
    """The checkpoints elsewhere, on the main process of a run with a ``training.checkpoint_store``."""

    @property
    def gradient_checkpointing(self) -> bool | int | None:
        """That of the run, in which ``"auto"`` was decided; None from scratch."""
        setting = self.state["run"]["config"].get(activation_checkpointing.KEY) if self.checkpoint else None
        return setting if isinstance(setting, int) else None


def find_checkpoint(config: Config, store: Store, *, force: bool) -> FoundCheckpoint:
    """Decide from what is on disk. Reads only; raises CheckpointError for what must not be resumed or overwritten."""
    setting = config.training.resume
    if force:
        return FoundCheckpoint(store)
    listed = store.list()
    if setting == "scratch":
        if listed:
            raise CheckpointError(
                f'training.resume is "scratch" but {store.root} holds {len(listed)} checkpoint(s), the newest of step'
                f" {listed[-1].step}: add --force to discard them, or choose another training.output_dir"
            )
        return FoundCheckpoint(store)
    checkpoint, skipped = store.newest_valid(lambda found: load_state(config, store, found))
    inside = setting != "auto" and Path(setting).resolve().parent == store.root.resolve()
    if checkpoint is None and skipped and not inside:
        reasons = "".join(f"\n  {path}: {reason}" for path, reason in skipped)
        raise CheckpointError(
            f"no checkpoint in {store.root} can be used:{reasons}\n"
            "add --force to discard them and start from scratch, or choose another training.output_dir"
        )
    if setting != "auto" and (checkpoint is None or inside):
        checkpoint = _open(Path(setting), store, newest=checkpoint)
    if checkpoint is None:
        return FoundCheckpoint(store)
    seen = [each.path for each in listed]
    return FoundCheckpoint(store, checkpoint, load_state(config, store, checkpoint), skipped, seen)


def _open(path: Path, store: Store, newest: Checkpoint | None) -> Checkpoint:
    """The checkpoint that ``training.resume`` names. In the run itself only the ``newest`` may be resumed."""
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
    return checkpoint


def load_state(config: Config, store: Store, checkpoint: Checkpoint) -> dict[str, Any]:
    """state.json, with the configuration of an earlier version completed.

    Raises CheckpointError if it, or the state of plugins, is not what a run writes, whatever its checksums are.
    """
    state: dict[str, Any] = store.load_document(checkpoint, "state")
    try:
        check(state, _STATE)
        check_weights(state, store, checkpoint)
        _check_optimizer(state["optimizer"], store, checkpoint)
        if state["step"] != checkpoint.step:
            raise ValueError(f"step: expected {checkpoint.step}")
    except (LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint.path / 'state.json'} is damaged: {error}") from None
    try:
        records = store.load_document(checkpoint, "plugins")
        check(records, {...: _RECORD})
        unpack(records, store.layouts(checkpoint, "plugins"))
    except (LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint.path / 'plugins.json'} is damaged: {error}") from None
    run = state["run"]
    values, options = with_legacy_values(run["config"], config), with_legacy_options(run.get("plugins", {}), config)
    return state | {"run": run | {"config": values, "plugins": options}}


def check_weights(state: Mapping[str, Any], store: Store, checkpoint: Checkpoint) -> None:
    """Raise ValueError unless the model's tensors are those that were saved. Earlier versions do not record them.

    ``state``: the content of state.json.
    """
    recorded = state.get("model")
    found = {name: as_text(**layout) for name, layout in store.layouts(checkpoint, "model").items()}
    if recorded is not None and recorded != found:
        other = min(name for name, _ in recorded.items() ^ found.items())
        raise ValueError(f"model.safetensors has other tensors, {other} among them")


def _check_optimizer(document: Mapping[str, Any], store: Store, checkpoint: Checkpoint) -> None:
    """Raise ValueError unless the optimizer's tensors, and the layouts of its parameters, are in the checkpoint."""
    parameters = document["parameters"]
    if other := optimizer_tensors(document) ^ store.layouts(checkpoint, "optimizer").keys():
        raise ValueError(f"optimizer.safetensors has other tensors, {min(other)} among them")
    for name, layout in store.layouts(checkpoint, "model").items():
        if name in parameters and parameters[name]["layout"].split("]")[0] != as_text(**layout).split("]")[0]:
            raise ValueError(f"model.safetensors has another shape of {name}")


@frozen
class ResumePlan:
    """How a launch continues: the checkpoint found, the run's fingerprint now, and what resuming guarantees."""

    found: FoundCheckpoint
    fingerprint: Mapping[str, Any]
    guarantee: str

    @property
    def is_finished(self) -> bool:
        """Whether the run is complete, so that this launch has nothing to do."""
        return bool(self.why_finished)

    @property
    def why_finished(self) -> str:
        """Why the run is complete, and what to change to go on; empty if this launch goes on."""
        return why_finished(self.found, self.fingerprint)

    @property
    def source(self) -> Path | None:
        """The checkpoint's path, None from scratch."""
        return self.found.checkpoint.path if self.found.checkpoint else None

    @property
    def step(self) -> int:
        """The last step before this launch, 0 from scratch."""
        return int(self.found.state["step"]) if self.found.checkpoint else 0

    @property
    def samples(self) -> int:
        """Samples consumed before this launch."""
        return int(self.found.state["samples"]) if self.found.checkpoint else 0


def plan_resume(found: FoundCheckpoint, fingerprint: Mapping[str, Any]) -> ResumePlan:
    """Compare the run with its checkpoint. Raises CheckpointError if model, tokenizer or data set differ."""
    if found.checkpoint is None:
        return ResumePlan(found, fingerprint, "from scratch")
    guarantee = resume_guarantee(found.state["run"], fingerprint, found.state["samples"])
    return ResumePlan(found, fingerprint, f"resumed from step {found.state['step']}: {guarantee}")


def why_finished(found: FoundCheckpoint, now: Mapping[str, Any]) -> str:
    """Why a launch with the fingerprint ``now`` has nothing to do, and what to change to go on; empty if it goes on.

    A run that was complete before ``training.max_steps`` goes on with more steps, and where another plugin, other
    options of one or other options of the data may decide otherwise. Another version of a plugin is no such change.
    """
    if found.checkpoint is None:
        return ""
    step, steps, saved = found.checkpoint.step, now["config"]["training.max_steps"], found.state["run"]
    if step >= steps:
        return f"step {step} of {steps} was reached before: raise training.max_steps"
    reason = found.state.get("finished", "")
    if not reason or steps > saved["config"].get("training.max_steps", steps) or _ends(saved) != _ends(now):
        return ""
    change = "raise training.max_steps, or change the options of a plugin or of the data"
    return f"the run was completed at step {step} of {steps} ({reason}): {change}"


def _ends(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """The options of data and plugins, which may complete a run before its last step; plugins without versions."""
    config, plugins = fingerprint["config"], fingerprint.get("plugins", {})
    data = {key: value for key, value in config.items() if key.startswith("data.") and not key.startswith(_NEUTRAL)}
    names = {key: value.partition(" ")[0] for key, value in plugins.items() if key.count(".") == 1}
    return {**data, **plugins, **names}


def run_fingerprint(
    config: Config, *, data: Mapping[str, Any], numerics: Mapping[str, Any], plugins: Mapping[str, str]
) -> dict[str, Any]:
    """The part of a run that a checkpoint keeps, to be compared with a later launch. JSON values.

    ``plugins``: name -> distribution and version of the active ones. The built-in ones do not affect training.
    """
    fields, others = flatten(config), {}
    for name, origin in plugins.items():
        if origin.partition(" ")[0] != DISTRIBUTION:
            table = f"plugins.tables.{name}."
            others[f"plugins.{name}"] = origin or "on"
            others |= {key.replace(".tables.", ".", 1): fields[key] for key in fields if key.startswith(table)}
    return {"config": fields, "data": dict(data), "numerics": dict(numerics), "plugins": others}


def with_determinism(numerics: Mapping[str, Any], is_deterministic: bool) -> dict[str, Any]:
    """``numerics`` with whether kernels repeat their bits; a CPU that does what it always does has no entry."""
    others = {key: value for key, value in numerics.items() if key != _DETERMINISTIC}
    is_usual = others.get("device", "cpu") == "cpu" and not is_deterministic
    return others if is_usual else {**others, _DETERMINISTIC: is_deterministic}


def resume_guarantee(saved: Mapping[str, Any], now: Mapping[str, Any], samples: int) -> str:
    """What resuming as ``now`` from ``saved`` after ``samples`` samples guarantees, in a phrase (two fingerprints).

    Raises CheckpointError with every difference if the model, the tokenizer or the data are others.
    """
    changed = _differences(saved["config"], now["config"])
    fatal = [
        line for key, line in changed.items() if key in _ROWS or (key.startswith("model.") and key not in _MODEL_FREE)
    ]
    if other := _differences(_short(saved["data"]), _short(now["data"])):
        # Changed options first: they explain the changed fingerprints.
        options = [
            line for key, line in changed.items() if key.startswith("data.") and key not in (*_ROWS, "data.num_workers")
        ]
        fatal += [*options, *other.values()]
        fatal += [] if options else ["the configuration is the same: the files are others"]
    if fatal:
        listing = "".join(f"\n  {line}" for line in fatal)
        raise CheckpointError(
            f"the checkpoint is of another model, tokenizer or data set:{listing}\n"
            "go back to its configuration, choose another training.output_dir, or add --force to start anew"
        )
    if (reconfigured := changes(saved, now, samples)) is not None:
        return f"changed: {reconfigured}"
    numerics = _other_digits(saved["numerics"], now["numerics"])
    if not now["numerics"].get(_DETERMINISTIC, True):
        # True of two equal launches, too.
        device = now["numerics"]["device"]
        numerics[_DETERMINISTIC] = f"kernels of {device} add in any order without training.deterministic"
    if numerics:
        return f"order-exact: same samples, other last digits ({'; '.join(numerics.values())})"
    return "bit-exact"


def changes(saved: Mapping[str, Any], now: Mapping[str, Any], samples: int) -> ConfigChanges | None:
    """The configuration and plugins that ``now`` has changed, and the numerics beside them; None if only those."""
    changed = _differences(saved["config"], now["config"])
    free = {key: line for key, line in changed.items() if not key.startswith(_NEUTRAL)}
    free |= _differences(saved.get("plugins", {}), now["plugins"])
    if not free:
        return None
    numerics = _other_digits(saved["numerics"], now["numerics"])
    return ConfigChanges({**free, **numerics}, _order_kept(saved["config"], now["config"], samples))


def _other_digits(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """The differences of two numerics. What is usual is not recorded."""
    usual = {_DETERMINISTIC: False, "parallel": "ddp"}
    return _differences({**usual, **saved}, {**usual, **now})


def _order_kept(saved: Mapping[str, Any], now: Mapping[str, Any], samples: int) -> str:
    """A note on the order of samples if a field that decides it has changed."""
    if _past(saved, samples) != _past(now, samples):
        return _ORDER
    exhaustion = {saved["data.on_exhaustion"], now["data.on_exhaustion"]}
    if now.get("data.curriculum") and exhaustion == {"repeat", "renormalise"}:
        return _READ
    return _AHEAD if saved.get("data.curriculum") != now.get("data.curriculum") else ""


def _past(config: Mapping[str, Any], samples: int) -> tuple[Any, ...]:
    """What decides the order of the first ``samples``: the seed, and the phases so far, each with its end."""
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
