"""The text of the console: the banner, the lines of a run, the summary."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt_simple.hooks import Run
    from gpt_simple.hooks import events as ev

_METRICS = (
    "loss={train/loss:.4f}",
    "lr={train/lr:.3g}",
    "grad_norm={train/grad_norm:.3f}",
    "skipped={train/skipped_steps:.0f}",
    "tokens_per_second={perf/tokens_per_second:.0f}",
    "mfu={perf/mfu:.3f}",
    "peak_gib={memory/peak_gib:.2f}",
)


def filled(templates: Iterable[str], values: Mapping[str, Any]) -> list[str]:
    """The format strings filled in, without those that name something that is not among ``values``."""
    texts = []
    for template in templates:
        with suppress(KeyError):
            texts.append(template.format_map(values))
    return texts


def metrics_line(event: ev.MetricsReady, left: float | None) -> str:
    """A logging boundary as ``key=value`` pairs, with the time that is left."""
    pairs = " ".join(filled(_METRICS, event.metrics))
    return f"step={event.step} tokens={event.tokens} {pairs} eta={duration(left)}"


def evaluation_line(event: ev.EvalEnd, floor: float | None) -> str:
    """An evaluation as ``key=value`` pairs."""
    pairs = [f"{name.replace('/', '_')}={value:.4f}" for name, value in event.metrics.items()]
    if floor is not None:
        pairs.append(f"floor={floor:.4f}")
    return f"step={event.step} {' '.join(pairs)} seconds={event.seconds:.1f}"


def checkpoint_line(event: ev.CheckpointSaved) -> str:
    """A checkpoint as ``key=value`` pairs."""
    return f"step={event.step} checkpoint={event.path} mib={event.bytes / 2**20:.1f} seconds={event.seconds:.2f}"


def log_lines(event: ev.LogRecord) -> str:
    """A message of the log, on one line or, for a sample, on several."""
    if event.name == "sample":
        return f"step={event.step} sample:\n{textwrap.indent(wrapped(event.message), '    ')}"
    return f"{event.level}: {event.message}" if event.level != "info" else event.message


def banner(run: Run, event: ev.RunStart) -> list[str]:
    """What runs, on which device, with which sizes, and from where it starts."""
    info = event.facts
    lines = [
        f"device     {info['device']} x {run.world_size}, precision {info['precision']} ({info['precision_why']}),"
        f" compile {info['compile']}",
        f"model      {run.config.model.name}: {info['parameters']:,} parameters",
        *_recomputation(info["gradient_checkpointing"], info["gradient_checkpointing_why"]),
        f"data       {_data(info['data'])}",
        *_steps(info["stages"], run.world_size, event.max_steps),
        f"plugins    {', '.join(info['plugins'])}",
        f"output     {run.output_dir}",
    ]
    if info["document_kernel"] is not None:
        lines.append(f"documents  attend to themselves: {info['document_kernel']}")
    if info["floor"] is not None:
        lines.append(
            f"floor      {info['floor']:.4f} nats/token: the source's own validation loss; nothing can beat it"
        )
    lines.append(f"start      {event.promise}")
    return lines


def _recomputation(setting: bool | int, why: str) -> Iterator[str]:
    """What is computed again in the backward pass, if that was decided or is not needed."""
    blocks = "every block" if setting is True else f"one of {setting} blocks" if setting else "no block"
    if why != "configured":
        yield f"recompute  {blocks} ({why})"


def _steps(stages: Sequence[Mapping[str, Any]], world_size: int, max_steps: int) -> Iterator[str]:
    """The shape of a step, on a line for each stage."""
    for number, stage in enumerate(stages):
        yield (
            f"{'' if number else 'step':<10} {stage['rows']} rows x {stage['accumulation']} micro-batches x"
            f" {world_size} processes x {stage['length']} tokens = {stage['tokens']:,} tokens"
            + (f" from step {stage['first_step']:,} on" if len(stages) > 1 else "")
            + (f"; {max_steps:,} steps" if number == len(stages) - 1 else "")
        )


def compiling_steps(facts: Mapping[str, Any], step: int) -> list[int]:
    """The steps after ``step`` that compile the model: the first with rows of each length."""
    stages = facts.get("stages", ())
    if facts["compile"] == "off":
        return []
    first: dict[int, int] = {}
    for stage, following in zip(stages, [*stages[1:], None], strict=False):
        if following is None or following["first_step"] > step + 1:
            first.setdefault(stage["length"], max(stage["first_step"], step + 1))
    return list(first.values()) or [step + 1]


def tokens_between(stages: Sequence[Mapping[str, Any]], step: int, last_step: int) -> int:
    """Tokens of the steps after ``step`` up to ``last_step``; ``stages`` are those of ``run.facts()``."""
    total, end = 0, last_step + 1
    for stage in reversed(stages):
        begin = max(stage["first_step"], step + 1)
        total += max(0, end - begin) * stage["tokens"]
        end = min(end, begin)
    return total


def _data(data: Mapping[str, Any]) -> str:
    train = f"{data['train']['targets']:,} training tokens"
    if data.get("stream"):
        train = "training tokens from a stream"
    buckets = f", {len(data['buckets'])} buckets" if len(data["buckets"]) > 1 else ""
    tokenizer = f"tokenizer {data['tokenizer']} ({data['vocab_size']:,} entries)"
    return f"{train}, {data['val']['targets']:,} validation tokens{buckets}, {tokenizer}"


def summary_lines(run: Run, event: ev.RunEnd) -> list[str]:
    """How the run ended, its results, and the next commands."""
    summary = event.summary
    floor = f" (floor {summary['floor']:.4f})" if summary["floor"] is not None else ""
    rows: list[tuple[str, Any]] = [
        ("steps", f"{summary['steps']:,}"),
        ("tokens", f"{summary['total_tokens']:,} ({summary['total_target_tokens']:,} in the loss)"),
        ("training loss", _number(summary["final_loss"])),
        ("validation loss", _number(summary["final_val_loss"]) + floor),
        ("best validation loss", _number(summary["best_val_loss"])),
        ("bits per byte", _number(summary["bits_per_byte"])),
        ("median tokens/s", f"{summary['tokens_per_second']:,.0f}" if summary["tokens_per_second"] else "-"),
        ("peak memory", f"{summary['peak_memory_gib']:.2f} GiB"),
        ("time", duration(summary["seconds"])),
        ("time in plugins", _costs(summary["plugin_seconds"])),
        ("checkpoint", summary["checkpoint"] or "-"),
    ]
    lines = ["", f"{event.status}: {event.reason}"]
    lines += [f"  {name:<21} {value}" for name, value in rows]
    for description in summary["plugins"].values():
        if "sample" in description:
            lines += ["  the model writes", textwrap.indent(wrapped(description["sample"]), "    ")]
    lines += ["", f"next: {summary['next']}"]
    if summary["checkpoint"]:
        lines.append(f"      {summary['sample']} lets the model write")
    return lines


def wrapped(text: str) -> str:
    """Lines of readable width, without control characters: an untrained model writes them, and terminals obey them."""
    return printable("\n".join(textwrap.fill(line, 100) for line in text.splitlines()))


def printable(text: str) -> str:
    """The text without characters that a terminal obeys or cannot show: log lines and paths may hold any."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def _costs(seconds: Mapping[str, float]) -> str:
    """The seconds of each plugin, the slowest first."""
    slowest_first = sorted(seconds.items(), key=lambda cost: -cost[1])
    text = ", ".join(f"{name} {cost:.2f} s" for name, cost in slowest_first)
    return textwrap.fill(text, 96, subsequent_indent=" " * 24)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def duration(seconds: float | None) -> str:
    """``1h02m``, ``3m20s``, ``9s``; a question mark for None."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"
