"""The regimes choose on one half and report on the other; other losses are as defined."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.fusion.filter import filter_sources
from benchmarks.fusion.intervals import measure_interval
from benchmarks.fusion.regime_grids import SPLIT_SEED
from benchmarks.fusion.regime_pages import draw_regimes, render_page
from benchmarks.fusion.regime_report import choose_variants, write_regimes
from benchmarks.fusion.rivals import hybrid_distance, sorted_distance
from benchmarks.fusion.scales import DOMAINS
from benchmarks.fusion.text import read_fusion, read_held_out, read_pretraining
from benchmarks.fusion.units import Unit, list_with_needs, restore_results, save_results
from rayfuse.evaluate.ensemble import TokenNLL

REPOSITORY = Path(__file__).parents[2]


def test_the_split_is_one_for_all_seeds_and_the_reserve_is_in_no_training(shared_data):
    reserved = read_held_out(
        shared_data, "reported", max_documents=10_000, max_chars=4_000, has_reserve=True
    )
    parts = {"reserved": {document.doc_id for document in reserved}}
    corpora = []
    for seed in (2, 3):
        pretraining = read_pretraining(shared_data, seed, split_seed=SPLIT_SEED)
        corpus = read_fusion(shared_data, seed, 32_000, 3_000, split_seed=SPLIT_SEED)
        parts[f"pretraining {seed}"] = {document.doc_id for document in pretraining}
        parts[f"corpus {seed}"] = {document.doc_id for document in corpus}
        corpora.append([document.doc_id for document in corpus])
    assert parts["pretraining 2"] == parts["pretraining 3"]
    assert corpora[0] != corpora[1]
    assert {document.domain for document in reserved} == set(DOMAINS)
    for one, other in (
        ("reserved", "pretraining 2"),
        ("reserved", "corpus 2"),
        ("reserved", "corpus 3"),
        ("pretraining 2", "corpus 3"),
        ("pretraining 2", "corpus 2"),
    ):
        assert not parts[one] & parts[other]


def test_the_sorted_distance_ignores_order_and_pads_the_smaller_vocabulary():
    p = torch.tensor([[0.5, 0.3, 0.2]])
    assert float(sorted_distance(p, p[:, [2, 0, 1]])) == 0
    wide = torch.tensor([[0.4, 0.1, 0.3, 0.2]])
    assert float(sorted_distance(p, wide)) == pytest.approx(0.1 + 0 + 0 + 0.1)


def test_the_hybrid_distance_compares_matched_tokens_by_id_and_the_others_sorted():
    p, q = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.2, 0.5, 0.3]])
    ids = torch.tensor([0, 1]), torch.tensor([1, 2])
    assert float(hybrid_distance(p, q, *ids)) == pytest.approx(0, abs=1e-6)
    swapped = torch.tensor([1, 0]), torch.tensor([1, 2])
    a, b = np.array([0.3, 0.5]), np.array([0.5, 0.3])
    middle = (a + b) / 2
    expected = (a * np.log(a / middle)).sum() / 2 + (b * np.log(b / middle)).sum() / 2
    assert float(hybrid_distance(p, q, *swapped)) == pytest.approx(2 / 3 * expected, abs=1e-6)


def filter_slowly(nats: np.ndarray, doc_ids: list[str], rate: float) -> list[float]:
    """Mix rows of single-chunk-per-token sources as the formula in `posterior.py` says."""
    weights, found = None, []
    for row, doc in enumerate(doc_ids):
        if row == 0 or doc != doc_ids[row - 1]:
            weights = np.full(len(nats), 1 / len(nats))
        total = 0.0
        for chunk in nats[:, row].T:
            total -= np.log((weights * np.exp(-chunk)).sum())
            weights = weights * np.exp(-chunk)
            weights = (1 - rate) * weights / weights.sum() + rate / len(nats)
        found.append(total)
    return found


def test_the_filter_ensemble_weighs_by_the_text_before():
    nats = np.random.default_rng(0).gamma(2.0, 1.0, (3, 4, 5))
    doc_ids = ["a", "a", "b", "c"]
    ends = np.arange(1, 6, dtype=np.int32)
    rows = [[TokenNLL(ends, row) for row in of_source] for of_source in nats]
    found = filter_sources(rows, doc_ids, 0.05)
    np.testing.assert_allclose(found, filter_slowly(nats, doc_ids, 0.05), rtol=1e-5)
    np.testing.assert_allclose(
        filter_sources([rows[0]], doc_ids, 0.05), nats[0].sum(axis=1), rtol=1e-5
    )


DOCUMENTS = [[f"d{i}", DOMAINS[i % 2], 1000] for i in range(40)]
"""Of each half."""

LOSSES = {
    "target": {"target": (2.8, 2.8)},
    "best_source": {"a": (2.7, 2.9), "b": (2.9, 2.5)},
    "ensemble_mean": {"mean": (2.3, 2.3)},
    "ensemble_filter": {"filter": (2.2, 2.2)},
    "clm": {"1 epoch": (2.75, 2.7), "4 epochs": (2.65, 2.7)},
    "clm 2x": {"4 epochs": (2.5, 2.5)},
    "clm 4x": {"4 epochs": (2.3, 2.3)},
    "fused": {"x": (2.5, 2.5), "y": (2.6, 2.1)},
}
"""Bits per byte on the selection half and on the reported half, by role and variant."""


def make_plan(out: Path, seed: int) -> dict[str, dict[str, Unit]]:
    """Store results of these losses; every variant, document and seed differs a little."""
    held_out = Unit("held_out", "valid", {})
    plan: dict[str, dict[str, Unit]] = {}
    results = [(held_out, {"selection": DOCUMENTS, "reported": DOCUMENTS})]
    draw = np.random.default_rng(seed)
    for role, variants in LOSSES.items():
        for name, losses in variants.items():
            noise = draw.normal(0, 0.01, len(DOCUMENTS)) + draw.normal(0, 0.005)  # and of the seed
            unit = Unit(
                "score", name, {"seed": seed, "variant": f"{role} {name}"}, {"held_out": held_out}
            )
            plan.setdefault(role, {})[name] = unit
            nats = {
                half: (np.log(2) * 1000 * (loss + noise)).tolist()
                for half, loss in zip(("selection", "reported"), losses, strict=True)
            }
            results.append((unit, {"nats": nats}))
    for unit, result in results:
        unit.folder(out).mkdir(parents=True, exist_ok=True)
        (unit.folder(out) / "result.json").write_text(json.dumps(result))
    return plan


def test_variants_are_chosen_on_the_selection_half_and_reported_on_the_other(tmp_path):
    plans = {seed: make_plan(tmp_path, seed) for seed in (2, 3, 4)}
    assert choose_variants(plans[2], tmp_path) == {
        "target": "target", "best_source": "a", "ensemble_mean": "mean",
        "ensemble_filter": "filter", "clm": "4 epochs", "clm 2x": "4 epochs",
        "clm 4x": "4 epochs", "fused": "x",
    }  # fmt: skip
    write_regimes({"R1": plans}, {}, tmp_path)
    regime = json.loads((tmp_path / "regimes.json").read_text())["R1"]
    assert regime["seeds"] == 3
    assert regime["best_source"] == pytest.approx(2.9, abs=0.01)
    assert regime["gain"]["value"] == pytest.approx(1 - 2.5 / 2.7, abs=5e-3)
    assert regime["gain"]["low"] <= regime["gain"]["value"] <= regime["gain"]["high"]
    assert regime["token_multiple"]["value"] == pytest.approx(2, abs=0.05)
    assert regime["token_multiple"]["is_inside_curve"]
    assert regime["absorption"]["value"] == pytest.approx(0.2 / 0.5, abs=0.01)
    assert regime["absorption_of_mean"]["value"] == pytest.approx(0.2 / 0.4, abs=0.01)
    assert regime["fused_minus"]["target"]["all"]["value"] == pytest.approx(-0.3, abs=0.01)
    study = json.loads((tmp_path / "study.json").read_text())["R1"]
    assert study["gain"][0] == pytest.approx(regime["gain"]["value"], abs=1e-4)
    assert study["advantage"] == pytest.approx(1 - 2.9 / 2.8, abs=0.01)
    page = render_page({"R1": regime})
    assert "| fused | x | 3 | 2." in page and "| clm | 1 epoch | 2.7" in page
    assert draw_regimes({"R1": regime}).startswith(b"\x89PNG")


def test_a_quantity_takes_the_seeds_that_all_its_variants_have(tmp_path):
    plans = {seed: make_plan(tmp_path, seed) for seed in (2, 3, 4)}
    whole = tmp_path / "regimes.json"
    write_regimes({"R1": plans}, {}, tmp_path)
    complete = json.loads(whole.read_text())["R1"]
    late = plans[3]["clm 4x"]["4 epochs"].folder(tmp_path) / "result.json"
    late.unlink()  # seed 4 is done, but without seed 3 it would be paired with another's
    write_regimes({"R1": plans}, {}, tmp_path)
    partial = json.loads(whole.read_text())["R1"]
    assert partial["seeds"] == partial["seeds_by_role"]["clm 4x"] == 1
    assert partial["gain"] == complete["gain"]
    assert partial["token_multiple"] != complete["token_multiple"]
    width = complete["gain"]["high"] - complete["gain"]["low"]
    assert width > 0.002  # the documents alone give less


def test_kept_scores_are_restored_and_need_nothing_else(tmp_path):
    plan = make_plan(tmp_path / "first", 2)
    units = [unit for variants in plan.values() for unit in variants.values()]
    save_results(units, tmp_path / "first", tmp_path / "kept.gz")
    second = tmp_path / "second"
    assert len(list_with_needs(units, second)) == len(units) + 1  # and the held-out text
    restore_results(units, second, tmp_path / "kept.gz")
    assert list_with_needs(units, second) == []
    for unit in units:
        assert unit.read(second)["nats"] == unit.read(tmp_path / "first")["nats"]


def test_a_role_with_a_missing_variant_is_not_chosen_yet(tmp_path):
    plan = make_plan(tmp_path, 2)
    (plan["fused"]["x"].folder(tmp_path) / "result.json").unlink()
    assert "fused" not in choose_variants(plan, tmp_path)
    write_regimes({"R1": {2: plan}}, {}, tmp_path)
    assert "gain" not in json.loads((tmp_path / "regimes.json").read_text())["R1"]


def test_an_interval_of_a_ratio_covers_documents_and_seeds():
    documents = [(f"d{i}", "a", 100) for i in range(50)]
    draw = np.random.default_rng(0)
    nats = {"x": draw.normal(100, 5, (3, 50)), "y": draw.normal(200, 5, (3, 50))}
    found = measure_interval(lambda losses: losses["y"] / losses["x"], nats, documents)
    assert found.low < found.value < found.high
    assert found.value == pytest.approx(2, abs=0.05)


def test_a_regime_is_computed_from_the_text_and_the_tokenizers(shared_data, tmp_path):
    roles = ("target", "best_source", "ensemble_filter", "uld")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.fusion.regimes", "--out", str(tmp_path), "--regimes",
         "tiny", "--only-choose", "--roles", *roles],
        cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=1000,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    regime = json.loads((tmp_path / "regimes.json").read_text())["tiny"]
    assert set(regime["chosen"]) == set(roles)
    assert regime["uld"] < regime["target"]
    assert (tmp_path / "RESULTS.md").read_text().startswith("# When fusion gains on CLM")
