"""A run with a trained and evaluated model, stored without a cluster, and a hub on loopback."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.synthetic import make_corpus
from rayfuse.align.facts import ALIGN_FACTS
from rayfuse.config.recipe import Recipe, dump_recipe
from rayfuse.evaluate.scores import DocumentScore, Evaluation, find_role
from rayfuse.models.files import load_recipe_tokenizer
from rayfuse.run.layout import Layout, plan_layout
from rayfuse.run.made_models import read_inputs
from rayfuse.storage.files import upload_files, write_record
from tests.fakes import SAMPLE
from tests.publish.local_hub import LocalHub, serve_hub
from tests.stored_run import write_run


@dataclass(frozen=True)
class StoredRun:
    recipe: Recipe
    file: Path
    layout: Layout
    model: Path


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> StoredRun:
    folder = tmp_path_factory.mktemp("push")
    (folder / "neox").mkdir()
    (folder / "neox/README.md").write_text("---\nlicense: other\nlicense_name: llama3\n---\nText\n")
    recipe = write_run(folder)
    layout = plan_layout(recipe, ALIGN_FACTS)
    target = load_recipe_tokenizer(recipe.target)
    layout.held_out.claim({"recipe": dump_recipe(recipe)})
    layout.held_out.write_shard(0, make_corpus(SAMPLE[:2], target, max_tokens=64), tokens=1)
    layout.held_out.finish(1)
    for trained in layout.runs:
        line = '{"step": 1, "clm_loss": 3.0, "fusion_loss": null, "tokens": 10, "seconds": 2.0}\n'
        (folder / "metrics.jsonl").write_text(line)
        paths = {f"model/{path.name}": path for path in (folder / "target").iterdir()}
        paths["metrics.jsonl"] = folder / "metrics.jsonl"
        hashes = upload_files(layout.store, trained.folder, paths)
        values = {"inputs": read_inputs(layout, trained)}
        write_record(layout.store, f"{trained.folder}/done.json", values, hashes)
    for number, (name, file) in enumerate(layout.evaluation.scores.items()):
        documents = [DocumentScore(f"d{i}", "", 100, 70.0 + number + i) for i in range(20)]
        evaluation = Evaluation(name, find_role(name), name, documents, 1.5)
        layout.store.write(file, evaluation.to_json())
    model = Path(layout.store.root) / layout.runs[0].folder / "model"
    return StoredRun(recipe, folder / "recipe.yaml", layout, model)


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    with serve_hub() as served:
        yield served
