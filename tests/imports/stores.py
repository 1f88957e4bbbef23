"""Stores in the layouts of other tools, written from their published descriptions."""

import struct
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

DISTILLKIT = {
    "k": 12,
    "exact_k": 4,
    "exact_dtype": "float32",
    "polynomial_terms": [0, 1, "sqrt"],
    "term_dtype": "float32",
    "residual_bins": [
        {"scale_dtype": "float16", "element_bits": 7, "num_elements": 5},
        {"scale_dtype": "float32", "element_bits": 9, "num_elements": 3},
    ],
    "delta_encoding": True,
    "error_diffusion": False,
    "normalize_t": False,
}
FLOATS = {"float16": "<e", "float32": "<f"}


def pack_integers(values: Sequence[int], bits: int) -> bytes:
    """Pack integers most significant bit first, zeros behind them up to a full byte."""
    text = "".join(format(value, f"0{bits}b") for value in values)
    text += "0" * (-len(text) % 8)
    return bytes(int(text[at : at + 8], 2) for at in range(0, len(text), 8))


def compress_position(logprobs: np.ndarray) -> bytes:
    """Compress one position by `DISTILLKIT`: deltas, exact ones, a fit of the rest, residuals."""
    deltas = np.concatenate([logprobs[:1], np.diff(logprobs)])
    parts = [struct.pack("<f", value) for value in deltas[:4]]
    ranks = np.arange(8.0)
    terms = np.stack([np.ones(8), ranks, np.sqrt(ranks)], axis=1)
    fit = np.linalg.lstsq(terms, deltas[4:], rcond=None)[0].astype(np.float32)
    parts += [struct.pack("<f", value) for value in fit]
    residuals, at = deltas[4:] - terms @ fit, 0
    for part in DISTILLKIT["residual_bins"]:
        own = residuals[at : at + part["num_elements"]]
        half = 2 ** (part["element_bits"] - 1)
        packed = struct.pack(FLOATS[part["scale_dtype"]], max(np.abs(own).max() / half, 1e-6))
        (scale,) = struct.unpack(FLOATS[part["scale_dtype"]], packed)
        levels = np.clip(np.rint(own / scale), -half, half - 1).astype(int) + half
        parts += [packed, pack_integers(levels.tolist(), part["element_bits"])]
        at += len(own)
    return b"".join(parts)


def take_top(logits: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    return ids, np.take_along_axis(logits, ids, 1)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def write_distillkit(
    folder: Path,
    rows: Sequence[tuple[list[int], np.ndarray]],
    *,
    plain: bool = False,
    vocab_size: int = 331,
) -> None:
    """Write tokens and logits as `sample_logits_vllm` does: nothing after the last token."""
    folder.mkdir()
    settings = DISTILLKIT | {"d": vocab_size}
    (folder / "compression_config.yaml").write_text(yaml.safe_dump(settings))
    bits = (vocab_size - 1).bit_length()
    for number in range(0, len(rows), 8):
        part = rows[number : number + 8]
        columns: dict[str, list] = {"input_ids": [tokens for tokens, _ in part]}
        tops = [take_top(log_softmax(logits)[:-1], 12) for _, logits in part]
        if plain:
            columns["token_ids"] = [ids.tolist() for ids, _ in tops]
            columns["top_values"] = [values.tolist() for _, values in tops]
        else:
            columns["compressed_logprobs"] = [
                [list(compress_position(position)) for position in values] for _, values in tops
            ]
            columns["bytepacked_indices"] = [
                [list(pack_integers(position, bits)) for position in ids.tolist()]
                for ids, _ in tops
            ]
        kinds = {"input_ids": pa.list_(pa.uint64()), "token_ids": pa.list_(pa.list_(pa.int64()))}
        kinds |= dict.fromkeys(
            ("compressed_logprobs", "bytepacked_indices"), pa.list_(pa.list_(pa.uint8()))
        )
        kinds["top_values"] = pa.list_(pa.list_(pa.float32()))
        schema = pa.schema([(name, kinds[name]) for name in columns])
        pq.write_table(pa.table(columns, schema=schema), folder / f"data_{number // 8}.parquet")


def write_fusellm(
    folder: Path,
    rows: Sequence[tuple[str, list[int], np.ndarray]],
    *,
    length: int,
    with_losses: bool,
    k: int = 10,
) -> None:
    """Write texts, tokens and logits as `forward_for_logits.py` does: padded to a length."""
    records: list[dict] = []
    for text, tokens, logits in rows:
        ids, values = take_top(logits.astype(np.float16).astype(np.float64), k)
        padding = length - len(tokens)
        losses = -np.take_along_axis(log_softmax(logits)[:-1], np.array(tokens[1:])[:, None], 1)
        record = {
            "text": text,
            "input_ids": tokens,
            "attention_mask": [1] * len(tokens),
            "labels": tokens,
            "per_step_logits": values.tolist() + [[0.0] * k] * padding,
            "per_step_indices": ids.tolist() + [[0] * k] * padding,
            "metric_ce": float(losses.mean()),
        }
        if with_losses:
            record["per_step_metric_ce"] = losses[:, 0].tolist() + [0.0] * padding
        records.append(record)
    of = datasets.Value
    features = {
        "text": of("string"),
        "input_ids": datasets.List(of("int32")),
        "attention_mask": datasets.List(of("int8")),
        "labels": datasets.List(of("int64")),
        "per_step_logits": datasets.List(datasets.List(of("float16"))),
        "per_step_indices": datasets.List(datasets.List(of("int64"))),
        "metric_ce": of("float16"),
    }
    if with_losses:
        features["per_step_metric_ce"] = datasets.List(of("float16"))
    kind = datasets.Features(features)
    half = len(records) // 2
    splits = {
        name: datasets.Dataset.from_list(part, features=kind)
        for name, part in (("train", records[:half]), ("validation", records[half:]))
    }
    datasets.DatasetDict(splits).save_to_disk(str(folder))
