"""A small run whose rows are stored without a cluster: real tokenizers, drawn probabilities."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

import rayfuse
from benchmarks.synthetic import make_captured, make_corpus
from rayfuse.align.facts import ALIGN_FACTS
from rayfuse.align.task import align_committed, plan_task
from rayfuse.config.recipe import Recipe, dump_recipe
from rayfuse.models.files import load_recipe_tokenizer
from rayfuse.run.layout import Layout, plan_layout
from rayfuse.storage.dataset import DataSet
from tests.fakes import SAMPLE, byte_level_tokenizer, save_model, save_tokenizer
from tests.small_run import write_recipe

NUM_SHARDS = 4


def write_run(folder: Path, **changes: Any) -> Recipe:
    """Write two sources and a target, and the rows of a run of them; return its recipe."""
    path = write_recipe(folder)
    save_model("gpt2", 280, folder / "gpt2")
    save_tokenizer(byte_level_tokenizer(270), folder / "gpt2", bos="<|end|>", eos="<|end|>")
    values = yaml.safe_load(path.read_text())
    values["sources"].append({"name": "gpt2", "model": str(folder / "gpt2")})
    values["fuse"]["method"] = "avg_ce"
    path.write_text(yaml.safe_dump(values))
    recipe = rayfuse.open_run(path, **changes).recipe
    store_rows(recipe)
    return recipe


def store_rows(recipe: Recipe) -> None:
    """Write the corpus, and what its sources predict, captured and aligned."""
    layout = plan_layout(recipe, ALIGN_FACTS)
    write_corpus(recipe, layout)
    write_sources(recipe, layout)


def write_corpus(recipe: Recipe, layout: Layout) -> None:
    """Write the corpus: each shard has other texts."""
    write_rows(recipe, layout.corpus, "s")


def write_rows(recipe: Recipe, data: DataSet, prefix: str) -> None:
    """Write rows of the corpus or of held-out text, with documents whose ids have a prefix."""
    target = load_recipe_tokenizer(recipe.target)
    data.claim({"recipe": dump_recipe(recipe)})
    for shard in range(NUM_SHARDS):
        texts = [SAMPLE[(shard + text) % 4] * (1 + text + shard % 2) for text in range(3)]
        rows = make_corpus(texts, target, max_tokens=64)
        for column in ("row_id", "doc_id"):  # each shard has documents of its own
            names = pa.array([f"{prefix}{shard}-{name}" for name in rows[column].to_pylist()])
            rows = rows.set_column(rows.schema.get_field_index(column), column, names)
        data.write_shard(shard, rows, tokens=1)
    data.finish(NUM_SHARDS)


def write_sources(recipe: Recipe, layout: Layout) -> None:
    """Write captured rows of drawn probabilities, and align them."""
    for number, source in enumerate(recipe.sources):
        captured, aligned = layout.captured[source.name], layout.aligned[source.name]
        for data in (captured, aligned):
            data.claim({"recipe": dump_recipe(recipe), "source": source.name})
        for shard, commit in layout.corpus.commits().items():
            table = make_captured(
                layout.corpus.read_shard(commit),
                load_recipe_tokenizer(source),
                top_k=4,
                seed=10 * number + shard,
            )
            captured.write_shard(shard, table, tokens=1, inputs={"corpus": commit.identity})
            align_committed(plan_task(recipe, layout, source), shard)
        for data in (captured, aligned):
            data.finish(NUM_SHARDS)
