"""``gpt-simple tokenize``: the same dataset whatever the number of processes and however often it is killed."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from attrs import evolve
from backports import zstd

from gpt_simple.config.schema import Config
from gpt_simple.data import bulk, parts
from gpt_simple.data.bulk import Job
from gpt_simple.data.manifest import Manifest
from gpt_simple.data.prepare import prepare
from gpt_simple.data.sources.stories import Stories
from gpt_simple.errors import DataError, ExitCode
from gpt_simple.hooks.components import builtin_registry
from tests.conftest import Shell

TEXTS = [document.text for document in Stories(3, 400).documents()]


def json_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Two buckets and a file beside them, in every format."""
    root = tmp_path / "raw"
    for bucket in ("web", "books/deep"):
        (root / bucket).mkdir(parents=True)
    (root / "web/a.jsonl").write_bytes(json_lines(TEXTS[:200]))
    (root / "web/b.jsonl.gz").write_bytes(gzip.compress(json_lines(TEXTS[200:300])))
    (root / "books/deep/c.jsonl.zst").write_bytes(zstd.compress(json_lines(TEXTS[300:390])))
    (root / "books/d.md").write_text(TEXTS[390])
    (root / "e.txt").write_text(TEXTS[391])
    return root


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "UNIT_BYTES", 5000)


@pytest.fixture
def run(raw: Path, tmp_path: Path) -> Callable[..., tuple[Manifest, list[str]]]:
    def run(output: str = "out", **options: object) -> tuple[Manifest, list[str]]:
        said: list[str] = []
        job = evolve(Job(raw, tmp_path / output, tokenizer="bytes", val_fraction=0.1), **options)
        return bulk.tokenize(job, said.append, lambda done, total: None), said

    return run


Run = Callable[..., tuple[Manifest, list[str]]]


def content(directory: Path) -> dict[str, str]:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(f.relative_to(directory)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def _documents(tokens: np.ndarray) -> Iterator[np.ndarray]:
    ends = np.flatnonzero(tokens == 0)
    for begin, end in zip(ends[:-1] + 1, ends[1:], strict=True):
        yield tokens[begin:end]


def test_buckets_keep_the_order_of_files_and_splits_are_disjoint(run: Run, tmp_path: Path) -> None:
    manifest, _ = run()
    assert sorted(manifest.splits["train"].buckets) == ["all", "books", "web"]
    out = tmp_path / "out"
    tokenizer = prepare(_config(out), builtin_registry()).tokenizer
    assert tokenizer.encode("a")[0] != 0
    byte_of = {tokenizer.encode(chr(c))[0]: c for c in range(128)}
    found: dict[str, list[str]] = {}
    for split, record in manifest.splits.items():
        for bucket in record.buckets:
            tokens = np.fromfile(out / split / bucket / "shard-00000.bin", "<u2")
            found.setdefault(bucket, []).extend("".join(chr(byte_of[i]) for i in ids) for ids in _documents(tokens))
            if split == "train":
                wanted = {"web": TEXTS[:300], "books": [TEXTS[390], *TEXTS[300:390]], "all": [TEXTS[391]]}[bucket]
                assert found[bucket] == [text for text in wanted if text in set(found[bucket])]
    assert {bucket: sorted(texts) for bucket, texts in found.items()} == {
        "web": sorted(TEXTS[:300]),
        "books": sorted(TEXTS[300:391]),
        "all": [TEXTS[391]],
    }
    assert 10 < manifest.splits["val"].documents < 80
    assert manifest.splits["train"].bytes + manifest.splits["val"].bytes == sum(len(t.encode()) for t in TEXTS[:392])  # type: ignore[operator]


def _config(directory: Path) -> Config:
    config = Config()
    return evolve(config, data=evolve(config.data, path=str(directory), max_length=16))


def test_the_bytes_do_not_depend_on_processes_or_units(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("one")
    run("many", num_workers=2)
    monkeypatch.setattr(parts, "UNIT_BYTES", 1 << 30)
    run("whole")
    one = content(tmp_path / "one")
    assert one.pop("tokenize.json")
    for other in ("many", "whole"):
        assert {name: digest for name, digest in content(tmp_path / other).items() if name != "tokenize.json"} == one


def test_a_trained_tokenizer_is_the_same_too(run: Run, tmp_path: Path) -> None:
    for output in ("one", "two"):
        manifest, _ = run(output, tokenizer="bpe", tokenizer_vocab_size=400)
        assert manifest.vocab_size == 400
    assert content(tmp_path / "one") == content(tmp_path / "two")
    config = _config(tmp_path / "one")
    assert prepare(config, builtin_registry()).tokenizer.vocab_size == 400
    with pytest.raises(DataError, match=r'"bytes" has 257 ids, but .*/one was made with .*, which has 400'):
        prepare(evolve(config, data=evolve(config.data, tokenizer="bytes")), builtin_registry())


def test_finished_parts_are_reused_and_changed_ones_redone(
    run: Run, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    original = parts.make_part

    def dying(unit: parts.Unit, settings: parts.Settings) -> parts.Skipped:
        if len(made) == 4:
            raise KeyboardInterrupt
        made.append(settings.part(unit).name)
        return original(unit, settings)

    monkeypatch.setattr(parts, "make_part", dying)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert not (tmp_path / "out/dataset.json").exists()
    first, made[:] = list(made), []
    (raw / "e.txt").write_text("another text")
    monkeypatch.setattr(
        parts, "make_part", lambda unit, settings: (made.append(settings.part(unit).name), original(unit, settings))[1]
    )
    run()
    assert not set(first) & set(made)
    resumed, made[:] = len(made), []
    run("fresh")
    # One of the four was of the file that changed.
    assert resumed == len(made) - 3
    assert content(tmp_path / "out") == content(tmp_path / "fresh")
    assert not (tmp_path / "out/.work").exists()


def test_the_command_resumes_after_sigkill(raw: Path, tmp_path: Path) -> None:
    (raw / "web/a.jsonl").write_bytes(json_lines(TEXTS[:200]) * 20)
    program = (
        "import sys; from pathlib import Path; from gpt_simple.data import bulk, parts; parts.UNIT_BYTES = 5000\n"
        "if __name__ == '__main__':\n"
        " raw, out, workers = sys.argv[1:]\n"
        " bulk.tokenize(bulk.Job(Path(raw), Path(out), tokenizer='bytes', num_workers=int(workers)), print, print)\n"
    )
    script = tmp_path / "script.py"
    script.write_text(program)
    arguments = [sys.executable, str(script), str(raw)]
    process = subprocess.Popen([*arguments, str(tmp_path / "out"), "2"], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out").glob(".work/parts/*.json")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not (tmp_path / "out/dataset.json").exists()
    for output in ("out", "fresh"):
        subprocess.run([*arguments, str(tmp_path / output), "1"], check=True, stdout=subprocess.DEVNULL)
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_of_its_processes_ends_it_with_one_line(number: signal.Signals, tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    (raw / "a.jsonl").write_bytes(json_lines(TEXTS[:200]) * 300)
    command = [sys.executable, "-m", "gpt_simple", "tokenize", "--tokenizer", "bytes", "--num_workers", "2"]
    arguments = [*command, "--input_dir", str(raw), "--output_dir", str(out)]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(out.glob(".work/parts/*")) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == ExitCode.STOPPED
    assert error == f"stopped: {number.name}; what is done is kept, the same command goes on\n"


@pytest.mark.parametrize("step", range(6))
def test_the_command_resumes_after_a_kill_while_publishing(
    step: int, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, left = Path.rename, [step]

    def rename(self: Path, target: Path) -> Path:
        if self.parent.name == "build":
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
        return original(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    if step < 5:
        with pytest.raises(KeyboardInterrupt):
            run()
        assert not (tmp_path / "out/dataset.json").exists()
        left[0] = 99
    run()
    assert (tmp_path / "out/dataset.json").exists()
    prepare(_config(tmp_path / "out"), builtin_registry())


def test_bad_documents_are_skipped_counted_and_named(run: Run, raw: Path, tmp_path: Path) -> None:
    good = json_lines(TEXTS[:100])
    (raw / "web/a.jsonl").write_bytes(good + b'{"text": "\xff"}\n[1]\n\n{"text": ""}\n{"txt": 1}\nnot json\n' + good)
    (raw / "web/b.jsonl.gz").write_bytes(gzip.compress(good)[:-20])
    (raw / "books/deep/c.jsonl.zst").write_bytes(b"no frame")
    (raw / "books/d.md").write_bytes(b"ab\xff")
    for name in ("e.txt", "books/f.jsonl", "web/g.jsonl.zst"):
        (raw / name).write_bytes(b"")
    _, said = run()
    report = json.loads((tmp_path / "out/tokenize.json").read_text())
    assert (report["skipped"], report["empty"]) == (7, 4)
    empty = [line.split("raw/")[1] for line in report["without_text"]]
    assert empty == [f"{name}: no text" for name in ("e.txt", "books/f.jsonl", "web/a.jsonl:104", "web/g.jsonl.zst")]
    places = [error.split("raw/")[1].split(": ")[0] for error in report["errors"]]
    lines = [f"web/a.jsonl:{number}" for number in (101, 102, 105, 106)]
    assert sorted(places) == sorted(["books/d.md", "books/deep/c.jsonl.zst", *lines, "web/b.jsonl.gz"])
    assert sum("skipped" in line for line in said) == 11
    assert "data." not in "".join(report["errors"])
    assert any("the text under 'text' (--text_key), found the keys txt" in line for line in said)


@pytest.mark.parametrize(("bad", "more"), [(bulk.SHOWN, 0), (bulk.SHOWN + 1, 1), (3 * bulk.SHOWN, 1)])
def test_skipped_documents_beyond_the_limit_are_mentioned_once(
    run: Run, raw: Path, tmp_path: Path, bad: int, more: int
) -> None:
    # Several units of work, each with fewer than are logged in all.
    (raw / "web/z.jsonl").write_bytes((b"not json, " + b"x" * 500 + b"\n") * bad)
    _, said = run()
    assert sum(line.startswith("skipped ") for line in said) == bulk.SHOWN
    mentions = [line for line in said if line.startswith("more documents are skipped")]
    assert [f"{tmp_path / 'out/tokenize.json'} will count" in line for line in mentions] == [True] * more


def _nothing(path: Path) -> None:
    path.write_bytes(b"")


def _half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _another_value(path: Path) -> None:
    path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()[:1]) + path.read_bytes()[1:])


def _another_type(path: Path) -> None:
    path.write_bytes(b"[]")


def _deep_nesting(path: Path) -> None:
    path.write_bytes(b"[" * 100_000)


def _a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [_nothing, _half, _another_value, _another_type, _deep_nesting, _a_directory])
@pytest.mark.parametrize("name", ["parts/*.json", "parts/*.tokens", "parts/*.documents", "tokenizer-*/tokenizer.json"])
def test_unfinished_work_that_is_damaged_is_done_again(
    name: str, damage: Callable[[Path], None], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("whole")

    def stopped(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(bulk, "_assemble", stopped)
        with pytest.raises(KeyboardInterrupt):
            run()
    damage(next((tmp_path / "out/.work").glob(name)))
    run()
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_strict_stops_at_a_bad_document_also_when_resumed(run: Run, raw: Path) -> None:
    (raw / "web/a.jsonl").write_bytes(json_lines(TEXTS[:3]) + b"{\n")
    for _ in range(2):
        with pytest.raises(DataError, match=r"a\.jsonl:4: not JSON"):
            run(strict=True)


def test_strict_refuses_what_was_finished_without_it(run: Run, raw: Path) -> None:
    (raw / "web/a.jsonl").write_bytes(json_lines(TEXTS[:3]) + b"{\n")
    run()
    with pytest.raises(
        DataError, match=r"finished without --strict, 1 documents were skipped; the first: .*jsonl:4: not"
    ):
        run(strict=True)
    (raw / "web/a.jsonl").write_bytes(json_lines(TEXTS[:3]))
    run("good")
    run("good", strict=True)


def test_hidden_files_and_directories_are_no_data(run: Run, raw: Path) -> None:
    for name in (".git/notes.txt", "web/.cache/a.jsonl", ".hidden.txt"):
        (raw / name).parent.mkdir(exist_ok=True)
        (raw / name).write_text("no data")
    manifest, said = run()
    assert sorted(manifest.splits["train"].buckets) == ["all", "books", "web"]
    assert not said


def test_when_nothing_can_be_read_it_says_why(run: Run, raw: Path) -> None:
    for text in ("books/d.md", "e.txt"):
        (raw / text).unlink()
    with pytest.raises(DataError, match=r"no document could be read, \d+ were skipped; the first: .*'body'"):
        run(text_key="body")


def test_the_end_of_a_single_document_is_held_out(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/input.txt").write_text("abcdefghij" * 10)
    job = Job(tmp_path / "raw", tmp_path / "out", tokenizer="bytes", val_fraction=0.1)
    manifest = bulk.tokenize(job, print, lambda done, total: None)
    assert [(s.documents, s.tokens, s.bytes) for s in manifest.splits.values()] == [(1, 91, 90), (1, 11, 10)]


def test_files_that_change_while_they_are_read_make_no_dataset(
    run: Run, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = parts.make_part

    def meanwhile(unit: parts.Unit, settings: parts.Settings) -> parts.Skipped:
        found = original(unit, settings)
        if unit.bucket == "books":
            (raw / "books/d.md").write_text("a new text")
        return found

    monkeypatch.setattr(parts, "make_part", meanwhile)
    with pytest.raises(DataError, match="have changed while they were read; run the command again"):
        run()
    monkeypatch.setattr(parts, "make_part", original)
    run()
    run("fresh")
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


def test_a_dataset_that_is_not_finished_is_named_so(tmp_path: Path, shell: Shell) -> None:
    (tmp_path / "out/.work/parts").mkdir(parents=True)
    with pytest.raises(DataError, match="out: is not finished; run the `gpt-simple tokenize`"):
        prepare(_config(tmp_path / "out"), builtin_registry())
    seen = shell("data", "inspect", "out")
    assert (seen.code, "is not finished" in seen.err) == (3, True)


def test_inspect_finds_ids_beyond_the_vocabulary(run: Run, tmp_path: Path, shell: Shell) -> None:
    run()
    path, manifest = tmp_path / "out/train/web/shard-00000.bin", tmp_path / "out/dataset.json"
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    tokens = np.fromfile(path, "<u2")
    tokens[777] = 4000
    tokens.tofile(path)
    manifest.write_text(manifest.read_text().replace(before, hashlib.sha256(path.read_bytes()).hexdigest()))
    seen = shell("data", "inspect", "out")
    assert (seen.code, "token 4000 at position 777 is beyond the vocabulary of 257" in seen.err) == (3, True)


def test_a_finished_dataset_is_reused_or_refused(run: Run, raw: Path) -> None:
    manifest, _ = run()
    again, said = run()
    assert again == manifest
    assert said == [said[0]]
    assert "finished already" in said[0]
    with pytest.raises(DataError, match="finished dataset of other files or other options"):
        run(val_fraction=0.3)
    (raw / "e.txt").write_text("changed")
    with pytest.raises(DataError, match="finished dataset of other files or other options"):
        run()


@pytest.mark.parametrize("mine", ["notes.txt", ".work/notes.txt", ".work", "dataset.json", "link"])
def test_an_output_of_something_else_stays_as_it_is(run: Run, tmp_path: Path, mine: str) -> None:
    """Also with directories in it that have the names of a dataset's."""
    output = tmp_path / "out"
    for name in ("train/all/mine.bin", "elsewhere/mine"):
        (output / name).parent.mkdir(parents=True)
        (output / name).touch()
    (output / mine).parent.mkdir(exist_ok=True)
    if mine == "link":
        (output / ".work").symlink_to(output / "elsewhere")
    else:
        (output / mine).touch()
    before = sorted(output.rglob("*"))
    with pytest.raises(DataError, match=r"holds other files|not JSON"):
        run()
    assert sorted(output.rglob("*")) == before


def test_bad_options_create_nothing(raw: Path, tmp_path: Path, shell: Shell) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes").write_text("x")
    (tmp_path / "nothing").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for code, words, arguments in (
        (3, "no such directory", ("--input_dir", "missing", "--output_dir", "out")),
        (3, "--input_dir nothing: the directory holds none of", ("--input_dir", "nothing", "--output_dir", "out")),
        (3, "there is no", ("--input_dir", "raw", "--output_dir", "out", "--tokenizer", "gpt3")),
        (3, "holds other files", ("--input_dir", "raw", "--output_dir", "full")),
        (
            2,
            "two tokenizers",
            ("--input_dir", "raw", "--output_dir", "o", "--tokenizer", "bytes", "--tokenizer_path", "x"),
        ),
        (2, "--output_dir", ("--input_dir", "raw")),
    ):
        ended = shell("tokenize", *arguments)
        assert (ended.code, words in ended.err) == (code, True), ended.err
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_and_inspect_tell_what_there_is(raw: Path, shell: Shell, tmp_path: Path) -> None:
    options = ("--input_dir", "raw", "--output_dir", "out", "--num_workers", "1")
    ended = shell("tokenize", *options, "--tokenizer_vocab_size", "300", "--max_length", "64")
    assert ended.code == 0, ended.err
    assert "web: " in ended.out
    assert "rows of 64" in ended.out
    assert "skipped 0 documents" in ended.out
    seen = shell("data", "inspect", "out", "--sample", "20")
    assert seen.code == 0
    assert "checksums: all" in seen.out
    assert "longest" in seen.out
    assert seen.out.rstrip().splitlines()[-1] in TEXTS[391]
    shard = next((tmp_path / "out/train/web").glob("*.bin"))
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    damaged = shell("data", "inspect", "out")
    assert (damaged.code, "its content is not what was prepared" in damaged.err) == (3, True)


def test_a_split_without_a_row_is_refused_before_publishing(run: Run, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the val split is shorter than one row: .*10,000; raise --val_fraction"):
        run(max_length=10_000, val_fraction=1e-9)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".work"]
    run(max_length=10_000, val_fraction=0)
    with pytest.raises(DataError, match=r"the train split is shorter than one row: .*; lower --val_fraction"):
        run(max_length=10_000_000, val_fraction=0)
