"""Kill -9 at random moments, in chains: the same command goes on until it completes, and its result is compared.

    python benchmarks/kills.py [--kills 100] [--seed 0]

Four kinds of chains: a run of one process and of two, both with background saving (``--kills`` together); the data
cache while a run builds it (a quarter as many); and ``tokenize`` with one or two workers (a
quarter as many). Of several processes the launcher dies, or one of the others, or all of them. Most kills of a run come
after its first step, one in eight at any moment since its start.

After each kill of a run the newest checkpoint has to be whole, and no older than the newest that the run had reported.
At the end of a chain the weights and the data have to be equal, to the byte, to those of a command that nobody killed.
The last line of the output is the result as JSON; the exit code is 1 if anything was lost or differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from attrs import frozen

import gpt_simple.job.train
from gpt_simple.checkpoint.store import Store
from gpt_simple.cli.main import main as gpt_simple_main

assert gpt_simple.job.train, "loaded here, so that a forked command has it"

MODEL = ["--model.n_embd=32", "--model.n_layer=1", "--model.n_head=2", "--model.dropout=0.1", "--data.max_length=32"]
TRAINING = [
    "--training.compile=false",
    "--training.eval_steps=100",
    "--training.max_eval_batches=4",
    "--progress=lines",
    "--training.gradient_accumulation_steps=1",
]
STORIES = ["--data.source=stories", "--data.tokenizer=bytes", "--data.max_documents=200"]
SAVING = ["--training.max_steps=200", "--training.save_steps=5", "--training.background_save=true"]
RAW = ["--data.path=raw", "--data.tokenizer_vocab_size=512", "--data.packing=best_fit", "--training.max_steps=2"]
RUN = ["run", *MODEL, *TRAINING, "--training.logging_steps=10"]
LOGGED = r"step=\d+ tokens"
SAVED = re.compile(r"checkpoint=\S*step-(\d+)")
TEXT_BYTES = 9_000_000
LONGEST = 180.0
WINDOW = 0.3
"""The share of an undisturbed command's time within which a kill comes."""

Count = dict[str, int]


def processes(root: int) -> list[int]:
    """A process and all that it started, directly or not."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has ended
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Command:
    """A command in a directory of its own. ``is_forked``: in a fork of this process, which has loaded torch."""

    def __init__(self, directory: Path, arguments: list[str], *, is_forked: bool) -> None:
        self.output, self.code = directory / "output.txt", None
        self.output.write_text("")
        self.pid = os.fork()
        if not self.pid:
            try:
                self._become(directory, arguments, is_forked)
            finally:
                os._exit(99)

    def _become(self, directory: Path, arguments: list[str], is_forked: bool) -> None:
        os.chdir(directory)
        os.environ["GPT_SIMPLE_CACHE"] = str(directory / "cache")
        file = os.open(self.output, os.O_WRONLY)
        os.dup2(file, 1)
        os.dup2(file, 2)
        if not is_forked:
            os.execv(sys.executable, [sys.executable, "-m", "gpt_simple", *arguments])
        try:
            gpt_simple_main(arguments)
        except SystemExit as leaving:
            sys.stdout.flush()
            os._exit(int(leaving.code or 0))
        except BaseException:
            sys.excepthook(*sys.exc_info())

    code: int | None

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def ends_within(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                return False
            else:
                time.sleep(0.005)
        return True

    def waits_for(self, pattern: str) -> bool:
        """Wait until the output has ``pattern``. False if the command ends before."""
        deadline = time.monotonic() + LONGEST
        while time.monotonic() < deadline:
            ended = self.ends_within(0)
            if re.search(pattern, self.text()):
                return True
            if ended:
                return False
            time.sleep(0.02)
        raise TimeoutError(f"no {pattern!r} in {self.text()}")

    def kill(self, dice: random.Random) -> None:
        """Kill the command, or one process that it started, or all; wait until all have ended."""
        everyone = processes(self.pid)
        chosen = dice.choice(["first", "other", "all"])
        victims = everyone if chosen == "all" else everyone[:1] if chosen == "first" else [dice.choice(everyone)]
        for victim in victims:
            with suppress(ProcessLookupError):  # it has ended by itself
                os.kill(victim, signal.SIGKILL)
        deadline = time.monotonic() + LONGEST
        while not self.ends_within(0) or any(map(is_alive, everyone)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"processes of a killed command are alive: {self.text()}")
            time.sleep(0.02)


def tree(root: Path, *patterns: str) -> str:
    """A hash of the names and contents of files, without the stamps of verified files, which hold times."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in patterns for path in root.glob(pattern) if path.is_file()):
        if not path.name.startswith((".", "verified-")):
            digest.update(f"{path.relative_to(root)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def weights(directory: Path) -> str:
    return tree(directory, "out/checkpoints/step-00000200/*.safetensors")


def prepared(directory: Path) -> str:
    return tree(directory, "cache/datasets/*/**/*", "out/checkpoints/step-00000002/*.safetensors")


def dataset(directory: Path) -> str:
    return tree(directory, "data/**/*")


@frozen
class Kind:
    """Commands that give the same result, however often they are killed."""

    name: str
    commands: list[list[str]]
    kills: int
    result: Callable[[Path], str]
    begins: str = ""
    """What the output has when the part to be killed begins."""
    raw: Path | None = None
    is_forked: bool = False

    def measure(self, dice: random.Random, root: Path) -> Count:
        """Start chains until there are enough kills."""
        whole = self._start(self._directory(root, "whole"), self.commands[0])
        began = time.monotonic()
        if self.begins and whole.waits_for(self.begins):
            began = time.monotonic()
        if not whole.ends_within(LONGEST) or whole.code:
            raise RuntimeError(whole.text())
        seconds, wanted = time.monotonic() - began, self.result(whole.output.parent)
        count = {"kills": 0, "chains": 0, "lost": 0, "different": 0, "refused": 0}
        while count["kills"] < self.kills:
            directory = self._directory(root, f"chain-{count['chains']}")
            if self._chain(directory, seconds, dice, count):
                count["different"] += self.result(directory) != wanted
            else:
                count["refused"] += 1
            count["chains"] += 1
            shutil.rmtree(directory)
            print(self.name, count, file=sys.stderr, flush=True)
        return count

    def _directory(self, root: Path, name: str) -> Path:
        directory = root / self.name.replace(" ", "-") / name
        directory.mkdir(parents=True)
        if self.raw is not None:
            (directory / "raw").symlink_to(self.raw)
        return directory

    def _start(self, directory: Path, command: list[str]) -> Command:
        return Command(directory, command, is_forked=self.is_forked)

    def _chain(self, directory: Path, seconds: float, dice: random.Random, count: Count) -> bool:
        """Start and kill commands until one completes. False if one failed."""
        reached = 0
        while True:
            command = self._start(directory, dice.choice(self.commands))
            begun = dice.random() < 1 / 8 or not self.begins or command.waits_for(self.begins)
            limit = dice.uniform(0, WINDOW * seconds) if count["kills"] < self.kills else LONGEST
            if not begun or command.ends_within(limit):
                if not command.ends_within(LONGEST) or command.code:
                    print(command.code, command.text(), file=sys.stderr)
                return command.code == 0
            command.kill(dice)
            count["kills"] += 1
            reached = max([reached, *(int(step) for step in SAVED.findall(command.text()))])
            if (checkpoints := directory / "out/checkpoints").exists():
                newest, damaged = Store(checkpoints).newest_valid()
                if damaged or reached > (newest.step if newest else 0):
                    print(f"lost: {damaged} {reached} {newest}", file=sys.stderr)
                    count["lost"] += 1


def write_text(directory: Path) -> None:
    """Python's own modules: half of them as JSON lines in one file."""
    directory.mkdir()
    size = 0
    with (directory / "all.jsonl").open("w") as lines:
        for number, path in enumerate(sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))):
            try:
                text = path.read_text()
            except ValueError:
                continue  # tests of encodings
            if number % 2:
                lines.write(json.dumps({"text": text}) + "\n")
            else:
                (directory / f"{number:05}.py").write_text(text)
            size += len(text)
            if size > TEXT_BYTES:
                return


def all_kinds(kills: int, raw: Path) -> Iterator[Kind]:
    out = "--training.output_dir=out"
    run, two = [*RUN, *STORIES, *SAVING, out], "--nproc_per_node=2"
    yield Kind("runs of 1 process", [run], kills - kills * 2 // 5, weights, LOGGED, is_forked=True)
    yield Kind("runs of 2 processes", [[*run, two]], kills * 2 // 5, weights, LOGGED)
    yield Kind("the data cache", [[*RUN, *RAW, out]], kills // 4, prepared, "preparing", raw, is_forked=True)
    tokenize = ["tokenize", "--input_dir=raw", "--output_dir=data", "--tokenizer_vocab_size=512", "--num_workers"]
    yield Kind("tokenize", [[*tokenize, "1"], [*tokenize, "2"]], kills // 4, dataset, "", raw)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="a part of the name of a kind")
    arguments = parser.parse_args()
    dice, report = random.Random(arguments.seed), {}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_text(root / "text")
        for kind in all_kinds(arguments.kills, root / "text"):
            if arguments.only in kind.name:
                report[kind.name] = kind.measure(dice, root)
    print(json.dumps(report))
    return int(any(count[bad] for count in report.values() for bad in ("lost", "different", "refused")))


if __name__ == "__main__":
    sys.exit(main())
