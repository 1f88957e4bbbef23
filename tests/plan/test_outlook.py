"""The plan names the study's regime that a run is nearest to, and what fusion gained there."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from benchmarks.fusion.regime_report import to_study
from rayfuse.align.facts import ALIGN_FACTS
from rayfuse.config.load import parse_recipe
from rayfuse.plan import outlook
from rayfuse.plan.inputs import read_example, read_inputs, sample_rows
from rayfuse.plan.outlook import describe_outlook, find_nearest, read_study
from rayfuse.run.layout import plan_layout
from rayfuse.schema import CAPTURED
from tests.plan.test_plan import root, values_of  # noqa: F401 (a fixture)

LATEST = Path(__file__).parents[2] / "benchmarks/fusion/regime_results/regimes.json"

STUDY = {
    "few": {
        "situation": "little text", "tokens_per_parameter": 0.1, "epochs": 16, "advantage": 0.05,
        "gain": [0.08, 0.06, 0.1], "token_multiple": [3.0, 2.5, 3.5],
        "seeds": 3, "token_multiple_seeds": 1,
    },
    "weak": {
        "situation": "weak sources", "tokens_per_parameter": 0.1, "epochs": 2, "advantage": -0.05,
        "gain": [0.01, 0.0, 0.02], "token_multiple": None,
        "seeds": 3, "token_multiple_seeds": 1,
    },
    "many": {
        "situation": "ample text", "tokens_per_parameter": 3.0, "epochs": 1, "advantage": 0.05,
        "gain": [0.02, 0.01, 0.03], "token_multiple": None,
        "seeds": 1, "token_multiple_seeds": 1,
    },
}  # fmt: skip


@pytest.fixture
def study(tmp_path, monkeypatch):
    (tmp_path / "study.json").write_text(json.dumps(STUDY))
    monkeypatch.setattr(outlook, "STUDY", tmp_path / "study.json")


def test_the_shipped_study_is_the_latest_results():
    assert json.loads(outlook.STUDY.read_text()) == to_study(json.loads(LATEST.read_text()))
    assert read_study()


@pytest.mark.parametrize(
    ("ratio", "advantage", "name"),
    [(0.1, None, "few"), (0.05, 0.1, "few"), (0.1, -0.1, "weak"), (10.0, None, "many")],
)
def test_the_nearest_regime_is_by_text_and_by_strength_where_it_is_known(
    study, ratio, advantage, name
):
    assert find_nearest(ratio, advantage)[0].name == name


def test_a_run_unlike_all_regimes_is_told_so(study):
    inputs = read_inputs(read_example("fusellm", ["plan.tokens=1e13"]), is_example=True)
    assert [*describe_outlook(inputs)][1].startswith("no regime of the study is similar")


def test_no_setting_is_advised_that_the_recipe_or_the_sources_forbid(study):
    few = read_inputs(read_example("fusellm", ["plan.tokens=1e8"]), is_example=True)
    assert few.recipe.fusion == "paper" and len([*describe_outlook(few)]) == 2
    free = read_example("fusellm", ["plan.tokens=1e9", "fusion=default"])
    inputs = read_inputs(free, is_example=True)
    assert len([*describe_outlook(inputs)]) == 3
    inputs.advantage = -0.04
    assert len([*describe_outlook(inputs)]) == 2


def test_an_ample_text_is_not_advised_to_be_read_again(study):
    first, second = describe_outlook(read_inputs(read_example("fusellm", []), is_example=True))
    assert "is read once; how the sources compare with the target is known once" in first
    assert (
        "little text" in second
        and "8.0% better than CLM at its best (6.0% to 10.0%, 3 seeds)" in second
    )
    assert "needs 3.0 times the text for that (1 seed)" in second


def test_captured_sources_are_compared_with_the_targets_own_copy(study, root, tmp_path):  # noqa: F811
    values = values_of(root, tmp_path)
    values["sources"] = [
        {"name": name, "model": str(root / model)}
        for name, model in (("a", "source"), ("own", "target"))
    ]
    recipe = parse_recipe(values)
    layout = plan_layout(recipe, ALIGN_FACTS)
    rows = sample_rows(recipe, layout.corpus_documents.files)
    assert rows is not None
    assert read_inputs(recipe).advantage is None
    layout.corpus.claim({})
    layout.corpus.write_shard(0, rows, tokens=1, stats={"bytes": 1.0})
    layout.corpus.finish(1)
    for name, rate in (("a", 0.9), ("own", 1.0)):
        nats = (rate * rows["num_bytes"].to_numpy()).astype(np.float32)
        nats[0] = math.inf  # a rejected row
        columns = {
            field.name: [[]] * rows.num_rows if pa.types.is_list(field.type) else None
            for field in CAPTURED
        } | {"row_id": rows["row_id"].to_pylist(), "nats": nats}
        table = pa.Table.from_pydict(columns, schema=CAPTURED)
        layout.captured[name].claim({})
        layout.captured[name].write_shard(0, table, tokens=1)
    inputs = read_inputs(recipe)
    assert inputs.advantage == pytest.approx(0.1, abs=1e-5)
    sentences = list(describe_outlook(inputs))
    assert "the best source is 10.0% better than the target on it" in sentences[0]
    assert sentences[-1].startswith("no regime of the study is similar")  # a text of some lines
    little = 0.1 * inputs.target.bytes_per_token * inputs.target.size.parameters
    inputs.corpus = replace(inputs.corpus, num_bytes=little)
    sentences = list(describe_outlook(inputs))
    assert sentences[-1].startswith("so little text is worth reading more often")
    assert "train.epochs=16" in sentences[-1]
    layout.captured["a"].store.write("captured/broken", b"")
    path = next(Path(tmp_path).rglob("*.parquet"))
    for file in Path(tmp_path).rglob("captured/**/*.parquet"):
        file.write_bytes(b"corrupt")
    assert path.is_file()
    damaged = read_inputs(recipe)
    assert damaged.advantage is None
    assert any(warning.startswith("captured sources") for warning in damaged.warnings)
