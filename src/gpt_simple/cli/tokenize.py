"""Turn raw text into token shards, once: ``gpt-simple tokenize --input_dir RAW --output_dir DATA``."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import click

from gpt_simple._names import PROGRAM
from gpt_simple.cli.options import Number
from gpt_simple.cli.paths import PATH, UserPath
from gpt_simple.cli.terminal import echo, shown
from gpt_simple.data.cache import NotWritable
from gpt_simple.errors import ExitCode
from gpt_simple.hardware import cores
from gpt_simple.launch.signals import stop_on_signals

LINE_EVERY = 10.0
"""Seconds between two lines of progress where there is no terminal."""


@click.command()
@click.option("--input_dir", required=True, type=PATH, help="Text; sub-directories are buckets.")
@click.option("--output_dir", required=True, type=PATH, help="Where the dataset will be.")
@click.option(
    "--tokenizer",
    type=UserPath(),
    default="bpe",
    show_default=True,
    help="bpe (trained on the text), bytes, or a path.",
)
@click.option(
    "--tokenizer_path",
    type=UserPath(),
    metavar="PATH",
    help="A tokenizer.json or its directory; the same as --tokenizer.",
)
@click.option("--tokenizer_vocab_size", default=8192, show_default=True, type=click.IntRange(257), help="Ids of a bpe.")
@click.option("--end_token", metavar="TOKEN", help="The token of a tokenizer.json that ends a document.")
@click.option("--text_key", default="text", show_default=True, help="The key of the text in a JSON line.")
@click.option("--val_fraction", default=0.05, show_default=True, type=Number(0, 1, max_open=True), help="Held out.")
@click.option(
    "--max_length", type=click.IntRange(2), help="Say how many rows of this length there are; none is an error."
)
@click.option("--num_workers", default=cores, show_default="all cores", type=click.IntRange(1), help="Processes.")
@click.option(
    "--on_bad_document",
    default="skip",
    show_default=True,
    type=click.Choice(["error", "skip"]),
    help="What happens with documents that cannot be read; all are reported.",
)
@click.option("--strict", is_flag=True, help="Deprecated: the same as --on_bad_document error.")
def tokenize(tokenizer: str, tokenizer_path: str | None, on_bad_document: str, strict: bool, **options: Any) -> int:
    """Tokenize .txt .md .py .jsonl .jsonl.gz .jsonl.zst files into a dataset that a run reads as data.path.

    Documents are kept whole: each run chooses its data.max_length. The result does not depend on --num_workers. A
    signal ends the command with exit code 75: stopped and resumable. The same command continues, also after a kill.
    """
    if tokenizer_path is not None and tokenizer not in ("bpe", tokenizer_path):
        raise click.UsageError(f"two tokenizers were given: --tokenizer {tokenizer} and {tokenizer_path}")
    if strict:
        echo("--strict is deprecated: use --on_bad_document error", err=True)
    options["strict"] = strict or on_bad_document == "error"
    stop = _Stop()
    try:
        with stop_on_signals(stop.by, is_last=True), _progress() as (log, progress):
            from gpt_simple.data.bulk import Job, read_report, tokenize
            from gpt_simple.data.inspect import summary
            from gpt_simple.data.manifest import REPORT

            job = Job(tokenizer=tokenizer_path or tokenizer, **options)
            manifest = tokenize(job, log, progress)
    except (KeyboardInterrupt, OSError, NotWritable):
        if not stop.signal:
            raise
        with suppress(OSError):  # the terminal may be gone, and the bar that was on it
            echo(f"stopped: {stop.signal}; what is done is kept, the same command goes on", err=True)
        return int(ExitCode.STOPPED)
    echo("\n".join(summary(job.output_dir, manifest, job.max_length)))
    report = read_report(job.output_dir)
    skipped = f"skipped {report['skipped']:,} documents and {report['empty']:,} without text"
    echo(f"{skipped}: {job.output_dir / REPORT}")
    echo(f"train on it: {PROGRAM} run CONFIG --data.path {job.output_dir}")
    return int(ExitCode.COMPLETED)


class _Stop:
    """Unwinds at the first signal. Later ones, which schedulers send as well, must not interrupt the clean-up."""

    signal = ""

    def by(self, signal: str) -> None:
        if not self.signal:
            self.signal = signal
            raise KeyboardInterrupt


@contextmanager
def _progress() -> Iterator[tuple[Callable[[str], None], Callable[[int, int], None]]]:
    """How to show messages and progress: a bar on a terminal, lines elsewhere."""
    if not sys.stderr.isatty():
        yield lambda message: echo(message, err=True), _progress_lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("tokenizing", total=None)
        yield (
            lambda message: bar.console.print(shown(message), markup=False, highlight=False),
            lambda done, total: bar.update(task, completed=done, total=total),
        )


def _progress_lines() -> Callable[[int, int], None]:
    """Progress as lines, one in ``LINE_EVERY`` seconds and one at the end."""
    began = shown = 0.0
    first: int | None = None

    def show(done: int, total: int) -> None:
        nonlocal began, shown, first
        now = time.monotonic()
        if first is None:
            # What an earlier attempt has done says nothing about the speed of this one.
            first, began, shown = done, now, now
        if done < total and now - shown < LINE_EVERY:
            return
        shown = now
        rate = (done - first) / max(now - began, 1e-9)
        left = f"  {timedelta(seconds=math.ceil((total - done) / rate))} left" if rate and done < total else ""
        echo(f"{done / 1e6:,.1f} of {total / 1e6:,.1f} MB  {rate / 1e6:.1f} MB/s{left}", err=True)

    return show
