"""A small run of all stages, for tests of clusters."""

import json
import os
import random
from pathlib import Path

import yaml

from tests.fakes import byte_level_tokenizer, save_model, save_tokenizer, sentencepiece_tokenizer

IS_LONG = bool(os.environ.get("RAYFUSE_LONG_CHAOS"))
"""The form for the log: half an hour of kills, another model beside the first."""


def write_models_and_text(folder: Path, num_documents: int) -> None:
    """Write a source, a target and documents."""
    words = "the cat sat on a mat, dogs look while 42 boxes add up to (x + y) * z"
    save_model("gpt_neox", 320, folder / "neox")
    save_tokenizer(byte_level_tokenizer(300), folder / "neox", bos="<|end|>", eos="<|end|>")
    save_model("llama", 330, folder / "target")
    save_tokenizer(sentencepiece_tokenizer(330), folder / "target", bos="<s>", eos="</s>")
    choose = random.Random(11)
    with open(folder / "docs.jsonl", "w") as out:
        for i in range(num_documents):
            text = " ".join(choose.choices(words.split(), k=choose.randint(40, 200)))
            out.write(json.dumps({"id": f"d{i}", "text": text}) + "\n")


def write_recipe(folder: Path, name: str, storage: str) -> Path:
    recipe = {
        "storage": storage,
        "corpus": {
            "documents": str(folder / "docs.jsonl"),
            "max_tokens": 128,
            "shard_tokens": 4_000,
        },
        "target": {"model": str(folder / "target")},
        "sources": [{"name": "neox", "model": str(folder / "neox")}],
        "capture": {"batch_tokens": 512},
        "fuse": {"skip_noise": False},  # random weights know nothing
        "train": {
            "rows_per_step": 8,
            "num_workers": 2,
            "checkpoint_every_steps": 10,
            "learning_rate": 0.001,
            "max_failures": 100,
            "baseline": IS_LONG,
        },
        "evaluate": {"held_out_share": 0.1},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path
