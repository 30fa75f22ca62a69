"""The findings of `validate` about the data: their size, how often a run reads them, and the validation split."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from gpt_simple import Finding

if TYPE_CHECKING:
    from gpt_simple.hooks import Preflight

RowsTaken = Callable[[int], Mapping[str, int]]

_DATA = 3
_EVALUATION_SHARE = 0.25
"""A larger share of the time in evaluation is a warning. A forward pass counts as a third of a training step."""


def data_findings(preflight: Preflight) -> Iterator[Finding]:
    """The data and how far they reach. Raises what ``preflight.data`` raises."""
    config, data = preflight.config, preflight.data
    where = f" in {data.directory}" if data.directory else ""
    about = "about " if data.estimated else ""
    size = "of unknown size until they are prepared"
    if data.train_tokens is not None:
        size = f"{about}{data.train_tokens:,} tokens to train on, {about}{data.val_tokens:,} held out"
    fields = {
        "train_tokens": data.train_tokens,
        "val_tokens": data.val_tokens,
        "vocab_size": data.vocab_size,
        "estimated": data.estimated,
        "buckets": dict(data.buckets),
        "fingerprints": dict(data.fingerprints or {}),
    }
    yield Finding("info", "data", f"{data.source}{where}: {size}", fields=fields)
    wanted = getattr(config.model, "vocab_size", None)
    if wanted is not None and data.vocab_size is not None and wanted < data.vocab_size:
        hint = "leave it out or raise it"
        if data.estimated and config.data.tokenizer == "bpe":  # fewer come out if the text has no more pairs
            message = f"the tokenizer will have up to {data.vocab_size} tokens, more than {wanted}"
            yield Finding("warning", "vocabulary-too-small", message, "model.vocab_size", hint)
        else:
            message = f"the tokenizer has {data.vocab_size} tokens, more than {wanted}"
            yield Finding("error", "vocabulary-too-small", message, "model.vocab_size", hint)
    yield from _epochs(preflight)
    yield from _validation(preflight)


def _epochs(preflight: Preflight) -> Iterator[Finding]:
    config, data = preflight.config, preflight.data
    steps, length = config.training.max_steps, config.data.max_length
    if data.train_tokens is None:
        return
    about = "about " if data.estimated or data.unpacked else ""
    needed, total = preflight.samples, data.total
    if total is not None and total < needed:
        last = preflight.last_step(total)
        exhausted = f"on_exhaustion {config.data.on_exhaustion!r}"
        message = f"the data end after {about}step {last:,} of {steps:,} ({exhausted})"
        hint = 'lower training.max_steps, or set "repeat"'
        yield Finding("warning", "data-end-early", message, "data.on_exhaustion", hint, _DATA)
        needed = preflight.samples_after(last)
    epochs = needed / (sum(data.buckets.values()) or data.train_tokens / length or 1)
    message = f"the run reads the data {about}{epochs:.2f} times"
    yield Finding("info", "epochs", message, fields={"epochs": epochs})
    if data.rows_taken is not None:
        yield from _buckets(preflight, data.rows_taken, needed)
        yield from _ends(preflight, data.rows_taken, needed)


def _buckets(preflight: Preflight, rows_taken: RowsTaken, needed: int) -> Iterator[Finding]:
    """How much of each bucket the first ``needed`` rows take, in all and in each phase."""
    data, length = preflight.data, preflight.config.data.max_length
    about = "about " if data.unpacked else ""
    shares = {name: taken / max(1, data.buckets[name]) for name, taken in rows_taken(needed).items()}
    message = "buckets read: " + ", ".join(f"{name} {about}{share:.2f} times" for name, share in shares.items())
    yield Finding("info", "buckets", message, fields={"epochs": shares})
    begin, phases = 0, preflight.config.data.curriculum
    for number, phase in enumerate(phases, 1):
        if begin >= needed:
            message = f"the run ends before phase {number} of {len(phases)} begins, after {begin * length:,} tokens"
            yield Finding("warning", "phase-never-reached", message, "data.curriculum", "raise training.max_steps")
            return
        end = needed if number == len(phases) else min(needed, begin + round(phase.duration_tokens / length))
        before, after = rows_taken(begin), rows_taken(end)
        tokens = {name: (after[name] - before[name]) * length for name in phase.mix}
        sizes = {name: data.buckets[name] * length for name in phase.mix}
        parts = ", ".join(f"{name} {tokens[name]:,} of {about}{sizes[name]:,}" for name in phase.mix)
        message = f"phase {number} of {len(phases)} reads {(end - begin) * length:,} tokens: {parts}"
        yield Finding("info", "phase", message, fields={"phase": number, "tokens": tokens, "there": sizes})
        begin = end


def _ends(preflight: Preflight, rows_taken: RowsTaken, needed: int) -> Iterator[Finding]:
    """Buckets without an unread row after ``needed`` samples, each with the step that reads its last one."""
    about = "about " if preflight.data.unpacked else ""
    taken = rows_taken(needed)
    for name, rows in preflight.data.buckets.items():
        if rows and taken[name] >= rows:
            samples = bisect_left(range(needed), True, key=lambda samples: rows_taken(samples)[name] >= rows)
            before = samples <= preflight.samples_done
            step = preflight.steps_done if before else preflight.last_step(samples - 1) + 1
            message = f"bucket {name!r} ({about}{rows:,} rows) has been read whole after {about}step {step:,}"
            yield Finding("info", "bucket-ends", message, fields={"bucket": name, "step": step})


def _validation(preflight: Preflight) -> Iterator[Finding]:
    config, data = preflight.config, preflight.data
    training, length = config.training, config.data.max_length
    if not training.eval_steps:
        return
    hint = "raise val_fraction, lower max_length, give more text, or set training.eval_steps = 0"
    if data.val_at_most is not None and data.val_at_most < length:
        most = "at most " if data.estimated and data.val_at_most else ""
        tokens = f"{most}{data.val_at_most:,} tokens"
        message = f"the validation split has {tokens}, and a sample is data.max_length {length:,}"
        yield Finding("error", "validation-too-short", message, "data.val_fraction", hint, _DATA)
        return
    if data.val_tokens is None:
        return
    fraction, total = config.data.val_fraction, data.val_tokens + (data.train_tokens or 0)
    if data.source != "token shards" and data.val_tokens > 2 * fraction * total > 0:
        about = "about " if data.estimated else ""
        message = (
            f"{about}{data.val_tokens / total:.0%} of the tokens are held out, though val_fraction is {fraction:g}: a"
            " document is held out as a whole, and at least one is"
        )
        divide = "divide the text into more documents, join it to one file, or set it and training.eval_steps to 0"
        yield Finding("warning", "held-out-share", message, "data.val_fraction", divide, _DATA)
    if data.val_tokens < length:
        message = (
            f"the validation split has about {data.val_tokens:,} tokens, an estimate, and a sample is data.max_length"
            f" {length:,}"
        )
        yield Finding("warning", "validation-too-short", message, "data.val_fraction", hint, _DATA)
        return
    rows = data.val_rows
    if training.max_eval_batches is not None:
        rows = min(rows, training.max_eval_batches * training.per_device_batch_size)
    # The mean over the stages.
    steps, samples = training.max_steps - preflight.steps_done, preflight.samples - preflight.samples_done
    per_step = samples / steps if steps > 0 else preflight.rows_per_step
    evaluating, stepping = rows / 3, min(training.eval_steps, training.max_steps) * per_step
    share = evaluating / (evaluating + stepping)
    if share > _EVALUATION_SHARE:
        message = f"evaluating {rows:,} rows every {training.eval_steps} steps takes about {share:.0%} of the time"
        hint = "set training.max_eval_batches or raise training.eval_steps"
        yield Finding("warning", "evaluation-heavy", message, "training.eval_steps", hint)
