"""Rows as other trainers get them: the same rows, each once, in an order that can be resumed."""

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, get_worker_info

import rayfuse
from rayfuse.config.recipe import Recipe
from rayfuse.fuse.reader import ShardReader
from rayfuse.interop.find import _is_part
from rayfuse.interop.torch_rows import OPEN_SHARDS, NumberedRows
from rayfuse.interop.views import check_view
from rayfuse.models.files import load_recipe_tokenizer
from tests.stored_run import NUM_SHARDS, store_rows, write_run

pytestmark = pytest.mark.xdist_group("rows")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Recipe:
    return write_run(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def fused(recipe) -> rayfuse.RowDataset:
    return rayfuse.open_dataset(recipe.storage)


def names_of(rows: Any) -> list[str]:
    return [row["row_id"] for row in rows]


def assert_equal_rows(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_fused_rows_are_those_that_training_reads(recipe, fused):
    run = rayfuse.open_run(recipe)
    opener = run.open_dataset().reader.opener
    corpus, *aligned = opener.data
    assert opener.names == ("neox", "gpt2")
    sources = dict(zip(opener.names, aligned, strict=True))
    tokens = load_recipe_tokenizer(recipe.target).count_bytes()
    reader = ShardReader(corpus, sources, recipe.fuse, tokens)
    reader.keep(set(range(NUM_SHARDS)))
    places = [(shard, row) for shard, n in enumerate(reader.rows_per_shard) for row in range(n)]
    assert len(fused) == len(places) > 2 * NUM_SHARDS
    for place, row in zip(places, fused, strict=True):
        expected = reader.read_rows(np.array([place]))
        np.testing.assert_array_equal(row["token_ids"], expected.token_ids)
        np.testing.assert_array_equal(row["top_ids"], expected.top.ids)
        np.testing.assert_array_equal(row["top_probs"], expected.top.probs)
        np.testing.assert_array_equal(row["tail_probs"], expected.top.tail)
        np.testing.assert_array_equal(row["sources"], expected.selected)


@pytest.mark.parametrize("source", ["neox", "gpt2"])
def test_a_source_is_read_in_its_own_tokens_and_in_the_targets(source, recipe, fused):
    captured = list(rayfuse.open_dataset(recipe.storage, "captured", source=source))
    aligned = list(rayfuse.open_dataset(recipe.storage, "aligned", source=source))
    assert names_of(captured) == names_of(aligned) == names_of(fused)
    for of_source, of_target, row in zip(captured, aligned, fused, strict=True):
        np.testing.assert_array_equal(of_target["token_ids"], row["token_ids"])
        assert of_source["nats"] == of_target["nats"]
        assert of_source["nats"] == pytest.approx(-of_source["next_logprobs"].sum(), rel=0.2)
        for columns, known in ((of_source, slice(None)), (of_target, of_target["has_signal"])):
            mass = np.exp(columns["top_logprobs"]).sum(axis=1) + np.exp(columns["tail_logprobs"])
            np.testing.assert_allclose(mass[known], 1, atol=1e-3)
            assert (columns["top_ids"] >= 0)[np.isfinite(columns["top_logprobs"])].all()


def test_tables_frames_and_numbers_have_the_same_rows(fused):
    frame = fused.to_pandas()
    numbered = fused.to_torch()
    assert len(frame) == len(numbered) == len(fused)
    for number, row in enumerate(fused):
        assert_equal_rows(numbered[number], row)
        assert frame["row_id"][number] == row["row_id"]
        np.testing.assert_array_equal(np.stack(frame["top_probs"][number]), row["top_probs"])
    assert list(fused.to_pandas(max_rows=5)["row_id"]) == names_of(fused)[:5]
    assert len(fused.to_pandas(max_rows=0)) == 0
    with pytest.raises(IndexError, match=f"row {len(fused)} of {len(fused)}"):
        numbered[len(fused)]


def test_numbered_rows_keep_few_shards_open_and_pickle_without_them():
    class Reader:
        rows_per_shard = [1] * (OPEN_SHARDS + 2)

        def open_shard(self, shard: int) -> Any:
            opened.append(shard)
            return self

        def read(self, rows: np.ndarray) -> Any:
            return self

        def iterate(self) -> Any:
            return iter([{}])

    opened: list[int] = []
    rows = NumberedRows(Reader())
    for number in (*range(OPEN_SHARDS + 2), OPEN_SHARDS, 0):
        _ = rows[number]
    assert opened == [*range(OPEN_SHARDS + 2), 0]
    assert len(rows.open) == OPEN_SHARDS
    assert not rows.__getstate__()["open"]


def test_each_epoch_has_every_row_once_in_an_order_of_its_own(fused):
    stored = names_of(fused)
    orders = []
    for epoch in range(3):
        stream = fused.to_huggingface(seed=5)
        stream.set_epoch(epoch)
        orders.append(names_of(stream))
        assert orders[-1] == names_of(stream)
        assert sorted(orders[-1]) == sorted(stored)
        # Not only the shards have another order.
        of_shard = [name for name in orders[-1] if name.startswith("s0")]
        assert of_shard != [name for name in stored if name.startswith("s0")]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert names_of(fused.to_huggingface(seed=6)) != orders[0]
    unshuffled = fused.to_huggingface(seed=None)
    for epoch in range(2):
        unshuffled.set_epoch(epoch)
        assert names_of(unshuffled) == stored


@pytest.mark.parametrize("epoch", [0, 2])
@pytest.mark.parametrize("num_rows", [1, 9, 20])
def test_a_stream_resumes_with_the_same_rest(epoch, num_rows, fused):
    stream = fused.to_huggingface(seed=1)
    stream.set_epoch(epoch)
    everything = names_of(stream)
    rows = iter(stream)
    assert names_of(next(rows) for _ in range(num_rows)) == everything[:num_rows]
    state = pickle.loads(pickle.dumps(stream.state_dict()))
    resumed = fused.to_huggingface(seed=1)
    resumed.set_epoch(epoch)
    resumed.load_state_dict(state)
    assert names_of(resumed) == everything[num_rows:]


def name_with_state(rows: list[dict[str, Any]]) -> tuple[int, list[str], dict[str, Any]]:
    """Collate rows to the worker that read them, their names, and its state after them."""
    worker = get_worker_info()
    return worker.id, names_of(rows), worker.dataset.state_dict()


def load(stream: Any, states: dict[int, Any] | None = None) -> DataLoader[Any]:
    def resume(worker: int) -> None:
        if states is not None:
            get_worker_info().dataset.load_state_dict(states[worker])

    return DataLoader(
        stream, batch_size=3, num_workers=2, collate_fn=name_with_state, worker_init_fn=resume
    )


def test_two_workers_read_each_row_once_and_resume_in_the_middle(fused):
    batches = list(load(fused.to_huggingface(seed=1)))
    assert Counter(name for _, names, _ in batches for name in names) == Counter(names_of(fused))
    assert {worker for worker, _, _ in batches} == {0, 1}
    states = {worker: state for worker, _, state in batches[:4]}
    assert set(states) == {0, 1}
    resumed = list(load(fused.to_huggingface(seed=1), states))
    for worker in (0, 1):
        rest = [names for of, names, _ in batches[4:] if of == worker]
        assert [names for of, names, _ in resumed if of == worker] == rest


@pytest.mark.parametrize("num_nodes", [2, 3])  # 2 divides the number of shards, 3 does not
@pytest.mark.parametrize("num_workers", [0, 2])
def test_nodes_and_their_workers_have_disjoint_rows_and_all_of_them(num_nodes, num_workers, fused):
    stream = fused.to_huggingface(seed=1)
    stream.set_epoch(1)
    found: Counter[str] = Counter()
    for node in range(num_nodes):
        part = split_dataset_by_node(stream, node, num_nodes)
        part.set_epoch(1)
        loader = DataLoader(part, batch_size=2, num_workers=num_workers, collate_fn=list)
        names = [row["row_id"] for batch in loader for row in batch]
        assert names
        found.update(names)
    assert found == Counter(names_of(fused))


def test_rows_on_s3_are_read_by_workers_of_a_process_that_has_read_before(
    s3_root, tmp_path_factory, fused
):
    recipe = write_run(tmp_path_factory.mktemp("on-s3"), storage=s3_root)
    assert recipe.storage == s3_root
    rows = rayfuse.open_dataset(s3_root)
    for found, expected in zip(rows, fused, strict=True):
        assert_equal_rows(found, expected)
    loader = DataLoader(rows.to_huggingface(), num_workers=2, batch_size=2, collate_fn=list)
    names = sorted(row["row_id"] for batch in loader for row in batch)
    assert names == sorted(names_of(fused))
    assert len(rayfuse.open_dataset(f"{s3_root}/captured/{rows_folder(rows)}", "captured")) > 0


def rows_folder(rows: rayfuse.RowDataset) -> str:
    """Name the folder of a captured data set of a run."""
    run = rayfuse.open_run(rows.recipe)
    captured = run.open_dataset("captured", source="neox").reader
    return captured.captured.folder.partition("/")[2]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_ray_dataset_has_the_same_rows(tmp_path):
    fused = rayfuse.open_run(write_run(tmp_path)).open_dataset()
    found = {row["row_id"]: row for row in fused.to_ray().take_all()}
    assert len(found) == len(fused)
    for row in fused:
        np.testing.assert_array_equal(found[row["row_id"]]["token_ids"], row["token_ids"])
        np.testing.assert_array_equal(np.stack(found[row["row_id"]]["top_ids"]), row["top_ids"])


def test_a_batch_has_the_rows_padded_and_labels_for_what_is_predicted(fused):
    rows = list(fused)[:5]
    batch = rayfuse.collate(rows, pad_id=7)
    lengths = [len(row["token_ids"]) for row in rows]
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 7).all()
    assert (batch["labels"] != -100).sum(1).tolist() == [length - 1 for length in lengths]
    is_learned = batch["labels"] != -100
    assert torch.equal(batch["labels"][is_learned], batch["input_ids"][is_learned])
    for number, row in enumerate(rows):
        for name in ("top_ids", "top_probs", "tail_probs", "sources"):
            np.testing.assert_array_equal(batch[name][number, : lengths[number]], row[name])
    assert (batch["sources"][batch["attention_mask"] == 0] == -1).all()
    narrow = rows[0] | {name: rows[0][name][:, :3] for name in ("top_ids", "top_probs")}
    mixed = rayfuse.collate([narrow, rows[1]])
    assert (mixed["top_ids"][0, :, 3:] == -1).all() and not mixed["top_probs"][0, :, 3:].any()


def test_only_fused_rows_make_a_batch(recipe):
    captured = list(rayfuse.open_dataset(recipe.storage, "captured", source="neox"))
    with pytest.raises(rayfuse.UserError, match=r"row_id, nats, .*it takes rows of the view"):
        rayfuse.collate(captured)
    with pytest.raises(rayfuse.UserError, match="collate got no rows"):
        rayfuse.collate([])
    with pytest.raises(rayfuse.UserError, match="view is 'captured', which is not trained on"):
        rayfuse.open_dataset(recipe.storage, "captured", source="neox").loss_settings()


def test_the_settings_of_the_loss_are_those_of_the_run(recipe):
    changes = {"train": {"lambda": {"start": 0.2, "end": 0.6}}}
    rows = rayfuse.open_run(recipe, **changes).open_dataset()
    assert rows.loss_settings(0.5) == {
        "clm_weight": pytest.approx(0.4),
        "divergence": "forward_kl",
        "temperature": 1.0,
        "skew": 0.1,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("captured", None), "there are several sources; give one as source: neox, gpt2"),
        (("aligned", "mpt"), "source is 'mpt', which is none; sources: neox, gpt2"),
        (("fused", "neox"), "source is 'neox', but view 'fused' is of all sources"),
    ],
)
def test_a_view_or_source_that_does_not_exist_is_refused(arguments, message, recipe):
    view, source = arguments
    with pytest.raises(rayfuse.UserError, match=message):
        rayfuse.open_dataset(recipe.storage, view, source=source)
    with pytest.raises(rayfuse.UserError, match="view is 'all'; the views are captured, aligned"):
        check_view("all")


def test_a_folder_without_rows_is_refused(tmp_path):
    with pytest.raises(rayfuse.UserError, match="has no aligned or captured rows; give the stor"):
        rayfuse.open_dataset(tmp_path)
    with pytest.raises(rayfuse.UserError, match="has no aligned or captured rows"):
        rayfuse.open_dataset(tmp_path / "aligned/a-0123456789ab")


def test_the_weights_of_the_same_sources_make_another_recipe(recipe):
    weighted = recipe.model_copy(
        update={"fuse": recipe.fuse.model_copy(update={"weights": {"gpt2": 3.0}})}
    )
    assert not _is_part(weighted, recipe)
    assert not _is_part(recipe, weighted)
    assert _is_part(weighted.model_copy(update={"sources": recipe.sources[:1]}), recipe)


def test_a_folder_decides_among_several_recipes_and_incomplete_rows_are_refused(tmp_path):
    first = write_run(tmp_path)
    changes = {"fuse": {"method": "min_ce"}, "align": {"method": "exact"}}
    other = rayfuse.open_run(first, **changes).recipe
    store_rows(other)
    with pytest.raises(rayfuse.UserError, match="has results of several recipes: aligned/gpt2-"):
        rayfuse.open_dataset(first.storage)
    for recipe, entries in ((first, 8), (other, 4)):
        rows = rayfuse.open_run(recipe).open_dataset()
        folder = Path(recipe.storage) / rows.reader.opener.data[1].folder
        for address in (folder, f"{folder}/"):
            opened = rayfuse.open_dataset(address)
            assert opened.recipe.fuse == recipe.fuse
            for row, expected in zip(opened, rows, strict=True):
                assert row["top_ids"].shape[1] == entries
                assert_equal_rows(row, expected)
    (folder / "manifest.json").unlink()
    with pytest.raises(rayfuse.UserError, match=r"aligned/neox-\w+ are incomplete; run `rayfuse"):
        rayfuse.open_dataset(folder)
