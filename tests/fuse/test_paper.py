"""`fusion: paper` against the papers' formula, written out densely; and its faults, not ours.

FuseLLM, arXiv 2401.10491: section 3.2 (MinED map), 3.3 (MinCE), top 10 renormalised.
"""

import numpy as np
import pyarrow as pa
import pytest

from benchmarks.synthetic import make_captured, make_corpus
from rayfuse.align.distributions import map_entries, merge_entries
from rayfuse.align.matches import match_positions
from rayfuse.align.method import build_alignment
from rayfuse.align.methods.min_edit_distance import map_to_nearest, match_by_edit_distance
from rayfuse.align.shard import align_shard
from rayfuse.align.token_spans import list_token_bytes, place_tokens
from rayfuse.align.vocab_map import UNCHANGED, build_maps, map_vocabulary
from rayfuse.config.fuse import FuseSettings
from rayfuse.config.load import parse_recipe
from rayfuse.config.overrides import RecipeError
from rayfuse.fuse.nll import nll_of_rows
from rayfuse.fuse.reader import ShardReader
from rayfuse.models.text_tokenizer import TextTokenizer, build_tokenizer
from rayfuse.storage.codec import TopK, decode_probs, flatten_column
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.store import open_store
from tests.fakes import SAMPLE, byte_level_tokenizer, sentencepiece_tokenizer
from tests.fuse.oracle import fuse_sources
from tests.fuse.test_rules import random_source

TOP_K = 10
TARGET = build_tokenizer(sentencepiece_tokenizer(340).to_str(), start_id=1, eos_id=2)
SOURCES = {
    "fine": build_tokenizer(byte_level_tokenizer(270).to_str(), start_id=0, eos_id=0),
    "coarse": build_tokenizer(byte_level_tokenizer(400).to_str(), start_id=0, eos_id=0),
}
RECIPE = {
    "storage": "s",
    "corpus": {"documents": "d"},
    "target": {"model": "t"},
    "sources": [{"name": "fine", "model": "a"}, {"name": "coarse", "model": "b"}],
}
PAPER = parse_recipe(RECIPE | {"fusion": "paper"})


@pytest.fixture(scope="module")
def corpus() -> pa.Table:
    return make_corpus([text * 2 for text in SAMPLE], TARGET, max_tokens=1024)


@pytest.fixture(scope="module")
def captured(corpus) -> dict[str, pa.Table]:
    return {
        name: make_captured(corpus, source, top_k=TOP_K, seed=seed)
        for seed, (name, source) in enumerate(SOURCES.items())
    }


def read_fused(corpus, captured, folder, fuse: FuseSettings, method: str):
    """Return the fused rows of a shard by rayfuse's own way from capture to training."""
    store = open_store(str(folder))

    def keep(name: str, table: pa.Table) -> DataSet:
        data = DataSet(store, name, "", "f")
        data.claim({})
        data.write_shard(0, table, tokens=1)
        data.finish(1)
        return data

    aligned = {}
    for name, source in SOURCES.items():
        maps = None
        if method == "min_edit_distance":
            nearest = map_to_nearest(range(source.vocab_size), source, TARGET)
            maps = build_maps(nearest, source, TARGET)
        alignment = build_alignment(source, TARGET, method, maps)
        aligned[name] = keep(name, align_shard(corpus, captured[name], alignment)[0])
    reader = ShardReader(keep("corpus", corpus), aligned, fuse, TARGET.count_bytes())
    reader.keep({0})
    rows = [reader.read_rows(np.array([[0, row]])) for row in range(corpus.num_rows)]
    return rows, aligned


def dense_rows(table: pa.Table, source: TextTokenizer, row: int) -> np.ndarray:
    """A captured row's top 10, mapped by the nearest token, added up and renormalised."""
    _ids, offsets = flatten_column(table, "token_ids")
    top_ids = flatten_column(table, "top_ids")[0].reshape(-1, TOP_K)
    tails = flatten_column(table, "tail_logprobs")[0]
    probs = decode_probs(flatten_column(table, "top_logprobs")[0], top_ids, tails)
    maps = build_maps(map_to_nearest(range(source.vocab_size), source, TARGET), source, TARGET)
    part = slice(offsets[row], offsets[row + 1])
    out = np.zeros((offsets[row + 1] - offsets[row], TARGET.vocab_size))
    for t, (row_ids, row_probs) in enumerate(zip(top_ids[part], probs[part], strict=True)):
        for token_id, p in zip(row_ids, row_probs, strict=True):
            if token_id >= 0 and maps[UNCHANGED, token_id] >= 0:
                out[t, maps[UNCHANGED, token_id]] += p
    return out / np.maximum(out.sum(axis=1, keepdims=True), 1e-30)


def cost_per_token(table: pa.Table, source: TextTokenizer, row: int) -> float:
    ids, offsets = flatten_column(table, "token_ids")
    logprobs = flatten_column(table, "next_logprobs")[0].astype(np.float64)
    part = slice(offsets[row], offsets[row + 1])
    ends = ids[part][-1] == source.eos_id
    said = logprobs[part][: -2 if ends else -1]
    return float(-said.mean())


def test_the_preset_is_the_papers_formula(corpus, captured, tmp_path):
    assert (PAPER.capture.top_k, PAPER.align.method, PAPER.train.clm_weight) == (
        10,
        "min_edit_distance",
        0.9,
    )
    fused, _aligned = read_fused(corpus, captured, tmp_path, PAPER.fuse, "min_edit_distance")
    checked = 0
    for row, result in enumerate(fused):
        costs = {name: cost_per_token(captured[name], s, row) for name, s in SOURCES.items()}
        ranked = sorted(SOURCES, key=costs.__getitem__)
        text = [corpus["text"].to_pylist()[row].encode()]
        taken = np.zeros(len(result.has_signal), dtype=bool)
        for name in ranked:
            source, table = SOURCES[name], captured[name].slice(row, 1)
            ids, offsets = flatten_column(table, "token_ids")
            target_ids, target_offsets = flatten_column(corpus.slice(row, 1), "target_ids")
            nearest = map_to_nearest(range(source.vocab_size), source, TARGET)
            maps = build_maps(nearest, source, TARGET)
            alignment = build_alignment(source, TARGET, "min_edit_distance", maps)
            ends = corpus["ends_document"].to_pylist()[row : row + 1]
            matches = match_by_edit_distance(
                place_tokens(ids, offsets, text, alignment.source, ends),
                place_tokens(target_ids, target_offsets, text, alignment.target, ends),
                alignment,
            )
            expected = dense_rows(captured[name], source, row)
            for t, s in zip(matches.target_at, matches.source_at, strict=True):
                if taken[t]:
                    continue
                taken[t] = True
                checked += 1
                got = np.zeros(TARGET.vocab_size)
                real = result.top.ids[t] >= 0
                got[result.top.ids[t][real]] = result.top.probs[t][real]
                # One code of the 8-bit record is 1.4 percent of a probability.
                np.testing.assert_allclose(got, expected[s], atol=0.012)
                assert result.top.tail[t] == 0
        np.testing.assert_array_equal(result.has_signal, taken)
    assert checked > 100


def test_before_it_is_stored_the_mapped_distribution_is_the_formulas_to_float32(captured):
    """Storing rounds each probability to 8 bits; mapping, adding up and renormalising do not."""
    for name, source in SOURCES.items():
        table = captured[name]
        top_ids = flatten_column(table, "top_ids")[0].reshape(-1, TOP_K)
        tails = flatten_column(table, "tail_logprobs")[0]
        probs = decode_probs(flatten_column(table, "top_logprobs")[0], top_ids, tails)
        nearest = map_to_nearest(range(source.vocab_size), source, TARGET)
        maps = build_maps(nearest, source, TARGET)[UNCHANGED]
        entries = TopK(
            np.column_stack([top_ids, np.full(len(tails), -1, dtype=np.int32)]),
            np.column_stack([probs, np.zeros(len(tails), dtype=np.float32)]),
            np.exp(tails.astype(np.float32)),
        )
        mapped = map_entries(entries, maps[entries.ids])
        merged = merge_entries(mapped, np.full(len(tails), -1, dtype=np.int32))
        np.testing.assert_allclose(merged.probs.sum(axis=1) + merged.tail, 1.0, atol=2e-6)
        got = np.zeros((len(merged.ids), TARGET.vocab_size))
        for t, (row_ids, row) in enumerate(zip(merged.ids, merged.probs, strict=True)):
            got[t, row_ids[row_ids >= 0]] = row[row_ids >= 0]
        got /= np.maximum(got.sum(axis=1, keepdims=True), 1e-30)
        rows = range(table.num_rows)
        expected = np.concatenate([dense_rows(table, source, row) for row in rows])
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)


def test_the_preset_pins_what_the_defaults_may_change():
    train = PAPER.train
    assert (PAPER.capture.signal, train.divergence, train.temperature) == ("top_k", "forward_kl", 1)
    assert (train.epochs, train.publish) == (1, "last")
    with pytest.raises(RecipeError, match=r"fusion paper sets train.epochs to 1, .* sets it to 3"):
        parse_recipe(RECIPE | {"fusion": "paper", "train": {"epochs": 3}})
    # Section 4.1; another model may need others, so the preset leaves them to the recipe.
    assert (train.learning_rate, train.schedule, train.rows_per_step) == (1e-5, "cosine", 128)
    assert (train.warmup_share, train.weight_decay, train.gradient_clipping) == (0.008, 0.1, 1)
    assert (train.betas, PAPER.corpus.max_tokens) == ((0.9, 0.95), 2048)


def test_the_preset_and_a_contrary_setting_are_refused():
    with pytest.raises(RecipeError, match=r"fusion paper sets fuse.unit to 'row'.*'token'"):
        parse_recipe(RECIPE | {"fusion": "paper", "fuse": {"unit": "token"}})
    with pytest.raises(RecipeError, match=r"nats_per_token is not defined for unit span"):
        parse_recipe(RECIPE | {"fuse": {"unit": "span", "cost": "nats_per_token"}})
    with pytest.raises(RecipeError, match=r"fuse.weights names 'fin'"):
        parse_recipe(RECIPE | {"fuse": {"weights": {"fin": 1.0}}})


def test_a_rejected_row_of_a_source_of_weight_0_changes_no_document(corpus, captured, tmp_path):
    ends = pa.array([False] * (corpus.num_rows - 1) + [True])
    corpus = corpus.set_column(
        corpus.schema.get_field_index("ends_document"), "ends_document", ends
    )
    nats = captured["fine"]["nats"].to_pylist()
    index = captured["fine"].schema.get_field_index("nats")
    lost = pa.array([float("inf"), *nats[1:]], type=pa.float32())
    rejected = captured | {"fine": captured["fine"].set_column(index, "nats", lost)}
    fuse = FuseSettings(unit="document", weights={"fine": 0.0})
    whole, _ = read_fused(corpus, captured, tmp_path / "whole", fuse, "bytes")
    broken, _ = read_fused(corpus, rejected, tmp_path / "broken", fuse, "bytes")
    for ours, theirs in zip(whole, broken, strict=True):
        assert ours.has_signal.any()
        np.testing.assert_array_equal(ours.has_signal, theirs.has_signal)
        np.testing.assert_array_equal(ours.top.probs, theirs.top.probs)


# What the published code does wrong, and the default does not. That vocabularies are padded hurts
# nothing: `test_fault_17` of tests/capture/test_faults.py, and tests/test_pipeline.py.


@pytest.fixture(scope="module")
def fused(corpus, captured, tmp_path_factory):
    folder = tmp_path_factory.mktemp("default")
    return read_fused(corpus, captured, folder, FuseSettings(), "bytes")


def test_a_position_without_signal_teaches_nothing_and_not_its_own_token(fused, corpus):
    for row, result in enumerate(fused[0]):
        silent = ~result.has_signal
        assert (result.top.ids[silent] == -1).all() or not silent.any()
        assert not result.top.probs[silent].any(), row


def test_the_tail_is_kept(fused):
    for result in fused[0]:
        total = result.top.probs.sum(axis=1) + result.top.tail
        np.testing.assert_allclose(total[result.has_signal], 1.0, atol=1e-3)
        assert (result.top.tail[result.has_signal] > 0).mean() > 0.9


def test_tokens_that_meet_are_added(fused, corpus, captured):
    texts, ends = ([*corpus[name].to_pylist()] for name in ("text", "ends_document"))
    encoded = [text.encode() for text in texts]
    theirs = place_tokens(
        *flatten_column(corpus, "target_ids"), encoded, list_token_bytes(TARGET), ends
    )
    checked = 0
    for name, source in SOURCES.items():
        ours = place_tokens(
            *flatten_column(captured[name], "token_ids"), encoded, list_token_bytes(source), ends
        )
        mapped = map_vocabulary(source, TARGET)[UNCHANGED]
        aligned = fused[1][name].read_shard(fused[1][name].read_commit(0))
        before, after = (read_heads(table) for table in (captured[name], aligned))
        matches = match_positions(ours, theirs)
        for t, s in zip(matches.target_at.tolist(), matches.source_at.tolist(), strict=True):
            if ours.next_has_prefix_space[s] != theirs.next_has_prefix_space[t]:
                continue
            # The entry of what really comes next has the probability of its chain instead.
            others = before[0][s] != ours.ids[s + 1]
            goals = mapped[before[0][s]][others].tolist()
            for goal in {goal for goal in goals if goals.count(goal) > 1} - {-1}:
                if goal != theirs.ids[t + 1]:
                    own = np.array(goals) == goal
                    probs = before[1][s][others][own].tolist()
                    code = (1 - np.log(sum(probs))) * np.log(21) / 255  # how far apart two are
                    (got,) = after[1][t][after[0][t] == goal]
                    assert got == pytest.approx(sum(probs), rel=code)
                    checked += max(probs) < sum(probs) * (1 - 2 * code)  # not the dearest alone
    assert checked > 20


def read_heads(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids and the probabilities of each position's entries."""
    ids = flatten_column(table, "top_ids")[0].reshape(-1, TOP_K)
    tails = flatten_column(table, "tail_logprobs")[0]
    return ids, decode_probs(flatten_column(table, "top_logprobs")[0], ids, tails)


def test_a_finer_tokenizer_is_not_cheaper_for_being_finer(fused, corpus):
    """At equal nats the finer one looks cheaper per token on every row; per byte they are equal."""
    nats = np.full(corpus.num_rows, 100.0)
    num_tokens = {
        name: data.read_shard(data.read_commit(0))["num_tokens"].to_numpy()
        for name, data in fused[1].items()
    }
    assert (nll_of_rows(nats, num_tokens["fine"]) < nll_of_rows(nats, num_tokens["coarse"])).all()
    assert FuseSettings().cost == "nats_per_byte"


def test_gaps_of_a_hundredth_of_a_nat_do_not_tie():
    sizes = np.full(1000, 100)
    nats = np.random.default_rng(0).uniform(150, 300, 1000)
    costs, dearer = nll_of_rows(nats, sizes), nll_of_rows(nats + 0.01 * sizes, sizes)
    assert (costs.astype(np.float32) < dearer.astype(np.float32)).all()


def test_no_choice_is_made_for_text_of_two_documents():
    """A row is a piece of one document however short that is, and rows are what is chosen for."""
    texts = ["A cat.", *SAMPLE, "x", "".join(SAMPLE) * 3]
    rows = make_corpus(texts, TARGET, max_tokens=64)
    whole: dict[str, str] = {}
    for doc_id, text in zip(rows["doc_id"].to_pylist(), rows["text"].to_pylist(), strict=True):
        whole[doc_id] = whole.get(doc_id, "") + text
    assert list(whole.values()) == texts
    assert rows.num_rows > len(texts)
    assert FuseSettings().unit == "row"


def test_newline_stays_newline_and_end_of_text_stays_the_end():
    for source in SOURCES.values():
        maps = map_vocabulary(source, TARGET)
        newline = source.list_by_bytes()[b"\n"]
        assert TARGET.token_bytes[maps[UNCHANGED, newline]] == b"\n"
        assert maps[UNCHANGED, source.eos_id] == TARGET.eos_id


def test_any_number_of_sources_can_be_fused():
    for count in (1, 2, 5, 9):
        sources = [random_source(seed, 0.5) for seed in range(count)]
        assert fuse_sources(sources, FuseSettings()).has_signal.any()
