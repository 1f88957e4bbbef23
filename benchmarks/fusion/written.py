"""Text that the sources write: beginnings from the corpus, continued by samples (regime R3)."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float

from benchmarks.fusion.stored import Record, data_of, load, read_rows, tokenizer_of
from benchmarks.fusion.training import PACKING, WrittenBatch
from benchmarks.fusion.units import Unit
from rayfuse.corpus.documents import Document
from rayfuse.corpus.shards import build_rows
from rayfuse.fuse.reader import ShardReader
from rayfuse.models.causal_lm import CausalLM
from rayfuse.models.tokenizer import TextTokenizer
from rayfuse.train.batches import MicroBatch, StepPlan, iterate_steps

PROMPT_TOKENS = 32
"""Tokens of the corpus with which a text begins."""

PROMPT_CHARS = 240
"""Characters from a prompt's start to the end of its row, at least, if the row is as long."""

TEXTS_PER_BATCH = 64

FILE = "texts.json"


def write_texts(unit: Unit, folder: Path, out: Path, data: Path) -> Record:
    """Let one source continue the prompts of the rows that it predicts best of all sources."""
    del data
    settings, corpus = unit.settings, read_rows(unit.needs["corpus"], out)
    nats = np.stack(
        [
            read_rows(need, out)["nats"].to_numpy()
            for need in unit.needs.values()
            if need.kind == "aligned"
        ]
    )
    count = settings["tokens"] // settings["max_tokens"]
    prompts = draw_prompts(corpus, nats, count, settings["seed"])
    mine = [prompt for prompt in prompts if prompt.writer == settings["writer"]]
    model = unit.needs["model"]
    lm, tokenizer = load(model, out), tokenizer_of(model.needs["tokenizer"], out)
    texts = continue_texts(
        lm,
        tokenizer,
        [prompt.text for prompt in mine],
        max_tokens=settings["max_tokens"],
        seed=settings["seed"],
    )
    documents = [
        Document(f"written-{prompt.doc_id}", prompt.domain, text)
        for prompt, text in zip(mine, texts, strict=True)
        if text.strip()
    ]
    (folder / FILE).write_text(json.dumps([vars(document) for document in documents]))
    return {"texts": len(documents), "bytes": sum(len(each.text.encode()) for each in documents)}


def gather_texts(unit: Unit, folder: Path, out: Path, data: Path) -> Record:
    """Build the rows of all texts that the sources wrote, like those of any corpus."""
    del folder, data
    tokenizers = [
        tokenizer_of(need, out) for need in unit.needs.values() if need.kind == "tokenizer"
    ]
    documents = [
        Document(**document)
        for need in unit.needs.values()
        if need.kind == "written"
        for document in json.loads((need.folder(out) / FILE).read_text())
    ]
    max_tokens = unit.settings["max_tokens"]
    table = build_rows(documents, tokenizers[0], tokenizers, max_tokens=max_tokens)
    tokens = sum(len(ids) for ids in table["target_ids"])
    data_of(unit, out, "rows").write_shard(0, table, tokens=tokens)
    return {"rows": table.num_rows, "documents": len(documents), "tokens": tokens}


@dataclass(frozen=True)
class Prompt:
    """The beginning of a text, and the source that continues it."""

    text: str
    doc_id: str
    domain: str
    writer: int


def draw_prompts(
    corpus: pa.Table, nats: Float[np.ndarray, "num_sources rows"], count: int, seed: int
) -> list[Prompt]:
    """Draw places of the corpus at which texts begin; the best source of the row continues each.

    Args:
        corpus: The rows.
        nats: Each source's NLL of each row.
        count: The number of prompts.
        seed: Decides the rows and the places.
    """
    random = np.random.default_rng(seed)
    texts, domains = corpus["text"].to_pylist(), corpus["domain"].to_pylist()
    writers = nats.argmin(axis=0)
    prompts: list[Prompt] = []
    for number, row in enumerate(random.integers(corpus.num_rows, size=count).tolist()):
        start = int(random.integers(max(len(texts[row]) - PROMPT_CHARS, 0) + 1))
        start = texts[row].find(" ", start) + 1 if start else 0  # a word's start, or the row's
        prompts.append(Prompt(texts[row][start:], str(number), domains[row], int(writers[row])))
    return prompts


def continue_texts(
    lm: CausalLM, tokenizer: TextTokenizer, prompts: Sequence[str], *, max_tokens: int, seed: int
) -> list[str]:
    """Continue the first tokens of each prompt by samples at temperature 1.

    Returns:
        The texts with their beginnings; empty for a prompt of too few tokens.
    """
    torch.manual_seed(seed)
    rows = tokenizer.encode_rows(list(prompts), [False] * len(prompts))
    usable = [number for number, ids in enumerate(rows) if len(ids) >= PROMPT_TOKENS]
    unknown = np.flatnonzero(~tokenizer.known_ids()).tolist()
    texts = [""] * len(prompts)
    for first in range(0, len(usable), TEXTS_PER_BATCH):
        part = usable[first : first + TEXTS_PER_BATCH]
        ids = torch.from_numpy(np.stack([rows[number][:PROMPT_TOKENS] for number in part])).long()
        written = lm.model.generate(
            ids.to(lm.device),
            attention_mask=torch.ones_like(ids, device=lm.device),
            do_sample=True,
            use_cache=True,  # the configurations of some families switch it off
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max_tokens - PROMPT_TOKENS,
            eos_token_id=tokenizer.eos_id,
            pad_token_id=tokenizer.eos_id,
            suppress_tokens=unknown or None,
        )
        for number, token_ids in zip(part, written.tolist(), strict=True):
            texts[number] = _spell(token_ids, tokenizer)
    return texts


def spell_beginnings(tokenizer: TextTokenizer, prompts: Sequence[str]) -> list[str]:
    """Spell the tokens of each prompt with which its text begins."""
    rows = tokenizer.encode_rows(list(prompts), [False] * len(prompts))
    return [_spell(ids[:PROMPT_TOKENS].tolist(), tokenizer) for ids in rows]


def _spell(token_ids: Sequence[int], tokenizer: TextTokenizer) -> str:
    """Spell tokens; a character that is not complete at the end, or not valid, is left out."""
    spelled = b"".join(tokenizer.token_bytes[token_id] or b"" for token_id in token_ids)
    return spelled.decode(errors="ignore").removeprefix(" " * tokenizer.adds_prefix_space)


def iterate_mixed_steps(
    corpus: ShardReader, written: ShardReader, plan: StepPlan, *, learns_labels: bool
) -> Iterator[list[MicroBatch]]:
    """Yield steps of which one half are rows of the corpus, the other rows that sources wrote.

    Written rows begin again as often as the corpus needs.

    Args:
        corpus: Reads the corpus.
        written: Reads the written rows.
        plan: The corpus' seed and epochs, and the rows of a step of both together.
        learns_labels: Train on the written tokens as on real text (CLM).
    """
    half = replace(plan, rows_per_step=plan.rows_per_step // 2)
    again = replace(half, epochs=half.epochs * sum(corpus.rows_per_shard))  # never the shorter one
    for real, other in zip(
        iterate_steps(corpus, PACKING, half, rank=0, num_workers=1),
        iterate_steps(written, PACKING, again, rank=0, num_workers=1),
        strict=False,
    ):
        kind = MicroBatch if learns_labels else WrittenBatch
        yield real.batches + [kind(**vars(batch)) for batch in other.batches]
