"""Records as a source LLM would give them, without one: real text and tokens, made-up numbers."""

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from rayfuse.capture.rows import build_captured, tokenise_rows
from rayfuse.capture.top_k import TopLogprobs
from rayfuse.corpus.documents import Document
from rayfuse.corpus.shards import build_rows
from rayfuse.models.tokenizer import TextTokenizer

POOL_ROWS, FREQUENT_TOKENS = 4096, 2000


def make_corpus(texts: list[str], target: TextTokenizer, *, max_tokens: int) -> pa.Table:
    """Return CORPUS rows of texts, each a document."""
    documents = [Document(f"d{number}", "", text) for number, text in enumerate(texts)]
    return build_rows(documents, target, [target], max_tokens=max_tokens)


def make_captured(
    corpus: pa.Table, source: TextTokenizer, *, top_k: int, seed: int = 0, uniform: bool = False
) -> pa.Table:
    """Return CAPTURED rows: at each position k tokens of the text, frequent ones more often.

    The token that really comes next is among them nine times in ten. With `uniform` they are any
    tokens of the vocabulary, most of them rare ones that the target does not have.
    """
    random = np.random.default_rng(seed)
    rows = tokenise_rows(corpus, source)
    tokens = np.arange(1, source.vocab_size) if uniform else np.concatenate(rows)
    pool = _draw_tokens(tokens, top_k, FREQUENT_TOKENS if not uniform else len(tokens), random)
    records = [_make_record(row, pool, random) for row in rows]
    return build_captured(corpus, rows, records, source.eos_id)[0]


def _draw_tokens(
    tokens: Int[np.ndarray, " _"], top_k: int, num_frequent: int, random: np.random.Generator
) -> Int[np.ndarray, "pool top_k"]:
    """Return many draws of k distinct tokens, by their frequency in the text."""
    ids, counts = np.unique(tokens, return_counts=True)
    if len(ids) < 4 * top_k:  # a text of few words: any tokens will do beside them
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
    return TopLogprobs(ids, np.log(probs[:, :-1]), np.log(probs[:, -1]), np.log(next_probs))


def _draw_probs(
    seq_len: int, parts: int, random: np.random.Generator
) -> Float[np.ndarray, "seq_len parts"]:
    """Return distributions that fall off from sure to unsure; the last part is the tail."""
    logits = -np.sort(random.exponential(random.uniform(0.5, 3, (seq_len, 1)), (seq_len, parts)))
    probs = np.exp(logits)
    return probs / probs.sum(axis=1, keepdims=True)
