"""What is lost of the documents is counted, and too much of it stops the run."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from rayfuse.config.base import UserError
from rayfuse.corpus.documents import UNREADABLE
from rayfuse.corpus.shards import DocumentBatch
from rayfuse.corpus.summary import (
    CorpusSummary,
    check_has_text,
    check_held_out_share,
    check_rejects,
    count_documents,
    summarize,
)
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.rejects import Reject, decode_rejects, encode_rejects
from rayfuse.storage.store import LocalStore
from tests.corpus.files import batch_all, build_batch, good_lines, write_lines


def commit(data: DataSet, batches: Sequence[DocumentBatch]) -> None:
    for shard, batch in enumerate(batches):
        rows = build_batch(batch)
        num_bytes = sum(rows["num_bytes"].to_pylist())
        stats = count_documents(len(batch.documents), num_bytes, batch.rejects)
        data.write_shard(shard, rows, tokens=0, rejects=batch.rejects, stats=stats)


def open_data(folder: Path, name: str = "") -> DataSet:
    return DataSet(LocalStore(str(folder / "storage")), "corpus", name, "fp")


def read_corpus(folder: Path, num_files: int) -> tuple[DataSet, CorpusSummary]:
    data = open_data(folder)
    commit(data, batch_all(folder, shard_bytes=200))
    return data, summarize([data], num_files)


def test_every_document_is_counted_by_what_became_of_it(tmp_path):
    write_lines(
        tmp_path / "a.jsonl",
        [*good_lines() * 20, b'{"text": ""}', b"[]", b'{"text": 3}', b'{"text": "\xff"}', b"["],
    )
    (tmp_path / "b.jsonl.gz").write_bytes(b"no gzip")
    data, summary = read_corpus(tmp_path, 2)
    assert len(data.commits()) > 1
    assert (summary.files, summary.documents, summary.rows) == (2, 40, 40)
    assert summary.rejects == {
        "no JSON object": 2,
        "empty": 1,
        "field 'text' holds no text": 1,
        "invalid UTF-8": 1,
        UNREADABLE: 1,
    }
    assert (summary.lost, summary.unreadable) == (4, 1)


def test_too_many_rejects_stop_the_run_with_the_files_and_their_reasons(tmp_path):
    write_lines(tmp_path / "a.jsonl", good_lines() * 20)
    write_lines(tmp_path / "b.jsonl", [*good_lines(), *[b"no JSON"] * 6])
    data, summary = read_corpus(tmp_path, 2)
    check_rejects([data], summary, 6 / 48)
    with pytest.raises(
        UserError,
        match=r"6 of 48 documents are rejected, more than corpus.max_rejected_share \(12.4%\): 6 "
        r"no JSON object; the most are from b.jsonl \(6: no JSON object: .*\); all reasons are in "
        rf"{data.store.root}/corpus/fp/rejects; correct or remove",
    ):
        check_rejects([data], summary, 0.124)


def test_an_unreadable_file_counts_among_files(tmp_path):
    write_lines(tmp_path / "a.jsonl", good_lines() * 20)
    (tmp_path / "b.jsonl.zst").write_bytes(b"no zstd")
    data, summary = read_corpus(tmp_path, 2)
    check_rejects([data], summary, 0.5)
    with pytest.raises(
        UserError,
        match=rf"1 of 2 files of documents cannot be read, .* b.jsonl.zst \(1: {UNREADABLE}: it is",
    ):
        check_rejects([data], summary, 0.1)


def test_empty_documents_are_no_loss(tmp_path):
    write_lines(tmp_path / "a.jsonl", [*good_lines(), *[b'{"text": " "}'] * 10])
    data, summary = read_corpus(tmp_path, 1)
    assert summary.rejects == {"empty": 10}
    check_rejects([data], summary, 0.0)


def test_documents_without_any_text_are_refused(tmp_path):
    write_lines(tmp_path / "a.jsonl", [b"[]", b'{"text": ""}'])
    data, summary = read_corpus(tmp_path, 1)
    with pytest.raises(
        UserError,
        match=r"no usable text: 2 documents rejected \(1 empty, 1 no JSON object; reasons",
    ):
        check_has_text([data], summary)


@pytest.mark.parametrize(
    ("part", "documents", "share", "message"),
    [
        ("held-out", 10, 0.02, r"is 0.02, by which none of the 10 documents .* set it to 0.5, or"),
        ("held-out", 400, 0.001, r"is 0.001, by which none of the 400 .* set it to 0.03, or name"),
        (
            "rows",
            10,
            0.9,
            r"is 0.9, by which all of the 10 documents are held out .* set it to 0.5",
        ),
        ("held-out", 1, 0.02, r"none of the 1 documents .*; name documents .* evaluate.documents"),
    ],
)
def test_a_share_that_leaves_a_part_empty_is_refused_with_a_better_one(
    part, documents, share, message
):
    check_held_out_share(part, 1, documents, share)
    with pytest.raises(UserError, match=message):
        check_held_out_share(part, 0, documents, share)


def test_rejects_survive_a_round_trip_and_hold_nothing_that_says_nothing():
    rejects = [Reject("a", "empty"), Reject("b\n", "over-long: 3 rows", "x.parquet", 3)]
    data = encode_rejects(rejects)
    assert data.splitlines()[0] == b'{"name": "a", "reason": "empty"}'
    assert decode_rejects(data) == rejects
    with pytest.raises(ValueError, match="no reject"):
        decode_rejects(b'{"other": 1}\n')
