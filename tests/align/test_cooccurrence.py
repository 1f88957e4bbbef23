import numpy as np

from benchmarks.synthetic import make_corpus
from rayfuse.align.methods.cooccurrence import (
    PairCounts,
    add_counts,
    choose_most_matched,
    count_pairs,
)
from rayfuse.align.token_spans import list_token_bytes
from rayfuse.models.text_tokenizer import build_tokenizer
from tests.fakes import SAMPLE, byte_level_tokenizer, sentencepiece_tokenizer

SOURCE = build_tokenizer(byte_level_tokenizer(320).to_str(), start_id=0, eos_id=0)
TARGET = build_tokenizer(sentencepiece_tokenizer(340).to_str(), start_id=1, eos_id=2)


def counts_of(pairs: dict[tuple[int, int], int]) -> PairCounts:
    ids = np.array([source << 32 | target for source, target in pairs], dtype=np.int64)
    return add_counts([PairCounts(ids, np.array(list(pairs.values())))])


def test_frequent_pairs_beat_rare_ones_and_ties_go_to_the_lowest_id():
    counted = counts_of({(1, 9): 1, (1, 4): 100, (2, 8): 5, (2, 3): 5})
    mapped = choose_most_matched(counted, np.array([7, 7, 7, 7], dtype=np.int32))
    assert mapped.tolist() == [7, 4, 3, 7]  # 0 and 3 were never seen


def test_counts_add_up_over_shards_in_any_order():
    parts = [counts_of({(1, 2): 3, (1, 5): 1}), counts_of({(1, 2): 4}), counts_of({(0, 0): 1})]
    for order in (parts, parts[::-1]):
        total = add_counts(order)
        assert dict(zip(total.pairs.tolist(), total.counts.tolist(), strict=True)) == {
            0: 1,
            (1 << 32) + 2: 7,
            (1 << 32) + 5: 1,
        }


def test_a_tokens_partner_in_the_text_begins_where_it_does():
    corpus = make_corpus(SAMPLE, TARGET, max_tokens=512)
    counted = count_pairs(corpus, list_token_bytes(SOURCE), list_token_bytes(TARGET))
    for pair in counted.pairs.tolist():
        ours, theirs = SOURCE.token_bytes[pair >> 32], TARGET.token_bytes[pair & (2**32 - 1)]
        if ours and theirs:
            assert ours.startswith(theirs) or theirs.startswith(ours)


def test_a_tokenizer_is_matched_to_itself():
    corpus = make_corpus(SAMPLE, SOURCE, max_tokens=512)
    vocabulary = list_token_bytes(SOURCE)
    counted = count_pairs(corpus, vocabulary, vocabulary)
    mapped = choose_most_matched(counted, np.arange(SOURCE.vocab_size))
    np.testing.assert_array_equal(mapped, np.arange(SOURCE.vocab_size))
