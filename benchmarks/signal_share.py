"""Share of target positions with a signal by method: all pairs of tokenizers, by domain.

    python benchmarks/signal_share.py [--data DIR] [--json]

Prints a Markdown table: `bytes / exact / min_edit_distance`, percent of target positions. The last
counts the positions that the papers' rule accepts, with its own vocabulary map.
"""

import argparse
import json
from itertools import permutations
from pathlib import Path

import numpy as np
from align import DOMAINS, read_texts

from rayfuse.align.method import Alignment, load_method
from rayfuse.align.methods.min_edit_distance import map_to_nearest
from rayfuse.align.token_spans import (
    PlacedTokens,
    TokenBytes,
    list_token_bytes,
    place_tokens,
)
from rayfuse.align.vocab_map import build_maps
from rayfuse.models.tokenizer import TextTokenizer, load_tokenizer

NAMES = (
    *("gpt2", "gpt-neox-20b", "mistral-7b", "open-llama-3b", "phi-3-mini", "stories260k"),
    *("t5-small", "bert-base-uncased"),
)
COMPARED = ("bytes", "exact", "min_edit_distance")
ROW_CHARACTERS, ROWS = 3000, 10

Placed = tuple[PlacedTokens, TokenBytes]


def place(tokenizer: TextTokenizer, texts: list[str]) -> Placed:
    """Return texts in a tokenizer's tokens."""
    ends_document = [True] * len(texts)
    rows = tokenizer.encode_rows(texts, ends_document)
    offsets = np.cumsum([0, *(len(row) for row in rows)])
    vocabulary = list_token_bytes(tokenizer)
    encoded = [text.encode() for text in texts]
    ids = np.concatenate(rows)
    return place_tokens(ids, offsets, encoded, vocabulary, ends_document), vocabulary


def share_of_methods(source: Placed, target: Placed, maps: np.ndarray) -> list[float]:
    """Compute the percent of target positions with a signal for each of `COMPARED`."""
    positions = int(target[0].has_next.sum())
    shares: list[float] = []
    for name in COMPARED:
        alignment = Alignment(source[1], target[1], maps, load_method(name))
        matches = alignment.method.match(source[0], target[0], alignment)
        shares.append(100 * len(matches.target_at) / positions)
    return shares


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared/data")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    folder = arguments.data / "tokenizers"
    tokenizers = {name: load_tokenizer(str(folder / name)) for name in NAMES}
    rows: dict[str, list[str]] = {}
    for domain in DOMAINS:
        text = "\n".join(read_texts(arguments.data, domain, ROW_CHARACTERS * ROWS))
        starts = range(0, ROW_CHARACTERS * ROWS, ROW_CHARACTERS)
        rows[domain] = [text[start : start + ROW_CHARACTERS] for start in starts]
    placed = {
        (name, domain): place(tokenizer, rows[domain])
        for name, tokenizer in tokenizers.items()
        for domain in DOMAINS
    }
    result: dict[str, dict[str, list[float]]] = {}
    for ours, theirs in permutations(NAMES, 2):
        source, target = tokenizers[ours], tokenizers[theirs]
        maps = build_maps(map_to_nearest(range(source.vocab_size), source, target), source, target)
        result[f"{ours} → {theirs}"] = {
            domain: share_of_methods(placed[ours, domain], placed[theirs, domain], maps)
            for domain in DOMAINS
        }
    if arguments.json:
        print(json.dumps(result, ensure_ascii=False))
        return
    print(f"| source → target | {' | '.join(DOMAINS)} |")
    print(f"| --- |{' --- |' * len(DOMAINS)}")
    for pair, shares in result.items():
        cells = [" / ".join(f"{share:.0f}" for share in shares[domain]) for domain in DOMAINS]
        print(f"| {pair} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
