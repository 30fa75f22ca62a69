"""The source keeps the contract and the order of rows, and a stopped run resumes at the exact row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from gpt_simple_parquet import Parquet
from gpt_simple_parquet.source import build

from gpt_simple import DataConfig, DataError
from gpt_simple.testing import check_contract, train

TEXTS = [f"row {i} of a table, {'more ' * (i % 5)}and the end" for i in range(200)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT_SIMPLE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    (folder / "b").mkdir(parents=True)
    pq.write_table(
        pa.table({"text": [*TEXTS[:120], None, ""], "n": range(122)}), folder / "a.parquet", row_group_size=50
    )
    pq.write_table(pa.table({"text": pa.array(TEXTS[120:], pa.large_string())}), folder / "b/c.parquet")
    return folder


def test_directories_and_links_are_walked_whatever_their_names(corpus: Path, tmp_path: Path) -> None:
    """Some writers make a directory of parts with the name of a table."""
    (corpus / "b").rename(corpus / "table.parquet")
    (tmp_path / "elsewhere").mkdir()
    pq.write_table(pa.table({"text": ["linked"]}), tmp_path / "elsewhere/d.parquet")
    (corpus / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(corpus)
    (corpus / ".hidden.parquet").write_bytes(b"")
    source = build(DataConfig(path=str(corpus)), 0)
    assert [document.text for document in source.stream()] == [*TEXTS[:120], "linked", *TEXTS[120:]]


def settings(corpus: Path, **more: Any) -> dict[str, Any]:
    return {
        "data.source": "parquet",
        "data.path": str(corpus),
        "data.max_documents": 190,
        "data.val_fraction": 0.2,
    } | more


def test_keeps_the_contract(corpus: Path) -> None:
    check_contract(Parquet, overrides=settings(corpus), observes=False)


def test_rows_come_in_the_order_of_files_without_empty_ones(corpus: Path) -> None:
    source = build(DataConfig(path=str(corpus)), 0)
    assert [document.text for document in source.stream()] == TEXTS
    assert build(DataConfig(path=(str(corpus / "b/c.parquet"),)), 0).files == (corpus / "b/c.parquet",)


def test_the_fingerprint_follows_the_files(corpus: Path) -> None:
    first = build(DataConfig(path=str(corpus)), 0).fingerprint()
    assert build(DataConfig(path=str(corpus)), 0).fingerprint() == first
    pq.write_table(pa.table({"text": TEXTS}), corpus / "a.parquet")
    assert build(DataConfig(path=str(corpus)), 0).fingerprint() != first


def test_a_stopped_run_ends_as_one_that_was_not(corpus: Path, tmp_path: Path) -> None:
    parts = {"optimizer.schedule": "constant"}
    whole = train(Parquet, output_dir=tmp_path / "one", max_steps=6, overrides=settings(corpus, **parts))
    train(Parquet, output_dir=tmp_path / "two", max_steps=2, overrides=settings(corpus, **parts))
    resumed = train(Parquet, output_dir=tmp_path / "two", max_steps=6, overrides=settings(corpus, **parts))
    assert whole.weights
    assert all(torch.equal(resumed.weights[name], weights) for name, weights in whole.weights.items())


def test_a_changed_file_is_not_resumed(corpus: Path, tmp_path: Path) -> None:
    train(Parquet, output_dir=tmp_path / "run", max_steps=2, overrides=settings(corpus))
    pq.write_table(pa.table({"text": TEXTS[::-1]}), corpus / "a.parquet")
    with pytest.raises(Exception, match="dataset"):
        train(Parquet, output_dir=tmp_path / "run", max_steps=4, overrides=settings(corpus))


@pytest.mark.parametrize(
    ("path", "key", "message"),
    [
        (None, "text", "data.path: it is not set"),
        ("missing", "text", "no such file or directory"),
        ("nothing", "text", "holds no .parquet files"),
        ("corpus", "body", r"a\.parquet: there is no column 'body' .*expected one of text, n"),
        ("corpus/a.parquet", "n", r"a\.parquet: column 'n' .*holds int64; expected text"),
        ("broken.parquet", "text", r"broken\.parquet: cannot be read as Parquet"),
    ],
)
def test_what_is_wrong_is_named(path: str | None, key: str, message: str, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=message):
        build(DataConfig(path=None if path is None else str(tmp_path / path), text_key=key), 0)
