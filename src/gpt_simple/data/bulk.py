"""A directory of raw text to a dataset directory, in parallel and in steps that a kill does not undo.

Text is encoded in parts (parts.py), which are kept in ``OUTPUT/.work`` until all are there. Then they become the shards
of both splits, in the order of the files. So the result is the same whatever the number of processes and of attempts;
``dataset.json`` comes last, and what has none is not finished.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from gpt_simple._documents import COUNT
from gpt_simple._documents import read as read_document
from gpt_simple._files import fsync, remove_tree
from gpt_simple.config.schema import DataConfig
from gpt_simple.data.cache import Log, build_once, locked, writing
from gpt_simple.data.manifest import FILE, REPORT, WORK, Manifest, held_out_note, holds_out_too_much, read_manifest
from gpt_simple.data.parts import (
    DOCUMENT,
    Settings,
    Skipped,
    Unit,
    documents_of,
    find_units,
    make_parts,
    read,
    skipped_of,
    tokenizer_of,
    tokens_of,
)
from gpt_simple.data.shards import DatasetWriter
from gpt_simple.data.sources.files import bad_documents, passed_over
from gpt_simple.data.tokenize import TRAINING_BYTES, held_out_of, key_hash
from gpt_simple.data.tokenizer import bpe, load_tokenizer
from gpt_simple.data.tokenizer import bytes as byte_tokenizer
from gpt_simple.errors import ConfigError, DataError
from gpt_simple.hooks.batch import Tokenizer

_WORK_NAME = re.compile(r"\.(work|tokenizer-\w+)\.(lock|tmp)|parts|build|tokenizer-\w+(\.tmp)?")
"""What ``WORK`` holds."""
_HINT = "make room, and the same command goes on, or name another directory"
_SHAPE = {"identity": str, "empty": COUNT, "skipped": COUNT, "errors": [str]}
SHOWN = 20
"""How many skipped documents are logged; the report has more."""

Progress = Callable[[int, int], None]
"""Called with the bytes that are done, and those of all files."""


@frozen
class Job:
    """What to tokenize and how. ``tokenizer`` is ``bpe`` (trained on the text), ``bytes`` or a path.

    ``max_length``: refuse a split that is wanted and shorter than one row of this many tokens.
    """

    input_dir: Path
    output_dir: Path
    tokenizer: str = "bpe"
    tokenizer_vocab_size: int = 8192
    end_token: str | None = None
    text_key: str = "text"
    val_fraction: float = 0.05
    max_length: int | None = None
    num_workers: int = 1
    strict: bool = False


def tokenize(job: Job, log: Log, progress: Progress) -> Manifest:
    """Make the dataset, or go on with one that was begun; a finished one of the same input is left as it is.

    Documents that cannot be read are skipped, logged and counted in ``tokenize.json``; ``strict`` makes the first of
    them a DataError. DataError too if the output belongs to something else. After an error nothing was published.
    """
    if job.end_token and job.tokenizer in ("bpe", "bytes"):
        raise ConfigError(
            f"the tokenizer {job.tokenizer!r} has its own token that ends a document",
            location="--end_token",
            hint="leave it out: it is for the path of a tokenizer.json",
        )
    units, lost = find_units(job.input_dir)
    if others := passed_over([job.input_dir]):
        log(others)
    identity = _identity(job, units, lost)
    work = _claim(job)
    if not work.exists() and (job.output_dir / FILE).exists():
        return _finished(job, identity, log)
    with locked(work, "work", log, _HINT), writing(job.output_dir, _HINT):
        if (job.output_dir / FILE).exists():
            return _finished(job, identity, log)
        settings = _settings(job, units, work, identity, log)
        skipped = _make_parts(job, units, lost, settings, log, progress)
        if _identity(job, *find_units(job.input_dir)) != identity:
            raise DataError(
                "files have changed while they were read",
                location=f"--input_dir {job.input_dir}",
                hint="run the command again (what has not changed is not done again)",
            )
        manifest = _assemble(work / "build", job, units, settings, skipped)
        _require_rows(job, manifest)
        train, val = manifest.splits["train"], manifest.splits["val"]
        documents, tokens = train.documents + val.documents, train.tokens + val.tokens
        if holds_out_too_much(val.tokens, tokens, job.val_fraction):
            log(held_out_note(val.documents, documents, val.tokens, tokens, job.val_fraction, "--val_fraction"))
        report = {
            "identity": identity,
            "empty": skipped.empty,
            "skipped": skipped.bad,
            "errors": skipped.errors,
            "without_text": skipped.without_text,
        }
        (work / "build" / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        _publish(work / "build", job.output_dir)
        shutil.rmtree(work)
    return manifest


def _claim(job: Job) -> Path:
    """The directory of unfinished work; an output that holds anything else is refused."""
    output, work = job.output_dir, job.output_dir / WORK
    if output.exists() and not output.is_dir():
        raise DataError(f"--output_dir {output} is a file", hint="name a directory")
    begun = work.is_dir() and not work.is_symlink()
    strange = [path for path in work.iterdir() if not _WORK_NAME.fullmatch(path.name)] if begun else []
    if output.exists() and not begun and not (output / FILE).is_file():
        strange = sorted(output.iterdir())
    if strange:
        raise DataError(
            f"--output_dir {output} holds other files: {strange[0]}", hint="name a new or an empty directory"
        )
    return work


def _identity(job: Job, units: Sequence[Unit], lost: Skipped) -> str:
    """A hash of all that decides the result: the options, and the names, sizes and times of the files."""
    tokenizer = job.tokenizer
    if tokenizer not in ("bpe", "bytes"):
        tokenizer = load_tokenizer(Path(tokenizer), end=job.end_token).settings
    options = [tokenizer, job.tokenizer_vocab_size if tokenizer == "bpe" else 0, job.text_key, job.val_fraction]
    states = [*(unit.state for unit in units), *lost.errors]
    return hashlib.sha256(json.dumps([options, states]).encode()).hexdigest()


def _finished(job: Job, identity: str, log: Log) -> Manifest:
    manifest = read_manifest(job.output_dir)
    report = read_report(job.output_dir) if (job.output_dir / REPORT).exists() else {}
    if report.get("identity") != identity:
        raise DataError(
            f"--output_dir {job.output_dir} holds a finished dataset of other files or other options",
            hint="name another directory, or delete this one",
        )
    if job.strict and report["skipped"]:
        raise DataError(
            f"--output_dir {job.output_dir} was finished without --strict, {report['skipped']:,} documents were "
            f"skipped; the first: {next(iter(report['errors']), 'unknown')}"
        )
    _require_rows(job, manifest)
    remove_tree(job.output_dir / WORK)
    log(f"{job.output_dir} is finished already")
    return manifest


def read_report(directory: Path) -> dict[str, Any]:
    """``tokenize.json`` of a finished dataset."""
    try:
        report: dict[str, Any] = read_document(directory / REPORT, _SHAPE)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{directory / REPORT}: cannot be read ({error})",
            hint="the dataset is whole and can be trained on; to make it again, name another --output_dir",
        ) from error
    return report


def _require_rows(job: Job, manifest: Manifest) -> None:
    """Raise a DataError if a split that is wanted has less than a row of ``max_length``."""
    for name, split in manifest.splits.items():
        if split.tokens < (job.max_length or 0) and (name == "train" or job.val_fraction):
            raise DataError(
                f"the {name} split is shorter than one row: {split.tokens:,} tokens, --max_length {job.max_length:,}",
                hint=f"{'raise' if name == 'val' else 'lower'} --val_fraction, give more text, or lower --max_length",
            )


def _settings(job: Job, units: Sequence[Unit], work: Path, identity: str, log: Log) -> Settings:
    """The tokenizer, trained if need be, in a directory where all processes find it."""
    directory = work / f"tokenizer-{identity[:24]}"
    tokenizer = build_once(
        directory,
        lambda new: _tokenizer(job, units, log).save(new),
        log,
        lambda: load_tokenizer(directory, end=job.end_token),
        _HINT,
    )
    parts = work / "parts"
    parts.mkdir(exist_ok=True)
    return Settings(parts, directory, tokenizer.settings, job.text_key, tokenizer.eod_id)


def _tokenizer(job: Job, units: Sequence[Unit], log: Log) -> Tokenizer:
    if job.tokenizer == "bytes":
        return byte_tokenizer(DataConfig(), lambda: iter(()))
    if job.tokenizer != "bpe":
        return load_tokenizer(Path(job.tokenizer), end=job.end_token)
    log(f"training a tokenizer of {job.tokenizer_vocab_size:,} ids")
    return bpe(DataConfig(tokenizer_vocab_size=job.tokenizer_vocab_size), lambda: _training_texts(job, units))


def _training_texts(job: Job, units: Sequence[Unit]) -> Iterator[str]:
    """The beginning of every unit without what is held out: about ``TRAINING_BYTES`` of text in all."""
    share = min(1.0, TRAINING_BYTES / sum(unit.size for unit in units))
    limit = int(job.val_fraction * 2**64)
    for unit in units:
        left = share * unit.size
        for text in read(unit, job.text_key, Skipped()):
            if limit and key_hash(text) < limit:
                continue
            yield text[:TRAINING_BYTES]
            left -= len(text)
            if left <= 0:
                break


def _make_parts(
    job: Job, units: Sequence[Unit], lost: Skipped, settings: Settings, log: Log, progress: Progress
) -> Skipped:
    """Make the parts that are missing. Returns all that was left out."""
    found = {unit: skipped for unit in units if (skipped := skipped_of(unit, settings)) is not None}
    missing = [unit for unit in units if unit not in found]
    total = sum(unit.size for unit in units)
    done = total - sum(unit.size for unit in missing)
    if done:
        log(f"{done / 1e6:,.1f} of {total / 1e6:,.1f} MB were tokenized before")
    progress(done, total)
    count = 0

    def show(skipped: Skipped) -> None:
        nonlocal count
        for place in (*skipped.errors, *skipped.without_text):
            count += 1
            if count <= SHOWN:
                log(f"skipped {place}")
            elif count == SHOWN + 1:
                log(f"more documents are skipped, and not shown; {job.output_dir / REPORT} will count all of them")

    show(lost)
    with closing(make_parts(missing, settings, job.num_workers)) as made:
        for unit, skipped in made:
            found[unit] = skipped
            done += unit.size
            progress(done, total)
            show(skipped)
    result = Skipped()
    result.extend(lost)
    for unit in units:
        result.extend(found[unit])
    if job.strict and result.errors:
        raise bad_documents([DataError(error) for error in result.errors], "or leave them out: --on_bad_document skip")
    return result


def _assemble(directory: Path, job: Job, units: Sequence[Unit], settings: Settings, skipped: Skipped) -> Manifest:
    """Write the shards of both splits, the tokenizer and the manifest into a new directory."""
    content = hashlib.sha256()
    lowest, highest, count = 2**64 - 1, 0, 0
    for unit in units:
        hashes = documents_of(unit, settings)["hash"]
        content.update(hashes.tobytes())
        count += len(hashes)
        lowest, highest = int(hashes.min(initial=lowest)), int(hashes.max(initial=highest))
    if not count and skipped.errors:
        raise DataError(f"no document could be read, {skipped.bad:,} were skipped; the first: {skipped.errors[0]}")
    if not count:
        raise DataError(
            "no document has any text", location=f"--input_dir {job.input_dir}", hint="there is nothing to tokenize"
        )
    remove_tree(directory)
    directory.mkdir()
    tokenizer = tokenizer_of(settings)
    writer, bytes_known = DatasetWriter(directory, tokenizer), True
    for unit in units:
        tokens, documents = tokens_of(unit, settings), documents_of(unit, settings)
        held_out = held_out_of(documents["hash"], lowest, highest, job.val_fraction)
        if count == 1 and len(documents) and job.val_fraction:
            tokens, documents, held_out = _cut(tokens, job.val_fraction, tokenizer.token_bytes())
            bytes_known = tokenizer.token_bytes_are_exact
        writer.add(unit.bucket, tokens, documents["tokens"], documents["bytes"], held_out)
    return writer.close(content.hexdigest(), bytes_known=bytes_known)


def _cut(
    tokens: NDArray[Any], val_fraction: float, token_bytes: NDArray[np.int32]
) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.bool_]]:
    """Two documents made of the only one, the end of which is held out: tokens, DOCUMENTs, and which is held out."""
    ids, eod = tokens[:-1], tokens[-1:]
    at = max(1, min(len(ids) - 1, round(len(ids) * (1 - val_fraction))))
    halves = [half for half in (ids[:at], ids[at:]) if len(half)]
    documents = np.array([(0, len(half) + 1, token_bytes[half].sum()) for half in halves], DOCUMENT)
    ended = np.concatenate([part for half in halves for part in (half, eod)])
    return ended, documents, np.arange(len(halves)) == 1


def _publish(build: Path, output: Path) -> None:
    """Move everything to its place, the manifest last, after all of it is on the disk."""
    for path in (*build.rglob("*"), build):
        fsync(path)
    for path in sorted(build.iterdir(), key=lambda path: path.name == FILE):
        target = output / path.name
        if target.is_dir():  # left by an attempt that was killed while it published: there is no manifest yet
            shutil.rmtree(target)
        if path.name == FILE:
            fsync(output)
        path.rename(target)
    fsync(output)
