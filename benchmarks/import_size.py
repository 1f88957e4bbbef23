"""Bytes per token of stores of other tools, before and after import, and the error of estimates.

    python -m benchmarks.import_size [--json]

The distributions are those of the models that ship with rayfuse, on pages of its documentation. The
stores are written by the layouts that DistillKit and FuseLLM publish (`tests/imports/stores.py`).
Where the next token is not in the top k, stores have no log-probability of it: three estimates are
compared with the truth, in nats.
"""

import argparse
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks.synthetic import make_corpus
from rayfuse.imports.capture import Importer, index_rows
from rayfuse.imports.store import list_vocabulary, open_foreign_store
from rayfuse.models.tokenizer import load_tokenizer
from rayfuse.storage.parquet import encode_table
from tests.imports.stores import log_softmax, take_top, write_distillkit, write_fusellm

MODELS = ("neox-prose", "llama-code", "gpt2-target")
PAGES = ("docs/architecture.md", "CONTRIBUTING.md", "CHANGELOG.md")
TEXT_CHARACTERS, NUM_TEXTS = 300, 60

Scored = list[tuple[list[int], np.ndarray]]


def score(model: str, texts: list[str]) -> Scored:
    """Compute tokens and logits of each text, between start token and EOS."""
    tokenizer = load_tokenizer(model)
    lm = AutoModelForCausalLM.from_pretrained(model).float().eval()
    rows = [
        [tokenizer.start_id, *row.tolist(), tokenizer.eos_id] for row in tokenizer.encode(texts)
    ]
    with torch.inference_mode():
        logits = [lm(torch.tensor([row])).logits[0, :, : tokenizer.vocab_size] for row in rows]
    return [(row, part.numpy()) for row, part in zip(rows, logits, strict=True)]


def measure_sizes(model: str, texts: list[str], scored: Scored, folder: Path) -> dict[str, Any]:
    """Measure the bytes per token of each store and of the captured rows made from it."""
    tokenizer = load_tokenizer(model)
    vocab_size, num_tokens = tokenizer.vocab_size, sum(len(row) for row, _ in scored)
    write_distillkit(folder / "DistillKit, top 12", scored, vocab_size=vocab_size)
    plain = folder / "DistillKit, top 12, plain"
    write_distillkit(plain, scored, plain=True, vocab_size=vocab_size)
    with_texts = [(text, *row) for text, row in zip(texts, scored, strict=True)]
    for length in (max(len(row) for row, _ in scored), 2048):
        name = f"FuseLLM, top 10, padded to {length}"
        write_fusellm(folder / name, with_texts, length=length, with_losses=True)
    corpus = make_corpus(texts, tokenizer, max_tokens=2048)
    vocabulary = list_vocabulary(tokenizer)
    sizes: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        store = open_foreign_store(str(path))
        index = index_rows(store, vocabulary)
        importer = Importer(store, tokenizer, vocabulary, store.format.top_k, index)
        table, rejects, *_ = importer.import_rows(corpus)
        assert not rejects
        after = len(encode_table(table, "0" * 12, 0)) / num_tokens
        sizes[path.name] = {"before": store.num_bytes / num_tokens, "after": after}
    return sizes


def measure_estimates(scored: Scored, k: int) -> dict[str, float]:
    """Measure the mean log-probability of next tokens outside the top k, and of its estimates."""
    logprobs = log_softmax(np.concatenate([logits[:-1] for _, logits in scored]))
    following = np.concatenate([np.array(row[1:]) for row, _ in scored])
    ids, values = take_top(logprobs, k)
    outside = (ids != following[:, None]).all(axis=1)
    tails = np.log(np.maximum(1 - np.exp(values).sum(axis=1), 1e-7))
    share, least = tails - np.log(logprobs.shape[1] - k), np.minimum(values[:, -1], tails)
    truth = np.take_along_axis(logprobs, following[:, None], 1)[:, 0]
    means = {"truth": truth, "equal share": share, "least entry": least}
    means["middle of both"] = (share + least) / 2
    found = {name: float(array[outside].mean()) for name, array in means.items()}
    return found | {"share outside": float(outside.mean())}


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    as_json = parser.parse_args().json
    logging.disable(logging.WARNING)
    text = "".join(Path(page).read_text() for page in PAGES)
    starts = range(0, NUM_TEXTS * TEXT_CHARACTERS, TEXT_CHARACTERS)
    texts = [text[start : start + TEXT_CHARACTERS] for start in starts]
    results: dict[str, Any] = {"bytes per token": {}, "estimates": {}}
    for name in MODELS:
        model = f"rayfuse/demo/models/{name}"
        scored = score(model, texts)
        results["estimates"][name] = {k: measure_estimates(scored, k) for k in (10, 64)}
        if name == MODELS[0]:
            with tempfile.TemporaryDirectory() as folder:
                sizes = measure_sizes(model, texts, scored, Path(folder))
            results["bytes per token"] = sizes
    if as_json:
        print(json.dumps(results))
        return
    for name, size in results["bytes per token"].items():
        print(f"{name:<36} {size['before']:7.1f} -> {size['after']:5.1f} bytes a token")
    for name, by_k in results["estimates"].items():
        for k, means in by_k.items():
            print(f"{name:<12} k {k:>2}", *(f"{key} {value:.2f}" for key, value in means.items()))


if __name__ == "__main__":
    main()
