"""The benchmark of real models: its texts, its recipes, and the choice of settings."""

import argparse
import gzip
import json
from pathlib import Path

import pytest

from benchmarks.real_models import (
    DOMAINS,
    SOURCE,
    TARGET,
    Corpus,
    Pair,
    choose,
    read_best_validations,
    write_corpus,
)
from rayfuse.config.load import read_recipe
from rayfuse.demo.shipped import FOLDER
from rayfuse.pipeline import prepare_run

PAIRS = (Pair(1e-4, 0.5, 1e-5), Pair(2e-4, 0.2, 2e-5))


@pytest.fixture
def given(tmp_path: Path) -> argparse.Namespace:
    """Two of the demo's models in the places of the real ones, and text of all domains."""
    (tmp_path / "models").mkdir()
    for name, model in ((TARGET, "gpt2-target"), (SOURCE, "neox-prose")):
        (tmp_path / "models" / name).symlink_to(FOLDER / model)
    for domain in DOMAINS:
        for part in ("train", "valid"):
            path = tmp_path / "data" / "corpus" / domain / f"{part}.jsonl.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            with gzip.open(path, "wt") as file:
                for number in range(8):
                    text = f"{domain} {part} {number}: it was late in the year. " * (60 - number)
                    file.write(json.dumps({"id": f"{domain}-{part}-{number}", "text": text}) + "\n")
    return argparse.Namespace(
        models=tmp_path / "models",
        out=tmp_path / "out",
        data=tmp_path / "data",
        held_out_bytes=3000,
        questions=0,
    )


def test_texts_have_equal_shares_of_all_domains(given):
    recipe = write_corpus("little", Corpus(6000, 2, 8, PAIRS), given)
    records = [json.loads(line) for line in (given.out / "little/corpus.jsonl").open()]
    texts: dict[str, list[str]] = {name: [] for name in DOMAINS}
    for record in records:
        texts[record["domain"]].append(record["text"])
    assert all(1 < len(parts) < 8 for parts in texts.values())
    assert max(len(text) for parts in texts.values() for text in parts) <= 2000
    held_out = (given.out / "little/held_out.jsonl").read_text()
    assert not any(record["text"] in held_out for record in records)
    written = recipe.read_text()
    assert write_corpus("little", Corpus(60, 1, 8, PAIRS), given).read_text() == written  # resumed


def test_too_little_text_is_an_error(given):
    with pytest.raises(ValueError, match=r"wiki: \d+ of 1000000; choose a smaller corpus"):
        write_corpus("little", Corpus(6_000_000, 2, 8, PAIRS), given)


def test_the_best_validation_of_each_run_chooses(given):
    recipe = write_corpus("little", Corpus(6000, 2, 8, PAIRS), given)
    values = {"fused": [[2.0, 1.5], [1.8, 1.7]], "clm": [[2.0, 1.9], [1.6, 1.7]]}
    validations = []
    for number, pair in enumerate(PAIRS):
        overrides = [*pair.overrides(), "corpus.max_tokens=256"]
        layout = prepare_run(read_recipe(recipe, overrides))
        for run in layout.runs:
            lines = [{"step": 1}] + [{"bits_per_byte": value} for value in values[run.name][number]]
            data = "".join(json.dumps(line) + "\n" for line in lines).encode()
            layout.store.write(f"{run.folder}/metrics.jsonl", data)
        validations.append(read_best_validations(recipe, overrides))
    assert validations == [{"fused": 1.5, "clm": 1.9}, {"fused": 1.7, "clm": 1.6}]
    assert choose(PAIRS, validations) == Pair(1e-4, 0.5, 2e-5)
