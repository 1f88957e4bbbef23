"""How exact records of a bfloat16 model are: its head's product in bfloat16, and in float32.

    python -m benchmarks.half_precision MODEL TEXT.jsonl.gz [--rows 16] [--json]

MODEL is a folder or hub id. The hidden states are those of the model in bfloat16; the reference is
the product of the same states and weights in float64.
"""

import argparse
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.timing import time_interleaved
from rayfuse.config.models import ModelSettings
from rayfuse.models.batching import pad_rows
from rayfuse.models.causal_lm import CausalLM, load_causal_lm
from rayfuse.models.files import load_recipe_tokenizer
from rayfuse.models.head_product import multiply_head

ROW_TOKENS = 512
TOP_K = 16
REPEATS = 5

Product = Callable[[torch.Tensor, CausalLM], torch.Tensor]

PRODUCTS: dict[str, Product] = {
    "bfloat16": lambda hidden, lm: nn.functional.linear(hidden, lm.head.weight).float(),
    "float32": lambda hidden, lm: multiply_head(hidden, lm.head.weight, lm.head.bias),
    "float64": lambda hidden, lm: hidden.double() @ lm.head.weight.double().T,
}
"""Heads without a bias."""

REFERENCE = "float64"


@torch.inference_mode()
def measure(model: str, text: Path, rows: int) -> dict[str, dict[str, float]]:
    """Measure the errors of the next token's log-probability and of the tail, and the time."""
    settings = ModelSettings(model=model, dtype="bfloat16")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lm, tokenizer = load_causal_lm(settings, device), load_recipe_tokenizer(settings)
    with gzip.open(text, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line, _ in zip(lines, range(rows), strict=False)]
    ids = [row[:ROW_TOKENS] for row in tokenizer.encode_rows(texts, [False] * len(texts))]
    kept = torch.cat([torch.arange(len(row) - 1) + i * ROW_TOKENS for i, row in enumerate(ids)])
    padded = nn.functional.pad(pad_rows(ids), (0, ROW_TOKENS))[:, :ROW_TOKENS].to(device)
    hidden = lm.hidden_states(padded).flatten(0, 1)[kept.to(device)]
    following = padded.flatten()[kept.to(device) + 1]
    found = compare_products(hidden, lm, following)
    found["positions"] = {"number": float(len(kept))}
    return found


@torch.inference_mode()
def compare_products(
    hidden: torch.Tensor, lm: CausalLM, following: torch.Tensor
) -> dict[str, dict[str, float]]:
    """Measure the errors and the median seconds of every product but the reference.

    Args:
        hidden: The head's inputs.
        lm: The model that the head belongs to.
        following: The token that comes next at each position.
    """
    records = {
        name: _record(lm.transform.apply(product(hidden, lm)), following)
        for name, product in PRODUCTS.items()
    }
    compared = [name for name in PRODUCTS if name != REFERENCE]
    timings = time_interleaved(
        {name: lambda name=name: PRODUCTS[name](hidden, lm) for name in compared},
        hidden.device,
        rounds=REPEATS,
    )
    found: dict[str, dict[str, float]] = {}
    for name in compared:
        errors = {
            what: (records[name][what].double() - exact).abs()
            for what, exact in records[REFERENCE].items()
        }
        found[name] = {
            f"{which} error of {what}": float(getattr(error, which)())
            for what, error in errors.items()
            for which in ("max", "mean")
        }
        found[name]["seconds"] = timings.median(name)
    return found


def _record(logits: torch.Tensor, following: torch.Tensor) -> dict[str, torch.Tensor]:
    logprobs = logits.log_softmax(1)
    return {
        "next token (nats)": logprobs.gather(1, following[:, None])[:, 0].double(),
        "tail (mass)": 1 - logprobs.topk(TOP_K, dim=1).values.double().exp().sum(1),
    }


def main() -> None:
    """Print the errors and the seconds of the product."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    found = measure(given.model, given.text, given.rows)
    if given.json:
        print(json.dumps(found))
        return
    for name, values in found.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.3g}" for key, value in values.items()))


if __name__ == "__main__":
    main()
