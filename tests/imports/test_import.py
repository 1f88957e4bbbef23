"""Imported rows are those that capture stores of the same model and text."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import rayfuse
from rayfuse.capture.rows import build_captured
from rayfuse.capture.top_k import TopLogprobs
from rayfuse.config.base import UserError
from rayfuse.imports.capture import Importer, index_rows
from rayfuse.imports.command import suggest_source
from rayfuse.imports.distillkit import PlainFormat
from rayfuse.imports.store import ForeignStore, list_vocabulary, open_foreign_store
from rayfuse.storage.codec import decode_probs, flatten_column, flatten_positions
from tests.imports.conftest import TEXTS, Scored
from tests.imports.stores import take_top, write_distillkit, write_fusellm


def import_rows(store: ForeignStore, scored: Scored, *, top_k: int = 12):
    vocabulary = list_vocabulary(scored.tokenizer)
    index = index_rows(store, vocabulary)
    return Importer(store, scored.tokenizer, vocabulary, top_k, index).import_rows(scored.corpus)


def decode(table: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Decode a table: tokens, dense probabilities, tails, and log-probabilities of next tokens."""
    tokens, offsets = flatten_column(table, "token_ids")
    ids = flatten_positions(table, "top_ids", len(tokens))
    tails = flatten_column(table, "tail_logprobs")[0].astype(np.float32)
    probs = decode_probs(flatten_column(table, "top_logprobs")[0], ids, tails)
    dense = np.zeros((len(tokens), 331))
    np.put_along_axis(dense, ids.astype(np.int64), probs, 1)  # -1: the last column, which is 0
    is_last = np.zeros(len(tokens), dtype=bool)
    is_last[offsets[1:] - 1] = True
    keep = ~is_last
    next_logprobs = flatten_column(table, "next_logprobs")[0].astype(np.float32)
    return tokens, dense[keep], np.exp(tails)[keep], next_logprobs[keep]


@pytest.mark.parametrize("plain", [False, True])
def test_distillkit_rows_are_what_capture_stores(scored: Scored, tmp_path, plain):
    start, eos = scored.tokenizer.start_id, scored.tokenizer.eos_id
    write_distillkit(tmp_path / "store", scored.score([start], [eos]), plain=plain)
    table, rejects, counts, _ = import_rows(open_foreign_store(str(tmp_path / "store")), scored)
    assert not rejects
    assert counts["unrecorded"] == 0
    tokens, probs, tails, next_logprobs = decode(table)
    own_tokens, own_probs, own_tails, own_next = decode(scored.captured)
    np.testing.assert_array_equal(tokens, own_tokens)
    np.testing.assert_allclose(probs, own_probs, atol=2e-3 if plain else 1e-2)
    np.testing.assert_allclose(tails, own_tails, atol=2e-3 if plain else 1e-2)
    is_entry = np.take_along_axis(own_probs, _next_ids(scored)[:, None], 1)[:, 0] > 0
    assert 0.02 < is_entry.mean() < 0.98
    np.testing.assert_allclose(next_logprobs[is_entry], own_next[is_entry], atol=0.02)
    assert counts["estimated"] == (~is_entry).sum()
    share = np.log(tails[~is_entry] / (scored.tokenizer.vocab_size - 12))
    np.testing.assert_allclose(next_logprobs[~is_entry], share, atol=0.02)


def _next_ids(scored: Scored) -> np.ndarray:
    rows = scored.captured["token_ids"].to_pylist()
    return np.concatenate([row[1:] for row in rows]).astype(np.int64)


def test_entries_beyond_top_k_join_the_tail(scored: Scored, tmp_path):
    start, eos = scored.tokenizer.start_id, scored.tokenizer.eos_id
    write_distillkit(tmp_path / "store", scored.score([start], [eos]), plain=True)
    table, *_ = import_rows(open_foreign_store(str(tmp_path / "store")), scored, top_k=3)
    _, probs, tails, _ = decode(table)
    _, own, own_tails, _ = decode(scored.captured)
    np.testing.assert_allclose(probs.sum(1) + tails, 1, atol=1e-3)
    top = -np.sort(-own, axis=1)[:, :3]
    # One byte a probability: neighbouring codes are 2 % apart, and both sides are rounded.
    np.testing.assert_allclose(-np.sort(-probs, axis=1)[:, :3], top, rtol=0.04, atol=1e-6)
    np.testing.assert_allclose(tails, own_tails + own.sum(1) - top.sum(1), atol=5e-3)


def test_positions_without_a_record_have_no_signal_and_the_mean_nll(scored: Scored, tmp_path):
    write_distillkit(tmp_path / "store", scored.score([], []), plain=True)
    table, rejects, counts, _ = import_rows(open_foreign_store(str(tmp_path / "store")), scored)
    assert not rejects
    # Of each text the first token, after the start token, and the EOS after the last.
    assert counts["unrecorded"] == 2 * len(TEXTS)
    for row in range(len(TEXTS)):
        ids = np.array(table["top_ids"][row].as_py()).reshape(-1, 12)
        nlls = np.array(table["next_logprobs"][row].as_py(), dtype=np.float64)
        assert (ids[[0, -2, -1]] == -1).all()
        assert (ids[1:-2] >= 0).all()
        np.testing.assert_allclose(nlls[[0, -2]], nlls[1:-2].mean(), atol=0.02)
        assert nlls[-1] == 0


@pytest.mark.parametrize("with_losses", [True, False])
def test_fusellm_rows_follow_from_logits_and_losses(scored: Scored, tmp_path, with_losses):
    eos = scored.tokenizer.eos_id
    rows = scored.score([], [eos])
    length = max(len(tokens) for tokens, _ in rows) + 3
    texts = [(text, *row) for text, row in zip(TEXTS, rows, strict=True)]
    write_fusellm(tmp_path / "store", texts, length=length, with_losses=with_losses)
    table, rejects, counts, _ = import_rows(open_foreign_store(str(tmp_path / "store")), scored)
    assert not rejects
    assert counts["unrecorded"] == len(TEXTS)  # the first token of each
    for row, (tokens, logits) in enumerate(rows):
        ids, values = take_top(logits.astype(np.float64), 10)
        inside = np.exp(values - values.max(1, keepdims=True))
        inside /= inside.sum(1, keepdims=True)
        lps = logits - np.log(np.exp(logits.astype(np.float64)).sum(1, keepdims=True))
        truth = -lps[np.arange(len(tokens) - 1), tokens[1:]]
        part = table.slice(row, 1)
        found = flatten_positions(part, "top_ids", len(tokens) + 1)[1:-1]
        tails = np.exp(flatten_column(part, "tail_logprobs")[0].astype(np.float64))[1:-1]
        codes = flatten_column(part, "top_logprobs")[0].reshape(-1, 12)[1:-1]
        probs = decode_probs(codes.reshape(-1), found, np.log(tails).astype(np.float32))
        nlls = -flatten_column(part, "next_logprobs")[0].astype(np.float64)[1:-1]
        assert (found[:, 10:] == -1).all()
        found, probs = found[:, :10], probs[:, :10]
        np.testing.assert_array_equal(np.sort(found), np.sort(ids[:-1]))
        np.testing.assert_allclose(probs / probs.sum(1, keepdims=True), inside[:-1], atol=1e-2)
        is_entry = (ids[:-1] == np.array(tokens[1:])[:, None]).any(1)
        if with_losses:
            np.testing.assert_allclose(nlls, truth, rtol=2e-3)
            mass = np.exp(np.take_along_axis(lps, ids, 1)).sum(1)[:-1]
            np.testing.assert_allclose(tails[is_entry], 1 - mass[is_entry], atol=0.03)
            assert (tails[~is_entry] >= np.exp(-truth[~is_entry]) - 1e-3).all()
        else:
            np.testing.assert_allclose(tails, 0, atol=1e-6)
            assert nlls.sum() == pytest.approx(truth.sum(), rel=5e-3)


def test_the_texts_of_a_store_become_documents(scored: Scored, tmp_path):
    start, eos = scored.tokenizer.start_id, scored.tokenizer.eos_id
    rows = scored.score([start], [eos])
    chat = [start, *rows[0][0][1:4], eos, *rows[0][0][4:]]
    twice = [*rows, rows[1], (chat, np.zeros((len(chat), 331), np.float32))]
    write_distillkit(tmp_path / "store", twice, plain=True)
    documents = tmp_path / "texts.jsonl"
    found = rayfuse.import_store(str(tmp_path / "store"), str(documents), str(scored.model))
    lines = [json.loads(line) for line in documents.read_text().splitlines()]
    assert [line["text"] for line in lines] == TEXTS
    assert found["texts"] == len(TEXTS)
    assert found["longest"] == max(len(tokens) for tokens, _ in rows) - 2
    assert found["skipped"] == {
        "its text is there twice": 1,
        "has special tokens, or ids that the tokenizer lacks, inside the text": 1,
    }
    with pytest.raises(UserError, match="a file that exists; give another name"):
        rayfuse.import_store(str(tmp_path / "store"), str(documents), str(scored.model))


def test_the_printed_recipe_names_the_revision_and_the_aligned_source():
    source = suggest_source("store", "org/model", revision="v2", aligned=1)
    assert source == {
        "name": "imported",
        "model": "org/model",
        "revision": "v2",
        "captured_from": "store",
        "captured_aligned": 1,
    }
    plain = suggest_source("store", "org/model", revision=None, aligned=None)
    assert plain == {"name": "imported", "model": "org/model", "captured_from": "store"}


def write_columns(folder, **columns) -> str:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), folder / "data.parquet")
    return str(folder)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a"]}, r"no column input_ids; their columns: text"),
        ({"input_ids": [[1]], "logits": [[1]]}, "not a known layout; its columns: input_ids, logi"),
        (
            {"input_ids": [[1]], "packed_indices": [[[1]]], "exact_values": [[[1.0]]]}
            | {"coeffs": [[[1.0]]]},
            "DistillKit's earlier layout .* centred logits without their normaliser",
        ),
        (
            {"input_ids": [[1]], "compressed_logprobs": [[[1]]], "bytepacked_indices": [[[1]]]},
            r"compression_config\.yaml is missing; copy it there",
        ),
        ({"input_ids": ["a"], "token_ids": [[[1]]]}, "column input_ids is string, not lists of"),
    ],
)
def test_a_store_that_cannot_be_imported_is_refused(tmp_path, columns, message):
    with pytest.raises(UserError, match=message):
        open_foreign_store(write_columns(tmp_path / "store", **columns))


def test_a_packed_store_is_refused(scored: Scored, tmp_path):
    columns = {"input_ids": [[5, 6]], "token_ids": [[[1]]], "top_values": [[[-1.0]]]}
    path = write_columns(tmp_path / "store", **columns, attention_mask=[[1, 2]])
    with pytest.raises(UserError, match="packs several texts; give the store from before"):
        index_rows(open_foreign_store(path), list_vocabulary(scored.tokenizer))


def test_logits_in_place_of_log_probabilities_are_rejected_row_by_row(scored: Scored, tmp_path):
    start, eos = scored.tokenizer.start_id, scored.tokenizer.eos_id
    rows = scored.score([start], [eos])
    columns = {
        "input_ids": [tokens for tokens, _ in rows],
        "token_ids": [take_top(logits, 12)[0].tolist() for _, logits in rows],
        "top_values": [take_top(logits + 9, 12)[1].tolist() for _, logits in rows],
    }
    store = open_foreign_store(write_columns(tmp_path / "store", **columns))
    table, rejects, _, _ = import_rows(store, scored)
    assert len(rejects) == len(TEXTS)
    assert all("these are logits" in reject.reason for reject in rejects)
    assert np.isinf(table["nats"].to_numpy()).all()


def test_aligned_rows_of_fusellm_have_no_signal_where_it_repeats_the_current_token(
    scored: Scored, tmp_path
):
    (tokens,) = scored.tokenizer.encode([TEXTS[0]])
    tokens = [*tokens.tolist(), scored.tokenizer.eos_id]
    logits = [[2.0, 1.0, -1.0] for _ in tokens]
    ids = [[token, 7, 8] for token in [*tokens[1:], 9]]
    logits[3], ids[3] = [1.0], [tokens[3]]  # FuseLLM's fallback
    logits[4], ids[4] = [5.5], [tokens[5]]  # one entry, of an aligned position
    logits[5], ids[5] = [], []
    columns = {"input_ids": [tokens], "per_step_aligned_logits_1": [logits]}
    path = write_columns(tmp_path / "store", **columns, per_step_aligned_indices_1=[ids])
    with pytest.raises(UserError, match="not a known layout"):
        open_foreign_store(path)
    with pytest.raises(UserError, match="not aligned source 0 of FuseLLM"):
        open_foreign_store(path, 0)
    store = open_foreign_store(path, 1)
    table, rejects, counts, _ = import_rows(store, scored)
    assert len(rejects) == len(TEXTS) - 1  # the store has one text
    assert counts["unrecorded"] == 3  # the start token's, the fallback and the empty one
    found = np.array(table["top_ids"][0].as_py()).reshape(len(tokens) + 1, 12)
    assert (found[[0, 4, 6]] == -1).all()
    assert found[5].tolist() == [tokens[5], *[-1] * 11]
    assert found[1].tolist() == [tokens[1], 7, 8, *[-1] * 9]
    first = table["next_logprobs"][0].as_py()[1]
    assert first == pytest.approx(2 - np.log(np.exp([2.0, 1.0, -1.0]).sum()), abs=2e-3)


def test_rows_with_more_or_fewer_entries_than_the_first_keep_their_positions(
    scored: Scored, tmp_path
):
    """FuseLLM keeps as many entries of a position as its source has there."""
    rows = [row.tolist() for row in scored.tokenizer.encode(TEXTS)]
    ids = [
        [[(t + 7 * n) % 300 + 5 + e for e in range((t + n) % 5 + n % 3)] for t in range(len(row))]
        for n, row in enumerate(rows)
    ]
    logits = [[[4.0 - entry for entry in range(len(own))] for own in row] for row in ids]
    columns = {"input_ids": rows, "per_step_indices": ids, "per_step_logits": logits}
    store = open_foreign_store(write_columns(tmp_path / "store", **columns))
    for top_k in (4, 12):
        table, rejects, _, _ = import_rows(store, scored, top_k=top_k)
        assert not rejects
        for row, own in enumerate(ids):
            part = table.slice(row, 1)
            found = np.array(part["top_ids"][0].as_py()).reshape(-1, top_k)[1:-1]
            expected = [(entries + [-1] * top_k)[:top_k] for entries in own[:-1]]
            # The EOS is not stored: the last token's distribution is, behind the last position.
            np.testing.assert_array_equal(found[: len(expected)], expected)
            assert len(part["top_logprobs"][0].as_py()) == found.size + 2 * top_k


def write_rows(scored: Scored, folder, number: int = 2, **changed) -> str:
    """Write a plain DistillKit store of some texts, with other values for its columns."""
    rows = [row.tolist() for row in scored.tokenizer.encode(TEXTS[:number])]
    columns = {
        "input_ids": rows,
        "token_ids": [[[5, 6, 7] for _ in row] for row in rows],
        "top_values": [[[-1.0, -2.0, -3.0] for _ in row] for row in rows],
    }
    columns |= {name: [*values, *columns[name][1:]] for name, values in changed.items()}
    return write_columns(folder, **columns)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"token_ids": [[]], "top_values": [[]]}, "none of its positions has a distribution"),
        ({"token_ids": [None]}, "a list is null"),
        ({"token_ids": [[[5, 6]]]}, "another number of entries"),
        ({"token_ids": [[[5, 6, 5]] * 200], "top_values": [[[-2.0] * 3] * 200]}, "token twice"),
        # Logits without a value that is finite are no distribution, whatever the column's type.
        ({"top_values": [[[float("nan")] * 3] * 200], "token_ids": [[[5, 6, 7]] * 200]}, "finite"),
    ],
)
def test_a_torn_record_rejects_its_row_by_file_and_number(
    scored: Scored, tmp_path, changed, reason
):
    store = open_foreign_store(write_rows(scored, tmp_path / "store", **changed))
    store = ForeignStore(store.folder, store.setting, PlainFormat(3), store.files)
    _, rejects, _, _ = import_rows(store, scored)
    mine = [reject.reason for reject in rejects if "cannot be used" in reject.reason]
    assert len(mine) == 1
    assert mine[0].startswith(f"row 0 of {tmp_path}/store/data.parquet cannot be used: ")
    assert reason in mine[0]


def test_a_null_metric_rejects_its_row(scored: Scored, tmp_path):
    rows = [row.tolist() for row in scored.tokenizer.encode(TEXTS[:2])]
    columns = {
        "input_ids": rows,
        "per_step_indices": [[[5, 6] for _ in row] for row in rows],
        "per_step_logits": [[[2.0, 1.0] for _ in row] for row in rows],
        "metric_ce": [None, 2.0],
    }
    store = open_foreign_store(write_columns(tmp_path / "store", **columns))
    _, rejects, _, _ = import_rows(store, scored)
    assert [r.reason for r in rejects if "metric_ce is null" in r.reason] == [rejects[0].reason]


def test_columns_are_checked_in_every_file(scored: Scored, tmp_path):
    path = write_rows(scored, tmp_path / "store")
    other = {"input_ids": [[1]], "token_ids": ["a"], "top_values": [[[1.0]]]}
    pq.write_table(pa.table(other), tmp_path / "store/other.parquet")
    with pytest.raises(UserError, match=r"other\.parquet: column token_ids is string, not lists"):
        open_foreign_store(path)


def test_a_null_attention_mask_is_named(scored: Scored, tmp_path):
    path = write_columns(
        tmp_path / "store",
        input_ids=[[5, 6]] * 2,
        token_ids=[[[1]]] * 2,
        top_values=[[[-1.0]]] * 2,
        attention_mask=[[1, 1], None],
    )
    with pytest.raises(UserError, match=r"data\.parquet, row 1: attention_mask: a list is null"):
        index_rows(open_foreign_store(path), list_vocabulary(scored.tokenizer))


def test_ids_that_no_token_has_join_the_tail(scored: Scored, tmp_path):
    """Also those that an int32 cannot hold, which would become ids of other tokens."""
    (row,) = scored.tokenizer.encode(TEXTS[:1])
    ids = [[5, 2**32 + 6, -1]] * len(row)
    values = [[[-1.0, -2.0, -3.0]] * len(row)]
    path = write_columns(
        tmp_path / "store", input_ids=[row.tolist()], token_ids=[ids], top_values=values
    )
    table, *_ = import_rows(open_foreign_store(path), scored, top_k=3)
    found = np.array(table["top_ids"][0].as_py()).reshape(-1, 3)
    assert found[2].tolist() == [5, -1, -1]
    tail = np.exp(table["tail_logprobs"][0].as_py()[2])
    assert tail == pytest.approx(1 - np.exp(-1.0), abs=1e-3)


def test_records_of_different_widths_are_refused(scored: Scored):
    (row,), corpus = scored.tokenizer.encode(["ab"]), scored.corpus.slice(0, 2)
    size = len(row)
    records = [
        TopLogprobs(
            np.zeros((size, k), np.int32), np.zeros((size, k)), np.zeros(size), np.zeros(size),
            np.zeros((size, 0), np.int32),
        )
        for k in (2, 3)
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"different numbers of entries: \[2, 3\]"):
        build_captured(corpus, [row, row], records, None)


def test_a_corrupt_arrow_file_is_refused(scored: Scored, tmp_path):
    (tokens,) = scored.score([], [])[:1]
    write_fusellm(tmp_path / "store", [(TEXTS[0], *tokens)] * 2, length=600, with_losses=True)
    (file,) = (tmp_path / "store/train").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(UserError, match=r"data-00000-of-00001\.arrow is corrupt"):
        open_foreign_store(str(tmp_path / "store"))
