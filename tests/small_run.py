"""A small run of two models, made on the spot."""

import json
from pathlib import Path

import yaml

from tests.fakes import (
    SAMPLE,
    byte_level_tokenizer,
    save_model,
    save_tokenizer,
    sentencepiece_tokenizer,
)


def write_recipe(folder: Path) -> Path:
    """Write two models, documents and a recipe of all stages."""
    save_model("gpt_neox", 320, folder / "neox")
    save_tokenizer(byte_level_tokenizer(300), folder / "neox", bos="<|end|>", eos="<|end|>")
    save_model("llama", 330, folder / "target")
    save_tokenizer(sentencepiece_tokenizer(330), folder / "target", bos="<s>", eos="</s>")
    records = [{"id": f"d{i}", "text": SAMPLE[i % 4] * (2 + i % 3)} for i in range(40)]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "docs.jsonl").write_text(lines)
    recipe = {
        "storage": str(folder / "storage"),
        "corpus": {"documents": str(folder / "docs.jsonl"), "max_tokens": 64, "shard_tokens": 500},
        "target": {"model": str(folder / "target")},
        "sources": [{"name": "neox", "model": str(folder / "neox")}],
        "fuse": {"skip_noise": False},  # random weights know nothing
        "train": {"rows_per_step": 16, "num_workers": 2},
        "evaluate": {"held_out_share": 0.3},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path
