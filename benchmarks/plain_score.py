"""Score a published model with transformers alone: nothing of rayfuse is imported.

    python benchmarks/plain_score.py MODEL HELD_OUT SCORES.json

MODEL is the folder `model` of a training, HELD_OUT the folder `corpus/held-out-...`, and SCORES
that model's file in `evaluate/`. Each row is scored as stored: a start token (EOS where there is no
BOS) and its text. Prints the bits per byte beside the stored ones, and the largest relative
difference of a document's NLL; exits with 1 if that is above 1e-4.
"""

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

MAX_DIFFERENCE = 1e-4


@torch.inference_mode()
def measure_nats(model: Any, tokenizer: Any, text: str) -> float:
    """Compute the NLL of a row's text in nats."""
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    row = torch.tensor([start, *tokenizer(text, add_special_tokens=False)["input_ids"]])
    logits = model(input_ids=row[None]).logits[0, :-1].double()
    return float(torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum"))


def compare(model_folder: Path, held_out: Path, scores: Path) -> dict[str, float]:
    """Score all held-out rows, and compare the NLL of each document with the stored one."""
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(model_folder)
    nats: dict[str, float] = defaultdict(float)
    for commit in sorted((held_out / "commits").glob("*.json")):
        table = pq.read_table(held_out / json.loads(commit.read_text())["file"])
        for row in table.select(["doc_id", "text"]).to_pylist():
            nats[row["doc_id"]] += measure_nats(model.eval(), tokenizer, row["text"])
    stored = {one["doc_id"]: one for one in json.loads(scores.read_text())["documents"]}
    bits = math.log(2) * sum(one["num_bytes"] for one in stored.values())
    return {
        "documents": len(stored),
        "bits_per_byte": sum(nats[name] for name in stored) / bits,
        "bits_per_byte_stored": sum(one["nats"] for one in stored.values()) / bits,
        "largest_relative_difference": max(
            abs(nats[name] - one["nats"]) / one["nats"] for name, one in stored.items()
        ),
    }


def main() -> None:
    """Compare, print, and exit with 1 if they differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "held_out", "scores"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    found = compare(given.model, given.held_out, given.scores)
    print(json.dumps(found, indent=1))
    if found["largest_relative_difference"] > MAX_DIFFERENCE:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
