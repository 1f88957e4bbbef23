"""A tiny model, what rayfuse captures with it, and the same as stores of other tools."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.synthetic import make_corpus
from rayfuse.capture.engines.transformers_engine import TransformersEngine
from rayfuse.capture.rows import build_captured, tokenize_rows
from rayfuse.config.capture import CaptureSettings
from rayfuse.config.models import SourceSettings
from rayfuse.models.tokenizer import TextTokenizer, load_tokenizer
from tests.fakes import SAMPLE, save_model, save_tokenizer, sentencepiece_tokenizer

TEXTS = [text * (1 + number % 2) for number, text in enumerate(SAMPLE)]


@dataclass(frozen=True)
class Scored:
    """Texts that a model has scored."""

    model: Path
    tokenizer: TextTokenizer
    corpus: pa.Table
    captured: pa.Table
    """With all that a store may hold: 12 entries of a position."""

    def score(self, start: list[int], end: list[int]) -> list[tuple[list[int], np.ndarray]]:
        """Compute tokens and logits of each text between special tokens."""
        lm = AutoModelForCausalLM.from_pretrained(self.model).eval()
        tokens = [[*start, *row.tolist(), *end] for row in self.tokenizer.encode(TEXTS)]
        with torch.inference_mode():
            return [(row, lm(torch.tensor([row])).logits[0].numpy()) for row in tokens]


@pytest.fixture(scope="session")
def scored(tmp_path_factory) -> Scored:
    model = tmp_path_factory.mktemp("imports") / "llama"
    save_model("llama", 330, model)
    save_tokenizer(sentencepiece_tokenizer(330), model, bos="<s>", eos="</s>")
    lm = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():  # random weights predict nothing: sharpen what they predict
        lm.get_output_embeddings().weight.mul_(60)
    lm.save_pretrained(model)
    tokenizer = load_tokenizer(str(model))
    corpus = make_corpus(TEXTS, tokenizer, max_tokens=512)
    settings = CaptureSettings(top_k=12)
    engine = TransformersEngine(SourceSettings(name="a", model=str(model)), settings)
    rows = tokenize_rows(corpus, tokenizer)
    captured, rejects = build_captured(corpus, rows, engine.score_rows(rows), tokenizer.eos_id)
    assert not rejects
    assert corpus.num_rows == len(TEXTS)
    return Scored(model, tokenizer, corpus, captured)
