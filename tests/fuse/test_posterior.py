"""The posterior over sources: plain loops give the same, and later text never changes a weight."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from rayfuse.config.fuse import FuseSettings
from rayfuse.fuse.posterior import weigh_by_posterior
from rayfuse.fuse.reader import FusedRows
from rayfuse.schema import INSIDE_TOKEN
from rayfuse.storage.codec import build_list_column, flatten_column
from rayfuse.storage.dataset import DataSet
from tests.train.data import open_reader, write_data

SOURCES, ROWS, ROW_TOKENS = 3, 6, 20


def draw(seed: int) -> dict:
    random = np.random.default_rng(seed)
    offsets = np.arange(ROWS + 1) * ROW_TOKENS
    starts_token = random.random((SOURCES, offsets[-1])) < 0.8
    starts_token[:, offsets[:-1]] = True
    nats = random.exponential(2.0, (SOURCES, offsets[-1]))
    nats[:, offsets[1:] - 1] = 0.0
    has_row = np.ones((SOURCES, ROWS), dtype=bool)
    has_row[1, 2], has_row[:, 4] = False, False
    nats[~np.repeat(has_row, ROW_TOKENS, axis=1)] = 0.0
    documents = np.array([0, 0, 0, 1, 1, 2])
    places = {"starts_token": starts_token, "has_row": has_row, "offsets": offsets}
    return {"nats": nats, **places, "documents": documents}


def weigh_plainly(case: dict, prior: list[float], switch_rate: float) -> np.ndarray:
    """Row by row and token by token, in Python."""
    weights = np.zeros(case["nats"].shape)
    base = np.array(prior) / sum(prior)
    document, current = -1, base
    for row in range(ROWS):
        if case["documents"][row] != document:
            document, current = case["documents"][row], base
        active = case["has_row"][:, row]
        start, stop = case["offsets"][row : row + 2]
        since = start
        for at in range(start, stop + 1):
            ends = at == stop or case["starts_token"][active, at].all()
            if ends and at > since:
                if active.any():
                    likelihood = np.exp(-case["nats"][:, since:at].sum(axis=1))
                    likelihood /= (likelihood * current)[active].sum() / current[active].sum()
                    moved = np.where(active, current * likelihood, current)
                    kept = (1 - switch_rate) ** (at - since)
                    current = kept * moved + (1 - kept) * base
                since = at
            if at < stop:
                weights[:, at] = current
    return weights


@pytest.mark.parametrize("switch_rate", [0.001, 0.05, 0.5])
def test_weights_are_those_of_plain_loops(switch_rate):
    for seed in range(20):
        case = draw(seed)
        found = weigh_by_posterior(**case, prior=[1.0, 2.0, 0.5], switch_rate=switch_rate)
        expected = weigh_plainly(case, [1.0, 2.0, 0.5], switch_rate)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        np.testing.assert_allclose(found.sum(axis=0), 1, rtol=1e-6)


def test_later_text_never_changes_earlier_weights():
    """Nor do the bytes of a token that has not ended for every source."""
    case = draw(0)
    before = weigh_by_posterior(**case, prior=[1.0] * SOURCES, switch_rate=0.05)
    random = np.random.default_rng(1)
    is_rejected = ~np.repeat(case["has_row"], ROW_TOKENS, axis=1)
    is_common = (case["starts_token"] | is_rejected).all(axis=0)
    for at in range(1, case["offsets"][-1]):
        common = np.flatnonzero(is_common[: at + 1])
        changed = case | {"nats": case["nats"].copy()}
        changed["nats"][:, common[-1] :] = random.exponential(9.0, (SOURCES, 1))
        after = weigh_by_posterior(**changed, prior=[1.0] * SOURCES, switch_rate=0.05)
        np.testing.assert_array_equal(after[:, : at + 1], before[:, : at + 1])


def test_the_source_that_predicts_a_document_gets_its_weight_and_the_next_starts_anew():
    case = draw(0)
    case["nats"][:] = 3.0
    case["nats"][2] = 0.1
    case["has_row"][:] = True
    found = weigh_by_posterior(**case, prior=[1.0] * SOURCES, switch_rate=0.02)
    starts = case["offsets"][:-1]
    assert (found[2, starts[1:3]] > 0.9).all()  # carried over the rows of a document
    np.testing.assert_allclose(found[:, starts[[0, 3, 5]]], 1 / SOURCES, rtol=1e-6)


def test_a_reader_weighs_by_the_text_before(tmp_path):
    corpus, aligned = write_data(tmp_path, [[15, 17], [9, 30]])
    reader = open_reader(corpus, aligned, FuseSettings(method="fixed_share"))
    reader.keep({0, 1})
    rows = reader.read_rows(np.array([[0, 0], [0, 1], [1, 1]]))
    mass = rows.top.probs.sum(axis=1) + rows.top.tail
    np.testing.assert_allclose(mass, rows.has_signal.astype(float), atol=1e-3)
    assert rows.has_signal.sum() > 20
    opened = reader.open[0].result()
    weights = np.exp(-np.stack([source.nll for source in opened.sources]))
    is_active = np.isfinite([source.nll for source in opened.sources]).all(axis=0)
    np.testing.assert_allclose(weights.sum(axis=0)[is_active], 1, rtol=1e-6)
    np.testing.assert_allclose(weights[:, 0][weights[:, 0] > 0], 0.5, rtol=1e-6)  # the prior


def mark_inside(folder: Path, seed: int, changed_after: int | None = None) -> dict[str, DataSet]:
    """Write the two sources of `write_data` again, with signals inside tokens of the first.

    Args:
        folder: A new one.
        seed: Of what changes.
        changed_after: The position after which the sources' NLL is another; none changes without.
    """
    _, aligned = write_data(folder, [[40]])
    for number, (name, data) in enumerate(aligned.items()):
        table = data.read_shard(data.read_commit(0))
        offsets = flatten_column(table, "has_signal")[1]
        had_signal = flatten_column(table, "has_signal")[0].copy()
        is_inside = ~had_signal & (number == 0)
        nats = flatten_column(table, "nats_per_byte")[0].copy()
        if changed_after is not None:
            nats[changed_after:] = np.random.default_rng(seed).random(len(nats) - changed_after)
        columns = {
            "has_signal": had_signal | is_inside,
            INSIDE_TOKEN.name: is_inside,
            "nats_per_byte": nats,
        }
        for column, values in columns.items():
            field = table.schema.field(column) if column in table.column_names else INSIDE_TOKEN
            built = build_list_column(values, offsets, field.type)
            if column in table.column_names:
                table = table.set_column(table.column_names.index(column), field, built)
            else:
                table = table.append_column(field, built)
        aligned[name] = write_again(data, table)
    return aligned


def write_again(data: DataSet, table: pa.Table) -> DataSet:
    again = DataSet(data.store, f"{data.stage}-again", data.name, data.fingerprint)
    again.claim({})
    again.write_shard(0, table, tokens=1, stats={"inside_tokens": 1.0})
    return again


def test_a_signal_inside_a_token_is_fused_but_ends_no_token(tmp_path):
    """Weights are those without it, and the text after a token's start has no part in them."""
    settings = FuseSettings(method="fixed_share")
    rows = np.array([[0, 0]])

    def read(corpus: DataSet, aligned: dict[str, DataSet]) -> tuple[np.ndarray, FusedRows]:
        reader = open_reader(corpus, aligned, settings)
        reader.keep({0})
        opened = reader.open[0].result()
        return np.stack([source.nll for source in opened.sources]), reader.read_rows(rows)

    corpus, plain = write_data(tmp_path / "plain", [[40]])
    without, fused_without = read(corpus, plain)
    nll, fused = read(corpus, mark_inside(tmp_path / "marked", 0))
    is_new = np.isfinite(nll) & ~np.isfinite(without)
    assert is_new[0].sum() > 5 and not is_new[1].any()
    np.testing.assert_array_equal(nll[np.isfinite(without)], without[np.isfinite(without)])
    assert fused.has_signal.sum() >= fused_without.has_signal.sum()
    is_same = ~is_new.any(axis=0)
    np.testing.assert_array_equal(fused.top.probs[is_same], fused_without.top.probs[is_same])
    common = np.flatnonzero(np.isfinite(without).all(axis=0))
    for at in np.flatnonzero(is_new[0])[:5]:
        # All text after the last byte where both sources' tokens had ended is another.
        start = int(common[common <= at].max(initial=0))
        changed = mark_inside(tmp_path / f"changed-{at}", int(at), start)
        other_nll, other = read(corpus, changed)
        np.testing.assert_array_equal(other_nll[:, : at + 1], nll[:, : at + 1])
        for ours, theirs in zip(vars(fused.top).values(), vars(other.top).values(), strict=True):
            np.testing.assert_array_equal(ours[: at + 1], theirs[: at + 1])
