import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayfuse.corpus.documents import Document
from rayfuse.corpus.shards import Part, batch_documents, build_rows
from rayfuse.corpus.split import find_fault, is_held_out, split_document
from rayfuse.models.text_tokenizer import build_tokenizer
from rayfuse.storage.codec import flatten_column
from tests.fakes import SAMPLE, byte_level_tokenizer, sentencepiece_tokenizer

TOKENIZERS = [
    build_tokenizer(byte_level_tokenizer(280).to_str(), start_id=0, eos_id=0),
    build_tokenizer(sentencepiece_tokenizer(330).to_str(), start_id=1, eos_id=2),
]
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=400)


@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_rows_join_to_the_document_and_fit_every_tokenizer(text):
    rows = split_document(Document("d", "", text), TOKENIZERS, 24)
    assert "".join(row.text for row in rows) == text
    assert [row.place for row in rows] == list(range(len(rows)))
    assert [row.ends_document for row in rows] == [False] * (len(rows) - 1) + [True]
    for tokenizer in TOKENIZERS:
        for tokens in tokenizer.encode_rows([row.text for row in rows], [True] * len(rows)):
            assert len(tokens) <= 24


def test_cuts_fall_at_line_ends_or_blanks_where_they_are_near():
    text = "".join(SAMPLE) * 20
    rows = split_document(Document("d", "", text), TOKENIZERS, 64)
    assert len(rows) > 10
    assert all(row.text[-1] in "\n " for row in rows)


def test_a_text_without_blanks_is_cut_between_characters():
    rows = split_document(Document("d", "", "漢字" * 500), TOKENIZERS, 40)
    assert "".join(row.text for row in rows) == "漢字" * 500


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        (" \n\t", "empty"),
        ("\ud800", "lone surrogate"),
        ("a\x00b", "binary"),
        ("\x01\x02\x03abc", "binary"),
        ("x" * 101, "over-long"),
        ("é" * 60, "over-long: 120 bytes"),
    ],
)
def test_documents_that_are_no_text_have_a_fault(text, reason):
    fault = find_fault(Document("d", "", text), 100)
    assert fault is not None
    assert reason in fault


def test_a_page_break_or_an_escape_does_not_make_a_text_binary():
    assert find_fault(Document("d", "", "page one\x0cpage two \x1b[1mbold\x1b[0m"), 100) is None


def test_every_document_is_either_trained_on_or_held_out():
    documents = [Document(f"d{i}", "", "text") for i in range(2000)]
    kept = [Part(0.1, False).takes(document) for document in documents]
    held = [Part(0.1, True).takes(document) for document in documents]
    assert all(a != b for a, b in zip(kept, held, strict=True))
    assert 120 < sum(held) < 280
    assert [is_held_out(document, 0.1) for document in documents] == held


def test_shards_are_filled_in_order_and_lose_no_document():
    documents = [Document(f"d{i}", "", "x" * (i % 7)) for i in range(100)]
    part = Part(0.0, False)
    batches = list(batch_documents(documents, part, shard_bytes=20, max_document_bytes=5))
    kept = [document.doc_id for batch in batches for document in batch.documents]
    rejected = [reject.name for batch in batches for reject in batch.rejects]
    assert kept == [d.doc_id for d in documents if 0 < len(d.text) <= 5]
    assert rejected == [d.doc_id for d in documents if not 0 < len(d.text) <= 5]
    sizes = [sum(len(document.text) for document in batch.documents) for batch in batches]
    assert all(20 <= size < 25 for size in sizes[:-1])


def test_rows_of_no_documents_are_an_empty_table():
    table = build_rows([], TOKENIZERS[0], TOKENIZERS, max_tokens=24)
    assert table.num_rows == 0
    assert len(flatten_column(table, "target_ids")[0]) == 0


def test_only_rows_that_end_a_document_end_with_eos():
    table = build_rows(
        [Document("d", "x", "".join(SAMPLE))], TOKENIZERS[1], TOKENIZERS, max_tokens=40
    )
    ids, offsets = flatten_column(table, "target_ids")
    assert table.num_rows > 2
    assert (ids[offsets[:-1]] == 1).all()
    ends = ids[offsets[1:] - 1] == 2
    np.testing.assert_array_equal(ends, table["ends_document"].to_numpy())
    assert table["row_id"].to_pylist()[:2] == ["d#0", "d#1"]
