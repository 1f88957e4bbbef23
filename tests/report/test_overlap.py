"""Held-out documents that share a run of words with the corpus are counted."""

from dataclasses import replace
from random import Random

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayfuse.report import overlap
from rayfuse.report.gather import Findings
from rayfuse.report.overlap import RUN_WORDS, Overlap, find_overlaps, hash_runs
from rayfuse.report.verdict import judge
from rayfuse.schema import CORPUS
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.store import LocalStore
from tests.report.conftest import make_data


def write(tmp_path, name: str, *shards: list[list[str]]) -> DataSet:
    """Write documents, each a list of the texts of its rows, shard by shard."""
    tables = []
    for documents in shards:
        rows = [
            (text, i == len(document) - 1)
            for document in documents
            for i, text in enumerate(document)
        ]
        columns = {
            "row_id": [f"r{i}" for i in range(len(rows))],
            "doc_id": ["same id"] * len(rows),
            "domain": [""] * len(rows),
            "text": [text for text, _ in rows],
            "num_bytes": [len(text) for text, _ in rows],
            "ends_document": [ends for _, ends in rows],
            "target_ids": [[1]] * len(rows),
        }
        tables.append(pa.Table.from_pydict(columns, schema=CORPUS))
    return make_data(LocalStore(str(tmp_path)), "corpus", name, tables)


def find_overlap(corpus: DataSet, held_out: DataSet) -> Overlap:
    """Compare held-out documents alone."""
    return find_overlaps(corpus, held_out, {})[0]


def make_words(seed: int, count: int = 40) -> list[str]:
    random = Random(seed)
    return [f"w{random.randrange(10**6)}" for _ in range(count)]


def test_thirteen_equal_words_are_a_shared_run_and_twelve_are_not(tmp_path):
    first, second, third = (make_words(seed) for seed in range(3))
    corpus = write(tmp_path, "corpus", [[" ".join(first)]], [[" ".join(second)]])
    held_out = write(
        tmp_path,
        "held_out",
        [
            ["start " + " ".join(second[5 : 5 + RUN_WORDS]) + " end"],
            ["start " + " ".join(first[5 : 4 + RUN_WORDS]) + " end"],
            [" ".join(third)],
            ["short"],
        ],
    )
    assert find_overlap(corpus, held_out) == Overlap(3, 1, 2, 2)


def test_case_punctuation_and_the_borders_of_rows_do_not_hide_a_run(tmp_path):
    words = make_words(0)
    corpus = write(tmp_path, "corpus", [[" ".join(words[:20]) + " ", " ".join(words[20:])]])
    hidden = [", ".join(words[8:18]).upper() + "!", "\n" + ";".join(words[18:30])]
    assert find_overlap(corpus, write(tmp_path, "held_out", [hidden])).shared == 1


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from("abc"), max_size=60), st.lists(st.sampled_from("abc"), max_size=60))
def test_runs_are_equal_where_their_words_are(left, right):
    def list_runs(words: list[str]) -> set[tuple[str, ...]]:
        return {tuple(words[i : i + RUN_WORDS]) for i in range(len(words) - RUN_WORDS + 1)}

    hashes = [set(hash_runs(" ".join(words)).tolist()) for words in (left, right)]
    assert len(hashes[0] & hashes[1]) == len(list_runs(left) & list_runs(right))


def test_a_large_corpus_is_compared_on_its_first_shards_and_says_so(
    tmp_path, monkeypatch, findings: Findings, recipe
):
    monkeypatch.setattr(overlap, "MAX_SHARDS", 1)
    words = " ".join(make_words(0))
    corpus = write(tmp_path, "corpus", [["other"]], [[words]])
    assert find_overlap(corpus, write(tmp_path, "held_out", [[words]])) == Overlap(1, 0, 1, 2)
    assert (
        "2 of 180 held-out documents of 13 or more words share as many in a row with the corpus "
        "(its first 16 shards of 112)."
    ) in judge(findings, recipe).sentences


def test_the_questions_of_tasks_are_compared_beside_the_documents(
    tmp_path, findings: Findings, recipe
):
    first, second, third = (" ".join(make_words(seed)) for seed in range(3))
    corpus = write(tmp_path, "corpus", [[first], [second]])
    held_out = write(tmp_path, "held_out", [[third], [second]])
    found = find_overlaps(corpus, held_out, {"a": [first, third, "short"], "b": [third], "c": []})
    assert found[0] == Overlap(2, 1, 1, 1)
    assert found[1] == {
        "a": Overlap(2, 1, 1, 1), "b": Overlap(1, 0, 1, 1), "c": Overlap(0, 0, 1, 1)
    }  # fmt: skip
    assert (
        "1 of 50 questions of arc_easy of 13 or more words share as many in a row with the corpus "
        "(its first 16 shards of 112)."
    ) in judge(findings, recipe).sentences
    silent = replace(findings, task_overlap={}, task_overlap_fault="lm_eval is missing")
    assert (
        "The questions of the tasks were not compared with the corpus: lm_eval is missing."
    ) in judge(silent, recipe).sentences


@pytest.mark.parametrize("documents", [[], [["short"]]])
def test_nothing_to_compare_is_no_overlap(tmp_path, documents):
    corpus = write(tmp_path, "corpus", [[" ".join(make_words(0))]])
    found = find_overlap(corpus, write(tmp_path, "held_out", documents))
    assert (found.documents, found.shared, found.share) == (0, 0, 0.0)


def test_text_without_spaces_is_compared_by_character(tmp_path):
    chinese = "知识融合让多个模型教会一个小模型"
    corpus = write(tmp_path, "corpus", [[f"before{chinese}after"]])
    assert find_overlap(corpus, write(tmp_path, "held_out", [[f"x{chinese[:13]}y"]])).shared == 1
    other = write(tmp_path, "other", [[f"x{chinese[:12]}y{chinese[-2:]}"]])
    assert find_overlap(corpus, other) == Overlap(1, 0, 1, 1)
