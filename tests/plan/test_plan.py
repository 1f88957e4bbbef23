"""`rayfuse plan` on recipes with files, as a user types it."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest
import yaml

from rayfuse.config.load import parse_recipe, read_recipe
from rayfuse.config.recipe import Recipe
from rayfuse.plan.cost import make_plan
from rayfuse.plan.inputs import read_setup
from tests.fakes import SAMPLE, byte_level_tokenizer, save_model, save_tokenizer
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


def test_help_of_plan_answers_in_half_a_second():
    seconds = []
    for _ in range(3):
        began = time.monotonic()
        done = rayfuse("plan", "--help")
        seconds.append(time.monotonic() - began)
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
    setup = read_setup(recipe_of(root, tmp_path))
    from transformers import AutoModelForCausalLM

    for model, name in ((setup.target, "target"), (setup.sources[0], "source")):
        real = AutoModelForCausalLM.from_pretrained(root / name)
        assert model.size.parameters == real.num_parameters()
        looked_up = real.get_input_embeddings().weight
        is_tied = real.get_output_embeddings().weight is looked_up
        own = real.num_parameters() - (0 if is_tied else looked_up.numel())
        assert model.size.multiplied == own
    assert setup.warnings == []
    assert setup.target.bytes_per_token != setup.sources[0].bytes_per_token
    assert setup.row_tokens(setup.target) < 64


def test_nothing_is_written_and_no_ray_is_started(root, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(values_of(root, tmp_path / "storage")))
    done = rayfuse("plan", str(path))
    assert done.returncode == 0, done.stderr
    assert "capture a" in done.stdout
    assert not (tmp_path / "storage").exists()


def test_models_and_documents_that_are_not_there_are_told_and_their_sizes_taken_from_the_recipe(
    root, tmp_path
):
    path = tmp_path / "r.yaml"
    values = values_of(root, tmp_path) | {"target": {"model": str(tmp_path / "none")}}
    values["corpus"] = {"documents": str(tmp_path / "*.jsonl"), "max_tokens": 64}
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(
        ValueError, match=r"say its size instead: plan.models.target.parameters=7e9"
    ):
        read_setup(read_recipe(path))
    size = "plan.models.target.parameters=7e9"
    with pytest.raises(ValueError, match=r"how much text there is; say it: plan.tokens=1.8e9"):
        read_setup(read_recipe(path, [size]))
    setup = read_setup(read_recipe(path, [size, "plan.tokens=1e9"]))
    assert any("documents: corpus.documents is" in each for each in setup.warnings)
    assert any("what is done already is not known: target" in each for each in setup.warnings)
    work = make_plan(setup).work
    assert work[1].tokens == pytest.approx(1e9)


def test_what_is_done_is_counted_and_takes_the_place_of_guesses(root, tmp_path):
    from rayfuse.plan.inputs import sample_rows
    from rayfuse.run.layout import plan_layout

    recipe = recipe_of(root, tmp_path)
    layout = plan_layout(recipe)
    rows = sample_rows(recipe, layout.corpus_inputs)
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
    setup = read_setup(recipe)
    found = {work.title: work for work in make_plan(setup).work}
    assert found["corpus"].done == 1
    assert (found["capture a"].shards, found["capture a"].done) == (3, pytest.approx(1 / 3))
    assert found["train fused"].tokens == 3 * tokens
    assert setup.row_bytes == num_bytes / rows.num_rows
