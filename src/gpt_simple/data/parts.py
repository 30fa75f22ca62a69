"""Units of raw text as tokens on disk: encoded by several processes, each part written whole or not at all.

A part is ``KEY.tokens`` (documents, each ended by EOD), ``KEY.documents`` (a DOCUMENT of each) and, written last,
``KEY.json``. The key is a hash of all that the part was made from, so a part that is found after a kill can be used.
"""

from __future__ import annotations

import hashlib
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
from gpt_simple.data.tokenize import batches, key_hash
from gpt_simple.data.tokenizer import JsonTokenizer, load_tokenizer
from gpt_simple.errors import GptSimpleError

DOCUMENT = np.dtype([("hash", "<u8"), ("tokens", "<i8"), ("bytes", "<i8")])
"""Of each document: the hash of its text, its tokens with the EOD, its bytes of UTF-8."""


@frozen
class Settings:
    """What a part depends on beside its unit, and the directory of parts."""

    directory: Path
    tokenizer: Path
    fingerprint: str
    text_key: str

    def part(self, unit: Unit) -> Path:
        """The ``.json`` of the unit's part."""
        made_from = f"{self.fingerprint}|{self.text_key}|{unit.state}"
        return self.directory / f"{hashlib.sha256(made_from.encode()).hexdigest()[:24]}.json"


def documents_of(unit: Unit, settings: Settings) -> NDArray[Any]:
    """A DOCUMENT of each of a unit's documents."""
    return np.fromfile(settings.part(unit).with_suffix(".documents"), DOCUMENT)


def tokens_of(unit: Unit, settings: Settings) -> NDArray[Any]:
    """The tokens of all of a unit's documents, each ended by EOD."""
    return np.fromfile(settings.part(unit).with_suffix(".tokens"), token_dtype(tokenizer_of(settings).vocab_size))


def skipped_of(unit: Unit, settings: Settings) -> Skipped | None:
    """What was left out of the part of a unit; None if it has not been made."""
    path = settings.part(unit)
    return Skipped(**json.loads(path.read_text())) if path.exists() else None


def make_part(unit: Unit, settings: Settings) -> Skipped:
    """Encode a unit; returns what of it was left out."""
    tokenizer, skipped, path = tokenizer_of(settings), Skipped(), settings.part(unit)
    dtype = token_dtype(tokenizer.vocab_size)
    with path.with_suffix(".tokens").open("wb") as tokens, path.with_suffix(".documents").open("wb") as documents:
        for texts in batches(read(unit, settings.text_key, skipped), str):
            ids, sizes = tokenizer.encode_documents(texts)
            tokens.write(ids.astype(dtype).data)
            known = [(key_hash(t), size, len(t.encode())) for t, size in zip(texts, sizes.tolist(), strict=True)]
            documents.write(np.array(known, DOCUMENT).data)
        for file in (tokens, documents):
            file.flush()
            os.fsync(file.fileno())
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(skipped)))
    fsync(temporary)
    temporary.replace(path)
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
        # A part is whole or not there, so nothing is lost. Waiting for the end leaves no semaphore behind.
        for process in multiprocessing.active_children():
            if process not in others:
                process.kill()
        pool.shutdown(cancel_futures=True)


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Processes that are started meanwhile ignore the signals that a terminal or a scheduler sends to all of them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start() -> None:
    """In a new process: encode in one thread, and exit when the parent ends."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_with_parent(sentinel: int = parent.sentinel) -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


@lru_cache(maxsize=1)
def tokenizer_of(settings: Settings) -> JsonTokenizer:
    """The tokenizer of all parts, loaded once in each process."""
    return load_tokenizer(settings.tokenizer)
