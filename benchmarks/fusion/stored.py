"""What units have stored: models, tokenizers, tables; and the score of a model."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from benchmarks.fusion.text import HALVES
from benchmarks.fusion.units import Unit
from rayfuse.config.models import ModelSettings
from rayfuse.evaluate.bits_per_byte import score_documents, score_rows
from rayfuse.models.causal_lm import CausalLM, load_causal_lm
from rayfuse.models.tokenizer import TextTokenizer, load_tokenizer
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.store import LocalStore

BATCH_TOKENS = 8_192
"""Tokens of a forward pass without gradients."""

Record = dict[str, Any]
"""The result of a unit."""


def score_lm(lm: CausalLM, tokenizer: TextTokenizer, held_out: Unit, out: Path) -> Record:
    """Compute the NLL of every held-out document, in nats."""
    rows = data_of(held_out, out, "rows")
    found: Record = {}
    for shard, half in enumerate(HALVES):
        table = rows.read_shard(rows.read_commit(shard))
        nats = score_rows(lm, tokenizer, table, name="model", batch_tokens=BATCH_TOKENS)
        found[half] = sum_documents(table, nats)
    return {"nats": found}


def sum_documents(table: pa.Table, nats: np.ndarray) -> list[float]:
    """Sum the NLL of rows by document, in nats."""
    return [round(score.nats, 2) for score in score_documents(table, nats)]


def choose_device() -> str:
    """Choose a GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load(model: Unit, out: Path) -> CausalLM:
    """Load the model that a unit has stored."""
    return load_folder(model_folder(model, out))


def load_folder(folder: Path) -> CausalLM:
    """Load a model folder in float32."""
    settings = ModelSettings(model=str(folder.absolute()), dtype="float32")
    return load_causal_lm(settings, choose_device())


def save(lm: CausalLM, tokenizer: Unit, folder: Path, out: Path) -> None:
    """Save a model with its tokenizer below a unit's folder."""
    saved: Any = lm.model
    saved.save_pretrained(folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer.folder(out) / "tokenizer" / name, folder / "model" / name)


def model_folder(model: Unit, out: Path) -> Path:
    """Locate the model that a unit has stored."""
    return model.folder(out).absolute() / "model"


def tokenizer_of(tokenizer: Unit, out: Path) -> TextTokenizer:
    """Load the tokenizer that a unit has stored."""
    return load_tokenizer(str(tokenizer.folder(out).absolute() / "tokenizer"))


def data_of(unit: Unit, out: Path, name: str) -> DataSet:
    """Open a data set that a unit has stored."""
    return DataSet(LocalStore(str(unit.folder(out).absolute())), name, "", unit.key)


def read_rows(corpus: Unit, out: Path) -> pa.Table:
    """Read the rows of a corpus or of an aligned source, all in one shard."""
    rows = data_of(corpus, out, "rows")
    return rows.read_shard(rows.read_commit(0))


def read_captured(aligned: Unit, out: Path) -> pa.Table:
    """Read the CAPTURED rows that an aligned unit was made from."""
    found = data_of(aligned.needs["captured"], out, aligned.settings["record"])
    return found.read_shard(found.read_commit(0))
