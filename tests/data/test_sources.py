"""Raw text: what is read, in which order, and how bad input is named."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from gpt_simple.config.schema import DataConfig
from gpt_simple.data.sources import files, python_stdlib, shards
from gpt_simple.data.sources.files import build
from gpt_simple.errors import DataError, ExitCode
from tests.conftest import Shell


def texts(path: Path | tuple[str, ...], **data: Any) -> list[str]:
    named = path if isinstance(path, tuple) else str(path)
    return [document.text for document in files.build(DataConfig(path=named, **data), 0).documents()]


def lines(*records: Any) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def test_a_directory_is_walked_in_sorted_order_by_suffix(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("b/a.txt", "a.md", "z.py", "c.bin", "b/b.rst"):
        (tmp_path / name).write_text(name)
    (tmp_path / "k.jsonl").write_bytes(lines({"text": "one"}, {"text": "two", "n": 1}))
    (tmp_path / "m.jsonl.gz").write_bytes(gzip.compress(lines({"text": "three"}) + b"\n"))
    assert texts(tmp_path) == ["a.md", "b/a.txt", "one", "two", "three", "z.py"]
    assert texts(tmp_path, format="text") == ["a.md", "b/a.txt", "z.py"]
    assert texts(tmp_path, format="jsonl") == ["one", "two", "three"]


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    for name in ("elsewhere/deep/a.txt", "here/b.txt"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "here/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "here/file.txt").symlink_to(tmp_path / "here/b.txt")
    (tmp_path / "elsewhere/deep/up").symlink_to(tmp_path / "here")
    (tmp_path / "here/self").symlink_to(".")
    assert texts(tmp_path / "here") == ["here/b.txt", "here/b.txt", "elsewhere/deep/a.txt"]


def test_what_cannot_be_listed_is_an_error_and_never_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "closed").mkdir()
    list_directory = Path.iterdir

    def iterdir(self: Path) -> Iterator[Path]:
        if self.name == "closed":
            raise PermissionError(13, "Permission denied", str(self))
        return list_directory(self)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", iterdir)
        with pytest.raises(DataError, match=r"closed: cannot be read \(.*Permission denied"):
            texts(tmp_path)
        with pytest.raises(DataError, match=r"closed: cannot be read \(.*Permission denied"):
            texts(tmp_path / "closed", on_bad_document="skip")
    (tmp_path / "web").symlink_to("nowhere")
    with pytest.raises(DataError, match="web: links to nowhere, which does not exist"):
        texts(tmp_path)


def _closed(path: Path) -> None:
    path.mkdir()
    (path / "b.txt").write_text("b")


LOST: dict[str, Callable[[Path], object]] = {
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link with a name that is too long": lambda path: path.symlink_to("x" * 300),
    "a directory that cannot be listed": _closed,
    "a broken archive": lambda path: path.with_suffix(".jsonl.gz").write_bytes(b"no archive"),
}


@pytest.mark.parametrize("lost", LOST)
def test_what_cannot_be_listed_is_one_more_bad_document(
    here: Path, shell: Shell, lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command that reads raw text reports it with all others, or leaves it out and counts it."""
    (here / "raw").mkdir()
    (here / "raw/bad.txt").write_bytes(b"\xff")
    for index in range(40):
        (here / f"raw/{index}.txt").write_text(f"some words {index} " * 50)
    before = build(DataConfig(path="raw"), 0).fingerprint()
    LOST[lost](here / "raw/lost")
    list_directory = Path.iterdir

    def iterdir(self: Path) -> Iterator[Path]:
        if self.name == "lost":
            raise PermissionError(13, "Permission denied", str(self))
        return list_directory(self)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    monkeypatch.setenv("GPT_SIMPLE_CACHE", str(here / "cache"))
    assert build(DataConfig(path="raw"), 0).fingerprint() != before, "the cache would hide it"
    data = ("config.toml", "--data.source=null", "--data.path=raw")
    for command, option in (
        (("validate", *data), "--data.on_bad_document"),
        (("run", *data), "--data.on_bad_document"),
        (("run", *data, "--nproc_per_node=2"), "--data.on_bad_document"),
        (("tokenize", "--input_dir=raw", "--output_dir=set", "--tokenizer=bytes"), "--on_bad_document"),
    ):
        ended = shell(*command, f"{option}=error")
        said = " ".join((ended.out + ended.err).split())
        assert (ended.code, "Traceback" in said) == (3, False), said
        assert "raw/lost" in said, (command, said)
        assert "raw/bad.txt" in said, (command, said)
        if "--nproc_per_node=2" not in command:
            ended = shell(*command, f"{option}=skip")
            assert (ended.code, "kipped 2 documents" in " ".join((ended.out + ended.err).split())) == (0, True)


def test_a_list_of_paths_keeps_its_order(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    assert texts((str(tmp_path / "b.txt"), str(tmp_path / "a.txt"))) == ["b", "a"]


def test_format_says_what_a_file_of_any_name_holds(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(lines({"body": "x"}))
    assert texts(tmp_path / "data", format="jsonl", text_key="body") == ["x"]
    assert texts(tmp_path / "data", format="text") == ['{"body": "x"}\n']
    with pytest.raises(DataError, match=r"expected one of .*data\.format"):
        texts(tmp_path / "data")


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert texts(tmp_path) == ["hello"]


def test_the_fingerprint_is_of_content(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one")
    source = files.build(DataConfig(path=str(file)), 0)
    first = source.fingerprint()
    file.touch()
    assert source.fingerprint() == first
    file.write_text("two")
    assert source.fingerprint() != first


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"abc\xffdef", r"a\.txt: byte 3 \(0xff\) is not UTF-8"),
        ("a.jsonl", lines({"text": "x"}) + b'{"text": "\xff"}\n', r"a\.jsonl:2: byte 10 \(0xff\) is not UTF-8"),
        ("a.jsonl", lines({"text": "x"}) + b"\n[1]\n", r"a\.jsonl:3: expected a JSON object, found a list"),
        ("a.jsonl", b"{'text': 1}\n", r"a\.jsonl:1: not JSON"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: not JSON"),
        ("a.jsonl", lines({"txt": "x"}), r"a\.jsonl:1: expected the text under 'text'.*found the keys txt"),
        ("a.jsonl", lines({"text": 3}), r"a\.jsonl:1: .*found a number there"),
        ("a.jsonl", b'{"text": "a\\ud800"}\n', r"a\.jsonl:1: character 1 .*surrogate"),
        ("a.jsonl.gz", b"not gzip", r"a\.jsonl\.gz: cannot be read"),
        ("a.jsonl.gz", gzip.compress(lines({"text": "x"}) * 99, mtime=0)[:-9], r"a\.jsonl\.gz: cannot be read"),
    ],
)
def test_bad_content_is_named_with_its_place(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        texts(tmp_path / name)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (None, r"data\.path: it is not set"),
        ("missing.txt", r"data\.path: missing\.txt: no such file"),
        ("empty.txt", r"data\.path: empty\.txt: all 1 files are empty"),
        ("nothing", r"data\.path: nothing: the directory holds none of \.txt"),
        ("image.png", r"data\.path: image\.png: expected one of \.txt"),
    ],
)
def test_a_bad_path_is_named(path: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "nothing").mkdir()
    (tmp_path / "image.png").write_bytes(b"x")
    with pytest.raises(DataError, match=message) as caught:
        files.build(DataConfig(path=path), 0)
    assert caught.value.exit_code == ExitCode.DATA == 3


def test_the_standard_library_is_text_in_a_stable_order() -> None:
    source = python_stdlib.build(DataConfig(), 0)
    names = [file.name for file in source.files]
    assert {"argparse.py", "dataclasses.py"} <= set(names)
    assert not any({"test", "site-packages"} & set(file.parts[-3:]) for file in source.files)
    assert source.files == python_stdlib.build(DataConfig(), 0).files
    assert sum(file.stat().st_size for file in source.files) > 3e6


def test_a_directory_without_a_manifest_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no dataset\.json"):
        shards.build(DataConfig(path=str(tmp_path)), 0)
    with pytest.raises(DataError, match=r"data\.path: expected one directory"):
        shards.build(DataConfig(), 0)


def test_all_bad_documents_are_one_error_or_are_skipped(tmp_path: Path) -> None:
    for i in range(30):
        (tmp_path / f"{i:02}.txt").write_bytes(b"\xff" if i < 25 else b"good")
    (tmp_path / "x.jsonl").write_text('{"text": "good"}\n[]\n')
    (tmp_path / "y.jsonl.gz").write_bytes(b"no archive")
    config = evolve(DataConfig(), path=str(tmp_path))
    with pytest.raises(DataError) as caught:
        list(build(config, 0).documents())
    assert len(caught.value.problems) == 21
    assert "27 documents cannot be read: those above and 7 more" in str(caught.value)
    assert str(caught.value).endswith('data.on_bad_document = "skip"')
    skipping = build(evolve(config, on_bad_document="skip"), 0)
    for _ in range(2):
        assert [document.text for document in skipping.documents()] == ["good"] * 6
    assert len(skipping.skipped) == 27
    assert skipping.fingerprint() != build(config, 0).fingerprint()


def test_tokenize_has_the_same_word(here: Path, shell: Shell) -> None:
    (here / "raw").mkdir()
    for name in ("a", "b"):
        (here / f"raw/{name}.txt").write_bytes(b"\xff")
    (here / "raw/c.txt").write_text("good text " * 100)
    command = ("tokenize", "--input_dir", "raw", "--tokenizer", "bytes", "--output_dir")
    for word in (("--on_bad_document", "error"), ("--strict",)):
        ended = shell(*command, "out", *word)
        assert (ended.code, "a.txt" in ended.err, "b.txt" in ended.err) == (3, True, True)
        assert ("deprecated" in ended.err) == (word == ("--strict",))
    assert shell(*command, "out", "--on_bad_document", "skip").code == 0
