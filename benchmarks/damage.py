"""Damage every file of a run, of the cache and of a ``tokenize`` output, and try every command on it.

    python benchmarks/damage.py [--only FILE|DAMAGE] [--command COMMAND] [--processes 1|2] [--every N]

Each combination of a file, a damage (empty, half, ``[]``, deep nesting, a directory in its place, random bytes,
unreadable) and a command starts from an undamaged copy. A command has to end with exit code 0, 2, 3 or 4 and without a
traceback. Where ``run`` ends with 0, its weights have to equal, to the byte, those of a run on undamaged files.
``--every N`` tries every N-th combination. The last line of the output is the result as JSON; the exit code is 1 if
anything failed.

Commands are forked from this process, which has loaded torch. With ``--processes 2`` there is only ``run``, started as
users start it.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import os
import pkgutil
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import gpt_simple
from gpt_simple.cli.main import main as gpt_simple_main

for module in pkgutil.walk_packages(gpt_simple.__path__, "gpt_simple."):
    if not module.name.startswith(("gpt_simple.testing", "gpt_simple.__main__", "gpt_simple.hooks.answers")):
        importlib.import_module(module.name)  # here, so that a forked command has it

CONFIG = """\
model = {n_embd = 32, n_layer = 1, n_head = 2}
optimizer = {warmup_steps = 1, schedule = "constant"}
[data]
path = "PATH"
max_length = 32
packing = "best_fit"
PREPARED
[training]
per_device_batch_size = 2
gradient_accumulation_steps = 1
max_steps = 4
compile = false
gradient_checkpointing = false
logging_steps = 2
eval_steps = 4
save_steps = 2
output_dir = "OUT"
"""
TOKENIZE = ["tokenize", "--input_dir=raw", "--output_dir=data", "--tokenizer=bytes", "--num_workers=1"]
FURTHER = "--training.max_steps=5"
DAC = 0b110
"""The capabilities by which root reads what its permissions forbid."""


def _replaced_by_a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "list": lambda path: path.write_bytes(b"[]"),
    "deep": lambda path: path.write_bytes(b'{"a":' * 100_000),
    "directory": _replaced_by_a_directory,
    "random": lambda path: path.write_bytes(random.Random(0).randbytes(path.stat().st_size)),
    "unreadable": lambda path: path.chmod(0),
}


def drop_override() -> None:
    """From now on permissions hold for this process, also if it is root's."""
    libc, header, sets = (
        ctypes.CDLL(None, use_errno=True),
        (ctypes.c_uint32 * 2)(0x20080522, 0),
        (ctypes.c_uint32 * 6)(),
    )
    if libc.capget(header, sets):
        raise OSError(ctypes.get_errno(), "capget")
    sets[0] &= ~DAC
    sets[1] &= ~DAC
    if libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")


def forked(directory: Path, arguments: Sequence[str]) -> tuple[int, str]:
    """The exit code and the output of a command."""
    output = directory.parent / "output.txt"
    child = os.fork()
    if not child:
        code = 99
        try:
            os.chdir(directory)
            os.environ["GPT_SIMPLE_CACHE"] = str(directory / "cache")
            file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            drop_override()
            gpt_simple_main(list(arguments))
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), output.read_text(errors="replace")


def launched(directory: Path, arguments: Sequence[str]) -> tuple[int, str]:
    """The same with two processes."""
    caps = "-dac_override,-dac_read_search"
    dropped = ["setpriv", f"--bounding-set={caps}", f"--inh-caps={caps}"]
    done = subprocess.run(
        [*dropped, sys.executable, "-m", "gpt_simple", *arguments, "--nproc_per_node=2"],
        cwd=directory,
        env=os.environ | {"GPT_SIMPLE_CACHE": str(directory / "cache")},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


def make_whole(directory: Path, execute: Callable[[Path, Sequence[str]], tuple[int, str]]) -> None:
    """Text, two finished runs (one on the cache, one on a data set), and the data set."""
    (directory / "raw").mkdir(parents=True)
    (directory / "raw/a.txt").write_text("once upon a time there was a small house. " * 40)
    (directory / "raw/b.txt").write_text("and it stood there until the end of the story. " * 40)
    for name, path, prepared in (("cached", "raw", 'tokenizer = "bytes"\nval_fraction = 0.5'), ("shards", "data", "")):
        text = CONFIG.replace("PATH", path).replace("PREPARED", prepared).replace("OUT", f"of-{name}")
        (directory / f"{name}.toml").write_text(text)
    for command in (TOKENIZE, ["run", "cached.toml"], ["run", "shards.toml"]):
        code, output = (forked if command == TOKENIZE else execute)(directory, command)
        if code:
            raise RuntimeError(output)


def commands_on(name: str, dataset: str) -> list[list[str]]:
    out = f"of-{name}"
    return [
        ["run", f"{name}.toml", FURTHER],
        ["run", out, FURTHER],
        ["status", out],
        ["report", out],
        ["sample", out, "--tokens=2"],
        ["validate", f"{name}.toml", FURTHER],
        ["stop", out],
        ["data", "inspect", dataset],
    ]


def weights(directory: Path, name: str) -> bytes:
    return (directory / f"of-{name}/checkpoints/step-00000005/model.safetensors").read_bytes()


def combinations(whole: Path) -> list[tuple[str, str, str, list[str]]]:
    """Configuration, file, damage and command."""
    (cached,) = (path for path in (whole / "cache/datasets").iterdir() if path.name[0] != ".")
    found = []
    for place in ("of-cached", "cache", "data"):
        name, dataset = ("shards", "data") if place == "data" else ("cached", str(cached.relative_to(whole)))
        commands = commands_on(name, dataset) + ([TOKENIZE] if place == "data" else [])
        for path in sorted(path for path in (whole / place).rglob("*") if path.is_file()):
            for damage in DAMAGES:
                found += [(name, str(path.relative_to(whole)), damage, command) for command in commands]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a part of the name of a file, or the name of a damage")
    parser.add_argument("--command", default="", help="the beginning of a command")
    parser.add_argument("--processes", type=int, choices=[1, 2], default=1)
    parser.add_argument("--every", type=int, default=1)
    arguments = parser.parse_args()
    execute = forked if arguments.processes == 1 else launched
    codes: Counter[str] = Counter()
    failures, equal = 0, 0
    with tempfile.TemporaryDirectory() as temporary:
        whole, trial = Path(temporary) / "whole", Path(temporary) / "trial"
        make_whole(whole, execute)
        wanted = {}
        for name in ("cached", "shards"):
            shutil.copytree(whole, trial)
            execute(trial, ["run", f"{name}.toml", FURTHER])
            wanted[name] = weights(trial, name)
            shutil.rmtree(trial)
        tried = [each for each in combinations(whole) if arguments.only in each[1] or arguments.only == each[2]]
        tried = [each for each in tried if " ".join(each[3]).startswith(arguments.command)]
        tried = [each for each in tried if arguments.processes == 1 or each[3][:2] == ["run", f"{each[0]}.toml"]]
        tried = tried[:: arguments.every]
        for name, file, damage, command in tried:
            shutil.copytree(whole, trial)
            DAMAGES[damage](trial / file)
            code, output = execute(trial, command)
            codes[str(code)] += 1
            wrong = "traceback" if "Traceback" in output else "code" if code not in (0, 2, 3, 4) else ""
            if code == 0 and command[0] == "run" and not wrong:
                same = weights(trial, name) == wanted[name]
                equal += same
                wrong = "" if same else "weights"
            if wrong:
                failures += 1
                print(f"{wrong}: {' '.join(command)} with {file} {damage}: {code}\n{output[-1500:]}", file=sys.stderr)
            shutil.rmtree(trial)
    print(json.dumps({"combinations": len(tried), "codes": codes, "equal": equal, "failures": failures}))
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
