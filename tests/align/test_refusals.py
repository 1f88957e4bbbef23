"""Shards that do not fit their text or vocabulary are refused, with the row and the position."""

import json
import re

import pyarrow as pa
import pytest

from benchmarks.synthetic import make_captured, make_corpus
from rayfuse.align.method import Alignment, build_alignment
from rayfuse.align.shard import align_shard
from rayfuse.align.vocab_map import map_vocabulary
from tests.align.test_families import LOSSLESS
from tests.fakes import SAMPLE


def make_shard() -> tuple[pa.Table, pa.Table, Alignment]:
    source, target = LOSSLESS["gpt-2"], LOSSLESS["llama-2"]
    corpus = make_corpus(SAMPLE, target, max_tokens=512)
    captured = make_captured(corpus, source, top_k=4)
    maps = map_vocabulary(source, target)
    return corpus, captured, build_alignment(source, target, maps=maps)


def replace_ids(table: pa.Table, column: str, row: int, at: int, value: int) -> pa.Table:
    rows = table[column].to_pylist()
    rows[row][at] = value
    index = table.schema.get_field_index(column)
    return table.set_column(index, column, pa.array(rows, type=table.schema.field(column).type))


def test_ids_outside_the_vocabulary_are_named_by_row_and_position():
    corpus, captured, alignment = make_shard()
    with pytest.raises(ValueError, match=r"row 2, position 3: top_ids .*999.* vocabulary of 360"):
        align_shard(corpus, replace_ids(captured, "top_ids", 2, 3 * 4 + 1, 999), alignment)
    with pytest.raises(ValueError, match=r"row 1, position 5: token 999 is outside"):
        align_shard(corpus, replace_ids(captured, "token_ids", 1, 5, 999), alignment)


def test_tokens_of_another_text_are_refused():
    corpus, captured, alignment = make_shard()
    with pytest.raises(ValueError, match=r"row 1: its tokens are not those of its text"):
        align_shard(corpus, replace_ids(captured, "token_ids", 1, 5, 40), alignment)


def test_the_error_shows_the_tokens_around_the_first_difference():
    corpus, captured, alignment = make_shard()
    ids = captured["token_ids"].to_pylist()[1]
    wrong = r"around token 4 of the text they are (\[.*\]) b'.*', the text's are (\[.*\]) b'"
    with pytest.raises(ValueError, match=wrong) as error:
        align_shard(corpus, replace_ids(captured, "token_ids", 1, 5, 40), alignment)
    theirs, own = re.search(wrong, str(error.value)).groups()  # the start token is not of the text
    assert json.loads(own) == ids[2:9]
    assert json.loads(theirs) == [*ids[2:5], 40, *ids[6:9]]
