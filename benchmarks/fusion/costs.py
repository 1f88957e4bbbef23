"""What training on a corpus costs elsewhere: other text is predicted worse, and text is copied."""

import json
from pathlib import Path

import numpy as np

from benchmarks.fusion.stored import BATCH_TOKENS, Record, data_of, load, read_rows, tokenizer_of
from benchmarks.fusion.units import Unit
from benchmarks.fusion.written import continue_texts, spell_beginnings
from rayfuse.corpus.documents import Document
from rayfuse.corpus.shards import build_rows
from rayfuse.evaluate.bits_per_byte import score_documents, score_rows

ELSEWHERE = (
    "arc/easy.validation",
    "arc/challenge.validation",
    "openbookqa/validation",
    "hellaswag/validation-500",
)
"""Questions on science and everyday scenes, with their answers: unlike all of the corpus' text."""

QUESTIONS = 200
"""Of each file."""

COPIED_BYTES = 50
"""A string of so many bytes that is also in the corpus counts as copied."""

PROMPTS, WRITTEN_TOKENS = 128, 256


def measure_costs(unit: Unit, out: Path, data: Path) -> Record:
    """Score a model on text unlike the corpus, and count what it copies from the corpus.

    Returns:
        `nats` and `bytes` of each text unlike the corpus, and `copied`: the share of the strings of
        `COPIED_BYTES` bytes in what the model writes that are also in the corpus.
    """
    tokenizer = tokenizer_of(unit.needs["tokenizer"], out)
    lm = load(unit.needs["model"], out)
    max_tokens = unit.settings["max_tokens"]
    questions = read_elsewhere(data)
    rows = build_rows(questions, tokenizer, [tokenizer], max_tokens=max_tokens)
    nats = score_rows(lm, tokenizer, rows, name="model", batch_tokens=BATCH_TOKENS)
    held_out = data_of(unit.needs["held_out"], out, "rows")
    prompts = held_out.read_shard(held_out.read_commit(0))["text"].to_pylist()
    drawn = np.random.default_rng(0).permutation(len(prompts))[:PROMPTS]
    chosen = [prompts[i] for i in drawn]
    texts = continue_texts(lm, tokenizer, chosen, max_tokens=WRITTEN_TOKENS, seed=0)
    begins = spell_beginnings(tokenizer, chosen)
    return {
        "nats": {"elsewhere": [round(score.nats, 2) for score in score_documents(rows, nats)]},
        "bytes": sum(len(document.text.encode()) for document in questions),
        "copied": share_copied(
            [text[len(begun) :] for text, begun in zip(texts, begins, strict=True)],
            read_rows(unit.needs["corpus"], out)["text"].to_pylist(),
        ),
    }


def read_elsewhere(data: Path) -> list[Document]:
    """Read questions with their right answers."""
    found: list[Document] = []
    for name in ELSEWHERE:
        lines = (data / "eval" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines[:QUESTIONS]):
            item = json.loads(line)
            text = f"{item['question']} {item['choices'][item['answer']]}"
            found.append(Document(f"{name}#{number}", "elsewhere", text))
    return found


def share_copied(texts: list[str], corpus: list[str]) -> float:
    """Compute the share of strings of `COPIED_BYTES` bytes that are also in the corpus' rows."""
    known = {string for text in corpus for string in _list_strings(text)}
    written = [string for text in texts for string in _list_strings(text)]
    return sum(string in known for string in written) / max(len(written), 1)


def _list_strings(text: str) -> list[bytes]:
    spelled = text.encode()
    return [spelled[i : i + COPIED_BYTES] for i in range(len(spelled) - COPIED_BYTES + 1)]
