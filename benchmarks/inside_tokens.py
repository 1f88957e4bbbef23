"""What `align.inside_tokens` adds with a real model as the source, and how good it is, by domain.

    python benchmarks/inside_tokens.py MODEL TOKENIZER... [--data DIR] [--characters N] [--json]

MODEL is a folder with weights; each TOKENIZER a folder, as the target's. Two documents of each
domain are captured in float32 on the CPU, top 16. Printed are percents of target positions: with a
signal at a token's start + with one inside a token / at most. Then, over the positions inside:
the mean mass of the head, how often the token that really comes next is in it (a calibrated head is
no larger), how often it is the likeliest, and the NLL of the outcome, the tail being one.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from align import DOMAINS, read_texts
from synthetic import make_corpus
from transformers import AutoModelForCausalLM

from rayfuse.align.inside_tokens import find_inside_positions
from rayfuse.align.method import build_alignment
from rayfuse.align.shard import align_shard
from rayfuse.align.token_spans import place_tokens
from rayfuse.capture.rows import build_captured, tokenize_rows
from rayfuse.capture.top_k import MIN_RESOLVED_TAIL, TopLogprobs
from rayfuse.models.tokenizer import TextTokenizer, load_tokenizer
from rayfuse.storage.codec import decode_probs, flatten_column

TOP_K, DOCUMENTS, MIN_CHARACTERS = 16, 2, 300
ANY_TOKENS = 1 << 20


def choose_texts(data: Path, domain: str, characters: int) -> list[str]:
    """Return the beginnings of a domain's first documents."""
    texts = [text for text in read_texts(data, domain, 60_000) if len(text) > MIN_CHARACTERS]
    return [text[:characters] for text in texts[:DOCUMENTS]]


@torch.inference_mode()
def capture(model: Any, corpus: pa.Table, tokenizer: TextTokenizer) -> pa.Table:
    """Capture rows with transformers alone."""
    rows, records = tokenize_rows(corpus, tokenizer), []
    for row in rows:
        ids = torch.from_numpy(row.astype(np.int64))
        logprobs = model(input_ids=ids[None]).logits[0, :, : tokenizer.vocab_size].log_softmax(1)
        top = logprobs.topk(TOP_K, dim=1)
        following = logprobs[:-1].gather(1, ids[1:, None])[:, 0]
        tail = (1 - top.values.double().exp().sum(1)).clamp(min=MIN_RESOLVED_TAIL).log()
        arrays = (top.indices.int(), top.values, tail, torch.cat([following, torch.zeros(1)]))
        records.append(TopLogprobs(*(each.numpy() for each in arrays), top.indices[:, :0].numpy()))
    return build_captured(corpus, rows, records, tokenizer.eos_id)[0]


def measure(
    texts: list[str], captured: pa.Table, source: TextTokenizer, target: TextTokenizer
) -> dict[str, np.ndarray | float]:
    """Align a domain's rows, and look at the token that really comes next."""
    corpus = make_corpus(texts, target, max_tokens=ANY_TOKENS)
    alignment = build_alignment(source, target, inside_tokens=True)
    table, stats = align_shard(corpus, captured, alignment)
    encoded, ends = [text.encode() for text in texts], [True] * len(texts)
    target_ids, offsets = flatten_column(corpus, "target_ids")
    most = find_inside_positions(
        place_tokens(*flatten_column(captured, "token_ids"), encoded, alignment.source, ends),
        place_tokens(target_ids, offsets, encoded, alignment.target, ends),
    )
    at = np.flatnonzero(flatten_column(table, "inside_token")[0])
    ids = flatten_column(table, "top_ids")[0].reshape(-1, TOP_K)[at]
    tails = flatten_column(table, "tail_logprobs")[0][at]
    codes = flatten_column(table, "top_logprobs")[0].reshape(-1, TOP_K)[at]
    probs = decode_probs(codes.reshape(-1), ids, tails)
    is_next = ids == target_ids[at + 1][:, None]
    of_next = (probs * is_next).sum(axis=1)
    tail = np.exp(tails.astype(np.float32))
    return {
        "positions": stats["positions"],
        "at_start": stats["with_signal"] - stats["inside_tokens"],
        "inside": stats["inside_tokens"],
        "at_most": float(len(most.target_at)),
        "head": 1 - tail,
        "in_head": is_next.any(axis=1),
        "is_likeliest": is_next[:, 0],
        "nll": -np.log(np.maximum(np.where(is_next.any(axis=1), of_next, tail), 1e-6)),
    }


def summarize(domains: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Summarize a pair: shares by domain, and means over all positions inside tokens."""
    shares = {
        domain: [
            100 * found[name] / found["positions"] for name in ("at_start", "inside", "at_most")
        ]
        for domain, found in domains.items()
    }
    columns = {
        name: np.concatenate([found[name] for found in domains.values()])
        for name in ("head", "in_head", "is_likeliest", "nll")
    }
    means = {name: float(column.mean()) for name, column in columns.items() if len(column)}
    return {"shares": shares, "inside": len(columns["nll"])} | means


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("tokenizers", nargs="+")
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared/data")
    parser.add_argument("--characters", type=int, default=1500, help="of each document")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    source = load_tokenizer(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    texts = {
        domain: choose_texts(arguments.data, domain, arguments.characters) for domain in DOMAINS
    }
    captured = {
        domain: capture(model, make_corpus(own, source, max_tokens=ANY_TOKENS), source)
        for domain, own in texts.items()
    }
    for name in arguments.tokenizers:
        target = load_tokenizer(name)
        found = summarize(
            {domain: measure(texts[domain], captured[domain], source, target) for domain in DOMAINS}
        )
        if arguments.json:
            print(json.dumps({"source": arguments.model, "target": name} | found))
            continue
        shares = found.pop("shares").items()
        cells = [f"{domain} {a:.0f}+{b:.1f}/{c:.1f}" for domain, (a, b, c) in shares]
        print(f"{Path(name).name}: {', '.join(cells)}; {found}")


if __name__ == "__main__":
    main()
