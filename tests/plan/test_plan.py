"""`rayfuse plan` on recipes with files, run from the command line."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import yaml

from rayfuse.align.facts import ALIGN_FACTS
from rayfuse.config.load import parse_recipe, read_recipe
from rayfuse.config.recipe import Recipe
from rayfuse.plan.cost import make_plan
from rayfuse.plan.inputs import read_inputs, sample_rows
from rayfuse.run.layout import plan_layout
from tests.fakes import (
    SAMPLE,
    byte_level_tokenizer,
    children_seconds,
    save_model,
    save_tokenizer,
)
from tests.fakes import sentencepiece_tokenizer as sentencepiece


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    save_model("llama", 330, folder / "target")
    save_tokenizer(sentencepiece(330), folder / "target", bos="<s>", eos="</s>")
    save_model("gpt2", 300, folder / "source")
    save_tokenizer(byte_level_tokenizer(300), folder / "source", bos="<|end|>", eos="<|end|>")
    lines = (json.dumps({"text": SAMPLE[i % 4] * 3}) + "\n" for i in range(200))
    (folder / "docs.jsonl").write_text("".join(lines))
    return folder


def values_of(root: Path, storage: Path) -> dict[str, object]:
    return {
        "storage": str(storage),
        "corpus": {
            "documents": str(root / "docs.jsonl"),
            "max_tokens": 64,
            "shard_tokens": 1000,
        },
        "target": {"model": str(root / "target")},
        "sources": [{"name": "a", "model": str(root / "source")}],
        "evaluate": {"held_out_share": 0.2},
    }


def recipe_of(root: Path, storage: Path, **changes: object) -> Recipe:
    return parse_recipe(values_of(root, storage) | changes)


def rayfuse(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = "import sys; from rayfuse.cli import main; sys.argv[0] = 'rayfuse'; main()"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_help_of_plan_prints_within_half_a_second():
    seconds = []
    for _ in range(3):
        began = children_seconds()
        done = rayfuse("plan", "--help")
        seconds.append(children_seconds() - began)
        assert "--example" in done.stdout
    assert min(seconds) < 0.5


def test_the_example_is_printed_with_every_assumption_and_as_values():
    done = rayfuse("plan", "--example", "fusellm", "plan.forward_share=0.4", "--json")
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert values["assumptions"]["forward_share"] == 0.4
    assert "forward_share" in done.stderr and "0.4*" in done.stderr
    assert {work["title"] for work in values["work"]} >= {"corpus", "capture mpt", "train fused"}
    trillion = rayfuse("plan", "--example", "fusellm", "--tokens", "1e12", "--json")
    ratio = json.loads(trillion.stdout)["dollars"]["gpus_spot"] / values["dollars"]["gpus_spot"]
    assert 400 < ratio < 560


def test_sizes_and_tokens_are_those_of_the_files(root, tmp_path):
    inputs = read_inputs(recipe_of(root, tmp_path))
    from transformers import AutoModelForCausalLM

    for model, name in ((inputs.target, "target"), (inputs.sources[0], "source")):
        real = AutoModelForCausalLM.from_pretrained(root / name)
        assert model.size.parameters == real.num_parameters()
        looked_up = real.get_input_embeddings().weight
        is_tied = real.get_output_embeddings().weight is looked_up
        own = real.num_parameters() - (0 if is_tied else looked_up.numel())
        assert model.size.multiplied == own
    assert inputs.warnings == []
    assert inputs.target.bytes_per_token != inputs.sources[0].bytes_per_token
    assert inputs.row_tokens(inputs.target) < 64


def test_nothing_is_written_and_no_ray_is_started(root, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(values_of(root, tmp_path / "storage")))
    done = rayfuse("plan", str(path))
    assert done.returncode == 0, done.stderr
    assert "capture a" in done.stdout
    assert not (tmp_path / "storage").exists()


def test_missing_models_and_documents_are_warnings_and_the_recipe_gives_their_sizes(root, tmp_path):
    path = tmp_path / "r.yaml"
    values = values_of(root, tmp_path) | {"target": {"model": str(tmp_path / "none")}}
    values["corpus"] = {"documents": str(tmp_path / "*.jsonl"), "max_tokens": 64}
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match=r"or set its size: plan.models.target.parameters=7e9"):
        read_inputs(read_recipe(path))
    size = "plan.models.target.parameters=7e9"
    with pytest.raises(ValueError, match=r"set plan.tokens, e.g. plan.tokens=1.8e9"):
        read_inputs(read_recipe(path, [size]))
    inputs = read_inputs(read_recipe(path, [size, "plan.tokens=1e9"]))
    assert any("documents: corpus.documents is" in warning for warning in inputs.warnings)
    assert any("completed work is unknown: target" in warning for warning in inputs.warnings)
    work = make_plan(inputs).work
    assert work[1].tokens == pytest.approx(1e9)


def test_stored_shards_are_counted_and_replace_estimates(root, tmp_path):
    recipe = recipe_of(root, tmp_path)
    layout = plan_layout(recipe, ALIGN_FACTS)
    rows = sample_rows(recipe, layout.corpus_documents.files)
    assert rows is not None
    tokens = sum(map(len, rows["target_ids"].to_pylist()))
    num_bytes = sum(rows["num_bytes"].to_pylist())
    for data in (layout.corpus, layout.held_out):
        data.claim({})
        for shard in range(3):
            data.write_shard(shard, rows, tokens=tokens, stats={"bytes": float(num_bytes)})
        data.finish(3)
    captured = layout.captured["a"]
    captured.claim({})
    captured.write_shard(1, pa.table({"x": [1]}), tokens=7)
    inputs = read_inputs(recipe)
    found = {work.title: work for work in make_plan(inputs).work}
    assert found["corpus"].done == 1
    assert (found["capture a"].shards, found["capture a"].done) == (3, pytest.approx(1 / 3))
    assert found["train fused"].tokens == 3 * tokens
    assert inputs.row_bytes == num_bytes / rows.num_rows
