"""Make tests/data/store-schema-4.tar.gz: a small store as commit dc732a4 wrote it.

Run it with that commit checked out in CHECKOUT:
    PYTHONPATH=CHECKOUT python tests/data/make_store.py /tmp/store-schema-4 store-schema-4.tar.gz
It runs all stages for two tiny sources, with `align.method: mined`, and packs the storage folder.
"""

import json
import os
import secrets
import sys
import tarfile
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

from rayfuse.pipeline import STAGES, prepare_run, run_stages
from rayfuse.progress import report_nothing
from rayfuse.recipe import Recipe, parse_recipe
from rayfuse.session import join_cluster
from tests.fakes import (
    SAMPLE,
    byte_level_tokenizer,
    save_model,
    save_tokenizer,
    sentencepiece_tokenizer,
)


def write_inputs(folder: Path) -> Recipe:
    """Write three tiny models, 12 documents and an empty one, and return their recipe."""
    for name, family, size in (("neox", "gpt_neox", 300), ("gpt2", "gpt2", 280)):
        save_model(family, size + 20, folder / name)
        save_tokenizer(byte_level_tokenizer(size), folder / name, bos="<|end|>", eos="<|end|>")
    save_model("llama", 330, folder / "target")
    save_tokenizer(sentencepiece_tokenizer(330), folder / "target", bos="<s>", eos="</s>")
    records = [{"id": f"d{i}", "text": SAMPLE[i % 4] * (1 + i % 3)} for i in range(12)]
    records.append({"id": "empty", "text": ""})
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "docs.jsonl").write_text(lines)
    return parse_recipe(
        {
            "storage": str(folder / "storage"),
            "corpus": {
                "documents": str(folder / "docs.jsonl"),
                "max_tokens": 64,
                "shard_tokens": 100,
            },
            "capture": {"top_k": 4},
            "align": {"method": "mined"},
            "target": {"model": str(folder / "target")},
            "sources": [{"name": name, "model": str(folder / name)} for name in ("neox", "gpt2")],
            "fuse": {"skip_noise": False},  # random weights know nothing
            "train": {"rows_per_step": 8},
            "evaluate": {"held_out_share": 0.3},
        }
    )


def is_omitted(name: str) -> bool:
    """Check whether a file stays out of the archive, which is to be small."""
    is_second_model = name.startswith("train/clm") and name.endswith(".safetensors")
    return is_second_model or "/ray/" in name or name.endswith((".png", ".html"))


def main() -> None:
    """Run the stages and pack the store."""
    folder, archive = Path(sys.argv[1]), sys.argv[2]
    folder.mkdir(parents=True)
    recipe = write_inputs(folder)
    join_cluster()
    run_stages(recipe, prepare_run(recipe), STAGES, report_nothing, print)
    with tarfile.open(archive, "w:gz") as packed:
        for path in sorted(Path(recipe.storage).rglob("*")):
            name = path.relative_to(recipe.storage).as_posix()
            if path.is_file() and not is_omitted(name):
                packed.add(path, name)


if __name__ == "__main__":
    main()
