"""Documents that are hostile or damaged: nothing vanishes, nothing escapes.

The numbers are those of the faults that the project's reliability list has.
"""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayfuse.config.base import UserError
from rayfuse.corpus.documents import MAX_NAME_CHARS, Document, read_documents
from rayfuse.corpus.shards import (
    batch_documents,
    build_rows,
    group_inputs,
    has_one_shard,
)
from rayfuse.corpus.split import find_fault, split_document
from rayfuse.models.tokenizer import TextTokenizer, load_tokenizer
from rayfuse.storage.codec import flatten_column
from rayfuse.storage.dataset import DataSet
from rayfuse.storage.store import LocalStore
from tests.align.test_families import LOSSY
from tests.corpus.files import (
    GOOD,
    MAX_BYTES,
    REAL,
    TOKENIZERS,
    WHOLE,
    batch_all,
    build_batch,
    check_rejects,
    good_lines,
    good_texts,
    list_files,
    read_all,
    write_lines,
)

ODD_TEXTS = st.one_of(
    st.text(max_size=60),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=300, max_size=500),
    st.sampled_from(["", " ", "\n\t", "x", "\x00", "\ud800", "\ufeff", "a\x00b", "\u200b"]),
)


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(ODD_TEXTS, max_size=20), shard_bytes=st.sampled_from([10, 300, 10**6]))
def test_fault_21_bytes_in_are_bytes_out_and_bytes_rejected(texts, shard_bytes, tmp_path_factory):
    path = tmp_path_factory.mktemp("d") / "d.jsonl"
    records = [{"id": f"{i}", "text": text} for i, text in enumerate(texts)]
    write_lines(path, [json.dumps(record).encode() for record in records])
    batches = batch_all(path, max_bytes=900, shard_bytes=shard_bytes)
    sizes = {record["id"]: measure(record["text"]) for record in records}
    rows = [row for batch in batches for row in build_batch(batch).to_pylist()]
    rejected = [reject.name for batch in batches for reject in batch.rejects]
    out = sum(row["num_bytes"] for row in rows) + sum(sizes[name] for name in rejected)
    assert out == sum(sizes.values())
    assert sorted({row["doc_id"] for row in rows} | set(rejected)) == sorted(sizes)
    for batch in batches:
        check_rejects(batch)


def measure(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        (" \r\n\t\u3000", "empty"),
        ("x" * (MAX_BYTES + 1), "over-long"),
        ("é" * (MAX_BYTES // 2 + 1), "over-long"),
    ],
)
def test_fault_21_an_empty_or_over_long_document_is_rejected_by_name(text, reason, tmp_path):
    record = json.dumps({"id": "odd", "text": text}).encode()
    (batch,) = batch_all(write_lines(tmp_path / "d.jsonl", [record, *good_lines()]))
    assert [reject.name for reject in batch.rejects] == ["odd"]
    assert reason in batch.rejects[0].reason
    assert [document.text for document in batch.documents] == GOOD


@pytest.mark.parametrize("name", ["d.jsonl", "d.txt", "d.parquet"])
def test_fault_21_a_text_of_exactly_the_longest_length_is_kept(name, tmp_path):
    text = "\u0441" * (MAX_BYTES // 2)  # \u0441 in JSON: three times as long
    if name == "d.txt":
        (tmp_path / name).write_text(text, encoding="utf-8")
    elif name == "d.jsonl":
        write_lines(tmp_path / name, [json.dumps({"text": text}).encode()])
    else:
        pq.write_table(pa.table({"text": [text]}), tmp_path / name)
    assert good_texts(read_all(tmp_path / name)) == [text]


def test_fault_21_one_character_is_one_row():
    rows = split_document(Document("d", "", "x"), TOKENIZERS, 24)
    assert [(row.text, row.ends_document) for row in rows] == [("x", True)]


def test_fault_21_files_said_to_make_one_shard_make_one(tmp_path):
    for number, text in enumerate(["x" * 40, "x" * 60, "", "", "y"]):
        (tmp_path / f"{number}.txt").write_text(text)
    write_lines(tmp_path / "9.jsonl", [b"1"] * 30)
    for shard_bytes in range(1, 220):
        for group in group_inputs(list_files(tmp_path), shard_bytes):
            documents = (d for file in group for d in read_documents(file, MAX_BYTES))
            batches = batch_documents(
                documents, WHOLE, shard_bytes=shard_bytes, max_document_bytes=MAX_BYTES
            )
            assert not has_one_shard(group, shard_bytes) or len(list(batches)) == 1


HOSTILE_LINES = {
    "binary": b'{"text": "' + b"\\u0001\\u0002" * 50 + b'"}',
    "NUL": b'{"text": "a\\u0000b"}',
    "invalid UTF-8": b'{"text": "canary-4711 \xff\xfe"}',
    "overlong UTF-8": b'{"text": "canary-4711 \xc0\xaf"}',
    "encoded surrogate": b'{"text": "canary-4711 \xed\xa0\x80"}',
    "lone surrogate": b'{"text": "canary-4711 \\ud800"}',
    "reversed pair": b'{"text": "canary-4711 \\udc00\\ud800"}',
    "surrogate id": b'{"id": "canary-4711\\ud800", "text": "x"}',
    "surrogate domain": b'{"domain": "canary-4711\\udfff", "text": "x"}',
    "over-long id": json.dumps({"id": "i" * (MAX_NAME_CHARS + 1), "text": "x"}).encode(),
    "over-long domain": json.dumps({"domain": "i" * 5000, "text": "x"}).encode(),
    "no JSON": b"canary-4711",
    "raw NUL": b"\x00" * 50,
    "UTF-16": '{"text": "canary-4711"}'.encode("utf-16"),
    "huge number": b'{"id": ' + b"9" * 5000 + b', "text": "x"}',
    "list": b'{"text": ["canary-4711"]}',
    "null": b'{"text": null}',
    "cut off": b'{"text": "canary-4711',
}


@pytest.mark.parametrize("name", HOSTILE_LINES)
def test_fault_22_a_line_that_is_no_text_is_rejected_and_its_neighbours_become_rows(name, tmp_path):
    lines = [good_lines()[0], HOSTILE_LINES[name], good_lines()[1]]
    (batch,) = batch_all(write_lines(tmp_path / "d.jsonl", lines))
    rows = build_batch(batch)
    assert "".join(rows["text"].to_pylist()) == "".join(GOOD)
    assert [reject.name for reject in batch.rejects] == ["d.jsonl:2"]
    check_rejects(batch)


def test_fault_22_a_pair_of_surrogates_is_one_character(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", [b'{"text": "\\ud83d\\ude00"}'])
    assert good_texts(read_all(path)) == ["\U0001f600"]


@pytest.mark.parametrize("field", ["text", "id", "domain"])
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), "dictionary"])
def test_fault_22_bad_utf8_in_a_parquet_cell_is_a_fault_of_its_row(field, kind, tmp_path):
    cells = {name: [b"one", b"two", b"three"] for name in ("text", "id", "domain")}
    cells[field][1] = b"canary-4711\xff"
    wide = kind == pa.large_string()
    columns = {
        name: pa.array(each, pa.large_binary() if wide else pa.binary()).view(
            pa.large_string() if wide else pa.string()
        )
        for name, each in cells.items()
    }
    if kind == "dictionary":
        columns = {name: column.dictionary_encode() for name, column in columns.items()}
    pq.write_table(pa.table(columns), tmp_path / "d.parquet")
    (batch,) = batch_all(tmp_path / "d.parquet")
    assert [document.text for document in batch.documents] == ["one", "three"]
    assert [document.doc_id for document in batch.documents] == ["one", "three"]
    assert "invalid UTF-8" in batch.rejects[0].reason
    check_rejects(batch)


def test_fault_22_a_file_name_that_is_no_unicode_still_names_its_documents(tmp_path):
    try:
        (tmp_path / os.fsdecode(b"bad\xff.txt")).write_text("text")
    except OSError:
        pytest.skip("this disk takes no such name")
    (batch,) = batch_all(tmp_path)
    assert build_batch(batch)["doc_id"].to_pylist() == ["bad\\udcff.txt"]


@pytest.mark.parametrize(
    "text",
    ["a" + "\u0301" * 100_000, "x7" * 100_000, "\ufdfa" * 2000, "\u1100\u1161\u11a8" * 5000],
    ids=["combining", "no blanks", "one character, 18 tokens", "jamo"],
)
@pytest.mark.parametrize("name", ["made here", "gpt-neox-20b", "t5-small", "phi-3-mini"])
def test_fault_22_a_text_without_a_place_to_cut_becomes_rows_that_fit(name, text, request):
    tokenizers = TOKENIZERS
    if name != "made here":
        tokenizers = [load_real(request.getfixturevalue("shared_data"), name)]
    check_rows(text, tokenizers, 512)


def test_fault_22_ten_megabytes_without_a_blank_become_rows_in_time():
    began = time.monotonic()
    check_rows("0123456789abcdef" * 655_360, TOKENIZERS[:1], 2048)
    assert time.monotonic() - began < 300


def load_real(shared_data: Path, name: str) -> TextTokenizer:
    if not (shared_data / "tokenizers" / name).is_dir():
        pytest.skip(f"no tokenizer {name}")
    return load_tokenizer(str(shared_data / "tokenizers" / name))


def check_rows(text: str, tokenizers: Sequence[TextTokenizer], max_tokens: int) -> None:
    rows = [row.text for row in split_document(Document("d", "", text), tokenizers, max_tokens)]
    assert "".join(rows) == text
    for tokenizer in tokenizers:
        encoded = tokenizer.encode_rows(rows, [True] * len(rows))
        assert max(len(ids) for ids in encoded) <= max_tokens


@pytest.mark.parametrize("name", REAL)
def test_fault_22_documents_of_special_tokens_are_text_like_any_other(name, shared_data):
    tokenizer = load_real(shared_data, name)
    added = tokenizer.backend.get_added_tokens_decoder()
    specials = [token.content for token in added.values()]
    assert specials
    for text in ("".join(specials) * 20, "\n".join(specials), specials[0]):
        assert find_fault(Document("d", "", text), MAX_BYTES) is None
        check_rows(text, [tokenizer], 64)
        if name != "t5-small":  # whose unigram model spells a marker with its own entry
            ids, _ = flatten_column(
                build_rows([Document("d", "", text)], tokenizer, [tokenizer], max_tokens=64),
                "target_ids",
            )
            known = {i for i, token in added.items() if token.special}
            assert set(ids.tolist()) & known <= {
                tokenizer.start_id,
                tokenizer.eos_id,
                tokenizer.backend.token_to_id("[UNK]"),
            }


@pytest.mark.parametrize("name", LOSSY)
def test_fault_24_rows_keep_the_text_that_a_tokenizer_changes(name):
    text = "ÀÉÎ Straße ＡＢＣ ﬁ\u0301 \u212b\u00a0\t\r\n UPPER lower\u200b 漢字 " * 20
    check_rows(text, [LOSSY[name]], 48)
    rows = build_rows([Document("d", "", text)], LOSSY[name], [LOSSY[name]], max_tokens=48)
    assert "".join(rows["text"].to_pylist()) == text
    assert sum(rows["num_bytes"].to_pylist()) == len(text.encode())


HOSTILE_NAMES = [
    "../../escaped",
    "/tmp/escaped",
    "..",
    "%2e%2e%2fescaped",
    "..\\escaped",
    "~/escaped",
    "file:///tmp/escaped",
    "a/../../escaped",
    "\u202e/escaped",
    "escaped\n\x1b[2J",
    "CON",
    "'; rm -rf /; '",
]


def test_fault_29_names_in_documents_write_nothing_outside_the_data_set(tmp_path):
    lines = [
        json.dumps({"id": name, "domain": name, "text": text}).encode()
        for name in HOSTILE_NAMES
        for text in ("text", "")
    ]
    write_lines(tmp_path / "d.jsonl", lines)
    data = DataSet(LocalStore(str(tmp_path / "root/storage")), "corpus", "x", "fp")
    (batch,) = batch_all(tmp_path / "d.jsonl")
    rows = build_batch(batch)
    commit = data.write_shard(0, rows, tokens=0, rejects=batch.rejects)
    assert [reject.name for reject in batch.rejects] == HOSTILE_NAMES
    stored = data.read_shard(commit)
    assert list(dict.fromkeys(stored["doc_id"].to_pylist())) == HOSTILE_NAMES
    assert list(dict.fromkeys(stored["domain"].to_pylist())) == HOSTILE_NAMES
    files = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    folder = Path("root/storage", data.folder)
    expected = [folder / commit.file, folder / "rejects/00000.jsonl", folder / "commits/00000.json"]
    assert sorted(files) == sorted([Path("d.jsonl"), *expected])


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder of documents beside a file that is none of them."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret.txt").write_text("not in the folder")
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents/a.txt").write_text("in the folder")
    return tmp_path / "documents"


def test_fault_29_links_to_files_of_the_folder_are_read_and_links_to_folders_are_not(folder):
    (folder / "b.txt").symlink_to(folder / "a.txt")
    (folder / "up").symlink_to(folder.parent / "outside")
    (folder / "loop").symlink_to(folder)
    assert good_texts(read_all(folder)) == ["in the folder"] * 2


@pytest.mark.parametrize("given", ["", "/*.txt"])
def test_fault_29_a_link_out_of_a_folder_is_refused(given, folder):
    (folder / "b.txt").symlink_to(folder.parent / "outside/secret.txt")
    with pytest.raises(UserError, match=r"b.txt are a link out of .*secret.txt; remove the link"):
        list_files(f"{folder}{given}")


@pytest.mark.parametrize("given", ["", "/*.txt", "/*/*.txt", "/**"])
def test_fault_29_a_file_uri_leads_through_no_link(given, folder):
    (folder / "b.txt").symlink_to(folder.parent / "outside/secret.txt")
    (folder / "up").symlink_to(folder.parent / "outside")
    try:
        found = good_texts(read_all(f"file://{folder}{given}"))
    except UserError:
        found = []
    assert "not in the folder" not in found


def test_fault_29_a_pattern_does_not_lead_through_a_link_to_a_folder(folder):
    (folder / "up").symlink_to(folder.parent / "outside")
    with pytest.raises(UserError, match=r"up/secret.txt are a link out of"):
        list_files(folder / "*/*.txt")


def test_fault_29_a_hidden_link_and_a_link_that_the_recipe_names_are_no_error(folder):
    (folder / ".b.txt").symlink_to(folder.parent / "outside/secret.txt")
    assert good_texts(read_all(folder)) == ["in the folder"]
    assert good_texts(read_all(folder / ".b.txt")) == ["not in the folder"]


def test_fault_29_the_blobs_of_the_hubs_cache_are_read_and_nothing_else(folder):
    cache = folder / "datasets--a--b"
    (cache / "blobs").mkdir(parents=True)
    (cache / "blobs/17").write_text("a blob")
    snapshot = cache / "snapshots/revision"
    snapshot.mkdir(parents=True)
    (snapshot / "a.txt").symlink_to("../../blobs/17")
    assert good_texts(read_all(snapshot)) == ["a blob"]
    (snapshot / "b.txt").symlink_to(folder.parent / "outside/secret.txt")
    with pytest.raises(UserError, match=r"b.txt are a link out of"):
        list_files(snapshot)


@pytest.mark.parametrize("target", ["nowhere", "a.txt"])
def test_fault_29_a_link_to_nothing_is_an_error_and_no_missing_document(target, tmp_path):
    (tmp_path / "a.txt").symlink_to(tmp_path / target)
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(ValueError, match=r"a.txt are a broken link; restore its file or remove it"):
        list_files(tmp_path)
