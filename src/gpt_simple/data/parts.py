"""Units of raw text as tokens on disk: encoded by several processes, each part written whole or not at all.

A part is ``KEY.tokens`` (documents, each ended by EOD), ``KEY.documents`` (what is known of each) and, written last,
``KEY.json``. Its key says what it was made from, so whoever finds it after a kill can use it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import lru_cache
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
from attrs import asdict, frozen
from numpy.typing import NDArray

from gpt_simple._files import fsync
from gpt_simple.data.corpus import Skipped, Unit, read
from gpt_simple.data.manifest import token_dtype
from gpt_simple.data.tokenize import BATCH_BYTES, key_hash
from gpt_simple.data.tokenizer import JsonTokenizer, load_tokenizer
from gpt_simple.errors import GptSimpleError

DOCUMENT = np.dtype([("hash", "<u8"), ("tokens", "<i8"), ("bytes", "<i8")])
"""Of each document: the hash of its text, how many tokens it has with its EOD, how many bytes of UTF-8."""


@frozen
class Settings:
    """What a part depends on beside its unit, and where parts are."""

    directory: Path
    tokenizer: Path
    fingerprint: str
    text_key: str

    def key(self, unit: Unit) -> str:
        return unit.key(f"{self.fingerprint}|{self.text_key}")


@frozen(eq=False)
class Part:
    """The tokens of a unit's documents and what is known of each (DOCUMENT), mapped into memory."""

    tokens: NDArray[Any]
    documents: NDArray[Any]
    skipped: Skipped


def open_part(unit: Unit, settings: Settings) -> Part | None:
    """The part of a unit; None if it has not been made."""
    path = settings.directory / f"{settings.key(unit)}.json"
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    dtype = token_dtype(tokenizer_of(settings).vocab_size)
    tokens = np.fromfile(path.with_suffix(".tokens"), dtype)
    documents = np.fromfile(path.with_suffix(".documents"), DOCUMENT)
    return Part(tokens, documents, Skipped(**record))


def is_made(unit: Unit, settings: Settings) -> bool:
    return (settings.directory / f"{settings.key(unit)}.json").exists()


def make_part(unit: Unit, settings: Settings) -> Skipped:
    """Encode a unit; returns what of it was left out."""
    tokenizer, skipped = tokenizer_of(settings), Skipped()
    path = settings.directory / settings.key(unit)
    dtype = token_dtype(tokenizer.vocab_size)
    with path.with_suffix(".tokens").open("wb") as tokens, path.with_suffix(".documents").open("wb") as documents:
        for texts in _batches(read(unit, settings.text_key, skipped)):
            ids, sizes = tokenizer.encode_documents(texts)
            tokens.write(ids.astype(dtype).data)
            known = [
                (key_hash(text), size, len(text.encode())) for text, size in zip(texts, sizes.tolist(), strict=True)
            ]
            documents.write(np.array(known, DOCUMENT).data)
        for file in (tokens, documents):
            file.flush()
            os.fsync(file.fileno())
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(skipped)))
    fsync(temporary)
    temporary.replace(path.with_suffix(".json"))
    return skipped


def make_parts(units: Sequence[Unit], settings: Settings, workers: int) -> Generator[tuple[Unit, Skipped], None, None]:
    """Encode units in ``workers`` processes; each with what was left out, in the order in which they are finished."""
    if workers == 1 or len(units) <= 1:
        for unit in units:
            yield unit, make_part(unit, settings)
        return
    others = multiprocessing.active_children()
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(units)), context, initializer=_start)
    try:
        with _signals_blocked():
            jobs = {pool.submit(make_part, unit, settings): unit for unit in units}
        for job in as_completed(jobs):
            yield jobs[job], job.result()
    except BrokenProcessPool as error:
        raise GptSimpleError(
            "a process that tokenizes has died, perhaps for want of memory",
            hint="what is done is kept: run the command again, with a lower --num_workers if need be",
        ) from error
    finally:
        # A part is whole or not there, so nothing is lost; and to wait for the end leaves no semaphore behind.
        for process in multiprocessing.active_children():
            if process not in others:
                process.kill()
        pool.shutdown(cancel_futures=True)


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Processes that are started meanwhile hear no signal that a terminal or a scheduler sends to all of them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start() -> None:
    """In a new process: one thread of encoding, and no life after the parent's death."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave_with_parent(sentinel: int = parent.sentinel) -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


@lru_cache(maxsize=1)
def tokenizer_of(settings: Settings) -> JsonTokenizer:
    """The tokenizer of all parts, loaded once in each process."""
    return load_tokenizer(settings.tokenizer)


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
