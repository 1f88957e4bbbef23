"""`cooccurrence`: the target token with which each source token co-occurs most often.

FuseChat, arXiv 2408.07990, section 3.2. Counts are sparse: memory grows with the pairs that occur,
never with the product of the vocabularies.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from rayfuse.align.answers import cut_answers, tokenize_answers
from rayfuse.align.matches import match_positions
from rayfuse.align.method import IdMap, MapInputs, Method, StoredMap
from rayfuse.align.methods.same_bytes import match_same_byte
from rayfuse.align.token_spans import TokenBytes, list_token_bytes, place_tokens
from rayfuse.align.vocab_map import UNCHANGED, map_vocabulary
from rayfuse.models.chat import ChatFormat, ChatTokens, load_chat_format
from rayfuse.models.files import load_recipe_tokenizer
from rayfuse.schema import ints
from rayfuse.storage.chat_columns import append_answers, read_messages
from rayfuse.storage.codec import build_list_column, flatten_column

SOURCE_SHIFT = 32
"""A pair is one integer: source id in the upper half, target id in the lower."""


@dataclass(frozen=True)
class PairCounts:
    """How often a source token and a target token began at the same byte."""

    pairs: Int[np.ndarray, " pairs"]
    """Distinct, sorted: source id * 2^32 + target id."""
    counts: Int[np.ndarray, " pairs"]


def count_pairs(corpus: pa.Table, source: TokenBytes, target: TokenBytes) -> PairCounts:
    """Count the pairs of tokens that begin at the same byte in CORPUS rows.

    Args:
        corpus: Rows; their text is tokenized with the source's tokenizer.
        source: A vocabulary with its tokenizer.
        target: The vocabulary of `target_ids`.
    """
    assert source.tokenizer is not None
    texts: list[str] = corpus["text"].to_pylist()
    ends_document: list[bool] = corpus["ends_document"].to_pylist()
    rows = source.tokenizer.encode_rows(texts, ends_document)
    return _count_matches(corpus, *_flatten(rows), source, target)


def count_answer_pairs(corpus: pa.Table, source: ChatFormat, target: ChatFormat) -> PairCounts:
    """Count the pairs of tokens that begin at the same byte of an answer.

    Args:
        corpus: CORPUS rows with `messages` and `answers`; the messages are tokenized in the
            source's chat template. Conversations that it cannot represent are skipped.
        source: The source's chat template.
        target: That of `target_ids`.
    """
    encoded = source.encode(read_messages(corpus))
    tokens = [row if isinstance(row, ChatTokens) else None for row in encoded]
    ids, offsets = _flatten([[] if row is None else row.ids for row in tokens])
    rows = pa.table(
        {"row_id": corpus["row_id"], "token_ids": build_list_column(ids, offsets, ints)}
    )
    ours, theirs = (list_token_bytes(tokenize_answers(chat)) for chat in (source, target))
    answers = cut_answers(corpus, append_answers(rows, tokens), theirs.start_id)
    own = answers.source.take_ids(ours.start_id)
    return _count_matches(answers.rows, own, answers.source.offsets, ours, theirs)


def _flatten(
    rows: Sequence[Sequence[int] | Int[np.ndarray, " _tokens"]],
) -> tuple[Int[np.ndarray, " tokens"], Int[np.ndarray, " rows_plus_1"]]:
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)])
    return np.concatenate([np.zeros(0, dtype=np.int32), *rows]).astype(np.int32), offsets


def _count_matches(
    corpus: pa.Table,
    ids: Int[np.ndarray, " tokens"],
    offsets: Int[np.ndarray, " rows_plus_1"],
    source: TokenBytes,
    target: TokenBytes,
) -> PairCounts:
    """Count pairs, given the source's tokens of all rows and where those of each row begin."""
    encoded = [text.encode() for text in corpus["text"].to_pylist()]
    ends_document: list[bool] = corpus["ends_document"].to_pylist()
    source_tokens = place_tokens(ids, offsets, encoded, source, ends_document)
    target_tokens = place_tokens(
        *flatten_column(corpus, "target_ids"), encoded, target, ends_document
    )
    matches = match_positions(source_tokens, target_tokens)
    # A token with a prefix space and one without differ by it, not in what they stand for.
    source_space = source_tokens.next_has_prefix_space[matches.source_at]
    same_space = source_space == target_tokens.next_has_prefix_space[matches.target_at]
    source_ids = source_tokens.ids[matches.source_at[same_space] + 1].astype(np.int64)
    target_ids = target_tokens.ids[matches.target_at[same_space] + 1]
    return add_counts(
        [PairCounts((source_ids << SOURCE_SHIFT) | target_ids, np.ones_like(source_ids))]
    )


def add_counts(parts: Sequence[PairCounts]) -> PairCounts:
    """Add up counts."""
    pairs = np.concatenate([np.zeros(0, dtype=np.int64), *(part.pairs for part in parts)])
    counts = np.concatenate([np.zeros(0, dtype=np.int64), *(part.counts for part in parts)])
    distinct, places = np.unique(pairs, return_inverse=True)
    sums = np.bincount(places, weights=counts, minlength=len(distinct)).astype(np.int64)
    return PairCounts(distinct, sums)


def choose_most_matched(counted: PairCounts, unseen: IdMap) -> IdMap:
    """Map each source token to the target token that it was matched to most often.

    Args:
        counted: Over the entire corpus; of equal counts the lowest target id is chosen.
        unseen: The map of tokens that do not occur in the corpus.
    """
    source_ids = counted.pairs >> SOURCE_SHIFT
    target_ids = counted.pairs & ((1 << SOURCE_SHIFT) - 1)
    order = np.lexsort((target_ids, -counted.counts, source_ids))
    sources, firsts = np.unique(source_ids[order], return_index=True)
    mapped = unseen.copy()
    mapped[sources] = target_ids[order][firsts]
    return mapped


def _list_shards(inputs: MapInputs) -> list[int]:
    return sorted(inputs.corpus.list_committed())


def _count_shard(inputs: MapInputs, shard: int) -> PairCounts:
    commit = inputs.corpus.read_commit(shard)
    if inputs.is_chat:
        rows = inputs.corpus.read_shard(commit)
        return count_answer_pairs(rows, *map(load_chat_format, (inputs.source, inputs.target)))
    rows = inputs.corpus.read_shard(commit, columns=["text", "ends_document", "target_ids"])
    source, target = (
        list_token_bytes(load_recipe_tokenizer(model)) for model in (inputs.source, inputs.target)
    )
    return count_pairs(rows, source, target)


def _finish(inputs: MapInputs, counted: PairCounts) -> IdMap:
    source, target = (
        tokenize_answers(load_chat_format(model))
        if inputs.is_chat
        else load_recipe_tokenizer(model)
        for model in (inputs.source, inputs.target)
    )
    return choose_most_matched(counted, map_vocabulary(source, target)[UNCHANGED, :-1])


METHOD = Method(
    match=match_same_byte,
    stored_map=StoredMap(_list_shards, _count_shard, add_counts, _finish, unit="shards"),
)
