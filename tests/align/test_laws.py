"""What holds of aligned records, for every method and every pair of the real tokenizers."""

import json
from itertools import permutations

import numpy as np
import pyarrow as pa
import pytest

from benchmarks.synthetic import make_captured, make_corpus
from rayfuse.align.method import Alignment, build_alignment
from rayfuse.align.methods.cooccurrence import choose_most_matched, count_pairs
from rayfuse.align.methods.min_edit_distance import map_to_nearest
from rayfuse.align.shard import align_shard
from rayfuse.align.token_spans import list_token_bytes
from rayfuse.align.vocab_map import UNCHANGED, build_maps
from rayfuse.config.align import METHODS
from rayfuse.models.text_tokenizer import TextTokenizer, build_tokenizer
from rayfuse.storage.codec import decode_probs, flatten_column
from tests.align.conftest import NAMES, map_tokens

TOP_K = 8


def make_alignment(
    source: TextTokenizer, target: TextTokenizer, method: str, shard: tuple[pa.Table, pa.Table]
) -> Alignment:
    """Return the alignment of a pair; `min_edit_distance` has a map of the shard's own entries
    alone."""
    ours, theirs = list_token_bytes(source), list_token_bytes(target)
    maps = map_tokens(source, target, only_equal=method == "exact")
    if method == "min_edit_distance":
        plain = np.full(source.vocab_size, -1, dtype=np.int32)
        columns = [flatten_column(shard[1], name)[0] for name in ("top_ids", "token_ids")]
        used = np.unique(np.concatenate(columns))
        used = used[used >= 0]
        plain[used] = map_to_nearest(used.tolist(), source, target)
        maps = build_maps(plain, source, target)
    if method == "cooccurrence":
        counted = count_pairs(shard[0], ours, theirs)
        maps = build_maps(choose_most_matched(counted, maps[UNCHANGED, :-1]), source, target)
    return build_alignment(source, target, method, maps)


def make_shard(
    texts: list[str], source: TextTokenizer, target: TextTokenizer
) -> tuple[pa.Table, pa.Table]:
    corpus = make_corpus(texts, target, max_tokens=64)
    return corpus, make_captured(corpus, source, top_k=TOP_K)


def head_and_tail(table: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ids = flatten_column(table, "top_ids")[0].reshape(-1, TOP_K)
    tails = flatten_column(table, "tail_logprobs")[0]
    return ids, decode_probs(flatten_column(table, "top_logprobs")[0], ids, tails), tails


@pytest.mark.parametrize(("source", "target"), list(permutations(NAMES, 2)))
def test_mass_is_the_same_before_and_after_and_exact_is_a_part_of_bytes(
    source, target, tokenizers, excerpts
):
    ours, theirs = tokenizers[source], tokenizers[target]
    shard = make_shard(excerpts, ours, theirs)
    assert not all(shard[0]["ends_document"].to_pylist())
    _, before, tails = head_and_tail(shard[1])
    mass = before.sum(axis=1, dtype=np.float64) + np.exp(tails.astype(np.float64))
    np.testing.assert_allclose(mass, 1.0, atol=1e-3)
    signals: dict[str, np.ndarray] = {}
    for method in METHODS:
        table, stats = align_shard(*shard, make_alignment(ours, theirs, method, shard))
        signal = signals[method] = flatten_column(table, "has_signal")[0]
        ids, probs, tails = head_and_tail(table)
        assert signal.sum() == stats["with_signal"] > 0
        mass = probs.sum(axis=1, dtype=np.float64) + np.exp(tails.astype(np.float64))
        np.testing.assert_allclose(mass[signal], 1.0, atol=1e-3, err_msg=method)
        assert (ids[~signal] == -1).all()
        for row in ids[signal]:
            assert len(set(row[row >= 0])) == (row >= 0).sum()
        expected = np.exp(tails[signal].astype(float)).sum()
        assert stats["tail_mass"] == pytest.approx(expected, rel=1e-3)
    assert not (signals["exact"] & ~signals["bytes"]).any()
    np.testing.assert_array_equal(signals["cooccurrence"], signals["bytes"])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_a_captured_row_aligned_to_its_own_tokenizer_is_unchanged(
    name, method, tokenizers, excerpts
):
    tokenizer = tokenizers[name]
    shard = make_shard(excerpts, tokenizer, tokenizer)
    table, stats = align_shard(*shard, make_alignment(tokenizer, tokenizer, method, shard))
    assert stats["one_to_one"] == stats["with_signal"] > 0.5 * stats["positions"]
    signal = flatten_column(table, "has_signal")[0]
    before = flatten_column(shard[1], "top_ids")[0].reshape(-1, TOP_K)
    if method != "min_edit_distance":  # which knows of no token but those of the record
        following = np.append(flatten_column(shard[0], "target_ids")[0][1:], -1)
        in_head = (before == following[:, None]).any(axis=1) & signal
        assert in_head.sum() > 0.7 * signal.sum()
        signal = in_head
    for column in ("top_ids", "top_logprobs", "tail_logprobs"):
        ours, theirs = (
            flatten_column(each, column)[0].reshape(len(before), -1)[signal]
            for each in (shard[1], table)
        )
        np.testing.assert_array_equal(ours, theirs, err_msg=column)


def rename_ids(tokenizer: TextTokenizer, seed: int) -> tuple[TextTokenizer, np.ndarray]:
    """Return the same tokenizer with other ids, and the new id of each old one; -1 stays -1.

    Added tokens that are no entries of the model keep theirs: the library numbers them itself.
    """
    content = json.loads(tokenizer.backend.to_str())
    vocabulary = content["model"]["vocab"]
    new_ids = np.append(np.arange(tokenizer.vocab_size), -1)
    new_ids[: len(vocabulary)] = np.random.default_rng(seed).permutation(len(vocabulary))
    if isinstance(vocabulary, dict):
        content["model"]["vocab"] = {token: int(new_ids[i]) for token, i in vocabulary.items()}
    else:
        content["model"]["vocab"] = [vocabulary[i] for i in np.argsort(new_ids[: len(vocabulary)])]
        content["model"]["unk_id"] = int(new_ids[content["model"]["unk_id"]])
    for added in content["added_tokens"]:
        added["id"] = int(new_ids[added["id"]])
    start, eos = (
        None if role is None else int(new_ids[role])
        for role in (tokenizer.start_id, tokenizer.eos_id)
    )
    return build_tokenizer(json.dumps(content), start_id=start, eos_id=eos), new_ids


def replace_column(table: pa.Table, column: str, new_ids: np.ndarray) -> pa.Table:
    index = table.schema.get_field_index(column)
    rows = [new_ids[np.array(row, dtype=int)] for row in table[column].to_pylist()]
    return table.set_column(index, column, pa.array(rows, type=table.schema.field(column).type))


@pytest.mark.parametrize(
    ("source", "target"),
    [("gpt-neox-20b", "gpt2"), ("gpt2", "phi-3-mini"), ("t5-small", "mistral-7b")],
)
def test_other_ids_for_the_same_tokens_change_nothing_but_the_ids(
    source, target, tokenizers, excerpts
):
    ours, theirs = tokenizers[source], tokenizers[target]
    (new_ours, source_ids), (new_theirs, target_ids) = (
        rename_ids(each, seed) for seed, each in enumerate((ours, theirs))
    )
    corpus, captured = make_shard(excerpts, ours, theirs)
    new_corpus = replace_column(corpus, "target_ids", target_ids)
    assert new_corpus == make_corpus(excerpts, new_theirs, max_tokens=64)
    new_captured = captured
    for column in ("token_ids", "top_ids"):
        new_captured = replace_column(new_captured, column, source_ids)
    for method in ("bytes", "exact"):  # the others' ties go to the lowest id
        shard, new_shard = (corpus, captured), (new_corpus, new_captured)
        table, _ = align_shard(*shard, make_alignment(ours, theirs, method, shard))
        alignment = make_alignment(new_ours, new_theirs, method, new_shard)
        renamed, _ = align_shard(*new_shard, alignment)
        assert renamed == replace_column(table, "top_ids", target_ids)
