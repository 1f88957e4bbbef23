"""The four tiny models that ship with rayfuse, and a list of the text that they were trained on.

They are made again by two commands, the second of which packs what the first has trained:

    rayfuse demo --train-models --storage DIR
    python -m rayfuse.demo.shipped DIR
"""

import argparse
import importlib.resources
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from rayfuse.config.base import UserError
from rayfuse.demo.specs import SOURCES, TARGET
from rayfuse.demo.text import HASH_BYTES, SeenText, collect_domains, describe_seen, split_documents

FOLDER = Path(str(importlib.resources.files("rayfuse.demo"))) / "models"
GROUPS_FILE, PARAGRAPHS_FILE = "groups.json", "paragraphs.bin"
SEED = 0
"""Of the arithmetic and the split of the text that the models were trained on."""

MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
TRAINING_FILES = ("done.json", "generation_config.json")
MAX_BYTES = 8_000_000


def read_seen_text() -> SeenText:
    """Read which text the shipped models were trained on.

    Raises:
        UserError: This copy of rayfuse has no models: a job is sent the code alone.
    """
    if not FOLDER.is_dir():
        raise UserError(
            f"the demo's models are not in this copy of rayfuse ({FOLDER}); install it with them, "
            "or use --train-models"
        )
    groups = json.loads((FOLDER / GROUPS_FILE).read_text(encoding="utf-8"))
    hashes = (FOLDER / PARAGRAPHS_FILE).read_bytes()
    paragraphs = [hashes[at : at + HASH_BYTES] for at in range(0, len(hashes), HASH_BYTES)]
    return SeenText(frozenset(groups), frozenset(paragraphs))


def copy_models(names: Sequence[str], folder: Path) -> None:
    """Copy shipped models into a folder; files that are there already are not rewritten."""
    for name in names:
        target = folder / name
        target.mkdir(exist_ok=True)
        for file in TRAINING_FILES:  # of models that were trained there
            (target / file).unlink(missing_ok=True)
        for file in MODEL_FILES:
            content = (FOLDER / name / file).read_bytes()
            if not (target / file).is_file() or (target / file).read_bytes() != content:
                (target / file).write_bytes(content)


def pack(storage: Path) -> None:
    """Pack the models of `rayfuse demo --train-models`, in half precision, into the package.

    Args:
        storage: The demo's storage, of seed `SEED`, made by this Python.

    Raises:
        FileNotFoundError: A model is missing.
        ValueError: They have more than `MAX_BYTES`, or their text is not that of `SEED` here.
    """
    parts = split_documents(collect_domains(SEED), SEED)
    written = (storage / "demo" / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    expected = {document.doc_id for document in parts.held_out}
    if {json.loads(line)["id"] for line in written} != expected:
        raise ValueError(f"the models in {storage} have another split of the text than seed {SEED}")
    draft = FOLDER.with_name(f"{FOLDER.name}-draft")
    shutil.rmtree(draft, ignore_errors=True)
    for spec in (*SOURCES, TARGET):
        source, target = storage / "demo" / spec.name, draft / spec.name
        target.mkdir(parents=True)
        config = json.loads((source / "config.json").read_bytes()) | {"dtype": "float16"}
        (target / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        weights = load_file(source / "model.safetensors")
        halved = {name: tensor.to(torch.float16) for name, tensor in weights.items()}
        save_file(halved, target / "model.safetensors", metadata={"format": "pt"})
        for file in MODEL_FILES[2:]:
            shutil.copyfile(source / file, target / file)
    seen = describe_seen(parts.pretrain)
    (draft / GROUPS_FILE).write_text(json.dumps(sorted(seen.groups)) + "\n")
    (draft / PARAGRAPHS_FILE).write_bytes(b"".join(sorted(seen.paragraphs)))
    total = sum(file.stat().st_size for file in draft.rglob("*") if file.is_file())
    if total > MAX_BYTES:
        raise ValueError(f"the models have {total:,} bytes, more than {MAX_BYTES:,}")
    shutil.rmtree(FOLDER, ignore_errors=True)
    draft.rename(FOLDER)
    print(f"{FOLDER}: {total:,} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m rayfuse.demo.shipped")
    parser.add_argument("storage", type=Path)
    pack(parser.parse_args().storage)
