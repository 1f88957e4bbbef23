"""Folder names are stable, so that later versions find the stored data."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rayfuse.align.facts import ALIGN_FACTS
from rayfuse.config.load import parse_recipe
from rayfuse.config.models import ModelSettings
from rayfuse.config.recipe import Recipe
from rayfuse.models.files import ModelFiles
from rayfuse.run.fingerprint import describe_split, fingerprint_of
from rayfuse.run.inputs import InputFile
from rayfuse.run.layout import Layout, name_folders
from rayfuse.run.prepare import Prepared, SplitDocuments
from rayfuse.run.segmentation import Segmentation
from rayfuse.storage.store import open_store

EXPECTED: dict[str, Any] = json.loads(
    Path(__file__).with_name("folder_names.json").read_text(encoding="utf-8")
)
"""Folder names by recipe, as first released."""

BASE: dict[str, Any] = {
    "corpus": {"documents": "text.jsonl", "max_tokens": 64},
    "target": {"model": "m-t"},
    "sources": [{"name": "a", "model": "m-a"}, {"name": "b", "model": "m-b", "dtype": "float32"}],
    "seed": 3,
}

RECIPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "tuned": {
        "corpus": {
            "documents": [{"path": "text.jsonl", "domain": "d"}],
            "max_tokens": 48,
            "shard_tokens": 500,
            "max_document_bytes": 1000,
        },
        "capture": {"signal": "top_k_and_sampled_tail", "top_k": 8, "draws": 4},
        "align": {"method": "min_edit_distance"},
        "fuse": {"method": "avg_ce", "unit": "span", "weights": {"a": 2.0}},
        "train": {
            "lambda": 0.7,
            "lora": {"rank": 2},
            "learning_rate": 1e-3,
            "num_workers": 2,
            "pack": False,
        },
        "evaluate": {
            "documents": "other.jsonl",
            "tasks": {"names": ["arc", "hella"], "limit": 5},
        },
    },
    "counted": {
        "align": {"method": "cooccurrence"},
        "capture": {"signal": "sampled"},
        "fuse": {"weights": {"b": 0.0}},
        "train": {"baseline": False},
        "evaluate": {"held_out_share": 0.1},
    },
    "paper": {"fusion": "paper"},
}

TOKENIZERS = {"target": "tokenizer-t", "a": "tokenizer-t", "b": "tokenizer-m-b"}


def prepare(recipe: Recipe) -> Prepared:
    """Build the result of checking a recipe, without its models and documents."""
    own = recipe.evaluate.documents
    share = recipe.evaluate.held_out_share if own is None else 0.0
    tasks = recipe.evaluate.tasks
    models = {"target": recipe.target} | {source.name: source for source in recipe.sources}
    return Prepared(
        store=open_store(recipe.storage),
        models={
            name: ModelFiles(identify(settings), 100, 64, 1, {})
            for name, settings in models.items()
        },
        tokenizers={name: TOKENIZERS.get(name, "tokenizer-new") for name in models},
        corpus=split(recipe, recipe.corpus.documents, "corpus/", share),
        held_out=split(recipe, own or recipe.corpus.documents, "corpus/held-out-", share),
        unmergeable={"b": "its tokenizer is not the target's"},
        tasks=tasks
        and {
            "folder": tasks.folder,
            "data": tasks.data,
            "num_fewshot": tasks.num_fewshot,
            "limit": tasks.limit,
            "lm_eval": "0.4",
        },
        align=replace(ALIGN_FACTS, version=4),  # a later version renames what is aligned
    )


def identify(settings: ModelSettings) -> str:
    commit = "" if settings.revision is None else f"@{settings.revision}"
    return f"identity-{settings.model}{commit}"


def split(recipe: Recipe, documents: Any, prefix: str, share: float) -> SplitDocuments:
    files = [
        InputFile(entry.path, "jsonl", 123, "7", entry, Path(entry.path).name)
        for entry in documents
    ]
    described = describe_split(recipe, [[file] for file in files], share)
    tokenizers = sorted(set(TOKENIZERS.values()))
    segmentation = Segmentation(
        fingerprint=fingerprint_of(**described, tokenizers=tokenizers),
        record_file=f"{prefix}segmentation-{fingerprint_of(**described)}.json",
        split_for=(),
        tokenizers=tuple(tokenizers),
        is_reused=False,
    )
    return SplitDocuments(tuple(files), segmentation)


def list_names(layout: Layout) -> dict[str, Any]:
    evaluation = layout.evaluation
    merge = evaluation.merge
    return {
        "corpus": layout.corpus.folder,
        "held_out": layout.held_out.folder,
        "corpus_record": layout.corpus_documents.segmentation.record_file,
        "held_out_record": layout.held_out_documents.segmentation.record_file,
        "captured": {name: data.folder for name, data in layout.captured.items()},
        "aligned": {name: data.folder for name, data in layout.aligned.items()},
        "map_files": layout.map_files,
        "runs": {run.name: run.folder for run in layout.runs},
        "evaluations": evaluation.scores,
        "token_nll": {name: data.folder for name, data in evaluation.token_nll.items()},
        "merge": [merge.folder, list(merge.sources), merge.excluded],
        "task_scores": evaluation.task_scores,
        "task_nll": evaluation.task_nll,
        "report": layout.input_fingerprint(),
    }


@pytest.mark.parametrize("name", RECIPES)
def test_folder_names_never_change(name: str, tmp_path: Path):
    recipe = parse_recipe(BASE | RECIPES[name] | {"storage": str(tmp_path)})
    assert list_names(name_folders(recipe, prepare(recipe))) == EXPECTED[name]
