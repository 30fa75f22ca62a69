"""Bits per byte: the nats of the validation split over the exact bytes of its text, or nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpt_simple
from gpt_simple import TrainResult
from gpt_simple.config.schema import DataConfig
from gpt_simple.data import bulk
from gpt_simple.data.sources.files import build
from gpt_simple.data.tokenize import survey
from gpt_simple.data.tokenizer import load_tokenizer
from gpt_simple.run_dir.layout import RunDir
from gpt_simple.run_dir.lineage import RunRecord
from tests.tokenizers import EXACT, INEXACT, TEXTS, byte_level, saved, word_piece
from tokenizers import Tokenizer

Make = Callable[[], Tokenizer]


def trained(tmp_path: Path, tokenizer: Path | str, **options: Any) -> TrainResult:
    training = {"max_steps": 1, "eval_steps": 1, "compile": False, "per_device_batch_size": 4, "save_steps": 1}
    return gpt_simple.train(
        model={"n_embd": 16, "n_layer": 1, "n_head": 2},
        data={"tokenizer": str(tokenizer), "max_length": 8, "num_workers": 0} | options.pop("data"),
        training=training | {"output_dir": str(tmp_path / "run"), "resume": "scratch"} | options,
    )


def ratio(result: TrainResult) -> float:
    """The bytes of text by which the nats of the validation split were divided."""
    assert result.bits_per_byte is not None
    assert result.final_val_loss is not None
    return result.final_val_loss / math.log(2) / result.bits_per_byte


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    (tmp_path / "raw").mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / "raw" / f"{i:02}.txt").write_text(text)
    return tmp_path / "raw"


def bytes_per_target(raw: Path, result: TrainResult, val_fraction: float = 0.3) -> float:
    """Of the documents that are held out."""
    config = DataConfig(path=str(raw), val_fraction=val_fraction)
    targets = RunRecord.load(RunDir(result.output_dir)).facts["run"]["data"]["val"]["targets"]
    return survey(build(config, 0), config).val_bytes / targets


@pytest.mark.parametrize("make", [*EXACT, *INEXACT])
def test_bits_per_byte_are_exact_for_every_tokenizer(make: Make, raw: Path, tmp_path: Path) -> None:
    file = saved(make, tmp_path / "t")
    result = trained(tmp_path, file, data={"path": str(raw), "val_fraction": 0.3})
    assert ratio(result) == pytest.approx(bytes_per_target(raw, result))


def one_document(raw: Path, tmp_path: Path, file: Path) -> dict[str, Any]:
    (tmp_path / "one.txt").write_text("".join(TEXTS))
    return {"path": str(tmp_path / "one.txt"), "val_fraction": 0.3, "tokenizer": str(file)}


def tokenized(raw: Path, tmp_path: Path, file: Path) -> dict[str, Any]:
    job = bulk.Job(raw, tmp_path / "dataset", tokenizer=str(file), val_fraction=0.3)
    bulk.tokenize(job, lambda message: None, lambda done, total: None)
    return {"path": str(tmp_path / "dataset"), "tokenizer": "bpe"}


def tokenized_document(raw: Path, tmp_path: Path, file: Path) -> dict[str, Any]:
    (tmp_path / "one").mkdir()
    (tmp_path / "one/one.txt").write_text("".join(TEXTS))
    return tokenized(tmp_path / "one", tmp_path, file)


def earlier_tokenized_document(raw: Path, tmp_path: Path, file: Path) -> dict[str, Any]:
    """As the first version of `tokenize` made it: with a guess."""
    made = tokenized_document(raw, tmp_path, file)
    manifest = tmp_path / "dataset/dataset.json"
    manifest.write_text(manifest.read_text().replace('"bytes": null', '"bytes": 1000'))
    return made


def nanogpt(raw: Path, tmp_path: Path, file: Path) -> dict[str, Any]:
    (tmp_path / "nano").mkdir()
    for name, texts in (("train", TEXTS[10:]), ("val", TEXTS[:10])):
        ids = [index for text in texts for index in [*load_tokenizer(file).encode(text), load_tokenizer(file).eod_id]]
        np.array(ids, "<u2").tofile(tmp_path / f"nano/{name}.bin")
    return {"path": str(tmp_path / "nano"), "tokenizer": str(file)}


def capped(raw: Path, tmp_path: Path, file: Path) -> dict[str, Any]:
    return {"path": str(raw), "val_fraction": 0.3, "tokenizer": str(file), "cap": 1}


def nearly_capped(raw: Path, tmp_path: Path, file: Path) -> dict[str, Any]:
    return capped(raw, tmp_path, file) | {"cap": 10_000}


@pytest.mark.parametrize("make", [byte_level, word_piece])
@pytest.mark.parametrize(
    ("data", "known"),
    [
        (one_document, True),
        (tokenized, True),
        (nearly_capped, True),
        (tokenized_document, False),
        (earlier_tokenized_document, False),
        (nanogpt, False),
        (capped, False),
    ],
)
def test_bits_per_byte_are_left_out_where_bytes_are_unknown(
    data: Callable[..., dict[str, Any]], known: bool, make: Make, raw: Path, tmp_path: Path
) -> None:
    settings = data(raw, tmp_path, saved(make, tmp_path / "t"))
    result = trained(tmp_path, settings.pop("tokenizer"), max_eval_batches=settings.pop("cap", None), data=settings)
    assert (result.bits_per_byte is not None) == (known or make is byte_level)
    rows = gpt_simple.read_metrics(result.output_dir / "metrics.jsonl", kind="eval")
    assert all(("eval/bits_per_byte" in row) == (known or make is byte_level) for row in rows)
    if data in (tokenized, nearly_capped):
        assert ratio(result) == pytest.approx(bytes_per_target(raw, result))
