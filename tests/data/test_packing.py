"""Rows: every token a target once, short documents whole, windows that overlap."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from gpt_simple.data.packing import Block, ConcatRows, Rows, _assign, best_fit
from gpt_simple.data.shards import Shard
from gpt_simple.errors import DataError

WriteShard = Callable[[list[list[int]]], Shard]


def random_documents(seed: int, longest: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 100, rng.integers(1, longest + 1)).tolist() for _ in range(rng.integers(1, 40))]


def read_all(rows: Rows) -> Block:
    return rows.read(np.arange(len(rows)), starts=True)


def targets_of(block: Block) -> list[int]:
    scored = np.ones(block.labels.shape, bool) if block.scored is None else block.scored
    return block.labels[scored].tolist()


def stream(documents: list[list[int]]) -> list[int]:
    return [token for document in documents for token in (*document, 0)]


@pytest.mark.parametrize("seed", range(20))
def test_concat_predicts_each_token_from_the_one_before(seed: int, write_shard: WriteShard) -> None:
    documents = random_documents(seed, 30)
    rows = ConcatRows(write_shard(documents), 7 + seed % 3)
    block = read_all(rows)
    assert targets_of(block) == stream(documents)
    inputs = block.inputs.reshape(-1)[: len(stream(documents))]
    assert inputs.tolist() == [0, *stream(documents)[:-1]]
    assert rows.targets(np.arange(len(rows))).sum() == len(stream(documents))


def test_concat_reads_rows_in_any_order(write_shard: WriteShard) -> None:
    rows = ConcatRows(write_shard(random_documents(3, 60)), 8)
    whole = read_all(rows)
    some = np.array([len(rows) - 1, 0, 2, 0])
    assert rows.read(some, starts=False).labels.tolist() == whole.labels[some].tolist()
    assert rows.read(some[1:], starts=False).scored is None


@pytest.mark.parametrize("overlap", [0, 1, 4])
@pytest.mark.parametrize("seed", range(15))
def test_best_fit_scores_every_token_once_with_the_right_input(
    seed: int, overlap: int, write_shard: WriteShard
) -> None:
    length = 5 + seed
    documents = random_documents(seed, 3 * length)
    rows = best_fit(write_shard(documents), length, overlap)
    block = read_all(rows)
    assert block.scored is not None
    assert sorted(targets_of(block)) == sorted(stream(documents))
    assert rows.targets(np.arange(len(rows))).tolist() == block.scored.sum(1).tolist()
    within = ~block.starts[:, 1:]
    assert (block.inputs[:, 1:] == block.labels[:, :-1])[within].all()


def test_best_fit_never_splits_a_document_that_fits(write_shard: WriteShard) -> None:
    documents = [[i] * (1 + i % 11) for i in range(1, 90)]
    rows = best_fit(write_shard(documents), 12, 0)
    block = read_all(rows)
    found = []
    for labels, starts, scored in zip(block.labels, block.starts, block.scored, strict=True):
        for piece, counts in zip(
            np.split(labels, np.flatnonzero(starts)[1:]), np.split(scored, np.flatnonzero(starts)[1:]), strict=True
        ):
            if counts.any():
                found.append(piece[counts].tolist())
    assert sorted(found) == sorted([*document, 0] for document in documents)


def test_windows_of_a_long_document_score_shared_tokens_once(write_shard: WriteShard) -> None:
    document = list(range(1, 20))
    rows = best_fit(write_shard([document]), 8, 3)
    block = read_all(rows)
    by_start = sorted(zip(block.labels.tolist(), block.scored.tolist(), strict=True))
    windows = [[token for token in labels if token] for labels, _ in by_start]
    assert windows[0] == list(range(1, 9))
    for before, after in itertools.pairwise(windows):
        assert after[:3] == before[-3:]
    assert all(not any(scored[:3]) for _, scored in by_start[1:])


def test_best_fit_needs_as_few_rows_as_placing_one_by_one() -> None:
    rng = np.random.default_rng(0)
    for _ in range(150):
        length = int(rng.integers(2, 40))
        lengths = np.sort(rng.integers(1, length + 1, rng.integers(1, 120)))[::-1]
        room: list[int] = []
        for piece in lengths.tolist():
            fits = [(left, i) for i, left in enumerate(room) if left >= piece]
            if fits:
                room[min(fits)[1]] -= piece
            else:
                room.append(length - piece)
        filled = np.bincount(_assign(lengths, length), lengths)
        assert len(filled) == len(room)
        assert (filled > 0).all()
        assert (filled <= length).all()


@pytest.mark.parametrize("policy", ["concat", "best_fit"])
def test_starts_mark_documents_and_the_padding_once(policy: str, write_shard: WriteShard) -> None:
    shard = write_shard([[1, 2, 3], [4], [5, 6]])
    rows = ConcatRows(shard, 6) if policy == "concat" else best_fit(shard, 6, 0)
    block = read_all(rows)
    expected = {
        "concat": ([[0, 1, 2, 3, 0, 4], [0, 5, 6, 0, 0, 0]], [[1, 0, 0, 0, 1, 0], [1, 0, 0, 1, 0, 0]]),
        "best_fit": ([[0, 1, 2, 3, 0, 4], [0, 5, 6, 0, 0, 0]], [[1, 0, 0, 0, 1, 0], [1, 0, 0, 1, 0, 0]]),
    }[policy]
    assert block.inputs.tolist() == expected[0]
    assert block.starts.astype(int).tolist() == expected[1]


@pytest.mark.parametrize("policy", ["concat", "best_fit"])
def test_an_id_beyond_the_vocabulary_is_named_with_its_place(policy: str, write_shard: WriteShard) -> None:
    shard = write_shard([[1, 2, 3, 4, 5, 6, 7, 8], [9]])
    damaged = np.array(shard.tokens)
    damaged[6] = 100
    damaged.tofile(shard.path)
    rows = ConcatRows(shard, 4) if policy == "concat" else best_fit(shard, 4, 0)
    with pytest.raises(DataError, match=r"shard-00000.bin: token 100 at position 6 is beyond the vocabulary of 100"):
        read_all(rows)
