"""A source that is adapted to the corpus scores no text that it was trained on."""

import numpy as np

from benchmarks.fusion.adapted import fold_of_rows
from benchmarks.fusion.planner import FOLDS, Planner
from benchmarks.fusion.regime_grids import REGIMES, SPLIT_SEED
from benchmarks.fusion.stored import load, read_captured, read_rows, tokenizer_of
from benchmarks.fusion.units import do_unit, list_with_needs
from benchmarks.fusion.work import work
from rayfuse.evaluate.bits_per_byte import score_rows
from rayfuse.storage.codec import flatten_column


def test_each_fold_is_captured_by_the_model_that_is_trained_on_the_others(shared_data, tmp_path):
    planner = Planner(REGIMES["tiny"], 2, split_seed=SPLIT_SEED)
    source = planner.sources["llama"]
    aligned = planner.align(planner.adapt(source, epochs=1, rate=5e-3), record="sampled-8+8")
    for unit in list_with_needs([aligned]):
        do_unit(unit, tmp_path, shared_data, work)
    corpus = read_rows(aligned.needs["corpus"], tmp_path)
    folds = fold_of_rows(corpus)
    doc_ids = np.array(corpus["doc_id"].to_pylist())
    assert set(folds) == set(range(FOLDS))
    assert not set(doc_ids[folds == 0]) & set(doc_ids[folds == 1])
    tokenizer = tokenizer_of(source.needs["tokenizer"], tmp_path)
    captured = read_captured(aligned, tmp_path)
    nats = captured["nats"].to_numpy()
    assert len(flatten_column(captured, "token_ids")[1]) == corpus.num_rows + 1
    folded = aligned.needs["captured"].needs
    for fold in range(FOLDS):
        model = folded[f"adapted {fold}"]
        result = model.read(tmp_path)
        assert result["rows"] == (folds != fold).sum()  # of the other fold alone
        own = score_rows(load(model, tmp_path), tokenizer, corpus, name="model", batch_tokens=4_096)
        np.testing.assert_allclose(nats[folds == fold], own[folds == fold], rtol=1e-3)
        assert not np.allclose(nats[folds != fold], own[folds != fold], rtol=1e-3)
