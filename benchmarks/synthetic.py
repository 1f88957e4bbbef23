"""Synthetic captured records: real text and tokens, random probabilities."""

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from rayfuse.capture.rows import build_captured, tokenize_rows
from rayfuse.capture.top_k import TopLogprobs
from rayfuse.corpus.documents import Document
from rayfuse.corpus.shards import build_rows
from rayfuse.models.tokenizer import TextTokenizer

POOL_ROWS, FREQUENT_TOKENS = 4096, 2000


def make_corpus(texts: list[str], target: TextTokenizer, *, max_tokens: int) -> pa.Table:
    """Build CORPUS rows of texts, each a document."""
    documents = [Document(f"d{number}", "", text) for number, text in enumerate(texts)]
    return build_rows(documents, target, [target], max_tokens=max_tokens)


def make_captured(
    corpus: pa.Table, source: TextTokenizer, *, top_k: int, seed: int = 0, uniform: bool = False
) -> pa.Table:
    """Build CAPTURED rows with k tokens at each position, drawn by their frequency in the text.

    The true next token is among them in nine of ten cases. With `uniform` the tokens are drawn
    uniformly from the vocabulary; most of them are rare and absent from the target's.
    """
    random = np.random.default_rng(seed)
    rows = tokenize_rows(corpus, source)
    tokens = np.arange(1, source.vocab_size) if uniform else np.concatenate(rows)
    pool = _draw_tokens(tokens, top_k, FREQUENT_TOKENS if not uniform else len(tokens), random)
    records = [_make_record(row, pool, random) for row in rows]
    return build_captured(corpus, rows, records, source.eos_id)[0]


def _draw_tokens(
    tokens: Int[np.ndarray, " _"], top_k: int, num_frequent: int, random: np.random.Generator
) -> Int[np.ndarray, "pool top_k"]:
    """Draw many sets of k distinct tokens, by their frequency in the text (Gumbel top-k)."""
    ids, counts = np.unique(tokens, return_counts=True)
    if len(ids) < 4 * top_k:  # too few distinct tokens in the text: add others
        ids, counts = np.arange(4 * top_k), np.ones(4 * top_k)
    frequent = np.argsort(-counts, kind="stable")[:num_frequent]
    pool = np.empty((POOL_ROWS, top_k), dtype=np.int32)
    for row in pool:
        scores = np.log(counts[frequent]) + random.gumbel(size=len(frequent))
        row[:] = ids[frequent][np.argpartition(-scores, top_k)[:top_k]]
    return pool


def _make_record(
    row: Int[np.ndarray, " seq_len"],
    pool: Int[np.ndarray, "pool top_k"],
    random: np.random.Generator,
) -> TopLogprobs:
    seq_len, top_k = len(row), pool.shape[1]
    ids = pool[random.integers(0, len(pool), seq_len)]
    following = np.append(row[1:], row[-1:])
    is_absent = (ids != following[:, None]).all(axis=1) & (random.random(seq_len) < 0.9)
    ranks = np.minimum(random.geometric(0.5, seq_len) - 1, top_k - 1)
    ids[is_absent, ranks[is_absent]] = following[is_absent]
    probs = _draw_probs(seq_len, top_k + 1, random)
    is_next = ids == following[:, None]
    in_head = (probs[:, :-1] * is_next).sum(axis=1)
    next_probs = np.where(is_next.any(axis=1), in_head, probs[:, -1] / 10)
    next_probs[-1:] = 1.0
    return TopLogprobs(
        ids, np.log(probs[:, :-1]), np.log(probs[:, -1]), np.log(next_probs), ids[:, :0]
    )


def _draw_probs(
    seq_len: int, parts: int, random: np.random.Generator
) -> Float[np.ndarray, "seq_len parts"]:
    """Draw sorted distributions of varied entropy; the last part is the tail."""
    logits = -np.sort(random.exponential(random.uniform(0.5, 3, (seq_len, 1)), (seq_len, parts)))
    probs = np.exp(logits)
    return probs / probs.sum(axis=1, keepdims=True)
