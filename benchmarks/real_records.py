"""The records of two real LLMs by domain: size, tail, and how much the other can learn from them.

    python -m benchmarks.real_records --models DIR --data DIR --out FILE [--rows N] [--row-tokens N]

DIR of --models has `smollm2-135m-instruct` and `gemma-3-270m`, DIR of --data `corpus/DOMAIN/
valid.jsonl.gz`. The beginnings of a few documents of each domain are captured once, in bfloat16 at
top 64, by the engine of `rayfuse capture`; smaller records are cut from that one. Bytes are those
of the Parquet columns, without the file's footer, which counts for nothing in a shard of a million
tokens. Each model is aligned with the other at top 16. FILE gets the tables in Markdown.
"""

import argparse
import gzip
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.real_models import DOMAINS as ENGLISH
from benchmarks.real_models import SOURCE, TARGET
from rayfuse.align.method import build_alignment
from rayfuse.align.shard import align_shard
from rayfuse.capture.engines.base import Failure
from rayfuse.capture.engines.transformers_engine import TransformersEngine
from rayfuse.capture.rows import build_captured, tokenize_rows
from rayfuse.capture.top_k import TopLogprobs
from rayfuse.config.capture import CaptureSettings
from rayfuse.config.models import ModelSettings
from rayfuse.corpus.documents import Document
from rayfuse.corpus.shards import build_rows
from rayfuse.models.files import load_recipe_tokenizer
from rayfuse.models.tokenizer import TextTokenizer
from rayfuse.storage.parquet import encode_table

DOMAINS = (*ENGLISH, "multilingual")
ALL = "all"
TOP_KS = (8, 16, 32, 64)
ALIGNED_TOP_K = 16

Records = dict[str, list[TopLogprobs]]


def read_documents(data: Path, domain: str, number: int) -> list[Document]:
    """Read the first documents of a domain's validation text."""
    with gzip.open(data / f"corpus/{domain}/valid.jsonl.gz", "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for _, line in zip(range(number), lines, strict=False)]
    return [Document(f"{domain}-{i}", domain, text) for i, text in enumerate(texts)]


def build_corpus(
    documents: Sequence[Document], tokenizers: Sequence[TextTokenizer], row_tokens: int
) -> pa.Table:
    """Build the first CORPUS row of each document, in the tokens of the first tokenizer."""
    corpus = build_rows(documents, tokenizers[0], tokenizers, max_tokens=row_tokens)
    return corpus.filter(pa.array([name.endswith("#0") for name in corpus["row_id"].to_pylist()]))


def keep_first(record: TopLogprobs, top_k: int) -> TopLogprobs:
    """Keep a record's likeliest entries; the others join the tail."""
    rest = record.top_logprobs[:, top_k:].astype(np.float64)
    tails = np.logaddexp.reduce(np.column_stack([record.tail_logprobs, rest]), axis=1)
    return TopLogprobs(
        record.top_ids[:, :top_k],
        record.top_logprobs[:, :top_k],
        tails.astype(np.float32),
        record.next_logprobs,
        record.drawn_ids,
    )


def capture(source: ModelSettings, corpora: dict[str, pa.Table]) -> Records:
    """Score the rows of each domain with a model, in one process, as a capture actor does."""
    engine = TransformersEngine(source, CaptureSettings(top_k=max(TOP_KS), batch_tokens=2048))
    tokenizer, found = load_recipe_tokenizer(source), dict[str, list[TopLogprobs]]()
    for domain, corpus in corpora.items():
        scored = engine.score_rows(tokenize_rows(corpus, tokenizer))
        found[domain] = [record for record in scored if not isinstance(record, Failure)]
        assert len(found[domain]) == corpus.num_rows, [r for r in scored if isinstance(r, Failure)]
    return found


def build_table(
    corpus: pa.Table, records: Sequence[TopLogprobs], tokenizer: TextTokenizer, top_k: int
) -> pa.Table:
    """Build the CAPTURED rows at a smaller top k."""
    kept = [keep_first(record, top_k) for record in records]
    table, rejects = build_captured(
        corpus, tokenize_rows(corpus, tokenizer), kept, tokenizer.eos_id
    )
    assert not rejects, rejects
    return table


def measure_records(
    corpus: pa.Table, records: Sequence[TopLogprobs], tokenizer: TextTokenizer
) -> dict[str, Any]:
    """Measure the size and the tail of a domain's records at each top k."""
    tokens = sum(len(record.next_logprobs) for record in records)
    found: dict[str, Any] = {"tokens": tokens}
    for top_k in TOP_KS:
        data = encode_table(build_table(corpus, records, tokenizer, top_k), "0" * 12, 0)
        tails = np.concatenate([keep_first(record, top_k).tail_logprobs for record in records])
        mass = np.exp(tails.astype(np.float64))
        found[str(top_k)] = {
            "bytes": _count_bytes(data) / tokens,
            "tail": float(mass.mean()),
            "tail_95": float(np.quantile(mass, 0.95)),
        }
    return found


def _count_bytes(data: bytes) -> int:
    file = pq.ParquetFile(io.BytesIO(data)).metadata
    groups = [file.row_group(number) for number in range(file.num_row_groups)]
    return sum(
        group.column(number).total_compressed_size
        for group in groups
        for number in range(group.num_columns)
    )


def measure_alignment(
    corpora: dict[str, pa.Table], records: Records, source: TextTokenizer, target: TextTokenizer
) -> dict[str, dict[str, float]]:
    """Align each domain's records with the target's tokens, and compute shares of its positions."""
    plain = build_alignment(source, target)
    inside = build_alignment(source, target, maps=plain.maps, inside_tokens=True)
    found: dict[str, dict[str, float]] = {}
    for domain, given in corpora.items():
        texts, ends = given["text"].to_pylist(), given["ends_document"].to_pylist()
        ids = pa.array(target.encode_rows(texts, ends), type=given.schema.field("target_ids").type)
        corpus = given.set_column(given.schema.get_field_index("target_ids"), "target_ids", ids)
        captured = build_table(corpus, records[domain], source, ALIGNED_TOP_K)
        sums = align_shard(corpus, captured, plain)[1]
        also = align_shard(corpus, captured, inside)[1]
        found[domain] = {
            "positions": sums["positions"],
            "signal": sums["with_signal"] / sums["positions"],
            "signal_inside": also["with_signal"] / also["positions"],
            "one_to_one": sums["one_to_one"] / sums["positions"],
            "lost": (sums["tail_mass"] - sums["captured_tail_mass"]) / sums["with_signal"],
        }
    return found


def measure(models: Path, data: Path, rows: int, row_tokens: int) -> dict[str, Any]:
    """Capture with both models, and measure their records and both alignments."""
    settings = {
        name: ModelSettings.model_validate({"model": str(models / name), "dtype": "bfloat16"})
        for name in (TARGET, SOURCE)
    }
    tokenizers = {name: load_recipe_tokenizer(model) for name, model in settings.items()}
    own = list(tokenizers.values())
    corpora = {
        domain: build_corpus(read_documents(data, domain, rows), own, row_tokens)
        for domain in DOMAINS
    }
    corpora[ALL] = pa.concat_tables(corpora.values())
    result: dict[str, Any] = {"records": {}, "alignments": {}}
    for name, model in settings.items():
        records = capture(model, {domain: corpora[domain] for domain in DOMAINS})
        records[ALL] = [record for domain in DOMAINS for record in records[domain]]
        result["records"][name] = {
            domain: measure_records(corpora[domain], records[domain], tokenizers[name])
            for domain in corpora
        }
        other = SOURCE if name == TARGET else TARGET
        result["alignments"][f"{name} to {other}"] = measure_alignment(
            corpora, records, tokenizers[name], tokenizers[other]
        )
    return result


def write_tables(result: dict[str, Any]) -> str:
    """Write the measurements as Markdown."""
    lines = [
        f"| model | domain | tokens | bytes a token at top {'/'.join(map(str, TOP_KS))} "
        "| mean tail, % | 95th percentile, % |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, domains in result["records"].items():
        for domain, found in domains.items():
            parts = [found[str(top_k)] for top_k in TOP_KS]
            columns = (
                " · ".join(f"{part['bytes']:.1f}" for part in parts),
                *(" · ".join(f"{100 * p[key]:.1f}" for p in parts) for key in ("tail", "tail_95")),
            )
            lines.append(f"| {name} | {domain} | {found['tokens']:,} | {' | '.join(columns)} |")
    lines += [
        "",
        "| source to target | domain | positions | with a signal, % | with `inside_tokens`, % "
        "| one token to one, % | lost mass, % |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    keys = ("signal", "signal_inside", "one_to_one", "lost")
    for pair, domains in result["alignments"].items():
        for domain, found in domains.items():
            shares = " | ".join(f"{100 * found[key]:.1f}" for key in keys)
            lines.append(f"| {pair} | {domain} | {found['positions']:,.0f} | {shares} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared/data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=6, help="of each domain")
    parser.add_argument("--row-tokens", type=int, default=128, help="at most, of either model")
    arguments = parser.parse_args()
    result = measure(arguments.models, arguments.data, arguments.rows, arguments.row_tokens)
    tables = write_tables(result)
    arguments.out.write_text(tables, encoding="utf-8")
    print(tables, end="")


if __name__ == "__main__":
    main()
