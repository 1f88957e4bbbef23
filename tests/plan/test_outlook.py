"""The plan names the study's regime that a run is nearest to, and what fusion gained there."""

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from rayfuse.align.facts import ALIGN_FACTS
from rayfuse.config.load import parse_recipe
from rayfuse.plan import outlook
from rayfuse.plan.inputs import read_example, read_inputs, sample_rows
from rayfuse.plan.outlook import describe_outlook, find_nearest, measure_advantage, read_study
from rayfuse.run.layout import plan_layout
from rayfuse.schema import CAPTURED
from tests.plan.test_plan import root, values_of  # noqa: F401 (a fixture)

LATEST = Path(__file__).parents[2] / "benchmarks/fusion/regime_results/regimes.json"

STUDY = {
    "few": {
        "situation": "little text", "tokens_per_parameter": 0.1, "epochs": 16, "advantage": 0.05,
        "gain": [0.08, 0.06, 0.1], "token_multiple": [3.0, 2.5, 3.5],
    },
    "weak": {
        "situation": "weak sources", "tokens_per_parameter": 0.1, "epochs": 2, "advantage": -0.05,
        "gain": [0.01, 0.0, 0.02], "token_multiple": None,
    },
    "many": {
        "situation": "ample text", "tokens_per_parameter": 3.0, "epochs": 1, "advantage": 0.05,
        "gain": [0.02, 0.01, 0.03], "token_multiple": None,
    },
}  # fmt: skip


@pytest.fixture
def study(tmp_path, monkeypatch):
    (tmp_path / "study.json").write_text(json.dumps(STUDY))
    monkeypatch.setattr(outlook, "STUDY", tmp_path / "study.json")


def test_the_shipped_study_is_the_latest_results():
    regimes = json.loads(LATEST.read_text())
    shipped = read_study()
    assert [regime.name for regime in shipped] == [
        name for name in ("R0", "R1", "R2", "R4") if "gain" in regimes.get(name, {})
    ]
    for regime in shipped:
        gain = regimes[regime.name]["gain"]
        expected = [gain[name] for name in ("value", "low", "high")]
        assert regime.gain == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("ratio", "advantage", "name"),
    [(0.1, None, "few"), (0.05, 0.1, "few"), (0.1, -0.1, "weak"), (10.0, None, "many")],
)
def test_the_nearest_regime_is_by_text_and_by_strength_where_it_is_known(
    study, ratio, advantage, name
):
    assert find_nearest(ratio, advantage).name == name


def test_an_ample_text_is_not_advised_to_be_read_again(study):
    first, second = describe_outlook(read_inputs(read_example("fusellm", []), is_example=True))
    assert "is read once; how the sources compare with the target is known once" in first
    assert "little text" in second and "8.0% better than CLM at its best (6.0% to 10.0%)" in second
    assert "needs 3.0 times the text" in second


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
    assert measure_advantage(read_inputs(recipe)) is None
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
    assert measure_advantage(inputs) == pytest.approx(0.1, abs=1e-5)
    sentences = list(describe_outlook(inputs))
    assert "the best source is 10.0% better than the target on it" in sentences[0]
    few = inputs.corpus.num_bytes / inputs.target.bytes_per_token / inputs.target.size.parameters
    assert few < 0.15 and sentences[-1].startswith("so little text is worth reading more often")
    assert "train.epochs=16" in sentences[-1]
